"""Training runs that more than one paper describes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from wmjax.types import Recipe, Sampling, Stage, Update, UsageError


def check_imagination(config: Any) -> None:
    """Raises `UsageError` where imagination cannot start, or returns cannot end, as the configuration has it."""
    if not getattr(config, "bootstrap", True) and config.lambda_ != 1:
        raise UsageError(
            f"bootstrap=False sums rewards without values, which lambda_ would mix in: lambda_ must be 1, "
            f"got {config.lambda_}"
        )
    if config.imagine_last > config.length:
        raise UsageError(f"imagine_last must be in [0, length={config.length}], got {config.imagine_last}")


def check_bursts(config: Any, window: int) -> None:
    """Raises `UsageError` where `bursts` could not be run: collected steps must be whole steps of all environments."""
    num_envs, prefill, rows = config.num_envs, config.prefill, max(config.num_envs, config.batch_size)
    for name, value in (("prefill", prefill), ("train_every", config.train_every)):
        if value % num_envs:
            raise UsageError(f"{name} must be a multiple of num_envs={num_envs}, got {value}")
    if config.replay_capacity < rows * window:
        raise UsageError(
            f"replay_capacity must hold a window of {window} steps for each of {num_envs} environments and "
            f"{config.batch_size} rows of a batch, {rows * window} in all, got {config.replay_capacity}"
        )
    before = prefill + (0 if config.pretrain else config.train_every)
    if before < window * num_envs:
        name = "prefill" if config.pretrain else "prefill + train_every"
        raise UsageError(
            f"{name} must reach a window of {window} steps of each of {num_envs} environments before the first update, "
            f"{window * num_envs} in all, got {before}"
        )


def check_windows(config: Any, window: int) -> None:
    """Raises `UsageError` where replay is too small for a window of every environment, or for one batch."""
    if config.replay_capacity < config.num_envs * window:
        raise UsageError(
            f"replay_capacity must hold a window of length + 1 = {window} steps for each of the {config.num_envs} "
            f"environments, {config.num_envs * window} in all, got {config.replay_capacity}"
        )
    if config.batch_size * config.length > config.replay_capacity:
        raise UsageError(
            f"batch_size * length must be at most replay_capacity={config.replay_capacity}, "
            f"got {config.batch_size} * {config.length}"
        )


def ratio(config: Any) -> tuple[int, int]:
    """Steps to collect per environment and updates to make, per iteration, so that `train_ratio` holds exactly.

    Raises `UsageError` where that would be too many.
    """
    trained = config.batch_size * config.length
    found = Fraction(config.train_ratio).limit_denominator(1024) * config.num_envs / trained
    if not found or found.denominator > 4096:
        raise UsageError(
            f"train_ratio * num_envs / (batch_size * length) must be a simple fraction (updates per step of all "
            f"environments), got {config.train_ratio} * {config.num_envs} / ({config.batch_size} * {config.length})"
        )
    return found.denominator, found.numerator


def bursts(act: Callable, learn: Callable, sampling: Sampling, config: Any) -> Recipe:
    """Random actions, then some updates on them, then acting and learning in turns.

    Args:
      act, learn: as `Agent.act` and `Update.fn`.
      sampling: of every update.
      config: has `num_envs`, `replay_capacity`, `batch_size`, `grad_accum` as in `Recipe` and `Update`; `prefill`,
        agent steps of all environments by random actions, before anything is learned; `pretrain`, updates on these;
        `train_every`, agent steps of all environments between two bursts of updates; `train_steps`, updates of a burst.

    Source: DreamerV1 and DreamerV2, training loops of the authors' code.
    """
    update = lambda repeats: (Update("train", learn, repeats, config.batch_size, sampling, config.grad_accum),)
    stages = [Stage("train", None, config.train_every // config.num_envs, act, update(config.train_steps))]
    if config.pretrain:
        stages.insert(0, Stage("pretrain", 1, 0, act, update(config.pretrain)))
    if config.prefill:
        stages.insert(0, Stage("prefill", config.prefill // config.num_envs, 1, None))
    return Recipe(config.num_envs, config.replay_capacity, tuple(stages))


def by_ratio(act: Callable, learn: Callable, sampling: Sampling, config: Any) -> Recipe:
    """Steps by the policy, then acting and learning in turns, so many trained steps for each that is collected.

    Args:
      act, learn, sampling: as of `bursts`.
      config: has `num_envs`, `replay_capacity`, `batch_size`, `length`, `grad_accum`, and what `ratio` reads; and
        `prefill`, agent steps of all environments before anything is learned: as many, and one window of every
        environment.

    Source: DreamerV3, training loop of the authors' code.
    """
    collect, repeats = ratio(config)
    update = Update("train", learn, repeats, config.batch_size, sampling, config.grad_accum)
    prefill = max(-(-config.prefill // config.num_envs), config.length + 1)
    stages = Stage("prefill", prefill, 1, act), Stage("train", None, collect, act, (update,))
    return Recipe(config.num_envs, config.replay_capacity, stages)
