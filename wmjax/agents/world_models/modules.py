"""The modules of V and M for one environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.nets.mdn import MDNRNN
from wmjax.nets.spaces import action_size, is_image
from wmjax.nets.vae import Decoder, Encoder, decoder_base
from wmjax.types import Array, Box, Discrete, EnvSpec, UsageError


class Networks(NamedTuple):
    """The modules; all are functions of parameters."""

    encoder: Encoder
    decoder: Decoder
    memory: MDNRNN


def check_spec(spec: EnvSpec) -> str:
    """The name of the one image that V sees. Raises `UsageError` where a space is not one that the agent can take."""
    if not isinstance(spec.action, Discrete) and not (
        isinstance(spec.action, Box) and len(spec.action.shape) == 1 and spec.action.dtype == "float32"
    ):
        raise UsageError(f"action space {spec.action} is not supported; valid: Discrete(n), float32 Box of shape (A,)")
    if len(spec.obs) != 1 or not all(map(is_image, spec.obs.values())):
        raise UsageError(f"observations {sorted(spec.obs)} are not supported; valid: one uint8 image (H, W, C)")
    ((name, space),) = spec.obs.items()
    height, width, _ = space.shape
    if height != width:
        raise UsageError(f"observation {name!r}: image size {height}x{width} is not supported; valid: square")
    decoder_base(height)
    return name


def as_taken(spec: EnvSpec) -> Callable[[Array], Array] | None:
    """From actions of an agent to those that the environment takes, `[..., A]`; None where these are no numbers."""
    if isinstance(spec.action, Discrete):
        return None
    low, high = (jnp.asarray(bound, jnp.float32) for bound in (spec.action.low, spec.action.high))
    scale = spec.action_map or (lambda action: low + (action + 1) / 2 * (high - low))
    return lambda action: scale(jnp.clip(action, -1.0, 1.0)).astype(jnp.float32)


def networks(spec: EnvSpec, config: WorldModelsConfig) -> Networks:
    """The modules for one environment."""
    (space,) = spec.obs.values()
    side, _, channels = space.shape
    return Networks(
        Encoder(config.latent, config.depth, config.encoder_padding, config.compute_dtype),
        Decoder(side, channels, config.decoder_depth or config.depth, config.decoder_relu, config.compute_dtype),
        MDNRNN(
            config.latent, action_size(spec), config.hidden, config.mixtures, config.mixture, config.reward_head,
            config.done_head, config.restart_input, config.layer_norm, config.forget_bias, config.compute_dtype,
            as_taken(spec) if config.memory_action == "env" else None,
        ),
    )  # fmt: skip
