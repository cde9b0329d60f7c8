"""Functions of the user's in the place of the paper's: every one is used, written down, and asked for again."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmjax
from tests.agents.batches import TINY_IRIS, TINY_V1, TINY_V2, TINY_V3
from tests.agents.world_models.made import TINY as TINY_WORLD_MODELS
from tests.test_run import TINY
from wmjax import optim, settings
from wmjax.agents import AGENTS
from wmjax.agents import dreamer_v3 as v3
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import device
from wmjax.run_folder import read_description

CONFIGS = {
    "dreamer_v1": TINY_V1,
    "dreamer_v2": TINY_V2,
    "dreamer_v3": TINY_V3,
    "iris": TINY_IRIS,
    "world_models": TINY_WORLD_MODELS,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("dreamer_v1", "iris"))) for name in AGENTS]
)
def test_every_equation_is_used_as_it_is_given(name):
    _, factory, equations = AGENTS[name]
    called = set()

    def noted(field, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            called.add(field)
            return function(*args, **kwargs)

        return call

    mine = equations(*(noted(*item) for item in equations._field_defaults.items()))
    env = agent_actions(make_env("catch", image_size=64 if name == "world_models" else 16))
    agent = factory(env.spec, CONFIGS[name], None, mine)
    state = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    for stage in agent.recipe.stages:
        if stage.updates:
            jax.eval_shape(functools.partial(device.make_stage(agent, env, stage)), state, jnp.int32(1))
    assert called == set(equations._fields)


@pytest.mark.parametrize("name", AGENTS)
def test_the_equations_of_an_agent_are_public_functions_of_the_package_that_say_what_they_take(name):
    for function in AGENTS[name][2]():
        assert inspect.getmodule(function).__name__.startswith("wmjax.") and not function.__name__.startswith("_")
        assert len(inspect.getdoc(function)) > 20


def test_a_term_of_a_new_name_weighs_one():
    total, means = optim.weighted_sum({"old": jnp.ones((2, 2)), "new": jnp.full(3, 5.0)}, {"old": 0.5, "gone": 9.0})
    assert total == 5.5 and means == {"loss/old": 1.0, "loss/new": 5.0}


def halved(posterior, prior, config):
    """The paper's KL, halved."""
    return {name: term / 2 for name, term in v3.kl_losses(posterior, prior, config).items()}


@pytest.mark.parametrize(
    "given, said",
    [
        (halved, "equations: <function halved .* is not valid; wmjax.agents.dreamer_v3.Equations"),
        (AGENTS["iris"][2](), r"is not valid; wmjax.agents.dreamer_v3.Equations\(NAME=function\) is, with names of"),
        (v3.Equations(kl=3), "equations: kl is 3; a function is valid"),
    ],
)
def test_what_is_no_equation_of_the_agent_is_refused(given, said):
    with pytest.raises(wmjax.UsageError, match=said):
        settings.setup("dreamer_v3", "catch", equations=given)


def test_a_run_says_which_equations_are_not_the_papers():
    made = settings.setup("dreamer_v3", "catch", equations=v3.Equations(kl=halved))
    assert made.description["equations"] == {"kl": "tests.test_equations.halved"}
    assert "dreamer_v3 (kl by tests.test_equations.halved) on catch" in settings.describe(made, None)
    assert "equations" not in settings.setup("dreamer_v3", "catch", equations=v3.Equations()).description
    with pytest.raises(wmjax.UsageError, match=r"equations: the run was trained with kl \(tests.*; from Python, give"):
        settings.setup("dreamer_v3", before=made.description)
    half = settings.setup("dreamer_v3", "catch", equations=v3.Equations(kl=functools.partial(halved, config=0.5)))
    assert half.description["equations"] == {"kl": "tests.test_equations.halved(config=0.5)"}


def traced(equations, **fields):
    """The losses and metrics of an update, by their shapes."""
    env = agent_actions(make_env("catch", image_size=16))
    agent = v3.dreamer_v3(env.spec, dataclasses.replace(TINY_V3, **fields), None, equations)
    state = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    return jax.eval_shape(device.make_stage(agent, env, agent.recipe.stages[-1]), state, jnp.int32(1))


def named(name):
    """The paper's world model, with a term of that name more."""

    def losses(parts, params, states, step):
        terms, metrics = v3.world_model_losses(parts, params, states, step)
        return terms | {name: jnp.ones(step.reward.shape)}, metrics

    return losses


@pytest.mark.parametrize(
    "equations, said",
    [
        (v3.Equations(world_model=named("critic")), "equations: the term 'critic' is there already"),
        (v3.Equations(reconstruction=lambda output, target, space, config: output), "reconstruction gives .*16, 16, 3"),
        (v3.Equations(actor=lambda *args: (jnp.zeros(()), jnp.zeros(()))), r"equations: actor gives \[\], and has to"),
        (
            v3.Equations(networks=lambda *args: v3.networks(*args)._replace(decoder=None)),
            "equations: networks gives no 'decoder'",
        ),
    ],
)
def test_what_an_equation_gives_is_held_against_what_it_has_to_give(equations, said):
    with pytest.raises(wmjax.UsageError, match=said):
        traced(equations)


@pytest.mark.slow
def test_a_term_of_its_own_is_among_the_metrics():
    assert "train/loss/own" in traced(v3.Equations(world_model=named("own")))[1]


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_an_equation_of_its_own_is_trained_resumed_loaded_and_exported_with_it(tmp_path):
    mine = v3.Equations(kl=halved)
    folder, how = tmp_path / "run", dict(out=tmp_path / "run", progress=False, seed=3, **TINY)
    first = wmjax.train("dreamer_v3", "catch", steps=60, equations=mine, **how)
    papers = wmjax.train("dreamer_v3", "catch", steps=60, **how | {"out": tmp_path / "papers"})
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, first.state.params, papers.state.params))))
    assert read_description(folder)["equations"] == {"kl": "tests.test_equations.halved"}
    for wrong in (None, v3.Equations(actor=lambda *a: v3.actor_objective(*a))):
        with pytest.raises(wmjax.UsageError, match=r"equations: the run was trained with kl"):
            wmjax.train("dreamer_v3", resume=True, out=folder, steps=80, equations=wrong, progress=False)
    with pytest.raises(wmjax.UsageError, match=r"equations: the run was trained with the paper's kl; leave it"):
        wmjax.load(tmp_path / "papers", equations=mine)
    for given in (None, mine):  # what acts and dreams does not depend on a loss
        run = wmjax.load(folder, equations=given)
        assert run.evaluate(2, action="mode").episodes == 2 and run.equations is given
    wrong = v3.Equations(kl=lambda posterior, prior, config: posterior.unknown)
    with pytest.raises(AttributeError, match="unknown"):
        wmjax.train("dreamer_v3", "catch", steps=60, equations=wrong, **how | {"out": tmp_path / "wrong"})
    assert not (tmp_path / "wrong").exists()
    resumed = wmjax.train("dreamer_v3", resume=True, out=folder, steps=80, equations=mine, progress=False)
    assert resumed.step > first.step
