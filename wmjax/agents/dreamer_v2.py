"""DreamerV2: a world model with categorical latents, straight-through gradients and KL balancing.

Paper: Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models" (arXiv 2010.02193, ICLR 2021).
Implemented as the authors' code of 2022 does it: layer-normed GRU, REINFORCE for discrete and dynamics backpropagation
for continuous actions, a critic with a slow target, Adam in TensorFlow's form with decoupled weight decay.

Departures: Discrete observations are one-hot; images of other sizes than 64 are taken (`nets.strided_codec`); the slow
critic starts as a copy of the critic (the code lets it start at random and copies after the first update);
`kl_balance = 0.5` is the paper's equation, where the code turns balancing off (`kl_mode="plain"`, `free_mode="step"`
here). Numbers that differ: `docs/papers/`.

Read from top to bottom: configuration, networks and world model (made in `nets.dreamer`), losses, update, agent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from wmjax import checks, dreaming, optim, recipes
from wmjax.nets import dreamer, spaces, strided_codec
from wmjax.nets.dreamer import Networks, Parts
from wmjax.nets.mlp import call
from wmjax.nets.rssm import LatentState, feature
from wmjax.nets.spaces import action_size, choice_counts, choice_outputs
from wmjax.ops import action_distributions, distributions, kl, latents, noise, returns
from wmjax.ops.distributions import Number, number
from wmjax.ops.symlog import REWARD_TRANSFORMS
from wmjax.types import Agent, AgentState, Array, EnvSpec, Metrics, Sampling, TimeStep, Trajectory, UsageError

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
    grad_accum: int = 1  # parts of a batch that its gradients are computed in, one after the other

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
    remat: bool = False  # recompute observed and imagined steps in the backward pass
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
        recipes.check_imagination(self)
        if self.prioritize_ends and not self.within_episode:
            raise UsageError("prioritize_ends is about the ends of episodes: it needs within_episode=True")
        recipes.check_bursts(self, self.length)


RULES = {"horizon": (lambda x: x >= 2, "2 or more: the actor does not use the last two states")}


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
# Networks and world model


def latent_kind(config: DreamerV2Config) -> latents.Kind:
    """What z is: categoricals, or normal latents, as `latent` of the configuration says."""
    if config.latent == "gaussian":
        return latents.gaussian(config.stoch, lambda std: 2 * jax.nn.sigmoid(std / 2) + 0.1)
    sample = functools.partial(latents.Categorical.sample, estimator=config.latent_estimator)
    return latents.categorical(config.stoch, config.classes, sample)


def networks(spec: EnvSpec, config: DreamerV2Config, latent: latents.Kind) -> Networks:
    """The modules for one environment."""
    actions = choice_outputs(spec) or {name: action_size(spec) for name in ("mean", "std")}
    return dreamer.dense_networks(spec, config, latent, actions, config.norm, config.activation)


def assemble(
    spec: EnvSpec,
    config: DreamerV2Config,
    axis_name: str | None = None,
    equations: Equations | None = None,
    draw: str = "sample",
) -> Parts:
    """The modules for one environment, and the world model that they make; of "mode", with the likeliest latents."""
    equations = equations or Equations()
    latent = equations.latent(config)
    if draw == "mode":
        latent = latent._replace(draw=lambda dist, key: dist.mode())
    return dreamer.dense_parts(spec, config, axis_name, equations, latent)


def reward_dist(outputs: dict[str, Array], config: DreamerV2Config) -> Number:
    """Distribution of the reward, `[...]`, from the outputs of its head."""
    return number(outputs, config.reward_head)


def policy_dist(parts: Parts, actor_params: dict, feat: Array):
    """Distribution of the action, `[..., A]`: one-hots with straight-through samples, or a truncated normal."""
    outputs = call(parts.nets.actor, actor_params, feat)
    discrete = distributions.choices(outputs)
    return discrete if discrete is not None else action_distributions.truncated_normal(outputs["mean"], outputs["std"])


def critic_dist(parts: Parts, critic_params: dict, feat: Array):
    """Distribution of the return, `[...]`, of the critic or its slow copy."""
    return number(call(parts.nets.critic, critic_params, feat), parts.config.critic_head)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def kl_loss(
    posterior: latents.Latent, prior: latents.Latent, config: DreamerV2Config, axis_name: str | None, mean: Array | None
) -> tuple[Array, Array]:
    """The balanced KL of latents `[T, B, S]` above the free nats, a scalar (algorithm 2); the KL, `[T, B]`, to watch.

    `axis_name` is the axis that the batch is spread over, and `mean` the mean KL of the batch that this is a part of.
    """
    how = dict(mode=config.kl_mode, balance=config.kl_balance, forward=config.kl_forward)
    free = dict(free_nats=config.free_nats, free_mode=config.free_mode)
    return kl.kl_loss(posterior, prior, **how, **free, axis_name=axis_name, mean=mean)


def world_model_losses(
    parts: Parts, params: dict, states: LatentState, step: TimeStep, batch_kl: Array | None = None
) -> tuple[dict[str, Array], Metrics]:
    """Each term of the world model's loss, unscaled: the KL a scalar, negative log-likelihoods `[T, B]`.

    Args:
      states: posterior states of the steps, `[T, B]`, with their gradients.
      step: the observations, rewards and flags to predict.
      parts, params: of the agent, and the parameters of its modules by name.
      batch_kl: the mean KL of the whole batch, where this is a part of it; see `mean` of `kl.kl_loss`.

    Returns:
      The terms, and scalars to watch, of which `kl` has to be one.

    Source: equation 2; every head passes gradients into the model. Log-likelihoods are those of normal distributions
    with deviation 1, their constants included.
    """
    nets, config, equations = parts.nets, parts.config, parts.equations
    prior = parts.latent.dist(call(nets.rssm, params["rssm"], states.deter, method="prior"))
    kl_term, kl_value = equations.kl(states.dist, prior, config, parts.axis_name, batch_kl)
    feat = feature(states)
    reward = equations.reward(call(nets.reward, params["reward"], feat), config)
    losses = {"kl": kl_term, "reward": -reward.log_prob(REWARD_TRANSFORMS[config.reward_transform](step.reward))}
    losses |= dreamer.continue_loss(parts, params, feat, step)
    losses |= dreamer.decode_losses(parts, call(nets.decoder, params["decoder"], feat), step)
    metrics = {
        "kl": kl_value.mean(),
        "prior_entropy": prior.entropy().sum(-1).mean(),
        "posterior_entropy": states.dist.entropy().sum(-1).mean(),
    }
    return losses, metrics


def scales(parts: Parts) -> dict[str, float]:
    """The factor of each term of the world model's loss."""
    config = parts.config
    factors = {"kl": config.kl_scale, "reward": config.reward_scale} | dreamer.decode_scales(parts)
    return factors | ({"cont": config.cont_scale} if config.use_continue else {})


class Imagined(NamedTuple):
    """Imagined trajectories, the start state first."""

    feat: Array  # [H + 1, N, F]
    action: Array  # [H, N, A], action k leads from state k to k + 1
    reward: Array  # [H + 1, N], of the state itself
    discount: Array  # [H + 1, N], of the state itself; at the start from the data
    value: Array  # [H + 1, N], of the slow critic


def imagine_behavior(
    parts: Parts, params: dict, actor_params: dict, keys: Array, start: LatentState, is_terminal: Array
) -> Imagined:
    """Follows the actor through imagination; differentiable in `actor_params` through actions and dynamics.

    Args:
      params: everything but the actor, the slow critic too; gets no gradient.
      keys: `[N]`, consumed.
      start: `[N]`.
      is_terminal: bool `[N]`, whether nothing follows the start.
    """
    nets, config, frozen = parts.nets, parts.config, sg(params)

    def policy(key, carry, state):
        # The actor is not trained to make its own inputs better: no gradient through them.
        return carry, policy_dist(parts, actor_params, sg(feature(state))).sample(seed=key)

    _, feat, action = dreaming.imagine(
        parts.model, frozen, keys, start, policy, config.horizon, emit=feature, remat=config.remat
    )
    discount = dreamer.discount_of(nets, frozen, feat, config.discount)
    if nets.cont is not None:
        discount = jnp.concatenate([config.discount * (1.0 - is_terminal)[None], discount[1:]])
    reward = parts.equations.reward(call(nets.reward, frozen["reward"], feat), config).mean()
    value = critic_dist(parts, frozen["slow_critic"], feat).mean()
    return Imagined(feat, action, reward, discount, value)


def targets(imagined: Imagined, config: DreamerV2Config) -> Array:
    """What the states 0 to H - 1 are worth, `[H, N]`, with the gradient of everything it is made of.

    Source: equation 4. Reward and discount are those of the same state, also at the start.
    """
    return returns.state_returns(imagined.reward, imagined.discount, imagined.value, config.lambda_, config.bootstrap)


def actor_objective(
    policy, action: Array, target: Array, value: Array, config: DreamerV2Config, actor_grad: str
) -> Array:
    """What the actor makes large at each state besides its entropy: J_k of `behavior_losses`, `[H - 1, N]`.

    Args:
      policy: distribution at the states 0 to H - 2; differentiated.
      action: `[H - 1, N, A]`, drawn from it.
      target, value: returns of the states that follow, and values of those before, `[H - 1, N]`.
      actor_grad: reinforce, dynamics or both.
    """
    if actor_grad == "dynamics":
        return target
    objective = policy.log_prob(sg(action)) * sg(target - value)
    return (
        objective
        if actor_grad == "reinforce"
        else (config.actor_grad_mix * target + (1 - config.actor_grad_mix) * objective)
    )


def behavior_losses(
    policy, critic, imagined: Imagined, config: DreamerV2Config, actor_grad: str, equations: Equations | None = None
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
      equations: its `returns` and `actor` are used; None: the paper's.

    Returns:
      {"actor": [H - 1, N], "critic": [H, N]} and metrics.

    Source: equations 5 and 6. The last two states are not used by the actor.
    """
    equations = equations or Equations()
    target, before = equations.returns(imagined, config), imagined.value[:-2]
    weight = sg(returns.discount_weights_before(imagined.discount))
    objective = equations.actor(policy, imagined.action[:-1], target[1:], before, config, actor_grad)
    entropy = policy.entropy()
    losses = {
        "actor": -weight[:-2] * (objective + config.entropy_scale * entropy),
        "critic": -weight[:-1] * critic.log_prob(sg(target)),
    }
    metrics = {
        "return_mean": target.mean(),
        "value_mean": imagined.value.mean(),
        "advantage_size": jnp.abs(target[1:] - before).mean(),
        "imagined_reward": imagined.reward.mean(),
        "imagined_cont": imagined.discount.mean() / config.discount,
        "policy_entropy": entropy.mean(),
    }
    return losses, metrics


class Equations(NamedTuple):
    """What research changes, each a function that another may stand in for, as in `Equations(kl=mine)`.

    What each takes and gives is said where it is defined, above; examples are in `docs/equations.md`.
    """

    latent: Callable = latent_kind  # (config) -> latents.Kind
    networks: Callable = networks  # (spec, config, latent) -> Networks; fields that it adds see features, too
    kl: Callable = kl_loss  # (posterior, prior, config, axis_name, mean) -> (scalar, [T, B])
    reconstruction: Callable = dreamer.log_likelihood_loss  # (output, target, space, config) -> [T, B]
    reward: Callable = reward_dist  # (outputs of the head, config) -> distribution
    world_model: Callable = world_model_losses  # all terms of the world model; of names that are new, weighed 1
    returns: Callable = targets  # (imagined, config) -> [H, N]
    actor: Callable = actor_objective  # (policy, action, target, value, config, actor_grad) -> [H - 1, N]
    behavior: Callable = behavior_losses  # the actor's and the critic's loss


# ---------------------------------------------------------------------------------------------------------------------
# Update


def world_model_loss(
    parts: Parts, params: dict, keys: Array, prev_action: Array, step: TimeStep, batch_kl: Array | None = None
) -> tuple[Array, tuple]:
    """Everything that the gradient of the world model is taken of.

    Args:
      keys: `[B]`; consumed.
      prev_action: `[T, B, A]`, the action that led to each step.
      step: `[T, B]`; sequences start from the zero state.
      batch_kl: see `world_model_losses`.

    Returns:
      The scalar to minimize, and (losses, states, metrics).
    """
    model, batch = parts.model, step.reward.shape[1]
    embed, start = model.encode(params, step.obs), model.init_state(params, batch)
    _, states = dreaming.observe(
        model, params, keys, start, prev_action, embed, step.is_first, remat=parts.config.remat
    )
    losses, metrics = parts.equations.world_model(parts, params, states, step, batch_kl)
    total, means = optim.weighted_sum(losses, scales(parts))
    return total, (losses, states, metrics | means | {"loss/model": total})


def behavior_loss(
    parts: Parts, params: dict, trained: dict, keys: Array, start: LatentState, is_terminal: Array
) -> tuple[Array, tuple]:
    """Everything that the gradients of actor and critic are taken of; each gets that of its own loss only.

    Args:
      params: the world model, already updated, and the slow critic.
      trained: {"actor", "critic"}.
      keys, start, is_terminal: see `imagine_behavior`.

    Returns:
      The scalar to minimize, and (losses, metrics).
    """
    actor_grad = actor_gradient(parts.spec, parts.config)
    # REINFORCE needs no gradient through the rollout: without it nothing of the rollout has to be stored.
    alone = actor_grad == "reinforce" and dreamer.are_papers(parts.equations, "returns", "actor", "behavior")
    acting = sg(trained["actor"]) if alone else trained["actor"]
    imagined = imagine_behavior(parts, params, acting, keys, start, is_terminal)
    feat = sg(imagined.feat)
    losses, metrics = parts.equations.behavior(
        policy_dist(parts, trained["actor"], feat[:-2]),
        critic_dist(parts, trained["critic"], feat[:-1]),
        imagined,
        parts.config,
        actor_grad,
        parts.equations,
    )
    total, means = optim.weighted_sum(losses, {"actor": 1.0, "critic": 1.0})
    return total, (losses, metrics | means)


def update(parts: Parts, state: AgentState, key: Array, trajectory: Trajectory) -> tuple[AgentState, Metrics, None]:
    """The world model first, then actor and critic in the updated model, then the slow critic.

    Every sequence `[T, B]` starts from the zero state without a previous action, wherever it was cut.
    """
    config, axis_name = parts.config, parts.axis_name
    length, rows = trajectory.step.reward.shape
    step = trajectory.step._replace(is_first=trajectory.step.is_first.at[0].set(True))
    prev_action = jnp.concatenate([jnp.zeros_like(trajectory.action[:1]), trajectory.action[:-1]])
    key_model, key_behavior = jax.random.split(key)
    chains, trained = optim.model_actor_critic(config), optim.apart(state.params)

    # World model.
    args = noise.row_keys(key_model, rows, axis_name), prev_action, step
    batch, batch_kl = optim.Microbatches(args, (0, 1, 1), config.grad_accum, aux_axes=1), None

    def model_objective(groups, *part):
        total, (_, states, metrics) = world_model_loss(parts, groups["model"], *part, batch_kl=batch_kl)
        return total, (metrics, states)

    own = not dreamer.are_papers(parts.equations, "kl")
    if config.grad_accum > 1 and (own or (config.free_nats and config.free_mode == "avg")):
        # Whether the KL counts is decided by its mean over the whole batch, which comes first then.
        batch_kl = batch.each(lambda *part: world_model_loss(parts, trained["model"], *part)[1][-1]["kl"]).mean()
    world = optim.descend(model_objective, chains, state.opt_state, {"model": trained.pop("model")}, axis_name, batch)

    # Actor and critic, in the new model, from the posterior states of the old one.
    last = config.imagine_last or length
    start, is_terminal = sg(dreaming.last_steps((world.aux, step.is_terminal), last))
    keys = noise.split(noise.row_keys(key_behavior, rows, axis_name), last).reshape(-1)

    def behavior_objective(trained, *part):
        params = world.params["model"] | state.non_trainable
        total, (_, metrics) = behavior_loss(parts, params, trained, *part)
        return total, (metrics, ())

    batch = optim.Microbatches((keys, start, is_terminal), (0, 0, 0), config.grad_accum)
    behavior = optim.descend(behavior_objective, chains, state.opt_state, trained, axis_name, batch)

    # The first move of the slow critic is a copy, whatever its rate.
    rate = jnp.where(state.step == 0, 1.0, config.slow_critic_rate)
    slow_critic = optim.soft_update(
        behavior.params["critic"], state.non_trainable["slow_critic"], rate, state.step, config.slow_critic_every
    )
    norms = {f"grad_norm/{name}": norm for name, norm in (world.grad_norm | behavior.grad_norm).items()}
    params, opt_state = optim.together(world.params | behavior.params), world.opt_state | behavior.opt_state
    new = AgentState(params, opt_state, state.stats, state.step + 1, {"slow_critic": slow_critic})
    return new, world.metrics | behavior.metrics | norms, None


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def dreamer_v2(
    spec: EnvSpec, config: DreamerV2Config, axis_name: str | None = None, equations: Equations | None = None
) -> Agent:
    """The agent for one environment; for arguments and errors see `wmjax.agents`."""
    config.validate()
    spaces.check_spec(spec, strided_codec.fits)
    _check_dynamics(config, actor_gradient(spec, config))
    if config.within_episode:
        checks.check_episodes(config.length, spec.max_episode_steps)
    parts, counts = assemble(spec, config, axis_name, equations), choice_counts(spec)

    def init(key):
        params = dreamer.init_params(parts, feature, key)
        groups = optim.apart(params)
        opt_state = {name: chain.init(groups[name]) for name, chain in optim.model_actor_critic(config).items()}
        return AgentState(params, opt_state, (), jnp.int32(0), {"slow_critic": params["critic"]})

    def choose(params, key, state, *, explore):
        dist = policy_dist(parts, params["actor"], feature(state))
        if not explore and config.eval_action == "mode":
            return dist.mode()
        key_policy, key_noise = noise.split(key, 2)
        action = dist.sample(seed=key_policy)
        if explore and config.exploration:
            action = action_distributions.explore(key_noise, action, config.exploration, counts)
        return action

    eval_model = assemble(spec, config, None, equations, config.eval_latent).model
    acting = dreaming.acting(parts.model, choose, action_size(spec), eval_model=eval_model)
    ends = config.prioritize_ends
    sampling = Sampling(config.length, over=config.over, within_episode=config.within_episode, prioritize_ends=ends)
    recipe = recipes.bursts(acting.act, functools.partial(update, parts), sampling, config)
    return Agent(init, *acting, parts.model, recipe, functools.partial(dreamer.expected_return, parts, feature))
