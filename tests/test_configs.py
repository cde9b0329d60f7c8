"""Files of settings: what is read back is what was printed, and what is not valid is said with the file and the key."""

import dataclasses
import json
import os

import pytest
import yaml

import wmjax
from wmjax import presets, settings
from wmjax.cli import configs, main
from wmjax.types import UsageError


def printed(capsys, *words):
    capsys.readouterr()
    assert main(["train", *map(str, words), "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["dreamer_v3"],
        ["dreamer_v2", "--preset", "guide", "--env", "pendulum", "--seed", 3, "--agent.horizon", 7],
        ["dreamer_v3", "--agent.encoder-units", 8, 9, "--max-skipped", 5, "--memory-map", "--workers", 3],
        ["iris"],
        ["world_models", "--agent.evolve.population", 12, "--seeds", 2],
    ],
    ids=lambda words: words[0],
)
def test_what_is_printed_is_read_back(words, tmp_path, capsys):
    text = printed(capsys, *words)
    (tmp_path / "c.yaml").write_text(text)
    assert printed(capsys, "--config", tmp_path / "c.yaml") == text
    (tmp_path / "c.json").write_text(json.dumps(yaml.load(text, configs._Loader)))
    assert printed(capsys, "--config", tmp_path / "c.json") == text
    assert printed(capsys, words[0], f"--config={tmp_path / 'c.yaml'}") == text


def test_options_go_before_the_file_and_the_file_before_the_preset(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("agent: dreamer_v3\nseed: 3\nconfig:\n  learning_rate: 1e-4\n  horizon: 7\n")
    said = yaml.safe_load(printed(capsys, "--config", tmp_path / "c.yaml", "--seed", 4, "--agent.horizon", 9))
    assert (said["seed"], said["config"]["horizon"], said["config"]["learning_rate"]) == (4, 9, 1e-4)
    small = presets.resolve("dreamer_v3")[0]
    assert said["config"]["warmup"] == small.warmup


def test_another_preset_or_environment_brings_its_own_settings_and_keeps_what_the_file_changed(tmp_path, capsys):
    whole = printed(capsys, "dreamer_v3", "--env", "catch", "--agent.horizon", 7)
    (tmp_path / "c.yaml").write_text(whole)
    said = yaml.safe_load(printed(capsys, "--config", tmp_path / "c.yaml", "--preset", "guide", "--env", "pendulum"))
    wanted, settings = presets.resolve("dreamer_v3", "guide", "pendulum", {"horizon": 7})
    assert said["config"]["size"] == wanted.size == "guide" and said["config"]["horizon"] == 7
    assert said["steps"] == settings.steps


def test_how_long_is_searched_is_the_environments_until_it_is_chosen(tmp_path, capsys):
    config = lambda *words: yaml.safe_load(printed(capsys, *words))["config"]["evolve"]
    of = lambda env: dataclasses.asdict(presets.resolve("world_models", "small", env)[0].evolve)
    assert of("catch") != of("racing")
    assert config("world_models") == of("racing") and config("world_models", "--env", "catch") == of("catch")
    chosen = config("world_models", "--env", "catch", "--agent.evolve.rollouts", of("racing")["rollouts"])
    assert chosen == of("catch") | {"rollouts": of("racing")["rollouts"]}
    changed = ("world_models", "--env", "catch", "--agent.evolve.mean-every", 7)
    (tmp_path / "c.yaml").write_text(printed(capsys, *changed))
    assert config("--config", tmp_path / "c.yaml") == of("catch") | {"mean_every": 7}
    assert config("--config", tmp_path / "c.yaml", "--env", "racing") == of("racing") | {"mean_every": 7}


def test_what_a_file_says_that_names_no_environment_or_preset_is_kept_for_any(tmp_path, capsys):
    small, racing = presets.resolve("dreamer_v3")[0], presets.resolve("world_models", "small", "racing")[0].evolve
    (tmp_path / "a.yaml").write_text(f"agent: dreamer_v3\nsteps: 32000\nconfig: {{horizon: {small.horizon}}}\n")
    said = yaml.safe_load(printed(capsys, "--config", tmp_path / "a.yaml", "--env", "pendulum", "--preset", "guide"))
    assert (said["steps"], said["config"]["horizon"]) == (32_000, small.horizon)
    (tmp_path / "b.yaml").write_text(f"agent: world_models\nconfig: {{evolve: {{rollouts: {racing.rollouts}}}}}\n")
    said = yaml.safe_load(printed(capsys, "--config", tmp_path / "b.yaml", "--env", "catch"))
    assert said["config"]["evolve"]["rollouts"] == racing.rollouts


def test_arguments_of_the_files_environment_are_not_those_of_another(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("agent: dreamer_v3\nenv: gym:FrozenLake-v1\nenv_args: {is_slippery: false}\n")
    file = ("--config", tmp_path / "c.yaml")
    assert yaml.safe_load(printed(capsys, *file, "--seed", 1))["env_args"] == {"is_slippery": False}
    assert "is_slippery" not in printed(capsys, *file, "--env", "gym:CartPole-v1")


@pytest.mark.parametrize(
    "text, words",
    [
        ("env: gym:Hopper-v5\nenv_args: {xml_file: ./evil.xml}", []),
        ("env: gym:evil:Walk", []),
        ("env_args: {xml_file: ./evil.xml}", ["--env", "gym:Hopper-v5"]),
    ],
)
def test_what_a_file_names_needs_the_users_word(text, words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"agent: dreamer_v3\n{text}\n")
    assert main(["train", "--dry-run", "--config", str(tmp_path / "c.yaml"), *words]) == 2
    assert "--trust-env" in capsys.readouterr().err


def test_a_file_of_a_run_on_a_value_needs_a_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"agent": "dreamer_v3", "env": null}')
    file = ("--config", tmp_path / "config.json")
    assert main(["train", "--dry-run", *map(str, file)]) == 2
    assert "is of a run on an Env value" in capsys.readouterr().err
    assert yaml.safe_load(printed(capsys, *file, "--env", "probe:act"))["env"] == "probe:act"


BAD = {
    "learning_rate: [": "neither YAML nor JSON (line 1)",
    "- 1": "no settings by name",
    "3": "no settings by name",
    "agent: dreamr_v3": "did you mean 'dreamer_v3'?",
    "agent: 3": "agent",
    "seed: one": "seed: 'one'",
    "seed: true": "seed: True",
    "sed: 1": "did you mean 'seed'?",
    "total_timesteps: 5": "did you mean 'steps'?",
    "config: {lr: 1}": "did you mean 'learning_rate'?",
    "config: {horizon: soon}": "horizon: 'soon'",
    "config: [1]": "config: [1]",
    "config: {1: 2}": "config: {1: 2}",
    "env_args: 3": "env_args: 3",
    "resume: true": "resume",
    "seed: 1\nseed: 2": "'seed' comes twice",
    "a: &a [1]\nb: *a": "references",
    "seed: !!python/object/apply:os.system [true]": "neither YAML nor JSON",
    "{" * 10_000: "neither YAML nor JSON",
    "a: \x00": "neither YAML nor JSON",
    "env: 'gym:not_installed_module:X-v0'": "trust",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30])
def test_what_is_not_valid_in_a_file_is_one_line_with_the_file_and_the_key(text, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["train", "dreamer_v3", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and BAD[text] in lines[0] and not (tmp_path / "run").exists()
    if "trust" not in BAD[text]:
        assert str(path) in lines[0]
    with pytest.raises(UsageError):
        wmjax.train(**{"agent": "dreamer_v3"} | wmjax.read_config(path), out=tmp_path / "run")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "bin"])
def test_what_is_not_a_file_of_text_is_one_line(name, tmp_path, capsys):
    (tmp_path / "bin").write_bytes(bytes(range(256)))
    assert main(["train", "dreamer_v3", "--config", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_has_no_end_or_no_text_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 2**21)
    for name, word in (("pipe", "not a regular file"), ("large", "larger than"), ("", ""), ("none", "No such file")):
        assert main(["train", "dreamer_v3", "--config", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert "config: " in told and "cannot be read: " in told and word in told and told.count("\n") == 1


def test_a_file_of_another_agent_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("agent: dreamer_v3\n")
    assert main(["train", "dreamer_v2", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "is of the agent 'dreamer_v3', not of 'dreamer_v2'" in capsys.readouterr().err


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "dreamer_v3", "--dry-run", "--steps", "2048", "--agent.train_ratio", "16"]) == 0
    out = capsys.readouterr().out
    for words in (
        "deter=128", "286,674 parameters", "replay of 100,000 records, 1.28 GB",
        "stages prefill 64 iterations, train 64",
        "2,048 env steps, 64 updates", "jax ",
    ):  # fmt: skip
        assert words in out, words
    assert not list(tmp_path.iterdir())
    assert "not begin" not in out
    assert main(["train", "dreamer_v3", "--dry-run", "--checkpoint-seconds", "-1"]) == 2


def test_a_dry_run_says_where_a_run_would_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = "--agent.size=1m", "--agent.replay_capacity"
    assert main(["train", "dreamer_v3", "--dry-run", *few, str(2**31 - 1)]) == 0
    refused = capsys.readouterr().out.splitlines()[-2]
    assert refused.startswith("it would not begin here: replay_capacity: 2147483647 records of") and "free" in refused
    monkeypatch.setattr("wmjax.loops.host.loop.available_bytes", lambda: 10**6)
    assert main(["train", "dreamer_v3", "--env", "gym:CartPole-v1", "--dry-run", *few, "100000", "--out", "a/b"]) == 0
    refused = capsys.readouterr().out.splitlines()[-2]
    assert refused.startswith("it would not begin here: replay_capacity: 100000 needs") and "--memory-map" in refused
    assert not list(tmp_path.iterdir())


def test_arguments_for_python(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(printed(capsys, "dreamer_v3", "--seed", 3, "--agent.horizon", 7))
    arguments = wmjax.read_config(tmp_path / "c.yaml")
    assert (arguments["agent"], arguments["seed"], arguments["horizon"]) == ("dreamer_v3", 3, 7)
    assert "config" not in arguments


def test_what_a_run_says_that_is_older_than_sharded_parameters_is_made_on_the_host_too():
    made = settings.setup("dreamer_v3", "gym:CartPole-v1")
    old = {name: value for name, value in made.description.items() if name != "shard_params"}
    assert settings.make(old, made.config, made.description["env"], 1).description["shard_params"] == 1


def test_what_the_steps_asked_for_do_not_say_is_said(capsys):
    assert main(["train", "iris", "--dry-run", "--steps", "5000", "--agent.actor_critic_after", "100000"]) == 0
    assert "the steps end before the stage 'train', which begins after " in capsys.readouterr().out
    assert main(["train", "dreamer_v2", "--dry-run", "--steps", "6000", "--agent.train_every", "90000"]) == 0
    assert "91,024 env steps are taken, for a stage collects many at once" in capsys.readouterr().out
    assert main(["train", "dreamer_v3", "--dry-run", "--steps", "6000"]) == 0
    out = capsys.readouterr().out
    assert "are taken" not in out and "the steps end" not in out
