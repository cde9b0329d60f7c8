"""Whether IRIS's tokenizer keeps to the names of what it shows: `python -m benchmarks.tokenizer` writes JSON and PNG.

It learns alone, from all pictures that `catch` has. Two things are watched: its loss, and how many pictures change any
of their tokens within 100 updates; the world model then has to learn new names of what it knew. By default with and
without `codebook_reset`, which besides giving dead entries of the codebook a place takes the others out of reach.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.timing import machine
from wmjax import presets
from wmjax.agents import iris
from wmjax.envs.catch import COLUMNS, ROWS, CatchState, catch
from wmjax.types import TimeStep, Trajectory

BLOCK = 100  # updates


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    updates: int = 4_000
    seeds: int = 3
    seed: int = 100
    fields: tuple[str, ...] = ('{"codebook_reset": 0.0}', "{}")  # of the agent's configuration, as JSON, one by one
    out: Path = Path("benchmarks/results/tokenizer.json")


def pictures() -> jax.Array:
    """Every picture of `catch`, uint8 `[N, 64, 64, 3]`."""
    observe = catch().observe
    cells = itertools.product(range(ROWS), range(COLUMNS), range(COLUMNS))
    return jnp.stack([observe(CatchState(*map(jnp.int32, cell)))["image"] for cell in cells])


def learn(config: iris.IRISConfig, updates: int, keys: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The loss of the reconstruction, and the share of pictures that are named anew, by seed and block."""
    spec, images = catch().spec, pictures()
    agent, nets = iris.iris(spec, config), iris.networks(spec, config)
    update = next(update for update in agent.recipe.stages[-1].updates if update.name == "tokenizer")
    row = jnp.zeros((1, config.tokenizer_batch))

    def step(state, key):
        key_draw, key_update = jax.random.split(key)
        image = jax.random.choice(key_draw, images, (1, config.tokenizer_batch))
        timestep = TimeStep({"image": image}, row, row > 0, row > 0, row > 0)
        batch = Trajectory(timestep, jnp.zeros((*row.shape, spec.action.n)), row == 0, ())
        state, metrics, _ = update.fn(state, key_update, batch)
        return state, metrics["loss/recon"]

    def block(carry, keys):
        state, before = carry
        state, losses = jax.lax.scan(step, state, keys)
        tokens = iris.encode(nets, config, state.params, images)
        return (state, tokens), (losses.mean(), jnp.mean((tokens != before).any(-1)))

    def run(key):
        key_init, key_learn = jax.random.split(key)
        state = agent.init(key_init)
        start = state, iris.encode(nets, config, state.params, images)
        return jax.lax.scan(block, start, jax.random.split(key_learn, (updates // BLOCK, BLOCK)))[1]

    return jax.tree.map(lambda x: np.asarray(x, float), jax.jit(jax.vmap(run))(keys))


def main(args: Args) -> None:
    """Measures each configuration, prints what came out, writes and draws it."""
    keys = jax.random.split(jax.random.key(args.seed), args.seeds)
    found, curves = {}, {}
    for fields in args.fields:
        config = presets.resolve("iris", "small", "catch", json.loads(fields))[0]
        losses, renamed = learn(config, args.updates, keys)
        label = f"codebook_reset {config.codebook_reset:g}, tokenizer_rate {config.tokenizer_rate:g}"
        late, curves[label] = slice(renamed.shape[1] // 2, None), renamed
        found[fields] = {
            "loss at the end": losses[:, -1].round(4).tolist(),
            "pictures named anew in 100 updates, mean": renamed.mean(1).round(4).tolist(),
            "of the second half": renamed[:, late].mean(1).round(4).tolist(),
        }
        print(f"{label}: {json.dumps(found[fields])}", flush=True)
    about = {"updates": args.updates, "seeds": args.seeds, "seed": args.seed}
    args.out.write_text(json.dumps({"machine": machine(), **about, "fields": found}, indent=1) + "\n")
    draw(curves, args.out.with_suffix(".png"))
    print(f"wrote {args.out} and {args.out.with_suffix('.png')}")


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """One panel for each configuration, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure((8, 1.2 + 1.6 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (label, renamed) in zip(panels, curves.items(), strict=True):
        updates = BLOCK * (1 + np.arange(renamed.shape[1]))
        for seed, line in enumerate(100 * renamed):
            panel.plot(updates, line, lw=1.2, label=f"key {seed}")
        panel.set_title(label, loc="left", fontsize=9)
        panel.set_ylim(-3, 103)
    panels[0].legend(fontsize=8, frameon=False, loc="upper right")
    panels[-1].set_xlabel("updates of the tokenizer")
    figure.supylabel(f"pictures that change a token in {BLOCK} updates, %", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
