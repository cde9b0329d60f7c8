"""Windows are drawn from counts as likely as by looking at every row of the ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.replay import device as replays
from wmjax.replay import windows
from wmjax.replay.device import Record
from wmjax.types import Sampling, TimeStep, UsageError

ROWS, ENVS, DRAWS = 12, 3, 4000
WITHIN = dict(within_episode=True)
SAMPLINGS = (
    Sampling(3, **WITHIN),  # World Models
    Sampling(3, context=1, over="episodes", **WITHIN),  # DreamerV1
    Sampling(3, over="episodes", prioritize_ends=True, **WITHIN),  # DreamerV2
    Sampling(2, context=1, prioritize_ends=True, **WITHIN),
    Sampling(3, context=1, starts="first", prioritize_ends=True, **WITHIN),
    Sampling(2, over="episodes", starts="first", **WITHIN),
    Sampling(4, context=1, over="episodes"),
    Sampling(1, starts="first"),  # World Models' dreams
    Sampling(1, context=2, over="episodes", pad="left"),  # IRIS's actor-critic
    Sampling(3, pad="left"),
    Sampling(3, over="episodes", pad="right"),  # IRIS's world model
)
# When episodes begin, of each environment, and rows added in all; the last rows may have been added one by one.
RINGS = {
    "not full": (([0, 4, 8], [0, 1, 2], [0]), 10),
    "just full": (([0, 4, 8], [3, 11], [0, 2, 4, 6, 8, 10]), 12),
    "just wrapped": (([0, 4, 8, 12], [3, 11], [0, 2, 4, 6, 8, 10, 12]), 13),
    "wrapped twice": (([0, 9, 14, 20, 26], [25, 26], [1, 2, 3, 17, 18]), 27),
    "one long episode": (([], [], []), 18),
    "of single steps": ((range(40), range(40), range(40)), 31),
}


def records(begins, first, steps) -> Record:
    """Rows of episodes that begin at the rows given for each environment, and end before the next, but for a cut."""
    row = np.arange(first, first + steps)[:, None]
    flag = lambda shift: np.concatenate([np.isin(row + shift, list(x)) for x in begins], 1)
    last = flag(1) & (row % 5 != 1)  # the others are cut
    return Record(TimeStep({}, (), jnp.asarray(flag(0)), jnp.asarray(last), ()), (), ())


def ring(begins, total) -> replays.Replay:
    replay = replays.init(jax.tree.map(lambda x: x[0], records(begins, 0, 1)), ENVS, ROWS * ENVS, SAMPLINGS)
    first = 0
    while first < total:
        steps = 4 if total - first > 8 else 1
        replay, first = add(replay, records(begins, first, steps)), first + steps
    return replay


def likelihood(begins, total, how) -> np.ndarray:
    """Of each first row (with `pad="left"`, last row) and environment, by looking at all of them: [rows, envs]."""
    oldest, window = max(0, total - ROWS), how.context + how.length
    kept = range(oldest, total)
    first, last = (np.asarray(x) for x in records(begins, 0, total + 1).step[2:4])
    episode = np.cumsum(first, 0)
    weight, fallback, every = np.zeros((3, total, ENVS))
    for row in kept:
        for env in range(ENVS):
            if how.pad:
                goes_on = not last[row, env] and not (row + 1 < total and first[row + 1, env])
                every[row, env], fallback[row, env] = (1 if how.pad == "right" else goes_on), 1
            elif row + window <= total:
                end = row + window - 1
                fallback[row, env] = 1
                inside = not how.within_episode or episode[end, env] == episode[row + how.context, env]
                ended = how.prioritize_ends and end + 1 < total and first[end + 1, env]
                every[row, env] = inside * (1 + how.length * ended)
    every = every if every.any() else fallback
    weight = every * first[:total] if how.starts == "first" else every
    weight = weight if weight.any() else every
    if how.over == "episodes":
        for env in range(ENVS):
            for number in set(episode[oldest:total, env]):
                here = weight[:, env] * (episode[:total, env] == number)
                weight[:, env] = np.where(here > 0, here / max(here.sum(), 1e-9), weight[:, env])
    return weight / weight.sum()


@jax.jit
def draws(replay, key):
    """First rows and environments by each sampling."""
    oldest, newest = replay.added - replays.size(replay), replay.added - 1
    keys = jax.random.split(key, DRAWS)
    return [windows.draw(replay.episodes, how, keys, oldest, newest, ENVS) for how in SAMPLINGS]


add = jax.jit(replays.add)


@pytest.mark.slow
@pytest.mark.parametrize("name", RINGS)
def test_every_window_is_as_likely_as_its_sampling_says(name):
    begins, total = RINGS[name]
    for how, (row, env) in zip(SAMPLINGS, draws(ring(begins, total), jax.random.key(1)), strict=True):
        expected, seen = likelihood(begins, total, how), np.zeros((total, ENVS))
        shift = how.context + how.length - 1 if how.pad == "left" else 0
        np.add.at(seen, (np.asarray(row) + shift, np.asarray(env)), 1 / DRAWS)
        assert not seen[expected == 0].any(), how
        assert (np.abs(seen - expected) <= 5 * np.sqrt(expected / DRAWS)).all(), how


def test_counts_do_not_depend_on_how_many_rows_are_added_at_once():
    begins, total = RINGS["wrapped twice"]
    one = ring(begins, 0)
    for row in range(total):
        one = add(one, records(begins, row, 1))
    jax.tree.map(np.testing.assert_array_equal, one, ring(begins, total))


def test_what_is_drawn_does_not_depend_on_how_large_the_counts_are():
    """As those of a run that is long; only what rows differ by matters."""
    replay = ring(*RINGS["wrapped twice"])
    large = lambda x: None if x is None else x + (2**31 - 20)  # some are past the largest int32, and negative
    counts = tuple(
        x._replace(windows=large(x.windows), ended=large(x.ended), opened=large(x.opened))
        for x in replay.episodes.counts
    )
    moved = replay._replace(episodes=replay.episodes._replace(begun=large(replay.episodes.begun), counts=counts))
    jax.tree.map(np.testing.assert_array_equal, draws(replay, jax.random.key(2)), draws(moved, jax.random.key(2)))


@pytest.mark.parametrize("how", [SAMPLINGS[1], SAMPLINGS[8]])
def test_a_draw_makes_nothing_of_the_size_of_the_ring(how):
    rows, record = 2_000_000, jax.tree.map(lambda x: x[0], records(([], [], []), 0, 1))
    replay = jax.eval_shape(lambda: replays.init(record, ENVS, rows * ENVS, (how,)))
    sample = jax.jit(replays.sample, static_argnums=(2, 3), donate_argnums=0)
    memory = sample.lower(replay, jax.random.key(0), how, 16).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows / 8  # less than one flag of every eighth row of one environment


@pytest.mark.slow
def test_mapped_over_seeds_each_ring_is_drawn_from_as_if_it_were_alone():
    rings = [ring(*RINGS[name]) for name in ("not full", "wrapped twice")]
    both = jax.tree.map(lambda *x: jnp.stack(x), *rings)
    keys = jax.random.split(jax.random.key(3), 2)
    sample = lambda replay, key: replays.sample(replay, key, SAMPLINGS[2], 8)[2]
    mapped = jax.jit(jax.vmap(sample))(both, keys)
    for i, replay in enumerate(rings):
        alone = jax.jit(sample)(replay, keys[i])
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), mapped, alone)


def test_a_sampling_that_a_replay_was_not_made_for_is_refused():
    replay = ring(*RINGS["not full"])
    with pytest.raises(UsageError, match="does not count its windows"):
        replays.sample(replay, jax.random.key(0), Sampling(5, **WITHIN), 2)
