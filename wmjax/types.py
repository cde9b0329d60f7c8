"""The types that everything else is written in: what an environment, a model, an agent and a run are.

Two spellings only: a `NamedTuple` holds arrays or functions, a frozen dataclass holds configuration.
In shapes, `T` is time, `B` the batch, `H` the horizon, `A` the size of an action. Time leads: `[T, B, ...]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

Array = jax.Array
PyTree = Any
Metrics = dict[str, Array]  # name -> float32 scalar


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message names the field, its value and what is valid."""


class UntrustedError(UsageError):
    """What a file names would run code that the user has not agreed to; the message says how to agree."""


class RunError(RuntimeError):
    """A run cannot go on, or cannot be read, through no fault of the call; the message says why and what is left."""


# ---------------------------------------------------------------------------------------------------------------------
# Spaces


@dataclasses.dataclass(frozen=True)
class Discrete:
    """One of `n` choices, an int32 in [0, n). Raises `UsageError` unless `n` is an integer of at least 1."""

    n: int
    shape, dtype = (), "int32"  # of a value

    def __post_init__(self) -> None:
        _check_whole("Discrete: n", self.n)


@dataclasses.dataclass(frozen=True)
class MultiDiscrete:
    """Several independent choices, int32 `[len(ns)]`, entry i in [0, ns[i]).

    Raises `UsageError` unless `ns` are integers of at least 1.
    """

    ns: tuple[int, ...]
    dtype = "int32"  # of a value

    def __post_init__(self) -> None:
        _check_wholes("MultiDiscrete: ns", self.ns)

    @property
    def shape(self) -> tuple[int]:
        """One entry for each choice."""
        return (len(self.ns),)


@dataclasses.dataclass(frozen=True)
class Box:
    """An array of `shape` and `dtype`, entries in [low, high]; a bound is one number, or one per entry of a vector.

    Raises `UsageError` for a shape that holds nothing, a dtype that is not one of NumPy's of numbers or truth values,
    and bounds that are not so many numbers or of which `low` is above `high`.
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or self.shape:
            _check_wholes("Box: shape", self.shape)
        try:
            if self.dtype is None or np.dtype(self.dtype).kind not in "fiub":
                raise TypeError
            low, high = self._bound(self.low), self._bound(self.high)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"Box: low {self.low!r:.80}, high {self.high!r:.80}, dtype {self.dtype!r} are not valid for the shape "
                f"{self.shape}; numbers are, one or a tuple of one per entry, and a dtype such as 'float32'"
            ) from None
        if not (low <= high).all():  # NaN is refused too
            raise UsageError(f"Box: low {self.low!r:.80} is not valid; a number up to high, {self.high!r:.80}, is")

    def _bound(self, bound: float | tuple[float, ...]) -> np.ndarray:
        array = np.asarray(bound, np.float64)
        if array.shape != ((math.prod(self.shape),) if isinstance(bound, tuple) else ()):
            raise ValueError
        return array


Space = Discrete | MultiDiscrete | Box


def _check_whole(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value < 2**31:
        raise UsageError(f"{field} is {value!r:.80}, which is not valid; an integer of at least 1 is")


def _check_wholes(field: str, values: Any) -> None:
    if not isinstance(values, tuple) or not values:
        raise UsageError(f"{field} is {values!r:.80}, which is not valid; a tuple of integers is")
    for value in values:
        _check_whole(field, value)


# ---------------------------------------------------------------------------------------------------------------------
# Environments


class TimeStep(NamedTuple):
    """What arrives from the environment. Reward and flags belong to the observation they arrive with."""

    obs: dict[str, Array]  # images uint8 [..., H, W, C], vectors float32 [..., D], Discrete entries int32 [...]
    reward: Array  # float32 [...], 0 where is_first
    is_first: Array  # bool [...], the first observation of an episode; the action before it means nothing
    is_last: Array  # bool [...], the episode ends here, by its own end or by a time limit
    is_terminal: Array  # bool [...], the episode ends here by its own end: nothing follows, so its value is 0


class EnvSpec(NamedTuple):
    """What an agent may know of an environment."""

    obs: dict[str, Space]
    action: Space
    max_episode_steps: int | None = None  # in agent steps; None where episodes have no limit
    action_map: Callable[[Array], Array] | None = None  # from an agent's [-1, 1] to the space; None: linear
    action_repeat: int = 1  # frames per agent step
    survival: bool | None = None  # whether each step pays 1, so that a return is a length; None: nobody has said


class Env(NamedTuple):
    """One environment as two pure functions; batches come from `vmap`.

    Actions are the space's own: an int32 for `Discrete`, int32 `[k]` for `MultiDiscrete`, float32 within the bounds for
    `Box`. An episode restarts by itself: the step after `is_last` ignores its action and gives an `is_first` record.
    """

    spec: EnvSpec
    reset: Callable[[Array], tuple[PyTree, TimeStep]]  # (key) -> (state, TimeStep)
    step: Callable[[Array, PyTree, Array], tuple[PyTree, TimeStep]]  # (key, state, action) -> (state, TimeStep)


class HostEnvs(Protocol):
    """A batch of environments that run outside of compiled programs: the stream of `Env`, as NumPy arrays.

    Between `send` and `receive` the environments step while the caller does something else.
    """

    restarts: int  # environments that were lost and begun again so far

    def reset(self, seeds: list[list[int]]) -> TimeStep | None:
        """First records `[num_envs, ...]` of new episodes; None where the caller's `stop` said so first.

        Equal seeds begin equal episodes. Raises `RunError` where too many environments were lost.
        """

    def send(self, action: Any) -> None:
        """Starts a step, by native actions `[num_envs, ...]`."""

    def receive(self) -> TimeStep | None:
        """The records `[num_envs, ...]` that `send` asked for; None where the caller's `stop` said so first.

        Raises `RunError` where too many environments were lost.
        """

    def close(self) -> None:
        """Ends the environments."""


class HostEnv(NamedTuple):
    """Environments that run outside of compiled programs, such as those of Gymnasium: what they are, and how to start.

    Actions are as for `Env`, and so is the stream; an episode that is lost with its environment is cut: the record
    after it `is_first`.
    """

    spec: EnvSpec
    start: Callable  # (num_envs, *, workers, timeout, max_restarts, training, say, stop) -> HostEnvs
    native: Callable[[Array], Array] = lambda action: action  # from a given action to the space's own; jittable
    # Its observations and actions as they are there, before the workers make the stream of them; None: as in `spec`.
    read: Callable[[Any], dict[str, Any]] | None = None  # (its own observation) -> as `spec.obs` says
    write: Callable[[Any], Any] | None = None  # (action of `spec.action`) -> what its `step` takes
    resized: Callable[[int], HostEnv] | None = None  # (side of pictures) -> the same, seen at that size
    notes: tuple[str, ...] = ()  # what is done to its observations, a line each
    rendered: Callable[[], HostEnv] | None = None  # () -> the same, with what it renders among its observations


# ---------------------------------------------------------------------------------------------------------------------
# Experience


class Trajectory(NamedTuple):
    """Consecutive records of several streams, as replay returns them."""

    step: TimeStep  # [T, B, ...]
    action: Array  # float32 [T, B, A], chosen on seeing step t, as the agent chose it (one-hot, or raw for Box)
    mask: Array  # bool [T, B], False where padded
    latent: PyTree  # [T, B, ...], what acting or an update stored per step; () if nothing


class Sampling(NamedTuple):
    """How an update wants its batch."""

    length: int  # steps that are trained on
    context: int = 0  # steps before them, which supply a carry and the previous action and are not trained on
    online: bool = False  # newest complete windows first, each once (DreamerV3's online queue)
    over: str = "steps"  # "steps": all windows are equally likely; "episodes": all episodes, then all windows of one;
    #   "in_order": windows one after the other, from the oldest on to the newest, and then again
    within_episode: bool = False  # trained steps of one episode only, wherever replay holds such windows
    prioritize_ends: bool = False  # within episodes: the last window of each counts 1 + length times
    starts: str = "any"  # "first": windows begin where an episode does, wherever replay holds such windows
    pad: str | None = None  # "right": windows start at any step of an episode, what is beyond its end is masked;
    #   "left": windows end at any step of an episode but its last, what is before its start is masked


# ---------------------------------------------------------------------------------------------------------------------
# Models and agents


class WorldModel(NamedTuple):
    """A learned environment as pure functions. All take any leading batch axes, which every leaf of a State has.

    A `key` is one key, or an array of keys with the batch's shape (one for each row).
    """

    init_state: Callable  # (params, batch_size) -> State
    encode: Callable  # (params, obs) -> embed; all time steps at once, outside any scan
    observe: Callable  # (params, key, State, prev_action, embed, is_first) -> State; filters one step
    imagine: Callable  # (params, key, State, action) -> State; predicts one step
    predict: Callable  # (params, State) -> (reward, cont); means, the reward in the environment's units where the
    #   model learns those (IRIS: of its sign); cont is P(not terminal), without discount
    decode: Callable  # (params, State) -> obs; means; images float32 in [0, 255]
    context: int | None = None  # the most actions that what it remembers holds; None: any number
    no_rewards: str | None = None  # why `predict` knows no rewards, as an error says it; None: it does
    no_gradient: str | None = None  # why what is imagined has no gradient in the actions; None: it has one
    temperature: float | None = None  # that `imagine` draws at, if its last argument gives no other; None: it has none


class AgentState(NamedTuple):
    """All that training changes; one type for every agent, so a checkpoint is a tree."""

    params: dict  # by module; what gradients, or a search, change
    opt_state: dict
    stats: PyTree
    step: Array  # int32, updates so far
    non_trainable: dict = {}  # noqa: RUF012  other parameters, by name: slow copies, amounts that acting reads

    @property
    def variables(self) -> dict:
        """All parameters, trained or not; what acting reads."""
        return self.params | self.non_trainable


class Axes(NamedTuple):
    """Named axes of a mesh that a batch is spread over, in the place of one name; parameters are spread over `parts`.

    A tuple of names is what JAX's collectives take in the place of a name, too.
    """

    copies: str  # devices along it hold the same parts of the parameters
    parts: str  # devices along it hold different ones


class Update(NamedTuple):
    """One way to learn from replay."""

    name: str
    # (AgentState, key, Trajectory) -> (AgentState, Metrics, latent [T, B, ...] or None). The loop keeps the old state
    # and latents if anything in the new state, or a metric named `...loss...` or `...grad_norm...`, is not finite.
    fn: Callable
    repeats: int  # times per iteration of its stage
    batch_size: int
    sampling: Sampling
    grad_accum: int = 1  # parts of a batch that its gradient is computed in, one after the other


class Evolve(NamedTuple):
    """A way to search for parameters by the returns they earn (`evolution.iteration`)."""

    name: str  # also of its entry in `AgentState.opt_state`
    strategy: Any  # `evolution.Strategy`
    get: Callable  # params -> theta [n]
    set: Callable  # (params, theta [n]) -> params; with theta [P, n] acting takes P * K rows, each candidate's together
    where: str  # "env", or "dream": the agent's world model, from encoded records
    rollouts: int  # episodes of each candidate
    max_steps: int  # agent steps of an episode at most
    population: int  # candidates of a generation
    generations: int  # per iteration of its stage, which then evaluates the mean of the distribution
    mean_rollouts: int  # episodes of that; the mean with the highest return is what the agent acts by
    common: bool = True  # common random numbers: all candidates play the same episodes
    starts: Callable | None = None  # dream: (params, key, Trajectory) -> States [N] to start from
    sampling: Sampling | None = None  # dream: of that trajectory, one for each iteration
    batch_size: int = 0  # dream: windows of it
    restarts: int | None = None  # of a search that is done: how often it starts anew, with twice the population each
    #   time, before it ends; None: it goes on to its last generation


class Stage(NamedTuple):
    """One compiled loop: collect, then learn, again and again."""

    name: str
    iterations: int | None  # None: until the run's step budget is used up
    collect: int  # steps per environment per iteration
    act: Callable | None  # as `Agent.act`; None: uniformly random actions
    updates: tuple[Update, ...] = ()
    evolve: Evolve | None = None


class Recipe(NamedTuple):
    """A training run as a value."""

    num_envs: int
    replay_capacity: int  # records in all, over all environments
    stages: tuple[Stage, ...]


class Agent(NamedTuple):
    """An algorithm as a value. `params` is `AgentState.variables`."""

    init: Callable  # (key) -> AgentState
    policy_carry: Callable  # (params, batch_size) -> PolicyCarry; the policy's own memory, () if none
    policy: Callable  # (params, key, PolicyCarry, State, *, explore) -> (PolicyCarry, action [B, A])
    act_carry: Callable  # (params, batch_size) -> Carry
    act: Callable  # (params, key, Carry, TimeStep, *, explore) -> (Carry, action [B, A], latent for replay)
    model: WorldModel
    recipe: Recipe
    # (params, PolicyCarry, State) -> float32 [B], the return that the critic expects; None: nothing expects one.
    value: Callable | None = None
