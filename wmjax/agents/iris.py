"""IRIS: images as tokens, a transformer that predicts them one by one, and an actor-critic that learns in its dreams.

Paper: Micheli, Alonso, Fleuret, "Transformers are Sample-Efficient World Models" (arXiv 2209.00588, ICLR 2023).
Implemented from the paper and from recorded numbers of the authors' run, without their code.

Departures: `is_terminal` is the environment's own, never a time limit. The last observation of an episode, which
`wmjax` keeps, is one more frame to predict. While acting, the LSTM's state is carried on across updates instead of
being computed anew from the last 20 frames. Each environment draws its own random actions (`epsilon`). LPIPS needs
weights that cannot be shipped, so `perceptual` is "random_features" unless they are given: results without LPIPS are
not the paper's. Off by default and not in the paper: patches, reward tokens, codebooks that learn by moving averages,
reset of dead entries, other perceptual losses.

Read from top to bottom: configuration, networks, tokenizer, world model, actor-critic, updates, agent.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import checks, dreaming, optim
from wmjax.nets import perceptual, spaces, vqgan
from wmjax.nets.actor_critic import ActorCritic, Memory, zero_memory
from wmjax.nets.transformer import KVCache, TokenTransformer, init_cache, restart
from wmjax.ops import distributions, noise, returns, vq
from wmjax.ops.masks import masked_mean
from wmjax.types import (
    Agent,
    AgentState,
    Array,
    Discrete,
    EnvSpec,
    Metrics,
    Recipe,
    Sampling,
    Stage,
    Trajectory,
    Update,
    UsageError,
    WorldModel,
)

sg = jax.lax.stop_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class IRISConfig:
    """Hyperparameters; the defaults are the paper's (Atari 100k)."""

    # Tokenizer (table 3): (side / (patch 2^(levels - 1)))² tokens per frame.
    vocab_size: int = 512  # entries of the codebook
    embed_dim: int = 512  # size of an entry of the codebook
    latents: int = 512  # channels of the encoder's output
    channels: int = 64  # of the tokenizer's first level
    multipliers: tuple[int, ...] = (1, 1, 1, 1, 1)  # of the channels, one for each level; none: an MLP on each patch
    res_blocks: int = 2  # of each level; layers of the MLP
    attention: tuple[int, ...] = (8, 16)  # sides of the levels that have attention
    patch: int = 1  # side of the patches that tokenizer and actor-critic see first; 1: the paper's convolutions
    commit_scale: float = 1.0  # weight of the commitment loss
    recon_loss: Literal["l1", "delta_iris"] = "l1"  # of the tokenizer
    recon_scale: float = 1.0  # weight of the reconstruction in the tokenizer's loss
    perceptual: Literal["none", "lpips", "random_features", "multiscale"] = "random_features"  # its features
    perceptual_scale: float = 1.0  # weight of the perceptual loss
    lpips_weights: str | None = None  # the file that tools/lpips_to_npz.py writes
    lpips_dropout: float = 0.0  # 0.5 in the official code, by accident

    # Codebook health; none of it in the paper.
    codebook: Literal["gradient", "ema", "ema_cosine"] = "gradient"  # how its entries are learned
    codebook_decay: float = 0.99  # of moving averages
    codebook_reset: float = 0.0  # entries with less than this share of an even use restart at a random latent; 0: never

    # World model (table 4).
    max_blocks: int = 20  # frames in a context
    layers: int = 10  # of the transformer
    heads: int = 4  # of attention
    width: int = 256  # of the transformer
    ff: int | None = None  # width of the MLPs; None: 4 times `width`
    dropout: float = 0.1  # of the transformer
    norm: Literal["pre", "post"] = "pre"  # where the transformer's layers are normalized
    activation: Literal["gelu", "relu"] = "gelu"  # of the feed-forward layers of the transformer
    position_std: float = 0.02  # of the position embeddings at first
    reward_tokens: bool = False  # whether rewards are tokens of the sequence
    world_model_length: int = 20  # frames of a training sequence

    # Actor-critic (tables 5 and 6).
    policy_channels: tuple[int, ...] = (32, 32, 64, 64)  # of the convolutions of actor and critic
    lstm_units: int = 512  # of actor and critic
    burn_in: int = 20  # frames before the start of imagination
    horizon: int = 20  # imagined frames, the start included
    discount: float = 0.995  # of rewards, per agent step
    lambda_: float = 0.95  # of the lambda-returns
    entropy_scale: float = 0.001  # weight of the actor's entropy
    actor_scale: float = 1.0  # weight of the actor in the loss
    critic_scale: float = 1.0  # weight of the critic in the loss

    # Acting.
    epsilon: float = 0.01  # share of uniformly random actions while collecting
    temperature: float = 1.0  # of the policy while collecting
    eval_temperature: float = 0.5  # of the policy when it is evaluated
    eval_action: Literal["sample", "mode"] = "sample"  # how actions come from the policy when it is evaluated

    # Optimizers: Adam, and AdamW for the world model.
    tokenizer_rate: float = 1e-4  # learning rate of the tokenizer
    world_model_rate: float = 1e-4  # learning rate of the transformer
    actor_critic_rate: float = 1e-4  # learning rate of actor and critic
    weight_decay: float = 0.01  # of the transformer's weights
    grad_clip: float = 10.0  # global norm, of each
    beta1: float = 0.9  # of Adam: decay of the first moment
    beta2: float = 0.999  # of Adam: decay of the second moment
    adam_epsilon: float = 1e-8  # of Adam

    # Data and schedule (table 7). An epoch collects, then trains what is due.
    num_envs: int = 1  # environments that are stepped at once
    collect: int = 200  # agent steps per environment and epoch
    tokenizer_updates: int = 200  # per epoch
    world_model_updates: int = 200  # of an epoch
    actor_critic_updates: int = 200  # of an epoch
    tokenizer_batch: int = 256  # frames
    world_model_batch: int = 64  # sequences
    actor_critic_batch: int = 64  # start states of an update of actor and critic
    tokenizer_after: int = 5  # epochs without it
    world_model_after: int = 25  # epochs before the transformer learns
    actor_critic_after: int = 50  # epochs before actor and critic learn
    collect_epochs: int | None = None  # epochs that collect; None: until the run's steps are used up
    final_epochs: int = 0  # epochs of training after them, without collecting
    replay_capacity: int = 100_000  # agent steps that replay holds, over all environments

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of networks; parameters and losses stay float32

    @property
    def downsampling(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.patch * 2 ** max(0, len(self.multipliers) - 1)

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        checks.check_ranges(self, RULES)
        if not self.multipliers and self.patch == 1:
            raise UsageError(f"multipliers must be one or more unless patch > 1, got {self.multipliers}")
        if not self.policy_channels:
            raise UsageError(f"policy_channels must be one or more, got {self.policy_channels}")
        if self.width % self.heads:
            raise UsageError(f"width must be a multiple of heads={self.heads}, got {self.width}")
        for level, multiplier in enumerate(self.multipliers):
            if multiplier * self.channels > vqgan.GROUPS and multiplier * self.channels % vqgan.GROUPS:
                raise UsageError(
                    f"channels * multipliers[{level}] must be at most {vqgan.GROUPS} or a multiple of it, "
                    f"got {self.channels} * {multiplier}"
                )
        if self.world_model_length > self.max_blocks:
            raise UsageError(
                f"world_model_length must be in [1, max_blocks={self.max_blocks}]: a sequence has to fit in a context, "
                f"got {self.world_model_length}"
            )
        if not self.tokenizer_after <= self.world_model_after <= self.actor_critic_after:
            raise UsageError(
                "tokenizer_after, world_model_after, actor_critic_after must not decrease, got "
                f"{self.tokenizer_after}, {self.world_model_after}, {self.actor_critic_after}"
            )
        if self.final_epochs and self.collect_epochs is None:
            raise UsageError(f"final_epochs needs collect_epochs, got {self.final_epochs} and None")
        if self.collect_epochs is not None and self.collect_epochs <= self.actor_critic_after:
            raise UsageError(
                f"collect_epochs must be more than actor_critic_after={self.actor_critic_after}, "
                f"got {self.collect_epochs}"
            )
        window = max(self.world_model_length, self.burn_in) + 1
        if self.replay_capacity < self.num_envs * window:
            raise UsageError(
                f"replay_capacity must hold {window} steps for each of the {self.num_envs} environments, "
                f"{self.num_envs * window} in all, got {self.replay_capacity}"
            )
        if self.perceptual == "lpips":
            perceptual.load_lpips(self.lpips_weights)


RULES = (
    checks.rules(
        checks.POSITIVE,
        "embed_dim latents channels multipliers res_blocks attention patch layers heads width ff world_model_length "
        "policy_channels lstm_units num_envs collect tokenizer_updates world_model_updates actor_critic_updates "
        "tokenizer_batch world_model_batch actor_critic_batch replay_capacity tokenizer_rate world_model_rate "
        "actor_critic_rate grad_clip adam_epsilon temperature eval_temperature collect_epochs",
    )
    | checks.rules(
        checks.NOT_NEGATIVE,
        "commit_scale recon_scale perceptual_scale codebook_reset position_std burn_in entropy_scale actor_scale "
        "critic_scale weight_decay tokenizer_after world_model_after actor_critic_after final_epochs",
    )
    | checks.rules(checks.FRACTION, "discount lambda_ epsilon")
    | checks.rules(checks.BELOW_ONE, "lpips_dropout codebook_decay dropout beta1 beta2")
    | checks.rules((lambda x: x >= 2, "2 or more"), "vocab_size max_blocks horizon")
)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Networks(NamedTuple):
    """The modules; all are functions of parameters."""

    tokenizer: vqgan.Tokenizer
    world_model: TokenTransformer
    actor_critic: ActorCritic


def image_name(spec: EnvSpec, config: IRISConfig) -> str:
    """The one observation that IRIS sees. Raises `UsageError` where it could see none, or not tokenize it."""
    if not isinstance(spec.action, Discrete):
        raise UsageError(f"action space {spec.action} is not supported; valid: Discrete(n)")
    if len(spec.obs) != 1 or not spaces.is_image(next(iter(spec.obs.values()))):
        raise UsageError(f"observations {dict(spec.obs)} are not supported; valid: one uint8 image (H, W, C)")
    ((name, space),) = spec.obs.items()
    height, width, channels = space.shape
    if height != width or height % config.downsampling or height == config.downsampling:
        near = max(2, round(height / config.downsampling))
        valid = [config.downsampling * side for side in range(max(2, near - 2), near + 3)]
        raise UsageError(
            f"observation {name!r}: image size {height}x{width} is not supported; a token stands for "
            f"{config.downsampling} pixels (patch={config.patch}, {len(config.multipliers)} levels), so valid are "
            f"square images with sides such as {', '.join(map(str, valid))}"
        )
    halvings = len(config.policy_channels) - (config.patch > 1)
    if height // config.patch < 2**halvings:
        most = (height // config.patch).bit_length() - (config.patch == 1)
        raise UsageError(
            f"policy_channels: {len(config.policy_channels)} layers halve an image of {height} pixels in patches of "
            f"{config.patch} to nothing; at most {most} are valid"
        )
    if config.perceptual in ("lpips", "random_features") and channels != 3:
        raise UsageError(f"perceptual: {config.perceptual!r} needs 3 channels, the image has {channels}; use 'none'")
    return name


def networks(spec: EnvSpec, config: IRISConfig) -> Networks:
    """The modules for one environment."""
    side, _, image_channels = spec.obs[image_name(spec, config)].shape
    dtype = config.compute_dtype
    sizes = vqgan.Sizes(config.channels, config.multipliers, config.res_blocks, config.attention, config.patch, dtype)
    kinds = (vqgan.Encoder, vqgan.Decoder) if config.multipliers else (vqgan.PatchEncoder, vqgan.PatchDecoder)
    encoder, decoder = kinds[0](sizes, config.latents), kinds[1](sizes, image_channels)
    return Networks(
        tokenizer=vqgan.Tokenizer(encoder, decoder, config.vocab_size, config.embed_dim, dtype),
        world_model=TokenTransformer(
            tokens=(side // config.downsampling) ** 2,
            max_blocks=config.max_blocks,
            vocab_size=config.vocab_size,
            actions=spec.action.n,
            layers=config.layers,
            heads=config.heads,
            width=config.width,
            ff=config.ff or 4 * config.width,
            rate=config.dropout,
            norm=config.norm,
            activation=config.activation,
            position_std=config.position_std,
            reward_tokens=config.reward_tokens,
            dtype=dtype,
        ),
        actor_critic=ActorCritic(spec.action.n, config.policy_channels, config.lstm_units, config.patch, dtype),
    )


def init_params(nets: Networks, spec: EnvSpec, config: IRISConfig, key: Array) -> dict:
    """Parameters of the three modules."""
    key_tokenizer, key_world_model, key_actor_critic = jax.random.split(key, 3)
    image = jnp.zeros((1, *spec.obs[image_name(spec, config)].shape))
    model = nets.world_model
    sequence = jnp.zeros((1, 1, model.tokens), jnp.int32), jnp.zeros((1, 1, model.actions)), jnp.zeros((1, 1))
    params = {
        "tokenizer": nets.tokenizer.init(key_tokenizer, image, method="everything")["params"],
        "world_model": model.init(key_world_model, *sequence, method="sequence")["params"],
        "actor_critic": nets.actor_critic.init(
            key_actor_critic, zero_memory(1, config.lstm_units), image, method="everything"
        )["params"],
    }
    if config.codebook == "ema_cosine":
        params["tokenizer"]["codebook"] = vq.normalize(params["tokenizer"]["codebook"])
    return params


def call(module, params: dict, *args, method: str):
    """Applies a method of a module to its parameters."""
    return module.apply({"params": params}, *args, method=method)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: equations 1 and 2


def latents(nets: Networks, config: IRISConfig, params: dict, image: Array) -> Array:
    """Images `[..., H, W, C]` in [-1, 1] to what is quantized, float32 `[..., h, w, E]`."""
    z = call(nets.tokenizer, params["tokenizer"], image, method="encode").astype(jnp.float32)
    return vq.normalize(z) if config.codebook == "ema_cosine" else z


def encode(nets: Networks, config: IRISConfig, params: dict, image: Array) -> Array:
    """Images uint8 `[..., H, W, C]` to tokens int32 `[..., K]`, rows first; no gradient passes."""
    z = latents(nets, config, params, image.astype(jnp.float32) * (2 / 255) - 1)
    tokens = vq.nearest(z, params["tokenizer"]["codebook"])
    return tokens.reshape(*tokens.shape[:-2], -1)


def decode(nets: Networks, params: dict, tokens: Array) -> Array:
    """Tokens `[..., K]` to images float32 `[..., H, W, C]` in [0, 1]: what the actor-critic sees."""
    side = round(tokens.shape[-1] ** 0.5)
    codebook = params["tokenizer"]["codebook"]
    quantized = codebook[tokens].reshape(*tokens.shape[:-1], side, side, codebook.shape[-1])
    image = call(nets.tokenizer, params["tokenizer"], quantized, method="decode")
    return jnp.clip((image.astype(jnp.float32) + 1) / 2, 0.0, 1.0)


def reconstruction_loss(x: Array, y: Array, config: IRISConfig) -> Array:
    """How far images `[B, H, W, C]` in [-1, 1] are apart, float32 `[B]`.

    `l1` is the paper's mean absolute error. `delta_iris` is 0.1 L1 + L2 + 0.01 L2 of the worst pixel (Micheli et al.
    2024), which needs no perceptual loss beside it.
    """
    absolute = jnp.abs(x - y).mean((-3, -2, -1))
    if config.recon_loss == "l1":
        return absolute
    squared = (x - y) ** 2
    return 0.1 * absolute + squared.mean((-3, -2, -1)) + 0.01 * squared.mean(-1).max((-2, -1))


def tokenizer_losses(
    nets: Networks, config: IRISConfig, params: dict, keys: Array, image: Array
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Each term of the tokenizer's loss, unscaled.

    Args:
      params: of all modules; the gradient reaches "tokenizer".
      keys: `[B]`.
      image: uint8 `[B, H, W, C]`.

    Returns:
      Scalars, and (latents `[B, h, w, E]`, tokens `[B, h, w]`) without gradient. The codebook learns from "codebook"
      alone, and the decoder's gradient passes it by.

    Source: equation 2; means, and errors in units of [-1, 1].
    """
    x = image.astype(jnp.float32) * (2 / 255) - 1
    z = latents(nets, config, params, x)
    codebook = params["tokenizer"]["codebook"]
    tokens = vq.nearest(sg(z), sg(codebook))
    quantized = codebook[tokens]
    codebook_loss, commit = vq.codebook_losses(z, quantized)
    passed = vq.straight_through(z, quantized)
    y = call(nets.tokenizer, params["tokenizer"], passed, method="decode").astype(jnp.float32)
    losses = {
        "codebook": codebook_loss,
        "commit": commit,
        "recon": reconstruction_loss(x, y, config).mean(),
        "perceptual": perceptual.loss(config.perceptual, x, y, config.lpips_weights, keys, config.lpips_dropout).mean(),
    }
    return losses, (sg(z), tokens)


def tokenizer_scales(config: IRISConfig) -> dict[str, float]:
    """The factor of each term. A codebook that follows moving averages takes no gradient."""
    return {
        "codebook": float(config.codebook == "gradient"),
        "commit": config.commit_scale,
        "recon": config.recon_scale,
        "perceptual": config.perceptual_scale * (config.perceptual != "none"),
    }


def follow_codebook(
    config: IRISConfig,
    key: Array,
    state: vq.CodebookState,
    codebook: Array,
    z: Array,
    tokens: Array,
    axis_name: str | None = None,
) -> tuple[vq.CodebookState, Array, Metrics]:
    """What happens to the codebook besides gradients: moving averages, and the reset of dead entries.

    Args:
      key: the same on every device; consumed.
      state, codebook: before this batch, the codebook after its gradient step.
      z, tokens: the batch's latents `[..., E]` and their entries `[...]`.

    Returns:
      The new state and codebook, and how healthy it is.
    """
    size = codebook.shape[0]
    batch = vq.assigned(z, tokens, size, axis_name)
    state = vq.update_usage(state, batch.counts, config.codebook_decay)
    if config.codebook == "ema":
        state, codebook = vq.ema_update(state, batch, config.codebook_decay)
    if config.codebook == "ema_cosine":
        codebook = vq.cosine_update(codebook, batch, 1 - config.codebook_decay)
    dead_below = (config.codebook_reset or 0.1) / size
    metrics = vq.health(batch.counts, state.usage, dead_below)
    if config.codebook_reset:
        state, codebook = vq.revive(key, state, codebook, batch, dead_below, axis_name)
    return state, codebook, metrics


# ---------------------------------------------------------------------------------------------------------------------
# World model: equations 3 to 5


class IRISState(NamedTuple):
    """A frame of tokens, the context before it, and what the last transition drew and expected."""

    tokens: Array  # int32 [B, K], the current frame
    cache: KVCache  # of the context, this frame included
    reward: Array  # float32 [B], drawn: -1, 0 or 1
    end: Array  # bool [B], drawn
    reward_mean: Array  # float32 [B], in [-1, 1]
    cont: Array  # float32 [B], P(not terminal)


def _draw(key: Array, logits: Array) -> Array:
    """A class for each row of logits `[..., V]`, int32 `[...]`."""
    return jnp.argmax(logits + noise.gumbel(key, logits.shape), -1).astype(jnp.int32)


def make_room(nets: Networks, params: dict, cache: KVCache, tokens: Array, needed: int) -> KVCache:
    """The context, cut down to the current frame `tokens` `[B, K]` in the rows where `needed` more would not fit."""
    model = nets.world_model
    full = cache.length + needed > model.max_tokens

    def current_frame():
        embedded = call(model, params["world_model"], tokens, method="embed_frame")
        return call(model, params["world_model"], embedded, method="full")[1]

    shapes = jax.eval_shape(current_frame)
    nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return restart(cache, jax.lax.cond(jnp.any(full), current_frame, nothing), full)


def respond(nets: Networks, params: dict, key: Array, state: IRISState, action: Array) -> tuple[IRISState, Array]:
    """What follows an action, except for the next frame.

    Args:
      key: one key or keys `[B]`; consumed.
      state: `[B]`, with room in its cache.
      action: one-hot `[B, A]`.

    Returns:
      The state with the action in its context and its outcome, and the output `[B, D]` that predicts the next frame's
      first token.
    """
    model, weights = nets.world_model, params["world_model"]
    advance = lambda x, cache: call(model, weights, x[:, None], cache, method="advance")
    key_reward, key_end = noise.split(key, 2)
    hidden, cache = advance(call(model, weights, action, method="embed_action"), state.cache)
    reward_logits, end_logits = call(model, weights, hidden[:, 0], method="outcome_logits")
    reward = (_draw(key_reward, reward_logits) - 1).astype(jnp.float32)
    end = _draw(key_end, end_logits) == 1
    if model.reward_tokens:
        hidden, cache = advance(call(model, weights, reward, method="embed_reward"), cache)
    probs = jax.nn.softmax(reward_logits)
    cont = jax.nn.softmax(end_logits)[:, 0]
    return IRISState(state.tokens, cache, reward, end, probs[:, 2] - probs[:, 0], cont), hidden[:, 0]


def next_frame(nets: Networks, params: dict, key: Array, cache: KVCache, hidden: Array) -> tuple[KVCache, Array]:
    """Draws a frame token by token, each seen by those after it.

    Args:
      key: one key or keys `[B]`; consumed. Token k uses `fold_in(key, k)`.
      cache: ends with an action (or its reward token); `hidden` `[B, D]` is the output there.

    Returns:
      The cache with the frame in it, and the frame, int32 `[B, K]`.
    """
    model, weights = nets.world_model, params["world_model"]

    def step(carry, k):
        cache, hidden = carry
        token = _draw(noise.fold_in(key, k), call(model, weights, hidden, method="frame_logits"))
        embedded = call(model, weights, token[:, None], method="embed_frame")
        hidden, cache = call(model, weights, embedded, cache, method="advance")
        return (cache, hidden[:, 0]), token

    (cache, _), tokens = jax.lax.scan(step, (cache, hidden), jnp.arange(model.tokens))
    return cache, tokens.T


def world_model(nets: Networks, spec: EnvSpec, config: IRISConfig) -> WorldModel:
    """The learned environment; `State` is `IRISState`, an embedding is a frame's tokens.

    Where a step would not fit in the context any more, it restarts from the current frame alone.
    """
    name, model = image_name(spec, config), nets.world_model

    def init_state(params, batch_size):
        del params
        zeros = jnp.zeros(batch_size)
        cache = init_cache(
            batch_size, config.layers, config.heads, config.width, model.max_tokens, config.compute_dtype
        )
        tokens = jnp.zeros((batch_size, model.tokens), jnp.int32)
        return IRISState(tokens, cache, zeros, zeros > 0, zeros, zeros + 1)

    def flat(state, key, *more):
        """All leading axes as one."""
        lead = state.tokens.shape[:-1]
        join = lambda x: x.reshape(-1, *x.shape[len(lead) :])
        key = key if key.ndim == 0 else key.reshape(-1)
        return jax.tree.map(join, state), key, *map(join, more)

    def unflat(state, lead):
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), state)

    def observe(params, key, state, prev_action, embed, is_first):
        lead = state.tokens.shape[:-1]
        state, key, prev_action, tokens, is_first = flat(state, key, prev_action, embed, is_first)
        fresh = is_first | (state.cache.length == 0)
        state = state._replace(cache=make_room(nets, params, state.cache, state.tokens, model.block))
        moved, _ = respond(nets, params, key, state, prev_action)
        cache = moved.cache._replace(length=jnp.where(fresh, 0, moved.cache.length))
        embedded = call(model, params["world_model"], tokens, method="embed_frame")
        _, cache = call(model, params["world_model"], embedded, cache, method="advance")
        keep = lambda x, start: jnp.where(fresh, start, x)
        outcome = keep(moved.reward, 0.0), keep(moved.end, False), keep(moved.reward_mean, 0.0), keep(moved.cont, 1.0)
        return unflat(IRISState(tokens, cache, *outcome), lead)

    def imagine(params, key, state, action):
        lead = state.tokens.shape[:-1]
        state, key, action = flat(state, key, action)
        key_outcome, key_frame = noise.split(key, 2)
        state = state._replace(cache=make_room(nets, params, state.cache, state.tokens, model.block))
        state, hidden = respond(nets, params, key_outcome, state, action)
        cache, tokens = next_frame(nets, params, key_frame, state.cache, hidden)
        return unflat(state._replace(tokens=tokens, cache=cache), lead)

    def predict(params, state):
        del params
        return state.reward_mean, state.cont

    return WorldModel(
        init_state=init_state,
        encode=lambda params, obs: encode(nets, config, params, obs[name]),
        observe=observe,
        imagine=imagine,
        predict=predict,
        decode=lambda params, state: {name: 255 * decode(nets, params, state.tokens)},
    )


def start_state(nets: Networks, model: WorldModel, params: dict, tokens: Array) -> IRISState:
    """The state whose context is one frame, `[B, K]`."""
    state = model.init_state(params, tokens.shape[0])
    embedded = call(nets.world_model, params["world_model"], tokens, method="embed_frame")
    _, cache = call(nets.world_model, params["world_model"], embedded, state.cache, method="advance")
    return state._replace(tokens=tokens, cache=cache)


class Generated(NamedTuple):
    """An imagined trajectory of tokens, the start first."""

    tokens: Array  # int32 [H + 1, B, K]
    action: Array  # [H, B, A], taken at frame t
    reward: Array  # float32 [H, B], drawn: -1, 0 or 1; follows action t
    end: Array  # bool [H, B], drawn; the trajectory goes on after it


def generate(
    nets: Networks,
    model: WorldModel,
    params: dict,
    key: Array,
    start_tokens: Array,
    horizon: int = 15,
    policy: Callable | None = None,
    policy_carry: Any = (),
) -> tuple[Generated, Array]:
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
    actions = nets.world_model.actions

    def at_random(key, carry, frame):
        return carry, jax.nn.one_hot(_draw(key, jnp.zeros((frame.shape[0], actions))), actions)

    # A frame that was decoded for the policy is kept, and not decoded again.
    def imagine(params, key, state, action):
        state = model.imagine(params, key, state[0], action)
        return state, decode(nets, params, state.tokens)

    choose = policy or at_random
    start = start_state(nets, model, params, start_tokens), decode(nets, params, start_tokens)
    _, (tokens, reward, end, frames), action = dreaming.imagine(
        model._replace(imagine=imagine),
        params,
        key,
        start,
        lambda key, carry, state: choose(key, carry, state[1]),
        horizon,
        policy_carry=policy_carry,
        emit=lambda state: (state[0].tokens, state[0].reward, state[0].end, state[1]),
    )
    return Generated(tokens, action, reward[1:], end[1:]), frames


def world_model_losses(
    logits: tuple[Array, Array, Array],
    tokens: Array,
    reward: Array,
    end: Array,
    seen: Array,
    acted: Array,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Cross-entropies of the next frame token, of the sign of the reward, and of the end; each a mean over what counts.

    Args:
      logits: of `TokenTransformer.sequence`.
      tokens: int32 `[B, L, K]`.
      reward: float32 `[B, L]`, what followed the action at each frame.
      end: bool `[B, L]`, whether the episode ended then.
      seen: bool `[B, L]`, False where a frame is padding.
      acted: bool `[B, L]`, whether the outcome of the action at this frame is known.

    Returns:
      Scalars. The sequence's first token is not predicted, and its last prediction lies beyond it: B (L K - 1) terms.

    Source: equations 3 to 5.
    """
    frame_logits, reward_logits, end_logits = logits
    batch, length, size = tokens.shape
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    counted = jnp.repeat(seen, size, 1)[:, 1:]
    labels = tokens.reshape(batch, length * size)[:, 1:]
    return {
        "frame": masked_mean(cross_entropy(frame_logits[:, :-1], labels), counted, axis_name),
        "reward": masked_mean(cross_entropy(reward_logits, _sign(reward) + 1), acted, axis_name),
        "end": masked_mean(cross_entropy(end_logits, end.astype(jnp.int32)), acted, axis_name),
    }


def _sign(reward: Array) -> Array:
    return jnp.sign(reward).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Actor-critic


def burn_in(nets: Networks, config: IRISConfig, params: dict, frames: Array, mask: Array) -> Memory:
    """The memory after some frames `[T, B, H, W, C]` in [0, 1]; it stays as it is where `mask` `[T, B]` is False."""
    weights, memory = params["actor_critic"], zero_memory(mask.shape[1], config.lstm_units)

    def step(memory, inputs):
        features, mask = inputs
        new = call(nets.actor_critic, weights, memory, features, method="remember")
        return jax.tree.map(lambda new, old: jnp.where(mask[:, None], new, old), new, memory), ()

    features = call(nets.actor_critic, weights, frames, method="features")
    return jax.lax.scan(step, memory, (features, mask))[0]


def replay_frames(nets: Networks, weights: dict, memory: Memory, frames: Array) -> tuple[Array, Array]:
    """Action logits `[H, B, A]` and values `[H, B]` on frames `[H, B, ...]`, convolved all at once."""

    def step(memory, features):
        memory = call(nets.actor_critic, weights, memory, features, method="remember")
        return memory, memory.hidden

    features = call(nets.actor_critic, weights, frames, method="features")
    return call(nets.actor_critic, weights, jax.lax.scan(step, memory, features)[1], method="outputs")


def lambda_returns(reward: Array, end: Array, value: Array, discount: float, lambda_: float) -> Array:
    """Targets for each of H imagined frames.

        G_{H-1} = V_{H-1},   Gₜ = rₜ + (1 - dₜ) γ [(1 - λ) Vₜ₊₁ + λ Gₜ₊₁]

    Args:
      reward, end: `[H - 1, ...]`, what follows the action at frame t.
      value: `[H, ...]`, of the frames.

    Returns:
      float32 `[H, ...]`.

    Source: appendix B.

    >>> r, v, d = jnp.array([1.0, 0.0, -1.0]), jnp.array([0.5, 0.4, 0.3, 0.2]), jnp.array([False, True, False])
    >>> lambda_returns(r, d, v, 0.995, 0.95).round(3).tolist()
    [1.0199999809265137, 0.0, -0.8009999990463257, 0.20000000298023224]
    """
    rest = returns.lambda_returns(reward, discount * (1.0 - end), value[1:], lambda_)
    return jnp.concatenate([rest, value[-1:]])


def actor_critic_losses(
    logits: Array, value: Array, action: Array, reward: Array, end: Array, config: IRISConfig
) -> tuple[dict[str, Array], Array]:
    """Losses on imagined trajectories, of which the last frame only supplies a value.

        L_actor = -mean log π(aₜ) (Gₜ - Vₜ),   L_critic = mean (Vₜ - Gₜ)²,   L_entropy = -η mean H(πₜ)

    Args:
      logits, value: `[H, B, A]` and `[H, B]`; differentiated.
      action: one-hot `[H - 1, B, A]`.
      reward, end: `[H - 1, B]`. What comes after a drawn end still counts; only the returns are cut there.

    Returns:
      Scalars, and the targets `[H, B]`.

    Source: appendix B, equations 7 and 8.
    """
    target = sg(lambda_returns(reward, end, value, config.discount, config.lambda_))
    policy = distributions.OneHotCategorical(logits[:-1])
    advantage = sg(target - value)[:-1]
    losses = {
        "actor": -jnp.mean(policy.log_prob(action) * advantage),
        "critic": jnp.mean((value - target)[:-1] ** 2),
        "entropy": -config.entropy_scale * jnp.mean(policy.entropy()),
    }
    return losses, target


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def optimizers(config: IRISConfig) -> dict[str, optax.GradientTransformation]:
    """Clipping by global norm, then Adam; the world model's kernels decay, not its embeddings, biases and norms."""
    moments = dict(b1=config.beta1, b2=config.beta2, eps=config.adam_epsilon)
    kernels = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    adamw = optax.adamw(config.world_model_rate, **moments, weight_decay=config.weight_decay, mask=kernels)
    clipped = lambda adam: optax.chain(optax.clip_by_global_norm(config.grad_clip), adam)
    return {
        "tokenizer": clipped(optax.adam(config.tokenizer_rate, **moments)),
        "world_model": clipped(adamw),
        "actor_critic": clipped(optax.adam(config.actor_critic_rate, **moments)),
    }


def _descend(
    name: str, config: IRISConfig, axis_name: str | None, state: AgentState, objective
) -> tuple[AgentState, Metrics, tuple]:
    """One optimizer step of a module on the sum of the losses in `objective(weights) -> (losses, (metrics, aux))`."""

    def total(modules):
        losses, (metrics, aux) = objective(modules[name])
        value = sum(losses.values())
        return value, (metrics | {f"loss/{term}": loss for term, loss in losses.items()} | {"loss": value}, aux)

    chain, params = {name: optimizers(config)[name]}, {name: state.params[name]}
    done = optim.descend(total, chain, state.opt_state, params, axis_name)
    new = state._replace(
        params=state.params | done.params, opt_state=state.opt_state | done.opt_state, step=state.step + 1
    )
    return new, done.metrics | {"grad_norm": done.grad_norm[name]}, done.aux


def update_tokenizer(
    nets: Networks,
    spec: EnvSpec,
    config: IRISConfig,
    axis_name: str | None,
    state: AgentState,
    key: Array,
    trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:
    """A step on frames `[1, B]`, all of them real."""
    key_rows, key_codebook = jax.random.split(key)
    image = trajectory.step.obs[image_name(spec, config)][0]
    keys = noise.row_keys(key_rows, image.shape[0], axis_name)
    scales = tokenizer_scales(config)

    def objective(weights):
        losses, aux = tokenizer_losses(nets, config, state.params | {"tokenizer": weights}, keys, image)
        return {name: scales[name] * loss for name, loss in losses.items() if scales[name]}, ({}, aux)

    new, metrics, (z, tokens) = _descend("tokenizer", config, axis_name, state, objective)
    weights = new.params["tokenizer"]
    record, codebook, more = follow_codebook(
        config, key_codebook, state.stats["codebook"], weights["codebook"], z, tokens, axis_name
    )
    params = new.params | {"tokenizer": weights | {"codebook": codebook}}
    return new._replace(params=params, stats={"codebook": record}), metrics | more, None


def update_world_model(
    nets: Networks,
    spec: EnvSpec,
    config: IRISConfig,
    axis_name: str | None,
    state: AgentState,
    key: Array,
    trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:
    """A step on `[L + 1, B]` records, padded at the end; the last one only supplies what followed the one before."""
    step, mask = trajectory.step, trajectory.mask
    batch_first = lambda x: jnp.swapaxes(x, 0, 1)
    tokens = sg(batch_first(encode(nets, config, state.params, step.obs[image_name(spec, config)][:-1])))
    action, seen, acted = batch_first(trajectory.action[:-1]), batch_first(mask[:-1]), batch_first(mask[1:])
    reward, end = batch_first(step.reward[1:]), batch_first(step.is_terminal[1:])
    keys = noise.row_keys(key, tokens.shape[0], axis_name) if config.dropout else None

    def objective(weights):
        logits = call(nets.world_model, weights, tokens, action, _sign(reward), keys, method="sequence")
        return world_model_losses(logits, tokens, reward, end, seen, acted, axis_name), ({}, ())

    new, metrics, _ = _descend("world_model", config, axis_name, state, objective)
    return new, metrics, None


def update_actor_critic(
    nets: Networks,
    model: WorldModel,
    spec: EnvSpec,
    config: IRISConfig,
    axis_name: str | None,
    state: AgentState,
    key: Array,
    trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:
    """A step on `[burn_in + 1, B]` records, padded at the beginning; imagination starts from the last one.

    Imagination is rolled out without gradients first, then the actor-critic runs over its frames again with them: the
    same numbers as differentiating the rollout, for neither frames nor actions carry a gradient.
    """
    params = state.params
    image, mask = trajectory.step.obs[image_name(spec, config)], trajectory.mask
    tokens = encode(nets, config, params, image)
    memory = zero_memory(mask.shape[1], config.lstm_units)
    if config.burn_in:
        memory = burn_in(nets, config, params, decode(nets, params, tokens[:-1]), mask[:-1])
    keys = noise.row_keys(key, mask.shape[1], axis_name)

    def policy(key, memory, frame):
        memory, logits = _look(nets, params, memory, frame)
        return memory, distributions.OneHotCategorical(logits).sample(seed=key)

    dream, frames = sg(generate(nets, model, params, keys, tokens[-1], config.horizon - 1, policy, memory))

    def objective(weights):
        logits, value = replay_frames(nets, weights, memory, frames)
        losses, target = actor_critic_losses(logits, value, dream.action, dream.reward, dream.end, config)
        metrics = {
            "return_mean": jnp.mean(target),
            "value_mean": jnp.mean(value),
            "imagined_reward": jnp.mean(dream.reward),
            "imagined_end": jnp.mean(dream.end, dtype=jnp.float32),
            "policy_entropy": jnp.mean(distributions.OneHotCategorical(logits).entropy()),
        }
        scales = {"actor": config.actor_scale, "critic": config.critic_scale, "entropy": 1.0}
        return {name: scales[name] * loss for name, loss in losses.items()}, (metrics, ())

    new, metrics, _ = _descend("actor_critic", config, axis_name, state, objective)
    return new, metrics, None


def _look(nets: Networks, params: dict, memory: Memory, frame: Array) -> tuple[Memory, Array]:
    """One more frame `[B, H, W, C]` in [0, 1] for the policy: its memory, and action logits `[B, A]`."""
    weights = params["actor_critic"]
    features = call(nets.actor_critic, weights, frame, method="features")
    memory = call(nets.actor_critic, weights, memory, features, method="remember")
    return memory, call(nets.actor_critic, weights, memory.hidden, method="outputs")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def recipe(config: IRISConfig, act, tokenizer: Update, world_model: Update, actor_critic: Update) -> Recipe:
    """Epochs that collect alone, then train one module more at a time, then the rest."""
    waits = (config.tokenizer_after, config.world_model_after, config.actor_critic_after)
    stages, begin = [], 0
    for count, (name, until) in enumerate(zip(("collect", "tokenizer", "world_model"), waits, strict=True)):
        if until > begin:
            updates = (tokenizer, world_model)[:count]
            stages.append(Stage(name, until - begin, config.collect, act, updates))
        begin = until
    everything = (tokenizer, world_model, actor_critic)
    epochs = None if config.collect_epochs is None else config.collect_epochs - begin
    stages.append(Stage("train", epochs, config.collect, act, everything))
    if config.final_epochs:
        stages.append(Stage("final", config.final_epochs, 0, act, everything))
    return Recipe(config.num_envs, config.replay_capacity, tuple(stages))


def iris(spec: EnvSpec, config: IRISConfig, axis_name: str | None = None) -> Agent:
    """The agent for one environment.

    Args:
      spec: one uint8 image and Discrete actions.
      config: hyperparameters.
      axis_name: the named axis (of `vmap`, `shard_map` or `pmap`) that batches are spread over, or None.

    Raises:
      UsageError: a field of `config` is out of range or contradicts another, or `spec` is not supported.
    """
    config.validate()
    if config.perceptual == "random_features":
        warnings.warn(
            "perceptual='random_features' replaces LPIPS, whose weights are not shipped: results are not the paper's",
            stacklevel=2,
        )
    name = image_name(spec, config)
    nets = networks(spec, config)
    model = world_model(nets, spec, config)

    def init(key):
        params = init_params(nets, spec, config, key)
        opt_state = {name: adam.init(params[name]) for name, adam in optimizers(config).items()}
        stats = {"codebook": vq.init_state(params["tokenizer"]["codebook"])}
        return AgentState(params, opt_state, stats, jnp.int32(0))

    def policy_carry(params, batch_size):
        del params
        return zero_memory(batch_size, config.lstm_units)

    def choose(params, key, memory, tokens, explore):
        memory, logits = _look(nets, params, memory, decode(nets, params, tokens))
        if not explore:
            dist = distributions.OneHotCategorical(logits / config.eval_temperature)
            return memory, dist.mode() if config.eval_action == "mode" else dist.sample(seed=key)
        logits = jax.nn.log_softmax(logits / config.temperature)
        mixed = distributions.OneHotCategorical(logits, config.epsilon)
        return memory, mixed.sample(seed=key)

    def policy(params, key, carry, state, *, explore):
        return choose(params, key, carry, state.tokens, explore)

    def act(params, key, carry, timestep, *, explore):
        tokens = encode(nets, config, params, timestep.obs[name])
        memory = jax.tree.map(lambda x: jnp.where(timestep.is_first[:, None], 0.0, x), carry)
        memory, action = choose(params, key, memory, tokens, explore)
        return memory, action, ()

    def bound(update, *modules):
        return lambda state, key, trajectory: update(*modules, spec, config, axis_name, state, key, trajectory)

    after, before = dict(over="episodes", pad="right"), dict(over="episodes", pad="left")
    updates = (
        Update(
            "tokenizer", bound(update_tokenizer, nets), config.tokenizer_updates, config.tokenizer_batch,
            Sampling(1, **after),
        ),
        Update(
            "world_model", bound(update_world_model, nets), config.world_model_updates, config.world_model_batch,
            Sampling(config.world_model_length + 1, **after),
        ),
        Update(
            "actor_critic", bound(update_actor_critic, nets, model), config.actor_critic_updates,
            config.actor_critic_batch, Sampling(1, context=config.burn_in, **before),
        ),
    )  # fmt: skip
    return Agent(init, policy_carry, policy, policy_carry, act, model, recipe(config, act, *updates))
