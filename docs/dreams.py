"""Draws the dreams of all pretrained agents side by side: `python docs/dreams.py` writes `docs/_static/dreams.gif`.

All see the same two frames of the same episodes, and then predict from the same actions alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import wmjax
from wmjax.figures import frames, play, predictor
from wmjax.figures.frames import INK, PREDICTED, SEEN, font

OUT = Path(__file__).resolve().parent / "_static" / "dreams.gif"
AGENTS = {
    "world_models": "World Models",
    "dreamer_v1": "DreamerV1",
    "dreamer_v2": "DreamerV2",
    "dreamer_v3": "DreamerV3",
    "iris": "IRIS",
}
CONTEXT, HORIZON, EPISODES = 2, 8, 2
TIMES, GAP, TOP, BOTTOM, EDGE = 2, 10, 74, 14, 3  # enlargement; pixels between panels, above and below, of frames
SEED = 7


def dreams() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The truth, and what each agent makes of it, uint8 `[T, EPISODES, H, W, 3]`."""
    runs = {agent: wmjax.load(f"pretrained:{agent}/catch") for agent in AGENTS}
    actor, key = runs["dreamer_v3"], jax.random.key(SEED)
    records = play(actor.agent, actor.env, actor.state.variables, key, EPISODES, 2 * (CONTEXT + HORIZON) + 1)
    models = {}
    for agent, run in runs.items():
        found = predictor(run.agent, CONTEXT, HORIZON)(run.state.variables, key, records)
        models[agent] = np.rint(np.clip(found.model["image"], 0, 255)).astype(np.uint8)
    return found.truth["image"], models


def frame(t: int, columns: dict[str, np.ndarray]) -> Any:
    """Step t: a column for the truth and for each agent, a row for each episode."""
    shown = {name: frames.repeated(pixels[t], TIMES) for name, pixels in columns.items()}
    high, wide = next(iter(shown.values())).shape[1:3]
    picture, draw = frames.canvas(len(shown) * (wide + GAP) + GAP, TOP + EPISODES * (high + GAP) + BOTTOM)
    color = SEEN if t < CONTEXT else PREDICTED
    told = f"step {t + 1}: all see the true frames"
    if t >= CONTEXT:
        told = f"step {t + 1}: dreamed, {t + 1 - CONTEXT} after the last frame that was seen"
    draw.rectangle((0, 0, picture.size[0], 34), color)
    draw.text((GAP, 17), told, (255, 255, 255), font(17, bold=True), anchor="lm")
    for i, (name, episodes) in enumerate(shown.items()):
        x = GAP + i * (wide + GAP)
        draw.text((x + wide // 2, 54), name, INK, font(15, bold=True), anchor="mm")
        for j, pixels in enumerate(episodes):
            y = TOP + j * (high + GAP)
            edge = INK if i == 0 else color
            draw.rectangle((x - EDGE, y - EDGE, x + wide + EDGE - 1, y + high + EDGE - 1), edge)
            frames.paste(picture, pixels, x, y)
    return picture


def main() -> None:
    truth, models = dreams()
    columns = {"truth": truth} | {AGENTS[agent]: pixels for agent, pixels in models.items()}
    frames.write_gif(OUT, [frame(t, columns) for t in range(CONTEXT + HORIZON)], 500)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
