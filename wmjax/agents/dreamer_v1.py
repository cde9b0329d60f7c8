"""DreamerV1: a world model with Gaussian latents, and an actor that is trained by backpropagation through it.

Paper: Hafner, Lillicrap, Ba, Norouzi, "Dream to Control: Learning Behaviors by Latent Imagination" (arXiv 1912.01603,
ICLR 2020). Implemented as the authors' code of 2021 does it: Keras' GRU, tanh-normal actor, free nats on the mean of a
batch, Adam in TensorFlow's form. One difference to its successors: world model, actor and critic take their gradients
from the same weights.

Departures: noise is independent between the rows of a batch, and the mode of the actor is chosen for each row (the code
shares both by mistake); starts of imagination at terminal steps weigh nothing, where the code drops the last step of
every sequence; windows end at the last step of an episode too; vector observations and images of other sizes than 64
are taken, as in DreamerV2 (`nets.strided_codec`). Numbers that differ: `docs/papers.md`.

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
from wmjax.ops.masks import masked_mean
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
    exploration: float = 0.3  # deviation of the noise, or share of random actions, while collecting
    exploration_half_life: int | None = None  # agent steps in which it halves (the code); None: it does not
    exploration_updates: int | None = None  # updates in which it falls evenly to `exploration_min` (the paper)
    exploration_min: float = 0.0  # least exploration, however long the run

    # Optimizers: world model, actor, critic.
    model_lr: float = 6e-4  # learning rate of the world model
    actor_lr: float = 8e-5  # learning rate of the actor
    critic_lr: float = 8e-5  # learning rate of the critic
    epsilon: float = 1e-7  # of Adam
    grad_clip: float = 100.0  # norm of all gradients of an optimizer; 0 turns it off
    weight_decay: float = 0.0  # of every weight, not scaled by the learning rate
    grad_accum: int = 1  # updates whose gradients make one step

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
    remat: bool = False  # recompute the RSSM step in the backward pass
    eval_action: Literal["sample", "mode"] = "mode"  # how actions come from the policy when it is evaluated

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range or contradicts another."""
        checks.check_ranges(self, RULES)
        if not self.bootstrap and self.lambda_ != 1:
            raise UsageError(
                f"bootstrap=False sums rewards without values, which lambda_ would mix in: lambda_ must be 1, "
                f"got {self.lambda_}"
            )
        if self.exploration_min > self.exploration:
            raise UsageError(
                f"exploration_min must be at most exploration={self.exploration}, got {self.exploration_min}"
            )
        if self.exploration_half_life is not None and self.exploration_updates is not None:
            raise UsageError(
                f"exploration_half_life and exploration_updates are two schedules: one of them must be None, got "
                f"{self.exploration_half_life} and {self.exploration_updates}"
            )
        if self.imagine_last > self.length:
            raise UsageError(f"imagine_last must be in [0, length={self.length}], got {self.imagine_last}")
        recipes.check_bursts(
            self.num_envs, self.prefill, self.pretrain, self.train_every, self.batch_size, self.replay_capacity,
            self.length + 1,
        )  # fmt: skip


RULES = (
    checks.rules(
        checks.POSITIVE,
        "deter hidden stoch min_std depth embed units vector_layers exploration_half_life exploration_updates model_lr "
        "actor_lr critic_lr epsilon grad_accum batch_size length num_envs replay_capacity train_every train_steps",
    )
    | checks.rules(
        checks.NOT_NEGATIVE,
        "reward_layers cont_layers actor_layers critic_layers free_nats kl_scale image_scale vector_scale reward_scale "
        "cont_scale imagine_last entropy_scale exploration exploration_min grad_clip prefill pretrain encoder_padding",
    )
    | checks.rules(checks.FRACTION, "discount lambda_")
    | checks.rules(checks.BELOW_ONE, "weight_decay")
    | {"horizon": (lambda x: x >= 2, "2 or more: the last state has no return")}
)


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


def networks(spec: EnvSpec, config: DreamerV1Config) -> Networks:
    """The modules for one environment. `DenseRSSM.embed` follows from the encoder's output."""
    style = dict(activation=config.activation, dtype=config.compute_dtype)
    coder = dict(
        spaces=tuple(sorted(spec.obs.items())), depth=config.depth, units=(config.units,) * config.vector_layers,
        conv_activation=config.conv_activation, **style,
    )  # fmt: skip
    encoder = strided_codec.StridedEncoder(padding=config.encoder_padding, embed=config.embed, **coder)
    embed = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), zero_obs(spec, (1,)))[0]).shape[-1]

    def head(outputs, layers):
        return Head(tuple(outputs.items()), (config.units,) * layers, norm="none", init_kind="glorot", **style)

    # One layer for mean and deviation together, as in the code: its initial weights depend on its width.
    actions = choice_outputs(spec) or {"mean_std": 2 * action_size(spec)}
    return Networks(
        encoder=encoder,
        rssm=DenseRSSM(
            config.deter, config.hidden, 2 * config.stoch, embed, config.cell, config.input_layer, **style
        ),
        decoder=strided_codec.StridedDecoder(**coder),
        reward=head({"mean": 1}, config.reward_layers),
        cont=head({"logits": 1}, config.cont_layers) if config.use_continue else None,
        actor=head(actions, config.actor_layers),
        critic=head({"mean": 1}, config.critic_layers),
    )  # fmt: skip


def init_params(nets: Networks, spec: EnvSpec, config: DreamerV1Config, key: Array) -> dict:
    """Parameters of all modules."""
    state = zero_state(config, 1)
    inputs = {name: (feature(state),) for name in Networks._fields}
    inputs["encoder"] = (zero_obs(spec, (1,)),)
    inputs["rssm"] = (state.deter, state.stoch, jnp.zeros((1, action_size(spec))), jnp.zeros((1, nets.rssm.embed)))
    return init_modules(nets._asdict(), key, inputs)


# ---------------------------------------------------------------------------------------------------------------------
# World model


def latent_dist(raw: Array, config: DreamerV1Config) -> latents.Gaussian:
    """The distribution of z from the network's raw numbers."""
    mean, std = jnp.split(raw, 2, -1)
    return latents.Gaussian(mean, jax.nn.softplus(std) + config.min_std)


def zero_state(config: DreamerV1Config, batch_size: int) -> LatentState:
    """The state before the first observation, `[B, ...]`."""
    zeros = lambda size, dtype: jnp.zeros((batch_size, size), dtype)
    dist = latents.Gaussian(zeros(config.stoch, "float32"), zeros(config.stoch, "float32"))
    return LatentState(zeros(config.deter, config.compute_dtype), zeros(config.stoch, config.compute_dtype), dist)


def world_model(nets: Networks, spec: EnvSpec, config: DreamerV1Config) -> WorldModel:
    """The learned environment; `State` is `LatentState`."""

    def init_state(params, batch_size):
        del params
        return zero_state(config, batch_size)

    def encode(params, obs):
        return call(nets.rssm, params["rssm"], call(nets.encoder, params["encoder"], obs), method="project")

    def draw(key, deter, raw):
        dist = latent_dist(raw, config)
        return LatentState(deter, dist.sample(key).astype(deter.dtype), dist)

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
        return reward_dist(nets, params, feat).mean(), cont

    def decode(params, state):
        outputs = call(nets.decoder, params["decoder"], feature(state))
        return {name: strided_codec.mean(outputs[name], space) for name, space in spec.obs.items()}

    return WorldModel(init_state, encode, observe, imagine, predict, decode)


def reward_dist(nets: Networks, params: dict, feat: Array) -> distributions.UnitNormal:
    """Distribution of the (transformed) reward, `[...]`, from features `[..., Z + D]`."""
    return distributions.UnitNormal(call(nets.reward, params["reward"], feat)["mean"][..., 0])


def discount_of(nets: Networks, params: dict, feat: Array, config: DreamerV1Config) -> Array:
    """P(not terminal) times the discount, `[...]`; the discount alone without `use_continue`."""
    if nets.cont is None:
        return jnp.full(feat.shape[:-1], config.discount)
    return jax.nn.sigmoid(call(nets.cont, params["cont"], feat)["logits"][..., 0])


def critic_dist(nets: Networks, critic_params: dict, feat: Array) -> distributions.UnitNormal:
    """Distribution of the return, `[...]`."""
    return distributions.UnitNormal(call(nets.critic, critic_params, feat)["mean"][..., 0])


def policy_dist(nets: Networks, actor_params: dict, feat: Array):
    """Distribution of the action, `[..., A]`: one-hots with straight-through samples, or a tanh-normal."""
    outputs = call(nets.actor, actor_params, feat)
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


def world_model_losses(
    nets: Networks,
    spec: EnvSpec,
    config: DreamerV1Config,
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

    Source: equation 10. Log-likelihoods are those of normal distributions with deviation 1, constants included.
    """
    prior = latent_dist(call(nets.rssm, params["rssm"], states.deter, method="prior"), config)
    kl_term, kl_value = kl.kl_loss(
        states.dist, prior, mode="plain", free_nats=config.free_nats, free_mode="avg", axis_name=axis_name
    )
    feat = feature(states)
    reward = REWARD_TRANSFORMS[config.reward_transform](step.reward)
    losses = {"kl": kl_term, "reward": -reward_dist(nets, params, feat).log_prob(reward)}
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


def scales(spec: EnvSpec, config: DreamerV1Config) -> dict[str, float]:
    """The factor of each loss term in the total; actor and critic have optimizers of their own."""
    decode = {
        f"decode/{name}": config.image_scale if spaces.is_image(space) else config.vector_scale
        for name, space in spec.obs.items()
    }
    factors = decode | {"kl": config.kl_scale, "reward": config.reward_scale, "actor": 1.0, "critic": 1.0}
    return factors | ({"cont": config.cont_scale} if config.use_continue else {})


class Imagined(NamedTuple):
    """Imagined trajectories, without the start state."""

    feat: Array  # [H, N, F]
    action: Array  # [H, N, A], action k leads to state k
    reward: Array  # [H, N], of the state itself
    discount: Array  # [H, N], of the state itself
    value: Array  # [H, N]


def imagine_behavior(
    nets: Networks, model: WorldModel, config: DreamerV1Config, params: dict, keys: Array, start: LatentState
) -> Imagined:
    """Follows the actor through imagination; differentiable in the actor alone, through actions and dynamics.

    Args:
      keys: `[N]`, consumed.
      start: `[N]`.
    """
    frozen = sg(params)

    def policy(key, carry, state):
        # The actor is not trained to make its own inputs better: no gradient through them.
        return carry, policy_dist(nets, params["actor"], sg(feature(state))).sample(seed=key)

    _, feat, action = dreaming.imagine(
        model, frozen, keys, start, policy, config.horizon, emit=feature, remat=config.remat
    )
    feat = feat[1:]
    return Imagined(
        feat,
        action,
        reward_dist(nets, frozen, feat).mean(),
        discount_of(nets, frozen, feat, config),
        critic_dist(nets, frozen["critic"], feat).mean(),
    )


def targets(imagined: Imagined, config: DreamerV1Config) -> Array:
    """What the imagined states 1 to H - 1 are worth, `[H - 1, N]`, with the gradient of everything it is made of.

        V_k = r_k + γ_k [(1 - λ) v_{k+1} + λ V_{k+1}],   V_H = v_H

    Source: equation 6. Reward and discount are those of the same state.
    """
    value = imagined.value
    if not config.bootstrap:
        value = value.at[-1].set(imagined.reward[-1])
    return returns.lambda_returns(imagined.reward[:-1], imagined.discount[:-1], value[1:], config.lambda_)


def behavior_losses(
    critic, entropy: Array, imagined: Imagined, counts: Array, config: DreamerV1Config, axis_name: str | None = None
) -> tuple[dict[str, Array], Metrics]:
    """Actor and critic losses on imagined trajectories, scalars.

        L_actor = -mean w_k [V_k + η H(π)],   L_critic = -mean w_k log p(sg(V_k)),   k = 1 .. H - 1

    with w_k = Π_{j < k} γ_j, so that w_1 = 1.

    Args:
      critic: return distribution at the imagined states 1 to H - 1, without gradient into them; differentiated.
      entropy: of the policy at these states (or at fewer, if η is 0).
      imagined: from `imagine_behavior`.
      counts: `[N]`, 0 for starts that do not count, else 1.
      axis_name: axis that the batch is spread over.

    Source: equations 7 and 8. The actor's gradient is that of the returns, through values, rewards and dynamics.
    """
    target = targets(imagined, config)
    weight = sg(returns.discount_weights_before(imagined.discount))[:-1]
    objective = target + config.entropy_scale * entropy if config.entropy_scale else target
    losses = {
        "actor": masked_mean(-weight * objective, counts, axis_name),
        "critic": masked_mean(-weight * critic.log_prob(sg(target)), counts, axis_name),
    }
    metrics = {
        "return_mean": target.mean(),
        "value_mean": imagined.value.mean(),
        "imagined_reward": imagined.reward.mean(),
        "imagined_cont": imagined.discount.mean() / config.discount,
        "policy_entropy": entropy.mean(),
    }
    return losses, metrics


def start_counts(step: TimeStep, config: DreamerV1Config) -> Array:
    """Which steps imagination may start from, float32 `[T, B]`: nothing follows a terminal one."""
    return 1.0 - step.is_terminal if config.use_continue else jnp.ones(step.is_terminal.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The whole loss and its update


def loss(
    nets: Networks,
    model: WorldModel,
    spec: EnvSpec,
    config: DreamerV1Config,
    params: dict,
    key: Array,
    prev_action: Array,
    step: TimeStep,
    axis_name: str | None = None,
) -> tuple[Array, tuple]:
    """World model, actor and critic: the sum of three losses, each of which reaches its own parameters only.

    Args:
      key: the same on every device; consumed.
      prev_action: `[T, B, A]`, the action that led to each step.
      step: `[T, B]`; sequences start from the zero state.
      axis_name: axis that the batch is spread over.

    Returns:
      The scalar to minimize, and (losses, states, imagined, metrics).
    """
    length, batch = step.reward.shape
    key_observe, key_imagine, key_entropy = noise.split(noise.row_keys(key, batch, axis_name), 3)

    # World model.
    embed = model.encode(params, step.obs)
    start = model.init_state(params, batch)
    _, states = dreaming.observe(
        model, params, key_observe, start, prev_action, embed, step.is_first, remat=config.remat
    )
    losses, metrics = world_model_losses(nets, spec, config, params, states, step, axis_name)

    # Imagination, from the last states of every sequence. The model gets no gradient from it.
    last = config.imagine_last or length
    rows = lambda x: x[-last:].reshape(last * batch, *x.shape[2:])
    keys = noise.split(key_imagine, last).reshape(last * batch)
    imagined = imagine_behavior(nets, model, config, params, keys, jax.tree.map(lambda x: sg(rows(x)), states))

    # Actor and critic. A policy's entropy costs another pass, so it is only watched at the first imagined state.
    feat = sg(imagined.feat[:-1])
    policy = policy_dist(nets, params["actor"], feat if config.entropy_scale else feat[:1])
    keys = noise.split(key_entropy, last).reshape(last * batch)
    behavior, more = behavior_losses(
        critic_dist(nets, params["critic"], feat),
        policy_entropy(policy, keys),
        imagined,
        rows(start_counts(step, config)),
        config,
        axis_name,
    )

    losses |= behavior
    factors = scales(spec, config)
    assert losses.keys() == factors.keys(), (losses.keys(), factors.keys())
    means = {name: jnp.mean(value) for name, value in losses.items()}
    total = sum(factors[name] * mean for name, mean in means.items())
    metrics |= more | {f"loss/{name}": mean for name, mean in means.items()}
    metrics["loss/model"] = total - means["actor"] - means["critic"]
    return total, (losses, states, imagined, metrics)


def optimizers(config: DreamerV1Config) -> dict[str, optax.GradientTransformation]:
    """One for each of world model, actor and critic."""
    rates = {"model": config.model_lr, "actor": config.actor_lr, "critic": config.critic_lr}
    rest = (config.epsilon, config.grad_clip, config.weight_decay, config.grad_accum)
    return {name: optim.clipped_adam_tf(rate, *rest) for name, rate in rates.items()}


def grouped(params: dict) -> dict[str, dict]:
    """What each optimizer trains; all modules but actor and critic are the world model."""
    model = {name: value for name, value in params.items() if name not in ("actor", "critic")}
    return {"model": model, "actor": params["actor"], "critic": params["critic"]}


def ungrouped(groups: dict[str, dict]) -> dict:
    """The parameters by module that `grouped` took apart."""
    return groups["model"] | {name: groups[name] for name in ("actor", "critic")}


def exploration_amount(config: DreamerV1Config, updates: Array) -> Array:
    """How much to explore after so many updates, a float32 scalar.

    It halves every `exploration_half_life` steps, or falls evenly in `exploration_updates`, down to `exploration_min`.
    """
    amount = jnp.float32(config.exploration)
    if config.exploration_updates is not None:
        left = 1 - jnp.minimum(updates / config.exploration_updates, 1.0)
        return config.exploration_min + (amount - config.exploration_min) * left
    if config.exploration_half_life is None:
        return amount
    bursts = jnp.maximum(updates - config.pretrain, 0) / config.train_steps
    steps = config.prefill + bursts * config.train_every
    return jnp.maximum(config.exploration_min, amount * 0.5 ** (steps / config.exploration_half_life))


def update(
    nets: Networks,
    model: WorldModel,
    spec: EnvSpec,
    config: DreamerV1Config,
    axis_name: str | None,
    state: AgentState,
    key: Array,
    trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:
    """One step of all three optimizers, by gradients of the same weights.

    The batch is `[1 + T, B]`: the first record only supplies the action before the second, and every sequence starts
    from the zero state, wherever it was cut.
    """
    step = jax.tree.map(lambda x: x[1:], trajectory.step)

    def objective(groups):
        total, (_, _, _, metrics) = loss(
            nets, model, spec, config, ungrouped(groups), key, trajectory.action[:-1], step, axis_name
        )
        return total, (metrics, ())

    done = optim.descend(objective, optimizers(config), state.opt_state, grouped(state.params), axis_name)
    metrics = done.metrics | {f"grad_norm/{name}": norm for name, norm in done.grad_norm.items()}
    exploration = {"exploration": exploration_amount(config, state.step + 1)}
    return AgentState(ungrouped(done.params), done.opt_state, state.stats, state.step + 1, exploration), metrics, None


# ---------------------------------------------------------------------------------------------------------------------
# The agent


def dreamer_v1(spec: EnvSpec, config: DreamerV1Config, axis_name: str | None = None) -> Agent:
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
    if config.within_episode:
        checks.check_episodes(config.length, spec.max_episode_steps)
    nets = networks(spec, config)
    model = world_model(nets, spec, config)
    counts = choice_counts(spec)

    def init(key):
        params = init_params(nets, spec, config, key)
        groups, exploration = grouped(params), {"exploration": exploration_amount(config, jnp.int32(0))}
        opt_state = {name: chain.init(groups[name]) for name, chain in optimizers(config).items()}
        return AgentState(params, opt_state, (), jnp.int32(0), exploration)

    def policy_carry(params, batch_size):
        del params, batch_size
        return ()

    def policy(params, key, carry, state, *, explore):
        dist = policy_dist(nets, params["actor"], feature(state))
        key_policy, key_noise = noise.split(key, 2)
        if not explore and config.eval_action == "mode":
            return carry, dist.mode(key_policy) if counts is None else dist.mode()
        action = dist.sample(seed=key_policy)
        if explore:
            action = action_distributions.explore(key_noise, action, params["exploration"], counts)
        return carry, action

    def act_carry(params, batch_size):
        action = jnp.zeros((batch_size, action_size(spec)))
        return model.init_state(params, batch_size), action, policy_carry(params, batch_size)

    def act(params, key, carry, timestep, *, explore):
        state, prev_action, carry = carry
        key_observe, key_policy = noise.split(key, 2)
        embed = model.encode(params, timestep.obs)
        state = model.observe(params, key_observe, state, prev_action, embed, timestep.is_first)
        carry, action = policy(params, key_policy, carry, state, explore=explore)
        return (state, action, carry), action, ()

    def learn(state, key, trajectory):
        return update(nets, model, spec, config, axis_name, state, key, trajectory)

    recipe = recipes.bursts(
        act,
        learn,
        Sampling(config.length, context=1, over=config.over, within_episode=config.within_episode),
        num_envs=config.num_envs,
        replay_capacity=config.replay_capacity,
        batch_size=config.batch_size,
        prefill=config.prefill,
        pretrain=config.pretrain,
        train_every=config.train_every,
        train_steps=config.train_steps,
    )
    return Agent(init, policy_carry, policy, act_carry, act, model, recipe)
