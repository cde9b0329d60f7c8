"""DreamerV2: a world model with categorical latents, straight-through gradients and KL balancing.

Paper: Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models" (arXiv 2010.02193, ICLR 2021).
Implemented as the authors' code of 2022 does it: layer-normed GRU, REINFORCE for discrete and dynamics backpropagation
for continuous actions, a critic with a slow target, Adam in TensorFlow's form with decoupled weight decay.

Departures: Discrete observations are one-hot; images of other sizes than 64 are taken (`nets.strided_codec`); the slow
critic starts as a copy of the critic (the code lets it start at random and copies after the first update);
`kl_balance = 0.5` is the paper's equation, where the code turns balancing off (`kl_mode="plain"`, `free_mode="step"`
here). Numbers that differ: `docs/papers.md`.

Read from top to bottom: configuration, networks, world model, losses, update, agent.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import checks, dreaming, optim, recipes
from wmjax.nets import spaces, strided_codec
from wmjax.nets.heads import Head
from wmjax.nets.mlp import call, init_modules
from wmjax.nets.rssm import DenseRSSM, LatentState, feature, zero_first
from wmjax.nets.spaces import action_size, choice_counts, choice_outputs, zero_obs
from wmjax.ops import action_distributions, distributions, kl, latents, noise, returns
from wmjax.ops.symlog import REWARD_TRANSFORMS
from wmjax.types import (
    Agent,
    AgentState,
    Array,
    EnvSpec,
    Metrics,
    Sampling,
    TimeStep,
    Trajectory,
    UsageError,
    WorldModel,
)

sg = jax.lax.stop_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class DreamerV2Config:
    """Hyperparameters; the defaults are those of the released code for Atari."""

    # Networks.
    deter: int = 600  # size of the recurrent state
    hidden: int = 600  # width of the layers of the RSSM
    latent: Literal["categorical", "gaussian"] = "categorical"  # kind of the latents
    stoch: int = 32  # latents
    classes: int = 32  # of each categorical latent
    depth: int = 48  # channels of the first convolution
    embed: int | None = None  # size of a linear layer after the convolutions; None: no layer
    encoder_padding: Literal["VALID", "SAME"] | int = "VALID"  # of the convolutions of the encoder
    units: int = 400  # width of the layers of the heads
    vector_layers: int = 4  # of encoder and decoder, for observations that are no images
    reward_layers: int = 4  # hidden layers of the reward head
    cont_layers: int = 4  # hidden layers of the continue head
    actor_layers: int = 4  # hidden layers of the actor
    critic_layers: int = 4  # hidden layers of the critic
    cell: Literal["gru", "layer_norm_gru"] = "layer_norm_gru"  # the recurrent cell
    input_layer: bool = True  # between [z, a] and the GRU
    norm: Literal["none", "layer"] = "none"  # of all layers; the GRU has its own
    activation: Literal["elu", "relu", "silu"] = "elu"  # of the dense layers
    reward_head: Literal["normal", "symlog_mse"] = "normal"  # how the reward is predicted
    critic_head: Literal["normal", "symlog_mse"] = "normal"  # how the value is predicted

    # World model loss (equation 2, algorithms 1 and 2).
    latent_estimator: Literal["straight_through", "gumbel_straight_through", "argmax"] = (
        "straight_through"  # of gradients
    )
    kl_mode: Literal["balanced", "plain", "guide_code"] = "balanced"  # how the two sides of the KL are weighed
    kl_balance: float = 0.8  # share of the term that trains the prior
    kl_forward: bool = False  # whether the prior comes first in the KL
    free_nats: float = 0.0  # of each KL term
    free_mode: Literal["avg", "step", "latent"] = "avg"  # what the free nats are held against
    use_continue: bool = True  # predict when episodes end, as the discount
    reward_transform: Literal["identity", "tanh", "symlog"] = "tanh"  # of the reward that is learned
    kl_scale: float = 0.1  # weight of the KL in the loss
    image_scale: float = 1.0  # weight of images in the loss
    vector_scale: float = 1.0  # weight of vectors in the loss
    reward_scale: float = 1.0  # weight of the reward in the loss
    cont_scale: float = 5.0  # weight of the continue head in the loss

    # Actor and critic (equations 4 to 6).
    horizon: int = 15  # imagined steps
    imagine_last: int = 0  # imagine from this many last steps of each sequence; 0: from all
    discount: float = 0.999  # of rewards, per agent step
    lambda_: float = 0.95  # of the lambda-returns
    bootstrap: bool = True  # end returns with the value of the last state; False: with its reward
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"  # auto: by the kind of action
    actor_grad_mix: float = 0.1  # share of the dynamics gradient in `both`
    entropy_scale: float = 1e-3  # weight of the actor's entropy
    slow_critic_every: int = 100  # updates between two moves of the slow critic
    slow_critic_rate: float = 1.0  # 1 copies
    exploration: float = 0.0  # share of random actions, or deviation of the noise, while collecting

    # Optimizers: world model, actor, critic.
    model_lr: float = 2e-4  # learning rate of the world model
    actor_lr: float = 4e-5  # learning rate of the actor
    critic_lr: float = 1e-4  # learning rate of the critic
    epsilon: float = 1e-5  # of Adam
    grad_clip: float = 100.0  # norm of all gradients of an optimizer; 0 turns it off
    weight_decay: float = 1e-6  # of every weight, not scaled by the learning rate
    grad_accum: int = 1  # updates whose gradients make one step

    # Data.
    batch_size: int = 16  # sequences of an update
    length: int = 50  # steps of a sequence
    within_episode: bool = False  # sequences do not cross the end of an episode
    over: Literal["steps", "episodes"] = "steps"  # all sequences are equally likely; or all episodes, then those of one
    prioritize_ends: bool = False  # sample the last sequence of an episode more often
    num_envs: int = 1  # environments that are stepped at once
    replay_capacity: int = 2_000_000  # agent steps that replay holds, over all environments
    prefill: int = 50_000  # agent steps by random actions
    pretrain: int = 1  # updates on these
    train_every: int = 16  # agent steps of all environments between bursts of updates
    train_steps: int = 1  # updates of a burst

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of networks; parameters and losses stay float32
    remat: bool = False  # recompute the RSSM step in the backward pass
    eval_action: Literal["sample", "mode"] = "mode"  # how actions come from the policy when it is evaluated
    eval_latent: Literal["sample", "mode"] = "sample"  # how latents come from the posterior when it is evaluated

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range or contradicts another."""
        checks.check_ranges(self, RULES)
        if self.latent == "gaussian" and self.latent_estimator != "straight_through":
            raise UsageError(
                f"latent_estimator {self.latent_estimator!r} is for categorical latents; with latent='gaussian', which "
                "is reparameterized, leave it at 'straight_through'"
            )
        _check_dynamics(self, self.actor_grad)
        if not self.bootstrap and self.lambda_ != 1:
            raise UsageError(
                f"bootstrap=False sums rewards without values, which lambda_ would mix in: lambda_ must be 1, "
                f"got {self.lambda_}"
            )
        if self.prioritize_ends and not self.within_episode:
            raise UsageError("prioritize_ends is about the ends of episodes: it needs within_episode=True")
        if self.imagine_last > self.length:
            raise UsageError(f"imagine_last must be in [0, length={self.length}], got {self.imagine_last}")
        recipes.check_bursts(
            self.num_envs, self.prefill, self.pretrain, self.train_every, self.batch_size, self.replay_capacity,
            self.length,
        )  # fmt: skip


RULES = (
    checks.rules(
        checks.POSITIVE,
        "deter hidden stoch classes depth embed units vector_layers slow_critic_every model_lr actor_lr critic_lr "
        "epsilon grad_accum batch_size length num_envs replay_capacity train_every train_steps",
    )
    | checks.rules(
        checks.NOT_NEGATIVE,
        "reward_layers cont_layers actor_layers critic_layers free_nats kl_scale image_scale vector_scale reward_scale "
        "cont_scale imagine_last entropy_scale exploration grad_clip prefill pretrain encoder_padding",
    )
    | checks.rules(checks.FRACTION, "kl_balance discount lambda_ actor_grad_mix slow_critic_rate")
    | checks.rules(checks.BELOW_ONE, "weight_decay")
    | {"horizon": (lambda x: x >= 2, "2 or more: the actor does not use the last two states")}
)


def _check_dynamics(config: DreamerV2Config, actor_grad: str) -> None:
    if actor_grad in ("dynamics", "both") and config.latent_estimator == "argmax":
        raise UsageError(
            f"actor_grad {actor_grad!r} is backpropagated through imagined latents, and latent_estimator='argmax' "
            "passes no gradient; use 'straight_through' or 'gumbel_straight_through', or actor_grad='reinforce'"
        )


def actor_gradient(spec: EnvSpec, config: DreamerV2Config) -> str:
    """`auto` resolved: REINFORCE for discrete actions, dynamics backpropagation for continuous ones."""
    if config.actor_grad != "auto":
        return config.actor_grad
    return "dynamics" if choice_counts(spec) is None else "reinforce"


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Networks(NamedTuple):
    """The modules; all are functions of parameters."""

    encoder: strided_codec.StridedEncoder
    rssm: DenseRSSM
    decoder: strided_codec.StridedDecoder
    reward: Head
    cont: Head | None  # None without `use_continue`
    actor: Head
    critic: Head


def networks(spec: EnvSpec, config: DreamerV2Config) -> Networks:
    """The modules for one environment. `DenseRSSM.embed` follows from the encoder's output."""
    style = dict(norm=config.norm, activation=config.activation, dtype=config.compute_dtype)
    coder = dict(
        spaces=tuple(sorted(spec.obs.items())), depth=config.depth, units=(config.units,) * config.vector_layers,
        conv_activation=config.activation, **style,
    )  # fmt: skip
    encoder = strided_codec.StridedEncoder(padding=config.encoder_padding, embed=config.embed, **coder)
    embed = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), zero_obs(spec, (1,)))[0]).shape[-1]
    outputs = config.stoch * (config.classes if config.latent == "categorical" else 2)
    rssm = DenseRSSM(config.deter, config.hidden, outputs, embed, config.cell, config.input_layer, **style)

    def head(outputs, layers):
        return Head(tuple(outputs.items()), (config.units,) * layers, init_kind="glorot", **style)

    actions = choice_outputs(spec) or {name: action_size(spec) for name in ("mean", "std")}
    return Networks(
        encoder=encoder,
        rssm=rssm,
        decoder=strided_codec.StridedDecoder(**coder),
        reward=head({"mean": 1}, config.reward_layers),
        cont=head({"logits": 1}, config.cont_layers) if config.use_continue else None,
        actor=head(actions, config.actor_layers),
        critic=head({"mean": 1}, config.critic_layers),
    )


def init_params(nets: Networks, spec: EnvSpec, config: DreamerV2Config, key: Array) -> dict:
    """Parameters of all modules."""
    state = zero_state(config, 1)
    inputs = {name: (feature(state),) for name in Networks._fields}
    inputs["encoder"] = (zero_obs(spec, (1,)),)
    inputs["rssm"] = (state.deter, state.stoch, jnp.zeros((1, action_size(spec))), jnp.zeros((1, nets.rssm.embed)))
    return init_modules(nets._asdict(), key, inputs)


# ---------------------------------------------------------------------------------------------------------------------
# World model


def latent_dist(raw: Array, config: DreamerV2Config) -> latents.Latent:
    """The distribution of z from the network's raw numbers."""
    if config.latent == "categorical":
        return latents.Categorical(raw.reshape(*raw.shape[:-1], config.stoch, config.classes))
    mean, std = jnp.split(raw, 2, -1)
    return latents.Gaussian(mean, 2 * jax.nn.sigmoid(std / 2) + 0.1)


def zero_state(config: DreamerV2Config, batch_size: int) -> LatentState:
    """The state before the first observation, `[B, ...]`."""
    outputs = config.stoch * (config.classes if config.latent == "categorical" else 2)
    dist = jax.tree.map(jnp.zeros_like, latent_dist(jnp.zeros((batch_size, outputs)), config))
    deter = jnp.zeros((batch_size, config.deter), config.compute_dtype)
    return LatentState(deter, dist.mode().astype(config.compute_dtype) * 0, dist)


def world_model(nets: Networks, spec: EnvSpec, config: DreamerV2Config, latent: str = "sample") -> WorldModel:
    """The learned environment; `State` is `LatentState`. `latent="mode"` takes the likeliest latents, as an option."""

    def init_state(params, batch_size):
        del params
        return zero_state(config, batch_size)

    def encode(params, obs):
        return call(nets.rssm, params["rssm"], call(nets.encoder, params["encoder"], obs), method="project")

    def draw(key, deter, raw):
        dist = latent_dist(raw, config)
        if latent == "mode":
            stoch = dist.mode()
        elif config.latent == "categorical":
            stoch = dist.sample(key, config.latent_estimator)
        else:
            stoch = dist.sample(key)
        return LatentState(deter, stoch.astype(deter.dtype), dist)

    def observe(params, key, state, prev_action, embed, is_first):
        state, prev_action = zero_first((state, prev_action), is_first)
        deter = call(nets.rssm, params["rssm"], state.deter, state.stoch, prev_action, method="advance")
        return draw(key, deter, call(nets.rssm, params["rssm"], deter, embed, method="posterior"))

    def imagine(params, key, state, action):
        deter = call(nets.rssm, params["rssm"], state.deter, state.stoch, action, method="advance")
        return draw(key, deter, call(nets.rssm, params["rssm"], deter, method="prior"))

    def predict(params, state):
        feat = feature(state)
        # The head was trained on P(not terminal) times the discount.
        cont = jnp.minimum(1.0, discount_of(nets, params, feat, config) / config.discount)
        return reward_dist(nets, params, feat, config).mean(), cont

    def decode(params, state):
        outputs = call(nets.decoder, params["decoder"], feature(state))
        return {name: strided_codec.mean(outputs[name], space) for name, space in spec.obs.items()}

    return WorldModel(init_state, encode, observe, imagine, predict, decode)


def scalar_dist(outputs: dict[str, Array], kind: str):
    """Distribution of one number, `[...]`, from a head's output."""
    mean = outputs["mean"][..., 0]
    return distributions.SymlogMSE(mean) if kind == "symlog_mse" else distributions.UnitNormal(mean)


def reward_dist(nets: Networks, params: dict, feat: Array, config: DreamerV2Config):
    """Distribution of the (transformed) reward, `[...]`, from features `[..., S K + D]`."""
    return scalar_dist(call(nets.reward, params["reward"], feat), config.reward_head)


def discount_of(nets: Networks, params: dict, feat: Array, config: DreamerV2Config) -> Array:
    """P(not terminal) times the discount, `[...]`; the discount alone without `use_continue`."""
    if nets.cont is None:
        return jnp.full(feat.shape[:-1], config.discount)
    return jax.nn.sigmoid(call(nets.cont, params["cont"], feat)["logits"][..., 0])


def critic_dist(nets: Networks, critic_params: dict, feat: Array, config: DreamerV2Config):
    """Distribution of the return, `[...]`, of the critic or its slow copy."""
    return scalar_dist(call(nets.critic, critic_params, feat), config.critic_head)


def policy_dist(nets: Networks, actor_params: dict, feat: Array):
    """Distribution of the action, `[..., A]`: one-hots with straight-through samples, or a truncated normal."""
    outputs = call(nets.actor, actor_params, feat)
    discrete = distributions.choices(outputs)
    return discrete if discrete is not None else action_distributions.truncated_normal(outputs["mean"], outputs["std"])


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def world_model_losses(
    nets: Networks,
    spec: EnvSpec,
    config: DreamerV2Config,
    params: dict,
    states: LatentState,
    step: TimeStep,
    axis_name: str | None = None,
) -> tuple[dict[str, Array], Metrics]:
    """Each term of the world model's loss, unscaled: the KL a scalar, negative log-likelihoods `[T, B]`.

    Args:
      states: posterior states of the steps, `[T, B]`, with their gradients.
      step: the observations, rewards and flags to predict.
      axis_name: axis that the batch is spread over.

    Source: equation 2; every head passes gradients into the model. Log-likelihoods are those of normal distributions
    with deviation 1, their constants included.
    """
    prior = latent_dist(call(nets.rssm, params["rssm"], states.deter, method="prior"), config)
    kl_term, kl_value = kl.kl_loss(
        states.dist,
        prior,
        mode=config.kl_mode,
        balance=config.kl_balance,
        free_nats=config.free_nats,
        free_mode=config.free_mode,
        forward=config.kl_forward,
        axis_name=axis_name,
    )
    feat = feature(states)
    reward = REWARD_TRANSFORMS[config.reward_transform](step.reward)
    losses = {"kl": kl_term, "reward": -reward_dist(nets, params, feat, config).log_prob(reward)}
    if nets.cont is not None:
        logits = call(nets.cont, params["cont"], feat)["logits"][..., 0]
        losses["cont"] = -distributions.bernoulli_log_prob(logits, config.discount * (1.0 - step.is_terminal))
    outputs = call(nets.decoder, params["decoder"], feat)
    for name, space in spec.obs.items():
        losses[f"decode/{name}"] = -strided_codec.log_prob(outputs[name], step.obs[name], space)
    metrics = {
        "kl": kl_value.mean(),
        "prior_entropy": prior.entropy().sum(-1).mean(),
        "posterior_entropy": states.dist.entropy().sum(-1).mean(),
    }
    return losses, metrics


def scales(spec: EnvSpec, config: DreamerV2Config) -> dict[str, float]:
    """The factor of each term of the world model's loss."""
    decode = {
        f"decode/{name}": config.image_scale if spaces.is_image(space) else config.vector_scale
        for name, space in spec.obs.items()
    }
    factors = decode | {"kl": config.kl_scale, "reward": config.reward_scale}
    return factors | ({"cont": config.cont_scale} if config.use_continue else {})


class Imagined(NamedTuple):
    """Imagined trajectories, the start state first."""

    feat: Array  # [H + 1, N, F]
    action: Array  # [H, N, A], action k leads from state k to k + 1
    reward: Array  # [H + 1, N], of the state itself
    discount: Array  # [H + 1, N], of the state itself; at the start from the data
    value: Array  # [H + 1, N], of the slow critic


def imagine_behavior(
    nets: Networks,
    model: WorldModel,
    config: DreamerV2Config,
    params: dict,
    actor_params: dict,
    keys: Array,
    start: LatentState,
    is_terminal: Array,
) -> Imagined:
    """Follows the actor through imagination; differentiable in `actor_params` through actions and dynamics.

    Args:
      params: everything but the actor; gets no gradient.
      keys: `[N]`, consumed.
      start: `[N]`.
      is_terminal: bool `[N]`, whether nothing follows the start.
    """
    frozen = sg(params)

    def policy(key, carry, state):
        # The actor is not trained to make its own inputs better: no gradient through them.
        return carry, policy_dist(nets, actor_params, sg(feature(state))).sample(seed=key)

    _, feat, action = dreaming.imagine(
        model, frozen, keys, start, policy, config.horizon, emit=feature, remat=config.remat
    )
    discount = discount_of(nets, frozen, feat, config)
    if nets.cont is not None:
        discount = jnp.concatenate([config.discount * (1.0 - is_terminal)[None], discount[1:]])
    reward = reward_dist(nets, frozen, feat, config).mean()
    value = critic_dist(nets, frozen["slow_critic"], feat, config).mean()
    return Imagined(feat, action, reward, discount, value)


def targets(imagined: Imagined, config: DreamerV2Config) -> Array:
    """What the states 0 to H - 1 are worth, `[H, N]`, with the gradient of everything it is made of.

        V_k = r_k + γ_k [(1 - λ) v_{k+1} + λ V_{k+1}],   V_H = v_H

    Source: equation 4. Reward and discount are those of the same state, also at the start.
    """
    value = imagined.value
    if not config.bootstrap:
        value = value.at[-1].set(imagined.reward[-1])
    return returns.lambda_returns(imagined.reward[:-1], imagined.discount[:-1], value[1:], config.lambda_)


def behavior_losses(
    policy, critic, imagined: Imagined, config: DreamerV2Config, actor_grad: str
) -> tuple[dict[str, Array], Metrics]:
    """Actor and critic losses on imagined trajectories.

        dynamics:   J_k = V_{k+1}
        reinforce:  J_k = log π(a_k) sg(V_{k+1} - v_k)
        both:       J_k = mix · dynamics + (1 - mix) · reinforce
        L_actor = -w_k [J_k + η H(π)],   k = 0 .. H - 2;     L_critic = -w_k log p(sg(V_k)),   k = 0 .. H - 1

    with w_k = Π_{j < k} γ_j, so that w_0 = 1.

    Args:
      policy: distribution at the states 0 to H - 2 without gradient into them; differentiated.
      critic: return distribution at the states 0 to H - 1; differentiated.
      imagined: from `imagine_behavior`.
      actor_grad: reinforce, dynamics or both.

    Returns:
      {"actor": [H - 1, N], "critic": [H, N]} and metrics.

    Source: equations 5 and 6. The last two states are not used by the actor.
    """
    target = targets(imagined, config)
    weight = sg(returns.discount_weights_before(imagined.discount))
    advantage = sg(target[1:] - imagined.value[:-2])
    dynamics = target[1:]
    if actor_grad == "dynamics":
        objective = dynamics
    else:
        objective = policy.log_prob(sg(imagined.action[:-1])) * advantage
        if actor_grad == "both":
            objective = config.actor_grad_mix * dynamics + (1 - config.actor_grad_mix) * objective
    entropy = policy.entropy()
    losses = {
        "actor": -weight[:-2] * (objective + config.entropy_scale * entropy),
        "critic": -weight[:-1] * critic.log_prob(sg(target)),
    }
    metrics = {
        "return_mean": target.mean(),
        "value_mean": imagined.value.mean(),
        "advantage_size": jnp.abs(advantage).mean(),
        "imagined_reward": imagined.reward.mean(),
        "imagined_cont": imagined.discount.mean() / config.discount,
        "policy_entropy": entropy.mean(),
    }
    return losses, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Update


def world_model_loss(
    nets: Networks,
    model: WorldModel,
    spec: EnvSpec,
    config: DreamerV2Config,
    params: dict,
    key: Array,
    prev_action: Array,
    step: TimeStep,
    axis_name: str | None = None,
) -> tuple[Array, tuple]:
    """Everything that the gradient of the world model is taken of.

    Args:
      key: the same on every device; consumed.
      prev_action: `[T, B, A]`, the action that led to each step.
      step: `[T, B]`; sequences start from the zero state.

    Returns:
      The scalar to minimize, and (losses, states, metrics).
    """
    batch = step.reward.shape[1]
    keys = noise.row_keys(key, batch, axis_name)
    _, states = dreaming.observe(
        model, params, keys, model.init_state(params, batch), prev_action, model.encode(params, step.obs),
        step.is_first, remat=config.remat,
    )  # fmt: skip
    losses, metrics = world_model_losses(nets, spec, config, params, states, step, axis_name)
    factors = scales(spec, config)
    assert losses.keys() == factors.keys(), (losses.keys(), factors.keys())
    means = {name: jnp.mean(value) for name, value in losses.items()}
    total = sum(factors[name] * mean for name, mean in means.items())
    metrics |= {f"loss/{name}": mean for name, mean in means.items()} | {"loss/model": total}
    return total, (losses, states, metrics)


def behavior_loss(
    nets: Networks,
    model: WorldModel,
    config: DreamerV2Config,
    actor_grad: str,
    params: dict,
    trained: dict,
    keys: Array,
    start: LatentState,
    is_terminal: Array,
) -> tuple[Array, tuple]:
    """Everything that the gradients of actor and critic are taken of; each gets that of its own loss only.

    Args:
      params: the world model, already updated, and the slow critic.
      trained: {"actor", "critic"}.
      keys, start, is_terminal: see `imagine_behavior`.

    Returns:
      The scalar to minimize, and (losses, metrics).
    """
    # REINFORCE needs no gradient through the rollout: without it nothing of the rollout has to be stored.
    acting = sg(trained["actor"]) if actor_grad == "reinforce" else trained["actor"]
    imagined = imagine_behavior(nets, model, config, params, acting, keys, start, is_terminal)
    feat = sg(imagined.feat)
    losses, metrics = behavior_losses(
        policy_dist(nets, trained["actor"], feat[:-2]),
        critic_dist(nets, trained["critic"], feat[:-1], config),
        imagined,
        config,
        actor_grad,
    )
    means = {name: jnp.mean(value) for name, value in losses.items()}
    return sum(means.values()), (losses, metrics | {f"loss/{name}": mean for name, mean in means.items()})


def optimizers(config: DreamerV2Config) -> dict[str, optax.GradientTransformation]:
    """One for each of world model, actor and critic."""
    rates = {"model": config.model_lr, "actor": config.actor_lr, "critic": config.critic_lr}
    rest = (config.epsilon, config.grad_clip, config.weight_decay, config.grad_accum)
    return {name: optim.clipped_adam_tf(rate, *rest) for name, rate in rates.items()}


def grouped(params: dict) -> dict[str, dict]:
    """What each optimizer trains; all modules but actor and critic are the world model."""
    model = {name: value for name, value in params.items() if name not in ("actor", "critic")}
    return {"model": model, "actor": params["actor"], "critic": params["critic"]}


def update(
    nets: Networks,
    model: WorldModel,
    spec: EnvSpec,
    config: DreamerV2Config,
    axis_name: str | None,
    state: AgentState,
    key: Array,
    trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:
    """The world model first, then actor and critic in the updated model, then the slow critic.

    Every sequence `[T, B]` starts from the zero state without a previous action, wherever it was cut.
    """
    length, batch = trajectory.step.reward.shape
    step = trajectory.step._replace(is_first=trajectory.step.is_first.at[0].set(True))
    prev_action = jnp.concatenate([jnp.zeros_like(trajectory.action[:1]), trajectory.action[:-1]])
    key_model, key_behavior = jax.random.split(key)
    chains, groups = optimizers(config), grouped(state.params)
    chain, trained = {"model": chains.pop("model")}, {"model": groups.pop("model")}

    # World model.
    def model_objective(groups):
        total, (_, states, metrics) = world_model_loss(
            nets, model, spec, config, groups["model"], key_model, prev_action, step, axis_name
        )
        return total, (metrics, states)

    done = optim.descend(model_objective, chain, state.opt_state, trained, axis_name)
    world, states = done.params["model"], done.aux

    # Actor and critic, in the new model, from the posterior states of the old one.
    last = config.imagine_last or length
    rows = lambda x: x[-last:].reshape(last * batch, *x.shape[2:])
    start, is_terminal = jax.tree.map(lambda x: sg(rows(x)), (states, step.is_terminal))
    keys = noise.split(noise.row_keys(key_behavior, batch, axis_name), last).reshape(last * batch)

    def behavior_objective(trained):
        params = world | state.non_trainable
        total, (_, metrics) = behavior_loss(
            nets, model, config, actor_gradient(spec, config), params, trained, keys, start, is_terminal
        )
        return total, (metrics, ())

    behavior_done = optim.descend(behavior_objective, chains, state.opt_state, groups, axis_name)
    trained = behavior_done.params

    # The first move of the slow critic is a copy, whatever its rate.
    rate = jnp.where(state.step == 0, 1.0, config.slow_critic_rate)
    slow_critic = state.non_trainable["slow_critic"]
    slow_critic = optim.soft_update(trained["critic"], slow_critic, rate, state.step, config.slow_critic_every)
    norms = done.grad_norm | behavior_done.grad_norm
    metrics = done.metrics | behavior_done.metrics | {f"grad_norm/{name}": norm for name, norm in norms.items()}
    params, opt_state = world | trained, done.opt_state | behavior_done.opt_state
    return AgentState(params, opt_state, state.stats, state.step + 1, {"slow_critic": slow_critic}), metrics, None


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def dreamer_v2(spec: EnvSpec, config: DreamerV2Config, axis_name: str | None = None) -> Agent:
    """The agent for one environment.

    Args:
      spec: observations (uint8 images, float32 vectors, Discrete entries, alone or together) and actions (Discrete,
        MultiDiscrete or float32 Box of rank 1).
      config: hyperparameters.
      axis_name: the named axis (of `vmap`, `shard_map` or `pmap`) that batches are spread over, or None.

    Raises:
      UsageError: a field of `config` is out of range or contradicts another or the environment, or a space of `spec` is
        not supported.
    """
    config.validate()
    spaces.check_spec(spec, strided_codec.fits)
    _check_dynamics(config, actor_gradient(spec, config))
    if config.within_episode:
        checks.check_episodes(config.length, spec.max_episode_steps)
    nets = networks(spec, config)
    model = world_model(nets, spec, config)
    eval_model = world_model(nets, spec, config, config.eval_latent)
    counts = choice_counts(spec)

    def init(key):
        params = init_params(nets, spec, config, key)
        groups = grouped(params)
        opt_state = {name: chain.init(groups[name]) for name, chain in optimizers(config).items()}
        return AgentState(params, opt_state, (), jnp.int32(0), {"slow_critic": params["critic"]})

    def policy_carry(params, batch_size):
        del params, batch_size
        return ()

    def policy(params, key, carry, state, *, explore):
        dist = policy_dist(nets, params["actor"], feature(state))
        if not explore and config.eval_action == "mode":
            return carry, dist.mode()
        key_policy, key_noise = noise.split(key, 2)
        action = dist.sample(seed=key_policy)
        if explore and config.exploration:
            action = action_distributions.explore(key_noise, action, config.exploration, counts)
        return carry, action

    def act_carry(params, batch_size):
        action = jnp.zeros((batch_size, action_size(spec)))
        return model.init_state(params, batch_size), action, policy_carry(params, batch_size)

    def act(params, key, carry, timestep, *, explore):
        state, prev_action, carry = carry
        key_observe, key_policy = noise.split(key, 2)
        filtering = model if explore else eval_model
        embed = filtering.encode(params, timestep.obs)
        state = filtering.observe(params, key_observe, state, prev_action, embed, timestep.is_first)
        carry, action = policy(params, key_policy, carry, state, explore=explore)
        return (state, action, carry), action, ()

    def learn(state, key, trajectory):
        return update(nets, model, spec, config, axis_name, state, key, trajectory)

    sampling = Sampling(
        config.length,
        over=config.over,
        within_episode=config.within_episode,
        prioritize_ends=config.prioritize_ends,
    )
    recipe = recipes.bursts(
        act,
        learn,
        sampling,
        num_envs=config.num_envs,
        replay_capacity=config.replay_capacity,
        batch_size=config.batch_size,
        prefill=config.prefill,
        pretrain=config.pretrain,
        train_every=config.train_every,
        train_steps=config.train_steps,
    )
    return Agent(init, policy_carry, policy, act_carry, act, model, recipe)
