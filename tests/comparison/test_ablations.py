"""Every ablation makes an agent that is valid and differs in what it says alone."""

import dataclasses

import pytest

from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.comparison.ablations import ABLATIONS, ablations
from wmjax.envs import make_env
from wmjax.loops.schedule import check


def leaves(fields, path=()):
    """Every field by its path, those of parts too."""
    found = {}
    for name, value in fields.items():
        found |= leaves(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
    return found


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda ablation: f"{ablation.agent}-{ablation.name}")
def test_an_ablation_makes_an_agent_for_its_task_that_differs_in_exactly_what_it_says(ablation):
    env = ablation.env or presets.default_env(ablation.agent)
    whole, settings = presets.resolve(ablation.agent, env=env)
    changed, _ = presets.resolve(ablation.agent, env=env, overrides=ablation.changes)
    before, after = leaves(dataclasses.asdict(whole)), leaves(dataclasses.asdict(changed))
    said = leaves(ablation.changes)
    assert {path for path in before if before[path] != after[path]} == set(said)
    assert {path: after[path] for path in said} == said
    spec = make_env(env, image_size=settings.image_size, action_repeat=settings.action_repeat).spec
    check(AGENTS[ablation.agent][1](spec, changed))
    assert ablation.about.endswith(".") and ablation.source


def test_every_agent_has_ablations_and_each_a_name_of_its_own():
    assert sum(len(ablations(agent)) for agent in AGENTS) == len(ABLATIONS)
    assert all(len(ablations(agent)) >= 3 for agent in AGENTS)
