"""Signals while Python cannot hear of them, as while XLA compiles: here, while a hash is computed without the GIL."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.test_run import ENV, TINY
from wmjax.loops import checkpoint
from wmjax.loops.signals import NAMES, catch_signals


@pytest.fixture(autouse=True)
def hangups_end_a_process():
    """As they do unless one was started to outlive its terminal, such as by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def busy(seconds):
    """In one call that no signal handler of Python interrupts."""
    begin = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = seconds / (time.monotonic() - begin)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(100_000 * rounds))
    return time.monotonic()


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_said_at_once_though_python_is_not_there_to_hear_of_it(name):
    said, number = [], getattr(signal, name)
    before = [signal.getsignal(getattr(signal, other)) for other in NAMES]
    sender = threading.Timer(0.1, lambda: os.kill(os.getpid(), number))
    with catch_signals(lambda text: said.append((time.monotonic(), text))) as caught:
        sender.start()
        end = busy(0.8)
        assert caught == [number]
    assert len(said) == 1 and said[0][1].startswith(name) and said[0][0] < end - 0.1
    assert [signal.getsignal(getattr(signal, other)) for other in NAMES] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_second_signal_stops():
    with pytest.raises(KeyboardInterrupt), catch_signals(lambda text: None):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals(pytest.fail) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not caught
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_to_a_stream_that_is_gone_is_lost_and_nothing_else():
    def gone(text):
        raise OSError(5, "Input/output error")

    with catch_signals(gone) as caught:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        assert caught == [signal.SIGHUP]


def test_a_second_signal_ends_a_process_that_does_not_hear_of_it():
    script = """
    import hashlib, time
    from wmjax.loops import signals

    def say(text):
        print("said", flush=True)
        time.sleep(1000)  # as where nobody reads

    signals.PATIENCE = 0.2
    with signals.catch_signals(say):
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "said\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_an_interrupt_while_the_command_is_being_read_leaves_no_traceback():
    script = """
    import os, signal, sys
    from wmjax.__main__ import main

    class Interrupting:  # the first module that the command imports
        def find_spec(*_):
            os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Interrupting)
    main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT and not done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid, to have a terminal of its own")
def test_a_run_whose_terminal_is_closed_is_saved(tmp_path):
    flags = [f"--agent.{name}={value}" for name, value in TINY.items()]
    command = ["setsid", "-c", sys.executable, "-m", "wmjax", "train", "dreamer_v3", "--env", ENV]
    command += ["--steps", "100000000", *flags]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and b'"stage": "train"' in metrics.read_bytes()):
            assert process.poll() is None
            with contextlib.suppress(OSError):
                os.read(ours, 2**16)
        os.close(ours)
        assert process.wait(120) == 128 + signal.SIGHUP
        assert checkpoint.latest(tmp_path / "run" / "checkpoints") > 0
    finally:
        process.kill()
        process.wait()
