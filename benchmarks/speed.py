"""Times what training is made of, after compilation: `python -m benchmarks.speed [--out FILE.json] [--only WORD]`.

Let nothing else run. Every time is the median of five or more; a matrix product of the same machine stands beside them,
so that two machines can be compared. Updates are timed alone and inside the device loop, where they really run; their
limit is the time that their matrix products and convolutions would take at that product's rate.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from benchmarks.timing import Table, compiled, machine, median_time
from wmjax import dreaming, presets
from wmjax.agents import AGENTS, iris
from wmjax.agents.iris.dynamics import draw
from wmjax.arithmetic import multiply_adds, products
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import device
from wmjax.nets.mlp import call
from wmjax.ops import noise
from wmjax.replay import device as replays
from wmjax.types import Agent, Box, Discrete, Env, EnvSpec, Sampling, Stage, TimeStep, Trajectory

PIXELS = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(6))


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    out: Path | None = None  # write the rows and the machine here, as JSON
    only: str = ""  # rows whose name contains this


def matmul(table: Table) -> None:
    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    table.rate = 2 * 2048**3 / median_time(lambda: product(x), 15)
    table.add("matmul 2048, float32", table.rate / 1e9, "GFLOP/s")


def random_batch(agent: Agent, params: dict, spec: EnvSpec, length: int, batch: int) -> Trajectory:
    """Noise of the right shapes."""
    key = jax.random.key(0)
    image = jax.random.randint(key, (length, batch, *spec.obs["image"].shape), 0, 256).astype(jnp.uint8)
    false = jnp.zeros((length, batch), bool)
    step = TimeStep({"image": image}, jax.random.normal(key, (length, batch)), false, false, false)
    action = jax.nn.one_hot(jax.random.randint(key, (length, batch), 0, spec.action.n), spec.action.n)
    first = jax.tree.map(lambda x: x[0], step)
    _, _, latent = agent.act(params, key, agent.act_carry(params, batch), first, explore=True)
    latent = jax.tree.map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), latent)
    return Trajectory(step, action, ~false, latent)


def update(table: Table, label: str, name: str, config) -> None:
    agent = AGENTS[name][1](PIXELS, config)
    learn = agent.recipe.stages[-1].updates[0]
    state = jax.jit(agent.init)(jax.random.key(0))
    sampling = learn.sampling
    batch = random_batch(agent, state.variables, PIXELS, sampling.length + sampling.context, learn.batch_size)
    step, seconds = compiled(learn.fn, state, jax.random.key(1), batch)
    counted = products(jax.make_jaxpr(learn.fn)(state, jax.random.key(1), batch))
    limit = 2 * multiply_adds(counted) / table.rate
    took = median_time(lambda: step(state, jax.random.key(1), batch))
    table.add(label, 1e3 * took, "ms", limit_ms=1e3 * limit, compile_s=seconds)


def in_loop(table: Table, label: str, name: str, config, env: Env, iterations: int) -> None:
    """The training stage of an agent's own recipe: acting, replay and updates in one program."""
    env = agent_actions(env)
    agent = AGENTS[name][1](env.spec, config)
    *before, train = agent.recipe.stages
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    for stage in before:
        run, _ = device.compile_stage(agent, env, stage)(run, stage.iterations)
        run = device.next_stage(run)
    start = time.perf_counter()
    stage = device.compile_stage(agent, env, train)
    run, _ = jax.block_until_ready(stage(run, 1))
    first = time.perf_counter() - start
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run, _ = jax.block_until_ready(stage(run, iterations))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times) / iterations
    repeats = train.updates[0].repeats
    table.add(f"{label}: per update", 1e3 * seconds / repeats, "ms", compile_s=first)
    table.add(f"{label}: all included", train.collect * config.num_envs / seconds, "env steps/s")


def policy_step(table: Table, label: str, name: str, config, envs: int) -> None:
    agent = AGENTS[name][1](PIXELS, config)
    params = jax.jit(agent.init)(jax.random.key(0)).variables
    step = jax.tree.map(lambda x: x[0], random_batch(agent, params, PIXELS, 1, envs).step)
    carry = agent.act_carry(params, envs)
    act = jax.jit(lambda key, carry, step: agent.act(params, key, carry, step, explore=True))
    table.add(label, 1e3 * median_time(lambda: act(jax.random.key(0), carry, step), 50), "ms")


def imagination(table: Table, label: str, name: str, config, rows: int = 1024, horizon: int = 15) -> None:
    agent = AGENTS[name][1](PIXELS, config)
    params = jax.jit(agent.init)(jax.random.key(0)).variables
    start = agent.model.init_state(params, rows)

    def run(params, key):
        policy = lambda key, carry, state: agent.policy(params, key, carry, state, explore=True)
        keys = noise.row_keys(key, rows)
        carry = agent.policy_carry(params, rows)
        return dreaming.imagine(
            agent.model, params, keys, start, policy, horizon, policy_carry=carry, emit=lambda state: state.deter
        )

    run, seconds = compiled(run, params, jax.random.key(0))
    per = median_time(lambda: run(params, jax.random.key(0)))
    table.add(label, rows * horizon / per, "steps/s", compile_s=seconds)


def environment(table: Table, name: str, envs: int = 16, steps: int = 2000) -> None:
    env = agent_actions(make_env(name))
    size = env.spec.action.n if isinstance(env.spec.action, Discrete) else env.spec.action.shape[0]

    @jax.jit
    def run(key):
        state, step = jax.vmap(env.reset)(jax.random.split(key, envs))

        def body(carry, key):
            state, total = carry
            action = jax.random.normal(key, (envs, size))
            state, step = jax.vmap(env.step)(jax.random.split(key, envs), state, action)
            return (state, total + step.obs["image"].sum(dtype=jnp.int32) + step.reward.sum()), ()

        return jax.lax.scan(body, (state, step.reward.sum()), jax.random.split(key, steps))[0][1]

    table.add(
        f"environment {name}, {envs} at once", envs * steps / median_time(lambda: run(jax.random.key(0))), "steps/s"
    )


def replay(table: Table, rows: int = 2000, envs: int = 16) -> None:
    """Sampling 16 windows of 65 images, and writing latents back, as the device loop does."""
    agent = AGENTS["dreamer_v3"][1](PIXELS, presets.resolve("dreamer_v3", "paper", None, {"size": "1m"})[0])
    params = jax.jit(agent.init)(jax.random.key(0)).variables
    batch = random_batch(agent, params, PIXELS, 1, envs)
    example = jax.tree.map(lambda x: x[0], replays.Record(batch.step, batch.action, batch.latent))
    store = replays.init(example, envs, rows * envs)._replace(added=jnp.int32(rows))

    def run(store, key):
        store, batch, index = replays.sample(store, key, Sampling(64, 1), 16)
        return replays.write(store, index, batch.latent), batch.step.obs["image"].sum(dtype=jnp.int32)

    sample = jax.jit(run, donate_argnums=0)
    times = []
    for i in range(12):
        start = time.perf_counter()
        store, _ = jax.block_until_ready(sample(store, jax.random.key(i)))
        times.append(time.perf_counter() - start)
    table.add("replay: sample 16 x 65 images and write back", 1e3 * statistics.median(times[2:]), "ms")


def iris_updates(table: Table, prefix: str, config, repeats: int) -> None:
    """Each update of IRIS inside the device loop, on records of random play."""
    env = agent_actions(make_env("catch"))
    config = dataclasses.replace(
        config, tokenizer_updates=repeats, world_model_updates=repeats, actor_critic_updates=repeats
    )
    agent = iris.iris(env.spec, config)
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    fill = Stage("fill", 1, -(-400 // config.num_envs), None)
    run, _ = device.compile_stage(agent, env, fill)(run, 1)
    for update in agent.recipe.stages[-1].updates:
        sampling = update.sampling
        label = f"{prefix}: {update.name} update, {update.batch_size} x {sampling.context + sampling.length}"
        if not table.wants(label):
            continue
        start = time.perf_counter()
        step = device.compile_stage(agent, env, Stage(update.name, None, 0, None, (update,)))
        run, _ = jax.block_until_ready(step(run, 1))
        first, times = time.perf_counter() - start, []
        for _ in range(5):
            start = time.perf_counter()
            run, _ = jax.block_until_ready(step(run, 1))
            times.append((time.perf_counter() - start) / repeats)
        table.add(label, 1e3 * statistics.median(times), "ms", compile_s=first)


def tokens_given(config) -> tuple[Callable, tuple]:
    """The gradient of the world model's loss where the tokens are given, as the authors' dataset would; its arguments.

    It gives the loss, and the gradient.
    """
    batch, length = config.world_model_batch, config.world_model_length
    nets = iris.networks(PIXELS, config)
    params = jax.jit(lambda key: iris.init_params(nets, PIXELS, config, key))(jax.random.key(0))["world_model"]
    tokens = jax.random.randint(jax.random.key(1), (batch, length, nets.world_model.tokens), 0, config.vocab_size)
    action = jax.nn.one_hot(jnp.zeros((batch, length), int), PIXELS.action.n)
    reward, end = jnp.zeros((batch, length)), jnp.zeros((batch, length), bool)

    def loss(params, key, tokens):
        keys = noise.row_keys(key, batch) if config.dropout else None
        logits = call(nets.world_model, params, tokens, action, reward, keys)
        return sum(iris.world_model_losses(logits, tokens, reward, end, ~end, ~end).values())

    return jax.value_and_grad(loss), (params, jax.random.key(0), tokens)


def iris_transformer(table: Table, prefix: str, config) -> None:
    label = f"{prefix}: world_model gradient, {config.world_model_batch} x {config.world_model_length}, tokens given"
    if not table.wants(label):
        return
    function, arguments = tokens_given(config)
    run, seconds = compiled(function, *arguments)
    table.add(label, 1e3 * median_time(lambda: run(*arguments)), "ms", compile_s=seconds)


WAYS = ("cache", "cache, frames decoded", "no cache")


def imagination_ways(config, batch: int, frames: int) -> tuple[dict[str, Callable], tuple]:
    """To generate frames: with the cache, decoded or not, and with the prefix computed anew for every token.

    Functions by name, of `WAYS`, and the arguments of each.
    """
    nets = iris.networks(PIXELS, config)
    model = iris.world_model(nets, PIXELS, config)
    tokens, actions = nets.world_model.tokens, PIXELS.action.n
    params = jax.jit(lambda key: iris.init_params(nets, PIXELS, config, key))(jax.random.key(0))
    keys = noise.row_keys(jax.random.key(1), batch)
    start = jax.random.randint(jax.random.key(2), (batch, tokens), 0, config.vocab_size)
    action = jax.nn.one_hot(jnp.zeros((frames, batch), int), actions)

    def cached(params, start):
        policy, carry = dreaming.given_actions(action)
        state = iris.start_state(nets, model, params, start)
        emit = lambda state: state.tokens
        return dreaming.imagine(model, params, keys, state, policy, frames, policy_carry=carry, emit=emit)[1]

    def decoded(params, start):
        return iris.generate(nets, model, params, keys, start, frames)[1]

    def recomputed(params, start):
        """A full pass over a context of the final length for each token: what comes later is masked by causality."""
        board = jnp.zeros((batch, frames + 1, tokens), jnp.int32).at[:, 0].set(start).reshape(batch, -1)
        whole = jnp.concatenate([action, action[:1]]).swapaxes(0, 1)

        def step(board, place):
            sequence = board.reshape(batch, frames + 1, tokens), whole, whole[..., 0]
            logits, _, _ = call(nets.world_model, params["world_model"], *sequence)
            drawn = draw(noise.fold_in(keys, place), jax.lax.dynamic_index_in_dim(logits, place - 1, 1, False))
            return jax.lax.dynamic_update_slice(board, drawn[:, None], (0, place)), None

        return jax.lax.scan(step, board, jnp.arange(tokens, tokens * (frames + 1)))[0]

    return dict(zip(WAYS, (cached, decoded, recomputed), strict=True)), (params, start)


def iris_imagination(table: Table, prefix: str, config, batch: int, frames: int, ways: tuple[str, ...] = WAYS) -> None:
    """Tokens per second of some `imagination_ways`."""
    functions, arguments = imagination_ways(config, batch, frames)
    tokens = arguments[-1].shape[-1]
    for name in ways:
        label = f"{prefix}: imagination, batch {batch}, {frames} frames, {name}"
        if table.wants(label):
            run, seconds = compiled(functions[name], *arguments)
            memory = run.memory_analysis().temp_size_in_bytes / 2**20
            per = median_time(lambda run=run: run(*arguments))
            table.add(label, batch * frames * tokens / per, "tokens/s", compile_s=seconds, memory_mb=memory)


def iris_rows(table: Table) -> None:
    """IRIS in its preset for laptops and in the paper's sizes, these without perceptual loss and in small batches."""
    small = presets.resolve("iris", "small")[0]
    paper = dataclasses.replace(
        presets.resolve("iris", "paper")[0], perceptual="none", tokenizer_batch=16, world_model_batch=16,
        actor_critic_batch=4, replay_capacity=2000,
    )  # fmt: skip
    for prefix, config, repeats in (("iris small", small, 5), ("iris paper", paper, 1)):
        iris_updates(table, prefix, config, repeats)
        iris_transformer(table, prefix, config)
    batch = small.actor_critic_batch
    iris_imagination(table, "iris small", small, batch, small.horizon - 1, ("cache", "cache, frames decoded"))
    iris_imagination(table, "iris small", small, batch, small.max_blocks - 1, ("cache", "no cache"))
    for batch in (1, 16):
        iris_imagination(table, "iris paper", paper, batch, paper.horizon - 1, ("cache", "cache, frames decoded"))
    iris_imagination(table, "iris paper", paper, 16, 5, ("cache", "no cache"))


def dreamer(table: Table, name: str, label: str, config, iterations: int) -> None:
    """All rows of one agent in one size."""
    prefix = f"{name} {label}, {config.batch_size} x {config.length}, 64x64x3"
    if table.wants(f"{prefix}: update"):
        update(table, f"{prefix}: update alone", name, config)
    if iterations and table.wants(f"{prefix}: loop"):
        in_loop(table, f"{prefix}: loop", name, config, make_env("catch"), iterations)
    if table.wants(f"{prefix}: imagination"):
        imagination(table, f"{prefix}: imagination, 1024 rows", name, config)
    for envs in (1, 16):
        if table.wants(f"{prefix}: policy"):
            policy_step(table, f"{prefix}: policy step, {envs} envs", name, config, envs)


def main(args: Args) -> None:
    table = Table(args.only)
    resolve = lambda *args: presets.resolve(*args)[0]
    matmul(table)
    # Sizes of the papers are timed in float32, which a CPU computes in, and with the replay of a laptop; the first two
    # only alone: their loops collect for minutes before they learn.
    float32 = {"compute_dtype": "float32"}
    for name in ("dreamer_v1", "dreamer_v2"):
        dreamer(table, name, "small", resolve(name, "small"), 20)
        dreamer(table, name, "paper", resolve(name, "paper", None, float32), 0)
    dreamer(table, "dreamer_v3", "small", resolve("dreamer_v3", "small"), 20)
    one = resolve("dreamer_v3", "paper", None, float32 | {"size": "1m", "replay_capacity": 50_000})
    dreamer(table, "dreamer_v3", "1m", one, 1)
    for env in ("catch", "pendulum"):
        if table.wants(f"environment {env}"):
            environment(table, env)
    if table.wants("replay"):
        replay(table)
    if not args.only or args.only.startswith("iris"):
        iris_rows(table)
    report = {"machine": machine(), "rows": table.rows}
    print(json.dumps(report["machine"], indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
