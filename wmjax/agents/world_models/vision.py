"""V: an autoencoder sees. Its loss, its updates, and what replay keeps of what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import rel_entr

from wmjax import optim
from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.modules import Networks, check_spec
from wmjax.nets import perceptual
from wmjax.nets.mlp import call
from wmjax.ops import noise
from wmjax.types import Array, EnvSpec, Metrics, WorldModel

if TYPE_CHECKING:
    from wmjax.agents.world_models.agent import Equations


def sample_latent(key: Array, mu: Array, logvar: Array) -> Array:
    """z = μ + exp(logvar / 2) ε, `[..., Z]`; one key, or keys for the leading axes."""
    return mu + jnp.exp(logvar / 2) * noise.normal(key, mu.shape)


def kl_floor(mu: Array, logvar: Array, tolerance: float) -> tuple[Array, Array]:
    """KL from a standard normal, summed over `[..., Z]`, and the same with a floor under it; float32 `[...]` each.

        KL = -½ Σ (1 + logvar - μ² - e^logvar),   max(KL, tolerance Z)

    The floor is one of the sum, for each sample: below it there is no gradient at all. (The authors' comment says per
    dimension, their code does not.)
    """
    value = -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar), -1)
    return value, jnp.maximum(value, tolerance * mu.shape[-1])


def reconstruction_loss(output: Array, target: Array, config: WorldModelsConfig) -> Array:
    """Errors of images `[B, H, W, C]` in [0, 1], summed over the picture: `[B]`, 0 where they are equal.

    `mse` is the paper's squared error. Behind the decoder's sigmoid it has next to no gradient where the output is near
    0 or 1 and wrong, so that small things are not drawn for thousands of updates. That of `bce` is the error itself,
    with logits from -69 to 16: the KL divergence between Bernoulli distributions, which is their cross-entropy less a
    constant (Kingma & Welling 2013, appendix C.1).
    """
    if config.recon_loss == "mse":
        error = (output - target) ** 2
    else:
        target = jnp.clip(target, 0.0, 1.0)  # 255 / 255, once compiled, may be more than 1 by rounding
        on, off = jnp.maximum(output, 1e-30), jnp.maximum(1 - output, 1e-7)  # 0 where the sigmoid is 0 or 1 in float32
        error = rel_entr(target, on) + rel_entr(1 - target, off)
    return jnp.sum(error, (-3, -2, -1))


def vision_loss(
    nets: Networks, config: WorldModelsConfig, params: dict, key: Array, image: Array, axis_name: str | None = None,
    reconstruction: Callable = reconstruction_loss, kl_term: Callable = kl_floor,
) -> tuple[Array, tuple[Metrics, tuple]]:  # fmt: skip
    """V's loss, averaged over images uint8 `[B, H, W, C]`: errors summed over the picture, plus β KL.

    `key` are keys `[B]`, consumed; `axis_name` is the axis that the batch is spread over. The images are one part of
    `config.grad_accum` of a batch. `reconstruction` and `kl_term` are functions as `reconstruction_loss` and
    `kl_floor`.
    """
    encode = lambda weights, image: call(nets.encoder, weights, image)
    mu, logvar = (jax.checkpoint(encode) if config.remat else encode)(params["encoder"], image)
    output = call(nets.decoder, params["decoder"], sample_latent(key, mu, logvar))
    target = image.astype(jnp.float32) / 255
    recon = reconstruction(output, target, config)
    kl, floored = kl_term(mu, logvar, config.kl_tolerance)
    loss = config.recon_scale * recon + config.beta * floored
    metrics = {"recon": jnp.mean(recon), "kl": jnp.mean(kl)}
    if config.perceptual != "none":
        distance = perceptual.loss(config.perceptual, 2 * target - 1, 2 * output - 1, config.lpips_weights)
        loss = loss + config.perceptual_scale * distance
        metrics["perceptual"] = jnp.mean(distance)
    total = jnp.mean(loss)
    if config.reduction == "sum":  # over the batch of all parts and devices, whose gradients are averaged
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        total = total * image.shape[0] * config.grad_accum * devices
    return total, (metrics | {"loss": total}, ())


def optimizer(config: WorldModelsConfig) -> optax.GradientTransformation:
    """Adam."""
    return optim.flat(optax.adam(config.vision_learning_rate))


def make_update(
    nets: Networks, spec: EnvSpec, config: WorldModelsConfig, axis_name: str | None, equations: Equations
) -> Callable:
    """`Update.fn`: one step of V on the images of `[T, B]` records."""
    name = check_spec(spec)

    def update(state, key, trajectory):
        image = trajectory.step.obs[name]
        keys = noise.row_keys(key, image.shape[1], axis_name)
        keys = noise.split(keys, image.shape[0]).reshape(-1)  # [T * B]
        image = image.reshape(-1, *image.shape[2:])

        terms = equations.reconstruction, equations.kl
        objective = lambda modules, *part: equations.vision(nets, config, modules["vision"], *part, axis_name, *terms)
        batch = optim.Microbatches((keys, image), (0, 0), config.grad_accum)
        params = {"vision": {name: state.params[name] for name in ("encoder", "decoder")}}
        done = optim.descend(objective, {"vision": optimizer(config)}, state.opt_state, params, axis_name, batch)
        params, opt_state = state.params | done.params["vision"], state.opt_state | done.opt_state
        new = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return new, done.metrics | {"grad_norm": done.grad_norm["vision"]}, None

    return update


def make_encoding(model: WorldModel, config: WorldModelsConfig, axis_name: str | None) -> Callable:
    """`Update.fn`: writes what V sees in each record, so that M's updates need no image; learns nothing."""

    def update(state, key, trajectory):
        del key
        embed = model.encode(state.params, trajectory.step.obs)
        kl, _ = kl_floor(embed["mu"], embed["logvar"], 0.0)
        return state, optim.pmean({"kl": jnp.mean(kl)}, axis_name), pack_latent(embed, config)

    return update


def pack_latent(embed: dict[str, Array], config: WorldModelsConfig) -> dict[str, Array]:
    """What replay keeps: mu and logvar, `[..., Z]`, in `latent_dtype`."""
    return {name: jax.lax.stop_gradient(x).astype(config.latent_dtype) for name, x in embed.items()}


def unpack_latent(latent: dict[str, Array]) -> dict[str, Array]:
    """mu and logvar as float32."""
    return {name: x.astype(jnp.float32) for name, x in latent.items()}
