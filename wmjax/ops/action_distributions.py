"""Continuous actions in [-1, 1]: a squashed and a truncated normal; and noise for the sake of exploration.

Everything is computed in float32. `seed` is one key, or keys with the leading axes of the batch, one for each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts, noise
from wmjax.ops.distributions import split_choices
from wmjax.types import Array, Box, Discrete, MultiDiscrete, Space, UsageError

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
INSIDE = 0.99999997  # actions are moved this near to ±1 before tanh is undone


class TanhNormal(NamedTuple):
    """tanh of a normal variable: bounded, and with a density that is known but no closed form of mode and entropy.

    Source: Hafner et al. 2020 (DreamerV1), action model; Haarnoja et al. 2018 (SAC), appendix C, for the density.
    """

    mean: Array  # [..., A], before tanh
    std: Array  # [..., A], positive

    def _draw(self, seed: Array, draws: int) -> Array:
        """Normal variables `[draws, ..., A]`."""
        *batch, size = self.mean.shape
        contracts.keys(*batch, seed=seed)
        eps = jnp.moveaxis(noise.normal(seed, (*batch, draws, size)), -2, 0)
        return self.mean + self.std * eps

    def _log_prob_of(self, x: Array) -> Array:
        """Density of tanh(x), summed over A."""
        normal = -0.5 * ((x - self.mean) / self.std) ** 2 - jnp.log(self.std) - LOG_ROOT_2PI
        # ln(1 - tanh²(x)), in a form that does not overflow.
        return (normal - 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))).sum(-1)

    def sample(self, seed: Array) -> Array:
        """Reparameterized, `[..., A]` in (-1, 1)."""
        contracts.keys(*self.mean.shape[:-1], seed=seed)
        return jnp.tanh(self.mean + self.std * noise.normal(seed, self.mean.shape))

    def log_prob(self, action: Array) -> Array:
        """`[...]`, summed over A; actions at the very bounds count as just inside."""
        contracts.broadcasts(action=action, mean=self.mean)
        contracts.floating(action=action)
        return self._log_prob_of(jnp.arctanh(jnp.clip(action, -INSIDE, INSIDE)))

    def mode(self, seed: Array, draws: int = 100) -> Array:
        """The likeliest of some samples, `[..., A]`, chosen for each row by itself.

        (DreamerV1's code takes the index of the first row for all rows, which is the same for a batch of one.)
        """
        x = self._draw(seed, draws)
        best = jnp.argmax(self._log_prob_of(x), 0)
        return jnp.tanh(jnp.take_along_axis(x, best[None, ..., None], 0)[0])

    def entropy(self, seed: Array, draws: int = 100) -> Array:
        """`[...]`, estimated from some reparameterized samples."""
        return -self._log_prob_of(self._draw(seed, draws)).mean(0)


def tanh_normal(mean: Array, std: Array, mean_scale: float = 5.0, init_std: float = 5.0) -> TanhNormal:
    """A `TanhNormal` from raw outputs: mean 5 tanh(mean / 5), deviation softplus(std + ln(e⁵ - 1)) + 1e-4.

    Args:
      mean, std: `[..., A]`, raw.
      mean_scale: bound of the mean before tanh.
      init_std: deviation at a raw output of 0.

    Source: DreamerV1 code, action decoder.

    >>> round(tanh_normal(jnp.zeros(1), jnp.zeros(1)).std.item(), 4)
    5.0001
    """
    contracts.alike(None, mean=mean, std=std)
    mean, std = mean.astype(jnp.float32), std.astype(jnp.float32)
    raw_init = math.log(math.expm1(init_std))
    return TanhNormal(mean_scale * jnp.tanh(mean / mean_scale), jax.nn.softplus(std + raw_init) + 1e-4)


class TruncatedNormal(NamedTuple):
    """A normal distribution cut off at -1 and 1 and scaled up again.

    Source: Hafner et al. 2021 (DreamerV2), continuous control; gradients as in the authors' code.
    """

    loc: Array  # [..., A] in [-1, 1]
    scale: Array  # [..., A], positive

    def _bounds(self) -> tuple[Array, Array, Array]:
        """Standardized bounds, and how much of the normal distribution lies between them."""
        low, high = (-1 - self.loc) / self.scale, (1 - self.loc) / self.scale
        return low, high, jax.scipy.special.ndtr(high) - jax.scipy.special.ndtr(low)

    def sample(self, seed: Array) -> Array:
        """`[..., A]` within ±(1 - 1e-6). The gradient is that of loc + scale · ε with ε held fixed.

        That is not the derivative of the truncated sample (TensorFlow treats the bounds as inputs of their own), but
        what DreamerV2 learned with. The clip passes gradients unchanged.
        """
        contracts.keys(*self.loc.shape[:-1], seed=seed)
        low, high, _ = self._bounds()
        eps = jax.lax.stop_gradient(truncated_noise(seed, low, high))
        action = self.loc + self.scale * eps
        return action + jax.lax.stop_gradient(jnp.clip(action, -1 + 1e-6, 1 - 1e-6) - action)

    def log_prob(self, action: Array) -> Array:
        """`[...]`, summed over A, of actions in [-1, 1]."""
        contracts.broadcasts(action=action, loc=self.loc)
        contracts.floating(action=action)
        _, _, inside = self._bounds()
        normal = -0.5 * ((action - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - LOG_ROOT_2PI
        return (normal - jnp.log(inside)).sum(-1)

    def entropy(self) -> Array:
        """`[...]`, summed over A: ½ + ln(√2π σ Z) + (a φ(a) - b φ(b)) / 2Z with bounds a, b and Z = Φ(b) - Φ(a)."""
        low, high, inside = self._bounds()
        density = lambda x: jnp.exp(-0.5 * x**2 - LOG_ROOT_2PI)
        slope = (low * density(low) - high * density(high)) / (2 * inside)
        return (0.5 + LOG_ROOT_2PI + jnp.log(self.scale) + jnp.log(inside) + slope).sum(-1)

    def mode(self) -> Array:
        """The location, `[..., A]`."""
        return self.loc


def truncated_noise(key: Array, low: Array, high: Array) -> Array:
    """Standard normal noise between bounds `[..., A]`, by inversion of the distribution function."""
    contracts.alike(low=low, high=high)
    contracts.keys(*low.shape, key=key)
    below, above = jax.scipy.special.ndtr(low), jax.scipy.special.ndtr(high)
    uniform = noise.uniform(key, low.shape)
    return jnp.clip(jax.scipy.special.ndtri(below + uniform * (above - below)), low, high)


def truncated_normal(loc: Array, scale: Array, min_std: float = 0.1) -> TruncatedNormal:
    """A `TruncatedNormal` from raw outputs: location tanh(loc), scale 2 sigmoid(scale / 2) + 0.1.

    Source: DreamerV2 code, `trunc_normal`.

    >>> round(truncated_normal(jnp.zeros(1), jnp.zeros(1)).scale.item(), 4)
    1.1
    """
    contracts.alike(None, loc=loc, scale=scale)
    loc, scale = jnp.tanh(loc.astype(jnp.float32)), scale.astype(jnp.float32)
    return TruncatedNormal(loc, 2 * jax.nn.sigmoid(scale / 2) + min_std)


def random_action(space: Space, key: Array) -> Array:
    """A uniformly random action as agents emit them: one-hots side by side, or float32 `[A]` in [-1, 1)."""
    contracts.keys(key=key)
    if isinstance(space, Discrete):
        return jax.nn.one_hot(jax.random.randint(key, (), 0, space.n), space.n)
    if isinstance(space, MultiDiscrete):
        keys = zip(space.ns, jax.random.split(key, len(space.ns)), strict=True)
        return jnp.concatenate([random_action(Discrete(n), key) for n, key in keys])
    if isinstance(space, Box) and len(space.shape) == 1:
        return jax.random.uniform(key, space.shape, minval=-1.0, maxval=1.0)
    raise UsageError(f"action space {space}: agents act in Discrete, MultiDiscrete and one-dimensional Box spaces")


def explore(key: Array, action: Array, amount: Array | float, counts: Sequence[int] | None) -> Array:
    """Actions with noise, for the sake of exploration.

    Args:
      key: consumed.
      action: `[..., A]`, one-hot, several one-hots side by side, or in [-1, 1].
      amount: share of uniformly random choices, or standard deviation of the noise; 0 changes nothing.
      counts: sizes of the one-hots. None for continuous actions, which are clipped to [-1, 1] again.

    Source: DreamerV1, appendix A, and the code of DreamerV1 and DreamerV2.
    """
    contracts.floating(None if counts is None else sum(counts), action=action)
    contracts.keys(*action.shape[:-1], key=key)
    if counts is None:
        return jnp.clip(action + amount * noise.normal(key, action.shape), -1.0, 1.0)
    if len(counts) == 1:
        return _choose_anew(key, action, amount)
    parts = zip(noise.split(key, len(counts)), split_choices(action, counts), strict=True)
    return jnp.concatenate([_choose_anew(key, part, amount) for key, part in parts], -1)


def _choose_anew(key: Array, action: Array, amount: Array | float) -> Array:
    key_whether, key_which = noise.split(key, 2)
    which = jnp.argmax(noise.gumbel(key_which, action.shape), -1)
    random = noise.uniform(key_whether, action.shape[:-1]) < amount
    return jnp.where(random[..., None], jax.nn.one_hot(which, action.shape[-1]), action)
