"""World Models' hyperparameters."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wmjax import evolution
from wmjax.checks import NOT_NEGATIVE, check_ranges, rules
from wmjax.nets import perceptual
from wmjax.types import UsageError


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
    recon_loss: Literal["mse", "bce"] = "mse"  # squared error, or cross-entropy as of a Bernoulli
    recon_scale: float = 1.0  # weight of that loss, summed over the picture; 0 leaves the perceptual loss alone
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
    memory_action: Literal["agent", "env"] = "agent"  # as M sees actions: in [-1, 1], or as the environment takes them
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

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of V and M; parameters, losses and C stay float32
    grad_accum: int = 1  # parts of a batch that its gradient is computed in, one after the other
    remat: bool = False  # recompute V's encoder and M's step in the backward pass

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        check_ranges(self)
        check_ranges(self.evolve, rules(NOT_NEGATIVE, "weight_decay"))
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
        window = self.memory_length + 1
        for name, verb, word in (("replay_capacity", "hold", "for"), ("collect_steps", "reach", "of")):
            if getattr(self, name) < self.num_envs * window:
                raise UsageError(
                    f"{name} must {verb} a window of memory_length + 1 = {window} steps {word} each of the "
                    f"{self.num_envs} environments, {self.num_envs * window} in all, got {getattr(self, name)}"
                )
        if self.memory_stateful and self.memory_batch_size != self.num_envs:
            raise UsageError(
                f"memory_stateful needs a sequence of every environment in each batch: memory_batch_size must be "
                f"num_envs={self.num_envs}, got {self.memory_batch_size}"
            )
