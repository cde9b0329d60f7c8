"""Replay on device: a ring buffer as a pytree, with pure functions.

Storage is time-major, `[rows, num_envs, ...]`: one row is one time step of all environments, which advance together.
Rows are numbered from the start of the run, and row i lies at `i % rows`. Samples are windows of consecutive rows of
one environment; they never cross the write head, and episode boundaries only if `Sampling` lets them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts, noise
from wmjax.replay import windows
from wmjax.replay.windows import Episodes, by_episodes
from wmjax.types import Array, PyTree, Sampling, TimeStep, Trajectory, UsageError

Index = tuple[Array, Array]  # (row, env), int32 [T, B] each: where the steps of a batch lie


class Record(NamedTuple):
    """What replay keeps of a time step; leaves are `[num_envs, ...]`. All but the flags may be left out, as ()."""

    step: TimeStep
    action: Array  # as the agent chose it on seeing `step`
    latent: PyTree  # what acting stored; () if nothing


class BFloat16(NamedTuple):
    """How a bfloat16 leaf is stored: by its bits.

    XLA before jax 0.12 widens a bfloat16 scatter on a CPU to float32, the whole buffer with it, at every write.
    """

    bits: Array  # uint16


class Replay(NamedTuple):
    """The ring buffer and where it is being written and read."""

    data: Record  # [rows, num_envs, ...], bfloat16 leaves as `BFloat16`
    added: Array  # int32, rows written since the start of the run
    cursor: Array  # int32, next item of the online queue, or of those in order; item k is window k // num_envs of
    #   environment k % num_envs
    episodes: Episodes | tuple[()]  # counts of windows to draw from; () where episodes do not matter


def _pack(tree: PyTree) -> PyTree:
    """The tree as it is stored."""
    pack = lambda x: BFloat16(jax.lax.bitcast_convert_type(x, jnp.uint16)) if x.dtype == jnp.bfloat16 else x
    return jax.tree.map(pack, tree)


def _unpack(tree: PyTree) -> PyTree:
    """What `_pack` was given."""
    stored = lambda x: isinstance(x, BFloat16)
    unpack = lambda x: jax.lax.bitcast_convert_type(x.bits, jnp.bfloat16) if stored(x) else x
    return jax.tree.map(unpack, tree, is_leaf=stored)


def check(capacity: int, num_envs: int, sampling: Sampling, batch_size: int) -> None:
    """Raises `UsageError` if a batch of `batch_size` windows could never come out of such a replay."""
    window, rows, wrong = sampling.context + sampling.length, capacity // num_envs, None
    if sampling.over not in ("steps", "episodes", "in_order") or sampling.pad not in (None, "left", "right"):
        wrong = "valid are over 'steps', 'episodes' or 'in_order', pad None, 'left' or 'right'"
    elif sampling.starts not in ("any", "first") or (sampling.starts == "first" and sampling.pad == "left"):
        wrong = "valid are starts 'any' or, without pad 'left', 'first'"
    elif sampling.online and by_episodes(sampling):
        wrong = "online windows cross episodes, so they cannot be chosen by them"
    elif sampling.over == "in_order" and (sampling.online or by_episodes(sampling)):
        wrong = "windows in order are neither online nor chosen by episodes"
    elif sampling.prioritize_ends and not sampling.within_episode:
        wrong = "prioritize_ends is about windows that lie in one episode, so it needs within_episode"
    elif sampling.length < 1 or sampling.context < 0:
        wrong = "length must be at least 1 and context at least 0"
    if wrong:
        raise UsageError(f"sampling {sampling}: {wrong}")
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size}: must be at least 1")
    if capacity >= 2**31:  # records are counted in int32
        raise UsageError(f"replay_capacity {capacity}: must be below 2**31")
    if window > rows:
        raise UsageError(
            f"length {sampling.length} + context {sampling.context}: replay_capacity {capacity} over {num_envs} "
            f"environments holds {rows} steps of each; must be at most that"
        )
    if batch_size * window > capacity:
        raise UsageError(
            f"batch_size {batch_size}: its {batch_size * window} steps are more than replay_capacity {capacity}; "
            f"must be at most {capacity // window}"
        )


def init(example: Record, num_envs: int, capacity: int, samplings: tuple[Sampling, ...] = ()) -> Replay:
    """An empty replay.

    Args:
      example: one time step of all environments, arrays or `jax.ShapeDtypeStruct`s `[num_envs, ...]`; dtypes are kept.
      num_envs: environments that write to it.
      capacity: records in all, over all environments; `capacity // num_envs` rows are kept.
      samplings: all that it will be sampled by; those that episodes do not matter to may be left out.
    """
    contracts.exactly(num_envs, is_first=example.step.is_first)
    contracts.leading(1, example=example)
    rows = capacity // num_envs
    if rows < 1:
        raise UsageError(f"replay_capacity {capacity}: must be at least the number of environments, {num_envs}")
    data = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), jax.eval_shape(_pack, Record(*example)))
    return Replay(data, jnp.int32(0), jnp.int32(0), windows.init(samplings, rows, num_envs))


def full(records: Record, samplings: tuple[Sampling, ...] = ()) -> Replay:
    """A replay that holds these records, `[rows, num_envs, ...]` without latents, and has no more rows.

    None of them is new to an online queue, which is empty.
    """
    contracts.booleans(is_first=records.step.is_first, is_last=records.step.is_last)
    contracts.exactly(None, None, is_first=records.step.is_first)
    contracts.leading(2, records=records)
    rows, num_envs = records.step.is_first.shape
    counts = windows.init(samplings, rows, num_envs)
    if counts:
        counts = jax.jit(windows.add)(counts, jnp.int32(0), records.step.is_first, records.step.is_last)
    return Replay(records, jnp.int32(rows), jnp.int32(read_all(samplings, rows, num_envs)), counts)


def read_all(samplings: tuple[Sampling, ...], rows: int, num_envs: int) -> int:
    """The cursor of a replay with so many rows of which an online queue has nothing more to give."""
    return max((rows // (x.context + x.length) * num_envs for x in samplings if x.online), default=0)


def _rows(replay: Replay) -> int:
    return replay.data.step.is_first.shape[0]


def _num_envs(replay: Replay) -> int:
    return replay.data.step.is_first.shape[1]


def env_axes(replay: Replay, lead: int = 0) -> Replay:
    """The axis of environments of every leaf, an int, where `lead` others are before all; -1 where there is none."""
    whole = jax.tree.map(lambda _: -1, replay)
    data = jax.tree.map(lambda _: lead + 1, replay.data)
    return whole._replace(data=data, episodes=jax.tree.map(lambda x: x.ndim - 1, replay.episodes))


def size(replay: Replay) -> Array:
    """Rows that can be sampled, int32."""
    return jnp.minimum(replay.added, _rows(replay))


def can_sample(replay: Replay, sampling: Sampling) -> Array:
    """Whether the replay holds a whole window, bool; with `pad` a single step."""
    return size(replay) >= (1 if sampling.pad else sampling.context + sampling.length)


def add(replay: Replay, records: Record) -> Replay:
    """Appends rows and overwrites the oldest; in place where the replay is donated or carried by a loop.

    Args:
      replay: where to.
      records: consecutive time steps `[steps, num_envs, ...]`, at most as many as the replay has rows.
    """
    records, rows = Record(*records), _rows(replay)
    steps = records.step.is_first.shape[0]
    if steps > rows:
        raise UsageError(f"collect {steps}: replay keeps {rows} steps of each environment; must be at most that")
    contracts.fits(jax.eval_shape(lambda data: jax.tree.map(lambda x: x[:steps], _unpack(data)), replay.data), records)
    records = _pack(records)

    data, episodes = windows.write_rows(replay.data, records, replay.added), replay.episodes
    if episodes:
        episodes = windows.add(episodes, replay.added, records.step.is_first, records.step.is_last)
    return replay._replace(data=data, added=replay.added + steps, episodes=episodes)


def _starts(replay: Replay, keys: Array, window: int) -> Index:
    """Uniform over all (row, environment) where a whole window begins; `[B]` each."""
    oldest = replay.added - size(replay)
    most = jnp.maximum(size(replay) - window, 0) + 1

    def draw(key: Array) -> Index:
        key_row, key_env = jax.random.split(key)
        row = oldest + jax.random.randint(key_row, (), 0, most)
        return row, jax.random.randint(key_env, (), 0, _num_envs(replay))

    return jax.vmap(draw)(keys)


def _mask(replay: Replay, row: Array, is_first: Array, pad: str | None) -> Array:
    """Which steps of windows, at the rows `[T, B]`, are of the episode that the window is about; bool `[T, B]`."""
    if pad is None:
        return jnp.ones(row.shape, bool)
    begun = jnp.cumsum(is_first, 0, dtype=jnp.int32)
    kept = (row >= replay.added - size(replay)) & (row < replay.added)
    return kept & (begun == (begun[0] if pad == "right" else begun[-1]))


def _online(replay: Replay, start: Array, env: Array, window: int) -> tuple[Replay, Array, Array]:
    """Fills the first slots from the online queue, oldest unread window first, and moves its cursor."""
    num_envs = _num_envs(replay)
    oldest = replay.added - size(replay)
    intact = -(-oldest // window) * num_envs  # items before this one have been overwritten, at least in part
    first = jnp.maximum(replay.cursor, intact)
    fresh = jnp.clip(replay.added // window * num_envs - first, 0, start.shape[0])
    slot = jnp.arange(start.shape[0])
    item = first + slot
    start = jnp.where(slot < fresh, item // num_envs * window, start)
    env = jnp.where(slot < fresh, item % num_envs, env)
    return replay._replace(cursor=first + fresh), start, env


def _one_after_the_other(replay: Replay, sampling: Sampling, batch_size: int) -> tuple[Replay, Array, Array]:
    """The next windows from the oldest row to the newest, all environments side by side; moves the cursor.

    Trained steps do not overlap, except that the last window of an environment ends with its newest row.
    """
    num_envs, kept = _num_envs(replay), size(replay)
    windows = jnp.maximum(-(-(kept - sampling.context) // sampling.length), 1)
    item = (replay.cursor + jnp.arange(batch_size)) % (windows * num_envs)
    latest = jnp.maximum(kept - sampling.context - sampling.length, 0)
    start = replay.added - kept + jnp.minimum(item // num_envs * sampling.length, latest)
    cursor = (replay.cursor + batch_size) % (windows * num_envs)
    return replay._replace(cursor=cursor), start, item % num_envs


def sample(replay: Replay, key: Array, sampling: Sampling, batch_size: int) -> tuple[Replay, Trajectory, Index]:
    """Draws a batch of windows of `T = context + length` steps.

    All (start, environment) pairs are equally likely, or as `Sampling.over`, `within_episode`, `prioritize_ends`,
    `starts` and `pad` say. If no window lies in one episode, or begins one, any window may come. With `sampling.online`
    the first slots go to complete windows that were not read before, in the order in which they were completed
    (DreamerV3's online queue): each stream is cut in consecutive windows of T steps and each of these comes once,
    unless it is overwritten first. A replay serves one online sampling only, for there is one cursor; samplings
    "in_order", which draw nothing and begin again after the newest window, share it: each goes on where the last was.

    Args:
      replay: made for this sampling; holds at least one window (`can_sample`).
      key: one key, or keys `[B]`.
      sampling: how.
      batch_size: windows, B.

    Returns:
      The replay with its cursor moved; the batch `[T, B, ...]`, with `is_last[t] |= is_first[t + 1]` so that an episode
      that was cut ends properly, and nothing masked without `pad` (where something is, it holds other records); and
      where it came from, for `write`.
    """
    contracts.keys(batch_size, key=key)
    window = sampling.context + sampling.length
    keys = noise.row_keys(key, batch_size) if key.ndim == 0 else key
    if sampling.over == "in_order":
        replay, start, env = _one_after_the_other(replay, sampling, batch_size)
    elif by_episodes(sampling):
        oldest, newest = replay.added - size(replay), replay.added - 1
        start, env = windows.draw(replay.episodes, sampling, keys, oldest, newest, _num_envs(replay))
    else:
        start, env = _starts(replay, keys, window)
    if sampling.online:
        replay, start, env = _online(replay, start, env, window)
    number = start + jnp.arange(window)[:, None]  # [T, B]
    row, env = number % _rows(replay), jnp.broadcast_to(env, number.shape)
    record = _unpack(jax.tree.map(lambda x: x.at[row, env].get(mode="promise_in_bounds"), replay.data))
    step = record.step
    cut = jnp.concatenate([step.is_first[1:], jnp.zeros_like(step.is_first[:1])])
    step = step._replace(is_last=step.is_last | cut)
    mask = _mask(replay, number, step.is_first, sampling.pad)
    return replay, Trajectory(step, record.action, mask, record.latent), (row, env)


def check_latent(stored: PyTree, index: Index, latent: PyTree) -> None:
    """Demands of `latent` what `write` says; `stored` are arrays or shapes `[rows, num_envs, ...]`."""
    row, env = index
    contracts.integers(row=row, env=env)
    contracts.exactly(*row.shape, env=env)
    of_batch = lambda x, new: jax.ShapeDtypeStruct((new.shape[0], *row.shape[1:], *x.shape[2:]), new.dtype)
    contracts.fits(jax.tree.map(of_batch, stored, latent), latent)


def write(replay: Replay, index: Index, latent: PyTree) -> Replay:
    """Replaces the stored latents of a batch; in place where the replay is donated or carried by a loop.

    Args:
      replay: as after the `sample` that gave `index`, with nothing added since.
      index: where the batch came from.
      latent: `[t, B, ...]` with the structure that acting stores, cast to its dtypes, for the last t <= T steps of
        each window. A step that is in the batch twice keeps the one that comes last in time-major order, on every
        platform.
    """
    leaves = jax.tree.leaves(latent)
    if not leaves:
        return replay
    row, env = index
    check_latent(jax.eval_shape(_unpack, replay.data.latent), index, latent)
    row, env = (x[x.shape[0] - leaves[0].shape[0] :].ravel() for x in index)
    # Scatters leave open which of two writes to one place wins, so all but the last are sent out of bounds.
    place = row * _num_envs(replay) + env
    order = jnp.argsort(place, stable=True)
    last = jnp.concatenate([place[order][1:] != place[order][:-1], jnp.ones(1, bool)])
    row = jnp.where(jnp.zeros_like(last).at[order].set(last), row, _rows(replay))
    latent = jax.tree.map(lambda x, kept: x.astype(kept.dtype), latent, jax.eval_shape(_unpack, replay.data.latent))
    stored = jax.tree.map(
        lambda x, new: x.at[row, env].set(new.reshape(-1, *new.shape[2:]), mode="drop"),
        replay.data.latent,
        _pack(latent),
    )
    return replay._replace(data=replay.data._replace(latent=stored))
