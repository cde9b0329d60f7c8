"""Mixtures of Gaussians: what a mixture density network predicts.

Source: Bishop 1994, "Mixture Density Networks"; Ha & Schmidhuber 2018 (World Models), appendix on the MDN-RNN.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts, noise
from wmjax.types import Array


class Mixture(NamedTuple):
    """K components over D dimensions. Dimensions may have weights of their own, or share one choice of component.

    With weights `[..., K, D]` each dimension is a mixture by itself (Ha & Schmidhuber's code); with `[..., K, 1]` a
    component is a Gaussian over all dimensions.
    """

    logits: Array  # [..., K, D] or [..., K, 1], raw weights
    mean: Array  # [..., K, D]
    log_std: Array  # [..., K, D]

    @property
    def shared(self) -> bool:
        """Whether all dimensions share the weights."""
        return self.logits.shape[-1] == 1 and self.mean.shape[-1] > 1

    def log_prob(self, x: Array) -> Array:
        """Log-density of x `[..., D]`: float32 `[..., D]` for each dimension; `[..., 1]`, summed over D, if shared.

        ln Σₖ wₖ N(x; μₖ, σₖ), by logsumexp.
        """
        contracts.exactly(*self.mean.shape[:-2], self.mean.shape[-1], x=x)
        contracts.floating(x=x)
        logits, mean, log_std = (y.astype(jnp.float32) for y in self)
        error = (x.astype(jnp.float32)[..., None, :] - mean) * jnp.exp(-log_std)
        log_normal = -0.5 * (error**2 + np.log(2 * np.pi)) - log_std
        if self.shared:
            log_normal = jnp.sum(log_normal, -1, keepdims=True)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits, -2) + log_normal, -2)

    def sample(self, key: Array, temperature: float | Array = 1.0) -> Array:
        """Draws float32 `[..., D]`; see `draw`. `key` is one key, or keys `[...]`, one for each row; consumed."""
        lead = self.mean.shape[:-2]
        contracts.keys(*lead, key=key)
        key_choice, key_normal = noise.split(key, 2)
        uniform = noise.uniform(key_choice, (*lead, self.logits.shape[-1]))
        return self.draw(uniform, noise.normal(key_normal, (*lead, self.mean.shape[-1])), temperature)

    def draw(self, uniform: Array, normal: Array, temperature: float | Array = 1.0) -> Array:
        """A sample from given random numbers.

            k ~ softmax(logits / τ),   x = μₖ + √τ σₖ ε

        The component is the first whose cumulated probability reaches `uniform`.

        Args:
          uniform: `[..., D]` in [0, 1), or `[..., 1]` if shared: chooses the component.
          normal: ε, `[..., D]`.
          temperature: τ, more than 0: below 1 it is surer than the model, above 1 less sure.

        Source: World Models, "temperature"; √τ (not τ) scales the deviation, as in the authors' code.
        """
        contracts.exactly(*self.logits.shape[:-2], self.logits.shape[-1], uniform=uniform)
        contracts.exactly(*self.mean.shape[:-2], self.mean.shape[-1], normal=normal)
        contracts.floating(uniform=uniform, normal=normal)
        below = jnp.cumsum(jax.nn.softmax(self.logits.astype(jnp.float32) / temperature, -2), -2)
        passed = below < uniform[..., None, :]
        # Rounding may leave the last cumulated probability below 1: the last component takes what is left.
        index = jnp.minimum(jnp.sum(passed, -2), self.mean.shape[-2] - 1)[..., None, :]
        chosen = jnp.arange(self.mean.shape[-2])[:, None] == index
        pick = lambda x: jnp.sum(jnp.where(chosen, x.astype(jnp.float32), 0.0), -2)
        return pick(self.mean) + jnp.exp(pick(self.log_std)) * jnp.sqrt(temperature) * normal
