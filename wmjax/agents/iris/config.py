"""IRIS's hyperparameters."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wmjax import checks
from wmjax.nets import perceptual, vqgan
from wmjax.types import UsageError


@dataclasses.dataclass(frozen=True)
class IRISConfig:
    """Hyperparameters; the defaults are the paper's (Atari 100k)."""

    # Tokenizer (table 3): (side / (patch 2^(levels - 1)))² tokens per frame.
    vocab_size: int = 512  # entries of the codebook
    embed_dim: int = 512  # size of an entry of the codebook
    latents: int = 512  # channels of the encoder's output
    channels: int = 64  # of the tokenizer's first level
    multipliers: tuple[int, ...] = (1, 1, 1, 1, 1)  # of the channels, one for each level; none: an MLP on each patch
    res_blocks: int = 2  # of each level; layers of the MLP
    attention: tuple[int, ...] = (8, 16)  # sides of the levels that have attention
    patch: int = 1  # side of the patches that tokenizer and actor-critic see first; 1: the paper's convolutions
    commit_scale: float = 1.0  # weight of the commitment loss
    recon_loss: Literal["l1", "delta_iris"] = "l1"  # of the tokenizer
    recon_scale: float = 1.0  # weight of the reconstruction in the tokenizer's loss
    perceptual: Literal["none", "lpips", "random_features", "multiscale"] = "random_features"  # its features
    perceptual_scale: float = 1.0  # weight of the perceptual loss
    lpips_weights: str | None = None  # the file that tools/lpips_to_npz.py writes
    lpips_dropout: float = 0.0  # 0.5 in the official code, by accident

    # Codebook health; none of it in the paper.
    codebook: Literal["gradient", "ema", "ema_cosine"] = "gradient"  # how its entries are learned
    codebook_decay: float = 0.99  # of moving averages
    codebook_reset: float = 0.0  # entries with less than this share of an even use restart at a random latent; 0: never

    # World model (table 4).
    max_blocks: int = 20  # frames in a context
    layers: int = 10  # of the transformer
    heads: int = 4  # of attention
    width: int = 256  # of the transformer
    ff: int | None = None  # width of the MLPs; None: 4 times `width`
    dropout: float = 0.1  # of the transformer
    norm: Literal["pre", "post"] = "pre"  # where the transformer's layers are normalized
    activation: Literal["gelu", "relu"] = "gelu"  # of the feed-forward layers of the transformer
    position_std: float = 0.02  # of the position embeddings at first
    reward_tokens: bool = False  # whether rewards are tokens of the sequence
    world_model_length: int = 20  # frames of a training sequence

    # Actor-critic (tables 5 and 6).
    policy_channels: tuple[int, ...] = (32, 32, 64, 64)  # of the convolutions of actor and critic
    lstm_units: int = 512  # of actor and critic
    burn_in: int = 20  # frames before the start of imagination
    horizon: int = 20  # imagined frames, the start included
    discount: float = 0.995  # of rewards, per agent step
    lambda_: float = 0.95  # of the lambda-returns
    entropy_scale: float = 0.001  # weight of the actor's entropy
    actor_scale: float = 1.0  # weight of the actor in the loss
    critic_scale: float = 1.0  # weight of the critic in the loss

    # Acting.
    epsilon: float = 0.01  # share of uniformly random actions while collecting
    temperature: float = 1.0  # of the policy while collecting
    eval_temperature: float = 0.5  # of the policy when it is evaluated
    eval_action: Literal["sample", "mode"] = "sample"  # how actions come from the policy when it is evaluated

    # Optimizers: Adam, and AdamW for the world model.
    tokenizer_rate: float = 1e-4  # learning rate of the tokenizer
    world_model_rate: float = 1e-4  # learning rate of the transformer
    actor_critic_rate: float = 1e-4  # learning rate of actor and critic
    weight_decay: float = 0.01  # of the transformer's weights
    grad_clip: float = 10.0  # global norm, of each
    beta1: float = 0.9  # of Adam: decay of the first moment
    beta2: float = 0.999  # of Adam: decay of the second moment
    adam_epsilon: float = 1e-8  # of Adam

    # Data and schedule (table 7). An epoch collects, then trains what is due.
    num_envs: int = 1  # environments that are stepped at once
    collect: int = 200  # agent steps per environment and epoch
    tokenizer_updates: int = 200  # per epoch
    world_model_updates: int = 200  # of an epoch
    actor_critic_updates: int = 200  # of an epoch
    tokenizer_batch: int = 256  # frames
    world_model_batch: int = 64  # sequences
    actor_critic_batch: int = 64  # start states of an update of actor and critic
    tokenizer_after: int = 5  # epochs without it
    world_model_after: int = 25  # epochs before the transformer learns
    actor_critic_after: int = 50  # epochs before actor and critic learn
    collect_epochs: int | None = None  # epochs that collect; None: until the run's steps are used up
    final_epochs: int = 0  # epochs of training after them, without collecting
    replay_capacity: int = 100_000  # agent steps that replay holds, over all environments

    # Computation.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of networks; parameters and losses stay float32
    grad_accum: int = 1  # parts of a batch that its gradient is computed in, one after the other
    remat: bool = False  # recompute the transformer's blocks and the tokenizer's levels in the backward pass

    @property
    def downsampling(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.patch * 2 ** max(0, len(self.multipliers) - 1)

    def validate(self) -> None:
        """Raises `UsageError` on the first field that is out of range, or contradicts another."""
        checks.check_ranges(self, RULES)
        if not self.multipliers and self.patch == 1:
            raise UsageError(f"multipliers must be one or more unless patch > 1, got {self.multipliers}")
        if not self.policy_channels:
            raise UsageError(f"policy_channels must be one or more, got {self.policy_channels}")
        if self.width % self.heads:
            raise UsageError(f"width must be a multiple of heads={self.heads}, got {self.width}")
        for level, multiplier in enumerate(self.multipliers):
            if multiplier * self.channels > vqgan.GROUPS and multiplier * self.channels % vqgan.GROUPS:
                raise UsageError(
                    f"channels * multipliers[{level}] must be at most {vqgan.GROUPS} or a multiple of it, "
                    f"got {self.channels} * {multiplier}"
                )
        if self.world_model_length > self.max_blocks:
            raise UsageError(
                f"world_model_length must be in [1, max_blocks={self.max_blocks}]: a sequence has to fit in a context, "
                f"got {self.world_model_length}"
            )
        if not self.tokenizer_after <= self.world_model_after <= self.actor_critic_after:
            raise UsageError(
                "tokenizer_after, world_model_after, actor_critic_after must not decrease, got "
                f"{self.tokenizer_after}, {self.world_model_after}, {self.actor_critic_after}"
            )
        if self.final_epochs and self.collect_epochs is None:
            raise UsageError(f"final_epochs needs collect_epochs, got {self.final_epochs} and None")
        if self.collect_epochs is not None and self.collect_epochs <= self.actor_critic_after:
            raise UsageError(
                f"collect_epochs must be more than actor_critic_after={self.actor_critic_after}, "
                f"got {self.collect_epochs}"
            )
        window = max(self.world_model_length, self.burn_in) + 1
        if self.replay_capacity < self.num_envs * window:
            raise UsageError(
                f"replay_capacity must hold {window} steps for each of the {self.num_envs} environments, "
                f"{self.num_envs * window} in all, got {self.replay_capacity}"
            )
        if self.perceptual == "lpips":
            perceptual.load_lpips(self.lpips_weights)


RULES = (
    checks.rules((lambda x: x >= 2, "2 or more"), "vocab_size max_blocks horizon")
    | checks.rules(checks.POSITIVE, "grad_clip")
    | checks.rules(checks.NOT_NEGATIVE, "weight_decay")
    | checks.rules(checks.FRACTION, "epsilon")
)
