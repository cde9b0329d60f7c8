"""Planning: actions are looked for in any world model, without an actor; and each planner as a policy.

A planner looks for the actions a₀ … a_{H-1} whose imagined future pays most,

    R = Σₜ wₜ rₜ,   wₜ = Π_{1 ≤ j < t} cⱼ,   t = 1 … H,

with the rewards r and the probabilities of going on c that the model predicts. There is no discount, and nothing is
added for what comes after the horizon, unless a value is handed in. Only the first action is taken; the next step
plans anew, from the same plan one step on.

Candidates are a batch axis, environments another, both by `vmap`; time is `dreaming.imagine`. In shapes, `N` is the
candidates. Actions are as agents emit them: in [-1, 1] for a `Box`, one-hots for choices.

Sources: PlaNet's CEM (Hafner et al. 2019, algorithm 2; Chua et al. 2018), iCEM (Pinneri et al. 2020, algorithm 1),
MPPI (Williams et al. 2017; its elites and deviations as TD-MPC, Hansen et al. 2022), gradient shooting (Henaff et al.
2017). Departures: distributions of choices are categorical ones, fitted to the shares of the elites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wmjax import checks, dreaming, fields
from wmjax.nets.spaces import action_size, choice_counts
from wmjax.ops import noise, returns
from wmjax.types import Agent, Array, EnvSpec, PyTree, UsageError, WorldModel

LONGEST = 4096  # horizon: noise over time is a matrix of its square
RULES = checks.rules(checks.POSITIVE, "candidates elites iterations particles chunk init_std temperature") | {
    "keep": checks.FRACTION,
    "smoothing": checks.FRACTION,
    "momentum": checks.BELOW_ONE,
    "min_std": checks.NOT_NEGATIVE,
    "noise_beta": checks.NOT_NEGATIVE,
    "spread": checks.NOT_NEGATIVE,
    "decay": (lambda x: x >= 1, "1 or more"),
    "horizon": (lambda x: 1 <= x <= LONGEST, f"in [1, {LONGEST}]"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class CEMConfig:
    """The cross-entropy method; the defaults are PlaNet's, except that a step begins with the plan before."""

    HORIZON: ClassVar[int] = 12
    horizon: int | None = None  # imagined steps; None: 12, or as many as the model's context holds
    candidates: int = 1000  # sequences of actions that are tried in an iteration
    elites: int = 100  # the best of them, to which the distribution is fitted
    iterations: int = 10  # rounds of drawing and fitting
    init_std: float = 1.0  # of the first distribution, whose mean is the plan
    min_std: float = 0.0  # that fitted deviations do not fall below
    smoothing: float = 0.05  # choices: share of the uniform distribution in what is fitted
    momentum: float = 0.0  # share that the distribution before keeps
    warm_start: bool = True  # begin with the plan of the step before, one step on; PlaNet began anew
    particles: int = 1  # futures of each candidate, whose mean counts
    chunk: int | None = None  # candidates that are imagined at once, to bound memory; None: all

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        checks.check_ranges(self, RULES)
        _check_elites(self)


@dataclasses.dataclass(frozen=True)
class ICEMConfig:
    """iCEM: noise that is correlated in time, elites that are kept, fewer candidates in each iteration."""

    HORIZON: ClassVar[int] = 30
    horizon: int | None = None  # imagined steps; None: 30, or as many as the model's context holds
    candidates: int = 100  # sequences of actions that are tried in the first iteration
    elites: int = 10  # the best, to which the distribution is fitted
    iterations: int = 3  # rounds of drawing and fitting
    noise_beta: float = 2.0  # power of the noise's spectrum, f^-beta: 0 is white, 1 pink, 2 red; from 0.25 to 4 there
    keep: float = 0.3  # share of the elites that are candidates again, also one step on in the next step
    decay: float = 1.25  # each iteration has this times fewer candidates, but twice the elites at least
    init_std: float = 0.5  # of the first distribution, whose mean is the plan
    min_std: float = 0.0  # that fitted deviations do not fall below
    smoothing: float = 0.05  # choices: share of the uniform distribution in what is fitted
    momentum: float = 0.1  # share that the distribution before keeps
    warm_start: bool = True  # begin with the plan of the step before, one step on
    particles: int = 1  # futures of each candidate, whose mean counts
    chunk: int | None = None  # candidates that are imagined at once, to bound memory; None: all

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        checks.check_ranges(self, RULES)
        _check_elites(self)


@dataclasses.dataclass(frozen=True)
class MPPIConfig:
    """Model predictive path integral: all candidates count, by the exponential of what they return.

    The defaults are Williams et al.'s rule. TD-MPC's: horizon 5, candidates 512, elites 64, iterations 6, temperature
    2, fit_std, init_std 2, min_std 0.05, momentum 0.1 (which there is of the mean alone).
    """

    HORIZON: ClassVar[int] = 12
    horizon: int | None = None  # imagined steps; None: 12, or as many as the model's context holds
    candidates: int = 500  # sequences of actions that are tried in an iteration
    elites: int | None = None  # None: all candidates count
    iterations: int = 3  # rounds of drawing and fitting
    temperature: float = 1.0  # λ of exp(R / λ), in units of the return
    fit_std: bool = False  # whether the deviations follow the candidates, too (TD-MPC)
    init_std: float = 0.5  # of the first distribution, whose mean is the plan
    min_std: float = 0.05  # that fitted deviations do not fall below
    smoothing: float = 0.05  # choices: share of the uniform distribution in what is fitted
    momentum: float = 0.0  # share that the distribution before keeps
    warm_start: bool = True  # begin with the plan of the step before, one step on
    particles: int = 1  # futures of each candidate, whose mean counts
    chunk: int | None = None  # candidates that are imagined at once, to bound memory; None: all

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        checks.check_ranges(self, RULES)
        _check_elites(self)


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """Gradient shooting: the imagined return is followed uphill, from several starts; the best of them is taken.

    The gradient is exact where latents are drawn by reparameterization (DreamerV1, DreamerV2 with Gaussian latents),
    and straight-through, so biased, where they are categorical (DreamerV2, DreamerV3). World Models' passes through the
    mean and deviation of the component that was drawn, not through which it was. Choices are one-hots of the largest
    logit, with the gradient of the softmax. IRIS is refused: actions change what is seen through tokens alone, which
    are drawn and have no gradient.
    """

    HORIZON: ClassVar[int] = 12
    horizon: int | None = None  # imagined steps; None: 12, or as many as the model's context holds
    candidates: int = 16  # starts: the plan, and others around it
    iterations: int = 20  # steps of Adam
    learning_rate: float = 0.1  # of Adam, on actions in [-1, 1], or on logits
    spread: float = 1.0  # standard deviation of the starts around the plan
    warm_start: bool = True  # begin with the plan of the step before, one step on
    particles: int = 1  # futures of each candidate, whose mean counts
    chunk: int | None = None  # candidates that are imagined at once, to bound memory; None: all

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range."""
        checks.check_ranges(self, RULES)


PlannerConfig = CEMConfig | ICEMConfig | MPPIConfig | GradientConfig


def _check_elites(config: Any) -> None:
    if config.elites is not None and config.elites > config.candidates:
        raise UsageError(f"elites must be at most candidates={config.candidates}, got {config.elites}")


# ---------------------------------------------------------------------------------------------------------------------
# What a sequence of actions is worth


def imagined_return(
    model: WorldModel, params: PyTree, key: Array, state: PyTree, actions: Array, value: Callable | None = None
) -> Array:
    """R of sequences of actions, as above, float32 `[B]`.

    Args:
      key: one key, or keys `[B]`; consumed.
      state: `[B, ...]`, where the first action is taken.
      actions: float32 `[H, B, A]`.
      value: `(params, State) -> [B]`, added at the last state with the weight that a reward after it would have.
    """
    policy, carry = dreaming.given_actions(actions)
    predict = lambda state: model.predict(params, state)
    last, (reward, cont), _ = dreaming.imagine(
        model, params, key, state, policy, actions.shape[0], policy_carry=carry, emit=predict
    )
    weight = returns.discount_weights_before(cont[1:])
    total = (weight * reward[1:]).sum(0)
    return total if value is None else total + weight[-1] * cont[-1] * value(params, last)


def objective(
    model: WorldModel, params: PyTree, state: PyTree, config: PlannerConfig, mesh: Mesh | None, value: Callable | None
) -> Callable:
    """`(key, actions [N, H, A]) -> [N]`: what candidates are worth from one state `[...]`; what is NaN is worth least.

    Candidate i draws by `fold_in(key, i)`, so that neither chunks nor devices matter.
    """

    def of_one(key, actions):
        rows = config.particles
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), state)
        actions = jnp.broadcast_to(actions[:, None], (actions.shape[0], rows, actions.shape[1]))
        found = imagined_return(model, params, noise.row_keys(key, rows), states, actions, value).mean()
        return jnp.where(jnp.isnan(found), -checks.LARGEST, found)

    def of_all(key, actions):
        candidates = noise.row_keys(key, actions.shape[0]), actions
        if mesh is not None:
            rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            candidates = jax.lax.with_sharding_constraint(candidates, rows)
        if config.chunk is None or config.chunk >= actions.shape[0]:
            return jax.vmap(of_one)(*candidates)
        return jax.lax.map(lambda candidate: of_one(*candidate), candidates, batch_size=config.chunk)

    return of_all


# ---------------------------------------------------------------------------------------------------------------------
# Distributions of sequences of actions


class Draw(NamedTuple):
    """How sequences of actions are drawn, and a distribution fitted to the best; it is a tree of `[H, A]`."""

    start: PyTree  # the distribution that knows nothing
    sample: Callable  # (key, distribution, N) -> actions [N, H, A]
    fit: Callable  # (distribution, actions [N, H, A], weight [N] that sums to 1) -> distribution
    mode: Callable  # distribution -> actions [H, A]
    shift: Callable  # distribution -> that of one step later, as wide as at the start


class Gaussian(NamedTuple):
    """Independent normal distributions, clipped to [-1, 1]."""

    mean: Array  # float32 [H, A]
    std: Array  # float32 [H, A]


def colored(horizon: int, beta: float) -> np.ndarray:
    """A matrix `[H, H]` by which white noise over time gets a spectrum of f^-beta, and keeps the deviation 1.

    Noise of beta 0 stays as it is. The lowest frequency is 1 / H, as in iCEM.
    """
    frequency = np.abs(np.fft.fftfreq(horizon))
    frequency[0] = 1 / horizon
    kernel = np.fft.ifft(frequency ** (-beta / 2)).real
    kernel /= np.sqrt(np.sum(kernel**2))
    steps = np.arange(horizon)
    return kernel[(steps[:, None] - steps) % horizon].astype(np.float32)


def draw(spec: EnvSpec, horizon: int, config: Any) -> Draw:
    """The distributions for an action space, by the fields of a planner's configuration."""
    size, counts = action_size(spec), choice_counts(spec)
    color = colored(horizon, getattr(config, "noise_beta", 0.0))
    keep = lambda old, new: jax.tree.map(lambda a, b: config.momentum * a + (1 - config.momentum) * b, old, new)

    def normal(key, count):
        return jnp.einsum("ts,nsa->nta", color, jax.random.normal(key, (count, horizon, size)))

    if counts is None:
        start = Gaussian(jnp.zeros((horizon, size)), jnp.full((horizon, size), config.init_std))

        def sample(key, dist, count):
            return jnp.clip(dist.mean + dist.std * normal(key, count), -1, 1)

        def fit(dist, actions, weight):
            mean = jnp.einsum("n,nta->ta", weight, actions)
            std = jnp.sqrt(jnp.einsum("n,nta->ta", weight, (actions - mean) ** 2))
            fitted = keep(dist, Gaussian(mean, std))
            std = jnp.maximum(fitted.std, config.min_std) if getattr(config, "fit_std", True) else dist.std
            return Gaussian(fitted.mean, std)

        mode = lambda dist: jnp.clip(dist.mean, -1, 1)
        return Draw(start, sample, fit, mode, lambda dist: Gaussian(_later(dist.mean, start.mean), start.std))

    uniform = jnp.tile(jnp.concatenate([jnp.full(n, 1 / n) for n in counts]), (horizon, 1))  # [H, A], probabilities

    def sample_choices(key, probs, count):
        # Gumbel noise out of normal noise, so that choices can be correlated in time, too.
        chance = jnp.clip(jax.scipy.stats.norm.cdf(normal(key, count)), 1e-6, 1 - 1e-6)
        return one_hots(jnp.log(probs) - jnp.log(-jnp.log(chance)), counts)

    def fit_choices(probs, actions, weight):
        share = jnp.einsum("n,nta->ta", weight, actions)
        return keep(probs, (1 - config.smoothing) * share + config.smoothing * uniform)

    # Half of what was known: a choice that was ruled out may be right after one more step.
    shift = lambda probs: (_later(probs, uniform) + uniform) / 2
    return Draw(uniform, sample_choices, fit_choices, lambda probs: one_hots(probs, counts), shift)


def one_hots(scores: Array, counts: tuple[int, ...]) -> Array:
    """The largest of each choice's scores, `[..., A]`, as one-hots side by side."""
    parts = jnp.split(scores, np.cumsum(counts)[:-1].tolist(), -1)
    hots = [jax.nn.one_hot(jnp.argmax(part, -1), n) for part, n in zip(parts, counts, strict=True)]
    return jnp.concatenate(hots, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Planners


class Planner(NamedTuple):
    """How one environment's next action is found; a plan is what is known of it before, a tree of arrays."""

    start: PyTree  # the plan at the start of an episode
    step: Callable  # (key, objective, plan) -> (action [A], the plan one step on)


def _later(plan: Array, start: Array) -> Array:
    """`[H, ...]` one step on: what is new at its end is as at the start of an episode."""
    return jnp.concatenate([plan[1:], start[-1:]])


def _warm(config: PlannerConfig, start: PyTree, later: PyTree) -> PyTree:
    return later if config.warm_start else start


def cem(config: CEMConfig, spec: EnvSpec, horizon: int) -> Planner:
    """Draw candidates, fit the distribution to the best of them, again and again; take the first action of its mean."""
    drawing, weight = draw(spec, horizon, config), jnp.full(config.elites, 1 / config.elites)

    def step(key, worth, plan):
        def iterate(dist, key):
            key_draw, key_worth = jax.random.split(key)
            actions = drawing.sample(key_draw, dist, config.candidates)
            best = jax.lax.top_k(worth(key_worth, actions), config.elites)[1]
            return drawing.fit(dist, actions[best], weight), ()

        dist, _ = jax.lax.scan(iterate, plan, jax.random.split(key, config.iterations))
        return drawing.mode(dist)[0], _warm(config, drawing.start, drawing.shift(dist))

    return Planner(drawing.start, step)


class ICEMPlan(NamedTuple):
    """The distribution, and the best of its candidates."""

    dist: PyTree
    kept: Array  # float32 [keep * elites, H, A]


def icem(config: ICEMConfig, spec: EnvSpec, horizon: int) -> Planner:
    """As `cem`, with candidates kept, their mean among the last of them, and the first action of the best taken."""
    drawing, weight = draw(spec, horizon, config), jnp.full(config.elites, 1 / config.elites)
    keep = round(config.keep * config.elites)
    start = ICEMPlan(drawing.start, jnp.tile(drawing.mode(drawing.start), (keep, 1, 1)))
    last = config.iterations - 1
    counts = [max(int(config.candidates / config.decay**i), 2 * config.elites) for i in range(config.iterations)]

    def step(key, worth, plan):
        key, key_end = jax.random.split(key)
        dist, kept = plan
        # Not a scan: each iteration has fewer candidates.
        for i, count in enumerate(counts):
            key_draw, key_worth = jax.random.split(jax.random.fold_in(key, i))
            mean = [drawing.mode(dist)[None]] if i == last else []
            actions = jnp.concatenate([drawing.sample(key_draw, dist, count), kept, *mean])
            elites = actions[jax.lax.top_k(worth(key_worth, actions), config.elites)[1]]
            dist, kept = drawing.fit(dist, elites, weight), elites[:keep]
        dist = drawing.shift(dist)
        ends = drawing.sample(key_end, dist, keep)[:, -1:]
        later = ICEMPlan(dist, jnp.concatenate([kept[:, 1:], ends], 1))
        return elites[0, 0], _warm(config, start, later)

    return Planner(start, step)


def mppi(config: MPPIConfig, spec: EnvSpec, horizon: int) -> Planner:
    """The mean of candidates, weighed by exp(R / λ); its first action is taken."""
    drawing = draw(spec, horizon, config)

    def step(key, worth, plan):
        def iterate(dist, key):
            key_draw, key_worth = jax.random.split(key)
            actions = drawing.sample(key_draw, dist, config.candidates)
            found = worth(key_worth, actions)
            if config.elites is not None:
                found, best = jax.lax.top_k(found, config.elites)
                actions = actions[best]
            return drawing.fit(dist, actions, jax.nn.softmax(found / config.temperature)), ()

        dist, _ = jax.lax.scan(iterate, plan, jax.random.split(key, config.iterations))
        return drawing.mode(dist)[0], _warm(config, drawing.start, drawing.shift(dist))

    return Planner(drawing.start, step)


def gradient(config: GradientConfig, spec: EnvSpec, horizon: int) -> Planner:
    """Adam on several sequences at once; the first action of the one that is worth most in the end is taken."""
    size, counts, adam = action_size(spec), choice_counts(spec), optax.adam(config.learning_rate)
    start = jnp.zeros((horizon, size))

    def chosen(x):  # actions [N, H, A], of numbers that are followed uphill
        if counts is None:
            return x
        probs = jnp.concatenate([jax.nn.softmax(part) for part in jnp.split(x, np.cumsum(counts)[:-1], -1)], -1)
        # The bracket is exactly 0, so that the value stays exactly one-hot.
        return one_hots(x, counts) + (probs - jax.lax.stop_gradient(probs))

    bounded = (lambda x: jnp.clip(x, -1, 1)) if counts is None else (lambda x: x)

    def step(key, worth, plan):
        key, key_start, key_end = jax.random.split(key, 3)
        spread = config.spread * jax.random.normal(key_start, (config.candidates, horizon, size))
        x = bounded(plan + spread.at[0].set(0.0))

        def climb(carry, key):
            x, moments = carry
            uphill = jax.grad(lambda x: worth(key, chosen(x)).sum())(x)
            change, moments = adam.update(-jnp.nan_to_num(uphill), moments)
            return (bounded(x + change), moments), ()

        (x, _), _ = jax.lax.scan(climb, (x, adam.init(x)), jax.random.split(key, config.iterations))
        best = x[jnp.argmax(worth(key_end, chosen(x)))]
        return chosen(best[None])[0, 0], _warm(config, start, _later(best, start))

    return Planner(start, step)


PLANNERS: dict[str, tuple[type, Callable]] = {
    "cem": (CEMConfig, cem),
    "icem": (ICEMConfig, icem),
    "mppi": (MPPIConfig, mppi),
    "gradient": (GradientConfig, gradient),
}

# ---------------------------------------------------------------------------------------------------------------------
# A planner as a policy


def named(policy: str | PlannerConfig) -> tuple[str, PlannerConfig]:
    """A planner's name and configuration, of one of them. Raises `UsageError` for anything else."""
    for name, (config_class, _) in PLANNERS.items():
        if policy == name or type(policy) is config_class:
            return name, config_class() if policy == name else policy
    raise checks.invalid("policy", policy, f"one of {', '.join(PLANNERS)}, or a configuration of wmjax.planning,")


def settle(config: PlannerConfig, model: WorldModel) -> PlannerConfig:
    """The configuration with its horizon, for a model.

    Raises:
      UsageError: a field is not valid, the horizon is beyond the model's context, the model predicts no rewards, or it
        has no gradient for a planner that follows one.
    """
    config = fields.replace(config, dataclasses.asdict(config))  # of the types that they say
    config.validate()
    if model.no_rewards is not None:
        raise UsageError(model.no_rewards)
    reach = LONGEST if model.context is None else model.context
    if isinstance(config, GradientConfig) and model.no_gradient is not None:
        raise UsageError(f"policy: 'gradient' is not valid here: {model.no_gradient}; cem, icem or mppi is")
    if config.horizon is None:
        return dataclasses.replace(config, horizon=min(config.HORIZON, reach))
    if config.horizon > reach:
        raise UsageError(
            f"horizon: {config.horizon} is not valid; an integer in [1, {reach}] is, for the model's context holds "
            f"{reach} steps"
        )
    return config


class PlanCarry(NamedTuple):
    """What acting remembers; leaves are `[B, ...]`."""

    state: PyTree  # of the model, filtered
    action: Array  # float32 [B, A], the one before
    plan: PyTree


def with_planner(
    agent: Agent,
    spec: EnvSpec,
    policy: str | PlannerConfig,
    *,
    mesh: Mesh | None = None,
    value: Callable | None = None,
) -> Agent:
    """The agent with a planner in the place of its policy: it filters with its model, and plans from there.

    It acts alike whether it explores or not, and stores no latents, so it is there to be evaluated, not trained.

    Args:
      agent: brings the model and, for evaluation, the recipe.
      spec: of its environment.
      policy: `cem`, `icem`, `mppi` or `gradient`, or the configuration of one.
      mesh: devices to spread candidates over; None: they stay where the parameters are. What is found is the same,
        within rounding.
      value: see `imagined_return`.

    Raises:
      UsageError: see `settle`, `named`.
    """
    name, config = named(policy)
    config, model = settle(config, agent.model), agent.model
    planner = PLANNERS[name][1](config, spec, config.horizon)

    def policy_carry(params, batch_size):
        del params
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size, *x.shape)), planner.start)

    def choose(params, key, plan, state, *, explore):
        del explore
        keys = key if key.ndim else noise.row_keys(key, jax.tree.leaves(plan)[0].shape[0])

        def one(key, plan, state):
            return planner.step(key, objective(model, params, state, config, mesh, value), plan)

        action, plan = jax.vmap(one)(keys, plan, state)
        return plan, action

    def act_carry(params, batch_size):
        zeros = jnp.zeros((batch_size, action_size(spec)))
        return PlanCarry(model.init_state(params, batch_size), zeros, policy_carry(params, batch_size))

    def act(params, key, carry, timestep, *, explore):
        key_observe, key_plan = noise.split(key, 2)
        embed, first = model.encode(params, timestep.obs), timestep.is_first
        state = model.observe(params, key_observe, carry.state, carry.action, embed, first)
        fresh = lambda x, start: jnp.where(first.reshape(-1, *[1] * start.ndim), start, x)
        plan = jax.tree.map(fresh, carry.plan, planner.start)
        plan, action = choose(params, key_plan, plan, state, explore=explore)
        return PlanCarry(state, action, plan), action, ()

    return agent._replace(policy_carry=policy_carry, policy=choose, act_carry=act_carry, act=act, value=None)
