"""`wmjax play`: a local server, on whose page one plays in a dream."""

from __future__ import annotations

import secrets
import threading
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec

from wmjax.cli.arguments import PlayArgs, parse_with_planner
from wmjax.types import UsageError


def play(argv: Sequence[str]) -> None:
    from wmjax.cli.results import load_to_play
    from wmjax.loops.signals import as_interrupts
    from wmjax.play.game import make_game, warm_up
    from wmjax.play.gate import is_loopback
    from wmjax.play.page import Lobby
    from wmjax.play.server import listen, make_server

    args, planner = parse_with_planner(PlayArgs, argv, "wmjax play")
    if any(find_spec(name) is None for name in ("starlette", "uvicorn", "websockets")):
        raise UsageError('play: its server is not installed; pip install "wmjax[play]"')
    if not is_loopback(args.host) and not args.open_to_network:
        raise UsageError(
            f"host: {args.host!r} lets other machines play, unencrypted; 127.0.0.1 is valid, and any address of "
            "this machine with --open-to-network"
        )
    run, where, _ = load_to_play(args)
    game = make_game(run.of_seed(args.seed), where, planner)
    print(f"{game.about['title']}: compiling", flush=True)
    warm_up(game)
    token = secrets.token_urlsafe(24)
    with listen(args.host, args.port) as listening:
        port = listening.getsockname()[1]
        if args.port not in (0, port):
            print(f"port {args.port} is in use; {port} is taken")
        name = f"[{args.host}]" if ":" in args.host else args.host
        link = f"http://{name}:{port}/{token}/"
        print(f"the dream is at {link}\nwho has this link can play; Ctrl-C ends it", flush=True)
        if args.open:
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
        lobby = Lobby(game)
        try:
            with as_interrupts():
                make_server(lobby, token, args.host).run([listening])
        except KeyboardInterrupt:
            print("ended")
        finally:
            lobby.close()
