"""Kullback-Leibler divergence between latents made of several categoricals, `[..., S, K]`: S latents, K classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.ops.distributions import unimix_logits
from wmjax.types import Array


def categorical_kl(post_logits: Array, prior_logits: Array) -> Array:
    """How many nats the posterior tells that the prior did not: KL(post ‖ prior), summed over the S latents.

    Args:
      post_logits, prior_logits: `[..., S, K]`, normalized or not.

    Returns:
      float32 `[...]`, at least 0.

    >>> categorical_kl(jnp.zeros((2, 4)), jnp.zeros((2, 4))).item()
    0.0
    """
    log_post = jax.nn.log_softmax(post_logits.astype(jnp.float32))
    log_prior = jax.nn.log_softmax(prior_logits.astype(jnp.float32))
    return (jnp.exp(log_post) * (log_post - log_prior)).sum((-2, -1))


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
    stop = jax.lax.stop_gradient
    post, prior = unimix_logits(post_logits, unimix), unimix_logits(prior_logits, unimix)
    dyn = jnp.maximum(categorical_kl(stop(post), prior), free_nats)
    rep = jnp.maximum(categorical_kl(post, stop(prior)), free_nats)
    return dyn, rep
