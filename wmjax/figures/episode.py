"""A video of one episode, with its step, reward, return and action."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wmjax.figures import frames
from wmjax.figures.frames import FAINT, INK, PREDICTED, SEEN, font
from wmjax.figures.windows import play
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Box, Discrete, Env, EnvSpec, HostEnv, PyTree, Space, UsageError

STEPS = 1000  # at most, of an episode
FRAMES = 200  # at most, of a video: of a longer episode some steps are not shown
BYTES, FEWEST = 1_000_000, 50  # of a GIF, above which it shows fewer steps; frames that it then has at least
SECONDS = 12.5  # of a short one; steps are shown for 50 to 400 milliseconds
WIDE = 384  # pixels that the picture is about as wide as
TOP, BOTTOM, SIDE = 40, 96, 12  # pixels around the picture
BARS = 8  # entries of an action that are drawn; of more there are words alone


def with_pictures(env: Env | HostEnv) -> Env | HostEnv:
    """The environment if it observes pictures, else the same with what it renders among its observations.

    Raises `UsageError` where there is nothing to be shown.
    """
    if _pictures(env.spec):
        return env
    rendered = getattr(env, "rendered", None)
    if rendered is None:
        names = ", ".join(sorted(env.spec.obs))
        raise UsageError(f"video: the observations {names} are no pictures, and nothing renders them; leave it out")
    return rendered()._replace(native=env.native)


def _pictures(spec: EnvSpec) -> list[str]:
    return [name for name, space in spec.obs.items() if getattr(space, "dtype", "") == "uint8"]


def suffix(name: str, names: Sequence[str]) -> str:
    """What tells the file of one entry of observations from those of others: "" where there is one only."""
    return "" if len(names) == 1 else f"-{name.replace('/', '-')}"


def write_episode(
    folder: str | Path, agent: Agent, env: Env | HostEnv, params: PyTree, key: Array, title: str = ""
) -> list[Path]:
    """Plays one episode as in evaluation, and writes what is seen in it as `episode.gif`, or one GIF for each picture.

    At most `STEPS` steps of it. Pictures are enlarged; step, reward, return so far and the action chosen on seeing them
    are drawn below. Where no picture is observed, it is what the environment renders. Where ffmpeg is there an MP4 is
    written, too.

    Returns:
      The files.

    Raises:
      UsageError: the environment neither observes a picture nor renders one.
    """
    own, env = env.spec.obs, with_pictures(env)
    names = _pictures(env.spec)
    # What is rendered is for people: the agent sees what it was trained on.
    seen = lambda step: step._replace(obs={name: step.obs[name] for name in own})
    act = lambda params, key, carry, step, **how: agent.act(params, key, carry, seen(step), **how)
    steps = min(env.spec.max_episode_steps or STEPS, STEPS) + 1  # with the first record
    records = jax.device_get(play(agent._replace(act=act), env, params, key, 1, steps)._replace(latent=()))
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
        while path.stat().st_size > BYTES and len(drawn) >= 2 * FEWEST:
            drawn, milliseconds = [*drawn[:-1:2], drawn[-1]], 2 * milliseconds
            frames.write_gif(path, drawn, milliseconds)
    return written


def _episode_frame(records: Record, t: int, name: str, space: Space, title: str) -> Any:
    """Step `t` of `records` `[T, ...]`."""
    step, last = records.step, len(records.step.reward) - 1
    pixels = frames.rgb(step.obs[name][t])
    pixels = frames.repeated(pixels, max(1, round(WIDE / pixels.shape[1])))
    high, wide = pixels.shape[:2]
    picture, draw = frames.canvas(max(wide + 2 * SIDE, 430), TOP + high + BOTTOM)
    width = picture.size[0]
    draw.text((SIDE, 11), frames.fitted(title, width - 2 * SIDE, 15, bold=True), INK, font(15, bold=True))
    left = (width - wide) // 2
    frames.paste(picture, pixels, left, TOP)
    draw.rectangle((left - 1, TOP - 1, left + wide, TOP + high), outline=FAINT)
    y = TOP + high + 12
    total = float(step.reward[: t + 1].sum(dtype=np.float64))
    told = f"step {t} of {last}", f"reward {step.reward[t]:.3g}", f"return {total:.4g}"
    for x, words in zip((SIDE, int(0.42 * width), int(0.72 * width)), told, strict=True):
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
