"""Moments of a session as an animation: the dream and the real environment side by side, with what led there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmjax.figures import frames
from wmjax.figures.frames import FAINT, INK, PREDICTED, SEEN, font
from wmjax.play.session import Moment

WIDE = 256  # pixels that each picture is at least wide
SIDE, TOP, BOTTOM, GAP, EDGE = 16, 62, 44, 20, 4
FASTEST = 20  # milliseconds of a frame: browsers show shorter ones slowly


def write_recording(path: Path, moments: Sequence[Moment], speed: float, title: str) -> list[Path]:
    """Writes a GIF, and an MP4 beside it where ffmpeg is there; a frame for each moment. Returns the files.

    Args:
      path: of the GIF.
      moments: at least one; their states are not read.
      speed: steps per second.
      title: of the run.
    """
    pictures = [_frame(moment, title) for moment in moments]
    milliseconds = max(FASTEST, round(1000 / speed))
    return frames.write_animation(Path(path), pictures, milliseconds, last=max(milliseconds, 800))


def _frame(moment: Moment, title: str) -> Any:
    pair = [moment.imagined.frame, moment.happened.frame]
    times = max(1, -(-WIDE // pair[0].shape[1]))
    pair = [frames.repeated(pixels, times) for pixels in pair]
    high, wide = pair[0].shape[:2]
    picture, draw = frames.canvas(2 * (SIDE + wide) + GAP, TOP + high + BOTTOM)
    width = picture.size[0]
    draw.text((SIDE, 8), frames.fitted(title, width - 2 * SIDE, 14, bold=True), INK, font(14, bold=True))
    imagined, happened = moment.imagined, moment.happened
    dreamed = f"P(continue) {imagined.cont:.2f}, return {moment.dreamed:+.2f}"
    real = "waits: it cannot go back" if moment.stands else f"return {happened.earned:+.2f}"
    told = (("DREAM", PREDICTED, dreamed), ("REAL", SEEN, real))
    for i, (pixels, (word, color, line)) in enumerate(zip(pair, told, strict=True)):
        left = SIDE + i * (wide + GAP)
        draw.text((left, TOP - 12), word, color, font(15, bold=True), anchor="lb")
        ends = moment.began if i == 0 else happened.is_last
        mark = ("begins here" if i == 0 else "episode ends") if ends else ""
        draw.text((left + wide, TOP - 12), mark, INK, font(13), anchor="rb")
        draw.rectangle((left - EDGE, TOP - EDGE, left + wide + EDGE - 1, TOP + high + EDGE - 1), color)
        frames.paste(picture, pixels, left, TOP)
        draw.text((left, TOP + high + 10), frames.fitted(line, wide, 13), INK, font(13))
    draw.text(
        (width - SIDE, TOP + high + 28), f"step {moment.number}, by the {moment.by}", FAINT, font(12), anchor="ra"
    )
    return picture
