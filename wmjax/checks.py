"""Bounds of every number, and checks of what users hand over: errors of one line that name the field and what is valid.

There is one table, `BOUNDS`, for the command line, Python and `config.json`; what agents ask of their fields besides is
narrower: `RULES`, by the name of a field, and what an agent's file has instead (`check_ranges`). Bounds from above are
where a number cannot be meant any more: they keep what is made from it while a run is set up small and quick. What then
needs more memory than there is, `loops.memory` refuses.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from wmjax.types import UsageError


class Bounds(NamedTuple):
    """What a number may be: in [low, high], or above `low` where that is `open`; an integer where it is `whole`."""

    low: float
    high: float
    whole: bool = True
    open: bool = False
    why: str = ""  # there is an upper bound

    def __str__(self) -> str:
        if not self.whole:
            return f"a number {'above' if self.open else 'of at least'} {self.low:g}{self.why}"
        return f"an integer in [{self.low}, {'2**31)' if self.high == COUNT else f'{self.high}]'}{self.why}"


COUNT = 2**31 - 1  # what is counted, is counted in int32
LARGEST, SMALLEST = 3.4e38, 1.2e-38  # of float32, in which all else is computed
WIDTH = 2**16  # of a layer, or of one of its axes
LAYERS = 128
ROWS = 2**20  # of a batch, in one step of time
TIME = 100_000  # steps that are computed at once
UPDATES = 10_000_000  # in one compiled loop, which holds a key for each
NAME = 4096  # characters; the name of an environment may be the path of a file
LEVELS = 32  # of values within values, in arguments of an environment
PICTURE = 4096  # pixels of a side; one such picture in RGB takes 50 MB


def _whole(high: int, names: str, low: int = 0, why: str = "") -> dict[str, Bounds]:
    return dict.fromkeys(names.split(), Bounds(low, high, why=why))


BOUNDS: dict[str, Bounds] = (
    # Of a run, its evaluation and its pictures.
    _whole(COUNT, "seed first_seed max_skipped max_restarts eval_every")
    | _whole(COUNT, "steps max_steps", low=1)
    | _whole(4096, "workers", low=1, why=", for each is a process")
    | _whole(10_000, "eval_envs")
    | _whole(10_000, "seeds", low=1, why=", as far as memory reaches, and a folder for each")
    | _whole(10_000, "devices shard_params num_processes", low=1)
    | _whole(10_000, "process_id")
    | _whole(86_400, "coordinator_timeout heartbeat_timeout", low=2, why=" seconds")
    | _whole(1000, "jobs", low=1)
    | _whole(1_000_000, "episodes", low=1)
    | _whole(
        PICTURE, "image_size", low=8, why=f" (a picture of {PICTURE} x {PICTURE} takes {3 * PICTURE**2 / 1e6:.0f} MB)"
    )
    | _whole(1000, "action_repeat", low=1, why=" frames")
    | _whole(TIME, "horizon context", low=1)
    | {"port": Bounds(0, 2**16 - 1)}
    | {"checkpoint_seconds": Bounds(0, math.inf, whole=False)}
    | dict.fromkeys(("peak_tflops", "memory_gb", "bandwidth"), Bounds(0, 1e9, whole=False, open=True))
    | {"share": Bounds(0, 1, whole=False, open=True, why=", at most 1")}
    | dict.fromkeys(("worker_timeout", "start_timeout", "seconds"), Bounds(0, math.inf, whole=False, open=True))
    # Of the agents; lower bounds that depend on the agent are in its file.
    | _whole(
        WIDTH,
        "deter hidden stoch classes depth decoder_depth embed embed_dim units encoder_units blocks bins latent latents "
        "channels policy_channels multipliers vocab_size width ff heads lstm_units controller_units mixtures",
    )
    | _whole(
        LAYERS,
        "vector_layers prior_layers posterior_layers reward_layers cont_layers actor_layers critic_layers layers "
        "res_blocks",
    )
    | _whole(PICTURE, "patch attention encoder_padding")
    | _whole(10, "restarts", why=", for each doubles the population")
    | _whole(
        ROWS,
        "num_envs batch_size tokenizer_batch world_model_batch actor_critic_batch vision_batch_size memory_batch_size "
        "population rollouts mean_rollouts starts candidates elites particles chunk",
    )
    | _whole(TIME, "length imagine_last world_model_length max_blocks burn_in memory_length collect")
    | _whole(
        UPDATES,
        "pretrain train_steps grad_accum tokenizer_updates world_model_updates actor_critic_updates mean_every",
    )
    | _whole(
        COUNT,
        "replay_capacity prefill train_every warmup actor_lr_half_life entropy_half_life exploration_half_life "
        "exploration_updates slow_critic_every tokenizer_after world_model_after actor_critic_after collect_epochs "
        "final_epochs vision_updates memory_updates collect_steps generations",
    )
    | {"train_ratio": Bounds(0, 1e6, whole=False, open=True)}
)


# ---------------------------------------------------------------------------------------------------------------------
# One value


def show(value: Any) -> str:
    """A value as messages show it: in one line, and not all of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # it is the user's own, or an integer of more digits than Python shows
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def invalid(field: str, value: Any, valid: object) -> UsageError:
    """The error for a value that is not `valid`, which says what is."""
    return UsageError(f"{field}: {show(value)} is not valid; {valid} is")


def number(field: str, value: Any, bounds: Bounds | None = None) -> Any:
    """A number as Python's own `int` or `float`. Raises `UsageError` unless it is within its bounds, of `BOUNDS`.

    Numbers of NumPy are taken too, truth values are not.
    """
    bounds = BOUNDS[field] if bounds is None else bounds
    try:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if bounds.whole else numbers.Real):
            raise TypeError
        found = operator.index(value) if bounds.whole else float(value)
    except (TypeError, OverflowError):
        raise invalid(field, value, bounds) from None
    if not bounds.low <= found <= bounds.high or (bounds.open and found == bounds.low):
        raise invalid(field, value, bounds)
    return found


def optional(field: str, value: Any, bounds: Bounds | None = None) -> Any:
    """As `number`; or None."""
    return None if value is None else number(field, value, bounds)


def flag(field: str, value: Any) -> bool:
    """A truth value. Raises `UsageError` for anything else."""
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's too
        raise invalid(field, value, "True or False")
    return bool(value)


def choice(field: str, value: Any, valid: Iterable[str]) -> str:
    """One of some names. Raises `UsageError` for anything else."""
    valid = tuple(valid)
    if not isinstance(value, str) or value not in valid:
        raise invalid(field, value, " or ".join(map(repr, valid)))
    return value


def text(field: str, value: Any) -> str:
    """A name of any kind. Raises `UsageError` unless it is a string of 1 to `NAME` printable characters."""
    if not isinstance(value, str) or not 0 < len(value) <= NAME or not value.isprintable():
        raise invalid(field, value, f"a name of 1 to {NAME} printable characters")
    return value


def path(field: str, value: Any) -> Path:
    """A path, whether something is there or not. Raises `UsageError` where no file could have it."""
    try:
        name = os.fspath(value)
        if not isinstance(name, str) or not name:
            raise TypeError
        name.encode()  # what cannot be printed may not be what is done with a run's last line
        os.lstat(name)
    except (TypeError, ValueError):  # also of a NUL, and of half a character
        raise invalid(field, value, "the path of a file or folder, as text,") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UsageError(f"{field}: {show(name)} is not valid: {error.strerror}") from None
    return Path(name)


def is_deep(value: Any, levels: int = LEVELS) -> bool:
    """Whether mappings and lists lie in others, more than so many levels deep. What walks them could end in that."""
    layer = [value]
    for _ in range(levels + 1):
        inner = [x.values() if isinstance(x, Mapping) else x for x in layer if isinstance(x, Mapping | list | tuple)]
        layer = [part for parts in inner for part in parts]
    return bool(layer)


# ---------------------------------------------------------------------------------------------------------------------
# The fields of a configuration

Rule = tuple[Callable[[Any], bool], str]  # what is valid, as a function and in words

POSITIVE: Rule = (lambda x: x > 0, "positive")
NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")
FRACTION: Rule = (lambda x: 0 <= x <= 1, "in [0, 1]")
BELOW_ONE: Rule = (lambda x: 0 <= x < 1, "in [0, 1)")
PERCENTILE: Rule = (lambda x: 0 <= x <= 100, "in [0, 100]")


def rules(rule: Rule, fields: str) -> dict[str, Rule]:
    """One rule for several fields, whose names are separated by spaces."""
    return dict.fromkeys(fields.split(), rule)


# By the name of a field, of whichever agent; what differs for one of them is in its file.
RULES = (
    rules(
        POSITIVE,
        "deter hidden stoch min_std classes depth decoder_depth embed embed_dim units encoder_units blocks latent "
        "latents channels policy_channels multipliers width ff heads lstm_units mixtures patch attention layers "
        "vector_layers prior_layers posterior_layers res_blocks learning_rate model_lr actor_lr critic_lr "
        "tokenizer_rate world_model_rate actor_critic_rate vision_learning_rate memory_learning_rate epsilon "
        "adam_epsilon clip_limit return_norm_limit temperature eval_temperature done_pos_weight actor_lr_half_life "
        "entropy_half_life exploration_half_life exploration_updates slow_critic_every grad_accum batch_size length "
        "horizon num_envs replay_capacity train_ratio train_every train_steps world_model_length collect "
        "collect_epochs collect_steps tokenizer_updates world_model_updates actor_critic_updates tokenizer_batch "
        "world_model_batch actor_critic_batch vision_batch_size memory_batch_size memory_length sigma_init population "
        "rollouts generations mean_every mean_rollouts starts",
    )
    | rules(
        NOT_NEGATIVE,
        "reward_layers cont_layers actor_layers critic_layers controller_units encoder_padding free_nats "
        "kl_tolerance kl_scale dyn_scale rep_scale beta image_scale vector_scale reward_scale cont_scale "
        "commit_scale recon_scale perceptual_scale actor_scale critic_scale slow_critic_scale replay_critic_scale "
        "entropy_scale exploration exploration_min prediction_penalty forget_bias position_std codebook_reset "
        "memory_final_learning_rate warmup grad_clip imagine_last burn_in prefill pretrain tokenizer_after "
        "world_model_after actor_critic_after final_epochs vision_updates memory_updates restarts",
    )
    | rules(FRACTION, "discount lambda_ actor_grad_mix kl_balance slow_critic_rate return_norm_rate memory_decay")
    | rules(BELOW_ONE, "unimix actor_unimix weight_decay dropout lpips_dropout codebook_decay beta1 beta2")
    | rules(PERCENTILE, "return_norm_low return_norm_high")
)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other type by itself."""
    return hint.__args__ if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


@functools.cache
def _choices(config_class: type) -> dict[str, tuple[list[str], bool]]:
    """Of the fields that say what text they may be (`Literal`): that, and whether they may be other things too."""
    found = {}
    for name, hint in typing.get_type_hints(config_class).items():
        words = [part for part in alternatives(hint) if typing.get_origin(part) is Literal]
        if words:
            found[name] = list(typing.get_args(words[0])), hint not in words
    return found


def check_ranges(config: Any, own: Mapping[str, Rule] = MappingProxyType({})) -> None:
    """Raises `UsageError` on the first field of a dataclass that breaks its rule, or the upper bound of `BOUNDS`.

    The rule is that of `own`, or else of `RULES`; a field in neither has none.

    None is always valid, except where there are choices (`Literal`), of which the value must be one. Each entry of a
    tuple must be valid, and there are at most `LAYERS`. Numbers other than integers must be ones of float32: neither
    infinite nor too small to be told from 0.
    """
    choices, table = _choices(type(config)), RULES | dict(own)
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), table.get(field.name)
        words, more = choices.get(field.name, ((), True))
        if not (value in words if isinstance(value, str) and words else more):
            raise invalid(field.name, value, f"one of {', '.join(words)}")
        entries = value if isinstance(value, tuple) else (value,)
        if len(entries) > LAYERS:
            raise UsageError(f"{field.name} must have at most {LAYERS} entries, got {len(entries)}")
        for entry in entries:
            is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
            if rule and not (entry is None or isinstance(entry, str)) and not (is_number and rule[0](entry)):
                raise UsageError(f"{field.name} must be {rule[1]}, got {show(value)}")
            if is_number:
                _check_size(field.name, entry, value)


def _check_size(name: str, entry: int | float, value: Any) -> None:
    whole = isinstance(entry, int)
    most = BOUNDS[name].high if name in BOUNDS else COUNT if whole else LARGEST
    if not abs(entry) <= most:  # also what is not a number
        bound = "below 2**31" if most == COUNT else f"at most {most:,}" if whole else f"a number of at most {most:g}"
        raise UsageError(f"{name} must be {bound}, got {show(value)}")
    if entry and abs(entry) < SMALLEST:
        raise UsageError(f"{name} must be at least {SMALLEST:g} in size, or it is 0 in float32, got {show(value)}")


def check_episodes(length: int, max_episode_steps: int | None) -> None:
    """Raises `UsageError` where no episode of an environment could hold a training sequence of `length` steps."""
    if max_episode_steps is not None and length > max_episode_steps + 1:
        raise UsageError(
            f"within_episode needs episodes of at least length={length} steps, but the environment's have at most "
            f"{max_episode_steps + 1} with the first; a shorter length or within_episode=False is valid"
        )
