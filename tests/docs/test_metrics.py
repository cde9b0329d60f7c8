"""The glossary has every name that a run writes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from tests.agents.test_configurations import TINY, environment
from tests.docs.pages import DOCS
from tests.marks import partly_long
from wmjax.agents import AGENTS
from wmjax.loops import device
from wmjax.loops.host.learning import Clock
from wmjax.loops.report import Report
from wmjax.types import Discrete

PAGE = (DOCS / "metrics.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `([\w/]+)` \|", PAGE, re.MULTILINE)
KNOWN = re.compile("|".join(name.replace("NAME", "[^/]+") for name in NAMES))
# Options that add a name.
MORE = {
    "iris": {"perceptual": "multiscale"},
    "world_models": {"perceptual": "multiscale", "prediction_penalty": 0.1, "reward_head": "mse", "done_head": True},
}


def metrics_of(agent):
    """Names that the stages of an agent give, read from what they are traced to."""
    env = environment(agent, Discrete(3))
    made = AGENTS[agent][1](env.spec, dataclasses.replace(TINY[agent], **MORE.get(agent, {})))
    run = jax.eval_shape(lambda key: device.init(made, env, key), jax.random.key(0))
    names = set()
    for stage in made.recipe.stages:
        names |= set(jax.eval_shape(device.make_stage(made, env, stage), run, jnp.int32(1))[1])
    return names


def unknown(names):
    return {name for name in names if not KNOWN.fullmatch(name)}


def test_no_name_is_there_twice():
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("agent", partly_long(AGENTS, ("dreamer_v3", "iris", "world_models")))
def test_every_metric_of_an_agent_is_in_the_glossary(agent):
    found = metrics_of(agent)
    assert len(found) > 10 and not unknown(found)


@pytest.mark.slow
def test_every_metric_of_the_glossary_is_of_an_agent_or_of_the_loops():
    found = set().union(*map(metrics_of, AGENTS))
    names = {name for name in NAMES if name.partition("/")[0] in {x.partition("/")[0] for x in found} - {"episode"}}
    lost = {name for name in names if not any(re.fullmatch(name.replace("NAME", "[^/]+"), x) for x in found)}
    assert lost <= {"controller/restarts", "memory/resident_gb"}  # the latter is the host loop's


def test_what_the_loops_add_is_in_the_glossary(tmp_path):
    with Report(tmp_path) as report:
        line = report.log("train", 1, 1, {"skipped": 0, "eval/return": 0, "eval/length": 0, "eval/cut": 0})
    clock = Clock()
    assert not unknown({*line, *clock.shares(), "envs/restarts", "memory/resident_gb"})
