"""Pictures of a comparison: functions that draw on axes, for one PNG of all and, for the page, one SVG of each."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wmjax import files

COLORS = ("#3b7dd8", "#e07b1a", "#2ca25f", "#c45ab3", "#d1495b", "#8c6d31", "#17a2b8", "#7f7f7f", "#6a51a3", "#b5a300")
MARKERS = "osD^vPX*<>"
INK = "#010203"  # of text and axes, which the page colors as its own text
HOUR = 3600.0
Env = Mapping[str, Any]  # as `summary.environment` gives it


def _style(env: Env, label: str) -> tuple[str, str]:
    """Color and marker of a group, the same in all pictures of an environment."""
    index = [group["label"] for group in env["groups"]].index(label)
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def _lines(ax: Any, env: Env) -> None:
    """What random play earns, and what is known to be possible."""
    reference = env["reference"]
    for value, words, style in (
        (reference["random"], "random", ":"),
        (reference["best"], reference["best_is"], "--"),
    ):
        if value is not None:
            ax.axhline(value, color=INK, linestyle=style, linewidth=1, alpha=0.7)
            ax.annotate(
                f"{words} {value:g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                textcoords="offset points", ha="right", fontsize=8, color=INK,
            )  # fmt: skip


def curves(ax: Any, env: Env, over: str) -> None:
    """Returns of evaluations over env steps or wall time: IQM and interval over seeds, and each seed thin."""
    longest = max((group["curves"][over]["x"][-1] for group in env["groups"] if group["curves"][over]["x"]), default=1)
    unit, words = (1.0, "env steps") if over == "steps" else (
        (HOUR, "hours") if longest > 2 * HOUR else (60.0, "minutes") if longest > 120 else (1.0, "seconds")
    )  # fmt: skip
    for group in env["groups"]:
        curve, (color, marker) = group["curves"][over], _style(env, group["label"])
        for seed in curve["by_seed"]:
            ax.plot(np.array(seed["x"]) / unit, seed["y"], color=color, linewidth=0.7, alpha=0.35)
        if curve["x"]:
            x = np.array(curve["x"]) / unit
            ax.plot(x, curve["iqm"], color=color, linewidth=2, label=group["label"], marker=marker, markevery=10, ms=4)
            if curve["interval"] is not None:
                ax.fill_between(x, *curve["interval"], color=color, alpha=0.18, linewidth=0)
    _lines(ax, env)
    ax.set_xlabel(words if over == "steps" else f"wall time, {words}")
    ax.set_ylabel("return")


def scores(ax: Any, env: Env) -> None:
    """Returns at the end: a mark for each seed, IQM and interval."""
    groups = env["groups"]
    for row, group in enumerate(groups):
        color, marker = _style(env, group["label"])
        values = [value for value in group["end"]["by_seed"] if value is not None]
        ax.scatter(values, [row - 0.16] * len(values), color=color, marker=marker, s=22, alpha=0.8, linewidths=0)
        if group["end"]["interval"] is not None:
            ax.plot(
                group["end"]["interval"], [row + 0.16] * 2, color=color, linewidth=6, alpha=0.4, solid_capstyle="butt"
            )
        if group["end"]["iqm"] is not None:
            ax.plot([group["end"]["iqm"]] * 2, [row, row + 0.32], color=color, linewidth=3)
    for name, style in (("random", ":"), ("best", "--")):
        if env["reference"][name] is not None:
            ax.axvline(env["reference"][name], color=INK, linestyle=style, linewidth=1, alpha=0.7)
    ax.set_yticks(range(len(groups)), [group["label"] for group in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel("return at the end")


def improvement(ax: Any, env: Env) -> None:
    """P(row > column) as colors and numbers."""
    labels, matrix = env["improvement"]["labels"], env["improvement"]["matrix"]
    values = np.array([[np.nan if cell is None else cell["probability"] for cell in row] for row in matrix])
    if len(labels) < 2:
        ax.set_axis_off()
        return
    ax.imshow(values, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto", alpha=0.6)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(j, i, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=9, color=INK)
    ax.set_xticks(range(len(labels)), labels, rotation=25, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title("P(row earns more than column)", fontsize=9, color=INK)
    ax.grid(False)


def profiles(ax: Any, env: Env) -> None:
    """Share of seeds above each return."""
    found = env["profiles"]
    for label, profile in found["groups"].items():
        color, _ = _style(env, label)
        ax.plot(found["thresholds"], profile["share"], color=color, linewidth=2, label=label, drawstyle="steps-post")
        if profile["interval"] is not None:
            ax.fill_between(
                found["thresholds"], *profile["interval"], color=color, alpha=0.12, linewidth=0, step="post"
            )
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("return τ at the end")
    ax.set_ylabel("share of seeds with more than τ")


def open_loop(ax: Any, env: Env, name: str) -> None:
    """Error of open-loop predictions by horizon."""
    found = env["open_loop"]["entries"][name]
    array = lambda values: np.array([np.nan if value is None else value for value in values])
    count = sum(1 for number in env["open_loop"]["count"] if number)
    x = np.arange(1, count + 1)
    for kind, words, style in (("repeat_last", "last frame stays", "--"), ("mean_frame", "mean frame", ":")):
        ax.plot(x, array(found[kind])[:count], color=INK, linestyle=style, linewidth=1.3, label=words)
    for label, errors in found["agents"].items():
        color, marker = _style(env, label)
        ax.plot(x, array(errors["mean"])[:count], color=color, linewidth=2, marker=marker, ms=4, label=label)
        if errors["interval"] is not None:
            ax.fill_between(
                x, *(array(side)[:count] for side in errors["interval"]), color=color, alpha=0.18, linewidth=0
            )
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel(f"horizon, steps after {env['open_loop']['context']} seen")
    ax.set_ylabel(f"squared error of {name}")


def of_environment(env: Env) -> list[tuple[str, str, Callable[[Any], None], tuple[float, float], bool]]:
    """Name, words, drawing, size and whether a legend belongs to it, of each picture."""
    pictures = [
        ("steps", "Return over env steps", lambda ax: curves(ax, env, "steps"), (6.2, 3.6), True),
        ("seconds", "Return over wall time", lambda ax: curves(ax, env, "seconds"), (6.2, 3.6), True),
        ("scores", "Returns at the end", lambda ax: scores(ax, env), (6.2, 0.9 + 0.5 * len(env["groups"])), False),
        ("profiles", "Performance profiles", lambda ax: profiles(ax, env), (6.2, 3.4), True),
    ]
    for name in env["open_loop"].get("entries", {}):
        draw = lambda ax, name=name: open_loop(ax, env, name)
        pictures.append((f"open-loop-{name}", f"Open-loop error, {name}", draw, (6.2, 3.6), True))
    return pictures


def _dress(ax: Any, legend: bool) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.tick_params(colors=INK, labelsize=8)
    for text in (ax.xaxis.label, ax.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    ax.grid(True, color=INK, alpha=0.12, linewidth=0.6)
    ax.set_axisbelow(True)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, frameon=False, labelcolor=INK)


def svg(draw: Callable[[Any], None], size: tuple[float, float], legend: bool, prefix: str) -> str:
    """A picture as an SVG element that takes the color of the text around it; `prefix` makes its ids its own."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        draw(ax)
        _dress(ax, legend)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def write_png(path: Path, title: str, environments: Sequence[Env]) -> Path:
    """Everything in one picture: a row of panels for each environment."""
    from matplotlib.figure import Figure

    rows = [[*of_environment(env), ("improvement", "", lambda ax, env=env: improvement(ax, env), (6, 4), False)]
            for env in environments]  # fmt: skip
    columns = 3
    heights = [-(-len(row) // columns) for row in rows]
    figure = Figure(figsize=(15, 3.9 * sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    axes = figure.subplots(sum(heights), columns, squeeze=False)
    line = 0
    for env, row, height in zip(environments, rows, heights, strict=True):
        places = axes[line : line + height].flat
        for place, ax in enumerate(places):
            if place >= len(row):
                ax.set_axis_off()
                continue
            _, words, draw, _, legend = row[place]
            draw(ax)
            _dress(ax, legend)
            if words:
                ax.set_title(f"{env['env']}: {words[0].lower()}{words[1:]}", fontsize=10)
        line += height
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write(path, buffer.getvalue())
    return path
