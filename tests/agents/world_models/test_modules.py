"""Sizes of the networks, and the guide's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.world_models.made import CAR, DOOM, shapes, size
from wmjax import presets
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import vision
from wmjax.nets.mlp import call
from wmjax.types import Box


def test_published_sizes_have_the_published_parameter_counts():
    car = shapes("paper_car", CAR)
    assert size(car["encoder"]) + size(car["decoder"]) == 4_348_547
    assert size(car["memory"]) == 422_368
    assert size(car["controller"]) == 867
    doom = shapes("paper_doom", DOOM)
    assert size(doom["encoder"]) + size(doom["decoder"]) == 4_446_915
    assert size(doom["memory"]) == 1_678_785
    assert size(doom["controller"]) == 1088
    tallec = shapes("paper_car", CAR, mixture="shared", reward_head="mse", done_head=True)
    assert size(tallec["memory"]) == 383_047


def test_guide_has_the_numbers_of_the_guide():
    config, run = presets.resolve("world_models", "guide", "racing")
    assert run.image_size == 96 and run.action_repeat == 1
    spec = CAR._replace(obs={"image": Box(0, 255, (96, 96, 3), "uint8")})
    params = shapes("guide", spec)
    assert size(params["encoder"]) + size(params["decoder"]) == 2_457_475
    assert [params["encoder"][f"conv{i}"]["kernel"].shape for i in range(4)] == [
        (4, 4, 3, 32), (4, 4, 32, 64), (4, 4, 64, 128), (4, 4, 128, 256),
    ]  # fmt: skip
    assert params["encoder"]["mu"]["kernel"].shape == (6 * 6 * 256, 32)
    assert [params["decoder"][f"deconv{i}"]["kernel"].shape for i in range(4)] == [
        (5, 5, 128, 256), (5, 5, 64, 128), (6, 6, 32, 64), (6, 6, 3, 32),
    ]  # fmt: skip
    assert size(params["controller"]) == 3 * 32 + 3 == 99
    assert (config.latent, config.hidden, config.mixtures, config.mixture) == (32, 256, 5, "shared")
    assert (config.beta, config.kl_tolerance, config.reduction) == (1.0, 0.0, "sum")  # -0.5 sum(...) over the batch
    assert (config.vision_learning_rate, config.memory_learning_rate) == (1e-3, 1e-3)
    assert config.memory_final_learning_rate == config.memory_learning_rate
    assert (config.reward_head, config.done_head, config.done_pos_weight) == ("gaussian", True, 1.0)
    assert (config.z_source, config.controller_z, config.inputs, config.clip) == ("mean", "mean", "z", "none")
    search = config.evolve
    assert (search.sigma_init, search.generations, search.rollouts, search.where) == (0.5, 100, 3, "env")
    assert search.population == 4 + int(3 * np.log(99)) == 17  # what pycma takes where none is given


@pytest.mark.slow
def test_vae_of_the_guide():
    """The guide's own unit test: reconstructions of 96x96 pictures, and 32 numbers for each."""
    config, _ = presets.resolve("world_models", "guide", None)
    spec = CAR._replace(obs={"image": Box(0, 255, (96, 96, 3), "uint8")})
    nets = wm.networks(spec, config)
    x = jax.random.randint(jax.random.key(0), (4, 96, 96, 3), 0, 256).astype(jnp.uint8)

    def vae(key):
        params = wm.init_params(nets, spec, config, key)
        mu, logvar = call(nets.encoder, params["encoder"], x)
        return call(nets.decoder, params["decoder"], vision.sample_latent(key, mu, logvar)), mu, logvar

    recon, mu, logvar = jax.jit(vae)(jax.random.key(1))
    assert recon.shape == x.shape
    assert mu.shape == logvar.shape == (4, 32)
    assert (recon > 0).all() and (recon < 1).all()
