"""A video of one episode, with its step, reward, return and action."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wmjax.figures import frames
from wmjax.figures.frames import FAINT, INK, PREDICTED, SEEN, enlarged, font
from wmjax.figures.windows import play
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Box, Discrete, Env, EnvSpec, HostEnv, PyTree, Space, UsageError

STEPS = 1000  # at most, of an episode
FRAMES = 250  # at most, of a video: of a longer episode some steps are not shown
SECONDS = 12.5  # of a short one; steps are shown for 50 to 400 milliseconds
WIDE = 384  # pixels that the picture is at least wide
TOP, BOTTOM, SIDE = 40, 96, 12  # pixels around the picture
BARS = 8  # entries of an action that are drawn; of more there are words alone


def pictures(spec: EnvSpec) -> list[str]:
    """Names of the observations that can be shown. Raises `UsageError` where there is none."""
    names = [name for name, space in spec.obs.items() if getattr(space, "dtype", "") == "uint8"]
    if not names:
        raise UsageError(f"video: the observations {', '.join(sorted(spec.obs))} are no pictures; leave it out")
    return names


def suffix(name: str, names: Sequence[str]) -> str:
    """What tells the file of one entry of observations from those of others: "" where there is one only."""
    return "" if len(names) == 1 else f"-{name.replace('/', '-')}"


def write_episode(
    folder: str | Path, agent: Agent, env: Env | HostEnv, params: PyTree, key: Array, title: str = ""
) -> list[Path]:
    """Plays one episode as in evaluation, and writes what is seen in it as `episode.gif`, or one GIF for each picture.

    At most `STEPS` steps of it. Pictures are enlarged; step, reward, return so far and the action chosen on seeing them
    are drawn below. Where ffmpeg is there an MP4 is written, too.

    Returns:
      The files.

    Raises:
      UsageError: the environment observes no picture.
    """
    names = pictures(env.spec)
    steps = min(env.spec.max_episode_steps or STEPS, STEPS) + 1  # with the first record
    records = jax.device_get(play(agent, env, params, key, 1, steps)._replace(latent=()))
    ends = records.step.is_last[:, 0]
    length = 1 + int(ends.argmax()) if ends.any() else steps
    records = jax.tree.map(lambda x: x[:length, 0], records)
    written = []
    for name in names:
        path = Path(folder) / f"episode{suffix(name, names)}.gif"
        shown = np.unique(np.linspace(0, length - 1, min(length, FRAMES)).round().astype(int))
        milliseconds = int(np.clip(1000 * SECONDS / len(shown), 50, 400))
        drawn = [_episode_frame(records, t, name, env.spec.action, title) for t in shown]
        written += frames.write_animation(path, drawn, milliseconds)
    return written


def _episode_frame(records: Record, t: int, name: str, space: Space, title: str) -> Any:
    """Step `t` of `records` `[T, ...]`."""
    step, last = records.step, len(records.step.reward) - 1
    pixels = enlarged(frames.rgb(step.obs[name][t]), WIDE)
    high, wide = pixels.shape[:2]
    picture, draw = frames.canvas(max(wide + 2 * SIDE, 430), TOP + high + BOTTOM)
    width = picture.size[0]
    draw.text((SIDE, 11), frames.fitted(title, width - 2 * SIDE, 15, bold=True), INK, font(15, bold=True))
    left = (width - wide) // 2
    frames.paste(picture, pixels, left, TOP)
    draw.rectangle((left - 1, TOP - 1, left + wide, TOP + high), outline=FAINT)
    y = TOP + high + 12
    total = float(step.reward[: t + 1].sum(dtype=np.float64))
    for x, words in (
        (SIDE, f"step {t} of {last}"),
        (125, f"reward {step.reward[t]:.3g}"),
        (245, f"return {total:.4g}"),
    ):
        draw.text((x, y), words, INK, font(15, bold=True))
    y += 27
    if t == last and step.is_last[t]:
        told = "the episode ends here" if step.is_terminal[t] else "the time limit ends the episode here"
        draw.text((SIDE, y), told, PREDICTED, font(15, bold=True))
    else:
        _draw_action(draw, y, width, np.asarray(records.action[t]), space)
    draw.rectangle((SIDE, picture.size[1] - 16, width - SIDE, picture.size[1] - 10), (225, 225, 225))
    done = (width - 2 * SIDE) * t / max(last, 1)
    draw.rectangle((SIDE, picture.size[1] - 16, SIDE + done, picture.size[1] - 10), SEEN)
    return picture


def _draw_action(draw: Any, y: int, width: int, action: np.ndarray, space: Space) -> None:
    """What the agent chose on seeing the picture: a box for each choice, or a bar for each number in [-1, 1]."""
    draw.text((SIDE, y), "action", INK, font(15, bold=True))
    x = SIDE + 68
    if isinstance(space, Box):
        values = np.clip(action.reshape(-1), -1, 1)
        if len(values) <= BARS:
            room = (width - SIDE - x) // len(values)
            for i, value in enumerate(values):
                left, wide = x + i * room, min(room - 8, 110)
                middle = left + wide / 2
                draw.rectangle((left, y + 2, left + wide, y + 10), outline=FAINT)
                ends = sorted((middle, middle + value * wide / 2))
                draw.rectangle((ends[0], y + 3, ends[1], y + 9), SEEN)
                draw.line((middle, y, middle, y + 12), INK)
                draw.text((left, y + 13), f"{value:+.2f}", FAINT, font(12))
            return
        words = " ".join(f"{value:+.1f}" for value in values)
    else:
        sizes = (space.n,) if isinstance(space, Discrete) else space.ns
        chosen = [int(part.argmax()) for part in np.split(action, np.cumsum(sizes)[:-1])]
        if isinstance(space, Discrete) and space.n <= 2 * BARS:
            room = min((width - SIDE - x) // space.n, 34)
            for i in range(space.n):
                box = (x + i * room, y - 2, x + (i + 1) * room - 5, y + 20)
                draw.rectangle(box, SEEN if i == chosen[0] else None, outline=FAINT)
                middle = ((box[0] + box[2]) / 2, y + 9)
                draw.text(middle, str(i), (255, 255, 255) if i == chosen[0] else FAINT, font(12), anchor="mm")
            return
        words = " ".join(f"{number} of {size}" for number, size in zip(chosen, sizes, strict=True))
    draw.text((x, y), frames.fitted(words, width - SIDE - x, 14), INK, font(14))
