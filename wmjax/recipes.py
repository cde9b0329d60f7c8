"""Training runs that more than one paper describes."""

from __future__ import annotations

from collections.abc import Callable

from wmjax.types import Recipe, Sampling, Stage, Update, UsageError


def check_bursts(
    num_envs: int, prefill: int, pretrain: int, train_every: int, batch_size: int, replay_capacity: int, window: int
) -> None:
    """Raises `UsageError` where `bursts` could not be run: collected steps must be whole steps of all environments."""
    for name, value in (("prefill", prefill), ("train_every", train_every)):
        if value % num_envs:
            raise UsageError(f"{name} must be a multiple of num_envs={num_envs}, got {value}")
    if replay_capacity < max(num_envs, batch_size) * window:
        raise UsageError(
            f"replay_capacity must hold a window of {window} steps for each of {num_envs} environments and "
            f"{batch_size} rows of a batch, {max(num_envs, batch_size) * window} in all, got {replay_capacity}"
        )
    before = prefill + (0 if pretrain else train_every)
    if before < window * num_envs:
        name = "prefill" if pretrain else "prefill + train_every"
        raise UsageError(
            f"{name} must reach a window of {window} steps of each of {num_envs} environments before the first update, "
            f"{window * num_envs} in all, got {before}"
        )


def bursts(
    act: Callable,
    learn: Callable,
    sampling: Sampling,
    *,
    num_envs: int,
    replay_capacity: int,
    batch_size: int,
    prefill: int,
    pretrain: int,
    train_every: int,
    train_steps: int,
) -> Recipe:
    """Random actions, then some updates on them, then acting and learning in turns.

    Args:
      act, learn: as `Agent.act` and `Update.fn`.
      sampling: of every update.
      num_envs, replay_capacity, batch_size: as in `Recipe` and `Update`.
      prefill: agent steps of all environments by random actions, before anything is learned.
      pretrain: updates on these.
      train_every: agent steps of all environments between two bursts of updates.
      train_steps: updates of a burst.

    Source: DreamerV1 and DreamerV2, training loops of the authors' code.
    """
    update = lambda repeats: (Update("train", learn, repeats, batch_size, sampling),)
    stages = []
    if prefill:
        stages.append(Stage("prefill", prefill // num_envs, 1, None))
    if pretrain:
        stages.append(Stage("pretrain", 1, 0, act, update(pretrain)))
    stages.append(Stage("train", None, train_every // num_envs, act, update(train_steps)))
    return Recipe(num_envs, replay_capacity, tuple(stages))
