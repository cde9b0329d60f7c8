"""All that one page may ask for, as pure functions: `handle(game, session, event)` and `advance(game, session)`.

A session is a line of moments. Each has a whole state of the dream and of the real environment, so that going back to
one is exact, and what follows it draws the same noise: step n uses `fold_in(key, n)`. So another future of a moment
differs from the one before by its actions alone, until the page asks for other noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from wmjax import checks
from wmjax.play.controls import action_of
from wmjax.play.game import Dream, Game, Happened, Imagined, Real, Side
from wmjax.types import Array, PyTree, UsageError

DRIVERS = ("person", "agent", "planner")
KEPT, KEPT_BYTES = 600, 256 * 2**20  # moments to go back to, and of their states
RECORDED, RECORDED_BYTES = 1200, 256 * 2**20  # moments of an animation, and of their pictures
SPEEDS = 0.5, 120.0  # steps per second
TEMPERATURES = 0.05, 3.0


class Moment(NamedTuple):
    """One step of the line."""

    number: int  # steps before it
    dream: Dream
    plan: PyTree  # what the planner knows; None: nothing
    real: Real
    action: np.ndarray  # float32 [A], as an agent emits it, that led here
    by: str  # who chose it, of `DRIVERS`
    imagined: Imagined
    happened: Happened
    dreamed: float  # sum of the rewards that the dream predicted, since it began
    began: bool  # the dream begins here, from what the model believes of the real environment
    stands: bool  # the real environment could not follow


class Settings(NamedTuple):
    """What the page has chosen."""

    playing: bool
    driver: str  # of `DRIVERS`
    action: np.ndarray  # float32 [A], a person's, until it is another
    tapped: np.ndarray | None  # float32 [A], pressed since the last step, which it is for
    speed: float  # steps per second
    temperature: float | None
    restart: bool  # whether the dream begins anew after its own end, or after that of the episode


class Session(NamedTuple):
    """Where one page stands."""

    key: Array
    side: Side
    moments: tuple[Moment, ...]  # consecutive
    at: int  # index of the one that is seen
    kept: int  # how many there may be
    settings: Settings
    recording: tuple[Moment, ...] | None  # None: nothing is recorded

    @property
    def now(self) -> Moment:
        """The moment that is seen."""
        return self.moments[self.at]


def tree_bytes(tree: PyTree) -> int:
    """Of the arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def begin(game: Game, side: Side, key: Array) -> Session:
    """A session that is paused at the first moment of an episode, with a person at the controls.

    Args:
      game: what is played.
      side: the real environment, of this session alone.
      key: of all that is drawn.
    """
    rest = action_of(game.space, game.controls["rest"])
    real, happened = side.begin(jax.random.fold_in(key, 0))
    imagined = game.look(real.belief)
    first = Moment(0, real.belief, None, real, rest, "person", imagined, happened, 0.0, True, False)
    kept = max(2, min(KEPT, KEPT_BYTES // max(1, 2 * tree_bytes(first))))  # twice: a dream's state is its own
    settings = Settings(False, "person", rest, None, 10.0, game.temperature, True)
    return Session(key, side, (first,), 0, kept, settings, None)


def _append(session: Session, moment: Moment) -> Session:
    """The line up to what is seen, and the moment; what was later is gone."""
    moments = (*session.moments[: session.at + 1], moment)[-session.kept :]
    recording = session.recording
    if recording is not None and len(recording) < most_recorded(moment):
        recording = (*recording, _picture(moment))
    return session._replace(moments=moments, at=len(moments) - 1, recording=recording)


def most_recorded(moment: Moment) -> int:
    """How many moments a recording may have."""
    return max(2, min(RECORDED, RECORDED_BYTES // (2 * moment.imagined.frame.nbytes)))


def _picture(moment: Moment) -> Moment:
    """What a recording needs: no states."""
    return moment._replace(dream=None, plan=None, real=None)


def _over(moment: Moment) -> bool:
    """Whether the dream or the episode has come to its end; a dream that has just begun has not."""
    return (moment.imagined.cont < 0.5 and not moment.began) or moment.happened.is_last


def advance(game: Game, session: Session) -> Session:
    """One step: of the dream, and of the real environment by the same action."""
    now, settings = session.now, session.settings
    key_dream, key_real, key_plan = jax.random.split(jax.random.fold_in(session.key, now.number + 1), 3)
    action = settings.action if settings.tapped is None else settings.tapped
    plan = None
    if settings.driver == "planner":
        plan, action = game.plan(key_plan, now.dream, now.plan)
    dream, action, imagined = game.dream(key_dream, now.dream, action, settings.driver == "agent", settings.temperature)
    followed = None if now.stands else session.side.step(key_real, now.real, action)
    real, happened = (now.real, now.happened) if followed is None else followed
    stands = followed is None
    began = settings.restart and _over(now) and not stands
    if began:
        dream, plan, imagined = real.belief, None, game.look(real.belief)
    dreamed = 0.0 if began else now.dreamed + (0.0 if math.isnan(imagined.reward) else imagined.reward)
    by, number = settings.driver, now.number + 1
    moment = Moment(number, dream, plan, real, action, by, imagined, happened, dreamed, began, stands)
    return _append(session, moment)._replace(settings=settings._replace(tapped=None))


# ---------------------------------------------------------------------------------------------------------------------
# Events


def handle(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """What comes of an event of the page: a dictionary whose `do` is a name in `EVENTS`, with what that reads.

    Raises `UsageError` for any other event, of which nothing comes.
    """
    name = event.get("do")
    if not isinstance(name, str) or name not in EVENTS:
        raise checks.invalid("do", name, f"one of {', '.join(EVENTS)}")
    return EVENTS[name](game, session, event)


def _set(session: Session, **changes: Any) -> Session:
    return session._replace(settings=session.settings._replace(**changes))


def _flag(event: dict[str, Any], name: str) -> bool:
    value = event.get(name)
    if not isinstance(value, bool):
        raise checks.invalid(name, value, "true or false")
    return value


def _number(event: dict[str, Any], name: str, low: float, high: float) -> float:
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise checks.invalid(name, value, f"a number in [{low:g}, {high:g}]")
    return value


def _play(game: Game, session: Session, event: dict[str, Any]) -> Session:
    return _set(session, playing=_flag(event, "on"))


def _step(game: Game, session: Session, event: dict[str, Any]) -> Session:
    return advance(game, _set(session, playing=False))


def _speed(game: Game, session: Session, event: dict[str, Any]) -> Session:
    return _set(session, speed=float(_number(event, "value", *SPEEDS)))


def _drive(game: Game, session: Session, event: dict[str, Any]) -> Session:
    who = event.get("who")
    if not isinstance(who, str) or who not in DRIVERS:
        raise checks.invalid("who", who, f"one of {', '.join(DRIVERS)}")
    if who == "planner" and game.plan is None:
        raise UsageError(f"who: 'planner' is not valid here: {game.about['no_plan']}")
    return _set(session, driver=who)


def _act(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """`tap`: whether the next step is to be by this action even where another one comes before it."""
    action, tapped = action_of(game.space, event.get("action")), session.settings.tapped
    return _set(session, action=action, tapped=action if _flag(event, "tap") else tapped)


def _temperature(game: Game, session: Session, event: dict[str, Any]) -> Session:
    if game.temperature is None:
        raise UsageError(f"temperature: not valid here: {game.about['no_temperature']}")
    return _set(session, temperature=float(_number(event, "value", *TEMPERATURES)))


def _at(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """Goes to a moment that is kept, and pauses there."""
    first, last = session.moments[0].number, session.moments[-1].number
    number = _number(event, "number", first, last)
    return _set(session._replace(at=round(number) - first), playing=False)


def _dream_from(game: Game, session: Session, real: Real, happened: Happened) -> Session:
    now, belief = session.now, real.belief
    moment = Moment(
        now.number + 1, belief, None, real, now.action, now.by, game.look(belief), happened, 0.0, True, False
    )
    return _append(session, moment)


def _dream(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """The dream begins anew, from what the model believes of the real environment as it is seen, or as it is."""
    return _dream_from(game, session, *session.side.newest(session.now.real, session.now.happened))


def _episode(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """A new episode, and a dream from its first picture."""
    key = jax.random.fold_in(session.key, session.now.number + 1)
    return _dream_from(game, session, *session.side.begin(key))


def _redraw(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """Other noise from here on."""
    return session._replace(key=jax.random.split(session.key)[0])


def _restart(game: Game, session: Session, event: dict[str, Any]) -> Session:
    return _set(session, restart=_flag(event, "on"))


def _record(game: Game, session: Session, event: dict[str, Any]) -> Session:
    """Begins a recording. It ends with what `on: false` finds; who asks for that has read `recording` before."""
    return session._replace(recording=(_picture(session.now),) if _flag(event, "on") else None)


EVENTS: dict[str, Callable[[Game, Session, dict[str, Any]], Session]] = {
    "play": _play,
    "step": _step,
    "speed": _speed,
    "drive": _drive,
    "act": _act,
    "temperature": _temperature,
    "at": _at,
    "dream": _dream,
    "episode": _episode,
    "redraw": _redraw,
    "restart": _restart,
    "record": _record,
}
