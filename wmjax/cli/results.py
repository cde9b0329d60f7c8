"""`wmjax eval`, `wmjax dream`, `wmjax plot`: what came of runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmjax.cli.arguments import DreamArgs, EvalArgs, PlotArgs, env_args, parse
from wmjax.types import UsageError


def _load(args: EvalArgs | DreamArgs, env: str | None = None, env_args: dict[str, Any] | None = None) -> Any:
    from wmjax.run import load

    how = dict(which=args.which, start_timeout=args.start_timeout, trust_env=args.trust_env)
    return load(args.run, env=env, env_args=env_args, **how)


def _load_to_play(args: EvalArgs) -> tuple[Any, Any]:
    """The run, and another environment for it if one is named.

    Where the run's own is of no use without the user's word, the one that is named stands for it.
    """
    from wmjax.envs.handed import source_of
    from wmjax.folder import read_description
    from wmjax.settings import other_env

    given = env_args(args.env_arg)
    if args.env is None:
        return _load(args, env_args=given), None
    own = read_description(args.run)["env"]
    if not args.trust_env and (own is None or source_of(own) is not None):
        return _load(args, args.env, given), None
    run = _load(args)
    return run, other_env(run.description, args.env, given, start_timeout=args.start_timeout)


def evaluate(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.scores import keep

    args = parse(EvalArgs, argv, "wmjax eval")
    run, where = _load_to_play(args)
    if args.video:
        figures.pictures(run.env.spec)
    how = {"action": args.action, "max_steps": args.max_steps}
    scores = run.evaluate(args.episodes, args.seed, env=where, eval_envs=args.eval_envs, **how)
    records = run.records(scores, args.seed, env=args.env, env_args=env_args(args.env_arg), **how)
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
    written += run.write_episode(args.seed, env=where, action=args.action) if args.video else []
    if written:
        print(f"wrote {' and '.join(map(str, written))}", file=sys.stderr if args.json else sys.stdout)


def _print_scores(run: Any, scores: Any, found: dict[str, Any]) -> None:
    what = f"{run.description['agent']} on {found['env']}"
    print(
        f"{what}, {found['which']} checkpoint, step {found['step']:,}; seed {found['seed']}, action {found['action']}"
    )
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


def dream(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.folder import write_json
    from wmjax.loops.driver import evaluation_key

    args = parse(DreamArgs, argv, "wmjax dream")
    run = _load(args)
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


def plot(argv: Sequence[str]) -> None:
    from wmjax import figures
    from wmjax.folder import members, read_description

    args = parse(PlotArgs, argv, "wmjax plot")
    if not args.runs:
        raise UsageError("runs: missing; give at least one run folder")
    out, named = None if args.out is None else figures.picture_path(args.out), []
    for path in args.runs:
        d = read_description(path)
        label = f"{d['agent']} {d['env'] or 'env'} {d['preset']}"
        named += [(label, folder) for folder in members(path, d).values() or [path]]
    evolved = [bool(figures.fitness_curves(folder)) for _, folder in named]
    if any(evolved) and not all(evolved):
        apart = [str(named[evolved.index(kind)][1]) for kind in (True, False)]
        raise UsageError(f"runs: {apart[0]!r} has fitness over generations, {apart[1]!r} has not; draw them apart")
    name, draw = ("fitness_curve.png", figures.plot_fitness_curves) if all(evolved) else (
        "learning_curve.png", figures.plot_learning_curves
    )  # fmt: skip
    out = out or (args.runs[0] if len(args.runs) == 1 else Path()) / name
    print(f"wrote {draw(out, named)}")
