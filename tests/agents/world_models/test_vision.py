"""What V promises beyond equal numbers."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import perturb, random_step
from tests.agents.world_models.made import CATCH, tiny, trajectory, updates
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import vision
from wmjax.nets.vae import Decoder, Encoder, decoder_base


def test_the_floor_of_the_kl_is_one_of_the_sum_and_below_it_there_is_no_gradient():
    mu = jnp.array([[0.1, 0.1, 0.1], [2.0, 0.1, 0.1]])
    objective = lambda mu: jnp.sum(vision.kl_floor(mu, jnp.zeros((2, 3)), 0.5)[1])
    grads = jax.grad(objective)(mu)
    assert (grads[0] == 0).all()
    np.testing.assert_allclose(grads[1], mu[1], rtol=1e-6)  # small dimensions of a sample above it have their gradient
    assert objective(mu) == pytest.approx(1.5 + 2.01)


def test_the_second_head_is_a_log_variance_not_a_log_deviation():
    log_sigma = 0.4
    kl, _ = vision.kl_floor(jnp.zeros((1, 1)), jnp.full((1, 1), 2 * log_sigma), 0.0)
    assert kl[0] == pytest.approx(np.exp(2 * log_sigma) / 2 - log_sigma - 0.5, rel=1e-5)
    drawn = vision.sample_latent(jax.random.key(0), jnp.zeros((50_000, 1)), jnp.full((50_000, 1), 2 * log_sigma))
    assert np.std(drawn) == pytest.approx(np.exp(log_sigma), rel=0.02)


def test_cross_entropy_pulls_at_an_output_that_is_sure_and_wrong_where_the_squared_error_does_not():
    image = np.zeros((64, 64, 64, 3), np.uint8)  # so large that XLA divides by 255 in a way that gives more than 1
    image[:, 10:20, 10:30], image[:, 50:60, 10:30] = (255, 200, 40), (60, 140, 255)

    @functools.partial(jax.jit, static_argnums=0)
    def pull(kind, logit, image):
        loss = lambda logits: jnp.sum(
            vision.reconstruction_loss(
                jax.nn.sigmoid(logits), image.astype(jnp.float32) / 255, wm.WorldModelsConfig(recon_loss=kind)
            )
        )
        return jax.value_and_grad(loss)(jnp.full(image.shape, logit))

    for logit in (-60.0, -14.0, 0.0, 14.0):
        value, grads = pull("bce", logit, image)
        assert np.isfinite(value)
        np.testing.assert_allclose(grads, jax.nn.sigmoid(logit) - image / 255, atol=1e-5)
        assert logit == 0 or np.abs(pull("mse", logit, image)[1]).max() < 1e-3


def test_cross_entropy_is_the_divergence_of_bernoulli_distributions():
    config = wm.WorldModelsConfig(recon_loss="bce")
    loss = lambda output, target: vision.reconstruction_loss(
        jnp.full((1, 1, 1, 1), output), jnp.full((1, 1, 1, 1), target), config
    )[0]
    assert loss(0.5, 0.25) == pytest.approx(0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5), rel=1e-5)
    assert loss(0.1, 1.0) == pytest.approx(np.log(10), rel=1e-5) and loss(0.1, 0.0) == pytest.approx(-np.log(0.9))
    for same in (0.0, 0.3, 1.0):
        assert abs(loss(same, same)) < 1e-6


@pytest.mark.slow
def test_the_relu_after_the_decoders_linear_layer_is_a_choice():
    plain, relu = Decoder(64, depth=2), Decoder(64, depth=2, relu=True)
    z = jax.random.normal(jax.random.key(0), (2, 4))
    params = jax.jit(plain.init)(jax.random.key(1), z)
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(relu.init, jax.random.key(1), z))
    assert np.abs(jax.jit(plain.apply)(params, z) - jax.jit(relu.apply)(params, z)).max() > 1e-4


@pytest.mark.slow
def test_features_are_flattened_by_height_width_and_channel():
    encoder = Encoder(1, depth=2)
    image = jax.random.randint(jax.random.key(0), (1, 64, 64, 3), 0, 256).astype(jnp.uint8)
    params = perturb(encoder.init(jax.random.key(1), image)["params"], scale=0.2)
    read = lambda index: encoder.apply(
        {"params": params | {"mu": {"kernel": jnp.eye(64)[:, index : index + 1], "bias": jnp.zeros(1)}}}, image
    )[0][0, 0]
    x = image / 255
    for i in range(4):
        kernel, bias = params[f"conv{i}"]["kernel"], params[f"conv{i}"]["bias"]
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dims) + bias)
    assert x.shape == (1, 2, 2, 16)
    for h, w, c in ((0, 0, 3), (0, 1, 2), (1, 0, 15)):
        np.testing.assert_allclose(read((h * 2 + w) * 16 + c), x[0, h, w, c], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transposed_convolutions_lay_their_kernels_down_unflipped():
    decoder = Decoder(64, depth=1)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    zero = jax.tree.map(jnp.zeros_like, params)
    # One feature of the first map, one tap of each kernel: a pixel whose place can be worked out by hand.
    place = lambda kernel, tap: jnp.zeros_like(kernel).at[(*tap, 0, 0)].set(1.0)
    taps = ((1, 3), (0, 2), (4, 1), (2, 5))
    for i, tap in enumerate(taps):
        zero[f"deconv{i}"]["kernel"] = place(params[f"deconv{i}"]["kernel"], tap)
    zero["linear"]["bias"] = jnp.zeros(32).at[0].set(1.0)
    image = decoder.apply({"params": zero}, jnp.zeros((1, 1)))[0, ..., 0]
    row = col = 0
    for y, x in taps:
        row, col = 2 * row + y, 2 * col + x
    assert np.argwhere(np.asarray(image) > 0.6).tolist() == [[row, col]]


@pytest.mark.parametrize("side, base", [(64, 1), (80, 2), (96, 3), (112, 4)])
def test_decoders_give_the_size_back_that_they_were_made_for(side, base):
    assert decoder_base(side) == base
    image = jax.eval_shape(lambda: Decoder(side, depth=2).init_with_output(jax.random.key(0), jnp.zeros((3, 4)))[0])
    assert image.shape == (3, side, side, 3)


@pytest.mark.slow
def test_a_black_picture_is_zeros_and_a_white_one_ones():
    """The authors' resizing shifts every number by one, so that black wraps around to white."""
    _, config, nets, state = tiny()
    params = jax.tree.map(jnp.zeros_like, {name: state.params[name] for name in ("encoder", "decoder")})
    keys = jax.random.split(jax.random.key(0), 1)
    loss = jax.jit(lambda params, image: vision.vision_loss(nets, config, params, keys, image))
    for level in (0, 255):
        params["decoder"]["deconv3"]["bias"] = jnp.full(3, 99.0 if level else -99.0)
        _, (metrics, _) = loss(params, jnp.full((1, 64, 64, 3), level, jnp.uint8))
        assert metrics["recon"] < 1e-6


@pytest.mark.parametrize("kind", ["random_features", pytest.param("multiscale", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_perceptual_loss_can_take_the_place_of_the_squared_error(kind):
    _, config, nets, state = tiny()
    config = dataclasses.replace(config, perceptual=kind, recon_scale=0.0, beta=0.0)
    image = random_step(CATCH, (4,)).obs["image"]
    params = {name: state.params[name] for name in ("encoder", "decoder")}
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(
        jax.value_and_grad(lambda params: vision.vision_loss(nets, config, params, keys, image), has_aux=True)
    )
    (total, (metrics, _)), grads = run(params)
    assert total == pytest.approx(config.perceptual_scale * float(metrics["perceptual"]), rel=1e-5) and total > 0
    chex.assert_tree_all_finite(grads)
    assert min(float(jnp.abs(g["conv0"]["kernel"]).max()) for g in (grads["encoder"],)) > 0


@pytest.mark.slow
def test_half_batches_of_vision_under_a_named_axis_equal_the_full_batch():  # those of the memory: conformance tests
    name = "vision"
    whole_agent, config, _, state = tiny()
    half_agent = wm.world_models(CATCH, config, axis_name="devices")
    batch = trajectory(config, CATCH, 1, 4)
    whole = jax.jit(updates(whole_agent)[name].fn)
    expected, expected_metrics, _ = whole(state, jax.random.key(0), batch)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]), batch)
    part = jax.vmap(updates(half_agent)[name].fn, (None, None, 1), axis_name="devices")
    found, metrics, _ = jax.jit(part)(state, jax.random.key(0), split)
    moved = 0.0
    for old, new, other in zip(*map(jax.tree.leaves, (state.params, expected.params, found.params)), strict=True):
        np.testing.assert_array_equal(other[0], other[1])
        np.testing.assert_allclose(other[0], new, atol=2e-5)
        moved = max(moved, float(np.abs(np.asarray(new) - old).max()))
    assert moved > 5e-4
    np.testing.assert_allclose(metrics["loss"][0], expected_metrics["loss"], rtol=1e-4)
