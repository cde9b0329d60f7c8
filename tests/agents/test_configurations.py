"""Whatever configuration is valid can be trained: all its programs can be traced, and none means over nothing."""

import dataclasses
import types
import typing
from typing import Literal

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from tests.agents.batches import TINY_IRIS, TINY_V1, TINY_V2, TINY_V3
from tests.agents.world_models.made import TINY as TINY_WORLD_MODELS
from tests.loops.fakes import counter_env
from tests.marks import partly_long
from wmjax.agents import AGENTS
from wmjax.arithmetic import programs_in
from wmjax.loops import device, schedule
from wmjax.types import Box, Discrete, Env, UsageError

TINY = {
    "dreamer_v1": TINY_V1,
    "dreamer_v2": TINY_V2,
    "dreamer_v3": TINY_V3,
    "iris": TINY_IRIS,
    "world_models": TINY_WORLD_MODELS,
}
DREAMERS = ("dreamer_v1", "dreamer_v2", "dreamer_v3")
SPACES = [Discrete(3), Box(-1.0, 1.0, (2,))]


def environment(agent: str, space) -> Env:
    """Ends after four steps; seen as a picture, and by the Dreamers as a vector too."""
    size, names = (64 if agent == "world_models" else 16), {"image"} | ({"vector"} if agent in DREAMERS else set())
    env = counter_env(size=size, space=space)
    obs = env.spec.obs | {"image": Box(0, 255, (size, size, 3), "uint8")}
    seen = lambda step: step._replace(obs={name: step.obs[name] for name in names})
    after = lambda state, step: (state, seen(step))
    return Env(
        env.spec._replace(obs={name: obs[name] for name in names}),
        lambda key: after(*env.reset(key)),
        lambda key, state, action: after(*env.step(key, state, action)),
    )


def values(hint):
    """Small values of a field's type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of([values(one) for one in typing.get_args(hint)])
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(st.sampled_from([1, 2, 3, 8]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return changes(hint)
    return {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16]),
        float: st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 6.0]),
        str: st.just("nowhere"),
    }[hint]


def changes(config_class):
    """Some fields, in any order, and their new values."""
    hints = typing.get_type_hints(config_class)
    pairs = st.sampled_from(list(hints)).flatmap(lambda name: st.tuples(st.just(name), values(hints[name])))
    return st.lists(pairs, max_size=14)


def changed(config, pairs, valid):
    """The configuration after those changes that leave it valid, one after the other."""
    for name, value in pairs:
        if dataclasses.is_dataclass(part := getattr(config, name)):
            value = changed(
                part, value, lambda new, name=name, config=config: valid(dataclasses.replace(config, **{name: new}))
            )
        candidate = dataclasses.replace(config, **{name: value})
        config = candidate if valid(candidate) else config
    return config


def means_of_nothing(jaxpr) -> list[str]:
    """Reductions of arrays without entries, anywhere in a traced program."""
    found = [str(e) for e in jaxpr.eqns if e.primitive.name in ("reduce_sum", "argmax") and not e.invars[0].aval.size]
    return found + [text for e in jaxpr.eqns for inner in programs_in(e.params) for text in means_of_nothing(inner)]


def trace(agent, env) -> None:
    """Acting in evaluation, and every stage of the recipe in the device loop."""
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    act = lambda params, key, carry, step: agent.act(params, key, carry, step, explore=False)
    jax.eval_shape(act, run.agent.variables, jax.random.key(0), run.carry, run.timestep)
    for stage in agent.recipe.stages:
        program = jax.make_jaxpr(device.make_stage(agent, env, stage))(run, jnp.int32(1))
        assert not means_of_nothing(program.jaxpr), stage.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:perceptual")
@pytest.mark.parametrize("name", partly_long(AGENTS, ("dreamer_v3", "iris")))
def test_every_valid_configuration_can_be_traced(name):
    @hypothesis.settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(changes(type(TINY[name])), st.sampled_from(SPACES))
    def check(pairs, space):
        env = environment(name, space)

        def made(config):
            agent = AGENTS[name][1](env.spec, config)
            schedule.check(agent)
            return agent

        def valid(config):
            try:
                made(config)
            except UsageError:
                return False
            return True

        hypothesis.assume(valid(TINY[name]))
        config = changed(TINY[name], pairs, valid)
        hypothesis.note(repr(config))
        trace(made(config), env)

    check()
