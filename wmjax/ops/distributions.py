"""The distributions that distrax lacks: straight-through one-hots, two-hot values, bounded Gaussian actions.

Everything is computed in float32, whatever the dtype of the network's outputs. The `seed` of a distribution's
`sample` is one key, or keys with the batch's shape, one for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts, noise
from wmjax.ops.symlog import symexp, symlog
from wmjax.types import Array, UsageError

# ---------------------------------------------------------------------------------------------------------------------
# Categoricals


def unimix_logits(logits: Array, unimix: float) -> Array:
    """Mixes in a little of the uniform distribution: ln((1 - u) softmax(logits) + u / K).

    No class is ever impossible then, so no KL and no log-probability is infinite.

    Args:
      logits: `[..., K]`, normalized or not.
      unimix: u in [0, 1), a Python number; 0 only normalizes.

    Returns:
      float32 `[..., K]`, normalized log-probabilities.

    Source: Hafner et al. 2025 (DreamerV3), "1% unimix".

    >>> jnp.exp(unimix_logits(jnp.array([200.0, 0.0]), 0.5)).round(4).tolist()
    [0.75, 0.25]
    """
    contracts.floating(None, logits=logits)
    logits = logits.astype(jnp.float32)
    if unimix == 0:
        return jax.nn.log_softmax(logits)
    return jnp.log((1 - unimix) * jax.nn.softmax(logits) + unimix / logits.shape[-1])


def straight_through_sample(key: Array, logits: Array) -> Array:
    """Draws one-hot vectors whose gradient is that of the probabilities: sg(onehot) + probs - sg(probs).

    Args:
      key: one key, or keys `[...]`, one for each row; consumed.
      logits: `[..., K]`, or `[..., S, K]` under keys `[...]`; already mixed by `unimix_logits` if they shall be.

    Returns:
      float32 like `logits`, exactly one-hot.

    Source: Hafner et al. 2021 (DreamerV2), algorithm 1; kept by DreamerV3.

    >>> straight_through_sample(jax.random.key(0), jnp.array([[0.0, 99.0], [99.0, 0.0]])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    contracts.floating(None, logits=logits)
    contracts.keys(*logits.shape[:-1], key=key)
    logits = logits.astype(jnp.float32)
    index = jnp.argmax(logits + noise.gumbel(key, logits.shape), -1)
    probs = jax.nn.softmax(logits)
    # The bracket is exactly 0, so that the value stays exactly one-hot.
    return jax.nn.one_hot(index, logits.shape[-1], dtype=jnp.float32) + (probs - jax.lax.stop_gradient(probs))


def _add_sample_axis(key: Array) -> Array:
    """distrax draws `[n, ...]`; keys for rows draw n = 1."""
    return key if key.ndim == 0 else key[None]


class OneHotCategorical(distrax.OneHotCategorical):
    """A categorical over one-hot vectors, mixed with the uniform one, whose samples are straight-through.

    Args:
      logits: `[..., K]`, raw.
      unimix: share of the uniform distribution, in [0, 1).

    `log_prob` takes one-hot float vectors. Its gradient also flows into them: stop the gradient of a sampled action.

    >>> OneHotCategorical(jnp.array([0.0, 1.0])).mode().tolist()
    [0.0, 1.0]
    """

    def __init__(self, logits: Array, unimix: float = 0.0):
        super().__init__(logits=unimix_logits(logits, unimix), dtype=jnp.float32)

    def _sample_n(self, key: Array, n: int) -> Array:
        return straight_through_sample(_add_sample_axis(key), jnp.broadcast_to(self.logits, (n, *self.logits.shape)))


def split_choices(action: Array, counts: Sequence[int]) -> list[Array]:
    """One-hot vectors of some sizes that lie side by side, `[..., sum K]`, each by itself."""
    contracts.shaped(sum(counts), action=action)
    return jnp.split(action, np.cumsum(counts)[:-1].tolist(), -1)


class OneHotCategoricals(NamedTuple):
    """Independent choices that are made at once, as one-hot vectors side by side, `[..., sum K]`."""

    parts: tuple[OneHotCategorical, ...]

    def sample(self, *, seed: Array) -> Array:
        """Straight-through, `[..., sum K]`."""
        contracts.keys(*self.parts[0].logits.shape[:-1], seed=seed)
        seeds = noise.split(seed, len(self.parts))
        return jnp.concatenate([part.sample(seed=key) for part, key in zip(self.parts, seeds, strict=True)], -1)

    def mode(self) -> Array:
        """The likeliest of each, `[..., sum K]`."""
        return jnp.concatenate([part.mode() for part in self.parts], -1)

    def log_prob(self, action: Array) -> Array:
        """`[...]`, summed over the choices."""
        contracts.floating(action=action)
        pieces = split_choices(action, [part.num_categories for part in self.parts])
        return sum(part.log_prob(piece) for part, piece in zip(self.parts, pieces, strict=True))

    def entropy(self) -> Array:
        """`[...]`, summed over the choices."""
        return sum(part.entropy() for part in self.parts)


def choices(outputs: dict[str, Array], unimix: float = 0.0) -> OneHotCategorical | OneHotCategoricals | None:
    """The distribution of one choice ("logits") or several ("logits0", "logits1", ...); None if there are no logits.

    >>> choices({"logits0": jnp.zeros(2), "logits1": jnp.array([0.0, 9.0])}).mode().tolist()
    [1.0, 0.0, 0.0, 1.0]
    """
    if "logits" in outputs:
        return OneHotCategorical(outputs["logits"], unimix)
    names = [f"logits{i}" for i in range(len(outputs)) if f"logits{i}" in outputs]
    return OneHotCategoricals(tuple(OneHotCategorical(outputs[name], unimix) for name in names)) if names else None


def bernoulli_log_prob(logits: Array, target: Array) -> Array:
    """Log-likelihood of a probability: t ln p + (1 - t) ln(1 - p), p = sigmoid(logits).

    Args:
      logits: any shape.
      target: t in [0, 1], broadcast against `logits`; soft labels are welcome.

    Returns:
      float32, at most 0, finite for finite logits.

    >>> bernoulli_log_prob(jnp.array(-200.0), jnp.array(1.0)).item()
    -200.0
    """
    contracts.floating(logits=logits, target=target)
    contracts.broadcasts(logits=logits, target=target)
    logits, target = logits.astype(jnp.float32), target.astype(jnp.float32)
    return target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits)


# ---------------------------------------------------------------------------------------------------------------------
# Two-hot: a number as a categorical over fixed bins


def exponential_bins(num_bins: int) -> Array:
    """Bins that are dense near 0 and reach ±symexp(20) ≈ ±4.9e8: float32 `[num_bins]`, increasing.

    The bins are exactly antisymmetric (`bins[i] == -bins[-1 - i]`, the middle one 0), which `TwoHot.mean` relies on.

    Args:
      num_bins: odd and at least 3. DreamerV3 uses 255.

    Raises:
      UsageError: for any other number.

    Source: Hafner et al. 2025 (DreamerV3), equation for the bins B.

    >>> exponential_bins(3).tolist() == [-float(symexp(20.0)), 0.0, float(symexp(20.0))]
    True
    """
    if num_bins < 3 or num_bins % 2 == 0:
        raise UsageError(f"num_bins: {num_bins} is not an odd number of at least 3")
    half = symexp(jnp.linspace(-20.0, 0.0, num_bins // 2 + 1, dtype=jnp.float32))
    return jnp.concatenate([half, -half[-2::-1]])


class TwoHot(NamedTuple):
    """A number predicted as a categorical over `bins`; a target becomes weights on its two neighboring bins.

    The bins are values, not symlog values: targets are not squashed and the mean is not expanded again. The gradient
    does not depend on the size of the target, so one learning rate serves all rewards.

    Source: Hafner et al. 2025 (DreamerV3), equations for the critic loss and twohot. The official code interpolates
    between bins in value space, which we follow; the first preprint used uniform bins in symlog space.
    """

    logits: Array  # [..., K]
    bins: Array  # float32 [K], increasing and antisymmetric: those of `exponential_bins`

    def mean(self) -> Array:
        """Expected value Σ pᵢ bᵢ: float32 `[...]`, exactly 0 for uniform logits."""
        contracts.exactly(self.logits.shape[-1], bins=self.bins)
        logits = jnp.maximum(self.logits.astype(jnp.float32), -1e30)  # a bin that is ruled out is not NaN
        probs, half = jax.nn.softmax(logits), self.bins.shape[0] // 2
        mirrored = lambda x: (x[..., half + 1 :], x[..., :half][..., ::-1])
        (above, below), (upper, lower) = mirrored(probs), mirrored(logits)
        # A sum of ±1e8 terms does not cancel in float32, and neither do mirrored probabilities where compilers round
        # them by their place. p₊ - p₋ = (p₊ + p₋) tanh((l₊ - l₋) / 2) is 0 where the logits are equal, however it is
        # rounded.
        return ((above + below) * jnp.tanh((upper - lower) / 2) * self.bins[half + 1 :]).sum(-1)

    def log_prob(self, target: Array) -> Array:
        """Negative cross-entropy of the two-hot encoded target.

            (1 - w) ln pᵢ + w ln pᵢ₊₁,   w = (y - bᵢ) / (bᵢ₊₁ - bᵢ),   bᵢ ≤ y ≤ bᵢ₊₁

        Args:
          target: y `[...]`, any real number; clipped to the range of the bins. Carries no gradient.

        Returns:
          float32 `[...]`.
        """
        contracts.exactly(*self.logits.shape[:-1], target=target)
        contracts.floating(target=target)
        logits = self.logits.astype(jnp.float32)
        target = jnp.clip(jax.lax.stop_gradient(target).astype(jnp.float32), self.bins[0], self.bins[-1])
        # Two gathered logits per row are cheaper than [..., K] targets, forward and backward.
        below = jnp.clip((self.bins <= target[..., None]).sum(-1) - 1, 0, self.bins.shape[0] - 2)
        low, high = self.bins[below], self.bins[below + 1]
        weight = (target - low) / (high - low)
        pair = jnp.take_along_axis(logits, below[..., None] + jnp.arange(2), -1)
        return (1 - weight) * pair[..., 0] + weight * pair[..., 1] - jax.nn.logsumexp(logits, -1)


class SymlogMSE(NamedTuple):
    """A number predicted by its symlog: a regression whose error grows with the logarithm of the target.

    Source: Hafner et al. 2023 (DreamerV3), equation 9 (symlog squared loss, without the factor ½).

    >>> SymlogMSE(jnp.array(0.0)).log_prob(jnp.array(jnp.e - 1)).round(4).item()
    -1.0
    """

    prediction: Array  # [...], in symlog space

    def mean(self) -> Array:
        """The predicted value, float32 `[...]`."""
        return symexp(self.prediction.astype(jnp.float32))

    def log_prob(self, target: Array) -> Array:
        """-(prediction - symlog(target))², float32 `[...]`: a log-likelihood up to scale and constant."""
        contracts.alike(prediction=self.prediction, target=target)
        return -((self.prediction.astype(jnp.float32) - symlog(target)) ** 2)


class UnitNormal(NamedTuple):
    """Numbers, vectors or images predicted as the mean of a normal distribution of standard deviation 1.

    >>> [round(x, 3) for x in UnitNormal(jnp.zeros((2, 3)), 1).log_prob(jnp.zeros((2, 3))).tolist()]
    [-2.757, -2.757]
    """

    prediction: Array  # [..., *event]
    event_dims: int = 0  # trailing axes that are one event

    def mean(self) -> Array:
        """float32 `[..., *event]`."""
        return self.prediction.astype(jnp.float32)

    def log_prob(self, target: Array) -> Array:
        """-½ Σ (x - mean)² - ½ ln 2π for each number of the event, float32 `[...]`."""
        contracts.alike(prediction=self.prediction, target=target)
        error = 0.5 * (target.astype(jnp.float32) - self.mean()) ** 2 + 0.5 * jnp.log(2 * jnp.pi)
        return -error.sum(tuple(range(-self.event_dims, 0)))


Number = UnitNormal | SymlogMSE | TwoHot


def number(outputs: dict[str, Array], kind: str = "normal") -> Number:
    """The distribution of one number, `[...]`, such as a reward or a return, from the outputs of a head.

    Args:
      outputs: "mean" `[..., 1]`, or "logits" `[..., K]`.
      kind: `normal` or `symlog_mse` around the mean, or `two_hot` over K exponential bins.
    """
    contracts.floating(None, **outputs)
    if kind == "two_hot":
        return TwoHot(outputs["logits"], exponential_bins(outputs["logits"].shape[-1]))
    mean = outputs["mean"][..., 0]
    return SymlogMSE(mean) if kind == "symlog_mse" else UnitNormal(mean)


# ---------------------------------------------------------------------------------------------------------------------
# Continuous actions


class _Normal(distrax.Normal):
    """A normal distribution that can be sampled with one key for each row."""

    def _sample_n(self, key: Array, n: int) -> Array:
        return self.loc + self.scale * noise.normal(_add_sample_axis(key), (n, *self.batch_shape))


def bounded_normal(mean: Array, std: Array, min_std: float = 0.1, max_std: float = 1.0) -> distrax.Independent:
    """Gaussian actions with bounded parameters: mean tanh(mean), deviation min + (max - min) sigmoid(std + 2).

    Mean and deviation are bounded, samples are not: they are stored and scored as drawn, and the environment clips.

    Args:
      mean, std: `[..., A]`, raw outputs of the network.
      min_std, max_std: range of the standard deviation, 0 < min_std < max_std.

    Returns:
      A distribution over float32 `[..., A]`; `log_prob` and `entropy` are summed over A. Samples are reparameterized.

    Source: official DreamerV3 code, `bounded_normal`.

    >>> bounded_normal(jnp.zeros(2), jnp.full(2, 99.0)).stddev().tolist()
    [1.0, 1.0]
    """
    contracts.alike(None, mean=mean, std=std)
    mean, std = jnp.tanh(mean.astype(jnp.float32)), jax.nn.sigmoid(std.astype(jnp.float32) + 2)
    return distrax.Independent(_Normal(mean, min_std + (max_std - min_std) * std), 1)
