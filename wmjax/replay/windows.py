"""Windows that episodes matter to, counted while rows are added, so that none is looked for in the whole ring.

Per environment it is counted, up to each row, how many episodes began, and how many windows end there that a sampling
may draw (`Rule`). Counts only grow: what two rows differ by lies between them, and where a count is reached is found by
a search. Rows are numbered as in `replay.device`, and the counts up to row i lie at `i % slots`, where slots are one
more than the rows of the ring: so those before its oldest row are there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array, PyTree, Sampling, UsageError

RADIX = 128  # rows that a search looks at side by side: of 2 million rows it finds one in three steps


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rule:
    """Which windows are counted, and how."""

    length: int = 1  # rows of one episode, at the end of the window
    context: int = 0  # rows before them, of any episode
    first: bool = False  # only those whose first row begins an episode
    left: bool = False  # instead of all this: a step that its episode goes on from
    ends: bool = False  # also those that an episode ends with
    episodes: bool = False  # also the episodes that windows begin in


class Counts(NamedTuple):
    """Of one rule. All int32; leaves that its rule does not ask for are None."""

    rule: Rule
    windows: Array  # [slots, num_envs], windows that end up to this row
    ended: Array | None  # [slots, num_envs], windows that end before this row, and an episode with them
    opened: Array | None  # [slots, num_envs], windows up to this row that are the first one to begin in their episode
    newest: Array | None  # [num_envs], the number of the episode that the last window before the newest row begins in


class Episodes(NamedTuple):
    """All that is counted of a ring."""

    begun: Array  # int32 [slots, num_envs], episodes that begin up to this row
    counts: tuple[Counts, ...]


def by_episodes(sampling: Sampling) -> bool:
    """Whether episodes matter to a sampling."""
    chosen = sampling.over == "episodes" or sampling.within_episode or sampling.starts == "first"
    return chosen or sampling.pad is not None


def _rules(sampling: Sampling) -> tuple[Rule, ...]:
    """Of what a sampling draws rather than any window, what it would rather draw first."""
    episodes = sampling.over == "episodes"
    if sampling.pad == "left":
        return (Rule(left=True, episodes=episodes),)
    if sampling.pad == "right" or not sampling.within_episode:
        return ()
    ends, size = sampling.prioritize_ends, dict(length=sampling.length, context=sampling.context)
    within = (Rule(**size, ends=ends, episodes=episodes),)
    if sampling.starts == "first":  # each of these is the only one of its episode
        within = (Rule(**size, first=True, ends=ends and not episodes), *within)
    return within


def init(samplings: tuple[Sampling, ...], rows: int, num_envs: int) -> Episodes | tuple[()]:
    """Counts of a ring that holds nothing yet, for all that these samplings draw; () if episodes matter to none."""
    samplings = tuple(filter(by_episodes, samplings))
    if not samplings:
        return ()
    zeros = lambda *lead: jnp.zeros((*lead, num_envs), jnp.int32)
    slots, counts = rows + 1, []
    for rule in dict.fromkeys(rule for sampling in samplings for rule in _rules(sampling)):
        opened = (zeros(slots), zeros()) if rule.episodes else (None, None)
        counts.append(Counts(rule, zeros(slots), zeros(slots) if rule.ends else None, *opened))
    return Episodes(zeros(slots), tuple(counts))


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def write_rows(rings: PyTree, rows: PyTree, first: Array) -> PyTree:
    """Rings `[slots, ...]` with rows `[steps, ...]`, the first of which has this number; in place where that can be.

    XLA fuses a plain write into what else reads a ring, which then needs it as before: a copy of all of it each time.
    It cannot fuse a loop, nor unroll one whose length the barrier hides.
    """
    contracts.leading(1, rings=rings)
    contracts.leading(1, rows=rows)
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    contracts.fits(jax.tree.map(one, rings), jax.tree.map(one, rows))
    contracts.exactly(first=first)
    contracts.integers(first=first)

    def write(i: Array, rings: PyTree) -> PyTree:
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new[i], (first + i) % x.shape[0], 0)
        return jax.tree.map(put, rings, rows)

    steps = jnp.int32(jax.tree.leaves(rows)[0].shape[0])
    return jax.lax.fori_loop(0, jax.lax.optimization_barrier(steps), write, rings)


def _before(ring: Array, row: Array, count: int) -> Array:
    """The rows `[count, num_envs]` before a row; zeros where nothing was written."""
    return ring[(row - count + jnp.arange(count)) % ring.shape[0]]


def add(episodes: Episodes, row: Array, is_first: Array, is_last: Array) -> Episodes:
    """The counts with some more rows.

    Args:
      episodes: up to the row before.
      row: the number of the first of them, int32.
      is_first, is_last: of their records, bool `[steps, num_envs]`.
    """
    contracts.exactly(row=row)
    contracts.integers(row=row)
    contracts.exactly(None, episodes.begun.shape[1], is_first=is_first)
    contracts.exactly(*is_first.shape, is_last=is_last)
    contracts.booleans(is_first=is_first, is_last=is_last)
    begun = _before(episodes.begun, row, 1) + jnp.cumsum(is_first, 0, dtype=jnp.int32)
    recent = lambda count: jnp.concatenate([_before(episodes.begun, row, count), begun])
    new = Episodes(recent(1), tuple(_count(x, recent, row, is_first, is_last) for x in episodes.counts))
    slim = lambda x: x._replace(counts=tuple(counts._replace(newest=None) for counts in x.counts))
    written = write_rows(slim(episodes), slim(new), row - 1)
    both = zip(written.counts, new.counts, strict=True)
    return written._replace(counts=tuple(rings._replace(newest=rows.newest) for rings, rows in both))


def _count(counts: Counts, recent: Callable, row: Array, is_first: Array, is_last: Array) -> Counts:
    """Rows `[steps + 1, num_envs]` of the counts: the one before `row`, of which more is known now, and those from it.

    What would begin before the first row of all is counted too, but only in rows that no window can end at.
    """
    rule, window, steps = counts.rule, counts.rule.context + counts.rule.length, len(is_first)
    upto = recent(window)  # episodes that begin up to each of so many rows before `row`, and those from it
    begun = lambda back: upto[window - back :][:steps]
    found = ~is_last if rule.left else begun(0) == begun(rule.length - 1)
    if rule.first:
        found &= begun(window - 1) != begun(window)
    found = jnp.concatenate([jnp.diff(_before(counts.windows, row, 2), axis=0) != 0, found])
    if rule.left:  # the next row shows whether an episode went on, where it did not say that it ends
        found &= jnp.concatenate([~is_first, jnp.ones_like(is_first[:1])])
    new = counts._replace(windows=_before(counts.windows, row - 1, 1) + jnp.cumsum(found, 0, dtype=jnp.int32))
    if rule.ends:
        ends = jnp.concatenate([jnp.zeros_like(found[:1]), is_first & found[:-1]])
        new = new._replace(ended=_before(counts.ended, row, 1) + jnp.cumsum(ends, 0, dtype=jnp.int32))
    if rule.episodes:
        episode = upto[: steps + 1]  # of the first row of each window
        seen = jax.lax.cummax(jnp.concatenate([counts.newest[None], jnp.where(found, episode, counts.newest)]))
        opens = found & (episode != seen[:-1])
        opened = _before(counts.opened, row - 1, 1) + jnp.cumsum(opens, 0, dtype=jnp.int32)
        new = new._replace(opened=opened, newest=seen[steps])
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


class _Choice(NamedTuple):
    """Windows that one may be drawn from, by the rows that they are counted at: all of `low`, ..., `high`."""

    windows: Array | None  # as in `Counts`; None: each row counts one
    ended: Array | None
    opened: Array | None  # None: not by episodes
    low: Array
    high: Array
    back: int  # from the row that counts a window to its first one


def _choices(episodes: Episodes, sampling: Sampling, oldest: Array, newest: Array) -> list[_Choice]:
    """What to draw from, the first of which that is not empty; the last never is."""
    found, window = [], sampling.context + sampling.length
    for rule in _rules(sampling):
        counts = next(counts for counts in episodes.counts if counts.rule == rule)
        low = oldest if rule.left else oldest + window - 1
        found.append(_Choice(counts.windows, counts.ended, counts.opened, low, newest, window - 1))
    last = newest if sampling.pad else newest - window + 1
    if sampling.starts == "first":
        found.append(_Choice(episodes.begun, None, None, oldest, last, 0))
    by = episodes.begun if sampling.over == "episodes" else None
    return [*found, _Choice(None, None, by, oldest, last, window - 1 if sampling.pad == "left" else 0)]


def _of(x: Array | None, row: Array, env: Array) -> Array:
    """Counts at rows of environments."""
    return row if x is None else x.at[row % x.shape[0], env].get(mode="promise_in_bounds")


def _search(x: Array | None, env: Array, low: Array, high: Array, count: Array) -> Array:
    """The first row of `low`, ..., `high` that has this count at least; `high + 1` if none has. All broadcast."""
    if x is None:
        return count
    last, span = high - low, x.shape[0]
    passed = jnp.zeros_like(count)  # rows from `low` on that have less; that of those after them, not all `span` do
    while span > 1:
        span = -(-span // RADIX)
        row = passed[..., None] - 1 + span * jnp.arange(1, RADIX + 1)
        there = _of(x, low[..., None] + row, env[..., None])
        less = (row <= last[..., None]) & (there - count[..., None] < 0)
        passed += span * less.sum(-1, dtype=jnp.int32)
    return low + passed


def draw(
    episodes: Episodes, sampling: Sampling, keys: Array, oldest: Array, newest: Array, num_envs: int
) -> tuple[Array, Array]:
    """Draws windows as a sampling says that episodes matter to.

    Args:
      episodes: made for this sampling.
      sampling: how.
      keys: `[B]`, consumed.
      oldest, newest: rows of the ring, int32.
      num_envs: of it.

    Returns:
      Their first rows and environments, int32 `[B]` each; a padded window may begin before the oldest row.
    """
    contracts.exactly(None, keys=keys)
    contracts.keys(len(keys), keys=keys)
    contracts.exactly(oldest=oldest, newest=newest)
    contracts.integers(oldest=oldest, newest=newest)
    if not episodes or not {*_rules(sampling)} <= {counts.rule for counts in episodes.counts}:
        raise UsageError(f"sampling {sampling}: this replay does not count its windows; valid are those it is made for")
    drawn = [_draw(choice, sampling.length, keys, num_envs) for choice in _choices(episodes, sampling, oldest, newest)]
    *_, (_, start, env) = drawn
    for there, other_start, other_env in reversed(drawn[:-1]):
        start, env = jnp.where(there, other_start, start), jnp.where(there, other_env, env)
    return start, env


def _draw(choice: _Choice, length: int, keys: Array, num_envs: int) -> tuple[Array, Array, Array]:
    """Whether there is any window to draw; the first rows, and environments, of those drawn."""
    windows, ended, opened, low, high, back = choice

    def weights(low: Array, high: Array, env: Array) -> tuple[Array, Array]:
        """Windows that are counted at these rows, and what those that end an episode count besides."""
        count = _of(windows, high, env) - _of(windows, low - 1, env)
        if ended is None:
            return count, jnp.zeros_like(count)
        return count, length * (_of(ended, jnp.minimum(high + 1, choice.high), env) - _of(ended, low, env))

    every = jnp.arange(num_envs)
    count, more = weights(low + 0 * every, high, every)
    first = _search(windows, every, low, high, _of(windows, low - 1 + 0 * every, every) + 1)
    if opened is None:
        size = count + more
    else:  # the first window opens what is left of an episode
        size = jnp.where(count > 0, _of(opened, high, every) - _of(opened, first, every) + 1, 0)
    upto = jnp.cumsum(size.astype(jnp.uint32))

    def one(key: Array) -> tuple[Array, Array]:
        key_episode, key_place = jax.random.split(key)
        number = jax.random.randint(key_place if opened is None else key_episode, (), 0, upto[-1], jnp.uint32)
        env = jnp.minimum((upto <= number).sum(dtype=jnp.int32), num_envs - 1)
        number = (number - (upto[env] - size[env].astype(jnp.uint32))).astype(jnp.int32)
        begin, end = low, high
        if opened is not None:
            number += _of(opened, first[env], env)
            begin, following = _search(opened, env, first[env], high, number + jnp.arange(2))
            end = following - 1
            number = jax.random.randint(key_place, (), 0, sum(weights(begin, end, env)))
        place = _search(windows, env, begin, end, _of(windows, begin - 1, env) + 1 + number)
        if ended is not None:
            late = number - weights(begin, end, env)[0]
            last = (
                _search(ended, env, begin, jnp.minimum(end + 1, high), _of(ended, begin, env) + 1 + late // length) - 1
            )
            place = jnp.where(late < 0, place, last)
        return place - back, env

    return upto[-1] > 0, *jax.vmap(one)(keys)
