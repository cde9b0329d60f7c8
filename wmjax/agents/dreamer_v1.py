"""DreamerV1: a world model with Gaussian latents, and an actor that is trained by backpropagation through it.

Paper: Hafner, Lillicrap, Ba, Norouzi, "Dream to Control: Learning Behaviors by Latent Imagination" (arXiv 1912.01603,
ICLR 2020). Implemented as the authors' code of 2021 does it: Keras' GRU, tanh-normal actor, free nats on the mean of a
batch, Adam in TensorFlow's form. One difference to its successors: world model, actor and critic take their gradients
from the same weights.

Departures: noise is independent between the rows of a batch, and the mode of the actor is chosen for each row (the code
shares both by mistake); starts of imagination at terminal steps weigh nothing, where the code drops the last step of
every sequence; windows end at the last step of an episode too; vector observations and images of other sizes than 64
are taken, as in DreamerV2 (`nets.strided_codec`). Numbers that differ: `docs/papers/`.

Read from top to bottom: configuration, networks and world model (made in `nets.dreamer`), losses, update, agent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import checks, dreaming, optim, recipes
from wmjax.nets import dreamer, spaces, strided_codec
from wmjax.nets.dreamer import Networks, Parts
from wmjax.nets.mlp import call
from wmjax.nets.rssm import LatentState, feature
from wmjax.nets.spaces import action_size, choice_counts, choice_outputs
from wmjax.ops import action_distributions, distributions, kl, latents, noise, returns
from wmjax.ops.distributions import Number, number
from wmjax.ops.masks import masked_mean
from wmjax.ops.symlog import REWARD_TRANSFORMS
from wmjax.types import Agent, AgentState, Array, EnvSpec, Metrics, Sampling, TimeStep, Trajectory, UsageError

sg = jax.lax.stop_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class DreamerV1Config:
    """Hyperparameters; the defaults are those of the released code for the DeepMind Control Suite."""

    # Networks (appendix A).
    deter: int = 200  # size of the recurrent state
    hidden: int = 200  # width of the layers of the RSSM
    stoch: int = 30  # latents
    min_std: float = 0.1  # of a latent
    depth: int = 32  # channels of the first convolution
    embed: int | None = None  # size of a linear layer after the convolutions; None: no layer
    encoder_padding: Literal["VALID", "SAME"] | int = "VALID"  # of the convolutions of the encoder
    units: int = 400  # 300 in the paper
    vector_layers: int = 4  # of encoder and decoder, for observations that are no images
    reward_layers: int = 2  # hidden layers of the reward head
    cont_layers: int = 3  # hidden layers of the continue head
    actor_layers: int = 4  # hidden layers of the actor
    critic_layers: int = 3  # hidden layers of the critic
    cell: Literal["gru", "layer_norm_gru"] = "gru"  # the recurrent cell
    input_layer: bool = True  # between [z, a] and the GRU
    activation: Literal["elu", "relu", "silu"] = "elu"  # of the dense layers
    conv_activation: Literal["elu", "relu", "silu"] = "relu"  # of the convolutions

    # World model loss (equation 10).
    free_nats: float = 3.0  # of the KL's mean over a batch
    use_continue: bool = False  # predict when episodes end, as the discount
    reward_transform: Literal["identity", "tanh", "symlog"] = "identity"  # of the reward that is learned
    kl_scale: float = 1.0  # weight of the KL in the loss
    image_scale: float = 1.0  # weight of images in the loss
    vector_scale: float = 1.0  # weight of vectors in the loss
    reward_scale: float = 1.0  # weight of the reward in the loss
    cont_scale: float = 10.0  # weight of the continue head in the loss

    # Actor and critic (equations 6 to 8).
    horizon: int = 15  # imagined steps
    imagine_last: int = 0  # imagine from this many last steps of each sequence; 0: from all
    discount: float = 0.99  # of rewards, per agent step
    lambda_: float = 0.95  # of the lambda-returns
    bootstrap: bool = True  # end returns with the value of the last state; False: with its reward
    entropy_scale: float = 0.0  # weight of the actor's entropy
    entropy_half_life: int | None = None  # agent steps in which that weight halves; None: it does not
    exploration: float = 0.3  # deviation of the noise, or share of random actions, while collecting
    exploration_half_life: int | None = None  # agent steps in which it halves (the code); None: it does not
    exploration_updates: int | None = None  # updates in which it falls evenly to `exploration_min` (the paper)
    exploration_min: float = 0.0  # least exploration, however long the run

    # Optimizers: world model, actor, critic.
    model_lr: float = 6e-4  # learning rate of the world model
    actor_lr: float = 8e-5  # learning rate of the actor
    actor_lr_half_life: int | None = None  # agent steps in which it halves; None: it does not
    critic_lr: float = 8e-5  # learning rate of the critic
    epsilon: float = 1e-7  # of Adam
    grad_clip: float = 100.0  # norm of all gradients of an optimizer; 0 turns it off
    weight_decay: float = 0.0  # of every weight, not scaled by the learning rate
    grad_accum: int = 1  # parts of a batch that its gradient is computed in, one after the other

    # Data.
    batch_size: int = 50  # sequences of an update
    length: int = 50  # trained steps of a sequence; one more supplies the action before them
    within_episode: bool = False  # sequences do not cross the end of an episode
    over: Literal["steps", "episodes"] = "steps"  # all sequences are equally likely; or all episodes, then those of one
    num_envs: int = 1  # environments that are stepped at once
    replay_capacity: int = 1_000_000  # agent steps that replay holds, over all environments
    prefill: int = 2500  # agent steps by random actions: 5000 frames
    pretrain: int = 100  # updates on these
    train_every: int = 500  # agent steps of all environments between bursts of updates: 1000 frames
    train_steps: int = 100  # updates of a burst

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of networks; parameters and losses stay float32
    remat: bool = False  # recompute observed and imagined steps in the backward pass
    eval_action: Literal["sample", "mode"] = "mode"  # how actions come from the policy when it is evaluated

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range or contradicts another."""
        checks.check_ranges(self, RULES)
        recipes.check_imagination(self)
        if self.exploration_min > self.exploration:
            raise UsageError(
                f"exploration_min must be at most exploration={self.exploration}, got {self.exploration_min}"
            )
        if self.exploration_half_life is not None and self.exploration_updates is not None:
            raise UsageError(
                f"exploration_half_life and exploration_updates are two schedules: one of them must be None, got "
                f"{self.exploration_half_life} and {self.exploration_updates}"
            )
        recipes.check_bursts(self, self.length + 1)


RULES = {"horizon": (lambda x: x >= 2, "2 or more: the last state has no return")}


# ---------------------------------------------------------------------------------------------------------------------
# Networks and world model


def latent_kind(config: DreamerV1Config) -> latents.Kind:
    """What z is: normal, with deviations above `min_std`."""
    return latents.gaussian(config.stoch, lambda std: jax.nn.softplus(std) + config.min_std)


def networks(spec: EnvSpec, config: DreamerV1Config, latent: latents.Kind) -> Networks:
    """The modules for one environment."""
    # One layer for mean and deviation together, as in the code: its initial weights depend on its width.
    actions = choice_outputs(spec) or {"mean_std": 2 * action_size(spec)}
    return dreamer.dense_networks(spec, config, latent, actions, "none", config.conv_activation)


def assemble(
    spec: EnvSpec, config: DreamerV1Config, axis_name: str | None = None, equations: Equations | None = None
) -> Parts:
    """The modules for one environment, and the world model that they make."""
    return dreamer.dense_parts(spec, config, axis_name, equations or Equations())


def reward_dist(outputs: dict[str, Array], config: DreamerV1Config) -> Number:
    """Distribution of the reward, `[...]`, from the outputs of its head: normal, with deviation 1."""
    del config
    return number(outputs)


def policy_dist(parts: Parts, actor_params: dict, feat: Array):
    """Distribution of the action, `[..., A]`: one-hots with straight-through samples, or a tanh-normal."""
    outputs = call(parts.nets.actor, actor_params, feat)
    discrete = distributions.choices(outputs)
    if discrete is not None:
        return discrete
    return action_distributions.tanh_normal(*jnp.split(outputs["mean_std"], 2, -1))


def policy_entropy(policy, keys: Array) -> Array:
    """`[T, N]` of a policy over `[T, N]` states; that of a tanh-normal is estimated from one sample for each."""
    if isinstance(policy, action_distributions.TanhNormal):
        return policy.entropy(noise.split(keys, policy.mean.shape[0]), 1)
    return policy.entropy()


# ---------------------------------------------------------------------------------------------------------------------
# Losses


class Whole(NamedTuple):
    """Of the whole batch, what the losses on a part of it need."""

    kl: Array  # mean, which the free nats are held against
    counts: Array  # mean of `start_counts`


def kl_loss(
    posterior: latents.Latent, prior: latents.Latent, config: DreamerV1Config, axis_name: str | None, mean: Array | None
) -> tuple[Array, Array]:
    """The KL of latents `[T, B, Z]` above the free nats, a scalar; and the KL itself, `[T, B]`, to watch.

    `axis_name` is the axis that the batch is spread over, and `mean` the mean KL of the batch that this is a part of.
    """
    free = dict(free_nats=config.free_nats, free_mode="avg")
    return kl.kl_loss(posterior, prior, mode="plain", **free, axis_name=axis_name, mean=mean)


def world_model_losses(
    parts: Parts, params: dict, states: LatentState, step: TimeStep, whole: Whole | None = None
) -> tuple[dict[str, Array], Metrics]:
    """Each term of the world model's loss, unscaled: the KL a scalar, negative log-likelihoods `[T, B]`.

    Args:
      states: posterior states of the steps, `[T, B]`, with their gradients.
      step: the observations, rewards and flags to predict.
      parts, params: of the agent, and the parameters of its modules by name.
      whole: of the batch that this is a part of; None: this is all of it.

    Returns:
      The terms, and scalars to watch, of which `kl` has to be one.

    Source: equation 10. Log-likelihoods are those of normal distributions with deviation 1, constants included.
    """
    nets, config, equations = parts.nets, parts.config, parts.equations
    prior = parts.latent.dist(call(nets.rssm, params["rssm"], states.deter, method="prior"))
    kl_term, kl_value = equations.kl(states.dist, prior, config, parts.axis_name, whole and whole.kl)
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
    """The factor of each loss term in the total; actor and critic have optimizers of their own."""
    config = parts.config
    factors = {"kl": config.kl_scale, "reward": config.reward_scale, "actor": 1.0, "critic": 1.0}
    return factors | dreamer.decode_scales(parts) | ({"cont": config.cont_scale} if config.use_continue else {})


class Imagined(NamedTuple):
    """Imagined trajectories, without the start state."""

    feat: Array  # [H, N, F]
    action: Array  # [H, N, A], action k leads to state k
    reward: Array  # [H, N], of the state itself
    discount: Array  # [H, N], of the state itself
    value: Array  # [H, N]


def imagine_behavior(parts: Parts, params: dict, keys: Array, start: LatentState) -> Imagined:
    """Follows the actor through imagination; differentiable in the actor alone, through actions and dynamics.

    Args:
      keys: `[N]`, consumed.
      start: `[N]`.
    """
    nets, config, frozen = parts.nets, parts.config, sg(params)

    def policy(key, carry, state):
        # The actor is not trained to make its own inputs better: no gradient through them.
        return carry, policy_dist(parts, params["actor"], sg(feature(state))).sample(seed=key)

    _, feat, action = dreaming.imagine(
        parts.model, frozen, keys, start, policy, config.horizon, emit=feature, remat=config.remat
    )
    feat = feat[1:]
    return Imagined(
        feat,
        action,
        parts.equations.reward(call(nets.reward, frozen["reward"], feat), config).mean(),
        dreamer.discount_of(nets, frozen, feat, config.discount),
        number(call(nets.critic, frozen["critic"], feat)).mean(),
    )


def targets(imagined: Imagined, config: DreamerV1Config) -> Array:
    """What the states 1 to H - 1 are worth, `[H - 1, N]`, with the gradient of all it is made of (equation 6)."""
    return returns.state_returns(imagined.reward, imagined.discount, imagined.value, config.lambda_, config.bootstrap)


def actor_objective(target: Array, entropy: Array, config: DreamerV1Config) -> Array:
    """What the actor makes large at each state, `[H - 1, N]`: V + η H(π) (equation 7)."""
    return target + config.entropy_scale * entropy if config.entropy_scale else target


def behavior_losses(
    critic,
    entropy: Array,
    imagined: Imagined,
    counts: Array,
    config: DreamerV1Config,
    axis_name: str | None = None,
    whole: Whole | None = None,
    equations: Equations | None = None,
) -> tuple[dict[str, Array], Metrics]:
    """Actor and critic losses on imagined trajectories, scalars.

        L_actor = -mean w_k [V_k + η H(π)],   L_critic = -mean w_k log p(sg(V_k)),   k = 1 .. H - 1

    with w_k = Π_{j < k} γ_j, so that w_1 = 1.

    Args:
      critic: return distribution at the imagined states 1 to H - 1, without gradient into them; differentiated.
      entropy: of the policy at these states (or at fewer, if η is 0), times the part of η that is left.
      imagined: from `imagine_behavior`.
      counts: `[N]`, 0 for starts that do not count, else 1.
      axis_name: axis that the batch is spread over.
      whole: see `world_model_losses`.
      equations: its `returns` and `actor` are used; None: the paper's.

    Source: equations 7 and 8. The actor's gradient is that of the returns, through values, rewards and dynamics.
    """
    equations = equations or Equations()
    target = equations.returns(imagined, config)
    weight = sg(returns.discount_weights_before(imagined.discount))[:-1]
    objective = equations.actor(target, entropy, config)
    mean = lambda x: masked_mean(x, counts, axis_name, whole and whole.counts)
    losses = {"actor": mean(-weight * objective), "critic": mean(-weight * critic.log_prob(sg(target)))}
    metrics = {
        "return_mean": target.mean(),
        "value_mean": imagined.value.mean(),
        "imagined_reward": imagined.reward.mean(),
        "imagined_cont": imagined.discount.mean() / config.discount,
    }
    return losses, metrics


def start_counts(step: TimeStep, config: DreamerV1Config) -> Array:
    """Which steps imagination may start from, float32 `[T, B]`: nothing follows a terminal one."""
    return 1.0 - step.is_terminal if config.use_continue else jnp.ones(step.is_terminal.shape)


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
    returns: Callable = targets  # (imagined, config) -> [H - 1, N]
    actor: Callable = actor_objective  # (target, entropy, config) -> [H - 1, N]
    behavior: Callable = behavior_losses  # the actor's and the critic's loss


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss and its update


def loss(
    parts: Parts,
    params: dict,
    keys: Array,
    prev_action: Array,
    step: TimeStep,
    whole: Whole | None = None,
    entropy_left: Array | float = 1.0,
) -> tuple[Array, tuple]:
    """World model, actor and critic: the sum of three losses, each of which reaches its own parameters only.

    Args:
      keys: `[B]`; consumed.
      prev_action: `[T, B, A]`, the action that led to each step.
      step: `[T, B]`; sequences start from the zero state.
      whole: see `world_model_losses`.
      entropy_left: part of `entropy_scale` that is left, a scalar.

    Returns:
      The scalar to minimize, and (losses, states, imagined, metrics).
    """
    nets, model, config = parts.nets, parts.model, parts.config
    length, batch = step.reward.shape
    key_observe, key_imagine, key_entropy = noise.split(keys, 3)

    # World model.
    embed, start = model.encode(params, step.obs), model.init_state(params, batch)
    _, states = dreaming.observe(
        model, params, key_observe, start, prev_action, embed, step.is_first, remat=config.remat
    )
    losses, metrics = parts.equations.world_model(parts, params, states, step, whole)

    # Imagination, from the last states of every sequence. The model gets no gradient from it.
    last = config.imagine_last or length
    start = sg(dreaming.last_steps(states, last))
    imagined = imagine_behavior(parts, params, noise.split(key_imagine, last).reshape(-1), start)

    # Actor and critic. A policy's entropy costs another pass, so it is only watched at the first imagined state.
    feat = sg(imagined.feat[:-1])
    everywhere = config.entropy_scale or not dreamer.are_papers(parts.equations, "actor", "behavior")
    policy = policy_dist(parts, params["actor"], feat if everywhere else feat[:1])
    entropy = policy_entropy(policy, noise.split(key_entropy, last).reshape(-1))
    behavior, more = parts.equations.behavior(
        number(call(nets.critic, params["critic"], feat)),
        entropy_left * entropy,
        imagined,
        dreaming.last_steps(start_counts(step, config), last),
        config,
        parts.axis_name,
        whole,
        parts.equations,
    )
    losses = optim.all_terms(losses, behavior)
    total, means = optim.weighted_sum(losses, scales(parts))
    metrics |= more | means | {"loss/model": total - means["loss/actor"] - means["loss/critic"]}
    return total, (losses, states, imagined, metrics | {"policy_entropy": entropy.mean()})


def part_left(config: DreamerV1Config, updates: Array, half_life: int | None) -> Array | float:
    """Which part is left, after so many updates, of what halves in so many agent steps, a float32 scalar."""
    if half_life is None:
        return 1.0
    bursts = jnp.maximum(updates - config.pretrain, 0) / config.train_steps
    return 0.5 ** ((config.prefill + bursts * config.train_every) / half_life)


def exploration_amount(config: DreamerV1Config, updates: Array) -> Array:
    """How much to explore after so many updates, a float32 scalar.

    It halves every `exploration_half_life` steps, or falls evenly in `exploration_updates`, down to `exploration_min`.
    """
    amount = jnp.float32(config.exploration)
    if config.exploration_updates is not None:
        left = 1 - jnp.minimum(updates / config.exploration_updates, 1.0)
        return config.exploration_min + (amount - config.exploration_min) * left
    return jnp.maximum(config.exploration_min, amount * part_left(config, updates, config.exploration_half_life))


def optimizers(config: DreamerV1Config) -> dict[str, optax.GradientTransformation]:
    """Those of the world model, the actor and the critic.

    Gradients through one-hot actions fade as the model gets sharper, but Adam's steps are as long as before and follow
    what is left, the noise: a rate that falls keeps what the actor has learned.
    """
    rate = lambda count: config.actor_lr * part_left(config, count, config.actor_lr_half_life)
    return optim.model_actor_critic(config, rate)


def update(parts: Parts, state: AgentState, key: Array, trajectory: Trajectory) -> tuple[AgentState, Metrics, None]:
    """One step of all three optimizers, by gradients of the same weights.

    The batch is `[1 + T, B]`: the first record only supplies the action before the second, and every sequence starts
    from the zero state, wherever it was cut.
    """
    config, step = parts.config, jax.tree.map(lambda x: x[1:], trajectory.step)
    keys = noise.row_keys(key, step.reward.shape[1], parts.axis_name)
    batch, whole = optim.Microbatches((keys, trajectory.action[:-1], step), (0, 1, 1), config.grad_accum), None
    left = part_left(config, state.step, config.entropy_half_life)

    def objective(groups, *part):
        total, (_, _, _, metrics) = loss(parts, optim.together(groups), *part, whole=whole, entropy_left=left)
        return total, (metrics, ())

    if config.grad_accum > 1:
        mean_kl = batch.each(lambda *part: loss(parts, state.params, *part)[1][-1]["kl"]).mean()
        last = config.imagine_last or len(step.reward)
        whole = Whole(mean_kl, start_counts(step, config)[-last:].mean())
    chains, groups = optimizers(config), optim.apart(state.params)
    done = optim.descend(objective, chains, state.opt_state, groups, parts.axis_name, batch)
    metrics = done.metrics | {f"grad_norm/{name}": norm for name, norm in done.grad_norm.items()}
    amount = exploration_amount(config, state.step + 1)
    params = optim.together(done.params)
    return AgentState(params, done.opt_state, state.stats, state.step + 1, {"exploration": amount}), metrics, None


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def dreamer_v1(
    spec: EnvSpec, config: DreamerV1Config, axis_name: str | None = None, equations: Equations | None = None
) -> Agent:
    """The agent for one environment; for arguments and errors see `wmjax.agents`."""
    config.validate()
    spaces.check_spec(spec, strided_codec.fits)
    if config.within_episode:
        checks.check_episodes(config.length, spec.max_episode_steps)
    parts, counts = assemble(spec, config, axis_name, equations), choice_counts(spec)

    def init(key):
        params = dreamer.init_params(parts, feature, key)
        groups, amount = optim.apart(params), exploration_amount(config, jnp.int32(0))
        opt_state = {name: chain.init(groups[name]) for name, chain in optimizers(config).items()}
        return AgentState(params, opt_state, (), jnp.int32(0), {"exploration": amount})

    def choose(params, key, state, *, explore):
        dist = policy_dist(parts, params["actor"], feature(state))
        key_policy, key_noise = noise.split(key, 2)
        if not explore and config.eval_action == "mode":
            return dist.mode(key_policy) if counts is None else dist.mode()
        action = dist.sample(seed=key_policy)
        if explore:
            action = action_distributions.explore(key_noise, action, params["exploration"], counts)
        return action

    acting = dreaming.acting(parts.model, choose, action_size(spec))
    sampling = Sampling(config.length, context=1, over=config.over, within_episode=config.within_episode)
    recipe = recipes.bursts(acting.act, functools.partial(update, parts), sampling, config)
    return Agent(init, *acting, parts.model, recipe, functools.partial(dreamer.expected_return, parts, feature))
