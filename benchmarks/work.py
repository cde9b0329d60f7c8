"""What `benchmarks.accelerator` times: each row a name, and how its program and the arguments of it are made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evolution import generation
from benchmarks.speed import imagination_ways, tokens_given
from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops.parallel import programs
from wmjax.nets.perceptual import VGG16
from wmjax.types import Stage

# Fields with which an agent is small enough for a test on a CPU; the preset is then `small`.
DENSE = dict(
    deter=16, hidden=16, depth=2, units=16, batch_size=4, length=6, horizon=4, num_envs=2, prefill=16, pretrain=0,
    train_every=4, train_steps=1, imagine_last=0, replay_capacity=256,
)  # fmt: skip
REDUCED: dict[str, dict[str, Any]] = {
    "dreamer_v1": DENSE | dict(stoch=4),
    "dreamer_v2": DENSE | dict(stoch=4, classes=4),
    "dreamer_v3": dict(
        deter=32, hidden=16, stoch=4, classes=4, depth=2, units=16, blocks=4, bins=21, batch_size=4, length=6,
        horizon=3, imagine_last=0, num_envs=2, train_ratio=12, replay_capacity=256, prefill=16,
    ),
    "iris": dict(
        vocab_size=16, embed_dim=8, latents=8, channels=16, layers=1, heads=2, width=16, world_model_length=3,
        policy_channels=(8,), lstm_units=8, burn_in=2, horizon=3, num_envs=2, collect=8, tokenizer_updates=2,
        world_model_updates=2, actor_critic_updates=2, tokenizer_batch=4, world_model_batch=4, actor_critic_batch=4,
        tokenizer_after=1, world_model_after=2, actor_critic_after=3, replay_capacity=256,
    ),
    "world_models": dict(
        latent=5, depth=2, hidden=6, mixtures=3, vision_batch_size=4, vision_updates=4, memory_batch_size=4,
        memory_length=5, memory_updates=4, num_envs=2, replay_capacity=64, collect_steps=64,
    ),
}  # fmt: skip

# Besides those fields, so that a whole run is short.
SHORT = {
    "dreamer_v3": ("--env", "catch", "--steps", "100"),
    "world_models": tuple(
        "--env catch --agent.collection held --agent.evolve.population 4 --agent.evolve.rollouts 1 "
        "--agent.evolve.generations 2 --agent.evolve.mean_every 1 --agent.evolve.mean_rollouts 2".split()
    ),
}


class Work(NamedTuple):
    """One program, ready to be compiled."""

    function: Callable  # jitted
    arguments: tuple
    count: float  # how many of what the unit counts are in one call, or in one iteration
    unit: str  # "ms" of each, or how many "/s"
    loops: bool = False  # of a state, which it donates, and a number of iterations, which it takes besides
    config: Any = None


class Row(NamedTuple):
    """What is timed under one name."""

    name: str
    make: Callable[[bool], Work] | None  # (reduced) -> Work; initializes, and steps environments
    command: tuple[str, ...] = ()  # of `wmjax`, where there is no `make`
    cached: bool = False  # of the command: whether it has run before with the same cache
    seconds: float = 5.0  # not worth beginning with less time left

    def arguments(self, reduced: bool) -> tuple[str, ...]:
        """Of the command."""
        if not reduced:
            return self.command
        agent = self.command[1]
        fields = [word for name, value in REDUCED[agent].items() for word in (f"--agent.{name}", str(value))]
        return (*self.command, *SHORT[agent], *fields)


def _config(agent: str, preset: str, fields: dict[str, Any], reduced: bool) -> Any:
    if reduced:
        precision = {name: value for name, value in fields.items() if name == "compute_dtype"}
        return presets.resolve(agent, "small", None, REDUCED[agent] | precision)[0]
    return presets.resolve(agent, preset, None, fields)[0]


def training(
    agent: str, preset: str = "paper", update: str | None = None, seeds: int = 1, env: str = "catch", **fields: Any
) -> Callable[[bool], Work]:
    """One update of an agent inside the device loop; without `update`, whole iterations of its last stage.

    Replay holds so many records of random play as the windows of all updates need.
    """

    def make(reduced: bool) -> Work:
        config = _config(agent, preset, fields, reduced)
        number = min(seeds, 2) if reduced else seeds
        world = agent_actions(make_env(env, **({"image_size": 64} if env == "racing" else {})))
        value = AGENTS[agent][1](world.spec, config)
        updates = [u for stage in value.recipe.stages for u in stage.updates]
        made = programs(value, world, seeds=number)
        keys = jax.random.split(jax.random.key(0), number) if number > 1 else jax.random.key(0)
        steps = 2 * max(u.sampling.length + u.sampling.context for u in updates)
        run, _ = made.compile_stage(Stage("fill", 1, steps, None))(made.init(keys), 1)
        stage, count = value.recipe.stages[-1], 1
        if update is not None:
            chosen = next(u for u in reversed(updates) if u.name == update)
            stage, count = Stage(update, None, 0, None, (chosen,)), chosen.repeats
        return Work(made.compile_stage(stage), (run,), count, "ms", loops=True, config=config)

    return make


def policy(agent: str, preset: str = "paper", envs: int = 16, **fields: Any) -> Callable[[bool], Work]:
    """One step of acting."""

    def make(reduced: bool) -> Work:
        config = _config(agent, preset, fields, reduced)
        env = agent_actions(make_env("catch"))
        value = AGENTS[agent][1](env.spec, config)
        params = jax.jit(value.init)(jax.random.key(0)).variables
        _, step = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), envs))
        act = jax.jit(partial(value.act, explore=True))
        return Work(act, (params, jax.random.key(2), value.act_carry(params, envs), step), 1, "ms", config=config)

    return make


def product(dtype: str) -> Callable[[bool], Work]:
    """A matrix product, by which cards and moments can be compared."""

    def make(reduced: bool) -> Work:
        size = 256 if reduced else 8192
        return Work(jax.jit(lambda x: x @ x), (jnp.ones((size, size), dtype),), 2 * size**3 / 1e12, "TFLOP/s")

    return make


def lpips_weights() -> str:
    """A file of weights for LPIPS that are random, and always the same: what they cost, not what they say."""
    rng, arrays, inputs = np.random.default_rng(0), {}, 3
    for number, features in enumerate(features for stage in VGG16 for features in stage):
        scale = (2 / (9 * inputs)) ** 0.5
        arrays[f"conv{number}/kernel"] = (scale * rng.normal(size=(3, 3, inputs, features))).astype(np.float32)
        arrays[f"conv{number}/bias"], inputs = np.zeros(features, np.float32), features
    arrays |= {f"linear{i}": np.full(stage[-1], 1 / stage[-1], np.float32) for i, stage in enumerate(VGG16)}
    path = Path(tempfile.mkdtemp(prefix="wmjax-lpips-")) / "random.npz"
    np.savez(path, **arrays)
    return str(path)


def tokenizer_lpips(reduced: bool) -> Work:
    """IRIS's tokenizer with the perceptual loss of the paper."""
    fields = {} if reduced else {"perceptual": "lpips", "lpips_weights": lpips_weights(), "replay_capacity": 4000}
    return training("iris", update="tokenizer", **fields)(reduced)


def given_tokens(reduced: bool) -> Work:
    """The world model of IRIS alone."""
    config = _config("iris", "paper", {}, reduced)
    function, arguments = tokens_given(config)
    return Work(jax.jit(function), arguments, 1, "ms", config=config)


def tokens(batch: int, way: str) -> Callable[[bool], Work]:
    """IRIS imagines as many frames as in training."""

    def make(reduced: bool) -> Work:
        config = _config("iris", "paper", {}, reduced)
        frames, rows = config.horizon - 1, min(batch, 2) if reduced else batch
        functions, arguments = imagination_ways(config, rows, frames)
        count = rows * frames * arguments[-1].shape[-1]
        return Work(jax.jit(functions[way]), arguments, count, "tokens/s", config=config)

    return make


def search(where: str, population: int, rollouts: int) -> Callable[[bool], Work]:
    """A generation of World Models' controller, episodes of 100 steps."""

    def make(reduced: bool) -> Work:
        sizes = (4, 2, 4) if reduced else (population, rollouts, 100)
        fields = {"depth": 2, "latent": 5, "hidden": 6} if reduced else {}
        function, arguments = generation(where, *sizes, **fields)
        return Work(jax.jit(function), arguments, sizes[0] * sizes[1] * sizes[2], "steps/s")

    return make


V3 = partial(training, "dreamer_v3", compute_dtype="bfloat16", replay_capacity=20_000)
SMALL = dict(replay_capacity=4000)  # of each seed, so that many fit
SEEDS, TRAIN = ("--seeds", "8"), ("train", "dreamer_v3")
# The most valuable first: time may not last for all.
ROWS = (
    Row("matmul float32", product("float32")),
    Row("matmul bfloat16", product("bfloat16")),
    Row("dreamer_v3 small, an iteration on catch", training("dreamer_v3", "small", **SMALL)),
    Row("dreamer_v3 1m, update", V3(update="train", size="1m")),
    Row("dreamer_v3 12m, update", V3(update="train", size="12m")),
    Row("dreamer_v3 small, 8 seeds", training("dreamer_v3", "small", seeds=8, **SMALL)),
    Row("dreamer_v3 200m, update", V3(update="train", size="200m")),
    Row("world_models V, 100", training("world_models", "paper_car", "vision", env="racing", replay_capacity=20_000)),
    Row("world_models M, 100 x 32", training(
        "world_models", "paper_car", "memory", env="racing", memory_length=32, replay_capacity=20_000)),
    Row("world_models generation in the dream, 64 x 16", search("dream", 64, 16)),
    Row("iris imagination, 64 rows, tokens", tokens(64, "cache")),
    Row("iris tokenizer, 256", training("iris", update="tokenizer", replay_capacity=4000)),
    Row("iris world model, 64 x 20, tokens given", given_tokens),
    Row("iris actor-critic, 64", training("iris", update="actor_critic", replay_capacity=4000)),
    Row("dreamer_v3 small, 64 seeds", training("dreamer_v3", "small", seeds=64, **SMALL)),
    Row("dreamer_v3 1m, policy, 16 envs", policy("dreamer_v3", size="1m", compute_dtype="bfloat16")),
    Row("dreamer_v3 50m, update", V3(update="train", size="50m")),
    Row("dreamer_v2 paper, update", training("dreamer_v2", update="train", replay_capacity=20_000)),
    Row("dreamer_v1 paper, update", training("dreamer_v1", update="train", replay_capacity=20_000)),
    Row("world_models generation in the dream, 1024 x 16", search("dream", 1024, 16)),
    Row("world_models generation in racing, 64 x 4", search("env", 64, 4)),
    Row("world_models generation in racing, 256 x 16", search("env", 256, 16)),
    Row("iris world model, 64 x 20", training("iris", update="world_model", replay_capacity=4000)),
    Row("iris tokenizer, 256, LPIPS of random weights", tokenizer_lpips),
    Row("iris imagination, 1 row, tokens", tokens(1, "cache")),
    Row("iris imagination, 64 rows, decoded", tokens(64, "cache, frames decoded")),
    Row("iris imagination, 1 row, decoded", tokens(1, "cache, frames decoded")),
    Row("iris policy, 16 envs", policy("iris")),
    Row("dreamer_v2 policy, 16 envs", policy("dreamer_v2")),
    Row("dreamer_v1 policy, 16 envs", policy("dreamer_v1")),
    Row("dreamer_v3 200m, policy, 16 envs", policy("dreamer_v3", size="200m", compute_dtype="bfloat16")),
    Row("whole: wmjax train dreamer_v3", None, TRAIN, seconds=90),
    Row("whole: wmjax train dreamer_v3, cached", None, TRAIN, cached=True, seconds=30),
    Row("whole: wmjax train world_models", None, ("train", "world_models"), seconds=100),
    Row("whole: wmjax train dreamer_v3 --seeds 8", None, TRAIN + SEEDS, seconds=100),
)  # fmt: skip
