"""Who may come in, what a page is sent, and what is left when it is closed."""

import contextlib
import json
import socket
import threading
import time

import pytest

from tests.play import made
from wmjax.cli import main
from wmjax.play import page as pages
from wmjax.play.game import make_game
from wmjax.play.gate import is_admitted, is_loopback
from wmjax.play.page import CREDITS, Lobby
from wmjax.play.wire import FLAGS, HEADER
from wmjax.types import RunError, UsageError

testclient = pytest.importorskip("starlette.testclient", reason="the extra `play` is not installed")
from starlette.websockets import WebSocketDisconnect  # noqa: E402

from wmjax.play.server import STATIC, application, listen  # noqa: E402

TOKEN = "a" * 32
HOME = "http://127.0.0.1:8765"
OWN = {"origin": HOME, "host": "127.0.0.1:8765"}


@contextlib.contextmanager
def served(game=None, seats=4, host="127.0.0.1"):
    """A client of a server, and its lobby."""
    lobby = Lobby(game or made.game(), seats)
    try:
        with testclient.TestClient(application(lobby, TOKEN, host), base_url=HOME) as client:
            yield client, lobby
    finally:
        lobby.close()


@contextlib.contextmanager
def page(client):
    """A page: what it was told first, and its socket."""
    with client.websocket_connect(f"/{TOKEN}/live", headers=OWN) as live:
        yield json.loads(live.receive_text())["hello"], live


def moment(live, seen=True):
    """The next moment: its header by name; what is told besides is left out."""
    while True:
        message = live.receive()
        if data := message.get("bytes"):
            break
        assert message["type"] == "websocket.send", message
    if seen:
        live.send_text('{"do": "seen"}')
    found = HEADER.unpack(data[: HEADER.size])
    names = dict(flags=found[0], driver=found[1], number=found[4], first=found[5], last=found[6])
    return names | {"red": data[HEADER.size + 16], "bytes": data}


def ask(live, name, **more):
    live.send_text(json.dumps({"do": name} | more))


def waits(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Who may come in


def test_with_the_token_there_are_the_page_and_its_files_and_nothing_else():
    with served() as (client, _):
        assert "wmjax play" in client.get(f"/{TOKEN}/").text
        for name, kind in STATIC.items():
            answer = client.get(f"/{TOKEN}/{name}")
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        for path in ("x", "%2e%2e/server.py", "..%2fserver.py", "recordings/x.gif", "recordings/..%2f..%2fx"):
            assert client.get(f"/{TOKEN}/{path}").status_code == 404, path


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("", {}),
        ("/play.js", {}),
        (f"/{TOKEN[:-1]}/", {}),
        (f"/{TOKEN}b/", {}),
        (f"/{TOKEN.upper()}/play.js", {}),
        (f"//{TOKEN}/", {}),
        ("/%C3%A4%00/", {}),
        (f"/?{TOKEN}", {}),
        ("/x/recordings/x.gif", {}),
        (f"/{TOKEN}/", {"host": "evil.example"}),
        (f"/{TOKEN}/", {"host": "127.0.0.1.evil.example"}),
        (f"/{TOKEN}/", {"host": "10.0.0.1:8765"}),
        (f"/{TOKEN}/", {"origin": "http://evil.example"}),
        (f"/{TOKEN}/", {"origin": "null"}),
        (f"/{TOKEN}/", {"origin": "http://127.0.0.1:9999"}),
    ],
)
def test_without_the_token_or_from_elsewhere_there_is_403_and_nothing_leaks(path, headers):
    with served() as (client, lobby):
        answers = [client.request(how, path, headers=headers) for how in ("GET", "POST")]
        assert {answer.status_code for answer in answers} == {403}
        assert all(answer.text == "403 Forbidden\n" for answer in answers)
        assert all(set(answer.headers) <= {"content-type", "cache-control"} for answer in answers)
        assert lobby.free == 4


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/live", {}),
        (f"/{'b' * 32}/live", {}),
        (f"/{TOKEN}/live", {"origin": None}),
        (f"/{TOKEN}/live", {"origin": "http://evil.example"}),
        (f"/{TOKEN}/live", {"origin": "https://127.0.0.1:8765"}),
        (f"/{TOKEN}/live", {"origin": "http://evil.example:8765", "host": "evil.example:8765"}),
    ],
)
def test_a_socket_is_refused_before_it_is_opened(path, headers):
    headers = {name: value for name, value in (OWN | headers).items() if value is not None}
    with served() as (client, lobby):
        with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(path, headers=headers):
            pass
        assert caught.value.code == 1008 and lobby.free == 4


def test_a_forwarded_port_and_other_names_of_this_machine_are_known():
    def admitted(name, host="127.0.0.1", origin=None):
        headers = [(b"host", name.encode())] + ([(b"origin", origin.encode())] if origin else [])
        return is_admitted({"type": "http", "path": f"/{TOKEN}/", "headers": headers}, TOKEN, host)

    assert admitted("localhost:9000") and admitted("[::1]:8765") and admitted("127.0.0.1")
    assert admitted("localhost:9000", origin="http://localhost:9000")
    assert not admitted("192.168.0.3:8765") and not admitted("other.example")
    assert admitted("192.168.0.3:8765", "0.0.0.0") and admitted(socket.gethostname(), "0.0.0.0")
    assert not admitted("other.example", "0.0.0.0") and admitted("desk.example:8765", "desk.example")
    twice = [(b"host", b"localhost")] * 2
    assert not is_admitted({"type": "http", "path": f"/{TOKEN}/", "headers": twice}, TOKEN, "127.0.0.1")
    assert is_loopback("127.0.0.2") and is_loopback("::1") and not is_loopback("0.0.0.0")


# ---------------------------------------------------------------------------------------------------------------------
# What a page is sent


def test_a_page_is_told_of_the_game_and_sees_what_it_asks_for():
    with served() as (client, _), page(client) as (hello, live):
        assert hello["controls"]["choices"] == [["action 0", "action 1", "action 2", "action 3"]]
        assert hello["header"] == HEADER.size and hello["flags"] == list(FLAGS)
        assert moment(live)["number"] == 0
        ask(live, "act", action=[3], tap=True)
        ask(live, "step")
        while (found := moment(live))["number"] < 1:
            pass
        assert found["red"] == 3
        ask(live, "at", number=0)
        ask(live, "at", number=1)
        again = [moment(live), moment(live)]
        assert again[0]["red"] == 0 and again[1]["bytes"] == found["bytes"]


def test_events_that_are_not_valid_are_answered_and_do_no_harm():
    with served() as (client, _), page(client) as (_, live):
        moment(live)
        for text in ("{", "[1]", '"step"', "[" * 20_000, '{"do": "at", "number": 1e400}', '{"do": "explode"}'):
            live.send_text(text)
            assert "not valid" in json.loads(live.receive_text())["error"]
        ask(live, "step")
        assert moment(live)["number"] == 1


def test_a_slow_page_gets_the_newest_moment_next_and_nothing_queues_up():
    with served() as (client, _), page(client) as (_, live):
        ask(live, "speed", value=120)
        ask(live, "play", on=True)
        numbers = [moment(live, seen=False)["number"] for _ in range(CREDITS)]
        time.sleep(1.0)  # many steps
        ask(live, "seen")
        late = moment(live, seen=False)["number"]
        assert late > max(numbers) + 10
        ask(live, "seen")  # one more word, one more moment
        assert moment(live, seen=False)["number"] > late


def test_a_session_waits_for_a_page_that_has_gone_silent(monkeypatch):
    monkeypatch.setattr(pages, "IDLE", 0.2)
    with served() as (client, _), page(client) as (_, live):
        ask(live, "speed", value=120)
        ask(live, "play", on=True)
        for _ in range(CREDITS):
            moment(live, seen=False)
        time.sleep(1.0)
        for _ in range(CREDITS):
            ask(live, "seen")
        before = moment(live)["number"]
        assert before < 100  # of 120 and more that there was time for
        while moment(live)["number"] < before + 5:  # and goes on
            pass


def test_two_pages_have_sessions_of_their_own():
    with served() as (client, lobby), page(client) as (_, one), page(client) as (_, two):
        assert moment(one)["bytes"] == moment(two)["bytes"] and lobby.free == 2
        ask(one, "act", action=[3], tap=True)
        ask(one, "step")
        while (found := moment(one))["number"] < 1:
            pass
        ask(two, "step")
        assert moment(two)["red"] == 0 and found["red"] == 3


def test_one_page_too_many_is_told_so():
    with served(seats=1) as (client, _), page(client):
        with client.websocket_connect(f"/{TOKEN}/live", headers=OWN) as live:
            assert "pages are open already" in json.loads(live.receive_text())["closed"]
            assert live.receive()["code"] == 1013


def test_a_closed_page_frees_everything():
    closed = []
    game = made.game()
    game = game._replace(side=lambda: made.game().side()._replace(close=lambda: closed.append(1)))
    threads = {thread.name for thread in threading.enumerate()}
    with served(game) as (client, lobby):
        for _ in range(3):
            with page(client) as (_, live):
                ask(live, "record", on=True)
                ask(live, "play", on=True)
                moment(live)
                ask(live, "record", on=False)
                while "recording" not in (live.receive().get("text") or ""):
                    live.send_text('{"do": "seen"}')
                assert len(list(lobby.folder.iterdir())) >= 1
            waits(lambda: lobby.free == 4)
        waits(lambda: len(closed) == 3)
        assert not list(lobby.folder.iterdir())
        new = lambda: [t.name for t in threading.enumerate() if t.name.startswith("play") and t.name not in threads]
        waits(lambda: not new())
    assert not lobby.folder.exists()


def test_a_recording_is_an_animation_to_download(tmp_path):
    from PIL import Image

    with served() as (client, _), page(client) as (_, live):
        ask(live, "record", on=True)
        for _ in range(3):
            ask(live, "act", action=[3], tap=True)
            ask(live, "step")
        ask(live, "record", on=False)
        while "recording" not in (text := live.receive().get("text") or ""):
            live.send_text('{"do": "seen"}')
        told = json.loads(text)
        assert told["frames"] == 4
        path, size = told["recording"]["gif"]
        answer = client.get(f"/{TOKEN}/{path}")
        assert len(answer.content) == size and "attachment" in answer.headers["content-disposition"]
        assert client.get(f"/{path}").status_code == 403
        (tmp_path / "x.gif").write_bytes(answer.content)
        animation = Image.open(tmp_path / "x.gif")
        reds = []
        for i in range(animation.n_frames):
            animation.seek(i)
            reds.append(animation.convert("RGB").getpixel((100, 150))[0])
        assert animation.n_frames == 4 and reds == pytest.approx([0, 3, 6, 9], abs=3)


def test_what_breaks_a_session_is_told_before_its_page_is_closed():
    def lost(*arguments):
        raise RunError("the environments were lost")

    game = made.game()
    side = game.side()
    with served(game._replace(side=lambda: side._replace(step=lost))) as (client, lobby), page(client) as (_, live):
        moment(live)
        ask(live, "step")
        assert json.loads(live.receive_text())["closed"] == "the environments were lost"
        assert live.receive()["code"] == 1011
        waits(lambda: lobby.free == 4)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_a_port_in_use_gives_the_next_one_that_is_free():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port) as second:
            assert port < second.getsockname()[1] < port + 50


def test_an_address_of_another_machine_is_one_line():
    with pytest.raises(UsageError, match=r"^host.*192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match=r"^host: 'no-such-name\.invalid' is not valid"):
        listen("no-such-name.invalid", 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "--open-to-network"),
        (["--port", "65536"], "port: 65536 is not valid"),
        (["--port", "x"], "--port"),
        (["--planner.horizon", "3"], "--planner.horizon: is of a planner"),
        (["--policy", "dream"], "--policy"),
        (["--seed", "9"], "seed: 9 is not in 'pretrained-iris-catch'; 1 is valid"),
        (["--host", "192.0.2.1", "--open-to-network"], "host"),
        (["--env", "probe:act_obs"], "env: its obs"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wmjax.play.game.warm_up", lambda game: None)
    assert main(["play", "pretrained:iris/catch", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wmjax: error: ") and told in line
    assert not list(tmp_path.iterdir())


def test_an_agent_without_pictures_cannot_be_played_and_is_told_why():
    from wmjax.envs import make_env

    run = made.tiny("dreamer_v3")
    env = make_env("probe:act_obs")
    with pytest.raises(UsageError, match="run: the environment observes vector, which is no picture"):
        make_game(made.run(run.agent, env, "dreamer_v3", run.state))
