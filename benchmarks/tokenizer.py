"""Whether IRIS's tokenizer stays as it is once it has learned: `python -m benchmarks.tokenizer` writes a JSON.

It learns alone, from all pictures that `catch` has, for as many updates as in a long run. Two things are watched after
the first third: whether its loss bursts, and how many pictures change any of their tokens within 100 updates; the world
model then has to learn new names of what it knew.
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

    rates: tuple[float, ...] = (2e-3, 1e-3)
    updates: int = 8_000
    seeds: int = 3
    seed: int = 100
    fields: str = "{}"  # of the agent's configuration, as JSON
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
    """Measures each rate, prints what came out, and writes it."""
    fields = json.loads(args.fields)
    config = presets.resolve("iris", "small", "catch", fields)[0]
    keys = jax.random.split(jax.random.key(args.seed), args.seeds)
    found = {}
    for rate in args.rates:
        losses, renamed = learn(dataclasses.replace(config, tokenizer_rate=rate), args.updates, keys)
        late = slice(losses.shape[1] // 3, None)
        found[f"{rate:g}"] = {
            "loss at the end": losses[:, -1].round(4).tolist(),
            "largest late loss by the least before": (
                (losses / np.minimum.accumulate(losses, 1))[:, late].max(1).round(1).tolist()
            ),
            "pictures named anew in 100 updates": renamed[:, late].mean(1).round(4).tolist(),
        }
        print(f"tokenizer_rate {rate:g}: {json.dumps(found[f'{rate:g}'])}", flush=True)
    about = {"updates": args.updates, "seeds": args.seeds, "seed": args.seed, "fields": fields}
    args.out.write_text(json.dumps({"machine": machine(), **about, "tokenizer_rate": found}, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
