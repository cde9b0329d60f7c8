"""A causal transformer over tokens, as a full pass over a sequence or token by token with a cache of fixed size.

In shapes, `N` is the most tokens a context can hold, `D` the width, `Dh` the width of a head.

Source: Radford et al. 2019 (GPT-2) with learned positions, as Micheli et al. 2023 (IRIS) use it.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.mlp import ACTIVATIONS
from wmjax.ops import contracts, noise
from wmjax.types import Array


class KVCache(NamedTuple):
    """Keys and values of the context, one array for each layer; what lies beyond `length` is not read."""

    keys: tuple[Array, ...]  # [B, heads, N, Dh]
    values: tuple[Array, ...]  # [B, heads, N, Dh]
    length: Array  # int32 [B], tokens in the context; [1] where all rows have as many


def in_step(cache: KVCache) -> KVCache:
    """The cache, of which the caller knows that all rows have the same length: what is new is written at one place."""
    return cache._replace(length=cache.length[:1])


def restart(cache: KVCache, fresh: KVCache, where: Array) -> KVCache:
    """The cache whose rows `where` (bool, as its lengths) hold the tokens of `fresh` alone; the others stay."""
    contracts.exactly(cache.length.shape[0], where=where)
    contracts.booleans(where=where)
    here = where[:, None, None, None]

    def front(old: Array, x: Array) -> Array:
        start = jnp.where(here, x, jax.lax.slice(old, (0,) * 4, x.shape))
        return jax.lax.dynamic_update_slice(old, start, (0,) * 4)

    keys, values = (tuple(map(front, *pair)) for pair in zip(cache[:2], fresh[:2], strict=True))
    return KVCache(keys, values, jnp.where(where, fresh.keys[0].shape[-2], cache.length))


def _write(old: Array, x: Array, place: Array) -> Array:
    """A layer's keys or values with those of new tokens, `[B, heads, T, Dh]`, at `place` `[B or 1, T]`."""
    if place.shape[0] == 1:  # one place for all rows: no scatter
        return jax.lax.dynamic_update_slice_in_dim(old, x, place[0, 0], 2)
    rows = jnp.arange(place.shape[0])[:, None]
    # Indexed axes that are apart lead the updates: [B, T, heads, Dh].
    return old.at[rows, :, place].set(x.swapaxes(1, 2), mode="promise_in_bounds", unique_indices=True)


def dropout(keys: Array | None, x: Array, rate: float) -> Array:
    """Sets entries to 0 with probability `rate` and scales the rest, one key for each row; without keys, nothing."""
    if keys is None or rate == 0.0:
        return x
    contracts.floating(x=x)
    contracts.keys(x.shape[0], keys=keys)
    # 16 random bits each: half the work of 32, and the rate is met within 1e-5.
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys)
    dropped = round(rate * 2**16)
    return jnp.where(bits >= dropped, x / (1.0 - dropped / 2**16), 0.0).astype(x.dtype)


def _linear(features: int, dtype: str, name: str | None = None) -> nn.Dense:
    """x W + b, started at N(0, 0.02) and 0."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class _Weights(nn.Module):
    """What `_linear` of the same name has, to be applied together with others: kernel `[width, width]` and bias."""

    @nn.compact
    def __call__(self, width: int, dtype: str) -> tuple[Array, Array]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (width, width))
        return kernel.astype(dtype), self.param("bias", nn.initializers.zeros_init(), (width,)).astype(dtype)


class LayerNorm(nn.Module):
    """Mean removed, divided by the standard deviation with ε = 1e-5, scaled and shifted; float32 statistics."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracts.floating(None, x=x)
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(x.dtype)


def _attend(q: Array, k: Array, v: Array, place: Array, keys: Array | None = None, rate: float = 0.0) -> Array:
    """Attention of tokens at `place` `[B or 1, T]`, q `[B, heads, T, Dh]`, to those at 0, 1, ... that are not later."""
    scores = jnp.einsum("bhtd,bhnd->bhtn", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    earlier = jnp.arange(k.shape[-2]) <= place[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("bhtn,bhnd->bhtd", dropout(keys, weights, rate), v)


class Block(nn.Module):
    """Attention and a two-layer MLP, each with a skip; the norm before each (`pre`) or after its skip (`post`)."""

    heads: int
    ff: int
    rate: float = 0.0
    norm: str = "pre"
    activation: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Array, place: Array, cache: tuple[Array, Array] | None = None, keys: Array | None = None
    ) -> tuple[Array, tuple[Array, Array]]:
        """Outputs `[B, T, D]` of tokens at `place`, alone or after those in the layer's cache, and that with them."""
        contracts.exactly(None, None, None, x=x)
        contracts.integers(x.shape[1], place=place)
        *_, tokens, width = x.shape
        drop = [None if keys is None else noise.fold_in(keys, site) for site in range(3)]
        norm1, norm2 = LayerNorm(name="norm1"), LayerNorm(name="norm2")
        y = norm1(x) if self.norm == "pre" else x
        # One product for the three; `scan` over tokens joins their weights before its loop.
        weights = zip(*(_Weights(name=name)(width, self.dtype) for name in ("query", "key", "value")), strict=True)
        kernel, bias = (jnp.concatenate(x, -1) for x in weights)
        qkv = (y @ kernel + bias).reshape(-1, tokens, 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, part].swapaxes(1, 2) for part in range(3))
        if cache is not None:
            # Written first, read afterwards: then the compiler needs no copy of it.
            k, v = (_write(old, x, place) for old, x in zip(cache, (k, v), strict=True))
        y = _attend(q, k, v, place, drop[0], self.rate)
        y = _linear(width, self.dtype, "proj")(y.swapaxes(1, 2).reshape(x.shape))
        x = x + dropout(drop[1], y, self.rate)
        x = x if self.norm == "pre" else norm1(x)
        y = norm2(x) if self.norm == "pre" else x
        y = ACTIVATIONS[self.activation](_linear(self.ff, self.dtype, "mlp_in")(y))
        x = x + dropout(drop[2], _linear(width, self.dtype, "mlp_out")(y), self.rate)
        return (x if self.norm == "pre" else norm2(x)), (k, v)


class TokenTransformer(nn.Module):
    """A world of tokens: blocks of K frame tokens, one action, and, if asked for, one reward; heads on their places.

    The token after position j of a block is predicted at j, so a frame's own tokens at 0 to K - 2, and the first token
    of the *next* frame at the block's last position. Nothing is predicted at K - 1: an action follows, which the model
    does not choose. Reward and end are predicted at the action.
    """

    tokens: int  # K, of a frame
    max_blocks: int  # in the longest context
    vocab_size: int  # V, and
    actions: int  # A: sizes of the embedding tables
    layers: int
    heads: int
    width: int
    ff: int
    rate: float = 0.0
    norm: str = "pre"
    activation: str = "gelu"
    position_std: float = 0.02
    reward_tokens: bool = False  # whether a reward token closes each block
    dtype: str = "float32"
    remat: bool = False  # recompute blocks in the backward pass instead of storing their insides

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.tokens + 1 + self.reward_tokens

    @property
    def max_tokens(self) -> int:
        """N."""
        return self.block * self.max_blocks

    @property
    def frame_positions(self) -> tuple[int, ...]:
        """Positions in a block where frame tokens are predicted."""
        return (*range(self.tokens - 1), self.block - 1)

    def setup(self):
        table = nn.initializers.normal(0.02)
        self.frame_table = self.param("frame_table", table, (self.vocab_size, self.width))
        self.action_table = self.param("action_table", table, (self.actions, self.width))
        if self.reward_tokens:
            self.reward_table = self.param("reward_table", table, (3, self.width))
        position = nn.initializers.normal(self.position_std)
        self.position_table = self.param("position_table", position, (self.max_tokens, self.width))
        options = (self.heads, self.ff, self.rate, self.norm, self.activation, self.dtype)
        kind = nn.remat(Block) if self.remat else Block
        self.blocks = [kind(*options) for _ in range(self.layers)]
        if self.norm == "pre":
            self.norm_out = LayerNorm()
        self.frame_in, self.frame_out = _linear(self.width, self.dtype), _linear(self.vocab_size, self.dtype)
        self.reward_in, self.reward_out = _linear(self.width, self.dtype), _linear(3, self.dtype)
        self.end_in, self.end_out = _linear(self.width, self.dtype), _linear(2, self.dtype)

    def init_cache(self, batch: int) -> KVCache:
        """A cache `[B, ...]` without tokens."""
        shape = (batch, self.heads, self.max_tokens, self.width // self.heads)
        empty = lambda: tuple(jnp.zeros(shape, self.dtype) for _ in range(self.layers))
        return KVCache(empty(), empty(), jnp.zeros(batch, jnp.int32))

    # Embeddings, [..., D].

    def embed_frame(self, tokens: Array) -> Array:
        """Frame tokens int32 `[...]`."""
        contracts.integers(tokens=tokens)
        return self.frame_table[tokens].astype(self.dtype)

    def embed_action(self, action: Array) -> Array:
        """One-hot actions `[..., A]`."""
        contracts.floating(self.actions, action=action)
        return action.astype(self.dtype) @ self.action_table.astype(self.dtype)

    def embed_reward(self, sign: Array) -> Array:
        """Signs of rewards `[...]`, -1, 0 or 1."""
        return self.reward_table[sign.astype(jnp.int32) + 1].astype(self.dtype)

    # Passes.

    def full(self, x: Array, keys: Array | None = None) -> tuple[Array, KVCache]:
        """A pass over a whole context: embeddings `[B, T, D]` to outputs `[B, T, D]`; `keys` `[B]` are for dropout.

        The cache of these tokens, which is given too, has no room for more.
        """
        contracts.exactly(None, None, self.width, x=x)
        contracts.floating(x=x)
        if keys is not None:
            contracts.keys(x.shape[0], keys=keys)
        batch, length, _ = x.shape
        x = x + self.position_table[:length].astype(self.dtype)
        x = dropout(None if keys is None else noise.fold_in(keys, self.layers), x, self.rate)
        x, (new_keys, values) = self._through_blocks(x, jnp.arange(length)[None], None, keys)
        return x, KVCache(new_keys, values, jnp.full(batch, length))

    def advance(self, x: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """A pass over the next tokens of a context: embeddings `[B, T, D]` to outputs `[B, T, D]`, as those of `full`.

        The cache has room for T more tokens, and its lengths may differ; it is given back with these tokens.
        """
        contracts.exactly(cache.keys[0].shape[0], None, self.width, x=x)
        contracts.floating(x=x)
        place = cache.length[:, None] + jnp.arange(x.shape[1])
        x, (keys, values) = self._through_blocks(x + self.position_table[place].astype(self.dtype), place, cache, None)
        return x, KVCache(keys, values, cache.length + x.shape[1])

    def _through_blocks(self, x: Array, place: Array, cache: KVCache | None, keys: Array | None):
        new = []
        for layer, block in enumerate(self.blocks):
            old = None if cache is None else (cache.keys[layer], cache.values[layer])
            x, pair = block(x, place, old, None if keys is None else noise.fold_in(keys, layer))
            new.append(pair)
        return self.norm_out(x) if self.norm == "pre" else x, zip(*new, strict=True)

    # Heads: outputs [..., D] to float32 logits.

    def frame_logits(self, hidden: Array) -> Array:
        """`[..., V]`, of the frame token that comes next."""
        contracts.floating(self.width, hidden=hidden)
        return self.frame_out(jax.nn.relu(self.frame_in(hidden))).astype(jnp.float32)

    def outcome_logits(self, hidden: Array) -> tuple[Array, Array]:
        """`[..., 3]` of the sign of the reward (-1, 0, 1), and `[..., 2]` of going on or ending; at an action."""
        contracts.floating(self.width, hidden=hidden)
        reward = self.reward_out(jax.nn.relu(self.reward_in(hidden)))
        end = self.end_out(jax.nn.relu(self.end_in(hidden)))
        return reward.astype(jnp.float32), end.astype(jnp.float32)

    def __call__(
        self, tokens: Array, action: Array, reward: Array, keys: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Logits of a whole sequence, batch first.

        Args:
          tokens: int32 `[B, L, K]`.
          action: one-hot `[B, L, A]`, chosen on seeing the frame.
          reward: `[B, L]`, signs that followed the action; used with `reward_tokens` only.
          keys: `[B]`, for dropout; None for none.

        Returns:
          Frame logits `[B, L K, V]` (entry i predicts frame token i + 1; the last predicts beyond the sequence), reward
          logits `[B, L, 3]` and end logits `[B, L, 2]`.
        """
        contracts.exactly(None, None, self.tokens, tokens=tokens)
        batch, length, _ = tokens.shape
        contracts.exactly(batch, length, self.actions, action=action)
        contracts.exactly(batch, length, reward=reward)
        parts = [self.embed_frame(tokens), self.embed_action(action)[:, :, None]]
        if self.reward_tokens:
            parts.append(self.embed_reward(reward)[:, :, None])
        x = jnp.concatenate(parts, 2).reshape(batch, length * self.block, self.width)
        hidden = self.full(x, keys)[0].reshape(batch, length, self.block, self.width)
        frames = hidden[:, :, jnp.array(self.frame_positions)].reshape(batch, -1, self.width)
        return self.frame_logits(frames), *self.outcome_logits(hidden[:, :, self.tokens])
