"""The `wmjax` command. It reads arguments, calls `wmjax.run` and `wmjax.figures`, and says what was written where.

Whatever a user gets wrong is a `UsageError`, shown as one line on standard error; the exit code is then 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import wmjax
from wmjax.types import RunError, UsageError

HELP = """\
World models in JAX: train agents, evaluate them, look at their dreams.

wmjax train AGENT [--env NAME] [--preset NAME] [--seed N] [--seeds N] [--steps N] [--devices N]
                  [--parallel shard_map|pmap] [--image-size N] [--action-repeat N] [--eval-every N]
                  [--checkpoint-seconds S] [--max-skipped N] [--workers N] [--worker-timeout S] [--max-restarts N]
                  [--memory-map] [--wandb PROJECT] [--out DIR] [--resume] [--agent.FIELD VALUE ...]
wmjax eval  RUN   [--episodes N] [--seed N] [--env NAME] [--action sample|mode] [--which latest|best] [--json] [--video]
wmjax dream RUN   [--context N] [--horizon N] [--which latest|best]
wmjax plot  RUN...  [--out FILE.png]
wmjax list  agents|envs|presets
wmjax --version

`wmjax COMMAND --help` explains a command, `wmjax train AGENT --help` the fields of an agent with the preset's values.
Compiled programs are kept in the user's cache folder; the variable WMJAX_CACHE names another, or turns that `off`."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train an agent into a run folder."""

    env: str | None = None
    """Environment, see `wmjax list envs`; the agent's own example by default."""
    preset: str | None = None
    """Configuration, see `wmjax list presets`; small by default."""
    seed: int | None = None
    """Of everything that training draws; 0 by default."""
    seeds: int | None = None
    """How many seeds to train at once, in one program, from --seed upwards; 1 by default. Not for environments on the
    host, and nor is --devices."""
    steps: int | None = None
    """Env steps (frames) to train for; the preset's by default. A run may be resumed with more."""
    devices: int | None = None
    """How many devices to spread environments, replay and batches over; 1 by default."""
    parallel: Literal["shard_map", "pmap"] | None = None
    """How to spread over devices; shard_map by default."""
    eval_every: int | None = None
    """Env steps between evaluations of 16 episodes; a tenth of the steps by default."""
    checkpoint_seconds: float = 180.0
    """Least time between two checkpoints."""
    max_skipped: int = 100
    """Updates in a row that may be skipped because their loss or gradient is not finite."""
    image_size: int | None = None
    """Side of the pictures in pixels; the preset's by default."""
    action_repeat: int | None = None
    """Steps of the environment that each action is taken for; the preset's by default."""
    workers: int | None = None
    """Processes that step environments on the host; one per processor by default."""
    worker_timeout: float = 60.0
    """Seconds for a step, after which a worker counts as hanging and is replaced."""
    max_restarts: int = 10
    """Environments that may be lost within an hour before the run stops, with everything saved."""
    wandb: str | None = None
    """A project of Weights & Biases to send metrics to as well."""
    memory_map: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read replay from its files instead of keeping it in memory; it may then be larger than memory."""
    out: Path | None = None
    """Run folder; by default a new one in runs/."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in --out. Settings that are not given stay as they are; those that keep the shapes of its
    state may change."""


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Play fresh episodes with a trained agent; scores go to the run's eval.json."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    episodes: int = 100
    """How many."""
    seed: int = 0
    """The same seed gives the same episodes."""
    env: str | None = None
    """Another environment with the same observations and actions."""
    action: Literal["sample", "mode"] | None = None
    """How actions come from the policy; what the agent's configuration says by default."""
    which: Literal["latest", "best"] = "latest"
    """The agent as it was saved last, or at the highest of the periodic evaluations."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object: mean, std, iqm, ci95 (of the IQM), episodes, returns."""
    video: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write an episode as episode.gif, too: at most 1000 steps of it."""


@dataclasses.dataclass(frozen=True)
class DreamArgs:
    """Let the world model predict what it does not see: truth, model and error as dream.gif, error as dream.json.

    Reconstructions of what it does see are in reconstructions.png, each below its original.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    context: int = 5
    """Steps that the model sees."""
    horizon: int = 15
    """Steps that it predicts from the actions alone."""
    which: Literal["latest", "best"] = "latest"
    """The agent as it was saved last, or at the highest of the periodic evaluations."""


@dataclasses.dataclass(frozen=True)
class PlotArgs:
    """Draw learning curves: mean and 95% interval over the seeds of each agent, environment and preset.

    Of runs that evolve a controller: fitness over generations, of the best candidate, of all, and of the mean.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run folders."""
    out: Path | None = None
    """Picture; by default learning_curve.png or fitness_curve.png in the run's folder, or here for several runs."""


@dataclasses.dataclass(frozen=True)
class ListArgs:
    """List what there is to choose from."""

    what: tyro.conf.Positional[Literal["agents", "envs", "presets"]]
    """Of what."""


def parse(args_class: Any, argv: Sequence[str], prog: str, default: Any = None) -> Any:
    """Parses arguments into a dataclass. Whatever is wrong with them becomes a `UsageError` of one line."""
    _check_flags(args_class, argv)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_class, prog=prog, args=list(argv), default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None


def _one_line(box: str) -> str:
    """What is wrong, out of tyro's box of a title, what is wrong, and help texts, with rules between them."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │╭╮╰╯") for line in plain.splitlines() if line.strip()]
    words: list[str] = []
    for line in lines[1:]:  # the first has the title
        if not line.strip("─-"):
            if words:
                break
        else:
            words.append(line)
    return " ".join(" ".join(words).split()) or "arguments are not valid"


def _flags(args_class: Any, prefix: str = "--") -> list[str]:
    flags = []
    hints = typing.get_type_hints(args_class, include_extras=True)
    for field in dataclasses.fields(args_class):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(inner):
            flags += _flags(inner, f"{prefix}{field.name}.")
        elif tyro.conf.Positional[int].__metadata__[0] not in getattr(hint, "__metadata__", ()):
            # As messages spell them: options with hyphens, fields of an agent as in Python. Either is understood.
            flags.append(prefix + (field.name.replace("_", "-") if prefix == "--" else field.name))
    return flags


def _check_flags(args_class: Any, argv: Sequence[str]) -> None:
    valid = [*_flags(args_class), "--help"]
    spell = lambda flag: flag.replace("_", "-")
    for token in argv:
        flag = token.partition("=")[0]
        if flag.startswith("--") and spell(flag) not in map(spell, valid):
            near = difflib.get_close_matches(flag, valid, 1, cutoff=0.5)
            raise UsageError(f"{flag}: unknown option; " + (f"did you mean {near[0]}?" if near else "see --help"))


def _value_of(flag: str, argv: Sequence[str], default: str | None) -> str | None:
    """The value of an option, before the arguments can be parsed as a whole."""
    for token, following in zip(argv, [*argv, default][1:], strict=True):
        if token == flag:
            default = following
        elif token.startswith(flag + "="):
            default = token.partition("=")[2]
    return default


def _split_agent(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The first argument that is neither an option nor an option's value, and the rest."""
    position = 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("-"):
            return token, [*argv[:position], *argv[position + 1 :]]
        position += 1 if "=" in token or token in ("--resume", "--memory-map", "--help", "-h") else 2
    return None, list(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _train(argv: Sequence[str]) -> None:
    from wmjax import presets

    agent, argv = _split_agent(argv)
    if agent is None:
        if {"-h", "--help"} & set(argv):
            parse(TrainArgs, argv, "wmjax train AGENT")
        raise UsageError(f"agent: missing; valid are {', '.join(presets.AGENTS)}")
    config = _config_to_start_from(agent, argv)
    # Every field takes a value, switches too; the preset's are shown as defaults.
    fields = Annotated[type(config), tyro.conf.FlagConversionOff]
    args_class = dataclasses.make_dataclass(
        "TrainAgentArgs", [("agent", fields, config)], bases=(TrainArgs,), frozen=True
    )
    args_class.__doc__ = TrainArgs.__doc__
    args = parse(args_class, argv, f"wmjax train {agent}")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    chosen = {
        field.name: getattr(args.agent, field.name)
        for field in dataclasses.fields(config)
        if getattr(args.agent, field.name) != getattr(config, field.name)
    }
    _say_cache()
    from wmjax.run import train

    train(agent, **values, **chosen)


def _config_to_start_from(agent: str, argv: Sequence[str]) -> Any:
    """What the fields of the agent are where they are not given."""
    from wmjax import presets

    preset, out, before = _value_of("--preset", argv, None), _value_of("--out", argv, None), {}
    if preset is None and out is not None and "--resume" in argv:
        from wmjax.folder import read_description

        before = read_description(out)
    return presets.starting_config(agent, preset, before if before.get("agent") == agent else {})


def _say_cache() -> None:
    from wmjax.cache import enable_compilation_cache

    folder = enable_compilation_cache()
    print(f"compilation cache {folder}" if folder else "compilation cache off", flush=True)


def _load(path: Path, which: str) -> Any:
    from wmjax.cache import enable_compilation_cache
    from wmjax.run import load

    enable_compilation_cache()
    return load(path, which=which)


def _eval(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.folder import EVAL, write_json
    from wmjax.scores import with_human_normalized

    args = parse(EvalArgs, argv, "wmjax eval")
    run = _load(args.run, args.which)
    if args.video:
        figures.pictures(run.env.spec)
    scores = run.evaluate(args.episodes, args.seed, env=args.env, action=args.action)
    name = args.env or run.description["env"]
    found = with_human_normalized(scores, name)
    write_json(run.path / EVAL, found | {"seed": args.seed, "env": name, "action": args.action})
    if args.json:
        print(json.dumps(found))
    else:
        what = f"{run.description['agent']} on {name}"
        for seed, own in (scores.seeds or {}).items():
            print(f"{what}, seed {seed}, {_score_line(own)}")
        print(f"{what}{', all seeds' if scores.seeds else ''}, {_score_line(scores)}")
        if "human_normalized" in found:
            print(f"human-normalized mean {found['human_normalized']:.3f} (0 random, 1 human)")
    written = [run.path / EVAL, *(run.write_episode(args.seed, env=args.env, action=args.action) if args.video else [])]
    print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr if args.json else sys.stdout)


def _score_line(scores: Any) -> str:
    low, high = scores.ci95
    spread = f"std {scores.std:.3f}, IQM {scores.iqm:.3f} [{low:.3f}, {high:.3f}]"
    return f"{scores.episodes} episodes: mean return {scores.mean:.3f}, {spread}"


def _dream(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.folder import write_json
    from wmjax.loops.driver import evaluation_key

    args = parse(DreamArgs, argv, "wmjax dream")
    run = _load(args.run, args.which)
    run = run.members[0] if run.members else run  # of several seeds, the first
    result = figures.open_loop(run.agent, run.env, run.state.params, evaluation_key(0), args.context, args.horizon)
    errors = figures.horizon_errors(result, args.context)
    seen = figures.reconstruction_errors(result, args.context)
    about = {"context": args.context, "horizon": args.horizon, "reconstruction": seen}
    write_json(run.path / "dream.json", about | errors)
    written = [run.path / "dream.json"]
    images = [name for name, x in result.truth.items() if x.dtype == "uint8" and x.ndim == 5]
    for name in images:
        suffix = figures.suffix(name, images)
        gif, grid = run.path / f"dream{suffix}.gif", run.path / f"reconstructions{suffix}.png"
        figures.write_dream_gif(gif, result, args.context, name)
        figures.write_reconstructions(grid, result, args.context, name)
        written = [gif, grid, *written]
    for name, error in seen.items():
        print(f"{name}, error of the reconstruction: {error:.5f}")
    for name in errors.keys() - {"count"}:
        for kind, values in errors[name].items():
            known = [value for value in values if value is not None][:8]
            print(f"{name}, error of {kind} at horizons 1 to {len(known)}: {' '.join(f'{v:.5f}' for v in known)}")
    print(f"wrote {' and '.join(map(str, written))}")


def _plot(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.folder import members, read_description

    args = parse(PlotArgs, argv, "wmjax plot")
    if not args.runs:
        raise UsageError("runs: missing; give at least one run folder")
    named = []
    for path in args.runs:
        d = read_description(path)
        label = f"{d['agent']} {d['env'] or 'env'} {d['preset']}"
        named += [(label, folder) for folder in members(path, d).values() or [path]]
    evolved = [bool(figures.fitness_curves(folder)) for _, folder in named]
    if any(evolved) and not all(evolved):
        apart = [str(named[evolved.index(kind)][1]) for kind in (True, False)]
        raise UsageError(f"runs: {apart[0]!r} has fitness over generations, {apart[1]!r} has not; draw them apart")
    name, plot = ("fitness_curve.png", figures.plot_fitness_curves) if all(evolved) else (
        "learning_curve.png", figures.plot_learning_curves
    )  # fmt: skip
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / name
    plot(out, named)
    print(f"wrote {out}")


def _list(argv: Sequence[str]) -> None:
    what = parse(ListArgs, argv, "wmjax list").what
    rows: list[tuple[str, ...]]
    if what == "envs":
        from wmjax.envs import env_names

        rows = [tuple(info) for info in env_names()]
    elif what == "agents":
        from wmjax.agents import AGENTS

        rows = [
            (name, sys.modules[factory.__module__].__doc__.splitlines()[0]) for name, (_, factory) in AGENTS.items()
        ]
    else:
        from wmjax.presets import PRESET_NOTES, PRESETS

        rows = [(agent, name, PRESET_NOTES[name]) for agent, table in PRESETS.items() for name in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows)} {what}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "dream": _dream,
    "plot": _plot,
    "list": _list,
}


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] == "--version":
        print(f"wmjax {wmjax.__version__}")
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"command: unknown {argv[0]!r}; {hint}valid are {', '.join(COMMANDS)}")


def _fail(text: object) -> None:
    print("wmjax: error: " + " ".join(str(text).split()), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0; 1 a run that cannot go on; 2 a user's error; 130, 143 interrupted."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as it should be
    try:
        _dispatch(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        _fail(error)
        return 2
    except SystemExit as end:  # help was asked for
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt as stop:
        print(f"wmjax: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "signum", 2)
    except BrokenPipeError:  # as in `wmjax list envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RunError, OSError) as error:  # OSError: a disk that is full or gone
        _fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
