"""Evolution strategies: CMA-ES of evosax as pure functions over a state, and the returns of a population in an `Env`.

Fitness is maximized here; evosax minimizes. Between the two stands an adapter that mends what matters for returns of
episodes, which are noisy, tie often and may fail:

- evosax is told ordinal ranks, ties broken at random. (It averages the ranks of ties and casts them to integers: tied
  candidates all take one weight, and the weights no longer sum to 1. CMA-ES itself depends on ranks only.)
- A fitness that is not finite ranks last; a generation without a finite one changes nothing.
- A run that has converged, is flat, or has an ill-conditioned covariance is `done` and freezes, so that many runs under
  one `vmap` do not disturb each other. (The state turns to NaN where the deviation underflows.) A search for an agent's
  parameters then goes on as it is, ends, or restarts with a larger population, as `Evolve.restarts` says.
- The best candidate is kept by its true fitness, not by a rank, and never by a fitness with a penalty in it.
- Weight decay makes large solutions worse. (The World Models code has the sign the wrong way around.)

Source: Hansen 2016, "The CMA Evolution Strategy: A Tutorial" (arXiv 1604.00772); Ros & Hansen 2008 (Sep-CMA-ES);
Auger & Hansen 2005 (IPOP).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wmjax import dreaming
from wmjax.ops import contracts, noise
from wmjax.types import Agent, AgentState, Array, Env, Evolve, Metrics, PyTree, Trajectory, UsageError

LEAST_POPULATION = 4
MAX_CONDITION = 1e14  # of the covariance, beyond which a run is done


# ---------------------------------------------------------------------------------------------------------------------
# The strategy


@dataclasses.dataclass(frozen=True)
class StrategyConfig:
    """What defines a strategy; hashable, so that equal ones share their compiled programs."""

    dims: int  # n, numbers to optimize
    population: int  # candidates per generation
    kind: Literal["cma_es", "sep_cma_es"] = "cma_es"  # full covariance, or a diagonal one: for n above about 1000
    sigma_init: float = 0.1
    sigma_min: float | None = None  # a run is done there; None: sigma_init * eps^(3/4) of the float type
    weight_decay: float = 0.0  # subtracts weight_decay * mean(theta²) from the fitness that ranks

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range."""
        if self.dims < 1:
            raise UsageError(f"dims must be positive, got {self.dims}")
        if self.population < LEAST_POPULATION:
            raise UsageError(f"population must be at least {LEAST_POPULATION}, got {self.population}")
        if self.kind not in ("cma_es", "sep_cma_es"):
            raise UsageError(f"kind must be cma_es or sep_cma_es, got {self.kind!r}")
        if not 0 < self.sigma_init < float("inf"):
            raise UsageError(f"sigma_init must be positive, got {self.sigma_init}")
        if self.sigma_min is not None and not 0 < self.sigma_min < self.sigma_init:
            raise UsageError(f"sigma_min must be in (0, sigma_init={self.sigma_init}), got {self.sigma_min}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight_decay must be 0 or more, got {self.weight_decay}")


class StrategyState(NamedTuple):
    """All that a run of a strategy remembers; one run, or many along a leading axis under `vmap`."""

    inner: Any  # evosax's state; its archive of the best holds ranks and is not used
    best: Array  # float [n], the candidate with the highest fitness so far
    best_fitness: Array  # float [], its fitness; the lowest number before the first
    generation: Array  # int32 [], generations told
    flat: Array  # int32 [], generations in a row in which all candidates were equal
    done: Array  # bool [], finished: `tell` changes nothing any more

    @property
    def mean(self) -> Array:
        """The mean of the distribution, `[n]`: what to report, for the best of a population is best by luck, too."""
        return self.inner.mean

    @property
    def sigma(self) -> Array:
        """The step size, `[]`."""
        return self.inner.std


class Strategy(NamedTuple):
    """An evolution strategy as pure functions; many runs at once by `vmap`."""

    config: StrategyConfig
    init: Callable  # (key, mean [n]) -> StrategyState
    ask: Callable  # (key, StrategyState) -> (candidates [population, n], StrategyState)
    tell: Callable  # (key, StrategyState, candidates, fitness [population], higher is better) -> StrategyState


def make_strategy(config: StrategyConfig) -> Strategy:
    """A strategy; the same value for equal configurations. Raises `UsageError` where one is out of range."""
    config.validate()
    return _make_strategy(config, jax.config.jax_enable_x64)


@functools.cache
def _make_strategy(config: StrategyConfig, x64: bool) -> Strategy:
    dtype = jnp.float64 if x64 else jnp.float32
    worst = float(jnp.finfo(dtype).max)
    floor = config.sigma_min or config.sigma_init * float(jnp.finfo(dtype).eps) ** 0.75
    # Also inside of a trace, constants must be numbers.
    with jax.ensure_compile_time_eval():
        # Imported here: some of its modules compute as they are imported, which starts JAX.
        import evosax.algorithms
        from evosax.algorithms.distribution_based import cma_es

        kind = {"cma_es": evosax.algorithms.CMA_ES, "sep_cma_es": evosax.algorithms.Sep_CMA_ES}[config.kind]
        es = kind(config.population, jnp.zeros(config.dims, dtype))
        params = es.default_params.replace(std_init=jnp.asarray(config.sigma_init, dtype), std_min=floor)
        # pycma's period: the covariance changes little in so many generations.
        rate = float(params.c_1 + params.c_mu) * config.dims * 10
    period = max(1, int(1 / rate)) if config.kind == "cma_es" else 1
    # Covariances need all digits: on a GPU the products of float32, evosax's too, would have those of 10 bits.
    exact = jax.default_matmul_precision("highest")
    flat_limit = 10 + -(-30 * config.dims // config.population)  # the tutorial's appendix B.3, EqualFunValues

    def init(key: Array, mean: Array) -> StrategyState:
        inner = es.init(key, jnp.asarray(mean, dtype), params)
        # evosax starts with infinities and NaN where nothing is known yet; a run state should be finite.
        inner = inner.replace(best_solution=inner.mean, best_fitness=jnp.asarray(worst, dtype))
        # Python numbers in its state would make the second call compile again.
        inner = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), inner)
        zero = jnp.int32(0)
        return StrategyState(inner, inner.mean, jnp.asarray(-worst, dtype), zero, zero, jnp.bool_(False))

    @exact
    def ask(key: Array, state: StrategyState) -> tuple[Array, StrategyState]:
        if period == 1:
            candidates, inner = es.ask(key, state.inner, params)
            return candidates, state._replace(inner=inner)

        def refresh(inner):
            return inner.replace(**dict(zip("CBD", cma_es.eigen_decomposition(inner.C), strict=True)))

        inner = jax.lax.cond(state.generation % period == 0, refresh, lambda inner: inner, state.inner)
        z = jax.random.normal(key, (config.population, config.dims), dtype)
        candidates = inner.mean + inner.std * ((z * inner.D) @ inner.B.T)
        return candidates, state._replace(inner=inner)

    @exact
    def tell(key: Array, state: StrategyState, candidates: Array, fitness: Array) -> StrategyState:
        fitness = jnp.asarray(fitness, dtype)
        finite = jnp.isfinite(fitness)
        cost = jnp.where(finite, config.weight_decay * jnp.mean(candidates**2, -1) - fitness, jnp.inf)
        ranks = ordinal_ranks(key, cost).astype(dtype)
        inner, _ = es.tell(key, candidates, ranks, state.inner, params)
        sound = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in (inner.mean, inner.std, inner.C, inner.p_c)]))
        keep = state.done | ~finite.any() | ~sound
        inner = jax.tree.map(lambda old, new: jnp.where(keep, old, new), state.inner, inner)
        flat = jnp.where(jnp.max(cost) == jnp.min(cost), state.flat + 1, 0)
        condition = (jnp.max(inner.D) / jnp.min(inner.D)) ** 2
        over = (inner.std <= floor) | (condition > MAX_CONDITION) | (flat >= flat_limit) | ~sound
        score = jnp.where(finite, fitness, -jnp.inf)
        first = jnp.argmax(score)
        better = (score[first] > state.best_fitness) & ~state.done
        return StrategyState(
            inner,
            jnp.where(better, candidates[first], state.best),
            jnp.where(better, score[first], state.best_fitness),
            state.generation + ~state.done,
            jnp.where(state.done, state.flat, flat),
            state.done | over,
        )

    return Strategy(config, init, ask, tell)


def ordinal_ranks(key: Array, cost: Array) -> Array:
    """Ranks 0 (lowest cost) to P - 1, int32 `[P]`, each once: ties are ordered at random.

    >>> ordinal_ranks(jax.random.key(0), jnp.array([2.0, jnp.inf, -1.0])).tolist()
    [1, 2, 0]
    """
    shuffled = jax.random.permutation(key, cost.shape[0])
    order = shuffled[jnp.argsort(cost[shuffled], stable=True)]
    return jnp.zeros(cost.shape, jnp.int32).at[order].set(jnp.arange(cost.shape[0], dtype=jnp.int32))


def larger(strategy: Strategy) -> Strategy:
    """With twice the population, to restart with (IPOP): between compiled calls, for the population is a shape."""
    return make_strategy(dataclasses.replace(strategy.config, population=2 * strategy.config.population))


def restart(strategy: Strategy, key: Array, state: StrategyState, mean: Array) -> StrategyState:
    """Starts anew from `mean` `[n]`, by a state that is the same for any population; the best so far is kept."""
    fresh = strategy.init(key, mean)
    return fresh._replace(best=state.best, best_fitness=state.best_fitness, generation=state.generation)


# ---------------------------------------------------------------------------------------------------------------------
# Fitness: returns of episodes


class Played(NamedTuple):
    """First episodes, one for each key."""

    returns: Array  # float32, undiscounted sums of reward
    lengths: Array  # int32, in steps
    ended: Array  # bool; False where the step limit came first


def play(
    env: Env, act: Callable, params: PyTree, carry: PyTree, keys: Array, max_steps: int, axis_name: str | None = None
) -> Played:
    """Plays the first episode of one environment per key, all in one loop over time, until each has ended.

    Args:
      env: takes what `act` emits.
      act: `(params, keys [B], carry, TimeStep [B]) -> (carry, action [B, A], ...)`.
      params: of `act`. What is evolved has a leading axis of candidates, everything else is shared (a network with a
        kernel for each candidate would be slow); the rows of a candidate are side by side.
      carry: of `act`, for B rows.
      keys: `[...]`, of B in all, such as those of `episode_keys`; row i depends on its own key only; consumed.
      max_steps: steps after which an episode is cut.
      axis_name: axis over which a population is spread; `params`, `carry` and `keys` are then this device's part, and
        the episodes those of all.

    Returns:
      The episodes, in the shape of `keys`.
    """
    contracts.keys(*keys.shape, keys=keys)
    rows = keys.size
    key_reset, key_run = noise.split(keys.reshape(-1), 2)
    env_state, timestep = jax.vmap(env.reset)(key_reset)
    step = jax.vmap(env.step)

    def going(loop: tuple) -> Array:
        t, *_, ended = loop
        return (t < max_steps) & ~ended.all()

    def body(loop: tuple) -> tuple:
        t, env_state, timestep, carry, returns, lengths, ended = loop
        key_act, key_step = noise.split(noise.fold_in(key_run, t), 2)
        carry, action, *_ = act(params, key_act, carry, timestep)
        env_state, timestep = step(key_step, env_state, action)
        returns = returns + jnp.where(ended, 0.0, timestep.reward)
        return t + 1, env_state, timestep, carry, returns, lengths + ~ended, ended | timestep.is_last

    start = (jnp.int32(0), env_state, timestep, carry, jnp.zeros(rows), jnp.zeros(rows, jnp.int32))
    *_, returns, lengths, ended = jax.lax.while_loop(going, body, (*start, jnp.zeros(rows, bool)))
    played = Played(*(x.reshape(keys.shape) for x in (returns, lengths, ended)))
    return played if axis_name is None else jax.lax.all_gather(played, axis_name, tiled=True)


def episode_keys(key: Array, candidates: int, rollouts: int, common: bool = True, first: Array | int = 0) -> Array:
    """Keys of the episodes of each candidate, `[candidates, rollouts]`.

    Args:
      key: of the generation; consumed.
      common: common random numbers: all candidates play the same episodes, so that none is better by an easier one.
      first: index of the first candidate, for a part of a population.
    """
    keys = noise.row_keys(key, rollouts)
    if common:
        return jnp.broadcast_to(keys, (candidates, rollouts))
    return jax.vmap(lambda i: noise.fold_in(keys, i))(first + jnp.arange(candidates))


# ---------------------------------------------------------------------------------------------------------------------
# Evolution of an agent's parameters: what a search remembers


class Restarts(NamedTuple):
    """How often a search was restarted, and from where it starts."""

    count: Array  # int32 []
    start: Array  # float [n]


class Evolving(NamedTuple):
    """Where an `Evolve` stands; its entry in `AgentState.opt_state`."""

    strategy: StrategyState
    kept: Array  # float32 [n], the mean of the distribution that earned most when it was evaluated
    kept_return: Array  # float32 [], what it earned; the lowest number before the first evaluation
    restarts: Restarts | tuple = ()  # () where `Evolve.restarts` is None


def init_evolving(evolve: Evolve, key: Array, params: PyTree) -> Evolving:
    """The search's start: the distribution around the parameters as they are."""
    theta = evolve.get(params)
    restarts = () if evolve.restarts is None else Restarts(jnp.int32(0), theta)
    kept, kept_return = jnp.asarray(theta, jnp.float32), jnp.float32(jnp.finfo(jnp.float32).min)
    return Evolving(evolve.strategy.init(key, theta), kept, kept_return, restarts)


def _with(state: AgentState, evolve: Evolve, **changes: Any) -> AgentState:
    evolving: Evolving = state.opt_state[evolve.name]
    return state._replace(opt_state=state.opt_state | {evolve.name: evolving._replace(**changes)})


def populations(evolve: Evolve) -> list[Evolve]:
    """The search as it is before its first restart, after it, and so on: each time with twice the population."""
    searches = [evolve]
    for _ in range(evolve.restarts or 0):
        strategy = larger(searches[-1].strategy)
        searches.append(evolve._replace(strategy=strategy, population=strategy.config.population))
    return searches


def is_over(evolve: Evolve, state: AgentState) -> Array:
    """Whether a search whose `restarts` are not None is done and will not be restarted, bool."""
    evolving: Evolving = state.opt_state[evolve.name]
    return evolving.strategy.done & (evolving.restarts.count >= evolve.restarts)


def restart_if_done(evolve: Evolve, key: Array, state: AgentState) -> AgentState:
    """The state after a generation: where the search is done it begins anew, unless it did so often enough (IPOP)."""
    evolving: Evolving = state.opt_state[evolve.name]
    again = evolving.strategy.done & ~is_over(evolve, state)
    fresh = restart(evolve.strategy, key, evolving.strategy, evolving.restarts.start)
    strategy = jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, evolving.strategy)
    restarts = evolving.restarts._replace(count=evolving.restarts.count + again)
    return _with(state, evolve, strategy=strategy, restarts=restarts)


def ask(evolve: Evolve, key: Array, state: AgentState) -> tuple[Array, AgentState]:
    """The candidates of a generation, `[population, n]`, and the state that `tell` takes."""
    candidates, strategy = evolve.strategy.ask(key, state.opt_state[evolve.name].strategy)
    return candidates, _with(state, evolve, strategy=strategy)


def tell(
    evolve: Evolve, key: Array, state: AgentState, candidates: Array, returns: Array, lengths: Array
) -> tuple[AgentState, Metrics]:
    """The state after a generation, from the returns and lengths of its episodes, `[population, rollouts]`.

    Of the metrics, those of fitness are over the candidates whose fitness is finite, `failed` is the share of the
    others, and `length` is in agent steps.
    """
    fitness = jnp.mean(returns, 1)
    strategy = evolve.strategy.tell(key, state.opt_state[evolve.name].strategy, candidates, fitness)
    state, finite = _with(state, evolve, strategy=strategy), jnp.isfinite(fitness)
    metrics = {
        "fitness_mean": jnp.mean(fitness, where=finite),
        "fitness_best": jnp.max(fitness, initial=-jnp.inf, where=finite),
        "fitness_std": jnp.std(fitness, where=finite),
        "failed": jnp.mean(~finite),
        "length": jnp.mean(lengths.astype(jnp.float32)),
    }
    metrics = {name: jnp.float32(value) for name, value in metrics.items()}
    return state._replace(step=state.step + 1), metrics | _standing(evolve, state)


def _standing(evolve: Evolve, state: AgentState) -> Metrics:
    """The metrics of a search that need no episodes."""
    strategy, *_, restarts = state.opt_state[evolve.name]
    metrics = {
        "sigma": strategy.sigma,
        "theta_rms": jnp.sqrt(jnp.mean(strategy.mean**2)),
        "generation": strategy.generation,
        "done": strategy.done,
    }
    if restarts:
        metrics["restarts"] = restarts.count
    return {name: jnp.float32(value) for name, value in metrics.items()}


def rest(evolve: Evolve, state: AgentState) -> tuple[AgentState, Metrics]:
    """A generation of a search that is over: nothing is played, and what `tell` says of episodes is NaN."""
    played = ("fitness_mean", "fitness_best", "fitness_std", "failed", "length")
    return state, dict.fromkeys(played, jnp.float32(jnp.nan)) | _standing(evolve, state)


def distribution_mean(evolve: Evolve, state: AgentState) -> Array:
    """What the search would answer now, float32 `[n]`."""
    return state.opt_state[evolve.name].strategy.mean.astype(jnp.float32)


def keep_mean(evolve: Evolve, state: AgentState, returns: Array) -> tuple[AgentState, Metrics]:
    """The state after an evaluation of the distribution's mean: the agent acts by the best mean so far.

    The best of a population is best by luck, too, so it is neither kept nor reported. `mean_return` is the evaluation,
    `kept_return` the best of them.
    """
    evolving: Evolving = state.opt_state[evolve.name]
    mean, score = distribution_mean(evolve, state), jnp.mean(returns)
    better = score > evolving.kept_return  # never where it is not a number
    kept = jnp.where(better, mean, evolving.kept)
    kept_return = jnp.where(better, score, evolving.kept_return)
    state = _with(state, evolve, kept=kept, kept_return=kept_return)
    state = state._replace(params=evolve.set(state.params, kept))
    return state, {"mean_return": jnp.float32(score), "kept_return": kept_return}


# ---------------------------------------------------------------------------------------------------------------------
# Evolution of an agent's parameters: how a search goes on


class Flow(NamedTuple):
    """How a search repeats and branches: within one compiled program (`iteration`), or in Python from one to the next
    while environments step on the host (`loops.host.evolution`)."""

    scan: Callable = jax.lax.scan
    cond: Callable = jax.lax.cond
    switch: Callable = jax.lax.switch
    compiled: Callable = lambda function: function  # of the functions of `(evolve, ...)` above


ONE_PROGRAM = Flow()


def generate(
    evolve: Evolve, returns_of: Callable, state: AgentState, key: Array, flow: Flow = ONE_PROGRAM
) -> tuple[AgentState, Metrics]:
    """One generation: ask, play all candidates' episodes, tell.

    Args:
      evolve: what is searched for, and where.
      returns_of: `(params, theta, key, key_starts) -> (returns, lengths)` of episodes: of candidates `[P, n]` some
        `[P, rollouts]`, of one mean `[n]` some `[1, mean_rollouts]`; the second key is for where dreams start.
      state: of the agent.
      key: consumed.
      flow: where it is not to be compiled by the caller as one program.

    Returns:
      The state, and the metrics of `tell`, or of `rest` once the search is over.
    """

    def tried(key: Array, search: Evolve, state: AgentState) -> tuple[AgentState, Metrics]:
        key_ask, key_tell, key_play, key_starts = jax.random.split(key, 4)
        candidates, state = flow.compiled(ask)(search, key_ask, state)
        played = returns_of(state.variables, candidates, key_play, key_starts)
        return flow.compiled(tell)(search, key_tell, state, candidates, *played)

    if evolve.restarts is None:
        return tried(key, evolve, state)
    key_restart, key = jax.random.split(key)

    def go_on(state: AgentState) -> tuple[AgentState, Metrics]:
        sizes = [functools.partial(tried, key, search) for search in populations(evolve)]
        state, metrics = flow.switch(state.opt_state[evolve.name].restarts.count, sizes, state)
        return flow.compiled(restart_if_done)(evolve, key_restart, state), metrics

    return flow.cond(is_over(evolve, state), functools.partial(rest, evolve), go_on, state)


def iterate(
    evolve: Evolve, returns_of: Callable, state: AgentState, key: Array, flow: Flow = ONE_PROGRAM
) -> tuple[AgentState, Metrics]:
    """Some generations, then an evaluation of the distribution's mean (`keep_mean`).

    Arguments are those of `generate`. Returns the state, which stays finite though a fitness need not be, and the means
    of the generations' metrics with those of `keep_mean`; NaN where nothing was played.
    """
    key_search, key_mean, key_starts = jax.random.split(key, 3)
    before, keys = state, jax.random.split(key_search, evolve.generations)
    state, metrics = flow.scan(lambda state, key: generate(evolve, returns_of, state, key, flow), state, keys)
    mean = jnp.mean if evolve.restarts is None else jnp.nanmean  # of those that were played
    metrics = {name: mean(x) for name, x in metrics.items()}
    metrics["generation"] = jnp.float32(state.opt_state[evolve.name].strategy.generation)

    def evaluate(state: AgentState) -> tuple[AgentState, Metrics]:
        returns, _ = returns_of(state.variables, distribution_mean(evolve, state), key_mean, key_starts)
        return flow.compiled(keep_mean)(evolve, state, returns)

    def keep(state: AgentState) -> tuple[AgentState, Metrics]:  # for the mean is as it was at its last evaluation
        return state, {"mean_return": jnp.float32(jnp.nan), "kept_return": state.opt_state[evolve.name].kept_return}

    if evolve.restarts is None:
        state, more = evaluate(state)
    else:
        state, more = flow.cond(is_over(evolve, before), keep, evaluate, state)
    return state, metrics | more


def player(
    agent: Agent, env: Env, evolve: Evolve, batch: Trajectory | None, axis_name: str | None = None
) -> Callable[[PyTree, Array, Array, Array], tuple[Array, Array]]:
    """`returns_of` of a search in one compiled program, its environments or dreams included.

    Args:
      agent: acts in `env`, and brings the model whose dreams are played in.
      env: takes what the agent emits; a search in dreams uses its `spec` only.
      evolve: what is searched for, and where.
      batch: supplies the starts of dreams; None for a search in the environment.
      axis_name: axis that the population is spread over; key and state are the same on all devices, the batch is each
        device's own.
    """

    def share(count: int) -> tuple[Array | int, int]:
        """First index and number of this device's part."""
        if axis_name is None:
            return 0, count
        devices = jax.lax.axis_size(axis_name)
        if count % devices:
            raise UsageError(f"population, mean_rollouts: {count} cannot be spread evenly over {devices} devices")
        return jax.lax.axis_index(axis_name) * (count // devices), count // devices

    def played(params: PyTree, theta: Array, key: Array, key_starts: Array) -> tuple[Array, Array]:
        first, count = share(evolve.mean_rollouts if theta.ndim == 1 else len(theta))
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count)
        if theta.ndim == 1:
            keys = part(noise.row_keys(key, evolve.mean_rollouts))[None]
        else:
            theta = part(theta).astype(jnp.float32)
            keys = episode_keys(key, count, evolve.rollouts, evolve.common, first)
        candidates = evolve.set(params, theta)
        if evolve.where == "env":
            world, carry = env, agent.act_carry(candidates, keys.size)
            act = lambda params, key, carry, step: agent.act(params, key, carry, step, explore=True)
        else:
            starts = evolve.starts(params, key_starts, batch)
            if axis_name is not None:  # records are each device's own, but a candidate is to be tried the same on any
                starts = jax.lax.all_gather(starts, axis_name, tiled=True)
            world = dreaming.dream_env(
                agent.model, params, starts, env.spec, horizon=evolve.max_steps, obs="state", actions="agent"
            )
            act = lambda params, key, carry, step: agent.policy(params, key, carry, step.obs["state"], explore=True)
            carry = agent.policy_carry(candidates, keys.size)
        found = play(world, act, candidates, carry, keys, evolve.max_steps, axis_name)
        return found.returns, found.lengths

    return played


def iteration(
    agent: Agent, env: Env, evolve: Evolve, state: AgentState, key: Array, batch: Trajectory | None,
    axis_name: str | None = None
) -> tuple[AgentState, Metrics]:  # fmt: skip
    """`iterate` by a `player`, whose arguments these are: to be compiled by the caller, nothing leaves the device."""
    return iterate(evolve, player(agent, env, evolve, batch, axis_name), state, key)
