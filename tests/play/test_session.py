"""What a page may ask for, in a game that can be worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from tests.marks import partly_long
from tests.play.made import LEAVES, LENGTH, act, begin, do, game, hand_made, tiny
from wmjax.agents import AGENTS
from wmjax.planning import ICEMConfig
from wmjax.play import session as sessions
from wmjax.play.game import make_game
from wmjax.play.wire import FLAGS, HEADER, pack
from wmjax.types import HostEnv, TimeStep, UsageError


def dreamt(session):
    """The sum that the dream shows."""
    return int(session.now.imagined.frame[0, 0, 0])


def real(session):
    return int(session.now.happened.frame[0, 0, 0])


def test_a_session_begins_paused_with_the_dream_at_what_is_seen():
    session = begin()
    assert not session.settings.playing and session.settings.driver == "person" and session.now.number == 0
    np.testing.assert_array_equal(session.now.imagined.frame[..., 0], session.now.happened.frame[..., 0])
    assert session.now.happened.is_first and session.now.began


def test_dream_and_real_environment_take_the_same_actions():
    session = do(begin(), act(3), "step", act(1), "step")
    assert dreamt(session) == real(session) == 4
    assert session.now.happened.reward == 1 and session.now.happened.earned == 4
    assert session.now.imagined.reward == 2 and session.now.dreamed == 1.5 + 2  # half of the sum, in each step
    np.testing.assert_array_equal(session.now.action, [0, 1, 0, 0])


def test_a_tap_that_ends_before_the_step_counts_for_one_step():
    session = do(begin(), act(3), act(1, tap=False), "step", "step")
    assert dreamt(session) == 3 + 1


def test_who_drives_is_switched_at_any_moment():
    session = do(
        begin(), act(1), "step", ("drive", {"who": "agent"}), "step", "step", ("drive", {"who": "person"}), "step"
    )
    assert [moment.by for moment in session.moments[1:]] == ["person", "agent", "agent", "person"]
    assert dreamt(session) == 1 + 2 + 2 + 1
    # The agent has followed all the time: its memory counts its choices.
    assert session.now.imagined.value == pytest.approx(0.04)


def test_the_planner_finds_what_pays_most_and_keeps_its_plan():
    played = make_game(hand_made(), planner=ICEMConfig(horizon=2, candidates=32, elites=4, iterations=2))
    session = do(begin(played), ("drive", {"who": "planner"}), "step", "step", of=played)
    assert dreamt(session) == 6 and session.now.plan is not None and session.now.by == "planner"


def test_a_model_without_rewards_has_no_planner_and_says_why():
    played = make_game(hand_made(no_rewards="it predicts none"))
    session = begin(played)
    assert played.plan is None and math.isnan(session.now.imagined.reward)
    with pytest.raises(UsageError, match="'planner' is not valid here: it predicts none"):
        do(session, ("drive", {"who": "planner"}), of=played)
    assert do(session, "step", of=played).now.dreamed == 0


def test_rewinding_shows_the_same_bytes_and_the_same_actions_lead_to_the_same_future():
    session = do(begin(), act(1), "step", "step", "step", act(0), "step")
    before = [pack(session._replace(at=i)) for i in range(5)]
    back = do(session, ("at", {"number": 2}))
    assert pack(back) == before[2] and back.now is session.moments[2]
    again = do(back, act(1), "step", act(0), "step")
    assert [pack(again._replace(at=i))[HEADER.size :] for i in range(5)] == [x[HEADER.size :] for x in before]
    other = do(back, act(3), "step")  # by other actions it has the same noise
    assert dreamt(other) == 5 and other.moments[-1].number == 3
    assert other.now.imagined.frame[0, 0, 1] == session.moments[3].imagined.frame[0, 0, 1]
    new = do(back, "redraw", act(1), "step")
    assert new.now.imagined.frame[0, 0, 1] != session.moments[3].imagined.frame[0, 0, 1]


def test_going_back_pauses_and_what_is_later_stays_until_another_step():
    session = do(begin(), "step", "step", ("play", {"on": True}), ("at", {"number": 0}))
    assert not session.settings.playing and len(session.moments) == 3
    assert do(session, ("at", {"number": 2})).now is session.moments[2]
    assert len(do(session, "step").moments) == 2


def test_no_more_moments_are_kept_than_there_is_room_for():
    session = begin()._replace(kept=3)
    session = do(session, *["step"] * 5)
    assert [moment.number for moment in session.moments] == [3, 4, 5] and session.at == 2
    with pytest.raises(UsageError, match=r"number: 2 is not valid; a number in \[3, 5\] is"):
        do(session, ("at", {"number": 2}))


def test_a_dream_begins_from_the_real_environment_as_it_is_seen():
    session = do(begin(), ("temperature", {"value": 2.0}), act(3), "step", "step")
    assert session.now.imagined.frame[0, 0, 2] == 20  # imagined, not seen
    session = do(session, ("at", {"number": 1}), "dream")
    assert session.now.number == 2 and session.now.began and dreamt(session) == 3 == real(session)
    assert session.now.imagined.frame[0, 0, 2] == 0 and session.now.dreamed == 0
    assert do(session, "episode").now.happened.is_first


@pytest.mark.parametrize("restart", [True, False])
def test_after_the_end_of_an_episode_the_dream_begins_anew_or_goes_on(restart):
    session = do(begin(), ("restart", {"on": restart}), act(1), *["step"] * LENGTH)
    assert session.now.happened.is_terminal and dreamt(session) == LENGTH and session.now.happened.earned == LENGTH
    session = do(session, "step")
    assert session.now.happened.is_first and session.now.happened.earned == 0 and real(session) == 0
    assert dreamt(session) == (0 if restart else LENGTH + 1) and session.now.began == restart


def test_after_its_own_end_the_dream_begins_anew_from_the_real_environment():
    session = do(begin(), act(3), "step")
    ended = session.now._replace(imagined=session.now.imagined._replace(cont=0.1))
    session = do(session._replace(moments=(session.moments[0], ended)), "step")
    assert session.now.began and dreamt(session) == real(session) == 6
    assert LEAVES > 6  # so that it was not the model that said so


def test_temperature_reaches_the_model_and_is_refused_where_there_is_none():
    session = do(begin(), ("temperature", {"value": 0.5}), "step")
    assert session.now.imagined.frame[0, 0, 2] == 5
    played = make_game(hand_made(temperature=None))
    with pytest.raises(UsageError, match="temperature: not valid here: this model's latents have no temperature"):
        do(begin(played), ("temperature", {"value": 0.5}), of=played)
    assert do(begin(played), "step", of=played).now.imagined.frame[0, 0, 2] == 10


def test_a_recording_has_the_moments_from_its_beginning_on_and_no_states():
    session = do(begin(), "step", ("record", {"on": True}), "step", "step")
    assert [moment.number for moment in session.recording] == [1, 2, 3]
    assert all(moment.dream is moment.real is None for moment in session.recording)
    assert do(session, ("record", {"on": False})).recording is None


def test_a_recording_ends_by_itself(monkeypatch):
    monkeypatch.setattr(sessions, "RECORDED", 3)
    session = do(begin(), ("record", {"on": True}), *["step"] * 5)
    assert len(session.recording) == 3


class Counted:
    """`made.counting` on the host, in this process."""

    def __init__(self):
        self.log, self.restarts = [], 0

    def record(self, reward, over=False):
        color = np.array([self.total, self.time, 0], np.uint8)
        obs = {"image": np.broadcast_to(color, (1, 8, 8, 3)).copy()}
        flags = (np.array([x]) for x in (self.time == 0, over, over))
        return TimeStep(obs, np.array([reward], np.float32), *flags)

    def reset(self, seeds):
        self.log.append("reset")
        self.total = self.time = 0
        return self.record(0.0)

    def send(self, action):
        assert action.dtype == np.int32 and action.shape == (1,)
        self.action = int(action[0])
        self.log.append(self.action)

    def receive(self):
        self.total, self.time = self.total + self.action, self.time + 1
        return self.record(self.action)

    def close(self):
        self.log.append("close")


def test_an_environment_on_the_host_takes_the_actions_too_but_waits_where_it_cannot_go_back():
    made_of, begun = hand_made(), []

    def start(num_envs, **options):
        begun.append(Counted())
        return begun[-1]

    host = HostEnv(made_of.env.spec, start, lambda action: action.argmax(-1).astype(np.int32))
    played = make_game(dataclasses.replace(made_of, env=host))
    session = do(begin(played), act(3), "step", act(1), "step", of=played)
    assert dreamt(session) == real(session) == 4 and session.now.happened.earned == 4
    assert begun[0].log == ["reset", 3, 1]
    session = do(session, ("at", {"number": 1}), act(2), "step", of=played)
    assert session.now.stands and dreamt(session) == 5 and real(session) == 3 and begun[0].log == ["reset", 3, 1]
    session = do(session, "dream", of=played)  # from where the environment is
    assert not session.now.stands and dreamt(session) == real(session) == 4 and session.now.happened.earned == 4
    session = do(session, act(1), "step", of=played)
    assert dreamt(session) == real(session) == 5 and begun[0].log == ["reset", 3, 1, 1]
    session = do(session, "episode", of=played)
    assert session.now.happened.is_first and begun[0].log[-1] == "reset"
    other = begin(played)  # each page has one of its own
    assert len(begun) == 2 and other.now.number == 0
    session.side.close()
    assert begun[0].log[-1] == "close" and begun[1].log == ["reset"]


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ({}, "do"),
        ({"do": "explode"}, "do"),
        ({"do": ["step"]}, "do"),
        ({"do": "play"}, "on"),
        ({"do": "play", "on": 1}, "on"),
        ({"do": "speed", "value": 0}, "value"),
        ({"do": "speed", "value": float("nan")}, "value"),
        ({"do": "speed", "value": 10**400}, "value"),
        ({"do": "speed", "value": True}, "value"),
        ({"do": "drive", "who": "nobody"}, "who"),
        ({"do": "drive", "who": {}}, "who"),
        ({"do": "act", "action": [4], "tap": True}, "action"),
        ({"do": "act", "action": [-1], "tap": True}, "action"),
        ({"do": "act", "action": [True], "tap": True}, "action"),
        ({"do": "act", "action": 1, "tap": True}, "action"),
        ({"do": "act", "action": [1, 1], "tap": True}, "action"),
        ({"do": "act", "action": [1]}, "tap"),
        ({"do": "at", "number": 7}, "number"),
        ({"do": "at", "number": "0"}, "number"),
        ({"do": "temperature", "value": -1}, "value"),
        ({"do": "record"}, "on"),
    ],
)
def test_an_event_that_is_not_valid_is_one_line_that_names_the_field(event, field):
    with pytest.raises(UsageError, match=rf"^{field}: .* is not valid; .* is$") as caught:
        sessions.handle(game(), begin(), event)
    assert "\n" not in str(caught.value)


def test_the_bytes_of_a_moment_are_header_action_and_pictures():
    session = do(begin(), act(3), ("drive", {"who": "agent"}), ("play", {"on": True}))
    data = pack(session)
    found = HEADER.unpack(data[: HEADER.size])
    assert found[:4] == (1 | 2 | 4 | 16, 1, 0, 0)  # playing, restart, began, is_first
    assert FLAGS[0] == "playing" and FLAGS[4] == "is_first"
    assert found[4:12] == (0, 0, 0, 0, 8, 8, 4, 0)
    assert found[13] == pytest.approx(0.9) and found[18:] == (1.0, 10.0)
    action, pictures = data[HEADER.size : HEADER.size + 16], data[HEADER.size + 16 :]
    assert np.frombuffer(action, "<f4").tolist() == [1, 0, 0, 0]
    shown = np.frombuffer(pictures, np.uint8).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(shown, [session.now.imagined.frame, session.now.happened.frame])


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(AGENTS, ("dreamer_v3", "iris", "world_models")))
def test_every_agent_is_played_by_all_drivers_and_rewound_bit_for_bit(name):
    played = make_game(tiny(name), planner=ICEMConfig(horizon=2, candidates=8, elites=2, iterations=1))
    session = begin(played)
    for who in ("person", "agent", "planner"):
        session = do(session, ("drive", {"who": who}), *["step"] * 4, of=played)
    assert [moment.by for moment in session.moments[1:]] == ["person"] * 4 + ["agent"] * 4 + ["planner"] * 4
    frames = np.stack([moment.imagined.frame for moment in session.moments])
    assert len({frame.tobytes() for frame in frames}) > 1
    assert math.isnan(session.now.imagined.value) == (name == "world_models") == (played.temperature is not None)
    back = do(session, ("at", {"number": 4}), ("drive", {"who": "agent"}), *["step"] * 4, of=played)
    np.testing.assert_array_equal(back.now.imagined.frame, session.moments[8].imagined.frame)
    np.testing.assert_array_equal(back.now.happened.frame, session.moments[8].happened.frame)
