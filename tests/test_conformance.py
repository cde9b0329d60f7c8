"""What every agent must do, one row for each. A new agent adds a row to `ROWS` and passes the rest."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents import test_dreamer_v1, test_dreamer_v2, test_dreamer_v3
from tests.agents.batches import PIXELS, TINY_IRIS, TINY_V1, TINY_V2, TINY_V3, perturbed, random_trajectory
from tests.agents.iris import made as iris
from tests.agents.world_models import made as world_models
from tests.marks import partly_long
from wmjax.agents import AGENTS
from wmjax.agents.world_models import EvolveConfig
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device
from wmjax.loops.rollout import Evaluator
from wmjax.types import Agent, AgentState, Box, Env, EnvSpec, Trajectory, Update


class Row(NamedTuple):
    """How to try one agent."""

    config: Any  # tiny
    gradient_flow: Callable[[], dict[str, set]]  # loss term, or update -> modules that it trains
    world_model: set[str]  # modules that only world model losses may train
    actor_terms: set[str]
    critic_terms: set[str]
    probe: Any  # configuration that learns `probe:act_obs`
    probe_iterations: int
    # Update -> convolutions in its program for an accelerator. A layer has one forward, one for the gradient of its
    # kernel and one for that of its input, which an encoder's first layer lacks.
    convolutions: dict[str, int]
    actor: str = "actor"  # modules
    critic: str = "critic"
    paint: bool = False  # whether it needs the probe as a picture
    side: int = 16  # of its pictures


def painted(env: Env, side: int = 16) -> Env:
    """The same environment, its vector in [-1, 1] seen as the brightness of a picture."""

    def paint(step):
        value = jnp.round(127.5 * (1 + step.obs["vector"][0])).astype(jnp.uint8)
        return step._replace(obs={"image": jnp.full((side, side, 3), value)})

    def reset(key):
        state, step = env.reset(key)
        return state, paint(step)

    def step(key, state, action):
        state, step = env.step(key, state, action)
        return state, paint(step)

    return Env(env.spec._replace(obs={"image": Box(0, 255, (side, side, 3), "uint8")}), reset, step)


WORLD_MODEL = {"encoder", "rssm", "decoder", "reward", "cont"}
PROBE = dict(length=8, batch_size=16, num_envs=16, replay_capacity=8192, horizon=3, units=32)
ROWS = {
    "dreamer_v1": Row(
        config=TINY_V1,
        gradient_flow=test_dreamer_v1.gradient_flow,
        world_model=WORLD_MODEL,
        actor_terms={"actor"},
        critic_terms={"critic"},
        probe=dataclasses.replace(TINY_V1, **PROBE, prefill=256, train_every=16, kl_scale=0.1),
        probe_iterations=600,
        convolutions={"train": 3 * (2 + 2) - 1},
    ),
    "dreamer_v2": Row(
        config=TINY_V2,
        gradient_flow=test_dreamer_v2.gradient_flow,
        world_model=WORLD_MODEL,
        actor_terms={"actor"},
        critic_terms={"critic"},
        probe=dataclasses.replace(TINY_V2, **PROBE, prefill=256, train_every=16),
        probe_iterations=600,
        convolutions={"train": 3 * (2 + 2) - 1},
    ),
    "dreamer_v3": Row(
        config=TINY_V3,
        gradient_flow=test_dreamer_v3.gradient_flow,
        world_model=WORLD_MODEL,
        actor_terms={"actor"},
        critic_terms={"critic"},
        probe=dataclasses.replace(TINY_V3, **PROBE, train_ratio=8, entropy_scale=3e-3, learning_rate=2e-3),
        probe_iterations=600,
        convolutions={"train": 3 * (2 + 2) - 1},
    ),
    "iris": Row(
        config=TINY_IRIS,
        gradient_flow=iris.gradient_flow,
        world_model={"tokenizer", "world_model"},
        actor_terms={"actor_critic"},
        critic_terms={"actor_critic"},
        probe=dataclasses.replace(
            TINY_IRIS, recon_loss="delta_iris", num_envs=16, collect=4, tokenizer_updates=4, world_model_updates=4,
            actor_critic_updates=4, tokenizer_batch=16, world_model_batch=16, actor_critic_batch=32, horizon=2,
            burn_in=0, world_model_length=2, max_blocks=2, replay_capacity=8192, tokenizer_after=1,
            world_model_after=40, actor_critic_after=80, tokenizer_rate=3e-3, world_model_rate=3e-3,
            actor_critic_rate=3e-3,
        ),
        probe_iterations=100,
        # Layers on patches, one in the encoder, one in the decoder; layers on single pixels are matrix products. The
        # actor-critic's frames are encoded and decoded without gradient, and convolved before and within imagination.
        convolutions={"tokenizer": 3 * (1 + 1) - 1, "world_model": 1, "actor_critic": 8},
        actor="actor_critic",
        critic="actor_critic",
        paint=True,
    ),
    "world_models": Row(
        config=world_models.TINY,
        gradient_flow=world_models.gradient_flow,
        world_model={"encoder", "decoder", "memory"},
        actor_terms=set(),  # its controller is evolved
        critic_terms=set(),
        probe=dataclasses.replace(
            world_models.TINY, collection="random", num_envs=16, collect_steps=256, vision_updates=100,
            memory_updates=20, replay_capacity=256,
            evolve=EvolveConfig(
                where="env", population=16, rollouts=16, generations=20, mean_every=5, mean_rollouts=32
            ),
        ),
        probe_iterations=0,
        convolutions={"vision": 3 * (4 + 4) - 1, "encode": 4, "memory": 0},
        paint=True,
        side=64,
    ),
}  # fmt: skip
# What is slow of an agent; of two of them CI leaves it out.
SLOWLY = {name: [pytest.mark.slow, *[pytest.mark.long] * (name in ("dreamer_v1", "dreamer_v2"))] for name in ROWS}
# These programs take long to compile.
HEAVY = [pytest.param(name, marks=SLOWLY[name]) for name in ROWS]
heavy = pytest.mark.parametrize("row", HEAVY, indirect=True)


# What compiles for long is in the slow suite.
PARAMS = [pytest.param(name, marks=pytest.mark.slow) if name == "iris" else name for name in ROWS]


@pytest.fixture(params=PARAMS)
def row(request):
    return request.param, ROWS[request.param]


def pixels(name: str) -> EnvSpec:
    """Pictures that an agent can take, and three actions."""
    side = ROWS[name].side
    return PIXELS._replace(obs={"image": Box(0, 255, (side, side, 3), "uint8")})


def make(name: str, spec: EnvSpec | None = None, config=None, axis_name: str | None = None) -> Agent:
    return AGENTS[name][1](spec or pixels(name), config or ROWS[name].config, axis_name)


def updates_of(agent: Agent) -> dict[str, Update]:
    """Every way in which the agent's recipe learns, by name."""
    return {update.name: update for stage in agent.recipe.stages for update in stage.updates}


def last_update(name: str) -> str:
    """The one whose program the default suite compiles, of some agents; all others are tried in the slow suite."""
    return list(ROWS[name].convolutions)[-1]


WITHOUT_NOISE = {"tokenizer", "world_model"}  # updates that draw nothing, in these configurations
ONLY_LATENTS = {"encode"}  # updates that train nothing, but change what replay keeps beside the records
UPDATES = [
    pytest.param(
        (name, update),
        id=f"{name}-{update}",
        marks=[] if update == last_update(name) and name == "world_models" else SLOWLY[name],
    )
    for name, row in ROWS.items()
    for update in row.convolutions
]


class Start(NamedTuple):
    """An agent with perturbed parameters, a batch for one of its updates, and that update, compiled."""

    agent: Agent
    state: AgentState
    batch: Trajectory
    update: Callable


@functools.cache
def start(name: str, which: str | None = None) -> Start:
    """Compiling takes longer than all tests: done once for each update."""
    agent = make(name)
    state = jax.jit(agent.init)(jax.random.key(0))
    state = perturbed(state, 0.03)
    chosen = updates_of(agent)[which or last_update(name)]
    length = chosen.sampling.length + chosen.sampling.context
    batch = random_trajectory(agent, pixels(name), state, length, chosen.batch_size)

    def update(*args):
        return chosen.fn(*args)

    # Traces are counted by name and source, and agents share those of `update`.
    update.__name__ = f"{name}_{chosen.name}"
    return Start(agent, state, batch, jax.jit(chex.assert_max_traces(update, n=1)))


def same(x, y) -> bool:
    """Whether two trees hold the same numbers."""
    return all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(y)))


def test_every_agent_has_a_row_and_every_update_is_tried():
    assert set(ROWS) == set(AGENTS)
    for name, row in ROWS.items():
        assert list(row.convolutions) == list(updates_of(make(name)))


def test_init_is_a_function_of_the_key(row):
    agent = make(row[0])
    init = jax.jit(agent.init)
    first, second, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, second)
    assert not all(map(np.array_equal, jax.tree.leaves(first.variables), jax.tree.leaves(other.variables)))


@pytest.mark.parametrize("which", UPDATES)
def test_an_update_keeps_structure_and_compiles_once(which):
    _, state, batch, update = start(*which)
    new, metrics, latent = update(state, jax.random.key(0), batch)
    again, _, _ = update(new, jax.random.key(1), batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    if latent is not None:  # what replay keeps beside the records is refreshed
        chex.assert_trees_all_equal_shapes_and_dtypes(batch.latent, latent)
    counts = which[1] not in ONLY_LATENTS
    assert (int(new.step), int(again.step)) == (int(state.step) + counts, int(state.step) + 2 * counts)
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("which", UPDATES)
def test_an_update_is_a_function_of_state_key_and_batch(which):
    _, state, batch, update = start(*which)
    first, second, other = (update(state, jax.random.key(seed), batch)[::2] for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, second)
    halved = jax.tree.map(lambda x: x if x.dtype == bool else (x / 2).astype(x.dtype), batch)
    assert not same(first, update(state, jax.random.key(0), halved)[::2])
    assert same(first[0].variables, state.variables) == (which[1] in ONLY_LATENTS)
    assert same(first[0].variables, other[0].variables) == (which[1] in WITHOUT_NOISE | ONLY_LATENTS)


def test_acting_forgets_the_last_episode_where_a_new_one_begins(row):
    agent, state, batch, _ = start(row[0])
    act = jax.jit(lambda carry, step: agent.act(state.variables, jax.random.key(0), carry, step, explore=False))
    carry = agent.act_carry(state.variables, batch.action.shape[1])
    record = lambda t, first: jax.tree.map(lambda x: x[t], batch.step)._replace(
        is_first=jnp.full(batch.action.shape[1], first)
    )
    warm, _, _ = act(carry, record(0, True))
    warm, _, _ = act(warm, record(1, False))
    chex.assert_trees_all_equal(act(warm, record(2, True)), act(carry, record(2, True)))
    kept, _, _ = act(warm, record(2, False))
    fresh, _, _ = act(carry, record(2, True))
    assert not all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(fresh)))


def test_rows_of_a_batch_do_not_see_each_other_when_acting(row):
    agent, state, batch, _ = start(row[0])
    rows = batch.action.shape[1]
    step, keys = jax.tree.map(lambda x: x[0], batch.step), jax.random.split(jax.random.key(0), rows)

    @jax.jit
    def act(keys, step):
        carry = agent.act_carry(state.variables, keys.shape[0])
        return agent.act(state.variables, keys, carry, step, explore=True)[1]

    alone = act(keys[:1], jax.tree.map(lambda x: x[:1], step))
    np.testing.assert_allclose(alone[0], act(keys, step)[0], atol=1e-5)


def test_the_return_that_a_critic_expects_is_a_number_for_each_row_and_follows_its_parameters(row):
    agent, state, batch, _ = start(row[0])
    if agent.value is None:
        assert row[0] == "world_models"  # its controller is searched for, by what it earns
        return
    rows = batch.action.shape[1]
    step = jax.tree.map(lambda x: x[0], batch.step)

    @jax.jit
    def value(params):
        embed, carry = agent.model.encode(params, step.obs), agent.policy_carry(params, rows)
        start = agent.model.init_state(params, rows)
        state = agent.model.observe(params, jax.random.key(0), start, batch.action[0], embed, step.is_first)
        return agent.value(params, carry, state)

    found = value(state.variables)
    chex.assert_shape(found, (rows,))
    chex.assert_type(found, jnp.float32)
    critic = ROWS[row[0]].critic
    other = jax.tree.map(lambda x: x + 0.1, state.variables[critic])
    assert not np.allclose(found, value(state.variables | {critic: other}))
    others = {name: jax.tree.map(lambda x: x + 0.1, state.params[name]) for name in ("reward",) if name in state.params}
    np.testing.assert_array_equal(found, value(state.variables | others))


@heavy
def test_gradients_of_the_behavior_stay_out_of_the_world_model(row):
    _, row = row
    flow = row.gradient_flow()
    for term in row.actor_terms:
        assert flow[term] == {row.actor}, term
    for term in row.critic_terms:
        assert flow[term] == {row.critic}, term
    trained = set().union(*(modules for modules in flow.values()))
    behavior = {row.actor for _ in row.actor_terms} | {row.critic for _ in row.critic_terms}
    assert trained == row.world_model | behavior


@pytest.mark.slow
@pytest.mark.parametrize("which", UPDATES)
def test_half_batches_under_a_named_axis_equal_the_full_batch(which):
    name, update = which
    half = updates_of(make(name, axis_name="devices"))[update]
    _, state, batch, whole_update = start(name, update)
    expected, expected_metrics, expected_latent = whole_update(state, jax.random.key(0), batch)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]), batch)
    update = jax.vmap(half.fn, (None, None, 1), axis_name="devices")
    found, metrics, latent = jax.jit(update)(state, jax.random.key(0), split)
    moved = 0.0
    for old, new, other in zip(
        *map(jax.tree.leaves, (state.variables, expected.variables, found.variables)), strict=True
    ):
        np.testing.assert_array_equal(other[0], other[1])
        np.testing.assert_allclose(other[0], new, atol=2e-5)
        moved = max(moved, float(np.abs(np.asarray(new) - old).max()))
    assert moved > 100 * 2e-5 / 4 or which[1] in ONLY_LATENTS  # the tolerance is far below what the update did
    for statistic, other in zip(*map(jax.tree.leaves, (expected.stats, found.stats)), strict=True):
        np.testing.assert_allclose(other[0], statistic, rtol=1e-4, atol=1e-6)
    for key in expected_metrics:
        np.testing.assert_allclose(metrics[key][0], expected_metrics[key], rtol=2e-2, atol=1e-3)
    assert (latent is None) == (expected_latent is None)
    joined = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), latent)
    for x, y in zip(*map(jax.tree.leaves, (joined, expected_latent)), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=1e-4)


def test_a_checkpoint_brings_the_agent_back(row, tmp_path):
    agent, state, _, _ = start(row[0])
    checkpoint.save(tmp_path, 3, state)
    restored = checkpoint.restore(tmp_path, jax.eval_shape(agent.init, jax.random.key(0)))
    chex.assert_trees_all_equal(restored, state)


STAGED = ("world_models", "iris")  # several updates, one after the other
IN_PARTS = [name for name in ROWS if hasattr(ROWS[name].config, "grad_accum") and name not in STAGED]


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(IN_PARTS, ("dreamer_v3",)))
def test_a_batch_in_parts_makes_the_update_of_the_whole_batch(name):
    agent, config = make(name), ROWS[name].config
    state = perturbed(jax.jit(agent.init)(jax.random.key(0)), 0.03)
    (update,) = updates_of(agent).values()
    length = update.sampling.length + update.sampling.context
    batch = random_trajectory(agent, pixels(name), state, length, update.batch_size)
    # Rewards and pictures differ from row to row, and so do the statistics of the parts.
    size = jnp.arange(update.batch_size)
    obs = {"image": (batch.step.obs["image"] // (1 + size)[:, None, None, None]).astype(jnp.uint8)}
    batch = batch._replace(step=batch.step._replace(obs=obs, reward=batch.step.reward * size))
    run = lambda config: jax.jit(updates_of(make(name, config=config))["train"].fn)(state, jax.random.key(0), batch)
    if name != "dreamer_v3":  # the mean of one part is above the free nats, that of the other below
        _, metrics, _ = run(config)
        config = dataclasses.replace(config, free_nats=float(metrics["kl"]) * 0.999)
    whole, parted = (run(dataclasses.replace(config, grad_accum=parts)) for parts in (1, 2))
    moved = [np.abs(np.asarray(new) - old).max() for old, new in pairs(state.params, whole[0].params)]
    assert min(moved) > 1e-4
    for a, b in pairs(whole, parted):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGED)
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch_where_rows_do_not_count_alike(name):
    agent, config = make(name), ROWS[name].config
    state = perturbed(jax.jit(agent.init)(jax.random.key(0)), 0.03)
    parted = updates_of(make(name, config=dataclasses.replace(config, grad_accum=2, remat=True)))
    for update in updates_of(agent).values():
        if update.name == "encode":  # learns nothing
            continue
        length = update.sampling.length + update.sampling.context
        batch = random_trajectory(agent, pixels(name), state, length, update.batch_size)
        late = jnp.arange(length)[:, None] > jnp.arange(update.batch_size)  # more in the first rows
        batch = batch._replace(step=batch.step._replace(is_first=late), mask=~late | (jnp.arange(length) == 0)[:, None])
        run = lambda update, batch=batch: jax.jit(update.fn)(state, jax.random.key(0), batch)
        whole, parts = run(update), run(parted[update.name])
        assert whole[1]["grad_norm"] > 1e-4
        # First moments are the gradients; parameters would follow the signs of gradients that are all but 0.
        for a, b in pairs(*((new.opt_state, new.stats, metrics) for new, metrics, _ in (whole, parts))):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


def pairs(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def in_bfloat16(config):
    """The same configuration, its networks in bfloat16 if they can be."""
    return dataclasses.replace(config, compute_dtype="bfloat16") if hasattr(config, "compute_dtype") else config


class Program(NamedTuple):
    """An update as it is handed to the compiler."""

    new: AgentState  # shapes and dtypes of what it gives
    metrics: dict
    text: dict[str, str]  # by platform


@functools.cache
def programs(name: str) -> dict[str, Program]:
    """All updates of an agent whose networks compute in bfloat16, by name."""
    agent, found = make(name, config=in_bfloat16(ROWS[name].config)), {}
    state = jax.eval_shape(agent.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    batch = random_trajectory(agent, pixels(name), zeros, 2, 2)
    for update in updates_of(agent).values():
        lead = update.sampling.context + update.sampling.length, update.batch_size
        shaped = jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape[2:]), x.dtype), batch)
        with jax.default_matmul_precision(None):  # as users have it
            traced = jax.jit(update.fn).trace(state, jax.random.key(0), shaped)
        text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu", "cpu")}
        found[update.name] = Program(*traced.out_info[:2], text)
    return found


# What takes long to trace is in the slow suite.
lowered = pytest.mark.parametrize(
    "row", [pytest.param(name, marks=[] if name == "world_models" else SLOWLY[name]) for name in ROWS], indirect=True
)


@lowered
def test_updates_lower_from_any_machine_with_all_their_convolutions_on_gpu_and_tpu_and_none_on_a_cpu(row):
    name, row = row
    for update, program in programs(name).items():
        for platform, text in program.text.items():
            expected = 0 if platform == "cpu" else row.convolutions[update]
            assert text.count("stablehlo.convolution(") == expected, (update, platform)


def products(text: str) -> set[tuple[str, ...]]:
    """Dtypes of the operands and the result of the matrix products in a program, and their precision."""
    found = set()
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            dtypes = re.findall(r"tensor<(?:\d+x)*(\w+)>", line.partition(" : (")[2])
            found.add((*dtypes, *re.search(r"precision = \[(\w+), (\w+)\]", line).groups()))
    return found


NETWORKS = ("bf16", "bf16", "bf16", "DEFAULT", "DEFAULT")  # products of networks
EXACT = ("f32", "f32", "f32", "HIGHEST", "HIGHEST")  # all others


@lowered
def test_products_outside_of_networks_ask_for_the_highest_precision_and_what_is_no_activation_is_float32(row):
    name, _ = row
    for program in programs(name).values():
        assert NETWORKS in products(program.text["cuda"]) <= {NETWORKS, EXACT}
        kept = jax.tree.leaves((program.new, program.metrics))
        assert {x.dtype for x in kept} <= set(map(jnp.dtype, ("float32", "int32", "bool")))


@heavy
def test_the_device_loop_lowers_for_gpu_and_tpu_and_maps_over_seeds(row):
    name, row = row
    env = agent_actions(make_env("catch", image_size=row.side))
    agent = make(name, env.spec, in_bfloat16(row.config))
    stage = jax.jit(device.make_stage(agent, env, agent.recipe.stages[-1]), donate_argnums=0)
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    iterations = jax.ShapeDtypeStruct((), jnp.int32)
    for platform in ("cuda", "tpu"):
        with jax.default_matmul_precision(None):
            text = stage.trace(run, iterations).lower(lowering_platforms=(platform,)).as_text()
        assert products(text) <= {NETWORKS, EXACT}
    seeds = jax.eval_shape(jax.vmap(lambda key: device.init(agent, env, key)), jax.random.split(jax.random.key(0), 3))
    mapped = jax.vmap(device.make_stage(agent, env, agent.recipe.stages[-1]), (0, None))
    after, metrics = jax.eval_shape(mapped, seeds, iterations)
    chex.assert_trees_all_equal_shapes_and_dtypes(seeds, after)
    assert all(value.shape == (3,) for value in metrics.values())


@heavy
def test_an_iteration_of_the_device_loop_never_copies_the_replay(row):
    name, row = row
    env = agent_actions(make_env("catch", image_size=row.side))
    agent = make(name, env.spec, dataclasses.replace(row.config, replay_capacity=100_000))
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    stage = jax.jit(device.make_stage(agent, env, agent.recipe.stages[-1]), donate_argnums=0)
    memory = stage.lower(run, jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
    images = 100_000 * row.side * row.side * 3
    assert memory.alias_size_in_bytes > images
    assert memory.temp_size_in_bytes < images / 2


@heavy
def test_imagination_under_pmap_over_four_devices_equals_one_device(row):
    """Needs devices that can only be forced before JAX starts, so it runs in a process of its own."""
    name, _ = row
    script = Path(__file__).with_name("pmap_imagine.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    environment = os.environ | flags | {"PYTHONPATH": str(script.parents[1]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(script), name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on 4 devices" in done.stdout


def learned(name: str, env: Env) -> float:
    """Mean return in a probe after training on it."""
    row = ROWS[name]
    agent = make(name, env.spec, row.probe)
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    for stage in agent.recipe.stages:
        run, _ = device.compile_stage(agent, env, stage)(run, stage.iterations or row.probe_iterations)
        run = device.next_stage(run)
    scores = Evaluator(agent, env)(run.agent.variables, jax.random.key(1), 512)
    return np.mean(scores.returns)


@heavy
def test_it_learns_to_act_on_what_it_sees(row):
    """The hardest probe: reward 1 for the action that the observation names, -1 for the other."""
    name, row = row
    env = agent_actions(make_env("probe:act_obs"))
    env = painted(env, row.side) if row.paint else env
    assert learned(name, env) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(["dreamer_v1", "dreamer_v2", "dreamer_v3"], ("dreamer_v3",)))
def test_two_choices_at_once_are_learned(name):
    assert learned(name, agent_actions(make_env("probe:act_both"))) > 1.7
