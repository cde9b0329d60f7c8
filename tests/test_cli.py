import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import wmjax
from tests.test_run import ENV, TINY
from wmjax import cli
from wmjax.cli import main
from wmjax.cli.arguments import env_args
from wmjax.types import UsageError

FIELDS = [word for name, value in TINY.items() for word in (f"--agent.{name}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "dreamer_v3", "--env", ENV, "--steps", "60", "--out", str(path), *FIELDS]) == 0
    return path


def fails(capsys, arguments, *words, code=2):
    """The command fails with one line on standard error that has all these words."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("wmjax: error: ")
    missing = [word for word in words if word not in lines[0]]
    assert not missing, lines[0]


def test_training_says_what_it_does_and_ends_with_the_folder_and_the_digest(run, capsys):
    arguments = ["train", "dreamer_v3", "--out", str(run), "--resume"]  # with the settings that it has
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("compilation cache /") == 1
    assert f"dreamer_v3 on {ENV}, preset small, seed 0, 60 env steps" in out
    for name in ("horizon=3", "learning_rate=0.01", "unimix=0.01"):
        assert name in out.split()
    end = out.splitlines()[-3:]
    assert end[0].startswith("mean return ") and "over 100 episodes" in end[0]
    assert end[1] == f"run folder {run}"
    assert end[2].startswith("state sha256 ") and len(end[2].split()[-1]) == 64


def test_config_json_tells_what_the_run_is_and_is_a_file_of_settings(run, capsys):
    said = json.loads((run / "config.json").read_text())
    about = said["about"]
    assert about["parameters"] == sum(about["parameters_of"].values()) > 0
    assert said["config"]["depth"] is None and about["config"]["depth"] == 4  # of `size=small`
    assert about["config"]["deter"] == 8 and set(about["versions"]) == {"python", "jax", "jaxlib", "wmjax"}
    capsys.readouterr()
    assert main(["train", "--config", str(run / "config.json"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "about" not in printed and f"env: {ENV}" in printed and "deter: 8" in printed


def test_a_run_is_resumed_without_its_agents_name_and_not_with_another(run, capsys):
    assert main(["train", "--resume", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "changed settings" not in out and "depth=4" in out and "parameters (" in out
    fails(capsys, ["train", "dreamer_v2", "--resume", "--out", str(run)], "'dreamer_v3'", "'dreamer_v2'")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("trian", ["'trian'", "'train'"]),
        ("train", ["agent", "missing", "dreamer_v3"]),
        ("train dreamr_v3", ["agent", "'dreamr_v3'", "'dreamer_v3'"]),
        ("train dreamer_v3 --env pendulun", ["env", "'pendulun'", "'pendulum'"]),
        ("train dreamer_v3 --preset papers", ["preset", "'papers'", "'paper'"]),
        ("train dreamer_v3 --sed 1", ["--sed", "--seed"]),
        ("train dreamer_v3 --seed one", ["--seed: 'one' is not valid; a whole number is"]),
        ("train dreamer_v3 --seconds long", ["--seconds: 'long' is not valid; a number is"]),
        ("train dreamer_v3 --seed", ["--seed"]),
        ("train dreamer_v3 --seed -1", ["seed", "-1"]),
        ("train dreamer_v3 --steps 0", ["steps", "0"]),
        ("train dreamer_v3 --image-size 7", ["image_size", "7"]),
        ("train dreamer_v3 more", ["more"]),
        ("train dreamer_v3 --agent.horizen 3", ["--agent.horizen", "--agent.horizon"]),
        ("train dreamer_v3 --agent.horizon 0", ["horizon", "0"]),
        ("train dreamer_v3 --agent.horizon soon", ["--agent.horizon: 'soon' is not valid; a whole number is"]),
        ("train dreamer_v3 --agent.horizon 1.5", ["--agent.horizon", "'1.5'"]),
        ("train dreamer_v3 --agent.size 2m", ["--agent.size", "'2m'", "12m"]),
        ("train dreamer_v3 --agent.replay_capacity 100", ["replay_capacity", "100"]),
        ("train dreamer_v3 --resume", ["resume", "out"]),
        ("train --resume", ["resume", "--out RUN"]),
        ("train --resume --out {empty}", ["{empty}", "not a run folder"]),
        ("train dreamer_v3 --config", ["--config"]),
        ("train dreamer_v3 --config {empty}", ["config", "{empty}"]),
        ("train dreamer_v3 --dry-run --seed -1", ["seed", "-1"]),
        ("list envs pendulun", ["'pendulun'", "'pendulum'"]),
        ("list envs [", ["'['", "glob"]),
        (f"train dreamer_v3 --seed {'9' * 5000}", ["--seed", "9 ... 9", "5000 digits"]),
        (f"eval {{empty}} --env-arg level {'[' * 10**5}", ["env_args", "level", "levels"]),
        ("eval", ["RUN"]),
        ("eval {empty}", ["{empty}", "not a run folder"]),
        ("eval {empty} --action greedy", ["--action", "'greedy'", "sample", "mode"]),
        ("dream {empty}", ["{empty}", "not a run folder"]),
        ("plot", ["run"]),
        ("plot {empty}", ["{empty}", "not a run folder"]),
        ("list env", ["'env'", "envs"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(arguments, words, tmp_path, capsys):
    place = lambda text: text.replace("{empty}", str(tmp_path))
    fails(capsys, place(arguments).split(), *map(place, words))
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_not_overwritten_nor_continued_with_other_settings(run, capsys):
    arguments = ["train", "dreamer_v3", "--env", ENV, "--out", str(run), *FIELDS]
    fails(capsys, arguments, "out", str(run), "not empty")
    fails(capsys, [*arguments, "--resume", "--seed", "3"], "seed", "0", "3")


def test_evaluation_of_a_run(run, capsys):
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "20", "--seed", "1", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores)[:8] == ["mean", "std", "iqm", "ci95", "episodes", "returns", "lengths", "cut"]
    assert scores["episodes"] == len(scores["returns"]) == 20
    assert scores["mean"] == pytest.approx(sum(scores["returns"]) / 20)
    saved = json.loads((run / "eval.json").read_text())
    assert saved["returns"] == scores["returns"]
    assert main(["eval", str(run), "--episodes", "20", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert f"mean return {scores['mean']:.3f}" in out
    (file,) = (run / "evals").glob("step-60-latest-probe-act_obs-*-mode-seed-1-20-episodes.json")
    assert f"{ENV}, latest checkpoint, step 60; seed 1, action mode" in out and "were cut" not in out
    assert out.splitlines()[-1] == f"wrote {file} and {run / 'eval.json'}"
    fails(capsys, ["eval", str(run), "--episodes", "0"], "episodes", "0")
    fails(capsys, ["eval", str(run), "--env", "catch"], "obs", "image", "vector")
    fails(capsys, ["eval", str(run), "--video"], "video", "vector")


def test_evaluations_of_a_run_are_kept_side_by_side(run, capsys):
    assert main(["eval", str(run), "--episodes", "5", "--action", "sample"]) == 0
    kept = {path.name.split("-act_obs-")[-1].partition("-")[2] for path in (run / "evals").iterdir()}
    assert kept >= {
        "mode-seed-0-100-episodes.json",
        "sample-seed-0-5-episodes.json",
    }  # what training ended with, and this
    (whole,) = (run / "evals").glob("*-mode-seed-0-100-episodes.json")
    found = json.loads(whole.read_text())
    assert len(found["returns"]) == len(found["lengths"]) == 100
    assert {name: found[name] for name in ("step", "which", "env", "action", "seed", "cut")} == {
        "step": 60, "which": "latest", "env": ENV, "action": "mode", "seed": 0, "cut": 0,
    }  # fmt: skip
    newest = json.loads((run / "eval.json").read_text())
    assert (newest["action"], newest["episodes"]) == ("sample", 5)
    assert main(["eval", str(run), "--episodes", "5", "--which", "best"]) == 0
    assert "best checkpoint, step " in capsys.readouterr().out and list(
        (run / "evals").glob("*-best-*-5-episodes.json")
    )


@pytest.mark.parametrize("how", ["read only", "a file"])
def test_where_scores_cannot_be_kept_they_are_shown_all_the_same(run, how, capsys, monkeypatch, tmp_path):
    import errno
    import shutil

    from wmjax import run_folder

    copy, code = tmp_path / "run", errno.EROFS if how == "read only" else None
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evals")
    if code is None:
        (copy / "evals").write_text("")

    def fails(path, *parts):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(run_folder.files, "write", fails if code else run_folder.files.write)
    for arguments in ([], ["--json"]):
        assert main(["eval", str(copy), "--episodes", "3", *arguments]) == 0
        out, err = capsys.readouterr()
        assert "3 episodes: mean return" in out or json.loads(out)["episodes"] == 3
        assert err.startswith("wmjax: warning: the scores cannot be kept") and err.count("\n") == 1
        assert "wrote" not in out


def test_a_dream_of_a_run(run, capsys):
    assert main(["dream", str(run), "--context", "2", "--horizon", "3"]) == 0
    written = f"wrote {run / 'dream.png'} and {run / 'dream.json'}"  # a vector has no picture
    assert capsys.readouterr().out.splitlines()[-1] == written
    errors = json.loads((run / "dream.json").read_text())
    assert (errors["context"], errors["horizon"], len(errors["vector"]["model"])) == (2, 3, 3)
    # An episode has two records, so no window sees the same one two steps later.
    assert errors["count"][0] > 0 and errors["count"][1:] == [0, 0]
    fails(capsys, ["dream", str(run), "--horizon", "0"], "horizon", "0")


def test_a_dream_is_not_written_where_the_folder_of_a_seed_is_a_link(tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "seed-0").symlink_to(tmp_path / "elsewhere")
    seeds = SimpleNamespace(members=[SimpleNamespace(path=tmp_path / "seed-0")])
    monkeypatch.setattr("wmjax.run.load", lambda path, **how: seeds)
    fails(capsys, ["dream", str(tmp_path)], "it is a link", "seed-0", code=1)


def test_a_plot_of_runs(run, tmp_path, capsys):
    assert main(["plot", str(run), str(run), "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run)]) == 0
    assert (run / "learning_curve.png").exists()
    damaged = shutil.copytree(run, tmp_path / "damaged")
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write("3\n")
    capsys.readouterr()
    assert main(["plot", str(damaged)]) == 0
    assert capsys.readouterr().err.count("1 line is not of metrics") == 1


@pytest.mark.parametrize(
    "what, names",
    [("agents", ["dreamer_v3"]), ("envs", ["catch", "pendulum"]), ("presets", ["small", "guide", "paper"])],
)
def test_lists(what, names, capsys):
    assert main(["list", what]) == 0
    words = capsys.readouterr().out.split()
    assert set(names) <= set(words)


def test_help_shows_the_commands_and_an_agents_fields_with_the_presets_values(capsys):
    assert main([]) == 0
    assert "wmjax train AGENT" in capsys.readouterr().out
    assert main(["train", "dreamer_v3", "--preset", "guide", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--agent.batch-size INT" in out and "(default: 50)" in out
    assert main(["train", "--help"]) == 0
    assert "--image-size" in capsys.readouterr().out


def test_signals_become_exit_codes(monkeypatch, capsys, tmp_path):
    from wmjax import training

    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):

        def stop(*args, signum=signum, **kwargs):
            raise wmjax.Interrupted(signum, tmp_path)

        monkeypatch.setattr(training, "train", stop)
        assert main(["train", "dreamer_v3"]) == code
        assert capsys.readouterr().err == f"wmjax: interrupted; saved in {tmp_path}\n"


def test_what_the_storage_logs_is_not_shown_beside_the_line_that_says_it(capsys):
    main(["list", "agents"])
    for name in ("absl", "asyncio"):
        logging.getLogger(name).error("RESOURCE_EXHAUSTED")
        assert "RESOURCE_EXHAUSTED" not in capsys.readouterr().err
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)


def test_an_interrupt_while_garbage_is_collected_is_not_lost(monkeypatch):
    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", cli._unraisable)
    gc.callbacks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        gc.collect()  # where Python drops it
        for _ in range(1000):
            time.sleep(0.01)


def test_a_damaged_checkpoint_is_one_line_and_exit_code_1(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    manifest = next((copy / "checkpoints").glob("*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"step": ', '"step": 1'))
    fails(capsys, ["eval", str(copy)], str(manifest), "SHA-256", code=1)


def test_the_command_itself_prints_one_line_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v4"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("wmjax: error: agent: ")
    assert UsageError.__name__ not in done.stderr


NUMBERS = [("-.5", -0.5), (".5", 0.5), ("+3", 3), ("+1e3", 1e3), ("5.", 5.0), ("1e3", 1e3), ("-1.5e-3", -15e-4)]
TEXTS = ["007", "+007", "00.5", "+" + "1" * 5000, "v1.0", "nan", "1_0", ".", "+", "1.2.3", "٣.٠", "[1, .5]"]
OTHERS = [('"5"', "5"), ("True", True), ("null", None)]


@pytest.mark.parametrize(("text", "value"), [*NUMBERS, *((text, text) for text in TEXTS), *OTHERS])
def test_an_argument_of_an_environment_is_a_number_where_it_reads_as_one(text, value):
    found = env_args([("a", text)])["a"]
    assert found == value and type(found) is type(value)


def test_what_a_dream_came_to_is_shown_where_it_cannot_be_kept(run, capsys, monkeypatch):
    from wmjax import run_folder

    def fails(path, *parts):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(run_folder.files, "write", fails)
    assert main(["dream", str(run), "--context", "2", "--horizon", "3"]) == 1
    out, err = capsys.readouterr()
    assert "vector, error of model at horizons 1 to " in out and err.count("\n") == 1 and "wrote" not in out


def test_a_dream_is_written_where_nobody_reads_what_is_said_of_it(run, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    (run / "dream.json").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["dream", str(run), "--context", "2", "--horizon", "3"]) == 0
    assert (run / "dream.json").exists()
