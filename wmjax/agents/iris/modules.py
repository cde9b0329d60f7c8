"""The modules of IRIS for one environment, and how each takes a step down its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from wmjax import optim
from wmjax.agents.iris.config import IRISConfig
from wmjax.nets import vqgan
from wmjax.nets.actor_critic import ActorCritic, zero_memory
from wmjax.nets.mlp import init_modules
from wmjax.nets.spaces import is_image
from wmjax.nets.transformer import TokenTransformer
from wmjax.ops import vq
from wmjax.types import AgentState, Array, Discrete, EnvSpec, Metrics, PyTree, UsageError


class Networks(NamedTuple):
    """The modules; all are functions of parameters."""

    tokenizer: vqgan.Tokenizer
    world_model: TokenTransformer
    actor_critic: ActorCritic


def image_name(spec: EnvSpec, config: IRISConfig) -> str:
    """The one observation that IRIS sees. Raises `UsageError` where it could see none, or not tokenize it."""
    if not isinstance(spec.action, Discrete):
        raise UsageError(f"action space {spec.action} is not supported; valid: Discrete(n)")
    if len(spec.obs) != 1 or not is_image(next(iter(spec.obs.values()))):
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
    sizes = vqgan.Sizes(
        config.channels, config.multipliers, config.res_blocks, config.attention, config.patch, dtype, config.remat
    )
    kinds = (vqgan.Encoder, vqgan.Decoder) if config.multipliers else (vqgan.PatchEncoder, vqgan.PatchDecoder)
    encoder, decoder = kinds[0](sizes, config.latents), kinds[1](sizes, image_channels)
    return Networks(
        tokenizer=vqgan.Tokenizer(encoder, decoder, config.vocab_size, config.embed_dim, dtype),
        world_model=TokenTransformer(
            (side // config.downsampling) ** 2, config.max_blocks, config.vocab_size, spec.action.n, config.layers,
            config.heads, config.width, config.ff or 4 * config.width, config.dropout, config.norm, config.activation,
            config.position_std, config.reward_tokens, dtype, config.remat,
        ),
        actor_critic=ActorCritic(spec.action.n, config.policy_channels, config.lstm_units, config.patch, dtype),
    )  # fmt: skip


def init_params(nets: Networks, spec: EnvSpec, config: IRISConfig, key: Array) -> dict:
    """Parameters of the three modules."""
    image = jnp.zeros((1, *spec.obs[image_name(spec, config)].shape))
    tokens, action = jnp.zeros((1, 1, nets.world_model.tokens), jnp.int32), jnp.zeros((1, 1, spec.action.n))
    inputs = {
        "tokenizer": (image,),
        "world_model": (tokens, action, jnp.zeros((1, 1))),
        "actor_critic": (zero_memory(1, config.lstm_units), image),
    }
    params = init_modules(nets._asdict(), key, inputs)
    if config.codebook == "ema_cosine":
        params["tokenizer"]["codebook"] = vq.normalize(params["tokenizer"]["codebook"])
    return params


def optimizers(config: IRISConfig) -> dict[str, optax.GradientTransformation]:
    """Clipping by global norm, then Adam; the world model's kernels decay, not its embeddings, biases and norms."""
    moments = dict(b1=config.beta1, b2=config.beta2, eps=config.adam_epsilon)

    def adam(rate: float, *decay: optax.GradientTransformation) -> optax.GradientTransformation:
        clip, scale = optim.clip_by_global_norm(config.grad_clip), optax.scale_by_adam(**moments)
        return optim.flat(optax.chain(clip, scale, *decay, optax.scale_by_learning_rate(rate)))

    return {
        "tokenizer": adam(config.tokenizer_rate),
        "world_model": adam(config.world_model_rate, optim.add_decayed_weights(config.weight_decay, r"(^|/)kernel$")),
        "actor_critic": adam(config.actor_critic_rate),
    }


def descend(
    name: str, objective: Callable, state: AgentState, config: IRISConfig, axis_name: str | None,
    args: tuple[PyTree, ...], axes: tuple[int, ...],
) -> tuple[AgentState, Metrics, PyTree]:  # fmt: skip
    """One optimizer step of a module on the sum of the losses in `objective(weights, *args)`.

    The objective gives (losses, (metrics, aux)), means over the batch, which is axis `axes[i]` of the arrays of
    `args[i]` and the first one of those of `aux`.
    """

    def total(modules, *args):
        losses, (metrics, aux) = objective(modules[name], *args)
        value = sum(losses.values())
        return value, (metrics | {f"loss/{term}": loss for term, loss in losses.items()} | {"loss": value}, aux)

    chain, params = {name: optimizers(config)[name]}, {name: state.params[name]}
    batch = optim.Microbatches(args, axes, config.grad_accum)
    done = optim.descend(total, chain, state.opt_state, params, axis_name, batch)
    params, opt_state = state.params | done.params, state.opt_state | done.opt_state
    new = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
    return new, done.metrics | {"grad_norm": done.grad_norm[name]}, done.aux
