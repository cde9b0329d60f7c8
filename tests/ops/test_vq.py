import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.agents.iris import IRISConfig
from wmjax.agents.iris.tokenizer import follow_codebook
from wmjax.ops import vq


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_distances_and_tokens_are_those_of_float64_where_the_codebook_has_the_scale_of_the_latents():
    z, codebook = normal(0, 3, 5, 7), normal(1, 11, 7)
    exact = ((np.float64(z)[..., None, :] - np.float64(codebook)) ** 2).sum(-1)
    np.testing.assert_allclose(vq.distances(z, codebook), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(vq.nearest(z, codebook), exact.argmin(-1))


def test_distances_stay_in_float32_under_bfloat16_latents():
    z = normal(0, 4, 7).astype(jnp.bfloat16)
    assert vq.distances(z, normal(1, 11, 7).astype(jnp.bfloat16)).dtype == jnp.float32


def test_the_gradient_passes_the_quantizer_to_the_latents_and_not_to_the_codebook():
    z, e = normal(0, 5, 3), normal(1, 5, 3)
    weight = normal(2, 5, 3)
    to_z, to_e = jax.grad(lambda z, e: jnp.sum(weight * vq.straight_through(z, e)), (0, 1))(z, e)
    np.testing.assert_array_equal(to_z, weight)
    assert not np.any(to_e)
    np.testing.assert_allclose(vq.straight_through(z, e), e, atol=1e-6)


def test_codebook_and_commitment_loss_have_one_value_and_opposite_gradients():
    z, e = normal(0, 5, 3), normal(1, 5, 3)
    codebook, commit = vq.codebook_losses(z, e)
    assert codebook == commit == pytest.approx(float(np.mean((np.float64(z) - e) ** 2)), rel=1e-6)
    of_codebook = jax.grad(lambda z, e: vq.codebook_losses(z, e)[0], (0, 1))(z, e)
    of_commit = jax.grad(lambda z, e: vq.codebook_losses(z, e)[1], (0, 1))(z, e)
    assert not np.any(of_codebook[0]) and not np.any(of_commit[1])
    np.testing.assert_allclose(of_codebook[1], 2 * (e - z) / 15, rtol=1e-5)
    np.testing.assert_allclose(of_commit[0], -of_codebook[1], rtol=1e-6)


def test_moving_averages_bring_every_entry_to_the_mean_of_its_latents():
    codebook = jnp.array([[0.0, 0.0], [4.0, 4.0]])
    z = jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    tokens = vq.nearest(z, codebook)
    batch = vq.assigned(z, tokens, 2)
    assert batch.counts.tolist() == [2, 1] and batch.sums.tolist() == [[1, 1], [5, 5]]
    # By hand: N = 0.5 + 0.5 (2, 1), m = 0.5 e + 0.5 s.
    state, moved = vq.ema_update(vq.init_state(codebook), batch, decay=0.5, eps=1e-9)
    np.testing.assert_allclose(state.counts, [1.5, 1.0])
    np.testing.assert_allclose(moved, [[0.5 / 1.5, 0.5 / 1.5], [4.5, 4.5]], rtol=1e-6)
    for _ in range(40):
        state, moved = vq.ema_update(state, batch, decay=0.5)
    np.testing.assert_allclose(moved, [[0.5, 0.5], [5.0, 5.0]], rtol=1e-4)


def test_the_cosine_codebook_turns_towards_its_latents_and_keeps_unit_length():
    codebook = vq.normalize(jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    z = vq.normalize(jnp.array([[1.0, 0.2], [1.0, 0.4]]))
    tokens = vq.nearest(z, codebook)
    assert tokens.tolist() == [0, 0]
    moved = vq.cosine_update(codebook, vq.assigned(z, tokens, 3), rate=0.5)
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1.0, rtol=1e-6)
    middle = vq.normalize(vq.normalize(z.mean(0)) + codebook[0])
    np.testing.assert_allclose(moved[0], middle, rtol=1e-5)
    np.testing.assert_allclose(moved[1:], codebook[1:], atol=1e-7)  # nobody took these


def test_health_counts_what_the_batch_took_and_what_is_dead():
    counts = jnp.array([8.0, 8.0, 0.0, 0.0])
    found = vq.health(counts, jnp.array([0.5, 0.4, 0.0999, 0.0001]), 0.01)
    assert found["perplexity"] == pytest.approx(2.0, rel=1e-5)
    assert (found["usage"], found["dead"]) == (0.5, 0.25)


def revived(state, codebook, z, tokens, dead_below):
    """The record and the codebook after dead entries were given new places."""
    return vq.revive(jax.random.key(0), state, codebook, vq.assigned(z, tokens, codebook.shape[0]), dead_below)


def test_reset_moves_one_dead_entry_onto_a_latent_of_the_batch_and_the_others_out_of_reach():
    z, codebook = normal(0, 6, 4, 3), 10 + normal(1, 5, 3)
    state = vq.init_state(codebook)._replace(usage=jnp.array([0.5, 0.0, 0.5, 0.001, 0.0]))
    new, moved = revived(state, codebook, z, vq.nearest(z, codebook), 0.01)
    np.testing.assert_array_equal(moved[jnp.array([0, 2])], codebook[jnp.array([0, 2])])
    rows = np.asarray(z.reshape(-1, 3))
    assert (rows == np.asarray(moved[1])).all(1).any()
    np.testing.assert_array_equal(new.sums[1], moved[1])
    np.testing.assert_array_equal(moved[3:], vq.OUT_OF_REACH)
    np.testing.assert_array_equal(new.sums[3:], moved[3:])
    assert new.usage.tolist() == pytest.approx([0.5, 0.2, 0.5, 0.001, 0.0])


@pytest.mark.slow
def test_an_entry_beside_another_cannot_take_its_name_when_the_encoder_moves():
    # One thing, an entry for it, and dead ones that were young with it; the encoder drifts across all of them.
    drift = jnp.linspace(0.0, 0.3, 60)[:, None] * jnp.array([1.0, 0.5])
    codebook = 0.05 * normal(3, 8, 2)
    state, names = vq.init_state(codebook)._replace(usage=jnp.zeros(8).at[0].set(1.0)), []
    for z in (jnp.broadcast_to(codebook[0] + offset, (16, 2)) for offset in drift):
        tokens = vq.nearest(z, codebook)
        names.append(int(tokens[0]))
        batch = vq.assigned(z, tokens, 8)
        state, codebook = vq.revive(jax.random.key(0), vq.update_usage(state, batch.counts, 0.9), codebook, batch, 1e-3)
        codebook = codebook.at[0].add(0.5 * (z[0] - codebook[0]))  # it follows, and lags behind
    assert set(names) == {0}
    assert len({int(vq.nearest(0.05 * normal(3, 8, 2)[0] + x, 0.05 * normal(3, 8, 2))) for x in drift}) > 1


@pytest.mark.slow
def test_reset_draws_latents_that_share_an_entry_with_others():
    z = jnp.concatenate([jnp.zeros((500, 2)), jnp.array([[3.0, 0.0], [0.0, 4.0]])])
    codebook = jnp.zeros((4, 2)).at[1:].add(10.0)
    state = vq.init_state(codebook)._replace(usage=jnp.zeros(4).at[0].set(1.0))

    @jax.vmap
    def places(key):
        return vq.revive(key, state, codebook, vq.assigned(z, jnp.zeros(502, int), 4), 1e-3)[1][1]

    moved = places(jax.random.split(jax.random.key(0), 400))
    shares = [float((moved == place).all(1).mean()) for place in z[500:]]
    np.testing.assert_allclose(shares, [9 / 25, 16 / 25], atol=0.06)
    near = jnp.where(z > 0, z, 1e-3)
    _, moved = revived(state, codebook, near, jnp.zeros(502, int), 1e-3)
    assert not (moved == near[0]).all(1).any()  # 500 latents at a little distance have no part in it
    lagging = jnp.ones((9, 2))  # all the same, though their entry is far
    _, moved = revived(state, codebook, lagging, jnp.zeros(9, int), 1e-3)
    np.testing.assert_array_equal(moved[0], codebook[0])
    np.testing.assert_array_equal(moved[1:], vq.OUT_OF_REACH)


@pytest.mark.slow
def test_codebooks_are_equal_on_two_devices_and_on_one():
    z, codebook = normal(0, 8, 3), normal(1, 5, 3)
    state = vq.init_state(codebook)._replace(usage=jnp.array([0.0, 0.3, 0.3, 0.2, 0.2]))

    def follow(z, axis_name):
        batch = vq.assigned(z, vq.nearest(z, codebook), 5, axis_name)
        new, moved = vq.ema_update(vq.update_usage(state, batch.counts, 0.9), batch)
        return vq.revive(jax.random.key(0), new, moved, batch, 0.05, axis_name)

    one = follow(z, None)
    two = jax.vmap(lambda z: follow(z, "devices"), axis_name="devices")(z.reshape(2, 4, 3))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(y, jnp.stack([x, x]), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Collapse, and what mends it: latents lie far from a young codebook, of which nearly all take one entry.


@functools.cache
def train(kind="gradient", reset=0.0, commit=0.25, size=16, steps=40):
    """24 latents that can only be moved together; the codebook's health after some gradient steps."""
    config = IRISConfig(codebook=kind, codebook_reset=reset, codebook_decay=0.9, perceptual="none")
    spread, codebook = 1.6 * normal(2, 24, 2), 0.05 * normal(3, size, 2)
    codebook = vq.normalize(codebook) if kind == "ema_cosine" else codebook

    def losses(offset, codebook):
        z = vq.normalize(spread + offset) if kind == "ema_cosine" else spread + offset
        tokens = vq.nearest(jax.lax.stop_gradient(z), codebook)
        fit, committed = vq.codebook_losses(z, codebook[tokens])
        return commit * committed + (kind == "gradient") * fit, (z, tokens)

    def step(carry, key):
        offset, codebook, state = carry
        grads, (z, tokens) = jax.grad(losses, (0, 1), has_aux=True)(offset, codebook)
        offset, codebook = offset - 0.01 * grads[0], codebook - 0.01 * grads[1]
        state, codebook, metrics = follow_codebook(config, key, state, codebook, z, tokens)
        return (offset, codebook, state), metrics

    start = jnp.array([3.0, 0.0]), codebook, vq.init_state(codebook)
    _, metrics = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.key(0), steps)))()
    return {name: float(value[-1]) for name, value in metrics.items()}


def test_without_help_the_codebook_collapses():
    assert train()["perplexity"] < 2


@pytest.mark.parametrize(
    "switch",
    [dict(kind="ema"), dict(kind="ema_cosine"), dict(reset=0.3), dict(kind="ema", reset=0.3), dict(commit=20.0)],
    ids=str,
)
def test_each_switch_revives_a_collapsed_codebook(switch):
    assert train(**switch)["perplexity"] > 1.5 * train()["perplexity"]


def test_a_smaller_codebook_leaves_a_smaller_share_of_it_unused():
    assert train(size=2)["usage"] > 2 * train()["usage"]
