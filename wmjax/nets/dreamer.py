"""What the Dreamers are made of alike: modules by name, and the world model around a recurrent state-space model.

So are the terms of the continue head and of the decoder; all other losses, and what is done with them, are in each
paper's own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets import strided_codec
from wmjax.nets.heads import Head
from wmjax.nets.mlp import call, init_modules
from wmjax.nets.rssm import RSSM, DenseRSSM, LatentState, feature, zero_first
from wmjax.nets.spaces import action_size, is_image, zero_obs
from wmjax.ops import latents
from wmjax.ops.distributions import bernoulli_log_prob, number
from wmjax.ops.symlog import REWARDS_BACK
from wmjax.types import Array, EnvSpec, TimeStep, UsageError, WorldModel


class Networks(NamedTuple):
    """The modules; all are functions of parameters."""

    encoder: nn.Module
    rssm: RSSM | DenseRSSM
    decoder: nn.Module
    reward: Head
    cont: Head | None  # None: nothing predicts when episodes end
    actor: Head
    critic: Head


class Parts(NamedTuple):
    """What the functions of one agent share."""

    spec: EnvSpec
    config: Any  # the agent's own
    nets: Networks
    latent: latents.Kind
    model: WorldModel
    axis_name: str | None = None  # that batches are spread over
    equations: Any = None  # the agent's own `Equations`


def are_papers(equations: Any, *names: str) -> bool:
    """Whether these fields of an agent's `Equations` are all the paper's."""
    return all(getattr(equations, name) is equations._field_defaults[name] for name in names)


def check_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...], of: str = "") -> None:
    """Raises `UsageError` where what an equation gives is not of its shape: a mean would hide it."""
    if found != shape:
        raise UsageError(f"equations: {name} gives {list(found)}{of}, and has to give {list(shape)}")


def check_networks(nets: Any) -> None:
    """Raises `UsageError` where `networks` of the user's lacks a module that the agent needs, or names one wrongly."""
    for name in Networks._fields:
        if getattr(nets, name, None) is None and name != "cont":
            raise UsageError(
                f"equations: networks gives no {name!r}; {', '.join(Networks._fields)} are valid, and more"
            )
    if not hasattr(nets, "cont") or hasattr(nets, "slow_critic"):
        raise UsageError("equations: networks needs a 'cont' (None: there is none), and no 'slow_critic'")


def embed_size(encoder: nn.Module, spec: EnvSpec) -> int:
    """E: length of an encoder's output."""
    return jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), zero_obs(spec, (1,)))[0]).shape[-1]


def init_params(parts: Parts, feat: Callable, key: Array, decoder_input: Callable | None = None) -> dict:
    """Parameters of all modules, by name.

    Args:
      feat: `State -> [..., F]`, what heads, actor and critic see.
      key: consumed.
      decoder_input: `State -> arguments`, what the decoder sees; None: what the heads do.
    """
    nets, state = parts.nets, parts.model.init_state({}, 1)
    inputs = dict.fromkeys(nets._fields, (feat(state),))
    inputs["encoder"] = (zero_obs(parts.spec, (1,)),)
    inputs["rssm"] = state.deter, state.stoch, jnp.zeros((1, action_size(parts.spec))), jnp.zeros((1, nets.rssm.embed))
    if decoder_input is not None:
        inputs["decoder"] = decoder_input(state)
    return init_modules(nets._asdict(), key, inputs)


def world_model(
    nets: Networks, latent: latents.Kind, feat: Callable, decode: Callable, discount: float,
    reward_dist: Callable = number, reward_back: Callable = lambda reward: reward,
) -> WorldModel:  # fmt: skip
    """The learned environment; `State` is `LatentState`.

    Args:
      latent: what z is.
      feat: `State -> [..., F]`, what the heads see.
      decode: as `WorldModel.decode`.
      discount: that the continue head was trained with, in (0, 1].
      reward_dist: from the outputs of the reward head to the distribution that they describe.
      reward_back: from what the head was trained on to the reward; of a mean it gives no mean, but what lies there.
    """
    rssm = lambda method, params, *args: call(nets.rssm, params["rssm"], *args, method=method)

    def init_state(params, batch_size):
        del params
        dist = jax.tree.map(jnp.zeros_like, latent.dist(jnp.zeros((batch_size, latent.outputs))))
        deter = jnp.zeros((batch_size, nets.rssm.deter), nets.rssm.dtype)
        return LatentState(deter, jnp.zeros_like(dist.mode(), nets.rssm.dtype), dist)

    def encode(params, obs):
        return rssm("project", params, call(nets.encoder, params["encoder"], obs))

    def draw(key, deter, raw):
        dist = latent.dist(raw)
        return LatentState(deter, latent.draw(dist, key).astype(deter.dtype), dist)

    def observe(params, key, state, prev_action, embed, is_first):
        state, prev_action = zero_first((state, prev_action), is_first)
        deter = rssm("advance", params, state.deter, state.stoch, prev_action)
        return draw(key, deter, rssm("posterior", params, deter, embed))

    def imagine(params, key, state, action):
        deter = rssm("advance", params, state.deter, state.stoch, action)
        return draw(key, deter, rssm("prior", params, deter))

    def predict(params, state):
        x = feat(state)
        # The head was trained on P(not terminal) times the discount.
        cont = jnp.minimum(1.0, discount_of(nets, params, x, discount) / discount)
        return reward_back(reward_dist(call(nets.reward, params["reward"], x)).mean()), cont

    return WorldModel(init_state, encode, observe, imagine, predict, decode)


def dense_networks(
    spec: EnvSpec, config: Any, latent: latents.Kind, actions: dict[str, int], norm: str, conv_activation: str
) -> Networks:
    """The modules of DreamerV1 and DreamerV2: strided convolutions around a `DenseRSSM`.

    Args:
      config: has their fields `depth`, `units`, `vector_layers`, `encoder_padding`, `embed`, `deter`, `hidden`, `cell`,
        `input_layer`, `activation`, `compute_dtype`, `use_continue`, and `NAME_layers` of each head.
      latent: what z is.
      actions: outputs of the actor.
      norm, conv_activation: of all layers but the GRU, and after convolutions.
    """
    style = dict(norm=norm, activation=config.activation, dtype=config.compute_dtype)
    coder = dict(
        spaces=tuple(sorted(spec.obs.items())), depth=config.depth, units=(config.units,) * config.vector_layers,
        conv_activation=conv_activation, **style,
    )  # fmt: skip
    encoder = strided_codec.StridedEncoder(padding=config.encoder_padding, embed=config.embed, **coder)
    embed = embed_size(encoder, spec)

    def head(outputs, layers):
        return Head(tuple(outputs.items()), (config.units,) * layers, init_kind="glorot", **style)

    return Networks(
        encoder=encoder,
        rssm=DenseRSSM(config.deter, config.hidden, latent.outputs, embed, config.cell, config.input_layer, **style),
        decoder=strided_codec.StridedDecoder(**coder),
        reward=head({"mean": 1}, config.reward_layers),
        cont=head({"logits": 1}, config.cont_layers) if config.use_continue else None,
        actor=head(actions, config.actor_layers),
        critic=head({"mean": 1}, config.critic_layers),
    )


def dense_parts(
    spec: EnvSpec, config: Any, axis_name: str | None, equations: Any, latent: latents.Kind | None = None
) -> Parts:
    """The parts of DreamerV1 and DreamerV2.

    Args:
      config: has their fields `discount` and `reward_transform`.
      equations: has their `networks`, `latent` and `reward`.
      latent: what z is; None: what the equations say.
    """

    def decode(params, state):
        outputs = call(nets.decoder, params["decoder"], feature(state))
        return {name: strided_codec.mean(outputs[name], space) for name, space in spec.obs.items()}

    latent = equations.latent(config) if latent is None else latent
    nets = equations.networks(spec, config, latent)
    check_networks(nets)
    reward_dist = lambda outputs: equations.reward(outputs, config)
    back = REWARDS_BACK[config.reward_transform]
    model = world_model(nets, latent, feature, decode, config.discount, reward_dist, back)
    return Parts(spec, config, nets, latent, model, axis_name, equations)


def discount_of(nets: Networks, params: dict, feat: Array, discount: float) -> Array:
    """P(not terminal) times the discount, `[...]`, from features `[..., F]`; the discount alone where no head is."""
    if nets.cont is None:
        return jnp.full(feat.shape[:-1], discount)
    return jax.nn.sigmoid(call(nets.cont, params["cont"], feat)["logits"][..., 0])


def expected_return(parts: Parts, feat: Callable, params: dict, carry: Any, state: Any) -> Array:
    """The mean of what the critic expects from states `[...]`, float32 `[...]`; of `Agent.value`."""
    del carry
    outputs = call(parts.nets.critic, params["critic"], feat(state))
    return number(outputs, getattr(parts.config, "critic_head", "normal")).mean()


def continue_loss(parts: Parts, params: dict, feat: Array, step: TimeStep) -> dict[str, Array]:
    """{"cont": negative log-likelihood `[T, B]` of the discount at each step}, from features `[T, B, F]`.

    {} where nothing predicts when episodes end.
    """
    if parts.nets.cont is None:
        return {}
    logits = call(parts.nets.cont, params["cont"], feat)["logits"][..., 0]
    return {"cont": -bernoulli_log_prob(logits, parts.config.discount * (1.0 - step.is_terminal))}


def decode_losses(parts: Parts, outputs: dict[str, Array], step: TimeStep) -> dict[str, Array]:
    """The loss `[T, B]` on each entry of the observations, as `decode/ENTRY`: `equations.reconstruction`.

    `outputs` is what the decoder makes of the states, by entry.
    """
    losses = {}
    for name, space in parts.spec.obs.items():
        loss = parts.equations.reconstruction(outputs[name], step.obs[name], space, parts.config)
        check_shape("reconstruction", loss.shape, step.reward.shape, f" for {name!r}")
        losses[f"decode/{name}"] = loss
    return losses


def log_likelihood_loss(output: Array, target: Array, space: Any, config: Any) -> Array:
    """DreamerV1's and DreamerV2's loss on an entry, `[T, B]`: -ln N(target; output, 1), or a class's cross-entropy.

    Of images `[T, B, H, W, C]` the output is compared with target / 255 - ½, the target being uint8.
    """
    del config
    return -strided_codec.log_prob(output, target, space)


def decode_scales(parts: Parts) -> dict[str, float]:
    """The factor of each `decode/ENTRY` in the loss: `image_scale` or `vector_scale` of the configuration."""
    scale = lambda space: parts.config.image_scale if is_image(space) else parts.config.vector_scale
    return {f"decode/{name}": scale(space) for name, space in parts.spec.obs.items()}
