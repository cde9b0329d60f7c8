"""DreamerV3: a world model with categorical latents, and an actor-critic that learns in its imagination.

Paper: Hafner, Pasukonis, Ba, Lillicrap, "Mastering Diverse Domains through World Models" (arXiv 2301.04104, v2, 2024;
Nature 2025). Implemented as the authors' code of 2024-26 does it: block-diagonal GRU, RMSNorm, exponentially spaced
two-hot bins, replay context, replay value loss, LaProp with adaptive gradient clipping.

Departures: the actor mixes 1 % of a uniform distribution into discrete actions, as the paper says and the code's
`categorical` head does not (`actor_unimix = 0` gives the code); convolution stages follow from the image size;
`is_terminal` is the environment's own, never a time limit.

Read from top to bottom: configuration, networks and world model (made in `nets.dreamer`), losses, update, agent.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmjax import checks, dreaming, optim, recipes
from wmjax.nets import codec, dreamer, spaces
from wmjax.nets.dreamer import Networks, Parts
from wmjax.nets.heads import Head, number_head
from wmjax.nets.mlp import call
from wmjax.nets.rssm import RSSM, LatentState
from wmjax.nets.spaces import action_size, choice_outputs
from wmjax.ops import distributions, kl, latents, noise, normalize, returns
from wmjax.ops.distributions import Number, number
from wmjax.ops.symlog import symlog
from wmjax.types import Agent, AgentState, Array, Discrete, EnvSpec, Metrics, Sampling, TimeStep, Trajectory, UsageError

sg = jax.lax.stop_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


class Dimensions(NamedTuple):
    """Sizes that grow together."""

    deter: int
    hidden: int
    stoch: int
    classes: int
    depth: int
    units: int


SIZES = {
    # Published sizes: deter = 8 d, hidden = units = d, classes = depth = d / 16, 32 latents.
    "1m": Dimensions(512, 64, 32, 4, 4, 64),
    "12m": Dimensions(2048, 256, 32, 16, 16, 256),
    "25m": Dimensions(3072, 384, 32, 24, 24, 384),
    "50m": Dimensions(4096, 512, 32, 32, 32, 512),
    "100m": Dimensions(6144, 768, 32, 48, 48, 768),
    "200m": Dimensions(8192, 1024, 32, 64, 64, 1024),
    "400m": Dimensions(12288, 1536, 32, 96, 96, 1536),
    # Ours: for a laptop, and for the sizes of the implementation guide.
    "small": Dimensions(128, 64, 8, 8, 4, 64),
    "guide": Dimensions(200, 200, 32, 32, 32, 512),
}


@dataclasses.dataclass(frozen=True)
class DreamerV3Config:
    """Hyperparameters; the defaults are the paper's. One set serves every domain."""

    # Sizes (table 3 of the paper; the code's `size*` presets). A field that is not None replaces that of `size`.
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m", "small", "guide"] = "200m"
    deter: int | None = None  # size of the recurrent state; None: that of `size`
    hidden: int | None = None  # width of the layers of the RSSM; None: that of `size`
    stoch: int | None = None  # latents; None: that of `size`
    classes: int | None = None  # of each latent; None: that of `size`
    depth: int | None = None  # channels of the first convolution; None: that of `size`
    units: int | None = None  # width of the layers of the heads; None: that of `size`
    blocks: int = 8  # of the block-diagonal GRU
    bins: int = 255  # of the two-hot heads; odd
    stem: Literal["pool", "patch", "flat"] = "pool"  # of the image encoder, see nets.codec
    encoder_units: tuple[int, ...] | None = None  # None: three layers of `units`
    cell: Literal["block_gru", "gru"] = "block_gru"  # the recurrent cell
    norm: Literal["rms", "layer", "none"] = "rms"  # of the layers
    activation: Literal["silu", "relu", "elu"] = "silu"  # of the dense layers
    prior_layers: int = 2  # hidden layers of the prior
    posterior_layers: int = 1  # hidden layers of the posterior
    reward_layers: int = 1  # hidden layers of the reward head
    cont_layers: int = 1  # hidden layers of the continue head
    actor_layers: int = 3  # hidden layers of the actor
    critic_layers: int = 3  # hidden layers of the critic
    reward_head: Literal["two_hot", "symlog_mse", "normal"] = "two_hot"  # how the reward is predicted
    critic_head: Literal["two_hot", "symlog_mse", "normal"] = "two_hot"  # how the value is predicted
    symlog_vectors: bool = True  # see and predict vectors through symlog

    # World model loss (equations 4 and 5).
    unimix: float = 0.01  # uniform share of the latent distributions
    free_nats: float = 1.0  # per time step, for each of the two KL terms
    dyn_scale: float = 1.0  # weight of the KL that trains the prior
    rep_scale: float = 0.1  # weight of the KL that trains the posterior
    image_scale: float = 1.0  # weight of images in the loss
    vector_scale: float = 1.0  # weight of vectors in the loss
    reward_scale: float = 1.0  # weight of the reward in the loss
    cont_scale: float = 1.0  # weight of the continue head in the loss

    # Actor and critic (equations 6 to 11).
    horizon: int = 15  # imagined steps
    imagine_last: int = 0  # imagine from this many last steps of each sequence, 2 or more; 0: from all
    discount_horizon: float = 333.0  # the discount is 1 - 1 / this
    lambda_: float = 0.95  # of the lambda-returns
    actor_unimix: float = 0.01  # discrete actions; the paper's, 0 in the code
    entropy_scale: float = 3e-4  # weight of the actor's entropy
    actor_scale: float = 1.0  # weight of the actor in the loss
    critic_scale: float = 1.0  # weight of the critic in the loss
    replay_critic_scale: float = 0.3  # weight of the critic's loss on replayed steps
    slow_critic_rate: float = 0.02  # share of the critic that its slow copy takes on per update
    slow_critic_scale: float = 1.0  # pull of the critic towards its slow copy
    return_norm_rate: float = 0.01  # of the moving percentiles of returns, per update
    return_norm_low: float = 5.0  # percentiles
    return_norm_high: float = 95.0  # the upper percentile
    return_norm_limit: float = 1.0  # the least range that returns are divided by

    # Optimizer: one for everything.
    learning_rate: float = 4e-5  # one for everything
    warmup: int = 1000  # updates; the first has learning rate 0
    grad_clip: float = 0.3  # adaptive, per tensor; 0 turns it off
    grad_accum: int = 1  # parts of a batch that its gradient is computed in, one after the other
    beta1: float = 0.9  # of Adam: decay of the first moment
    beta2: float = 0.999  # of Adam: decay of the second moment
    epsilon: float = 1e-20  # of Adam

    # Data.
    batch_size: int = 16  # sequences of an update
    length: int = 64  # trained steps of a sequence, 2 or more; one more supplies its context
    num_envs: int = 16  # environments that are stepped at once
    train_ratio: float = 32.0  # trained steps per collected agent step
    replay_capacity: int = 5_000_000  # agent steps that replay holds, over all environments
    prefill: int = 2048  # agent steps, by the policy, before the first update: 1,024 windows of 65 steps in 16 envs
    online: bool = True  # train on each new window once, before uniform sampling
    latent_dtype: Literal["float32", "bfloat16"] = "float32"  # of `deter` in replay

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of networks; parameters and losses stay float32
    remat: bool = False  # recompute observed steps in the backward pass; none passes imagined ones
    eval_action: Literal["sample", "mode"] = "sample"  # how actions come from the policy when it is evaluated

    @property
    def dimensions(self) -> Dimensions:
        """Sizes after overrides."""
        given = {name: getattr(self, name) for name in Dimensions._fields}
        return SIZES[self.size]._replace(**{name: value for name, value in given.items() if value is not None})

    @property
    def discount(self) -> float:
        """1 - 1 / discount_horizon, in [0, 1)."""
        return 1.0 - 1.0 / self.discount_horizon

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range."""
        checks.check_ranges(self, RULES)
        dims = self.dimensions
        for name, value in (("deter", dims.deter), ("depth * 4", dims.depth * 4)):
            if value % self.blocks:
                raise UsageError(f"{name} must be a multiple of blocks={self.blocks}, got {value}")
        if dims.classes > 256:
            raise UsageError(f"classes must be at most 256, for replay keeps one byte of each, got {dims.classes}")
        if self.bins % 2 == 0:
            raise UsageError(f"bins must be odd, got {self.bins}")
        if self.return_norm_low >= self.return_norm_high:
            raise UsageError(f"return_norm_low must be below return_norm_high, got {self.return_norm_low}")
        recipes.check_imagination(self)
        recipes.check_windows(self, self.length + 1)
        recipes.ratio(self)


RULES = {
    "bins": (lambda x: x >= 3, "3 or more"),
    "discount_horizon": (lambda x: x > 1, "above 1"),
    "length": (lambda x: x >= 2, "2 or more: the last step has no return"),
    "imagine_last": (lambda x: x == 0 or x >= 2, "0 (all) or 2 or more: the last step has no return"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Networks and world model


def networks(spec: EnvSpec, config: DreamerV3Config, latent: latents.Kind) -> Networks:
    """The modules for one environment."""
    dims, dtype = config.dimensions, config.compute_dtype
    style = dict(norm=config.norm, activation=config.activation, dtype=dtype)
    entries = tuple(sorted(spec.obs.items()))
    encoder_units = config.encoder_units or (dims.units,) * 3
    encoder = codec.Encoder(entries, dims.depth, encoder_units, config.stem, squash=config.symlog_vectors, **style)
    rssm = RSSM(
        **dict(zip(("deter", "hidden", "stoch", "classes"), dims[:4], strict=True)),
        embed=dreamer.embed_size(encoder, spec),
        action=action_size(spec),
        blocks=config.blocks,
        prior_layers=config.prior_layers,
        posterior_layers=config.posterior_layers,
        cell=config.cell,
        outputs=latent.outputs,
        **style,
    )

    def head(outputs, layers, outscale):
        return Head(tuple(outputs.items()), (dims.units,) * layers, outscale, **style)

    actions = choice_outputs(spec) or {name: action_size(spec) for name in ("mean", "std")}
    return Networks(
        encoder=encoder,
        rssm=rssm,
        decoder=codec.Decoder(entries, dims.depth, encoder_units, config.blocks, config.stem, **style),
        reward=number_head(config.reward_head, config.bins, (dims.units,) * config.reward_layers, **style),
        cont=head({"logits": 1}, config.cont_layers, 1.0),
        actor=head(actions, config.actor_layers, 0.01),
        critic=number_head(config.critic_head, config.bins, (dims.units,) * config.critic_layers, **style),
    )


def feature(state: LatentState) -> Array:
    """[h, z], `[..., D + S K]`: what heads, actor and critic see."""
    stoch = state.stoch.reshape(*state.stoch.shape[:-2], -1)
    return jnp.concatenate([state.deter, stoch.astype(state.deter.dtype)], -1)


def decoder_input(state: LatentState) -> tuple[Array, Array]:
    """h and z, `[..., D]` and `[..., S, K]`: what the decoder sees."""
    return state.deter, state.stoch


def latent_kind(config: DreamerV3Config) -> latents.Kind:
    """What z is: categorical, drawn from a mix with the uniform distribution."""

    def draw(dist, key):
        return distributions.straight_through_sample(key, distributions.unimix_logits(dist.logits, config.unimix))

    return latents.categorical(config.dimensions.stoch, config.dimensions.classes, draw)


def assemble(
    spec: EnvSpec, config: DreamerV3Config, axis_name: str | None = None, equations: Equations | None = None
) -> Parts:
    """The modules for one environment, and the world model that they make."""

    def decode(params, state):
        outputs = call(nets.decoder, params["decoder"], *decoder_input(state))
        return {name: codec.mean(outputs[name], space, config.symlog_vectors) for name, space in spec.obs.items()}

    equations = equations or Equations()
    latent = equations.latent(config)
    nets = equations.networks(spec, config, latent)
    dreamer.check_networks(nets)
    reward = lambda outputs: equations.reward(outputs, config)
    model = dreamer.world_model(nets, latent, feature, decode, config.discount, reward)
    return Parts(spec, config, nets, latent, model, axis_name, equations)


def reward_dist(outputs: dict[str, Array], config: DreamerV3Config) -> Number:
    """Distribution of the reward, `[...]`, from the outputs of its head."""
    return number(outputs, config.reward_head)


def critic_dists(parts: Parts, critic_params: dict, *feats: Array) -> list[Number]:
    """Distributions of the return, `[...]` each, of the critic or its slow copy, in one pass over all features."""
    rows = jnp.concatenate([feat.reshape(-1, feat.shape[-1]) for feat in feats])
    ((name, outputs),) = call(parts.nets.critic, critic_params, rows).items()
    pieces = jnp.split(outputs, np.cumsum([math.prod(feat.shape[:-1]) for feat in feats])[:-1].tolist())
    shaped = [piece.reshape(*feat.shape[:-1], -1) for piece, feat in zip(pieces, feats, strict=True)]
    return [number({name: piece}, parts.config.critic_head) for piece in shaped]


def policy_dist(parts: Parts, params: dict, feat: Array):
    """Distribution of the action, `[..., A]`: one-hots, or an unbounded normal with a bounded mean."""
    outputs = call(parts.nets.actor, params["actor"], feat)
    discrete = distributions.choices(outputs, parts.config.actor_unimix)
    return discrete if discrete is not None else distributions.bounded_normal(outputs["mean"], outputs["std"])


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def kl_losses(posterior: latents.Latent, prior: latents.Latent, config: DreamerV3Config) -> dict[str, Array]:
    """The KL of latents `[T, B, S]` by what it trains, prior or posterior: {"dyn", "rep"} `[T, B]` (equation 5)."""
    dyn, rep = kl.balanced_kl(posterior.logits, prior.logits, config.free_nats, config.unimix)
    return {"dyn": dyn, "rep": rep}


def reconstruction_loss(output: Array, target: Array, space, config: DreamerV3Config) -> Array:
    """The decoder's loss on an entry of the observations, `[T, B]`: a squared error summed over the entry, without ½.

    Of images `[T, B, H, W, C]` the output is in [0, 1] and the target uint8; vectors go through symlog first.
    """
    if isinstance(space, Discrete):
        return optax.softmax_cross_entropy_with_integer_labels(output, target)
    if spaces.is_image(space):
        return jnp.sum((output - target.astype(jnp.float32) / 255) ** 2, (-3, -2, -1))
    error = (output - (symlog(target) if config.symlog_vectors else target)) ** 2
    return jnp.sum(error, -1) if space.shape else error


def world_model_losses(
    parts: Parts, params: dict, states: LatentState, step: TimeStep
) -> tuple[dict[str, Array], Metrics]:
    """Each term of the world model's loss, `[T, B]`, unscaled.

    Args:
      states: posterior states of the steps, `[T, B]`, with their gradients.
      step: the observations, rewards and flags to predict.

    Source: equations 4 and 5.
    """
    nets, config, equations = parts.nets, parts.config, parts.equations
    prior = parts.latent.dist(call(nets.rssm, params["rssm"], states.deter, method="prior"))
    feat = feature(states)
    reward = equations.reward(call(nets.reward, params["reward"], feat), config)
    losses = equations.kl(states.dist, prior, config) | {"reward": -reward.log_prob(step.reward)}
    losses |= dreamer.continue_loss(parts, params, feat, step)
    losses |= dreamer.decode_losses(parts, call(nets.decoder, params["decoder"], *decoder_input(states)), step)
    entropies = {"prior_entropy": prior, "posterior_entropy": states.dist}
    return losses, {name: jnp.mean(_entropy(dist, config)) for name, dist in entropies.items()}


def _entropy(dist: latents.Latent, config: DreamerV3Config) -> Array:
    """In nats, of all latents together, `[T, B]`; of categorical ones after the uniform mix."""
    if isinstance(dist, latents.Categorical):
        dist = distributions.OneHotCategorical(dist.logits, config.unimix)
    entropy = dist.entropy()
    return jnp.sum(entropy, tuple(range(2, entropy.ndim)))


def return_target(reward: Array, cont: Array, value: Array, config: DreamerV3Config) -> Array:
    """λ-returns R of the states 0 to H - 1, `[H, N]`, from what is predicted at 0 to H (equation 7).

    The discount is in `cont`; reward and continue of the start are not used.
    """
    return returns.lambda_returns(reward[1:], cont[1:], value[1:], config.lambda_)


def actor_objective(policy, action: Array, advantage: Array, config: DreamerV3Config) -> tuple[Array, Array]:
    """What the actor makes large at the states 0 to H - 1, `[H, N]`: log π(a) sg(A) + η H(π); and H(π) (equation 11).

    Args:
      policy: distribution at the H + 1 states, of which the last does not count; differentiated.
      action: `[H, N, A]`, drawn from it.
      advantage: (R - v) / S, `[H, N]`, without gradient.
    """
    log_prob, entropy = policy.log_prob(sg(with_last(action)))[:-1], policy.entropy()[:-1]
    return log_prob * advantage + config.entropy_scale * entropy, entropy


def imagination_losses(
    policy, action: Array, reward: Array, cont: Array, critic, slow_critic, scale_state, config, axis_name=None,
    batch_returns=None, equations=None,
):  # fmt: skip
    """Actor and critic losses on imagined trajectories, time-major, the start state first.

        Rᵢ = rᵢ₊₁ + cᵢ₊₁ [(1 - λ) vᵢ₊₁ + λ Rᵢ₊₁],   R_H = v_H,   wᵢ = Π_{j ≤ i} c_j
        L_actor = -wᵢ [log π(aᵢ) (Rᵢ - vᵢ) / S + η H(π)],   L_critic = -wᵢ [log p(Rᵢ) + log p(v'ᵢ)]

    Args:
      policy: distribution at the H + 1 states, `[H + 1, N]`; differentiated.
      action: `[H, N, A]`, drawn from it.
      reward, cont: predictions at the H + 1 states; `cont` contains the discount.
      critic, slow_critic: return distributions at the H + 1 states; `critic` is differentiated.
      scale_state: the return normalizer, updated before use.
      config: `DreamerV3Config`.
      axis_name: axis that the batch is spread over.
      batch_returns: of the whole batch, any shape, where this is a part of it; None: the returns here.
      equations: its `returns` and `actor` are used; None: the paper's.

    Returns:
      losses {"actor", "critic"} `[H, N]`, the returns `[H, N]`, the new normalizer, metrics.

    Source: equations 6 to 11. Unlike V2, the weight of the start includes its own predicted continue.
    """
    equations = equations or Equations()
    value = critic.mean()
    target = sg(equations.returns(reward, cont, value, config))
    rule = config.return_norm_rate, config.return_norm_low, config.return_norm_high
    whole = target if batch_returns is None else batch_returns
    scale_state = normalize.update(scale_state, whole, *rule, axis_name)
    scale = normalize.scale(scale_state, config.return_norm_limit)
    advantage = sg(target - value[:-1]) / scale
    weight = sg(returns.discount_weights(cont)[:-1])
    objective, entropy = equations.actor(policy, action, advantage, config)
    dreamer.check_shape("actor", jnp.shape(objective), advantage.shape)
    critic_target = with_last(target)
    critic_loss = -critic.log_prob(critic_target)[:-1]
    slow_loss = -critic.log_prob(sg(slow_critic.mean()))[:-1]
    losses = {"actor": -weight * objective, "critic": weight * (critic_loss + config.slow_critic_scale * slow_loss)}
    means = {"return_mean": target, "value_mean": value, "advantage_size": jnp.abs(advantage)}
    means |= {"imagined_reward": reward, "imagined_cont": cont, "policy_entropy": entropy}
    metrics = {name: jnp.mean(x) for name, x in means.items()} | {"return_scale": scale}
    return losses, target, scale_state, metrics


def scales(parts: Parts) -> dict[str, float]:
    """The factor of each loss term in the total."""
    terms = ("dyn", "rep", "reward", "cont", "actor", "critic", "replay_critic")
    return dreamer.decode_scales(parts) | {name: getattr(parts.config, f"{name}_scale") for name in terms}


def with_last(x: Array) -> Array:
    """Repeats the last entry of the time axis: distributions cover one step more than the losses."""
    return jnp.concatenate([x, x[-1:]])


def replay_critic_loss(critic, slow_critic, step: TimeStep, bootstrap: Array, config: DreamerV3Config) -> Array:
    """The critic's loss on replayed steps, `[T - 1, B]`, bootstrapped by imagined returns.

        Rₜ = rₜ₊₁ + γ (1 - termₜ₊₁) [(1 - λₜ₊₁) bₜ₊₁ + λₜ₊₁ Rₜ₊₁],   λₜ = λ (1 - lastₜ),   R_{T-1} = b_{T-1}

    Args:
      critic, slow_critic: return distributions at the T replayed states. Their gradient reaches the world model.
      bootstrap: b, `[T, B]`, returns of the imagined trajectories that start at these states.

    Source: Nature 2025, "Critic learning"; the code's `repl_loss`. A step that ends its episode carries no loss.
    """
    cont = config.discount * (1.0 - step.is_terminal)
    lambda_ = config.lambda_ * (1.0 - step.is_last)
    target = sg(returns.lambda_returns(step.reward[1:], cont[1:], bootstrap[1:], lambda_[1:]))
    loss = -critic.log_prob(with_last(target)) - config.slow_critic_scale * critic.log_prob(sg(slow_critic.mean()))
    return ((1.0 - step.is_last) * loss)[:-1]


class Equations(NamedTuple):
    """What research changes, each a function that another may stand in for, as in `Equations(kl=mine)`.

    What each takes and gives is said where it is defined, above; examples are in `docs/equations.md`.
    """

    latent: Callable = latent_kind  # (config) -> latents.Kind, z of shape [..., S, K]
    networks: Callable = networks  # (spec, config, latent) -> Networks; fields that it adds see features, too
    kl: Callable = kl_losses  # (posterior, prior, config) -> {name: [T, B]}
    reconstruction: Callable = reconstruction_loss  # (output, target, space, config) -> [T, B]
    reward: Callable = reward_dist  # (outputs of the head, config) -> distribution
    world_model: Callable = world_model_losses  # all terms of the world model; of names that are new, weighed 1
    returns: Callable = return_target  # (reward, cont, value, config) -> [H, N]
    actor: Callable = actor_objective  # (policy, action, advantage, config) -> [H, N] and entropies [H, N]
    behavior: Callable = imagination_losses  # the actor's and the critic's loss


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss and its update


def loss(
    parts: Parts, params: dict, stats: dict, keys: Array, start: LatentState, prev_action: Array, step: TimeStep,
    batch_returns: Array | None = None,
) -> tuple[Array, tuple]:  # fmt: skip
    """World model, imagination, actor and critic: everything that one gradient is taken of.

    Args:
      params: all modules, and the slow critic.
      stats: {"return_norm"}, the return normalizer before this update.
      keys: `[B]`; consumed.
      start: the state before the first step, `[B]`.
      prev_action: `[T, B, A]`, the action that led to each step.
      step: `[T, B]`.
      batch_returns: see `imagination_losses`.

    Returns:
      The scalar to minimize, and (losses, states, stats, metrics, returns): the unscaled terms, the posterior states
      `[T, B]`, the normalizer after this update, scalars to watch, and the imagined returns `[H, N]`.
    """
    nets, model, config = parts.nets, parts.model, parts.config
    length, batch = step.reward.shape
    key_observe, key_imagine = noise.split(keys, 2)

    # World model.
    embed = model.encode(params, step.obs)
    _, states = dreaming.observe(
        model, params, key_observe, start, prev_action, embed, step.is_first, remat=config.remat
    )
    losses, metrics = parts.equations.world_model(parts, params, states, step)

    # Imagination, from the last states of every sequence. Neither the model nor its states get gradients from it.
    last = config.imagine_last or length
    starts = sg(dreaming.last_steps(states, last))
    keys = noise.split(key_imagine, last).reshape(-1)
    frozen = sg(params)

    def policy(key, carry, state):
        return carry, policy_dist(parts, frozen, feature(state)).sample(seed=key)

    _, feat, action = dreaming.imagine(model, frozen, keys, starts, policy, config.horizon, emit=feature)
    feat = sg(feat)
    # Critics see imagined and replayed steps; the gradient of the latter shapes the world model's features.
    replayed, tail = jax.tree.map(lambda x: x[-last:], (feature(states), step))
    critic, replay_critic = critic_dists(parts, params["critic"], feat, replayed)
    slow_critic, replay_slow_critic = critic_dists(parts, frozen["slow_critic"], feat, sg(replayed))
    behavior, imagined_returns, return_norm, more = parts.equations.behavior(
        policy_dist(parts, params, feat),
        action,
        parts.equations.reward(call(nets.reward, frozen["reward"], feat), config).mean(),
        dreamer.discount_of(nets, frozen, feat, config.discount),
        critic,
        slow_critic,
        stats["return_norm"],
        config,
        parts.axis_name,
        batch_returns,
        parts.equations,
    )

    bootstrap = imagined_returns[0].reshape(last, batch)
    replay_loss = replay_critic_loss(replay_critic, replay_slow_critic, tail, bootstrap, config)

    losses = optim.all_terms(losses, behavior, {"replay_critic": replay_loss})
    total, means = optim.weighted_sum(losses, scales(parts))
    metrics |= more | means | {"loss": total}
    return total, (losses, states, {"return_norm": return_norm}, metrics, imagined_returns)


def optimizer(config: DreamerV3Config) -> optax.GradientTransformation:
    """Adaptive clipping -> LaProp with linear warm-up from 0; its gradients are already the mean over devices."""
    clip = optim.adaptive_grad_clip(config.grad_clip) if config.grad_clip else optax.identity()
    schedule = optim.warmup_schedule(config.learning_rate, config.warmup)
    return optim.flat(optax.chain(clip, optim.laprop(schedule, config.beta1, config.beta2, config.epsilon)))


def update(parts: Parts, state: AgentState, key: Array, trajectory: Trajectory) -> tuple[AgentState, Metrics, dict]:
    """One gradient step on `[1 + T, B]` records, the first of which only supplies carry and previous action.

    Returns:
      The new state, metrics, and the latents to write back: those of the trajectory with steps 1 to T refreshed.
    """
    config, before = parts.config, state.non_trainable
    step = jax.tree.map(lambda x: x[1:], trajectory.step)
    start = unpack_latent(parts, jax.tree.map(lambda x: x[0], trajectory.latent))
    keys = noise.row_keys(key, step.reward.shape[1], parts.axis_name)
    args = keys, start, trajectory.action[:-1], step
    batch, batch_returns = optim.Microbatches(args, (0, 0, 1, 1), config.grad_accum, aux_axes=(1, None)), None

    def objective(trained, *part):
        total, (_, states, stats, metrics, _) = loss(
            parts, trained["all"] | before, state.stats, *part, batch_returns=batch_returns
        )
        return total, (metrics, (states, stats))

    if config.grad_accum > 1:  # returns are normalized by those of the whole batch, which come first then
        batch_returns = batch.each(lambda *part: loss(parts, state.variables, state.stats, *part)[1][-1])
    chains = {"all": optimizer(config)}
    done = optim.descend(objective, chains, state.opt_state, {"all": state.params}, parts.axis_name, batch)
    params, (states, stats) = done.params["all"], done.aux
    slow_critic = optim.soft_update(params["critic"], before["slow_critic"], config.slow_critic_rate)
    latent = jax.tree.map(
        lambda old, new: jnp.concatenate([old[:1], new]), trajectory.latent, pack_latent(parts, states)
    )
    new = AgentState(params, done.opt_state, stats, state.step + 1, {"slow_critic": slow_critic})
    norms = {"grad_norm": done.grad_norm["all"], "update_norm": done.update_norm["all"]}
    return new, done.metrics | norms, latent


def pack_latent(parts: Parts, state: LatentState) -> dict[str, Array]:
    """What replay keeps of a state: `deter` `[..., D]`, and of z what its kind says: a byte of each latent."""
    return {"deter": sg(state.deter).astype(parts.config.latent_dtype), "stoch": parts.latent.pack(sg(state.stoch))}


def unpack_latent(parts: Parts, latent: dict[str, Array]) -> LatentState:
    """The state that `pack_latent` kept, its distribution unknown (zero)."""
    dtype = parts.config.compute_dtype
    dist = parts.model.init_state({}, latent["deter"].shape[0]).dist
    return LatentState(latent["deter"].astype(dtype), parts.latent.unpack(latent["stoch"]).astype(dtype), dist)


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def dreamer_v3(
    spec: EnvSpec, config: DreamerV3Config, axis_name: str | None = None, equations: Equations | None = None
) -> Agent:
    """The agent for one environment; for arguments and errors see `wmjax.agents`."""
    config.validate()
    spaces.check_spec(spec, None if config.stem == "flat" else lambda side: codec.image_stages(side) is not None)
    parts = assemble(spec, config, axis_name, equations)

    def init(key):
        params = dreamer.init_params(parts, feature, key, decoder_input)
        opt_state, stats = {"all": optimizer(config).init(params)}, {"return_norm": normalize.init()}
        return AgentState(params, opt_state, stats, jnp.int32(0), {"slow_critic": params["critic"]})

    def choose(params, key, state, *, explore):
        dist = policy_dist(parts, params, feature(state))
        # The paper samples in evaluation too.
        return dist.sample(seed=key) if explore or config.eval_action == "sample" else dist.mode()

    acting = dreaming.acting(parts.model, choose, action_size(spec), latent=functools.partial(pack_latent, parts))
    sampling = Sampling(config.length, context=1, online=config.online)
    recipe = recipes.by_ratio(acting.act, functools.partial(update, parts), sampling, config)
    return Agent(init, *acting, parts.model, recipe, functools.partial(dreamer.expected_return, parts, feature))
