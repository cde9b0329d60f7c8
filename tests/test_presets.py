import dataclasses

import jax
import pytest

from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.types import Box, Discrete, EnvSpec, UsageError

SPEC = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(3))


@pytest.mark.parametrize("agent, preset", [(agent, name) for agent in AGENTS for name in presets.preset_names(agent)])
def test_every_preset_makes_an_agent(agent, preset):
    config, settings = presets.resolve(agent, preset, "catch")
    made = AGENTS[agent][1](SPEC, config)
    assert jax.eval_shape(made.init, jax.random.key(0)).params
    assert settings.steps > made.recipe.num_envs


def test_small_is_one_configuration_and_only_the_run_differs_between_environments():
    catch, pendulum = (presets.resolve("dreamer_v3", "small", env) for env in ("catch", "pendulum"))
    assert catch[0] == pendulum[0]
    assert catch[1] != pendulum[1]


def test_small_changes_sizes_rates_and_scales_only():
    paper, small = (dataclasses.asdict(presets.resolve("dreamer_v3", name)[0]) for name in ("paper", "small"))
    sizes = {"size", "stem", "bins", "length", "batch_size", "num_envs", "horizon", "imagine_last", "replay_capacity"}
    rates = {"learning_rate", "warmup", "train_ratio", "entropy_scale", "image_scale", "vector_scale", "prefill"}
    assert {name for name in paper if paper[name] != small[name]} <= sizes | rates


def test_paper_is_what_the_authors_published():
    paper, _ = presets.resolve("dreamer_v3", "paper")
    assert (paper.batch_size, paper.length, paper.horizon, paper.learning_rate) == (16, 64, 15, 4e-5)
    assert presets.resolve("dreamer_v3", "paper", overrides={"size": "12m"})[0].dimensions.deter == 2048


def test_guide_has_the_numbers_of_the_guide():
    guide, _ = presets.resolve("dreamer_v3", "guide")
    dims = guide.dimensions
    assert (dims.deter, dims.stoch, dims.classes, dims.units) == (200, 32, 32, 512)
    assert guide.encoder_units == (512, 512, 1024)
    assert (guide.batch_size, guide.length, guide.horizon, guide.free_nats) == (50, 50, 15, 1.0)
    assert (guide.norm, guide.activation, guide.learning_rate) == ("layer", "relu", 6e-4)


def test_settings_of_an_environment_belong_to_small():
    assert presets.resolve("dreamer_v3", "small", "pendulum")[1] == presets.RUNS["pendulum"]
    assert presets.resolve("dreamer_v3", "paper", "pendulum")[1].image_size is None
    assert presets.resolve("dreamer_v3", "small", "never heard of")[1] == presets.DEFAULT_RUN


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("dreamer_v4",), "agent 'dreamer_v4' 'dreamer_v3'"),
        (("dreamer_v3", "smal"), "preset 'smal' 'small'"),
        (("dreamer_v3", "small", None, {"horizn": 3}), "field 'horizn' 'horizon'"),
        (("dreamer_v3", "small", None, {"horizon": 0}), "horizon 0"),
        (("dreamer_v3", "small", None, {"horizon": "3"}), "horizon '3' integer"),
        (("dreamer_v3", "small", None, {"horizon": True}), "horizon True integer"),
        (("dreamer_v3", "small", None, {"learning_rate": "fast"}), "learning_rate 'fast' number"),
        (("dreamer_v3", "small", None, {"size": "2m"}), "size '2m' 12m"),
        (("dreamer_v3", "small", None, {"encoder_units": [8, "x"]}), "encoder_units [8, 'x'] tuple None"),
        (("dreamer_v3", "small", None, {"batch_size": 10**7}), "batch_size 10000000"),
    ],
)
def test_wrong_names_types_and_ranges_are_named_in_one_line(arguments, words):
    with pytest.raises(UsageError) as caught:
        presets.resolve(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in words.split(" ") if word.strip("[],") not in message]
    assert not missing, message


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    config, _ = presets.resolve("dreamer_v3", "small", None, {"learning_rate": 1, "encoder_units": [8, 8]})
    assert type(config.learning_rate) is float
    assert config.encoder_units == (8, 8)
