"""World Models: an autoencoder sees (V), a recurrent mixture network predicts (M), and an evolved controller acts (C).

Paper: Ha & Schmidhuber, "World Models" / "Recurrent World Models Facilitate Policy Evolution" (NeurIPS 2018, arXiv
1803.10122). Implemented as the authors' code of 2018 does it (CarRacing: `paper_car`, Doom: `paper_doom`); options give
Tallec's PyTorch version (one mixture for all latent dimensions, means instead of samples) and the implementation guide.

Departures: pictures are the environment's own (no crop of a dashboard, no contrast stretching); the memory sees actions
as the agent chose them, in [-1, 1], not as the environment maps them; transitions from an episode's last record to the
next one's first are not learned from, and the end that M predicts is the environment's own, never a time limit; biases
start at 0; the sign of the weight decay of solutions is mended; the distribution's mean that is kept is chosen from
evaluations of `mean_rollouts` episodes.

Read from top to bottom: configuration, networks, world model, controller, collection, losses, updates, agent.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import dreaming, evolution, optim
from wmjax.checks import FRACTION, NOT_NEGATIVE, POSITIVE, check_ranges, rules
from wmjax.nets import perceptual
from wmjax.nets.mdn import MDNRNN
from wmjax.nets.mlp import call, init_modules
from wmjax.nets.spaces import action_size, is_image
from wmjax.nets.vae import Decoder, Encoder, decoder_base
from wmjax.ops import distributions, noise
from wmjax.ops.action_distributions import random_action
from wmjax.ops.masks import masked_mean
from wmjax.types import (
    Agent,
    AgentState,
    Array,
    Box,
    Discrete,
    EnvSpec,
    Evolve,
    Metrics,
    Recipe,
    Sampling,
    Stage,
    TimeStep,
    Trajectory,
    Update,
    UsageError,
    WorldModel,
)

sg = jax.lax.stop_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

FULL_CMA = 1100  # parameters, beyond which a full covariance costs more than it gives; Doom has 1,088
ENCODE_LENGTH = 16  # steps of a window that is encoded at once, of every environment


@dataclasses.dataclass(frozen=True)
class EvolveConfig:
    """How the controller is searched for."""

    where: Literal["env", "dream"] = "env"  # dream: from encoded records, at `temperature`, without a real step
    strategy: Literal["auto", "cma_es", "sep_cma_es"] = "auto"  # sep_cma_es for more than `FULL_CMA` parameters
    population: int = 64  # candidates of a generation
    sigma_init: float = 0.1  # standard deviation of the first distribution
    weight_decay: float = 0.0  # subtracts this times mean(theta²) from the fitness that ranks; 0.01 is usual
    rollouts: int = 16  # episodes of a candidate
    common: bool = True  # all candidates play the same episodes
    generations: int = 1800  # of the search
    mean_every: int = 25  # generations between evaluations of the distribution's mean
    mean_rollouts: int = 1024  # episodes of such an evaluation
    horizon: int | None = None  # agent steps of an episode; None: the environment's limit, or 1000
    starts: int = 1024  # encoded records that dreams start from, drawn anew for every `mean_every` generations
    start_from: Literal["any", "first"] = "any"  # of these: any, with M's memory of what was before; or first frames
    restarts: int | None = None  # of a search that is done (converged, flat, ill-conditioned): how often it starts anew
    #   from its first mean, with twice the population each time (IPOP), before it ends; None: it goes on


@dataclasses.dataclass(frozen=True)
class WorldModelsConfig:
    """Hyperparameters; the defaults are those of the paper's CarRacing experiment."""

    # Vision (appendix "Variational Autoencoder").
    latent: int = 32  # size of z; 64 in Doom
    depth: int = 32  # channels of the encoder are depth * (1, 2, 4, 8)
    decoder_depth: int | None = None  # None: depth; more makes the decoder wider
    encoder_padding: Literal["VALID", "SAME"] = "VALID"  # of the convolutions of the encoder
    decoder_relu: bool = False  # a ReLU after the decoder's linear layer, as Tallec
    kl_tolerance: float = 0.5  # nats per latent dimension; floor of the sum over them, for each image
    beta: float = 1.0  # weight of the KL
    recon_scale: float = 1.0  # weight of the squared error, summed over the picture; 0 leaves the perceptual loss alone
    reduction: Literal["mean", "sum"] = "mean"  # over the batch
    perceptual: Literal["none", "random_features", "multiscale", "lpips"] = "none"  # features of the perceptual loss
    perceptual_scale: float = 100.0  # beside errors that are summed over the picture
    lpips_weights: str | None = None  # file with the weights of `lpips`
    vision_learning_rate: float = 1e-4  # of V
    vision_batch_size: int = 100  # pictures of an update of V
    vision_updates: int = 1_000_000  # 10 epochs

    # Memory (appendix "Recurrent neural network").
    hidden: int = 256  # 512 in Doom
    mixtures: int = 5  # components of the mixture of each latent
    mixture: Literal["per_dim", "shared"] = "per_dim"  # the likelihood's unit: a mean over dimensions, or a sum
    reward_head: Literal["none", "mse", "gaussian"] = "none"  # how M predicts the reward, if it does
    done_head: bool = False  # whether M predicts the end of episodes
    done_pos_weight: float = 1.0  # weight of ends in the cross-entropy; 10 in Doom
    restart_input: bool = False  # an input that says where an episode begins, in Doom
    layer_norm: bool = False  # whether the LSTM has layer normalization
    forget_bias: float = 1.0  # added to the forget gate
    z_source: Literal["sample", "mean"] = "sample"  # z that M learns from
    temperature: float = 1.0  # τ of dreams: 1.15 is the paper's best in Doom
    dream_reward: Literal["predicted", "survival"] = "predicted"  # survival: 1 for each step
    memory_learning_rate: float = 1e-3  # of M, at first
    memory_final_learning_rate: float = 1e-5  # of M, in the end
    memory_decay: float = 1.0  # of the rate per update, towards the final one; 0.99999 in Doom
    clip: Literal["value", "norm", "none"] = "value"  # of M's gradients, entry by entry or by their global norm
    clip_limit: float = 1.0  # what gradients of M are clipped to
    prediction_penalty: float = 0.0  # weight of the mean square of predicted means
    memory_batch_size: int = 100  # sequences of an update of M
    memory_length: int = 999  # steps of a sequence for M
    memory_updates: int = 4000  # 0 leaves M untrained
    memory_within_episode: bool = True  # sequences rather lie in one episode; without `memory_stateful`
    memory_stateful: bool = False  # sequences follow each other and hand on the state, as in Doom

    # Controller (appendix "CMA-ES").
    inputs: Literal["z", "zh", "zc", "zch"] = "zh"  # what the controller sees of V and M
    controller_units: int = 0  # hidden tanh units; 0: linear
    controller_bias: bool = True  # whether the controller has biases
    controller_z: Literal["sample", "mean"] = "sample"  # z that C acts on
    evolve: EvolveConfig = EvolveConfig()  # the search for the controller
    eval_action: Literal["mode"] = "mode"  # a controller is deterministic

    # Data.
    collection: Literal["random", "held", "linear", "brown"] = "linear"  # how actions are drawn while data is collected
    collect_steps: int = 10_000_000  # agent steps of all environments, by the collection policy
    num_envs: int = 64  # environments that are stepped at once
    replay_capacity: int = 10_000_000  # agent steps that replay holds, over all environments
    latent_dtype: Literal["float32", "float16"] = "float16"  # of mu and logvar in replay

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        check_ranges(self, RULES)
        check_ranges(self.evolve, EVOLVE_RULES)
        evolution.StrategyConfig(1, self.evolve.population, weight_decay=self.evolve.weight_decay).validate()
        if self.perceptual == "lpips":
            perceptual.load_lpips(self.lpips_weights)
        if self.evolve.where == "dream":
            for name in ("vision_updates", "memory_updates"):
                if not getattr(self, name):
                    raise UsageError(
                        f"evolve.where: 'dream' needs V and M to be trained before, but {name} is 0; "
                        "where='env' is valid without"
                    )
            if self.reward_head == "none" and self.dream_reward == "predicted":
                raise UsageError(
                    "evolve.where: 'dream' needs a reward, which M does not predict (reward_head is 'none'); set "
                    "reward_head to mse or gaussian, or dream_reward to survival if the task pays 1 for each step"
                )
        if self.replay_capacity < self.num_envs * (self.memory_length + 1):
            raise UsageError(
                f"replay_capacity must hold a window of memory_length + 1 = {self.memory_length + 1} steps for each of "
                f"the {self.num_envs} environments, {self.num_envs * (self.memory_length + 1)} in all, "
                f"got {self.replay_capacity}"
            )
        if self.collect_steps < self.num_envs * (self.memory_length + 1):
            raise UsageError(
                f"collect_steps must reach a window of memory_length + 1 = {self.memory_length + 1} steps of each of "
                f"the {self.num_envs} environments, {self.num_envs * (self.memory_length + 1)} in all, "
                f"got {self.collect_steps}"
            )
        if self.memory_stateful and self.memory_batch_size != self.num_envs:
            raise UsageError(
                f"memory_stateful needs a sequence of every environment in each batch: memory_batch_size must be "
                f"num_envs={self.num_envs}, got {self.memory_batch_size}"
            )


RULES = (
    rules(
        POSITIVE,
        "latent depth decoder_depth vision_learning_rate vision_batch_size hidden mixtures done_pos_weight temperature "
        "memory_learning_rate clip_limit memory_batch_size memory_length num_envs replay_capacity collect_steps",
    )
    | rules(
        NOT_NEGATIVE,
        "kl_tolerance beta recon_scale perceptual_scale vision_updates forget_bias memory_final_learning_rate "
        "prediction_penalty memory_updates controller_units",
    )
    | rules(FRACTION, "memory_decay")
)
EVOLVE_RULES = rules(
    POSITIVE, "sigma_init population rollouts generations mean_every mean_rollouts horizon starts"
) | rules(NOT_NEGATIVE, "restarts")


# ---------------------------------------------------------------------------------------------------------------------
# Networks


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


def networks(spec: EnvSpec, config: WorldModelsConfig) -> Networks:
    """The modules for one environment."""
    (space,) = spec.obs.values()
    side, _, channels = space.shape
    return Networks(
        Encoder(config.latent, config.depth, config.encoder_padding),
        Decoder(side, channels, config.decoder_depth or config.depth, config.decoder_relu),
        MDNRNN(
            config.latent, action_size(spec), config.hidden, config.mixtures, config.mixture, config.reward_head,
            config.done_head, config.restart_input, config.layer_norm, config.forget_bias,
        ),
    )  # fmt: skip


def init_params(nets: Networks, spec: EnvSpec, config: WorldModelsConfig, key: Array) -> dict:
    """Parameters of V and M, and a controller of zeros: x0 of the search."""
    (space,) = spec.obs.values()
    z, h = jnp.zeros((1, config.latent)), jnp.zeros((1, config.hidden))
    inputs = {
        "encoder": (jnp.zeros((1, *space.shape), space.dtype),),
        "decoder": (z,),
        "memory": (h, h, z, jnp.zeros((1, action_size(spec))), jnp.zeros(1, bool)),
    }
    return init_modules(nets._asdict(), key, inputs) | {"controller": jnp.zeros(controller_size(spec, config))}


# ---------------------------------------------------------------------------------------------------------------------
# World model


class State(NamedTuple):
    """What V sees of the present and M remembers of the past."""

    z: Array  # float32 [..., Z]
    h: Array  # float32 [..., H], output of the cell before the present action was fed to it
    c: Array  # float32 [..., H], its memory
    is_first: Array  # bool [...], the episode begins here: an input of M where it has that
    reward: Array  # float32 [...], expected on the way here, 0 where an episode began
    cont: Array  # float32 [...], P(not terminal) on the way here, 1 where an episode began
    started: Array  # bool [...], False before anything was seen: no transition leads from there


def world_model(nets: Networks, spec: EnvSpec, config: WorldModelsConfig) -> WorldModel:
    """The learned environment; `embed` is {"mu", "logvar"}, `State` as above."""
    image = check_spec(spec)

    def init_state(params, batch_size):
        del params
        zeros = lambda size: jnp.zeros((batch_size, size))
        false, zero = jnp.zeros(batch_size, bool), jnp.zeros(batch_size)
        return State(zeros(config.latent), zeros(config.hidden), zeros(config.hidden), false, zero, zero + 1, false)

    def encode(params, obs):
        mu, logvar = call(nets.encoder, params["encoder"], obs[image])
        return {"mu": mu, "logvar": logvar}

    def advance(params, state, action):
        memory = params["memory"]
        gates = call(nets.memory, memory, state.z, action, state.is_first, method="inputs")
        h, c = call(nets.memory, memory, state.h, state.c, gates, method="advance")
        return h, c, *outcome(call(nets.memory, memory, h, method="predict_outcome"), config, h.shape[:-1])

    def observe(params, key, state, prev_action, embed, is_first):
        h, c, reward, cont = advance(params, state, prev_action)
        # Where an episode begins the memory is empty: zero before the cell sees the first frame.
        keep = state.started & ~is_first
        h, c = (jnp.where(keep[..., None], x, 0.0) for x in (h, c))
        z = embed["mu"]
        if config.controller_z == "sample":
            z = sample_latent(key, embed["mu"], embed["logvar"])
        reward, cont = jnp.where(keep, reward, 0.0), jnp.where(keep, cont, 1.0)
        return State(z, h, c, is_first, reward, cont, jnp.ones_like(is_first))

    def imagine(params, key, state, action):
        h, c, reward, cont = advance(params, state, action)
        mixture = call(nets.memory, params["memory"], h, method="predict_latent")
        z = mixture.sample(key, config.temperature)
        false = jnp.zeros_like(state.is_first)
        return State(z, h, c, false, reward, cont, ~false)

    def predict(params, state):
        del params
        return state.reward, state.cont

    def decode(params, state):
        return {image: call(nets.decoder, params["decoder"], state.z) * 255}

    return WorldModel(init_state, encode, observe, imagine, predict, decode)


def sample_latent(key: Array, mu: Array, logvar: Array) -> Array:
    """z = μ + exp(logvar / 2) ε, `[..., Z]`; one key, or keys for the leading axes."""
    return mu + jnp.exp(logvar / 2) * noise.normal(key, mu.shape)


def outcome(outputs: dict[str, Array], config: WorldModelsConfig, lead: tuple[int, ...]) -> tuple[Array, Array]:
    """Expected reward and P(not terminal), `lead` each, from the heads' outputs; what there is no head for is 0 and 1.

    A dream ends where the end's logit is above 0, which `dream_env` reads as P(not terminal) < ½.
    """
    reward = outputs["reward"][..., 0] if "reward" in outputs else jnp.zeros(lead)
    if config.dream_reward == "survival":
        reward = jnp.ones(lead)
    return reward, jax.nn.sigmoid(-outputs["done"][..., 0]) if "done" in outputs else jnp.ones(lead)


# ---------------------------------------------------------------------------------------------------------------------
# Controller


def controller_layers(spec: EnvSpec, config: WorldModelsConfig) -> tuple[int, ...]:
    """Sizes from inputs to outputs."""
    inputs = {"z": config.latent, "h": config.hidden, "c": config.hidden}
    hidden = (config.controller_units,) if config.controller_units else ()
    return sum(inputs[name] for name in config.inputs), *hidden, action_size(spec)


def controller_size(spec: EnvSpec, config: WorldModelsConfig) -> int:
    """n, numbers of theta: 867 for CarRacing with [z, h]."""
    layers = controller_layers(spec, config)
    return sum((a + config.controller_bias) * b for a, b in itertools.pairwise(layers))


def controller(theta: Array, inputs: Array, layers: tuple[int, ...], bias: bool = True) -> Array:
    """tanh(x W + b), layer after layer, to actions in (-1, 1).

    Args:
      theta: `[n]`: for each layer its bias, then W `[inputs, outputs]` row by row, as in the authors' files; or
        `[P, n]`, where rows belong to P controllers, side by side.
      inputs: `[..., layers[0]]`.
      layers: sizes from inputs to outputs.
      bias: whether there are biases.

    Returns:
      float32 `[..., layers[-1]]`.
    """
    theta, lead = jnp.atleast_2d(theta), inputs.shape[:-1]
    x, used = inputs.reshape(theta.shape[0], -1, layers[0]), 0
    for size, outputs in itertools.pairwise(layers):
        offset = 0.0
        if bias:
            offset, used = theta[:, None, used : used + outputs], used + outputs
        kernel = theta[:, used : used + size * outputs].reshape(-1, size, outputs)
        x, used = jnp.tanh(x @ kernel + offset), used + size * outputs
    assert used == theta.shape[1], (used, theta.shape)
    return x.reshape(*lead, layers[-1])


def as_action(output: Array, spec: EnvSpec) -> Array:
    """Numbers `[..., A]` as an agent's action: one-hot of the largest, or themselves clipped to [-1, 1]."""
    if isinstance(spec.action, Discrete):
        return jax.nn.one_hot(jnp.argmax(output, -1), spec.action.n)
    return jnp.clip(output, -1.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Collection: how the first records are made. Each policy has a memory, drawn anew where an episode begins.


class Collector(NamedTuple):
    """A policy that looks at nothing, for one environment."""

    start: Callable  # (key) -> memory
    step: Callable  # (key, memory) -> (memory, action [A])


def held(spec: EnvSpec) -> Collector:
    """Random actions, each held: on frames t with t mod n = 0 a new action and a new n in 1 ... 10 are drawn (Doom)."""

    def draw(key):
        key_action, key_repeat = jax.random.split(key)
        return random_action(spec.action, key_action), jax.random.randint(key_repeat, (), 1, 11)

    def start(key):
        return *draw(key), jnp.int32(0)

    def step(key, memory):
        action, repeat, frame = memory
        # A test of the frame's number, not a countdown, as in the authors' code.
        again = (frame % repeat == 0) & (frame > 0)
        action, repeat = (jnp.where(again, a, b) for a, b in zip(draw(key), (action, repeat), strict=True))
        return (action, repeat, frame + 1), action

    return Collector(start, step)


def linear(spec: EnvSpec, latent: int) -> Collector:
    """A random linear controller for each episode (CarRacing): tanh(ε W + b), ε ~ N(0, I) in every step.

    All weights are s times standard Cauchy numbers, s uniform in [0, 0.01]. The authors' V and M have random weights
    then, too, that are practically 0, so that z is noise and h is 0.
    """
    size = action_size(spec)

    def start(key):
        key_scale, key_weights = jax.random.split(key)
        scale = jax.random.uniform(key_scale, maxval=0.01)
        return scale * jax.random.cauchy(key_weights, (size * (latent + 1),))

    def step(key, theta):
        output = controller(theta, jax.random.normal(key, (latent,)), (latent, size))
        return theta, as_action(output, spec)

    return Collector(start, step)


def brown(spec: EnvSpec) -> Collector:
    """Brownian motion of each action, clipped to [-1, 1] (Tallec): aₜ₊₁ = aₜ + √(1/50) ε."""
    if isinstance(spec.action, Discrete):
        raise UsageError("collection: 'brown' needs continuous actions; use random, held or linear")

    def start(key):
        return random_action(spec.action, key)

    def step(key, action):
        return jnp.clip(action + math.sqrt(1 / 50) * jax.random.normal(key, action.shape), -1, 1), action

    return Collector(start, step)


def collector(spec: EnvSpec, config: WorldModelsConfig) -> Collector:
    """The collection policy of a configuration; `random` remembers nothing."""
    if config.collection == "random":
        return Collector(lambda key: (), lambda key, memory: ((), random_action(spec.action, key)))
    return {"held": held, "brown": brown, "linear": functools.partial(linear, latent=config.latent)}[config.collection](
        spec
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def kl_floor(mu: Array, logvar: Array, tolerance: float) -> tuple[Array, Array]:
    """KL from a standard normal, summed over `[..., Z]`, and the same with a floor under it; float32 `[...]` each.

        KL = -½ Σ (1 + logvar - μ² - e^logvar),   max(KL, tolerance Z)

    The floor is one of the sum, for each sample: below it there is no gradient at all. (The authors' comment says per
    dimension, their code does not.)
    """
    value = -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar), -1)
    return value, jnp.maximum(value, tolerance * mu.shape[-1])


def vision_loss(
    nets: Networks, config: WorldModelsConfig, params: dict, key: Array, image: Array, axis_name: str | None = None
) -> tuple[Array, Metrics]:
    """V's loss: squared errors summed over the picture, plus β KL, averaged over the batch.

    Args:
      key: keys `[B]`; consumed.
      image: uint8 `[B, H, W, C]`.
      axis_name: axis that the batch is spread over.
    """
    mu, logvar = call(nets.encoder, params["encoder"], image)
    output = call(nets.decoder, params["decoder"], sample_latent(key, mu, logvar))
    target = image.astype(jnp.float32) / 255
    recon = jnp.sum((output - target) ** 2, (-3, -2, -1))
    kl, floored = kl_floor(mu, logvar, config.kl_tolerance)
    loss = config.recon_scale * recon + config.beta * floored
    metrics = {"recon": jnp.mean(recon), "kl": jnp.mean(kl)}
    if config.perceptual != "none":
        distance = perceptual.loss(config.perceptual, 2 * target - 1, 2 * output - 1, config.lpips_weights)
        loss = loss + config.perceptual_scale * distance
        metrics["perceptual"] = jnp.mean(distance)
    total = jnp.mean(loss)
    if config.reduction == "sum":  # over the batch of all devices, whose gradients are averaged
        total = total * image.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    return total, metrics | {"loss": total}


def unroll(
    nets: Networks, params: dict, h: Array, c: Array, z: Array, action: Array, is_first: Array
) -> tuple[Array, tuple[Array, Array]]:
    """M over a sequence: outputs of the cell after each step, `[T, B, H]`, and its last (h, c).

    Args:
      h, c: `[B, H]` before the first step. They are zeroed where an episode begins, before the cell sees the step.
      z, action, is_first: `[T, B, Z]`, `[T, B, A]`, bool `[T, B]`; all of them are the step's own.
    """
    gates = call(nets.memory, params, z, action, is_first, method="inputs")

    def step(carry, inputs):
        gates, first = inputs
        h, c = (jnp.where(first[:, None], 0.0, x) for x in carry)
        h, c = call(nets.memory, params, h, c, gates, method="advance")
        return (h, c), h

    last, outputs = jax.lax.scan(step, (h, c), (gates, is_first))
    return outputs, last


def done_loss(logits: Array, target: Array, pos_weight: float) -> Array:
    """Cross-entropy of the end, in which ends weigh `pos_weight`: float32, shape of `logits`."""
    return -(1 + target * (pos_weight - 1)) * distributions.bernoulli_log_prob(logits, target)


def reward_loss(outputs: Array, target: Array, kind: str) -> Array:
    """Squared error of a mean `[..., 1]`, or -ln N of a mean and a log standard deviation `[..., 2]`."""
    error = outputs[..., 0] - target
    if kind == "mse":
        return error**2
    log_std = outputs[..., 1]
    return 0.5 * (error * jnp.exp(-log_std)) ** 2 + log_std + 0.5 * math.log(2 * math.pi)


def memory_loss(
    nets: Networks,
    config: WorldModelsConfig,
    params: dict,
    start: tuple[Array, Array],
    z: Array,
    action: Array,
    step: TimeStep,
    axis_name: str | None = None,
) -> tuple[Array, tuple[tuple[Array, Array], Metrics]]:
    """M's loss on a sequence of T + 1 records: step t sees zₜ and aₜ and predicts what arrives with record t + 1.

    Args:
      params: of M.
      start: (h, c) before the first record, `[B, H]`.
      z, action: `[T + 1, B, ...]`.
      step: `[T + 1, B]`; its flags and rewards. No loss where record t + 1 begins another episode.
      axis_name: axis that the batch is spread over.

    Returns:
      The scalar to minimize; (h, c) after T records, and metrics.
    """
    hidden, last = unroll(nets, params, *start, z[:-1], action[:-1], step.is_first[:-1])
    mask = ~step.is_first[1:]
    mean = lambda x: masked_mean(x, mask, axis_name)
    mixture = call(nets.memory, params, hidden, method="predict_latent")
    # A mean over dimensions where each has its own mixture, the joint likelihood of all where they share one.
    losses = {"nll": mean(-jnp.mean(mixture.log_prob(z[1:]), -1))}
    outputs = call(nets.memory, params, hidden, method="predict_outcome")
    if "reward" in outputs:
        losses["reward"] = mean(reward_loss(outputs["reward"], step.reward[1:], config.reward_head))
    if "done" in outputs:
        target = step.is_terminal[1:].astype(jnp.float32)
        losses["done"] = mean(done_loss(outputs["done"][..., 0], target, config.done_pos_weight))
    if config.prediction_penalty:
        losses["penalty"] = config.prediction_penalty * mean(jnp.mean(mixture.mean**2, (-2, -1)))
    total = sum(losses.values())
    return total, (last, losses | {"loss": total})


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def vision_optimizer(config: WorldModelsConfig) -> optax.GradientTransformation:
    """Adam."""
    return optax.adam(config.vision_learning_rate)


def memory_optimizer(config: WorldModelsConfig) -> optax.GradientTransformation:
    """Clipping, entry by entry or by the norm of all, and Adam: lr = (first - final) decayᵗ + final."""
    clip = {"value": optax.clip, "norm": optax.clip_by_global_norm, "none": lambda limit: optax.identity()}
    spread = config.memory_learning_rate - config.memory_final_learning_rate
    schedule = lambda step: spread * config.memory_decay**step + config.memory_final_learning_rate
    return optax.chain(clip[config.clip](config.clip_limit), optax.adam(schedule))


def vision_update(
    nets: Networks, spec: EnvSpec, config: WorldModelsConfig, axis_name: str | None,
    state: AgentState, key: Array, trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:  # fmt: skip
    """One step of V on the images of `[T, B]` records."""
    image = trajectory.step.obs[check_spec(spec)]
    keys = noise.row_keys(key, image.shape[1], axis_name)
    keys = noise.split(keys, image.shape[0]).reshape(-1)  # [T * B]
    image = image.reshape(-1, *image.shape[2:])

    def objective(modules):
        value, metrics = vision_loss(nets, config, modules["vision"], keys, image, axis_name)
        return value, (metrics, ())

    chain, params = {"vision": vision_optimizer(config)}, {name: state.params[name] for name in ("encoder", "decoder")}
    done = optim.descend(objective, chain, state.opt_state, {"vision": params}, axis_name)
    new = AgentState(
        state.params | done.params["vision"], state.opt_state | done.opt_state, state.stats, state.step + 1
    )
    return new, done.metrics | {"grad_norm": done.grad_norm["vision"]}, None


def encode_update(
    model: WorldModel, config: WorldModelsConfig, axis_name: str | None,
    state: AgentState, key: Array, trajectory: Trajectory,
) -> tuple[AgentState, Metrics, dict]:  # fmt: skip
    """Writes what V sees in each record, so that M's updates need no image; learns nothing."""
    del key
    embed = model.encode(state.params, trajectory.step.obs)
    kl, _ = kl_floor(embed["mu"], embed["logvar"], 0.0)
    return state, optim.pmean({"kl": jnp.mean(kl)}, axis_name), pack_latent(embed, config)


def memory_update(
    nets: Networks, config: WorldModelsConfig, axis_name: str | None,
    state: AgentState, key: Array, trajectory: Trajectory,
) -> tuple[AgentState, Metrics, None]:  # fmt: skip
    """One step of M on `[T + 1, B]` records that were encoded before."""
    batch = trajectory.action.shape[1]
    embed = unpack_latent(trajectory.latent)
    z = embed["mu"]
    if config.z_source == "sample":  # fresh noise for every batch, the same z as target and as input
        keys = noise.row_keys(key, batch, axis_name)
        z = z + jnp.exp(embed["logvar"] / 2) * noise.normal(keys, z.swapaxes(0, 1).shape).swapaxes(0, 1)
    zeros = jnp.zeros((batch, config.hidden))
    start, stats = (zeros, zeros), state.stats
    if config.memory_stateful:
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch
        start = tuple(jax.lax.dynamic_slice_in_dim(x, first, batch) for x in stats["memory_carry"])

    def objective(modules):
        value, (last, metrics) = memory_loss(
            nets, config, modules["memory"], start, z, trajectory.action, trajectory.step, axis_name
        )
        return value, (metrics, last)

    chain, params = {"memory": memory_optimizer(config)}, {"memory": state.params["memory"]}
    done = optim.descend(objective, chain, state.opt_state, params, axis_name)
    if config.memory_stateful:
        gather = (lambda x: x) if axis_name is None else (lambda x: jax.lax.all_gather(x, axis_name, tiled=True))
        stats = stats | {"memory_carry": tuple(gather(sg(x)) for x in done.aux)}
    new = AgentState(state.params | done.params, state.opt_state | done.opt_state, stats, state.step + 1)
    return new, done.metrics | {"grad_norm": done.grad_norm["memory"]}, None


def pack_latent(embed: dict[str, Array], config: WorldModelsConfig) -> dict[str, Array]:
    """What replay keeps: mu and logvar, `[..., Z]`, in `latent_dtype`."""
    return {name: sg(x).astype(config.latent_dtype) for name, x in embed.items()}


def unpack_latent(latent: dict[str, Array]) -> dict[str, Array]:
    """mu and logvar as float32."""
    return {name: x.astype(jnp.float32) for name, x in latent.items()}


def dream_starts(model: WorldModel, count: int, first: bool = False) -> Callable:
    """States to dream from: `(params, key, Trajectory [T, B]) -> States [count]`.

    M reads the records, and states are drawn from all of them but those that ended an episode. Where records are
    `first` frames, T is 1 and M's memory is empty.
    """

    def starts(params, key, trajectory):
        key_observe, key_choice = jax.random.split(key)
        keys = noise.row_keys(key_observe, trajectory.action.shape[1])
        prev_action = jnp.concatenate([jnp.zeros_like(trajectory.action[:1]), trajectory.action[:-1]])
        init = model.init_state(params, trajectory.action.shape[1])
        embed = unpack_latent(trajectory.latent)
        is_first = trajectory.step.is_first | first
        _, states = dreaming.observe(model, params, keys, init, prev_action, embed, is_first)
        states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        going = ~trajectory.step.is_last.reshape(-1)
        logits = jnp.where(going | ~going.any(), 0.0, -jnp.inf)
        index = jax.random.categorical(key_choice, logits, shape=(count,))
        return jax.tree.map(lambda x: x[index], states)

    return starts


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class ActCarry(NamedTuple):
    """What acting remembers; the collection policy's memory keeps its place while the controller acts."""

    state: State
    action: Array  # [B, A], the one before
    collector: tuple  # the memory of the collection policy, [B, ...]


def world_models(spec: EnvSpec, config: WorldModelsConfig, axis_name: str | None = None) -> Agent:
    """The agent for one environment.

    Args:
      spec: one square uint8 image, of 64, 80, 96, ... pixels; Discrete or float32 Box actions of rank 1.
      config: hyperparameters.
      axis_name: the named axis (of `vmap`, `shard_map` or `pmap`) that batches and populations are spread over.

    Raises:
      UsageError: a field of `config` is out of range, or a space of `spec` is not supported.
    """
    config.validate()
    check_spec(spec)
    if config.evolve.where == "dream" and config.dream_reward == "survival" and spec.survival is False:
        raise UsageError(
            "dream_reward: 'survival' pays 1 for each step of a dream, which is not what this task pays; "
            "'predicted' is valid, with reward_head mse or gaussian"
        )
    nets = networks(spec, config)
    model = world_model(nets, spec, config)
    layers, collecting = controller_layers(spec, config), collector(spec, config)
    evolve = _evolve(spec, config, model)

    def init(key):
        key_params, key_search = jax.random.split(key)
        params = init_params(nets, spec, config, key_params)
        opt_state = {
            "vision": vision_optimizer(config).init({name: params[name] for name in ("encoder", "decoder")}),
            "memory": memory_optimizer(config).init(params["memory"]),
            evolve.name: evolution.init_evolving(evolve, key_search, params),
        }
        zeros = jnp.zeros((config.memory_batch_size, config.hidden))
        stats = {"memory_carry": (zeros, zeros)} if config.memory_stateful else {}
        return AgentState(params, opt_state, stats, jnp.int32(0))

    def policy_carry(params, batch_size):
        del params, batch_size
        return ()

    def policy(params, key, carry, state, *, explore):
        del key, explore
        parts = {"z": state.z, "h": state.h, "c": state.c}
        inputs = jnp.concatenate([parts[name] for name in config.inputs], -1)
        output = controller(params["controller"], inputs, layers, config.controller_bias)
        return carry, as_action(output, spec)

    def act_carry(params, batch_size):
        memory = jax.eval_shape(collecting.start, jax.random.key(0))
        memory = jax.tree.map(lambda x: jnp.zeros((batch_size, *x.shape), x.dtype), memory)
        action = jnp.zeros((batch_size, action_size(spec)))
        return ActCarry(model.init_state(params, batch_size), action, memory)

    def act(params, key, carry, timestep, *, explore):
        key_observe, key_policy = noise.split(key, 2)
        embed = model.encode(params, timestep.obs)
        state = model.observe(params, key_observe, carry.state, carry.action, embed, timestep.is_first)
        _, action = policy(params, key_policy, (), state, explore=explore)
        return ActCarry(state, action, carry.collector), action, pack_latent(embed, config)

    def collect(params, key, carry, timestep, *, explore):
        del explore
        keys = key if key.ndim else noise.row_keys(key, timestep.reward.shape[0])
        key_start, key_step = noise.split(keys, 2)
        fresh = jax.vmap(collecting.start)(key_start)
        new = timestep.is_first
        memory = jax.tree.map(
            lambda a, b: jnp.where(new.reshape(-1, *[1] * (a.ndim - 1)), a, b), fresh, carry.collector
        )
        memory, action = jax.vmap(collecting.step)(key_step, memory)
        latent = jnp.zeros((*new.shape, config.latent), config.latent_dtype)
        return carry._replace(collector=memory), action, {"mu": latent, "logvar": latent}

    return Agent(
        init, policy_carry, policy, act_carry, act, model,
        _recipe(nets, model, spec, config, axis_name, collect, act, evolve),
    )  # fmt: skip


def _evolve(spec: EnvSpec, config: WorldModelsConfig, model: WorldModel) -> Evolve:
    search, size = config.evolve, controller_size(spec, config)
    kind = {"auto": "sep_cma_es" if size > FULL_CMA else "cma_es"}.get(search.strategy, search.strategy)
    strategy = evolution.make_strategy(
        evolution.StrategyConfig(size, search.population, kind, search.sigma_init, weight_decay=search.weight_decay)
    )
    first = search.start_from == "first"
    length = 1 if first else min(32, config.memory_length)
    rows = min(search.starts if first else 64, search.starts, config.replay_capacity // length)
    rows = 2 ** (rows.bit_length() - 1)  # a power of two, which devices can share
    return Evolve(
        "controller",
        strategy,
        get=lambda params: params["controller"],
        set=lambda params, theta: params | {"controller": theta},
        where=search.where,
        rollouts=search.rollouts,
        max_steps=search.horizon or spec.max_episode_steps or 1000,
        population=search.population,
        generations=min(search.mean_every, search.generations),
        mean_rollouts=search.mean_rollouts,
        common=search.common,
        starts=dream_starts(model, search.starts, first),
        sampling=Sampling(length, starts=search.start_from),
        batch_size=rows,
        restarts=search.restarts,
    )


def _recipe(nets, model, spec, config: WorldModelsConfig, axis_name, collect, act, evolve: Evolve) -> Recipe:
    """collect | vision | encode | memory | controller; stages with nothing to do are left out."""
    per_env = -(-config.collect_steps // config.num_envs)
    rows = min(per_env, config.replay_capacity // config.num_envs)
    chunk = min(ENCODE_LENGTH, rows)
    see = functools.partial(vision_update, nets, spec, config, axis_name)
    encode = functools.partial(encode_update, model, config, axis_name)
    remember = functools.partial(memory_update, nets, config, axis_name)
    stages = [Stage("collect", -(-per_env // chunk), chunk, collect)]

    def learn(name, fn, updates, batch_size, sampling):
        repeats = math.gcd(updates, 10)
        stages.append(Stage(name, updates // repeats, 0, act, (Update(name, fn, repeats, batch_size, sampling),)))

    if config.vision_updates:
        learn("vision", see, config.vision_updates, config.vision_batch_size, Sampling(1))
    if config.memory_updates or config.evolve.where == "dream":
        learn("encode", encode, -(-rows // chunk), config.num_envs, Sampling(chunk, over="in_order"))
    if config.memory_updates:
        sampling = Sampling(config.memory_length, context=1, within_episode=config.memory_within_episode)
        if config.memory_stateful:
            sampling = Sampling(config.memory_length, context=1, over="in_order")
        learn("memory", remember, config.memory_updates, config.memory_batch_size, sampling)
    iterations = -(-config.evolve.generations // evolve.generations)
    stages.append(Stage("controller", iterations, 0, act, evolve=evolve))
    return Recipe(config.num_envs, config.replay_capacity, tuple(stages))
