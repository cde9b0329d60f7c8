"""The tokenizer: images to tokens and back, its losses (equations 1 and 2), and what its codebook follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from wmjax.agents.iris.config import IRISConfig
from wmjax.agents.iris.modules import Networks, descend, image_name
from wmjax.nets import perceptual, vqgan
from wmjax.nets.mlp import call
from wmjax.ops import noise, vq
from wmjax.types import Array, EnvSpec, Metrics, Sampling, Update

if TYPE_CHECKING:
    from wmjax.agents.iris.agent import Equations

sg = jax.lax.stop_gradient


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
    """Tokens `[..., K]` to images float32 `[..., H, W, C]` in [0, 1]: what the actor-critic sees.

    Where every token draws a patch by itself, each entry of the codebook is drawn once and then looked up.
    """
    side = round(tokens.shape[-1] ** 0.5)
    codebook = params["tokenizer"]["codebook"]
    draw = lambda quantized: call(nets.tokenizer, params["tokenizer"], quantized, method="decode")
    grid = tokens.reshape(*tokens.shape[:-1], side, side)
    if isinstance(nets.tokenizer.decoder, vqgan.PatchDecoder):
        patches = jnp.moveaxis(draw(codebook[:, None, None])[grid], -3, -4)  # [..., h, patch, w, patch, C]
        image = patches.reshape(*grid.shape[:-2], side * patches.shape[-4], side * patches.shape[-2], -1)
    else:
        image = draw(codebook[grid])
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
    nets: Networks, config: IRISConfig, params: dict, keys: Array, image: Array,
    reconstruction: Callable = reconstruction_loss,
) -> tuple[dict[str, Array], tuple[Array, Array]]:  # fmt: skip
    """Each term of the tokenizer's loss on images uint8 `[B, H, W, C]`, unscaled; `keys` `[B]`.

    `reconstruction` is a function as `reconstruction_loss`.

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
        "recon": reconstruction(x, y, config).mean(),
        "perceptual": perceptual.loss(config.perceptual, x, y, config.lpips_weights, keys, config.lpips_dropout).mean(),
    }
    return losses, (sg(z), tokens)


def loss_scales(config: IRISConfig) -> dict[str, float]:
    """The factor of each term. A codebook that follows moving averages takes no gradient."""
    return {
        "codebook": float(config.codebook == "gradient"),
        "commit": config.commit_scale,
        "recon": config.recon_scale,
        "perceptual": config.perceptual_scale * (config.perceptual != "none"),
    }


def follow_codebook(
    config: IRISConfig, key: Array, state: vq.CodebookState, codebook: Array, z: Array, tokens: Array, axis_name=None
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


def make_update(
    nets: Networks, spec: EnvSpec, config: IRISConfig, axis_name: str | None, equations: Equations
) -> Update:
    """Steps on frames `[1, B]`, all of them real."""
    name, scales = image_name(spec, config), loss_scales(config)

    def update(state, key, trajectory):
        key_rows, key_codebook = jax.random.split(key)
        image = trajectory.step.obs[name][0]
        keys = noise.row_keys(key_rows, image.shape[0], axis_name)

        def objective(weights, keys, image):
            params = {"tokenizer": weights}
            losses, aux = equations.tokenizer(nets, config, params, keys, image, equations.reconstruction)
            factors = {name: scales.get(name, 1.0) for name in losses}
            return {name: factors[name] * loss for name, loss in losses.items() if factors[name]}, ({}, aux)

        new, metrics, (z, tokens) = descend("tokenizer", objective, state, config, axis_name, (keys, image), (0, 0))
        weights = new.params["tokenizer"]
        record, codebook, more = follow_codebook(
            config, key_codebook, state.stats["codebook"], weights["codebook"], z, tokens, axis_name
        )
        params = new.params | {"tokenizer": weights | {"codebook": codebook}}
        return new._replace(params=params, stats={"codebook": record}), metrics | more, None

    sampling = Sampling(1, over="episodes", pad="right")
    return Update("tokenizer", update, config.tokenizer_updates, config.tokenizer_batch, sampling, config.grad_accum)
