"""The transformer as a world model (equations 3 to 5): frames are drawn token by token, outcomes at the action."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import dreaming
from wmjax.agents.iris.config import IRISConfig
from wmjax.agents.iris.modules import Networks, descend, image_name
from wmjax.agents.iris.tokenizer import decode, encode
from wmjax.nets.mlp import call
from wmjax.nets.transformer import KVCache, in_step, restart
from wmjax.ops import noise
from wmjax.ops.masks import masked_mean
from wmjax.ops.scan import scan
from wmjax.types import Array, EnvSpec, PyTree, Sampling, Update, WorldModel

if TYPE_CHECKING:
    from wmjax.agents.iris.agent import Equations


class IRISState(NamedTuple):
    """A frame of tokens, the context before it, and what the last transition drew and expected."""

    tokens: Array  # int32 [B, K], the current frame
    cache: KVCache  # of the context, this frame included
    reward: Array  # float32 [B], drawn: -1, 0 or 1
    end: Array  # bool [B], drawn
    reward_mean: Array  # float32 [B], in [-1, 1]
    cont: Array  # float32 [B], P(not terminal)


def draw(key: Array, logits: Array) -> Array:
    """A class for each row of logits `[..., V]`, int32 `[...]`; one key, or keys for the leading axes."""
    return jnp.argmax(logits + noise.gumbel(key, logits.shape), -1).astype(jnp.int32)


def _append_frame(nets: Networks, params: dict, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """Outputs `[B, k, D]` after k frame tokens `[B, k]`, and the context with them."""
    embedded = call(nets.world_model, params["world_model"], tokens, method="embed_frame")
    return call(nets.world_model, params["world_model"], embedded, cache, method="advance")


def make_room(nets: Networks, params: dict, cache: KVCache, tokens: Array, needed: int) -> KVCache:
    """The context, cut down to the current frame `tokens` `[B, K]` in the rows where `needed` more would not fit.

    No gradient passes into a context that is cut down.
    """
    model, weights = nets.world_model, jax.lax.stop_gradient(params["world_model"])
    full = cache.length + needed > model.max_tokens

    def current_frame(_):
        embedded = call(model, weights, tokens, method="embed_frame")
        return jnp.bool_(False), call(model, weights, embedded, method="full")[1]

    _, shapes = jax.eval_shape(current_frame, ())
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # A loop of one round at most, which under `vmap` is still made only where a row is full; a `cond` would always be.
    _, fresh = jax.lax.while_loop(lambda loop: loop[0], current_frame, (jnp.any(full), nothing))
    return restart(cache, fresh, full)


def respond(nets: Networks, params: dict, key: Array, state: IRISState, action: Array) -> tuple[IRISState, Array]:
    """What follows an action (one-hot `[B, A]`), except for the next frame; the cache of `state` has room for it.

    Gives the state with the action in its context and its outcome, and the output `[B, D]` that predicts the next
    frame's first token. `key` is one key or keys `[B]`; consumed.
    """
    model, weights = nets.world_model, params["world_model"]
    advance = lambda x, cache: call(model, weights, x[:, None], cache, method="advance")
    key_reward, key_end = noise.split(key, 2)
    hidden, cache = advance(call(model, weights, action, method="embed_action"), state.cache)
    reward_logits, end_logits = call(model, weights, hidden[:, 0], method="outcome_logits")
    reward = (draw(key_reward, reward_logits) - 1).astype(jnp.float32)
    end = draw(key_end, end_logits) == 1
    if model.reward_tokens:
        hidden, cache = advance(call(model, weights, reward, method="embed_reward"), cache)
    probs = jax.nn.softmax(reward_logits)
    cont = jax.nn.softmax(end_logits)[:, 0]
    return IRISState(state.tokens, cache, reward, end, probs[:, 2] - probs[:, 0], cont), hidden[:, 0]


def next_frame(nets: Networks, params: dict, key: Array, cache: KVCache, hidden: Array) -> tuple[KVCache, Array]:
    """Draws a frame, int32 `[B, K]`, token by token, each seen by those after it; gives the cache with it in it, too.

    Before, the cache ends with an action (or its reward token), where the output is `hidden` `[B, D]`. `key` is one key
    or keys `[B]`, consumed; token k uses `fold_in(key, k)`.
    """
    model, weights = nets.world_model, params["world_model"]

    def step(carry, k):
        cache, hidden = carry
        token = draw(noise.fold_in(key, k, model.tokens), call(model, weights, hidden, method="frame_logits"))
        hidden, cache = _append_frame(nets, params, token[:, None], cache)
        return (cache, hidden[:, 0]), token

    (cache, _), tokens = scan(step, (cache, hidden), jnp.arange(model.tokens))
    return cache, tokens.T


def follow(nets: Networks, params: dict, key: Array, state: IRISState, action: Array) -> IRISState:
    """What follows an action (one-hot `[B, A]`), with the next frame; the cache of `state` has room for it."""
    key_outcome, key_frame = noise.split(key, 2)
    state, hidden = respond(nets, params, key_outcome, state, action)
    cache, tokens = next_frame(nets, params, key_frame, state.cache, hidden)
    return state._replace(tokens=tokens, cache=cache)


def world_model(nets: Networks, spec: EnvSpec, config: IRISConfig) -> WorldModel:
    """The learned environment; `State` is `IRISState`, an embedding is a frame's tokens.

    Where a step would not fit in the context any more, it restarts from the current frame alone.
    """
    name, model = image_name(spec, config), nets.world_model

    def init_state(params, batch_size):
        del params
        zeros = jnp.zeros(batch_size)
        tokens = jnp.zeros((batch_size, model.tokens), jnp.int32)
        return IRISState(tokens, model.init_cache(batch_size), zeros, zeros > 0, zeros, zeros + 1)

    @_with_any_axes
    def observe(params, key, state, prev_action, embed, is_first):
        fresh = is_first | (state.cache.length == 0)
        state = state._replace(cache=make_room(nets, params, state.cache, state.tokens, model.block))
        moved, _ = respond(nets, params, key, state, prev_action)
        cache = moved.cache._replace(length=jnp.where(fresh, 0, moved.cache.length))
        _, cache = _append_frame(nets, params, embed, cache)
        keep = lambda x, start: jnp.where(fresh, start, x)
        outcome = keep(moved.reward, 0.0), keep(moved.end, False), keep(moved.reward_mean, 0.0), keep(moved.cont, 1.0)
        return IRISState(embed, cache, *outcome)

    @_with_any_axes
    def imagine(params, key, state, action):
        state = state._replace(cache=make_room(nets, params, state.cache, state.tokens, model.block))
        return follow(nets, params, key, state, action)

    return WorldModel(
        init_state=init_state,
        encode=lambda params, obs: encode(nets, config, params, obs[name]),
        observe=observe,
        imagine=imagine,
        predict=lambda params, state: (state.reward_mean, state.cont),
        decode=lambda params, state: {name: 255 * decode(nets, params, state.tokens)},
        context=config.max_blocks,
        no_gradient="frames are drawn as tokens, through which no gradient passes",
    )


def _with_any_axes(step: Callable) -> Callable:
    """A step of states `[B]` as one of any leading axes."""

    def wrapped(params, key, state, *more):
        lead = state.tokens.shape[:-1]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), (state, *more))
        state = step(params, key if key.ndim == 0 else key.reshape(-1), *flat)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), state)

    return wrapped


def start_state(nets: Networks, model: WorldModel, params: dict, tokens: Array) -> IRISState:
    """The state whose context is one frame, `[B, K]`."""
    state = model.init_state(params, tokens.shape[0])
    _, cache = _append_frame(nets, params, tokens, state.cache)
    return state._replace(tokens=tokens, cache=cache)


class Generated(NamedTuple):
    """An imagined trajectory of tokens, the start first."""

    tokens: Array  # int32 [H + 1, B, K]
    action: Array  # [H, B, A], taken at frame t
    reward: Array  # float32 [H, B], drawn: -1, 0 or 1; follows action t
    end: Array  # bool [H, B], drawn; the trajectory goes on after it


def generate(
    nets: Networks, model: WorldModel, params: dict, key: Array, start_tokens: Array, horizon: int = 15,
    policy: Callable | None = None, policy_carry: PyTree = (),
) -> tuple[Generated, Array]:  # fmt: skip
    """Generates a trajectory token by token, from one frame.

    Args:
      key: one key, or keys `[B]`; consumed.
      start_tokens: int32 `[B, K]`, from `encode`.
      horizon: frames to generate, H.
      policy: `(key, policy_carry, frame [B, H, W, C] in [0, 1]) -> (policy_carry, action [B, A])`; by default uniformly
        random actions.
      policy_carry: its memory at the start.

    Returns:
      The trajectory, and its frames, float32 `[H + 1, B, H, W, C]` in [0, 1].
    """
    sizes = nets.world_model
    fits = sizes.tokens + horizon * sizes.block <= sizes.max_tokens

    def at_random(key, carry, frame):
        return carry, jax.nn.one_hot(draw(key, jnp.zeros((frame.shape[0], sizes.actions))), sizes.actions)

    # All rows start with one frame, so that they are in step. A frame that was decoded for the policy is kept, and not
    # decoded again.
    def imagine(params, key, state, action):
        state, length = state[0], state[0].cache.length
        cache = in_step(state.cache)
        if not fits:
            cache = make_room(nets, params, cache, state.tokens, sizes.block)
        state = follow(nets, params, key, state._replace(cache=cache), action)
        state = state._replace(cache=state.cache._replace(length=jnp.broadcast_to(state.cache.length, length.shape)))
        return state, decode(nets, params, state.tokens)

    choose = policy or at_random
    start = start_state(nets, model, params, start_tokens), decode(nets, params, start_tokens)
    look = lambda key, carry, state: choose(key, carry, state[1])
    emit = lambda state: (state[0].tokens, state[0].reward, state[0].end, state[1])
    _, (tokens, reward, end, frames), action = dreaming.imagine(
        model._replace(imagine=imagine), params, key, start, look, horizon, policy_carry=policy_carry, emit=emit
    )
    return Generated(tokens, action, reward[1:], end[1:]), frames


def world_model_losses(
    logits: tuple[Array, Array, Array], tokens: Array, reward: Array, end: Array, seen: Array, acted: Array,
    axis_name: str | None = None, shares: tuple[Array | None, Array | None] = (None, None),
) -> dict[str, Array]:  # fmt: skip
    """Cross-entropies of the next frame token, of the sign of the reward, and of the end; each a mean over what counts.

    Args:
      logits: of `TokenTransformer`.
      tokens: int32 `[B, L, K]`.
      reward, end: float32 and bool `[B, L]`, what followed the action at each frame.
      seen, acted: bool `[B, L]`, False where a frame is padding, and where the outcome of its action is not known.
      axis_name: axis that the batch is spread over.
      shares: of tokens and of outcomes that count in the whole batch, where this is a part of it; see `masked_mean`.

    Returns:
      Scalars. The sequence's first token is not predicted, and its last prediction lies beyond it: B (L K - 1) terms.

    Source: equations 3 to 5.
    """
    frame_logits, reward_logits, end_logits = logits
    batch, length, size = tokens.shape
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    labels = tokens.reshape(batch, length * size)[:, 1:]
    of_tokens, of_outcomes = shares
    return {
        "frame": masked_mean(cross_entropy(frame_logits[:, :-1], labels), counted(seen, size), axis_name, of_tokens),
        "reward": masked_mean(cross_entropy(reward_logits, _sign(reward) + 1), acted, axis_name, of_outcomes),
        "end": masked_mean(cross_entropy(end_logits, end.astype(jnp.int32)), acted, axis_name, of_outcomes),
    }


def counted(seen: Array, size: int) -> Array:
    """Which tokens are predicted and no padding, bool `[B, L K - 1]`, of frames `[B, L]` of K = `size` tokens."""
    return jnp.repeat(seen, size, 1)[:, 1:]


def _sign(reward: Array) -> Array:
    return jnp.sign(reward).astype(jnp.int32)


def make_update(
    nets: Networks, spec: EnvSpec, config: IRISConfig, axis_name: str | None, equations: Equations
) -> Update:
    """Steps on `[L + 1, B]` records, padded at the end; the last one only supplies what followed the one before."""
    name = image_name(spec, config)
    batch_first = lambda x: jnp.swapaxes(x, 0, 1)

    def update(state, key, trajectory):
        step, mask = trajectory.step, trajectory.mask
        tokens = batch_first(encode(nets, config, state.params, step.obs[name][:-1]))
        action, seen, acted = batch_first(trajectory.action[:-1]), batch_first(mask[:-1]), batch_first(mask[1:])
        reward, end = batch_first(step.reward[1:]), batch_first(step.is_terminal[1:])
        keys = noise.row_keys(key, tokens.shape[0], axis_name) if config.dropout else None

        share = lambda mask: jnp.mean(mask, dtype=jnp.float32)
        shares = share(counted(seen, nets.world_model.tokens)), share(acted)

        def objective(weights, keys, tokens, action, *outcome):
            logits = call(nets.world_model, weights, tokens, action, _sign(outcome[0]), keys)
            return equations.world_model(logits, tokens, *outcome, axis_name, shares), ({}, ())

        args = keys, tokens, action, reward, end, seen, acted
        new, metrics, _ = descend("world_model", objective, state, config, axis_name, args, (0,) * len(args))
        return new, metrics, None

    sampling = Sampling(config.world_model_length + 1, over="episodes", pad="right")
    return Update(
        "world_model", update, config.world_model_updates, config.world_model_batch, sampling, config.grad_accum
    )
