"""The presets' numbers, and configurations and spaces that are refused."""

from __future__ import annotations

import dataclasses

import pytest

from tests.agents.world_models.made import CATCH, DOOM, TINY
from wmjax import presets
from wmjax.agents import world_models as wm
from wmjax.envs import make_env
from wmjax.fields import check_fields
from wmjax.types import Box, UsageError


def test_the_paper_presets_have_the_papers_numbers():
    car, _ = presets.resolve("world_models", "paper_car")
    assert car == wm.WorldModelsConfig()
    assert (car.vision_batch_size, car.vision_learning_rate, car.kl_tolerance) == (100, 1e-4, 0.5)
    assert (car.memory_batch_size, car.memory_length, car.memory_updates, car.clip, car.clip_limit) == (
        100, 999, 4000, "value", 1.0,
    )  # fmt: skip
    assert (car.evolve.population, car.evolve.rollouts, car.evolve.sigma_init, car.evolve.mean_every) == (
        64,
        16,
        0.1,
        25,
    )
    assert car.evolve.mean_rollouts == 1024 and car.controller_z == car.z_source == "sample"
    doom, _ = presets.resolve("world_models", "paper_doom")
    assert (doom.latent, doom.hidden, doom.temperature, doom.done_pos_weight) == (64, 512, 1.15, 10.0)
    assert (doom.evolve.where, doom.evolve.horizon, doom.memory_decay) == ("dream", 2100, 0.99999)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(evolve=dict(population=3)), "population must be at least 4, got 3"),
        (dict(inputs="zx"), "inputs: 'zx' is not valid; one of z, zh, zc, zch is"),
        (dict(inputs="h"), "inputs"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(evolve=dict(where="dream"), memory_updates=0), "'dream' needs V and M .* memory_updates is 0"),
        (dict(evolve=dict(where="dream"), vision_updates=0), "vision_updates is 0"),
        (dict(evolve=dict(where="dream"), reward_head="none"), "needs a reward, which M does not predict"),
        (dict(evolve=dict(rollouts=0)), "rollouts must be positive"),
        (dict(evolve=dict(popilation=8)), "unknown name 'popilation'; did you mean 'population'"),
        (dict(perceptual="lpips"), "lpips_weights: None is not a file"),
        (dict(memory_length=5000), "replay_capacity must hold a window of memory_length"),
        (dict(collect_steps=64), "collect_steps must reach a window"),
        (dict(memory_stateful=True), "memory_batch_size must be num_envs=16"),
        (dict(memory_decay=1.5), "memory_decay must be in"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(overrides, words):
    with pytest.raises(UsageError, match=words) as caught:
        presets.resolve("world_models", "small", "racing", overrides)
    assert "\n" not in str(caught.value)


def test_a_task_that_does_not_pay_for_survival_is_not_dreamt_as_one_that_does():
    config, _ = presets.resolve("world_models", "paper_doom")
    with pytest.raises(UsageError, match=r"'survival' pays 1 for each step .* not what this task pays; 'predicted'"):
        wm.world_models(make_env("racing", image_size=64).spec, config)
    assert wm.world_models(DOOM, config).recipe  # nobody has said what it pays
    predicted = dataclasses.replace(config, reward_head="mse", dream_reward="predicted")
    assert wm.world_models(make_env("racing", image_size=64).spec, predicted).recipe


@pytest.mark.parametrize(
    "spec, words",
    [
        (CATCH._replace(obs={"image": Box(0, 255, (60, 60, 3), "uint8")}), "image_size 60: .* near it 64, 80"),
        (CATCH._replace(obs={"image": Box(0, 255, (90, 90, 3), "uint8")}), "not 90; .* 64, 80, 96"),
        (CATCH._replace(obs={"image": Box(0, 255, (64, 80, 3), "uint8")}), "64x80 is not supported; valid: square"),
        (CATCH._replace(obs={"vector": Box(-1, 1, (4,))}), r"observations \['vector'\] are not supported"),
        (CATCH._replace(action=Box(-1, 1, (2, 2))), "action space"),
    ],
)
def test_spaces_that_it_cannot_take_are_refused(spec, words):
    with pytest.raises(UsageError, match=words):
        wm.world_models(spec, TINY)


def test_parts_of_a_configuration_are_overridden_field_by_field_and_survive_json():
    import json

    config, _ = presets.resolve("world_models", "small", "racing", {"evolve": {"where": "dream"}})
    small, _ = presets.resolve("world_models", "small", "racing")
    assert config.evolve == dataclasses.replace(small.evolve, where="dream")
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert wm.WorldModelsConfig(**check_fields(wm.WorldModelsConfig, stored)) == config
