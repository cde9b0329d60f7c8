"""What the tokenizer promises beyond equal numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.iris.made import BATCH, PAPER, batch_for, images, jit, made, update_of
from wmjax.agents.iris import tokenizer
from wmjax.nets.mlp import call
from wmjax.ops import vq


@pytest.mark.slow
def test_the_decoders_gradient_bypasses_the_codebook_which_learns_from_its_own_loss_alone():
    _, config, nets, state = made()
    keys = jax.random.split(jax.random.key(0), BATCH)

    def losses(weights):
        return tokenizer.tokenizer_losses(nets, config, {"tokenizer": weights}, keys, images(BATCH))[0]

    values, pull = jax.vjp(jax.jit(losses), state.params["tokenizer"])
    reached = {}
    for term in ("recon", "commit", "codebook"):
        (grads,) = pull({name: jnp.float32(name == term) for name in values})
        reached[term] = {part for part, g in grads.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(g))}
    assert reached == {
        "recon": {"encoder", "pre_quant", "post_quant", "decoder"},
        "commit": {"encoder", "pre_quant"},
        "codebook": {"codebook"},
    }


def test_the_commitment_loss_has_weight_one():
    assert tokenizer.loss_scales(PAPER) == {"codebook": 1.0, "commit": 1.0, "recon": 1.0, "perceptual": 1.0}


@pytest.mark.slow
def test_codebooks_that_follow_moving_averages_take_no_gradient_and_are_followed_by_the_update():
    for kind in ("ema", "ema_cosine"):
        agent, config, nets, state = made(codebook=kind)
        assert tokenizer.loss_scales(config)["codebook"] == 0.0
        batch = batch_for(agent, "tokenizer")
        if kind == "ema_cosine":
            weights = state.params["tokenizer"]
            unit = weights | {"codebook": vq.normalize(weights["codebook"])}
            state = state._replace(params=state.params | {"tokenizer": unit})
        new, metrics, _ = update_of(agent, "tokenizer")(state, jax.random.key(0), batch)
        z = jit(tokenizer.latents, nets, config)(state.params, batch.step.obs["image"][0] * (2 / 255) - 1)
        codebook = state.params["tokenizer"]["codebook"]
        taken = vq.assigned(z, vq.nearest(z, codebook), config.vocab_size)
        if kind == "ema":
            record, expected = vq.ema_update(state.stats["codebook"], taken, config.codebook_decay)
            np.testing.assert_allclose(new.stats["codebook"].counts, record.counts, rtol=1e-5)
        else:
            expected = vq.cosine_update(codebook, taken, 1 - config.codebook_decay)
        np.testing.assert_allclose(new.params["tokenizer"]["codebook"], expected, rtol=1e-4, atol=1e-5)
        assert {"perplexity", "usage", "dead"} <= set(metrics)


@pytest.mark.slow
def test_the_update_resets_dead_entries_and_leaves_the_living_to_the_gradient():
    agent, config, _, state = made(codebook_reset=0.1)
    usage = jnp.full(config.vocab_size, 1 / config.vocab_size).at[3].set(0.0)
    far = state.params["tokenizer"]["codebook"].at[3].set(1e3)
    params = state.params | {"tokenizer": state.params["tokenizer"] | {"codebook": far}}
    record = state.stats["codebook"]._replace(usage=usage)
    state = state._replace(params=params, stats={"codebook": record})
    new, metrics, _ = update_of(agent, "tokenizer")(state, jax.random.key(0), batch_for(agent, "tokenizer"))
    moved = np.abs(np.asarray(new.params["tokenizer"]["codebook"] - far)).max(-1)
    assert moved[3] > 100 and np.delete(moved, 3).max() < 0.1
    assert metrics["dead"] == pytest.approx(1 / config.vocab_size)


def test_reconstruction_losses_are_means_in_units_of_minus_one_to_one():
    x = jnp.zeros((2, 4, 4, 3))
    y = x.at[0, 1, 1].set(jnp.array([0.5, -1.0, 0.0])).at[1].set(0.2)
    l1 = np.array([1.5 / 48, 0.2])
    np.testing.assert_allclose(tokenizer.reconstruction_loss(x, y, PAPER), l1, rtol=1e-5)
    delta = dataclasses.replace(PAPER, recon_loss="delta_iris")
    expected = 0.1 * l1 + [1.25 / 48, 0.04] + 0.01 * np.array([1.25 / 3, 0.04])
    np.testing.assert_allclose(tokenizer.reconstruction_loss(x, y, delta), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random_features", "multiscale"])
def test_every_perceptual_loss_that_needs_no_file_trains_the_decoder(kind):
    _, config, nets, state = made()
    config = dataclasses.replace(config, perceptual=kind)
    keys = jax.random.split(jax.random.key(0), BATCH)
    loss = lambda w: tokenizer.tokenizer_losses(nets, config, {"tokenizer": w}, keys, images(BATCH))[0]["perceptual"]
    value, grads = jax.jit(jax.value_and_grad(loss))(state.params["tokenizer"])
    assert value > 0 and any(np.any(x) for x in jax.tree.leaves(grads["decoder"]))


def test_dropout_of_lpips_is_off_by_default():
    assert PAPER.lpips_dropout == 0.0


@pytest.mark.slow
def test_tokens_that_draw_their_own_patches_are_looked_up_as_the_decoder_would_draw_them():
    _, _, nets, state = made()
    weights = state.params["tokenizer"] | {"codebook": jax.random.normal(jax.random.key(1), (16, 8))}
    tokens = jax.random.randint(jax.random.key(2), (3, 2, 4), 0, 16)
    quantized = weights["codebook"][tokens].reshape(3, 2, 2, 2, 8)
    drawn = jax.jit(lambda x: call(nets.tokenizer, weights, x, method="decode"))(quantized)
    assert drawn.shape == (3, 2, 16, 16, 3)
    looked_up = jit(tokenizer.decode, nets)({"tokenizer": weights}, tokens)
    np.testing.assert_allclose(looked_up, np.clip((drawn + 1) / 2, 0, 1), atol=1e-6)
