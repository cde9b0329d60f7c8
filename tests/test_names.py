"""Names that users bring from other projects, and the names that the package shows."""

import ast
import dataclasses
import importlib
import pydoc
from pathlib import Path

import pytest

import wmjax
from wmjax.agents import AGENTS
from wmjax.cli import main
from wmjax.names import SYNONYMS, meant
from wmjax.types import UsageError


@pytest.mark.parametrize(
    "agent, flag, hint",
    [
        ("dreamer_v3", "--agent.lr", "--agent.learning_rate?"),
        ("dreamer_v3", "--lr", "--agent.learning_rate?"),
        ("dreamer_v3", "--learning-rate", "--agent.learning_rate?"),
        ("dreamer_v2", "--agent.lr", "--agent.model_lr, --agent.actor_lr or --agent.critic_lr?"),
        ("iris", "--agent.actor-learning-rate", "--agent.actor_critic_rate?"),
        ("dreamer_v3", "--agent.actor_lr", "--agent.learning_rate?"),
        ("iris", "--agent.model_lr", "--agent.world_model_rate?"),
        ("dreamer_v3", "--gamma", "--agent.discount_horizon?"),
        ("dreamer_v1", "--agent.gamma", "--agent.discount?"),
        ("dreamer_v3", "--n_envs", "--agent.num_envs?"),
        ("dreamer_v3", "--num-envs", "--agent.num_envs?"),
        ("dreamer_v3", "--total_timesteps", "--steps?"),
        ("dreamer_v3", "--agent.total-timesteps", "--steps?"),
        ("dreamer_v3", "--buffer_size", "--agent.replay_capacity?"),
        ("dreamer_v3", "--batch_size", "--agent.batch_size?"),
        ("dreamer_v3", "--agent.imag_horizon", "--agent.horizon?"),
        ("dreamer_v3", "--logdir", "--out?"),
        ("dreamer_v3", "--task", "--env?"),
        ("dreamer_v3", "--env-id", "--env?"),
        ("dreamer_v3", "--agent.seed", "--seed?"),
        ("dreamer_v3", "--ent-coef", "--agent.entropy_scale?"),
        ("dreamer_v3", "--agent.horizen", "--agent.horizon?"),
        ("dreamer_v3", "--agent.actor_layer", "--agent.actor_layers?"),
        ("world_models", "--popsize", "--agent.evolve.population?"),
        ("dreamer_v3", "--xyzzy", "see --help"),
    ],
)
def test_an_unknown_option_gives_the_nearest_in_meaning(agent, flag, hint, capsys):
    assert main(["train", agent, flag, "1"]) == 2
    assert capsys.readouterr().err.strip().endswith(f"{flag}: unknown option; did you mean {hint}".replace(
        "did you mean see", "see"
    ))  # fmt: skip


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (dict(lr=1e-4), "'learning_rate'"),
        (dict(n_envs=4), "'num_envs'"),
        (dict(total_timesteps=100), "'steps'"),
        (dict(logdir="x"), "'out'"),
        (dict(callbacks=[]), "'callback'"),
        (dict(config={}), "read_config"),
    ],
)
def test_python_gives_them_too(arguments, hint):
    with pytest.raises(UsageError, match=hint) as caught:
        wmjax.train("dreamer_v3", "catch", **arguments)
    assert "\n" not in str(caught.value)


def test_the_table_leads_to_names_that_there_are():
    from wmjax.cli.arguments import EvalArgs, TrainArgs

    ours = {field.name for args in (TrainArgs, EvalArgs) for field in dataclasses.fields(args)}
    for config, *_ in AGENTS.values():
        for field in dataclasses.fields(config):
            ours.add(field.name)
            if dataclasses.is_dataclass(field.default):
                ours |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.default)}
    ours |= {"agent", "progress", "callback", "env_args"}
    assert not {name for names in SYNONYMS.values() for name in names.split()} - ours


def test_what_is_far_from_everything_gives_no_hint():
    assert meant("xyzzy", ["seed", "steps"]) == [] and meant("", ["seed"]) == [] and meant("seed", []) == []


def test_dir_help_the_table_of_homes_and_the_type_checker_know_the_same_names():
    shown = [name for name in dir(wmjax) if not name.startswith("_")]
    assert shown == sorted(wmjax.__all__) == sorted(wmjax._HOME)
    tree = ast.parse(Path(wmjax.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    stubs = {alias.name: node.module for node in block.body for alias in node.names}
    assert stubs == {name: f"wmjax.{home}" for name, home in wmjax._HOME.items()}
    for name, home in stubs.items():
        assert getattr(wmjax, name) is getattr(importlib.import_module(home), name)
    text = pydoc.plain(pydoc.render_doc(wmjax))
    assert all(name in text for name in wmjax.__all__)


def test_a_raw_env_can_be_written_with_public_names():
    for name in ("RawEnv", "Outcome", "auto_reset", "time_limit", "EnvSpec", "Box", "Discrete", "MultiDiscrete"):
        assert getattr(wmjax, name).__doc__
