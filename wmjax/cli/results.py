"""`wmjax eval`, `wmjax dream`, `wmjax record`, `wmjax export`, `wmjax import`, `wmjax plot`: what came of runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmjax.cli.arguments import (
    DreamArgs,
    EvalArgs,
    ExportArgs,
    ImportArgs,
    PlayArgs,
    PlotArgs,
    RecordArgs,
    changes,
    env_args,
    explain,
    parse,
    parse_with_fields,
    parse_with_planner,
    split_agent,
    value_of,
)
from wmjax.cli.output import say
from wmjax.types import UsageError


def load_to_play(args: EvalArgs | DreamArgs | PlayArgs) -> tuple[Any, Any, str | None]:
    """The run, and another environment for it and its name if one is named.

    The run's own, named by the user, has the run's arguments. Where it is of no use without the user's word, another
    one that is named stands for it.
    """
    from wmjax.envs.handed import handed, source_of
    from wmjax.run import load
    from wmjax.settings import other_env
    from wmjax.weights import description_of

    given, timeout = env_args(args.env_arg), args.start_timeout
    read = lambda **env: load(args.run, which=args.which, start_timeout=timeout, trust_env=args.trust_env, **env)
    if args.env is None:
        return read(env_args=given), None, None
    description = description_of(args.run)
    own = description["env"]
    if own is not None and _same(own, args.env, handed(args.env).name):
        return read(env=args.env, env_args=given), None, None
    where = lambda description: other_env(description, args.env, given, start_timeout=timeout)
    if not args.trust_env and (own is None or source_of(own) is not None):
        return read(env=where(description)), None, args.env
    run = read()
    return run, where(run.description), args.env


def _same(own: str, *names: str) -> bool:
    """Whether one of the names is the environment's own; also that of its class or function in another module or file.

    A file may have been moved, and what was imported as a module may be named by its file.
    """
    from wmjax.envs.handed import source_of

    last = lambda name: name.rpartition(":")[2]
    return own in names or any(source_of(own) and source_of(name) and last(name) == last(own) for name in names)


def evaluate(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.scores import keep

    args, planner = parse_with_planner(EvalArgs, argv, "wmjax eval")
    run, where, named = load_to_play(args)
    if planner is not None:
        run = run.with_policy(planner)
    if args.video:
        figures.with_pictures(run.playing(args.seed, where, args.action)[1])  # before all is played
    how = {"action": args.action, "max_steps": args.max_steps}
    scores = run.evaluate(args.episodes, args.seed, env=where, eval_envs=args.eval_envs, **how)
    records = run.records(scores, args.seed, env=named, env_args=env_args(args.env_arg), **how)
    found = records[run.path]
    if args.json:
        print(json.dumps(found), flush=True)
    else:
        _print_scores(run, scores, found)
    written = []
    try:
        written = keep(records)
    except OSError as error:  # the scores are shown: what is lost is the file
        print(f"wmjax: warning: the scores cannot be kept in {str(run.path)!r} ({error.strerror})", file=sys.stderr)
    written += run.write_episode(args.seed, env=where, action=args.action, title=run.title(named)) if args.video else []
    if written:
        print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr if args.json else sys.stdout)


def _print_scores(run: Any, scores: Any, found: dict[str, Any]) -> None:
    what = f"{run.description['agent']} on {found['env']}"
    how = f"policy {found['policy']}" if "policy" in found else f"action {found['action']}"
    print(f"{what}, {found['which']} checkpoint, step {found['step']:,}; seed {found['seed']}, {how}")
    for seed, own in (scores.seeds or {}).items():
        print(f"{what}, seed {seed}, {_score_line(own)}")
    print(f"{what}{', all seeds' if scores.seeds else ''}, {_score_line(scores)}", flush=True)
    if line := scores.cut_line():
        print(line)
    if "human_normalized" in found:
        print(f"human-normalized mean {found['human_normalized']:.3f} (0 random, 1 human)", flush=True)


def _score_line(scores: Any) -> str:
    low, high = scores.ci95
    spread = f"std {scores.std:.3f}, IQM {scores.iqm:.3f} [{low:.3f}, {high:.3f}]"
    return f"{scores.episodes} episodes: mean return {scores.mean:.3f}, {spread}"


def record(argv: Sequence[str]) -> None:
    args = parse(RecordArgs, argv, "wmjax record")
    if args.out is None:
        raise UsageError("out: missing; the folder to write to, --out FOLDER")
    from wmjax.loops.signals import as_interrupts
    from wmjax.recording import record as write

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(RecordArgs)}
    given["env_args"] = env_args(given.pop("env_arg")) or None
    with as_interrupts():
        write(**given, say=print)


def dream(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.files import own_folder
    from wmjax.loops.driver import evaluation_key
    from wmjax.run_folder import write_json

    args = parse(DreamArgs, argv, "wmjax dream")
    run, where, named = load_to_play(args)
    if run.members:  # of several seeds, the first
        run = run.members[0]
        own_folder(run.path)
    _, env = run.playing(0, where, None)
    result = figures.open_loop(run.agent, env, run.state.variables, evaluation_key(0), args.context, args.horizon)
    context, horizon = result.context, result.horizon
    errors = figures.horizon_errors(result, context)
    seen = figures.reconstruction_errors(result, context)
    title = run.title(named)
    # Before anything is written, for that may fail.
    say(f"{title}: windows of {context} steps seen and {horizon} predicted")
    for name, error in seen.items():
        say(f"{name}, error of the reconstruction: {error:.5f}")
    for name in (name for name in errors if name != "count"):
        for kind, values in errors[name].items():
            known = [value for value in values if value is not None][:8]
            say(f"{name}, error of {kind} at horizons 1 to {len(known)}: {' '.join(f'{v:.5f}' for v in known)}")
    run.path.mkdir(exist_ok=True)  # of a file it is not there yet
    write_json(run.path / "dream.json", {"context": context, "horizon": horizon, "reconstruction": seen} | errors)
    written = [run.path / "dream.json"]
    if errors.keys() > {"count"}:  # choices have no such error
        written.insert(0, figures.plot_horizon_errors(run.path / "dream.png", errors, context, title))
    images = [name for name, x in result.truth.items() if x.dtype == "uint8" and x.ndim == 5]
    for name in images:
        suffix = figures.suffix(name, images)
        gif, grid = run.path / f"dream{suffix}.gif", run.path / f"reconstructions{suffix}.png"
        written = [*figures.write_dream_gif(gif, result, context, name, title), grid, *written]
        figures.write_reconstructions(grid, result, context, name, title)
    print(f"wrote {' and '.join(map(str, written))}")


def export(argv: Sequence[str]) -> None:
    from wmjax.exporting import export as write
    from wmjax.loops.memory import amount

    args = parse(ExportArgs, argv, "wmjax export")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(ExportArgs)}
    given["env_args"], file = env_args(given.pop("env_arg")) or None, given.pop("file")
    steps = {name: given.pop(name) for name in ("onnx", "stablehlo")}
    if file is None and not any(steps.values()):
        raise UsageError(
            "file: missing; the file to write, such as agent.safetensors, or --onnx or --stablehlo with another one"
        )
    if any(steps.values()):
        _check_step_files(args, steps, file)
    if file is not None:
        card = write(given["run"], file, **{name: value for name, value in given.items() if name != "run"})
        if card["return"] is not None:
            print(f"return {card['return']['mean']:.3f} over {card['return']['episodes']} episodes")
        parameters = f"{card['parameters']:,} parameters of {card['dtype']}"
        print(f"wrote {file}: {parameters}, {amount(file.stat().st_size)}; digest {card['digest']}", flush=True)
    if any(steps.values()):
        from wmjax.dream_step.comparing import STEPS
        from wmjax.dream_step.writing import export_step

        for name in ("dtype", "action", "episodes"):  # of the file of parameters
            given.pop(name)
        found = export_step(given.pop("run"), **steps, **given)
        for name, why in found["left_out"].items():
            print(f"left out: {name}, for {why}")
        for name, path in ((name, path) for name, path in steps.items() if path is not None):
            size, difference = amount(found[name]["bytes"]), found[name]["difference"]
            print(f"wrote {path} and {path.with_suffix('.json')}: one step of the dream, {size}; in {STEPS} steps "
                  f"{difference:.1e} from JAX at most")  # fmt: skip


def _check_step_files(args: ExportArgs, steps: dict[str, Path | None], file: Path | None) -> None:
    from wmjax.dream_step.writing import step_files
    from wmjax.exporting import new_file

    step_files(**steps)
    if file is not None:
        new_file(file)
        return
    for name, default in (("dtype", "float32"), ("action", None), ("episodes", None)):
        if getattr(args, name) != default:
            raise UsageError(f"{name}: is of FILE.safetensors, which is not asked for; leave it out")


def import_weights(argv: Sequence[str]) -> None:
    from wmjax import presets
    from wmjax.importing import LAYOUTS
    from wmjax.importing import import_weights as write
    from wmjax.names import nearest

    agent, argv = split_agent(argv, ImportArgs)
    if agent is None:
        explain(ImportArgs, argv, "wmjax import", list(LAYOUTS))
        raise UsageError(f"agent: missing; valid are {', '.join(LAYOUTS)}")
    if agent not in LAYOUTS:
        raise nearest("agent", agent, LAYOUTS)
    preset = value_of("--preset", argv)
    config, _ = presets.resolve(agent, LAYOUTS[agent].PRESET if preset is None else preset)
    args = parse_with_fields(ImportArgs, config, argv, f"wmjax import {agent}")
    if args.path is None:
        raise UsageError("path: missing; what the authors have saved")
    if args.out is None:
        raise UsageError("out: missing; the run folder to write, --out RUN")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(ImportArgs)}
    given["env_args"] = env_args(given.pop("env_arg")) or None
    origin = write(agent, **given, say=print, **changes(config, args.agent))
    print(f"wrote {args.out}: {origin['parameters']:,} parameters; digest {origin['digest']}")


def plot(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.comparison.results import label_of
    from wmjax.run_folder import members, read_description
    from wmjax.weights import locate

    args = parse(PlotArgs, argv, "wmjax plot")
    if not args.runs:
        raise UsageError("runs: missing; give at least one run folder")
    for path in args.runs:
        if locate(path) is not None:
            raise UsageError(f"runs: {str(path)!r} holds an agent and no curves; a run folder is valid")
    out, runs = None if args.out is None else figures.picture_path(args.out), []
    found = {path: read_description(path) for path in args.runs}
    for path, d in found.items():
        label = label_of(d, found.values())
        runs += [figures.Labelled(label, folder, d["env"] or "env") for folder in members(path, d).values() or [path]]
    quiet = lambda text: None  # what is damaged is said where it is drawn
    evolved = all(figures.fitness_curves(run.folder, say=quiet) for run in runs)
    name, draw = ("fitness_curve.png", figures.plot_fitness_curves) if evolved else (
        "learning_curve.png", figures.plot_learning_curves
    )  # fmt: skip
    out = out or (args.runs[0] if len(args.runs) == 1 else Path()) / name
    print(f"wrote {draw(out, runs)}")
