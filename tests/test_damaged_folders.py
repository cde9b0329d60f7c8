"""Whatever is in a run folder: one line says what is wrong, nothing outside is touched, no result differs silently."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmjax
from tests.marks import partly_long
from tests.run_folders import DESCRIPTION, Victims, damage
from tests.test_run import ENV, TINY
from wmjax import figures
from wmjax.cli import main
from wmjax.figures import frames, learning
from wmjax.loops import checkpoint
from wmjax.loops.display import Display
from wmjax.loops.report import Report, read_metrics
from wmjax.replay import chunks
from wmjax.run_folder import open_folder, read_description, say_edits, write_json
from wmjax.types import RunError, UsageError

LENGTHS = ("version", "preset", "devices", "parallel", "steps")  # what a checkpoint may well differ in


def tree(step):
    weights = {"w": jnp.full((3, 2), step, jnp.float32), "b": jnp.arange(4) + step}
    return {"agent": weights, "key": jax.random.key(step), "replay": jnp.zeros((2, 5), jnp.uint8)}


TEMPLATE = jax.eval_shape(lambda: tree(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run folder as training leaves it, and the digests of what was saved in it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    write_json(run / "config.json", DESCRIPTION)
    write_json(run / "eval.json", {"mean": 1.0})
    with Report(run) as report:
        for step in (10, 20, 30, 40):
            report.log("train", step, step, {"episode/return": float(step), "train/loss": 1.0})
    info = {"description": DESCRIPTION}
    for step in (20, 40):
        checkpoint.save(run / "checkpoints", step, tree(step), info=info)
    checkpoint.save(run / "best", 20, {"agent": tree(20)["agent"]}, info=info | {"mean": 3.0})
    for number in range(2):
        chunks.write(run / "replay", {"x": np.full(30, number, np.uint8)})
    wholes = {step: checkpoint.digest(tree(step)) for step in (20, 40, 60)}
    agents = {step: checkpoint.digest({"agent": tree(step)["agent"]}) for step in wholes}
    return run, wholes, agents


def read(run, wholes, agents):
    """Reads all there is; raises only what a command shows in one line, and finds nothing else than what was saved."""
    said = []
    with contextlib.suppress(UsageError):
        description = read_description(run, said.append)
        with contextlib.suppress(UsageError, RunError):
            step, found = checkpoint.restore_newest(run / "checkpoints", TEMPLATE, said.append, exact=True)
            assert checkpoint.digest(found) == wholes[step]
            say_edits(run, description, checkpoint.info(run / "checkpoints", step), said.append)
            same = all(description[name] == DESCRIPTION[name] for name in DESCRIPTION if name not in LENGTHS)
            assert same or said
    with contextlib.suppress(UsageError, RunError):
        step, found = checkpoint.restore_newest(run / "best", {"agent": TEMPLATE["agent"]}, said.append)
        assert checkpoint.digest(found) == agents[step]
    with contextlib.suppress(UsageError):
        lines = read_metrics(run, said.append)
        figures.fitness_curves(run)
        if (run / "metrics.jsonl").is_file():
            there = (run / "metrics.jsonl").read_bytes().split(b"\n")
            good = [line for line in (made_line(raw) for raw in there) if line is not None]
            assert [line for line in lines if line in good] == good
    with contextlib.suppress(UsageError):
        learning.training_line(run), learning.evaluation_line(run)
    for path in (run / "replay").iterdir() if (run / "replay").is_dir() else []:
        if chunks.NAME.fullmatch(path.name) and chunks.is_whole(run / "replay", bytes.fromhex(path.name[:64])):
            with contextlib.suppress(ValueError):
                chunks.mapped(run / "replay", bytes.fromhex(path.name[:64]))
    return said


def made_line(raw):
    """A line as it was written, if it still is one."""
    try:
        line = json.loads(raw)
        return line if set(line) >= {"step", "updates", "time", "stage", "train/loss"} and plain(line) else None
    except (ValueError, TypeError, RecursionError):
        return None


def plain(line):
    number = lambda x: type(x) in (int, float) and abs(x) < 2**63
    whole = all(type(line[name]) is int and line[name] >= 0 for name in ("step", "iteration"))
    return whole and all(number(x) if name != "stage" else isinstance(x, str) for name, x in line.items())


def write(run):
    """Writes as a resumed run, an evaluation and a dream do."""
    said = []
    for name in ("eval.json", "dream.json"):
        with contextlib.suppress(OSError):
            write_json(run / name, {"mean": 2.0})
    with contextlib.suppress(OSError):
        frames.write_gif(run / "dream.gif", [frames.canvas(4, 4)[0]] * 2, 50, 50)
    with (
        contextlib.suppress(UsageError, RunError),
        open_folder(run, True, DESCRIPTION, lambda _: None, said.append),
        Report(run, display=Display(None), resume_step=20) as report,
    ):
        for name in ("checkpoints", "best"):
            checkpoint.set_aside(run / name, after=20)
        report.log("train", 60, 1, {"loss": 1.0})
        saver = checkpoint.Saver(said.append)
        for name in ("checkpoints", "best"):
            saver.save(run / name, 60, tree(60), keep=1)
        saver.close()
        for name in ("checkpoints", "best"):
            assert run / name in saver.failed or checkpoint.latest(run / name) == 60
        with contextlib.suppress(OSError):
            chunks.keep(run / "replay", [chunks.write(run / "replay", {"x": np.full(30, 9, np.uint8)})])
        chunks.tidy(run / "replay")


def damage_and_use(made, place, seed):
    run, *digests = made
    rng, victims = random.Random(seed), Victims(place / "victims")
    shutil.copytree(run, place / "run", symlinks=True)
    what = damage(place / "run", victims.place, rng)
    signal.alarm(30)  # nothing takes long, or waits for what never comes
    try:
        read(place / "run", *digests)
        write(place / "run")
        if seed % 4 == 0:
            read(place / "run", *digests)
    except BaseException as error:
        error.add_note(f"seed {seed}: {what}")
        raise
    finally:
        signal.alarm(0)
    assert victims.state() == victims.before, (seed, what)


STARTS = range(8, 500, 82)
MARKS = {start: [pytest.mark.slow] + [pytest.mark.long] * (start > 10) for start in STARTS}  # CI takes 90 of them
MANY = [pytest.param(range(start, start + 82), marks=MARKS[start]) for start in STARTS]


@pytest.mark.parametrize("seeds", [range(8), *MANY])
def test_damage_of_any_kind_is_said_or_changes_nothing(seeds, made, tmp_path, capfd):
    for seed in seeds:
        (tmp_path / str(seed)).mkdir()
        damage_and_use(made, tmp_path / str(seed), seed)
        shutil.rmtree(tmp_path / str(seed))
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Through the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run with two checkpoints: the returns of either, and the digest of its end."""
    run, stream = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    for steps in (40, 60):
        wmjax.train("dreamer_v3", ENV, steps=steps, eval_every=20, out=run, resume=steps > 40, progress=stream, **TINY)
    returns = {60: wmjax.load(run).evaluate(16).returns}
    earlier = run.with_name("earlier")
    shutil.copytree(run, earlier)
    shutil.rmtree(earlier / "checkpoints" / f"{60:012d}")
    returns[40] = wmjax.load(earlier).evaluate(16).returns
    return run, returns, re.findall("state sha256 ([0-9a-f]{64})", stream.getvalue())[-1]


@pytest.mark.slow
@pytest.mark.parametrize("command", partly_long(["eval", "plot", "resume"], ["resume"]))
def test_commands_on_damaged_folders_end_in_one_line_or_as_they_would(command, trained, tmp_path, capfd):
    run, returns, digest = trained
    for seed in range(1000, 1040)[["eval", "plot", "resume"].index(command) :: 3]:
        place, rng = tmp_path / str(seed), random.Random(seed)
        victims = Victims(place / "victims")
        shutil.copytree(run, place / "run")
        what = seed, damage(place / "run", victims.place, rng)
        arguments = {
            "eval": ["eval", str(place / "run"), "--json", "--episodes", "16"],
            "plot": ["plot", str(place / "run")],
            "resume": ["train", "dreamer_v3", "--resume", "--out", str(place / "run")],
        }[command]
        code = main(arguments)
        out, err = capfd.readouterr()
        assert code in (0, 1, 2) and "Traceback" not in err, (what, err)
        complaints = [line for line in err.splitlines() if line.startswith("wmjax: ")]
        assert code == 0 or len([line for line in complaints if " error: " in line]) == 1, (what, err)
        assert victims.state() == victims.before, what
        if code == 0 and command == "eval" and not complaints:
            found = json.loads(out)
            assert found["returns"] == returns[found["step"]], what
        if code == 0 and command == "resume" and not complaints and "warning" not in out:
            assert f"state sha256 {digest}" in out, what
