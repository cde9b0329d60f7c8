"""Vector quantization: the nearest entry of a codebook, how codebooks learn, and how to see and mend their collapse.

A codebook is float32 `[V, D]`, latents are `[..., D]`, tokens int32 `[...]` in [0, V). Distances are computed in
float32 at the highest precision, whatever the dtype of the latents: tokens must not depend on it. So are sums.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array, Metrics

sg = jax.lax.stop_gradient

OUT_OF_REACH = 100.0  # each coordinate of an entry that no latent is to take; float16 holds it, too
FITS = 0.01  # squared distance, as a share of the variance of the latents, at which latents count as the same

# ---------------------------------------------------------------------------------------------------------------------
# Quantizing


def distances(z: Array, codebook: Array) -> Array:
    """Squared distances ‖z‖² + ‖e‖² - 2 z·e of latents `[..., D]` to all entries: float32 `[..., V]`.

    >>> distances(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])).tolist()
    [[0.0, 5.0]]
    """
    contracts.exactly(None, None, codebook=codebook)
    contracts.shaped(codebook.shape[-1], z=z)
    contracts.floating(z=z, codebook=codebook)
    z, codebook = z.astype(jnp.float32), codebook.astype(jnp.float32)
    products = jnp.matmul(z, codebook.T, precision="highest")
    return jnp.sum(z * z, -1, keepdims=True) + jnp.sum(codebook * codebook, -1) - 2 * products


def normalize(x: Array) -> Array:
    """Vectors of length 1, along the last axis; a zero vector stays zero."""
    contracts.floating(None, x=x)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


def nearest(z: Array, codebook: Array) -> Array:
    """The token of each latent: its nearest entry, the first of equals. int32 `[...]`.

    For unit vectors that is the entry with the largest cosine.

    >>> nearest(jnp.array([[0.9, 0.1]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])).tolist()
    [1]
    """
    return jnp.argmin(distances(z, codebook), -1).astype(jnp.int32)


def straight_through(z: Array, quantized: Array) -> Array:
    """z + sg(e - z): the value of the entries, the gradient of the latents. The codebook gets none from it.

    Source: van den Oord et al. 2017 (VQ-VAE), section 3.2.

    >>> jax.grad(lambda z: straight_through(z, jnp.float32(5.0)) ** 2)(jnp.float32(1.0)).item()
    10.0
    """
    contracts.alike(z=z, quantized=quantized)
    return z + sg(quantized - z)


def codebook_losses(z: Array, quantized: Array) -> tuple[Array, Array]:
    """How far latents and their entries are apart, once for each side's gradient.

        L_codebook = mean (sg(z) - e)²,   L_commit = mean (z - sg(e))²

    Args:
      z, quantized: `[..., D]`.

    Returns:
      Two float32 scalars of equal value. The first trains the codebook, the second the encoder.

    Source: van den Oord et al. 2017, equation 3; means over all entries as IRIS takes them.
    """
    contracts.alike(z=z, quantized=quantized)
    z, quantized = z.astype(jnp.float32), quantized.astype(jnp.float32)
    return jnp.mean((sg(z) - quantized) ** 2), jnp.mean((z - sg(quantized)) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# Codebooks that learn by moving averages instead of gradients


class CodebookState(NamedTuple):
    """What is remembered of the use of a codebook."""

    usage: Array  # float32 [V], moving average of the share of latents that took each entry
    counts: Array  # float32 [V], moving average of their number ("ema")
    sums: Array  # float32 [V, D], moving average of their sum ("ema")


def init_state(codebook: Array) -> CodebookState:
    """As if every entry had been taken once by a latent equal to it; usage is even."""
    contracts.exactly(None, None, codebook=codebook)
    contracts.floating(codebook=codebook)
    size = codebook.shape[0]
    return CodebookState(jnp.full(size, 1.0 / size, jnp.float32), jnp.ones(size), codebook.astype(jnp.float32))


class Assigned(NamedTuple):
    """The latents of a batch, N on this device, and what the entries of the codebook got of all devices' latents."""

    z: Array  # float32 [N, D]
    tokens: Array  # int32 [N]
    counts: Array  # float32 [V], how many latents took each entry
    sums: Array  # float32 [V, D], of these latents


def _sum_over(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def assigned(z: Array, tokens: Array, size: int, axis_name: str | None = None) -> Assigned:
    """What a codebook of `size` entries gets, of latents `[..., D]` and their tokens `[...]`."""
    contracts.floating(None, z=z)
    contracts.integers(tokens=tokens)
    contracts.exactly(*z.shape[:-1], tokens=tokens)
    z, tokens = z.reshape(-1, z.shape[-1]).astype(jnp.float32), tokens.reshape(-1)
    onehot = jax.nn.one_hot(tokens, size, dtype=jnp.float32)
    sums = jnp.matmul(onehot.T, z, precision="highest")
    return Assigned(z, tokens, _sum_over(onehot.sum(0), axis_name), _sum_over(sums, axis_name))


def _check(batch: Assigned, codebook: Array) -> None:
    contracts.exactly(None, None, codebook=codebook)
    contracts.floating(codebook=codebook)
    size, dim = codebook.shape
    contracts.exactly(None, dim, z=batch.z)
    contracts.exactly(batch.z.shape[0], tokens=batch.tokens)
    contracts.exactly(size, counts=batch.counts)
    contracts.exactly(size, dim, sums=batch.sums)
    contracts.floating(z=batch.z, counts=batch.counts, sums=batch.sums)
    contracts.integers(tokens=batch.tokens)


def update_usage(state: CodebookState, counts: Array, decay: float) -> CodebookState:
    """Lets `usage` follow the share of each entry in `counts` `[V]`: u ← β u + (1 - β) n / Σ n."""
    contracts.exactly(*state.usage.shape, counts=counts)
    contracts.floating(counts=counts)
    share = counts / jnp.maximum(counts.sum(), 1.0)
    return state._replace(usage=decay * state.usage + (1 - decay) * share)


def ema_update(
    state: CodebookState, batch: Assigned, decay: float = 0.99, eps: float = 1e-5
) -> tuple[CodebookState, Array]:
    """Moves every entry to the running mean of the latents that took it.

        N ← β N + (1 - β) n,   m ← β m + (1 - β) s,   e = m / Ñ,   Ñ = (N + ε) / (Σ N + V ε) Σ N

    n and s are the batch's `counts` and `sums`, β is `decay` in [0, 1). ε keeps entries that nobody takes finite (they
    drift to the origin). Returns the new state and the codebook `[V, D]`.

    Source: van den Oord et al. 2017, appendix A.1, with Laplace smoothing.
    """
    _check(batch, state.sums)
    counts = decay * state.counts + (1 - decay) * batch.counts
    sums = decay * state.sums + (1 - decay) * batch.sums
    total = counts.sum()
    smoothed = (counts + eps) / (total + counts.shape[0] * eps) * total
    return state._replace(counts=counts, sums=sums), sums / smoothed[:, None]


def cosine_update(codebook: Array, batch: Assigned, rate: float = 0.01) -> Array:
    """Turns every unit entry a little towards the mean direction of the unit latents that took it.

        e ← normalize((1 - r) e + r normalize(s / n)),   n = counts, s = sums

    An entry that nobody took keeps its direction. Source: Micheli et al. 2024 (Δ-IRIS).
    """
    _check(batch, codebook)
    return normalize((1 - rate) * codebook + rate * normalize(_means(batch)))


def _means(batch: Assigned) -> Array:
    """Of the latents of each entry, `[V, D]`; 0 without any."""
    return batch.sums / jnp.maximum(batch.counts, 1.0)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Health


def health(counts: Array, usage: Array, dead_below: float) -> Metrics:
    """How much of the codebook is in use, by `counts` `[V]` of one batch and `usage` `[V]` of `CodebookState`.

    Returns:
      `perplexity`, exp of the entropy of the batch's tokens, in [1, V]; `usage`, the share of entries that the batch
      took; `dead`, the share of entries whose usage is below `dead_below`.
    """
    contracts.exactly(None, counts=counts)
    contracts.alike(counts=counts, usage=usage)
    share = counts / jnp.maximum(counts.sum(), 1.0)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)))
    return {
        "perplexity": jnp.exp(entropy),
        "usage": jnp.mean(counts > 0, dtype=jnp.float32),
        "dead": jnp.mean(usage < dead_below, dtype=jnp.float32),
    }


def revive(
    key: Array, state: CodebookState, codebook: Array, batch: Assigned, dead_below: float, axis_name: str | None = None
) -> tuple[CodebookState, Array]:
    """Gives one dead entry the place of a latent of the batch, and a fresh record; takes all other dead out of reach.

    The latent is drawn in proportion to its squared distance from the mean of all that share its token, so that a new
    entry goes where one stands for several things; not one within 1 % of the variance, which an entry only lags behind.
    Where no token stands for latents that differ, no entry is needed.

    An entry that lies beside one in use, a double of it or as both were at the start, does no harm until the encoder
    has moved a little: then it is the nearer one, and what it stands for has changed its name, in all pictures at once
    where that is their background. A model of tokens then has to learn all of it anew. So the dead do not stay where
    they are, and no two entries are given places at once.

    Args:
      key: the same on every device; consumed.
      state, codebook: after this batch.
      dead_below: an entry is dead where its usage is below this share.
      axis_name: axis that the batch is spread over; latents of all devices are drawn from.

    Source: the random restarts of Dhariwal et al. 2020 (Jukebox), section 3.1, with the draw of Arthur & Vassilvitskii
    2007 (k-means++).
    """
    contracts.keys(key=key)
    _check(batch, codebook)
    z, size, rows = batch.z, codebook.shape[0], batch.z.shape[0]
    count, mean, square = (_sum_over(x, axis_name) for x in (jnp.float32(rows), z.sum(0), jnp.sum(z * z)))
    variance = square / count - jnp.sum((mean / count) ** 2)
    error = jnp.sum((z - _means(batch)[batch.tokens]) ** 2, -1)
    upto = jnp.cumsum(jnp.where(error > FITS * variance, error, 0.0))
    before, total = jnp.float32(0), upto[-1]
    if axis_name is not None:
        totals = jax.lax.all_gather(total, axis_name)
        before = jnp.sum(jnp.where(jnp.arange(totals.shape[0]) < jax.lax.axis_index(axis_name), totals, 0.0))
        total = totals.sum()
    mark = jax.random.uniform(key) * total - before  # on a line on which each latent has its share
    own = (mark >= 0) & (mark < upto[-1])
    index = jnp.clip(jnp.searchsorted(upto, mark, side="right"), 0, rows - 1)
    drawn = _sum_over(jnp.where(own, z[index], 0.0), axis_name)
    dead = state.usage < dead_below
    chosen = dead & (jnp.arange(size) == jnp.argmax(dead)) & (total > 0)
    usage, counts = jnp.where(chosen, 1.0 / size, state.usage), jnp.where(dead, 1.0, state.counts)
    place = jnp.where(chosen[:, None], drawn, OUT_OF_REACH)
    sums, codebook = (jnp.where(dead[:, None], place, old) for old in (state.sums, codebook))
    return CodebookState(usage, counts, sums), codebook
