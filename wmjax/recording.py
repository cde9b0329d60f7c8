"""Recording episodes: of any environment, by an agent or by chance, into a folder to train on (`docs/offline.md`)."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import wmjax
from wmjax import checks
from wmjax.cache import enable_compilation_cache
from wmjax.envs import make_env
from wmjax.envs.handed import check_args, handed
from wmjax.envs.wrappers import agent_actions
from wmjax.episodes import Writer, spec_json
from wmjax.loops import compiler, memory
from wmjax.loops.host.rollout import DEFAULTS, act_program, seed_words, start
from wmjax.loops.rollout import Position, random_act, rollout, step_limit
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.run import Run, load
from wmjax.settings import other_args, other_env
from wmjax.types import Array, Env, EnvSpec, HostEnv, PyTree, UsageError

RECORD_KEY = 0x52454331  # folded into the seed, so that no draw of training is met again
CHUNK_BYTES = 2**26  # of the records that are made at once, about
NUM_ENVS = 16  # that are stepped at once
ROWS = 1024  # of each environment that are made at once, at most
POLICIES = ("random", "agent")


def record(
    env: Any = None,
    *,
    out: str | Path,
    run: Run | str | Path | None = None,
    policy: str | None = None,
    steps: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    action: str | None = None,
    which: str = "latest",
    num_envs: int | None = None,
    image_size: int | None = None,
    action_repeat: int | None = None,
    env_args: Mapping[str, Any] | None = None,
    start_timeout: float | None = None,
    workers: int | None = None,
    trust_env: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Plays an environment and writes its episodes, each as an `.npz` file, into a new folder (`docs/offline.md`).

    The folder appears when it is whole, or not at all.

    Args:
      env: as for `train`; by default the run's own.
      out: the folder; not there yet, or empty.
      run: a run, or its folder, whose agent plays.
      policy: "random", uniformly random actions, or "agent", as in evaluation; "agent" where there is a run.
      steps: env steps (frames over all environments; the record that begins an episode counts as a step), rounded up
        to whole steps of all environments. The last episode of each is cut there.
      episodes: how many to record, instead of `steps`. Each environment plays its share of them to the end.
      seed: the same seed gives the same episodes.
      action: "sample" or "mode", of an agent; by default what its configuration says (`eval_action`).
      which: of a run, "latest" or "best", as for `load`.
      num_envs: environments that are stepped at once; by default 16, of a run not more than it is trained in.
      image_size, action_repeat: as for `train`; of a run its own.
      env_args, start_timeout: as for `train`; of a run those that differ from its own.
      workers: processes that step environments on the host; one per processor by default.
      trust_env: as for `load`.
      say: is told what was written.

    Returns:
      The folder.

    Raises:
      UsageError: something asked for cannot be done.
      RunError: the disk is full, memory ran out, or too many environments were lost; what was written is removed.
    """
    return _record(out, say, **{name: value for name, value in locals().items() if name not in ("out", "say")})


class Player(NamedTuple):
    """Who plays, and where."""

    act: Callable  # as `Agent.act`
    carry: Callable  # as `Agent.act_carry`
    params: PyTree
    env: Env | HostEnv  # takes what it emits
    about: dict[str, Any]  # what `episodes.json` says of both
    num_envs: int  # at once, where nothing else is asked for


def _record(
    out: Any, say: Callable, steps: Any, episodes: Any, seed: Any, num_envs: Any, workers: Any, **asked: Any
) -> Path:
    """`record`, with its arguments by name."""
    enable_compilation_cache()
    steps, episodes = checks.optional("steps", steps), checks.optional("episodes", episodes)
    num_envs = checks.optional("num_envs", num_envs, checks.BOUNDS["num_envs"]._replace(low=1))
    seed, workers, out = checks.number("seed", seed), checks.optional("workers", workers), checks.path("out", out)
    if (steps is None) == (episodes is None):
        raise UsageError("steps, episodes: one of them is needed, and not both: how much to record")
    player = _player(**asked)
    spec, num_envs = player.env.spec, min(num_envs or player.num_envs, episodes or checks.COUNT)
    if episodes is None:
        shares, limit, rows = None, None, math.ceil(steps / (num_envs * spec.action_repeat))
    else:
        shares, limit = [len(range(i, episodes, num_envs)) for i in range(num_envs)], step_limit(spec)
        rows = max(shares) * (limit + 1)
    key = jax.random.fold_in(jax.random.key(seed), RECORD_KEY)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(contextlib.closing(Writer(out)))
        where = (workers,) if isinstance(player.env, HostEnv) else ()
        chunks = (_on_host if where else _on_device)(player, key, num_envs, rows, *where)
        stack.enter_context(memory.running_out())
        written = _write(writer, stack.enter_context(contextlib.closing(chunks)), shares, limit)
        versions = {"wmjax": wmjax.__version__, "jax": jax.__version__, "python": platform.python_version()}
        writer.finish(player.about | {"seed": seed, "num_envs": num_envs, "versions": versions})
    ended = f"mean return {written[2]:.3f} of those that ended"
    if episodes is not None and written[0] < episodes:
        say(f"warning: {written[0]:,} of {episodes:,} episodes, for some go on after {limit:,} steps; they are cut")
    say(f"wrote {written[0]:,} episodes with {written[1]:,} records to {out}; {ended}")
    return out


def _player(
    env: Any, run: Run | str | Path | None, policy: str | None, action: str | None, which: str, trust_env: bool,
    start_timeout: float | None, **made: Any,
) -> Player:  # fmt: skip
    """Who plays and where; `made` is how the environment is made. Raises `UsageError` for what does not go together."""
    policy = checks.choice("policy", policy or ("random" if run is None else "agent"), POLICIES)
    if policy == "agent" and run is None:
        raise UsageError("policy: 'agent' needs a run, whose agent plays; without one 'random' is valid")
    if action is not None and policy == "random":
        raise UsageError(f"action: {action!r} is of an agent; with policy 'random' it is not valid")
    if which != "latest" and run is None:
        raise UsageError(f"which: {which!r} is of a run; without one it is not valid")
    if run is None:
        where, settings = _environment(env, made, start_timeout)
        agent = None
    else:
        agent, run, where, settings = _of_run(run, env, made, which, action, start_timeout, trust_env)
    about = {**settings, "spec": spec_json(where.spec), "policy": {"kind": policy}}
    num_envs = min(NUM_ENVS, agent.recipe.num_envs if agent else NUM_ENVS)  # who trains in one may have room for one
    if policy == "random":
        return Player(random_act(None, where.spec), lambda params, size: (), (), where, about, num_envs)
    about["policy"] |= {"run": str(run.path), "agent": run.description["agent"], "step": run.step, "which": run.which}
    about["policy"] |= run.how(action)
    return Player(agent.act, agent.act_carry, run.state.variables, where, about, num_envs)


def _environment(
    env: Any, made: Mapping[str, Any], start_timeout: float | None
) -> tuple[Env | HostEnv, dict[str, Any]]:
    """An environment for agents' actions, and how `episodes.json` says that it is made."""
    if env is None:
        raise UsageError("env: missing; name an environment (--env NAME), or a run (RUN)")
    _, name, args = handed(env, made["env_args"])
    where = agent_actions(make_env(env, **made, start_timeout=start_timeout))
    return where, {"env": name, **{k: made[k] for k in ("image_size", "action_repeat")}, "env_args": args}


def _of_run(
    run: Run | str | Path, env: Any, made: Mapping[str, Any], which: str, action: str | None,
    start_timeout: float | None, trust_env: bool,
) -> tuple:  # fmt: skip
    """The agent, the run (of several seeds the first), its environment, and how that is made."""
    if any(made[name] is not None for name in ("image_size", "action_repeat")):
        raise UsageError("image_size, action_repeat: not valid with a run, which has its own")
    args = check_args(made["env_args"])
    if not isinstance(run, Run):
        own = args if env is None else None
        run = load(run, which=which, env_args=own, start_timeout=start_timeout, trust_env=trust_env)
    elif args and env is None:
        raise UsageError("env_args: not valid with a run that is loaded; load it with them, or name an env")
    run = run.members[0] if run.members else run  # of several seeds, the first
    name = run.description["env"] if env is None else handed(env).name
    settings = {name: run.description.get(name) for name in ("image_size", "action_repeat")}
    if env is None:
        args = run.description.get("env_args") or {}
    else:
        args = other_args(run.description, name, args)
        env = other_env(run.description, env, args, start_timeout=start_timeout)
    agent, where = run.playing(0, env, action)
    return agent, run, where, {"env": name, **settings, "env_args": args}


def _chunk(spec: EnvSpec, num_envs: int, rows: int) -> int:
    """Rows that are made at once."""
    size = sum(math.prod(space.shape) * np.dtype(space.dtype).itemsize for space in spec.obs.values())
    return max(1, min(rows, ROWS, CHUNK_BYTES // (num_envs * (size + 64))))


def _on_device(player: Player, key: Array, num_envs: int, rows: int) -> Iterator[Record]:
    """Records `[rows, num_envs, ...]`, some rows at a time, each by one compiled scan."""
    env, chunk = player.env, _chunk(player.env.spec, num_envs, rows)
    memory.check_records("num_envs", env.spec, num_envs * (chunk + 2), 0)  # with those before and after a step
    key_reset, key_run = jax.random.split(key)

    def begin(params: PyTree, key: Array) -> Position:
        env_state, timestep = jax.vmap(env.reset)(noise.row_keys(key, num_envs))
        return Position(env_state, timestep, player.carry(params, num_envs))

    def without_latent(*args: Any) -> tuple:
        return *player.act(*args, explore=False)[:2], ()

    def advance(params: PyTree, key: Array, position: Position) -> tuple[Position, Record]:
        return rollout(without_latent, env, params, key, position, chunk)

    options = compiler.options()
    position = jax.jit(begin, compiler_options=options)(player.params, key_reset)
    step = jax.jit(advance, compiler_options=options)
    for number, done in enumerate(range(0, rows, chunk)):
        position, records = step(player.params, jax.random.fold_in(key_run, number), position)
        yield jax.tree.map(lambda x, size=rows - done: x[:size], jax.device_get(records))


def _on_host(player: Player, key: Array, num_envs: int, rows: int, workers: int | None) -> Iterator[Record]:
    """As `_on_device`, of environments in processes of their own."""
    env, chunk, key_run = player.env, _chunk(player.env.spec, num_envs, rows), jax.random.split(key)[1]
    act = lambda *args, explore: (*player.act(*args, explore=explore)[:2], ())
    program = act_program(act, env, partial(_row_keys, num_envs), explore=False)
    carry = jax.jit(player.carry, static_argnums=1)(player.params, num_envs)
    options = DEFAULTS._replace(workers=workers)
    with contextlib.closing(start(env, num_envs, options, training=False)) as envs:
        timestep = envs.reset([[*seed_words(key), i] for i in range(num_envs)])
        for done in range(0, rows, chunk):
            found = []
            for t in range(done, min(done + chunk, rows)):
                carry, chosen, native, _ = program(player.params, key_run, t, carry, timestep)
                envs.send(np.asarray(native))
                found.append(Record(timestep, np.asarray(chosen), ()))
                timestep = envs.receive()
            yield jax.tree.map(lambda *x: np.stack(x), *found)


def _row_keys(num_envs: int, key: Array, t: Array) -> Array:
    return noise.row_keys(jax.random.fold_in(key, t), num_envs)


# ---------------------------------------------------------------------------------------------------------------------
# From streams to episodes


def _arrays(record: Record) -> dict[str, np.ndarray]:
    """By name; actions as the environment took them, clipped where an agent's noise goes beyond [-1, 1]."""
    flags = {name: getattr(record.step, name) for name in ("is_first", "is_last", "is_terminal")}
    return {**record.step.obs, "action": np.clip(record.action, -1, 1), "reward": record.step.reward, **flags}


def _write(
    writer: Writer, chunks: Iterator[Record], shares: list[int] | None, limit: int | None
) -> tuple[int, int, float]:
    """Writes the episodes of all streams; how many there are, their records, and the mean return of those that ended.

    Args:
      writer: where to.
      chunks: records `[rows, num_envs, ...]`.
      shares: episodes of each stream that are wanted; None: all, also what is left of the last.
      limit: agent steps after which an episode is cut, and the rest of it left out.
    """
    open_, done, records, returns = {}, {}, 0, []

    def close(stream: int) -> None:
        nonlocal records
        parts = open_.pop(stream, None)
        if parts is None or (shares and done.get(stream, 0) >= shares[stream]):
            return
        episode = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        episode = {name: value[: limit + 1] if limit else value for name, value in episode.items()}
        if episode["is_last"][-1]:
            returns.append(float(episode["reward"].sum()))
        episode["is_last"] = np.append(episode["is_last"][:-1], True)
        writer.add(episode)
        done[stream] = done.get(stream, 0) + 1
        records += len(episode["reward"])

    for chunk in chunks:
        arrays = _arrays(chunk)
        for stream in range(arrays["reward"].shape[1]):
            begins = np.flatnonzero(arrays["is_first"][:, stream])
            for begin, end in zip([0, *begins], [*begins, len(arrays["reward"])], strict=True):
                if begin in begins:
                    close(stream)
                if end > begin:
                    open_.setdefault(stream, []).append({name: x[begin:end, stream] for name, x in arrays.items()})
                if open_.get(stream) and open_[stream][-1]["is_last"][-1]:
                    close(stream)
        if shares and all(done.get(i, 0) >= share for i, share in enumerate(shares)):
            break
    for stream in sorted(open_):
        close(stream)
    return writer.episodes, records, float(np.mean(returns)) if returns else math.nan
