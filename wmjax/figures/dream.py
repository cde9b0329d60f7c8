"""Pictures of what a world model expects: truth, model and error as an animation, reconstructions, error by horizon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.figures import charts, frames
from wmjax.figures.frames import FAINT, INK, PREDICTED, SEEN, enlarged, font
from wmjax.figures.windows import OpenLoop

WINDOWS = 4  # of an animation
WIDEST = 1100  # pixels of their panels together
GRID_ROWS = 2  # of reconstructions
GRID_COLUMNS = 4
MILLISECONDS = 400  # for a step
STRIP = 2, 8  # columns of a strip: of the context, and after it
THUMB = 96  # pixels that a picture of a strip is at least wide
MARGIN, SCALE, TOP, BOTTOM, GAP, EDGE = 122, 74, 78, 34, 10, 4  # pixels around panels, between them, of their frames
ROWS = (  # in a context, and after it
    ("truth", "what happened", "what happened"),
    ("model", "reconstruction", "prediction"),
    ("error", "|truth - model|", "|truth - model|"),
)


def write_dream_gif(path: str | Path, result: OpenLoop, context: int, name: str, title: str = "") -> list[Path]:
    """Writes an animation with rows truth, model and error; columns are windows, those whose episodes go on longest.

    Frames around panels are green while the model sees the observations, then orange. Errors are shares of full
    brightness, mean over color channels, by a scale that is drawn. What is beyond the end of a window's episode is
    pale. Returns the files: a GIF, and an MP4 where ffmpeg is there.
    """
    panel = enlarged(result.truth[name][:1, :1]).shape[2:4]
    count = max(1, min(WINDOWS, WIDEST // panel[1]))
    order = np.argsort(-result.valid.sum(0), kind="stable")[:count]
    truth, model, error = _compared(result.truth[name][:, order], result.model[name][:, order])
    valid = np.concatenate([np.ones((context, len(order)), bool), result.valid[:, order]])
    top = scale_top(error[context:][valid[context:]])
    colors = _heat_colors()
    pictures = []
    for t in range(len(truth)):
        heat = colors[np.minimum(error[t] / top * 255, 255).astype(int)]
        rows = [frames.rgb(np.rint(x).astype(np.uint8)) for x in (truth[t], model[t])] + [heat]
        pictures.append(_dream_frame(rows, valid[t], t, context, len(truth), top, title))
    return frames.write_animation(Path(path), pictures, MILLISECONDS)


def _compared(truth: np.ndarray, model: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures `[..., H, W, C]`, float32 in [0, 255], and their error `[..., H, W]` in [0, 1]."""
    truth, model = (np.clip(np.nan_to_num(x.astype(np.float32)), 0, 255) for x in (truth, model))
    return truth, model, np.abs(truth - model).mean(-1) / 255


def scale_top(errors: np.ndarray) -> float:
    """Where the scale of errors ends: what one pixel in a hundred exceeds, rounded up to one digit, in [0.05, 1]."""
    errors = errors[np.isfinite(errors)]
    high = float(np.quantile(errors, 0.99)) if errors.size else 1.0
    high = min(max(high, 0.05), 1.0)
    power = 10.0 ** math.floor(math.log10(high) + 1e-9)
    return round(math.ceil(high / power - 1e-6) * power, 9)


def _heat_colors() -> np.ndarray:
    """Colors of errors, uint8 `[256, 3]`: black is none."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _dream_frame(
    rows: list[np.ndarray], valid: np.ndarray, t: int, context: int, total: int, top: float, title: str
) -> Any:
    """One step: `rows` are uint8 `[N, H, W, 3]` of truth, model and error; the error's scale ends at `top`."""
    rows = [enlarged(row) for row in rows]
    count, high, wide = rows[0].shape[:3]
    width = MARGIN + count * (wide + GAP) + SCALE
    picture, draw = frames.canvas(max(width, 560), TOP + len(rows) * (high + GAP) + BOTTOM)
    seen = t < context
    color = SEEN if seen else PREDICTED
    width = picture.size[0]
    episodes = f"{count} episode{'s' * (count > 1)}"
    draw.text((14, 10), frames.fitted(title, width - 300, 19, bold=True), INK, font(19, bold=True))
    draw.text((width - 14, 10), f"{episodes}, step {t + 1} of {total}", INK, font(19, bold=True), anchor="ra")
    told = f"CONTEXT, step {t + 1} of {context}: the world model sees the true frames"
    if not seen:
        horizon = f"horizon {t + 1 - context} of {total - context}"
        told = f"PREDICTION, {horizon}: the world model sees no frame, only the actions"
    draw.rectangle((0, 40, width, 69), color)
    draw.text((14, 54), told, (255, 255, 255), font(17, bold=True), anchor="lm")
    for number, (row, (word, *more)) in enumerate(zip(rows, ROWS, strict=True)):
        y = TOP + number * (high + GAP)
        draw.text((14, y + high // 2 - 14), word, INK, font(20, bold=True), anchor="lm")
        draw.text((14, y + high // 2 + 10), more[not seen], FAINT, font(12), anchor="lm")
        for i, pixels in enumerate(row):
            x = MARGIN + i * (wide + GAP)
            draw.rectangle((x - EDGE, y - EDGE, x + wide + EDGE - 1, y + high + EDGE - 1), color)
            shown = pixels if valid[i] else (255 - (255 - pixels.astype(int)) // 4).astype(np.uint8)
            frames.paste(picture, shown, x, y)
            if not valid[i]:
                draw.text((x + wide // 2, y + high // 2), "episode is over", INK, font(17, bold=True), anchor="mm")
    _draw_scale(picture, draw, MARGIN + count * (wide + GAP) + 6, TOP + 2 * (high + GAP), high, top)
    _draw_timeline(draw, picture.size, t, context, total)
    return picture


def _draw_scale(picture: Any, draw: Any, left: int, top: int, height: int, highest: float) -> None:
    """The colors of errors, from 0 to `highest` and what is above it; 1 is full brightness."""
    bar = _heat_colors()[np.linspace(255, 0, height).astype(int)][:, None].repeat(12, 1)
    frames.paste(picture, bar, left, top)
    draw.text((left + 17, top), f"{highest:g}" if highest == 1 else f"≥ {highest:g}", INK, font(13), anchor="lt")
    draw.text((left + 17, top + height), "0", INK, font(13), anchor="lb")


def _draw_timeline(draw: Any, size: tuple[int, int], t: int, context: int, total: int) -> None:
    """A mark for each step along the bottom: those to come are pale."""
    width, height = size
    step = (width - 28) / total
    for i in range(total):
        color = SEEN if i < context else PREDICTED
        pale = tuple(255 - (255 - c) // 4 for c in color)
        left = 14 + i * step
        draw.rectangle((left, height - 20, left + step - 3, height - 10), color if i <= t else pale)


def write_dream_strip(
    path: str | Path, result: OpenLoop, context: int, name: str, title: str = "", window: int = 0
) -> None:
    """Writes a PNG of one window, a column for each step: the rows of `write_dream_gif` as a still picture.

    Of the context the last steps are shown, of a long prediction some that are evenly apart. `window` counts from the
    one whose episode goes on longest.
    """
    before, after = STRIP
    later = np.linspace(context, context + result.horizon - 1, min(result.horizon, after)).round().astype(int)
    steps = [*range(max(0, context - before), context), *later]
    column = np.argsort(-result.valid.sum(0), kind="stable")[window]
    truth, model, error = _compared(result.truth[name][steps, column], result.model[name][steps, column])
    top = scale_top(error[-len(later) :])
    heat = _heat_colors()[np.minimum(error / top * 255, 255).astype(int)]
    rows = [frames.rgb(np.rint(x).astype(np.uint8)) for x in (truth, model)] + [heat]
    times = -(-THUMB // truth.shape[2])
    rows = [frames.repeated(row, times) for row in rows]
    high, wide = rows[0].shape[1:3]
    picture, draw = frames.canvas(MARGIN + len(steps) * (wide + GAP) + SCALE, TOP + 3 * (high + GAP))
    draw.text((14, 8), frames.fitted(title, picture.size[0] - 28, 19, bold=True), INK, font(19, bold=True))
    for number, (row, (word, *_)) in enumerate(zip(rows, ROWS, strict=True)):
        y = TOP + number * (high + GAP)
        draw.text((14, y + high // 2), word, INK, font(20, bold=True), anchor="lm")
        for i, pixels in enumerate(row):
            x, color = MARGIN + i * (wide + GAP), SEEN if steps[i] < context else PREDICTED
            if number == 0:
                told = f"sees {steps[i] + 1}" if steps[i] < context else f"+{steps[i] + 1 - context}"
                draw.rectangle((x - EDGE, y - 34, x + wide + EDGE - 1, y - EDGE), color)
                draw.text((x + wide // 2, y - 19), told, (255, 255, 255), font(17, bold=True), anchor="mm")
            draw.rectangle((x - EDGE, y - EDGE, x + wide + EDGE - 1, y + high + EDGE - 1), color)
            frames.paste(picture, pixels, x, y)
    _draw_scale(picture, draw, MARGIN + len(steps) * (wide + GAP) + 6, TOP + 2 * (high + GAP), high, top)
    frames.write_png(Path(path), picture)


def write_reconstructions(path: str | Path, result: OpenLoop, context: int, name: str, title: str = "") -> None:
    """Writes a PNG of the last frames that the model saw, one of each window, each above its reconstruction."""
    truth, model = result.truth[name][context - 1], np.clip(np.rint(result.model[name][context - 1]), 0, 255)
    error = np.square((model - truth) / 255.0).reshape(len(truth), -1).mean(1)
    truth, model = (enlarged(frames.rgb(x.astype(np.uint8))) for x in (truth, model))
    high, wide = truth.shape[1:3]
    columns = max(1, min(GRID_COLUMNS, WIDEST // wide, len(truth)))
    shown = min(len(truth), GRID_ROWS * columns)
    cell, pair = wide + GAP, 2 * high + 2 * GAP + 24
    width = max(MARGIN + columns * cell + 14, 560)
    picture, draw = frames.canvas(width, 66 + -(-shown // columns) * pair)
    draw.text((14, 10), frames.fitted(title, width - 28, 19, bold=True), INK, font(19, bold=True))
    told = "Frames that the model saw, and what it makes of its state after them; mean squared error below."
    draw.text((14, 38), frames.fitted(told, width - 28, 14), FAINT, font(14))
    for i in range(shown):
        x, y = MARGIN + i % columns * cell, 66 + i // columns * pair
        frames.paste(picture, truth[i], x, y)
        frames.paste(picture, model[i], x, y + high + 4)
        draw.rectangle((x - 1, y - 1, x + wide, y + 2 * high + 4), outline=FAINT)
        draw.text((x + wide // 2, y + 2 * high + 7), f"{error[i]:.2g}", FAINT, font(13), anchor="ma")
        if i % columns == 0:
            draw.text((14, y + high // 2), "truth", INK, font(20, bold=True), anchor="lm")
            draw.text((14, y + high + 4 + high // 2 - 10), "model", INK, font(20, bold=True), anchor="lm")
            draw.text((14, y + high + 4 + high // 2 + 14), "reconstruction", FAINT, font(12), anchor="lm")
    frames.write_png(Path(path), picture)


def plot_horizon_errors(path: str | Path, errors: Mapping[str, Any], context: int, title: str = "") -> Path:
    """Draws error by horizon, a panel for each observation: of the model, and of two guesses that know no dynamics.

    Args:
      path: of the picture; its suffix says its format (`charts.picture_path`).
      errors: as `windows.horizon_errors` gives them.
      context: steps that the model saw.
      title: of the picture.

    Returns:
      The file.
    """
    from matplotlib.figure import Figure

    path, count = charts.picture_path(path), errors["count"]
    names = [name for name in errors if name != "count"]
    figure = Figure(figsize=(6.4, 1.0 + 3.2 * len(names)), layout="constrained")
    figure.suptitle(charts.plain(title or "Error of open-loop predictions"), fontsize="medium")
    horizons = np.arange(1, len(count) + 1)
    styles = {
        "model": ("the model", "-o", "C1"),
        "repeat_last": ("guess: the last frame seen stays", "--", "0.35"),
        "mean_frame": ("guess: the mean of all frames", ":", "0.35"),
    }
    for axes, name in zip(figure.subplots(len(names), squeeze=False).flat, names, strict=True):
        for kind, (words, style, color) in styles.items():
            values = np.array([np.nan if value is None else value for value in errors[name][kind]])
            axes.plot(horizons, values, style, color=color, label=words, markersize=4)
        axes.set(xlabel=f"horizon: steps predicted after {context} seen", ylabel=f"mean squared error, {name}")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0.5, len(count) + 0.5)
        axes.grid(alpha=0.3)
    lasts = (
        f"{count[0]} windows" if len(set(count)) == 1 else f"{count[0]} windows at horizon 1, {count[-1]} at the last"
    )
    charts.legend_below(figure, f"{lasts}; lower is better; pictures count in [0, 1]")
    return charts.save(figure, path)
