"""CMA-ES beside pycma, what the adapter mends in evosax, and the evaluation of populations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import evosax.algorithms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax import evolution
from wmjax.envs import catch, make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.evolution import StrategyConfig, make_strategy
from wmjax.types import Agent, AgentState, Discrete, Env, EnvSpec, Evolve, TimeStep, UsageError, WorldModel

N = 10


def sphere(x):
    return (x**2).sum(-1)


def ellipsoid(x):
    return (10.0 ** (6 * np.arange(N) / (N - 1)) * x**2).sum(-1)


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def search(strategy, fitness, mean, generations, *, until=jnp.inf):
    """A function from a key to the state after at most so many generations, or once `until` is reached."""

    def going(loop):
        _, state, t = loop
        return (state.best_fitness < until) & (t < generations) & ~state.done

    def generation(loop):
        key, state, t = loop
        key_ask, key_tell, key = jax.random.split(key, 3)
        candidates, state = strategy.ask(key_ask, state)
        return key, strategy.tell(key_tell, state, candidates, fitness(candidates)), t + 1

    def run(key):
        key_init, key = jax.random.split(key)
        return jax.lax.while_loop(going, generation, (key, strategy.init(key_init, mean), 0))[1]

    return jax.jit(run), jax.jit(jax.vmap(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cost, start",
    [(sphere, 1.0), (ellipsoid, 1.0), (rosenbrock, 0.0)],
)
def test_evaluations_to_a_hundred_millionth_are_within_a_fifth_of_pycmas(cost, start):
    cma = pytest.importorskip("cma", reason="the extra `test` brings pycma")
    population, theirs = 10, []
    for seed in range(1, 16):
        options = {"popsize": population, "seed": seed, "verbose": -9, "ftarget": 1e-8}
        es = cma.CMAEvolutionStrategy(N * [start], 0.5, options)
        es.optimize(lambda x: float(cost(np.asarray(x))))
        theirs.append(es.result.evaluations if es.result.fbest <= 1e-8 else np.inf)
    with jax.enable_x64(True):
        strategy = make_strategy(StrategyConfig(N, population, sigma_init=0.5))
        _, runs = search(strategy, lambda x: -cost(x), jnp.full(N, start), 3000, until=-1e-8)
        state = runs(jax.random.split(jax.random.key(0), 15))
        assert state.best.dtype == jnp.float64
        ours = np.where(state.best_fitness >= -1e-8, state.generation * population, np.inf)
    assert 0.8 < np.median(ours) / np.median(theirs) < 1.2, (np.median(ours), np.median(theirs))


@pytest.mark.slow
def test_fitness_is_maximized_by_either_kind():
    for kind in ("cma_es", "sep_cma_es"):
        strategy = make_strategy(StrategyConfig(4, 8, kind, sigma_init=0.3))
        run, _ = search(strategy, lambda x: -((x - 2.0) ** 2).sum(-1), jnp.zeros(4), 150)
        state = run(jax.random.key(0))
        np.testing.assert_allclose(state.mean, 2.0, atol=1e-2)
        assert state.best_fitness > -1e-4


def told(strategy, state, candidates, fitness, seed=0):
    return jax.jit(strategy.tell)(jax.random.key(seed), state, candidates, jnp.asarray(fitness, jnp.float32))


@functools.cache
def asked(population=8, n=3, **changes):
    strategy = make_strategy(StrategyConfig(n, population, **changes))
    state = jax.jit(strategy.init)(jax.random.key(0), jnp.zeros(n))
    candidates, state = jax.jit(strategy.ask)(jax.random.key(1), state)
    return strategy, state, candidates


@pytest.mark.slow
def test_ties_do_not_break_the_weights():
    """evosax casts averaged ranks to integers: all candidates of one return would take the same weight."""
    strategy, state, candidates = asked()
    tied = told(strategy, state, candidates, np.ones(8))
    params = evosax.algorithms.CMA_ES(8, jnp.zeros(3)).default_params
    weights = np.maximum(params.weights, 0)
    ranks = evolution.ordinal_ranks(jax.random.key(0), jnp.ones(8))
    assert sorted(ranks.tolist()) == list(range(8))
    np.testing.assert_allclose(tied.mean, weights[np.asarray(ranks)] @ candidates, atol=1e-6)
    assert weights.sum() == pytest.approx(1)
    # The order of ties is drawn anew, and what is not tied keeps its order.
    assert not np.allclose(tied.mean, told(strategy, state, candidates, np.ones(8), seed=1).mean)
    for seed in range(20):
        ranks = evolution.ordinal_ranks(jax.random.key(seed), jnp.array([5.0, 1.0, 1.0, 0.0, 5.0]))
        assert ranks[3] == 0 and set(ranks[1:3].tolist()) == {1, 2}


def test_what_is_not_finite_ranks_last_and_a_generation_without_a_finite_fitness_changes_nothing():
    strategy, state, candidates = asked()
    fitness = np.arange(8.0)
    expected = told(strategy, state, candidates, np.r_[-9.0, fitness[1:]])
    for bad in (np.nan, np.inf, -np.inf):
        found = told(strategy, state, candidates, np.r_[bad, fitness[1:]])
        chex.assert_trees_all_equal(found.inner, expected.inner)
        assert found.best_fitness == 7
        skipped = told(strategy, state, candidates, np.full(8, bad))
        chex.assert_trees_all_equal(skipped.inner, state.inner)
        assert skipped.best_fitness == state.best_fitness and not skipped.done


def test_of_two_equal_returns_the_larger_solution_ranks_worse_under_weight_decay():
    """The 2018 code has the sign the other way around."""
    strategy, state, _ = asked(population=4, weight_decay=0.01)
    large, small = np.full(3, 2.0), np.full(3, 0.1)
    candidates = jnp.asarray(np.stack([large, small, large * 0.99, small * 1.01]), jnp.float32)
    after = told(strategy, state, candidates, np.full(4, 3.0))
    plain = make_strategy(StrategyConfig(3, 4))
    order = told(plain, state, candidates, [0.0, 3.0, 1.0, 2.0])  # smaller is better
    np.testing.assert_allclose(after.mean, order.mean, atol=1e-6)
    assert after.best_fitness == 3.0  # the penalty ranks, it is not part of the fitness


def test_the_best_is_kept_by_its_true_fitness_and_never_replaced_by_a_worse_one():
    strategy, state, candidates = asked()
    first = told(strategy, state, candidates, -np.arange(8.0))
    assert first.best_fitness == 0 and np.array_equal(first.best, candidates[0])
    second = told(strategy, first, candidates + 1, -5.0 - np.arange(8.0))
    assert second.best_fitness == 0 and np.array_equal(second.best, candidates[0])


def test_a_converged_run_stops_at_the_floor_of_sigma_instead_of_turning_to_nan():
    strategy = make_strategy(StrategyConfig(N, 10, sigma_init=0.5))
    _, runs = search(strategy, lambda x: -sphere(x), jnp.ones(N), 5000)
    state = runs(jax.random.split(jax.random.key(0), 3))
    assert state.done.all() and (state.generation < 5000).all()
    chex.assert_tree_all_finite(state.inner.mean)
    assert (state.sigma > 0).all() and (jnp.abs(state.mean) < 1e-3).all()


def test_a_finished_run_freezes_and_the_others_go_on():
    strategy, state, candidates = asked()
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)._replace(done=jnp.array([True, False]))
    both = jnp.stack([candidates, candidates])
    fitness = jnp.broadcast_to(jnp.arange(8.0), (2, 8))
    after = jax.jit(jax.vmap(strategy.tell))(jax.random.split(jax.random.key(0)), states, both, fitness)
    frozen, going = (jax.tree.map(lambda x, i=i: x[i], after) for i in (0, 1))
    chex.assert_trees_all_equal(frozen, state._replace(done=jnp.bool_(True)))
    assert going.generation == 1 and not going.done and going.best_fitness == 7


def test_flat_fitness_ends_a_run_only_after_many_generations():
    strategy = make_strategy(StrategyConfig(4, 8))
    run, _ = search(strategy, lambda x: jnp.zeros(8), jnp.zeros(4), 1000)
    assert int(run(jax.random.key(0)).generation) == 10 + 15
    chex.assert_tree_all_finite(run(jax.random.key(0)).inner.C)


@pytest.mark.slow
def test_many_runs_under_vmap_are_the_same_runs_alone():
    strategy = make_strategy(StrategyConfig(5, 8, sigma_init=0.3))
    one, many = search(strategy, lambda x: -sphere(x), jnp.ones(5), 40)
    keys = jax.random.split(jax.random.key(3), 3)
    states = many(keys)
    for i in range(3):
        alone = one(keys[i])
        np.testing.assert_allclose(states.mean[i], alone.mean, rtol=2e-2, atol=2e-3)
        assert states.generation[i] == alone.generation == 40
    assert len(np.unique(states.best_fitness)) == 3


@pytest.mark.slow
def test_a_lazy_eigendecomposition_searches_as_well():
    """In many dimensions the covariance changes too little in a generation to be decomposed again, as in pycma."""
    n = 200
    strategy = make_strategy(StrategyConfig(n, 6, sigma_init=0.5))
    state = jax.jit(strategy.init)(jax.random.key(0), jnp.zeros(n))
    ask = jax.jit(strategy.ask)
    state = state._replace(inner=state.inner.replace(C=4 * jnp.eye(n)), generation=jnp.int32(1))
    _, kept = ask(jax.random.key(0), state)
    assert kept.inner.D.max() == 1  # the old decomposition
    candidates, renewed = ask(jax.random.key(0), state._replace(generation=jnp.int32(0)))
    np.testing.assert_allclose(renewed.inner.D, 2.0, rtol=1e-5)
    assert np.std(candidates) == pytest.approx(2 * 0.5, rel=0.1)
    run, _ = search(strategy, lambda x: -sphere(x), jnp.ones(n), 600)
    assert run(jax.random.key(0)).best_fitness > -20  # from -200


@pytest.mark.slow
def test_a_restart_doubles_the_population_keeps_the_best_and_finds_what_the_first_run_missed():
    rastrigin = lambda x: -(10 * x.shape[-1] + (x**2 - 10 * jnp.cos(2 * jnp.pi * x)).sum(-1))
    strategy = make_strategy(StrategyConfig(3, 6, sigma_init=1.0))
    _, runs = search(strategy, rastrigin, jnp.full(3, 3.0), 3000)
    state = runs(jax.random.split(jax.random.key(1), 6))
    first = state.best_fitness
    assert state.done.all() and (first < -0.5).any()  # some are stuck in a local optimum
    for _ in range(3):
        strategy = evolution.larger(strategy)
        restart = lambda key, state, strategy=strategy: evolution.restart(strategy, key, state, jnp.full(3, 3.0))
        start = jax.vmap(restart)(jax.random.split(jax.random.key(2), 6), state)
        chex.assert_trees_all_equal((start.best, start.best_fitness), (state.best, state.best_fitness))
        assert not start.done.any() and start.sigma.tolist() == [1.0] * 6

        def generation(state, key, strategy=strategy):
            key_ask, key_tell = jax.random.split(key)
            candidates, state = strategy.ask(key_ask, state)
            return strategy.tell(key_tell, state, candidates, rastrigin(candidates)), None

        go = jax.jit(jax.vmap(lambda state, key: jax.lax.scan(generation, state, jax.random.split(key, 150))[0]))
        state = go(start, jax.random.split(jax.random.key(4), 6))
    assert strategy.config.population == 48
    assert (state.best_fitness > -1e-2).sum() > (first > -1e-2).sum()
    assert (state.best_fitness >= first).all()


def test_ask_and_tell_keep_types_and_compile_once():
    strategy, state, candidates = asked()
    chex.assert_tree_all_finite(state)
    after = told(strategy, state, candidates, np.arange(8.0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    types = lambda tree: [jnp.asarray(x).aval.weak_type for x in jax.tree.leaves(tree)]
    assert not any(types(state))
    assert make_strategy(StrategyConfig(3, 8)) is strategy  # equal configurations share compiled programs


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(population=3), "population must be at least 4, got 3"),
        (dict(dims=0), "dims"),
        (dict(kind="snes"), "kind must be cma_es or sep_cma_es, got 'snes'"),
        (dict(sigma_init=0.0), "sigma_init"),
        (dict(sigma_init=float("nan")), "sigma_init"),
        (dict(sigma_min=0.2), "sigma_min must be in"),
        (dict(weight_decay=-1.0), "weight_decay"),
    ],
)
def test_what_makes_no_strategy_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        make_strategy(StrategyConfig(**{"dims": 3, "population": 8} | changes))


# ---------------------------------------------------------------------------------------------------------------------
# Fitness of a population


def countdown(noisy: bool = False) -> Env:
    """Pays the action for `start` steps, drawn by the reset, and then ends; with noise on it."""

    def record(left, reward, first):
        over, first = left <= 0, jnp.bool_(first)
        return TimeStep({"left": left}, jnp.float32(reward), first, over & ~first, over & ~first)

    def reset(key):
        left = jax.random.randint(key, (), 1, 6)
        return left, record(left, 0.0, True)

    def step(key, left, action):
        return left - 1, record(left - 1, action[0] + noisy * jax.random.normal(key), False)

    return Env(EnvSpec({"left": Discrete(6)}, Discrete(2)), reset, step)


def constant(params, keys, carry, step):
    """Row i emits the number of its candidate."""
    rows = jnp.repeat(params, keys.shape[0] // params.shape[0])
    return carry, rows[:, None]


def population_returns(keys, env=None, max_steps=10, params=None, axis_name=None):
    params = jnp.arange(float(len(keys))) if params is None else params
    return evolution.play(env or countdown(), constant, params, (), keys, max_steps, axis_name)[:2]


def test_returns_count_the_first_episode_of_each_row_and_stop_at_the_limit():
    keys = evolution.episode_keys(jax.random.key(0), 3, 4)
    returns, lengths = jax.jit(population_returns)(keys)
    assert returns.shape == lengths.shape == (3, 4)
    starts = jax.vmap(lambda k: countdown().reset(jax.random.split(k)[0])[0])(keys[0])
    np.testing.assert_array_equal(lengths, np.broadcast_to(starts, (3, 4)))
    np.testing.assert_array_equal(returns, np.arange(3)[:, None] * np.asarray(lengths))
    _, lengths = population_returns(keys, max_steps=2)
    np.testing.assert_array_equal(lengths[0], np.minimum(starts, 2))


def test_common_random_numbers_give_every_candidate_the_same_episodes():
    play = lambda keys: population_returns(keys, params=jnp.zeros(3), env=countdown(noisy=True))[0]
    common = play(evolution.episode_keys(jax.random.key(0), 3, 4))
    np.testing.assert_array_equal(common[0], common[1])
    assert len(np.unique(common[0])) == 4
    own = play(evolution.episode_keys(jax.random.key(0), 3, 4, common=False))
    assert len(np.unique(own)) == 12


@pytest.mark.slow
def test_a_population_spread_over_devices_is_evaluated_as_on_one():
    for common in (True, False):
        keys = evolution.episode_keys(jax.random.key(0), 4, 3, common)
        alone, _ = population_returns(keys)

        def part(device, common=common):
            first = 2 * device
            keys = evolution.episode_keys(jax.random.key(0), 2, 3, common, first)
            return population_returns(keys, params=first + jnp.arange(2.0), axis_name="devices")[0]

        spread = jax.vmap(part, axis_name="devices")(jnp.arange(2))
        np.testing.assert_array_equal(spread[0], alone)
        np.testing.assert_array_equal(spread[1], alone)


# ---------------------------------------------------------------------------------------------------------------------
# A controller evolved in a dream


class Seen(NamedTuple):
    """What there is to know of `catch`, and what the last step paid."""

    row: jax.Array
    ball: jax.Array
    paddle: jax.Array
    reward: jax.Array
    cont: jax.Array


def exact_agent() -> Agent:
    """Reads positions off the picture, knows the rules, and acts linearly on how far the ball is from the paddle."""

    def look(image):  # 10 x 10 pixels, two for each column
        column = lambda mask: jnp.argmax(mask, -1) // 2
        ball = (image[..., 0] == catch.BALL[0]).any(-2)
        return column(ball), column(image[..., -1, :, 2] == catch.PADDLE[2])

    def imagine(params, key, state, action):
        row, paddle = state.row + 1, jnp.clip(state.paddle + jnp.argmax(action, -1) - 1, 0, catch.COLUMNS - 1)
        landed = row == catch.ROWS - 1
        reward = jnp.where(landed, jnp.where(paddle == state.ball, 1.0, -1.0), 0.0)
        return Seen(row, state.ball, paddle, reward, 1.0 - landed)

    def policy(params, key, carry, state, *, explore):
        theta = jnp.atleast_2d(params["theta"])  # [P, 6]: one bias and one weight for each action
        offset = (state.ball - state.paddle).reshape(theta.shape[0], -1, 1)
        output = theta[:, None, :3] + theta[:, None, 3:] * offset
        return carry, jax.nn.one_hot(jnp.argmax(output, -1).reshape(state.ball.shape), 3)

    def act(params, key, carry, step, *, explore):
        ball, paddle = look(step.obs["image"])
        state = Seen(jnp.zeros_like(ball), ball, paddle, step.reward, step.reward)
        return *policy(params, key, carry, state, explore=explore), ()

    nothing = lambda *_: ()
    predict = lambda params, state: (state.reward, state.cont)
    model = WorldModel(nothing, nothing, nothing, imagine, predict, nothing)
    return Agent(nothing, nothing, policy, nothing, act, model, None)


@pytest.mark.slow
def test_a_controller_evolved_in_a_dream_of_catch_beats_random_play_in_catch():
    env, agent = agent_actions(make_env("catch", image_size=10)), exact_agent()
    ball = jnp.arange(catch.COLUMNS)
    zeros = jnp.zeros(catch.COLUMNS)
    starts = Seen(0 * ball, ball, 0 * ball + 2, zeros, zeros + 1)
    evolve = Evolve(
        "controller", make_strategy(StrategyConfig(6, 8, sigma_init=0.5)),
        lambda params: params["theta"], lambda params, theta: params | {"theta": theta}, "dream", rollouts=8,
        max_steps=20, population=8, generations=10,
        mean_rollouts=32, starts=lambda params, key, batch: starts,
    )  # fmt: skip
    params = {"theta": jnp.zeros(6)}
    opt_state = {"controller": evolution.init_evolving(evolve, jax.random.key(0), params)}
    state = AgentState(params, opt_state, (), jnp.int32(0))
    iteration = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))
    for i in range(4):
        state, metrics = iteration(state, jax.random.key(i), None)
    assert metrics["length"] == catch.ROWS - 1
    play = lambda params: evolution.play(
        env, lambda *a: agent.act(*a, explore=False)[:2], params, (), jax.random.split(jax.random.key(9), 64), 9
    )[0]
    scores = jax.jit(play)(state.params)
    assert scores.mean() > 0.9  # random play earns -0.6
    assert scores.mean() == pytest.approx(float(state.opt_state["controller"].kept_return), abs=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# A search that is done


def flat_search(restarts: int | None, generations: int = 5) -> Evolve:
    """Of one number, in an environment that pays the same for all: it is done once it was flat for long."""
    return Evolve(
        "search", make_strategy(StrategyConfig(1, 4)), get=lambda params: params["theta"],
        set=lambda params, theta: {"theta": theta}, where="env", rollouts=1, max_steps=2, population=4,
        generations=generations, mean_rollouts=1, restarts=restarts,
    )  # fmt: skip


def iterated(evolve: Evolve, iterations: int) -> list[tuple[AgentState, dict]]:
    """State and metrics after each iteration."""
    agent = exact_agent()._replace(
        act_carry=lambda params, size: (),
        act=lambda params, key, carry, step, explore: (carry, jnp.ones((len(key), 1)), ()),
    )
    env = countdown()
    run = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))
    params = {"theta": jnp.zeros(1)}
    state = AgentState(params, {"search": evolution.init_evolving(evolve, jax.random.key(0), params)}, (), jnp.int32(0))
    found = []
    for i in range(iterations):
        state, metrics = run(state, jax.random.fold_in(jax.random.key(1), i), None)
        found.append((state, metrics))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "restarts, played",
    [
        (None, 50),
        (0, 18),  # 10 + 30 / 4 generations of equal returns
        (1, 18 + 14),  # and 10 + 30 / 8
    ],
)
def test_a_search_that_is_done_goes_on_ends_or_restarts_as_it_is_told(restarts, played):
    evolve = flat_search(restarts)
    found = iterated(evolve, 10)
    assert [search.population for search in evolution.populations(evolve)] == [4, 8][: 1 + (restarts or 0)]
    assert [int(state.step) for state, _ in found] == [min(5 * (i + 1), played) for i in range(10)]
    state, metrics = found[-1]
    assert float(metrics["done"]) == 1 and int(state.opt_state["search"].strategy.generation) <= 18 + 14
    assert ("restarts" in metrics) == (restarts is not None)
    if restarts is None:
        return
    assert metrics["restarts"] == restarts and np.isnan(metrics["fitness_mean"]) and np.isnan(metrics["mean_return"])
    ended = found[played // 5][0]  # the iteration it ended in; all after it changes nothing
    chex.assert_trees_all_equal(jax.tree.leaves(ended), jax.tree.leaves(state))
    assert np.isfinite(found[played // 5][1]["fitness_mean"])
