"""Distributions of latents: what a posterior or a prior says of z.

Both kinds have the same methods. `sample` takes one key, or keys with the batch's shape, one for each row; `kl` and
`entropy` are of each latent, to be summed over the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts, distributions, noise
from wmjax.types import Array, UsageError


class Categorical(NamedTuple):
    """S categoricals of K classes; z is one-hot.

    Source: Hafner et al. 2021 (DreamerV2), algorithm 1.
    """

    logits: Array  # float32 [..., S, K]

    def sample(self, key: Array, estimator: str = "straight_through") -> Array:
        """One-hot `[..., S, K]`.

        Args:
          key: consumed.
          estimator: of the gradient. `straight_through`, that of the probabilities; `gumbel_straight_through`, that
            of a softmax of the same noisy logits (Gumbel-softmax, temperature 1, hard); `argmax`, the likeliest class,
            without noise and without gradient.

        Raises:
          UsageError: for any other estimator.
        """
        contracts.shaped(None, None, logits=self.logits)
        contracts.keys(*self.logits.shape[:-2], key=key)
        if estimator == "straight_through":
            return distributions.straight_through_sample(key, self.logits)
        if estimator == "gumbel_straight_through":
            noisy = self.logits + noise.gumbel(key, self.logits.shape)
            soft = jax.nn.softmax(noisy)
            return _one_hot(noisy) + (soft - jax.lax.stop_gradient(soft))
        if estimator == "argmax":
            return self.mode()
        raise UsageError(f"latent_estimator {estimator!r}: valid are straight_through, gumbel_straight_through, argmax")

    def mode(self) -> Array:
        """The likeliest class of each latent, one-hot `[..., S, K]`, without gradient."""
        return _one_hot(self.logits)

    def entropy(self) -> Array:
        """In nats, `[..., S]`."""
        log_probs = jax.nn.log_softmax(self.logits)
        return -(jnp.exp(log_probs) * log_probs).sum(-1)

    def kl(self, other: Categorical) -> Array:
        """KL(self ‖ other), `[..., S]`.

        >>> Categorical(jnp.zeros((1, 4))).kl(Categorical(jnp.zeros((1, 4)))).tolist()
        [0.0]
        """
        contracts.alike(self=self.logits, other=other.logits)
        mine, theirs = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return (jnp.exp(mine) * (mine - theirs)).sum(-1)


class Gaussian(NamedTuple):
    """Independent normal distributions.

    Source: Hafner et al. 2019 (PlaNet) and 2020 (DreamerV1).
    """

    mean: Array  # float32 [..., Z]
    std: Array  # float32 [..., Z], positive

    def sample(self, key: Array) -> Array:
        """Reparameterized, `[..., Z]`: the noise differs from row to row (DreamerV1's code shares it, by mistake)."""
        contracts.alike(mean=self.mean, std=self.std)
        contracts.keys(*self.mean.shape[:-1], key=key)
        return self.mean + self.std * noise.normal(key, self.mean.shape)

    def mode(self) -> Array:
        """The mean, `[..., Z]`."""
        return self.mean

    def entropy(self) -> Array:
        """In nats, `[..., Z]`."""
        return 0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(self.std)

    def kl(self, other: Gaussian) -> Array:
        """KL(self ‖ other), `[..., Z]`: ln(σ'/σ) + (σ² + (μ - μ')²) / 2σ'² - ½.

        >>> Gaussian(jnp.ones(1), jnp.ones(1)).kl(Gaussian(jnp.zeros(1), jnp.ones(1))).tolist()
        [0.5]
        """
        contracts.alike(mean=self.mean, std=self.std, other=other.mean, other_std=other.std)
        ratio = self.std / other.std
        shift = (self.mean - other.mean) / other.std
        return 0.5 * (ratio**2 + shift**2 - 1) - jnp.log(ratio)


Latent = Categorical | Gaussian


class Kind(NamedTuple):
    """What the latents of a world model are, as a value that it takes."""

    outputs: int  # numbers that describe the latents of one state
    dist: Callable[[Array], Latent]  # from these numbers, `[..., outputs]`
    draw: Callable[[Latent, Array], Array]  # (distribution, key) -> z
    pack: Callable[[Array], Array] = lambda z: z  # what replay keeps of z
    unpack: Callable[[Array], Array] = lambda packed: packed  # and z of that, float32


def categorical(stoch: int, classes: int, draw: Callable[[Categorical, Array], Array] = Categorical.sample) -> Kind:
    """Latents of at most 256 classes each; the numbers are their logits, and replay keeps a byte of each latent."""
    return Kind(
        stoch * classes,
        lambda raw: Categorical(raw.reshape(*raw.shape[:-1], stoch, classes)),
        draw,
        pack=lambda z: jnp.argmax(z, -1).astype(jnp.uint8),
        unpack=lambda packed: jax.nn.one_hot(packed, classes, dtype=jnp.float32),
    )


def gaussian(stoch: int, std: Callable[[Array], Array]) -> Kind:
    """Normal latents; the numbers are their means, and then what `std` makes their deviations of."""

    def dist(raw: Array) -> Gaussian:
        mean, raw_std = jnp.split(raw, 2, -1)
        return Gaussian(mean, std(raw_std))

    return Kind(2 * stoch, dist, Gaussian.sample)


def _one_hot(scores: Array) -> Array:
    return jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=jnp.float32)
