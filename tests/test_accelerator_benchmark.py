"""The benchmark for accelerators, where there is none: what it chooses, records, survives and writes."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator, measure
from benchmarks.accelerator import Args, Worker
from benchmarks.work import ROWS, Row
from wmjax import arithmetic, cards

NAMES = [row.name for row in ROWS]
MACHINE = {"backend": "cpu", "devices": ["cpu"], "driver": None, "versions": {}}
COMPILED = {"prepare_s": 0.1, "trace_s": 0.2, "compile_s": 0.3, "compiled_before": False}
TIMED = COMPILED | {"value": 2.0, "low": 1.0, "high": 3.0, "unit": "ms"}


def names(**args):
    return [row.name for row in accelerator.chosen(Args(**args))]


def test_rows_are_chosen_by_parts_of_their_names_or_patterns():
    assert names() == NAMES and len(set(NAMES)) == len(NAMES)
    assert names(only=("matmul*",)) == ["matmul float32", "matmul bfloat16"]
    assert names(only=("matmul", "12m"), skip=("*float32",)) == ["matmul bfloat16", "dreamer_v3 12m, update"]
    for args in ({"only": ("nothing",)}, {"skip": ("*nothing*",)}):
        with pytest.raises(SystemExit, match=r"no row fits .\*?nothing.*; there are:\n  matmul float32"):
            names(**args)
    with pytest.raises(SystemExit, match="--only and --skip leave no row"):
        names(skip=("*",))


ANSWERS = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        print("why it died", file=sys.stderr, flush=True)
        os._exit(3)
    time.sleep(request.get("sleep", 0))
    print(json.dumps({"pid": os.getpid(), "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}), flush=True)
"""


def test_a_process_that_ends_or_hangs_is_told_of_and_the_next_row_has_a_new_one(tmp_path):
    worker = Worker(tmp_path, (sys.executable, "-c", ANSWERS))
    first, again = (worker.ask(20, do="time") for _ in range(2))
    assert first == again and first["cache"] == str(tmp_path)
    assert worker.ask(20, do="die") == {"error": "its process ended with 3: why it died\n"}
    assert worker.ask(0, do="time", sleep=60) == {"error": "took more than 1 s"}
    assert worker.ask(20, do="time")["pid"] != first["pid"]
    worker.end()


class Scripted:
    """In the place of `Worker`: what each row comes to, by what is done and by a part of its name."""

    def __init__(self, cache):
        pass

    def ask(self, patience, /, do, row="", **request):
        if do == "machine":
            return dict(MACHINE)
        if (do, row) in (("compile", NAMES[1]), ("time", NAMES[2])):
            return {"error": f"cannot {do}"}
        return dict(COMPILED if do == "compile" else TIMED)

    def end(self):
        pass


def test_a_row_that_fails_is_recorded_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator, "Worker", Scripted)
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/accelerator.py", "--reduced"])
    args = Args(skip=("whole",), reduced=True, processes=2, out=tmp_path / "rows.json")
    accelerator.measure(args, tmp_path)
    report = json.loads(args.out.read_text())
    rows = report["rows"]
    assert [*rows] == [row.name for row in ROWS if row.make] and not report["left_out"]
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert failed == {NAMES[1]: "cannot compile", NAMES[2]: "cannot time"}
    assert rows[NAMES[0]]["value"] == 2.0 and rows[NAMES[0]]["cold"] == {k: v for k, v in COMPILED.items() if "_s" in k}
    assert report["machine"] == MACHINE | {"command": "python -m benchmarks.accelerator --reduced"}
    assert report["reduced"] is True
    out = capsys.readouterr().out
    assert f"{NAMES[1]:52s} failed: cannot compile" in out and "compile 0.3 s" in out


def test_what_there_is_no_time_for_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator, "Worker", Scripted)
    report = accelerator.measure(Args(budget=0.0, reduced=True), tmp_path)
    assert report["left_out"] == NAMES and not report["rows"]
    assert f"no time for: {NAMES[0]}, " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": float("nan")}, {"processes": 0}])
def test_no_time_and_no_processes_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(SystemExit, match=f"--{name}: .* is not valid; a number above 0 is"):
        accelerator.main(Args(**wrong))


@pytest.mark.parametrize("name", ["cache", "out"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"--{name}: .* cannot be made: "):
        accelerator.main(Args(**{name: tmp_path / "file" / "inner" / "x"}))


def test_without_an_accelerator_it_says_so_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "Worker", Scripted)
    with pytest.raises(SystemExit, match=r"finds no accelerator, only a CPU; .* --reduced"):
        accelerator.measure(Args(), tmp_path)


def test_a_row_is_timed():
    found = measure.answer({"do": "time", "row": "matmul float32", "reduced": True, "seconds": 0})
    assert 0 < found["low"] <= found["value"] <= found["high"] and found["unit"] == "TFLOP/s"
    assert found["measurements"] == 3 and found["compile_s"] > 0 and found["multiply_adds"] == 256**3
    assert found["peak_s"] is None and "share_of_peak" not in found  # no card


@pytest.mark.parametrize(
    "kind, name", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx4090")]
)
def test_a_card_is_known_by_its_kind(monkeypatch, kind, name):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    counted = Counter({arithmetic.Product("bfloat16", 10**12, 10**12): 2})
    assert measure.peak_seconds(counted) == pytest.approx(4 / cards.CARDS[name].bfloat16)


def test_a_request_that_fails_is_answered():
    assert measure.answer({"do": "time", "row": "matmul float32"}) == {"error": "KeyError: 'reduced'"}


@pytest.mark.slow
def test_a_command_that_fails_is_told_of(tmp_path):
    found = accelerator.run_command(Row("", None, ("train", "nobody")), Args(), tmp_path, 60)
    assert found["error"].startswith("ended with 2: wmjax: error: agent: unknown name 'nobody'")
    assert accelerator.run_command(Row("", None, ("train", "iris")), Args(), tmp_path, 0) == {
        "error": "took more than 1 s"
    }


@pytest.mark.long
@pytest.mark.slow
def test_the_command_times_rows_of_every_kind_in_a_reduced_form(tmp_path):
    out = tmp_path / "rows.json"
    rows = ["matmul float32", "M, 100", "imagination, 64 rows, tokens", "whole: wmjax train world_models"]
    command = [sys.executable, "-m", "benchmarks.accelerator", "--reduced", "--processes", "1", "--out", str(out)]
    root = Path(accelerator.__file__).parents[1]
    subprocess.run([*command, "--only", *rows], cwd=root, check=True)
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 4 and not report["left_out"]
    assert not [row for row in report["rows"].values() if "error" in row]
    assert all(row["value"] > 0 for row in report["rows"].values())
