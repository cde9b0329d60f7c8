"""A moment as bytes for the page: a header, the action, and two pictures as they are in memory.

Little-endian: `HEADER`, then the action, float32 `[A]`, then the dream's and the real picture, uint8 `[H, W, 3]` each.
`static/play.js` reads the same.
"""

from __future__ import annotations

import struct

import numpy as np

from wmjax.play.session import DRIVERS, Moment, Session

# Flags; who drives; who chose the action; 0. Numbers of the moment, of the first and of the last that is kept, and of
# the moments recorded so far. Width, height and A; 0. Reward, P(continue), value and return of the dream; reward and
# return of the real environment; temperature and speed.
HEADER = struct.Struct("<4B4I4H8f")
FLAGS = ("playing", "restart", "began", "stands", "is_first", "is_last", "is_terminal", "recording")


def flags(session: Session, moment: Moment) -> int:
    """The bits of `FLAGS`, the first the lowest."""
    settings, happened = session.settings, moment.happened
    values = (
        settings.playing, settings.restart, moment.began, moment.stands, happened.is_first, happened.is_last,
        happened.is_terminal, session.recording is not None,
    )  # fmt: skip
    return sum(bool(value) << i for i, value in enumerate(values))


def pack(session: Session) -> bytes:
    """What is seen now."""
    now, settings = session.now, session.settings
    height, width, _ = now.imagined.frame.shape
    header = HEADER.pack(
        flags(session, now), DRIVERS.index(settings.driver), DRIVERS.index(now.by), 0,
        now.number, session.moments[0].number, session.moments[-1].number, len(session.recording or ()),
        width, height, now.action.size, 0,
        now.imagined.reward, now.imagined.cont, now.imagined.value, now.dreamed,
        now.happened.reward, now.happened.earned, settings.temperature or 0.0, settings.speed,
    )  # fmt: skip
    parts = (now.action.astype("<f4"), now.imagined.frame, now.happened.frame)
    return b"".join([header, *(np.ascontiguousarray(part).tobytes() for part in parts)])
