"""Kullback-Leibler divergence between latents, and the losses that are made of it.

`balanced_kl` is DreamerV3's, on logits `[..., S, K]`: S latents, K classes. `kl_loss` is that of DreamerV1 and
DreamerV2, on latents of any distribution. What the KL of two latents is, they say themselves (`ops.latents`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.ops.distributions import unimix_logits
from wmjax.ops.latents import Categorical, Latent
from wmjax.types import Array


def balanced_kl(post_logits: Array, prior_logits: Array, free_nats: float, unimix: float) -> tuple[Array, Array]:
    """Splits the KL in two losses, so that the prior can be drawn to the posterior faster than the reverse.

        dyn = max(KL(sg(post) ‖ prior), free),   rep = max(KL(post ‖ sg(prior)), free)

    The free nats apply to each entry after the sum over latents and before any mean; below them the gradient is 0.

    Args:
      post_logits, prior_logits: `[..., S, K]`, raw logits, before the uniform mix.
      free_nats: at least 0.
      unimix: share of the uniform distribution in both, in [0, 1).

    Returns:
      `dyn`, which trains the prior, and `rep`, which trains the posterior: float32 `[...]` each, of equal value.

    Source: Hafner et al. 2025 (DreamerV3), equations for L_dyn and L_rep.

    >>> [x.item() for x in balanced_kl(jnp.zeros((2, 4)), jnp.zeros((2, 4)), 1.0, 0.01)]
    [1.0, 1.0]
    """
    contracts.alike(None, None, post_logits=post_logits, prior_logits=prior_logits)
    stop = jax.lax.stop_gradient
    post, prior = (Categorical(unimix_logits(logits, unimix)) for logits in (post_logits, prior_logits))
    divergence = lambda post, prior: jnp.maximum(post.kl(prior).sum(-1), free_nats)
    return divergence(stop(post), prior), divergence(post, stop(prior))


def above_free_nats(
    value: Array, free_nats: float, mode: str = "avg", axis_name: str | None = None, mean: Array | None = None
) -> Array:
    """Averages a KL, without a gradient from what lies below the free nats.

    Args:
      value: `[..., S]`, of each latent.
      free_nats: at least 0.
      mode: to what the free nats apply. `avg`: to the mean over all entries of the sum over latents (DreamerV1 and
        DreamerV2); `step`: to each entry, summed over latents; `latent`: to each latent by itself, and the mean is
        over latents too (the implementation guide).
      axis_name: the named axis that entries are spread over, or None. `avg` decides by the mean over all devices.
      mean: by which `avg` decides where `value` is a part of a batch: that of the whole. None: the mean of `value`.

    Returns:
      float32 scalar, of this device's entries.
    """
    contracts.floating(None, value=value)
    if mode == "latent":
        return jnp.maximum(value, free_nats).mean()
    value = value.sum(-1)
    if mode == "step":
        return jnp.maximum(value, free_nats).mean()
    here = value.mean()
    decisive = jax.lax.stop_gradient(here) if mean is None else mean
    if axis_name is not None:
        decisive = jax.lax.pmean(decisive, axis_name)
    return jnp.where(decisive > free_nats, here, free_nats)


def kl_loss(
    post: Latent,
    prior: Latent,
    *,
    mode: str = "balanced",
    balance: float = 0.8,
    free_nats: float = 0.0,
    free_mode: str = "avg",
    forward: bool = False,
    axis_name: str | None = None,
    mean: Array | None = None,
) -> tuple[Array, Array]:
    """Draws posterior and prior to each other.

        plain:       KL(post ‖ prior)
        balanced:    balance · KL(sg(post) ‖ prior) + (1 - balance) · KL(post ‖ sg(prior))
        guide_code:  balance · KL(post ‖ prior) + (1 - balance) · KL(sg(post) ‖ prior)

    Args:
      post, prior: latents `[..., S]`.
      mode: one of these. The authors' DreamerV2 code switches to `plain`, with free nats of each entry, where the
        balance is exactly 0.5; here 0.5 is the equation with 0.5 in it.
      balance: in [0, 1], the share of the term that trains the prior.
      free_nats, free_mode, axis_name, mean: see `above_free_nats`, applied to each term.
      forward: KL(prior ‖ post) instead.

    Returns:
      The loss, a float32 scalar, and the KL `[...]`, summed over latents, to watch.

    Source: Hafner et al. 2020 (DreamerV1), `plain`; Hafner et al. 2021 (DreamerV2), algorithm 2, `balanced`. The
    guide's code is `guide_code`: no stop-gradient in the first term, which reverses what the balance is for.

    >>> from wmjax.ops.latents import Categorical
    >>> flat = Categorical(jnp.zeros((2, 4)))
    >>> [x.item() for x in kl_loss(flat, flat, free_nats=1.0)]
    [1.0, 0.0]
    """
    for ours, theirs in zip(post, prior, strict=True):
        contracts.alike(post=ours, prior=theirs)
    sg = jax.lax.stop_gradient
    divergence = (lambda p, q: q.kl(p)) if forward else (lambda p, q: p.kl(q))
    average = lambda value: above_free_nats(value, free_nats, free_mode, axis_name, mean)
    value = divergence(post, prior)
    if mode == "plain":
        return average(value), value.sum(-1)
    trains_prior = divergence(sg(post), prior)
    if mode == "guide_code":
        mixed = balance * value + (1 - balance) * trains_prior
        return average(mixed), value.sum(-1)
    trains_post = divergence(post, sg(prior))
    return balance * average(trains_prior) + (1 - balance) * average(trains_post), value.sum(-1)
