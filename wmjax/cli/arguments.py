"""What the commands take: the arguments of each, and how they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wmjax import checks
from wmjax.cards import SHARE
from wmjax.names import did_you_mean, meant
from wmjax.types import UsageError

HELP = {"-h", "--help"}
PLANNERS = ("cem", "icem", "mppi", "gradient")  # of `wmjax.planning`, which is slow to import
# Of `wmjax.distributed`, which is slow to import: what connects a process to others, and who is asked for that.
CONNECTING = (
    "coordinator", "num_processes", "process_id", "distributed", "coordinator_timeout", "heartbeat_timeout"
)  # fmt: skip
DETECTED = ("auto", "slurm", "ompi", "mpi4py", "k8s")

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
# Names and values, as they are typed.
EnvArgs = Annotated[tuple[tuple[str, str], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME VALUE")]


def unless_given(default: str, metavar: str = "INT") -> Any:
    """What help says of an option that is None where it is not given."""
    hint = lambda value: f"(default: {default if value == 'None' else value})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def told(kind: Any, words: str, **how: Any) -> Any:
    """An option that several commands take, with what help says of it."""
    return Annotated[kind, tyro.conf.arg(help=words, **how)]


RunFolder = told(tyro.conf.Positional[Path], "Run folder, a file of `wmjax export`, or pretrained:NAME.", metavar="RUN")
OtherEnv = told(str | None, "Another environment with the same observations and actions.")
OtherArgs = told(EnvArgs, "An argument of the environment that differs from the run's; may be given again for others.")
Start = told(float | None, "Seconds for a worker to make its environments and begin episodes; 120 by default.")
Trust = told(Switch, "Run the code that config.json names as the environment's, though it is not installed.")
Which = told(
    Literal["latest", "best"], "The agent as it was saved last, or at the highest of the periodic evaluations."
)


@dataclasses.dataclass(frozen=True)
class SetupArgs:
    """What a run's state and programs follow from, where it is trained and where it is planned."""

    env: Annotated[str | None, unless_given("the agent's own example", "NAME")] = None
    """Environment, see `wmjax list envs`."""
    preset: Annotated[str | None, unless_given("small", "NAME")] = None
    """Configuration, see `wmjax list presets`."""
    seeds: Annotated[int | None, unless_given("1")] = None
    """How many to train at once, from the run's seed upwards. Not for environments on the host."""
    steps: Annotated[int | None, unless_given("the preset's")] = None
    """Env steps (frames, and one more for each episode that begins) to train for. A run may be resumed with more."""
    devices: Annotated[int | None, unless_given("1; of several processes all")] = None
    """How many devices to spread environments, replay and batches over."""
    shard_params: Annotated[int | None, unless_given("1")] = None
    """Over how many of them to spread parameters and optimizers' states, too; 1: each has all of them."""
    image_size: Annotated[int | None, unless_given("the preset's, or the environment's")] = None
    """Side of the pictures in pixels."""
    action_repeat: Annotated[int | None, unless_given("the preset's")] = None
    """Steps of the environment that each action is taken for."""
    env_arg: EnvArgs = ()
    """An argument of the environment, which a run's config.json keeps; may be given again for others."""
    start_timeout: Annotated[float | None, unless_given("120", "FLOAT")] = None
    """Seconds for a worker to make its environments and begin episodes."""


@dataclasses.dataclass(frozen=True)
class TrainArgs(SetupArgs):
    """Train an agent into a run folder."""

    seed: Annotated[int | None, unless_given("0")] = None
    """Of everything that training draws."""
    parallel: Annotated[Literal["shard_map", "pmap"] | None, unless_given("shard_map", "{shard_map,pmap}")] = None
    """How to spread over devices."""
    coordinator: Annotated[str | None, unless_given("none", "HOST:PORT")] = None
    """Train in several processes, on one machine or many, that share the folder of the run: where the first of them is
    reached by the others. Given to all, with the same settings."""
    num_processes: Annotated[int | None, unless_given("1")] = None
    """How many processes there are."""
    process_id: Annotated[int | None, unless_given("0")] = None
    """Which of them this one is, from 0; the first writes the run folder."""
    distributed: Annotated[Literal[DETECTED] | None, unless_given("none", f"{{{','.join(DETECTED)}}}")] = None
    """In the place of these three: what started the processes says them, such as Slurm, Open MPI or a TPU pod."""
    coordinator_timeout: int = 300
    """Seconds in which all processes have to be there."""
    heartbeat_timeout: int = 30
    """Seconds after which a process that is not heard of counts as gone."""
    seconds: Annotated[float | None, unless_given("no limit", "FLOAT")] = None
    """Of wall time after which the run stops, saved and evaluated, though steps are left; it may then be resumed."""
    eval_every: Annotated[int | None, unless_given("a tenth of the steps")] = None
    """Env steps between evaluations of 16 episodes; 0 for none."""
    eval_envs: Annotated[int | None, unless_given("as many as in training, at most 16")] = None
    """Environments on the host that evaluations play in at once; 0: those of training, which then begin anew."""
    checkpoint_seconds: float = 180.0
    """Least time between two checkpoints."""
    max_skipped: int = 100
    """Updates in a row that may be skipped because their loss or gradient is not finite."""
    workers: Annotated[int | None, unless_given("one per processor")] = None
    """Processes that step environments on the host."""
    worker_timeout: float = 60.0
    """Seconds for a step, after which a worker counts as hanging; where an episode begins, --start-timeout if more."""
    max_restarts: int = 10
    """Environments that may be lost within an hour before the run stops, with everything saved."""
    trust_env: Switch = False
    """With --resume or --config: run the code that the file names as the environment's, though it is not installed."""
    data: Annotated[str | None, unless_given("none", "FOLDER")] = None
    """Train on fixed records and take no env step: a folder of episodes, a run's replay, or minari:NAME. --steps then
    says how many updates: as many as in a run of so many env steps. --env is for evaluation."""
    skip_damaged: Switch = False
    """Leave out episodes of --data that are damaged or do not fit, instead of refusing all of it."""
    wandb: Annotated[str | None, unless_given("none", "PROJECT")] = None
    """A project of Weights & Biases to send metrics to as well."""
    memory_map: Switch = False
    """Read replay from its files instead of keeping it in memory; it may then be larger than memory."""
    no_lock: Switch = False
    """Train without a lock on the run folder, for file systems that have none."""
    deterministic: Switch = False
    """On a GPU, have the same bytes every time, at the cost of speed. A run that goes on keeps it."""
    out: Annotated[Path | None, unless_given("a new one in runs/", "DIR")] = None
    """Run folder."""
    resume: Switch = False
    """Go on with the run in --out, and with its settings; those given may keep the shapes of its state only."""
    config: Annotated[Path | None, unless_given("none", "FILE")] = None
    """Settings in YAML or JSON, such as a run's config.json; options that are given go before."""
    print_config: Switch = False
    """Print all settings as a file for --config, and stop."""
    dry_run: Switch = False
    """Print settings, sizes, parameters, memory and updates, and stop. Nothing is written."""


@dataclasses.dataclass(frozen=True)
class PlanArgs(SetupArgs):
    """What a run will take, without running it: parameters, memory, multiply-adds, and how fast a card could do that.

    Its updates are compiled for their memory, which may take minutes; for a --card that is not there it is estimated.
    The --devices need not be there either.
    """

    card: Annotated[str | None, unless_given("none", "NAME")] = None
    """An accelerator, such as h100: whether the run fits in its memory, and how fast it could go."""
    peak_tflops: Annotated[float | None, unless_given("the card's", "FLOAT")] = None
    """1e12 floating-point operations that a card without a name here computes in a second."""
    memory_gb: Annotated[float | None, unless_given("the card's", "FLOAT")] = None
    """Its memory in GB."""
    bandwidth: Annotated[float | None, unless_given("the card's", "FLOAT")] = None
    """Of that memory, GB per second."""
    share: float = SHARE
    """Of the card's peaks that is expected to be reached."""
    json: Switch = False
    """Print all numbers as one JSON object."""


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Play fresh episodes with a trained agent; scores go to a file in the run's evals/, the newest to eval.json."""

    run: RunFolder
    episodes: int = 100
    """How many."""
    seed: int = 0
    """The same seed gives the same episodes."""
    env: OtherEnv = None
    env_arg: OtherArgs = ()
    start_timeout: Start = None
    trust_env: Trust = False
    action: Literal["sample", "mode"] | None = None
    """How actions come from the policy; what the agent's configuration says by default."""
    policy: Annotated[Literal[PLANNERS] | None, unless_given("the agent's own", f"{{{','.join(PLANNERS)}}}")] = None
    """A planner, which looks for actions in the agent's world model; with --help its fields are shown, too."""
    which: Which = "latest"
    max_steps: int | None = None
    """Agent steps after which an episode is cut; the environment's own limit by default, or 10,000."""
    eval_envs: int | None = None
    """Environments on the host to play in at once, at most one for each episode; as many as in training by default, at
    most 16. The scores do not depend on it."""
    json: Switch = False
    """Print what is kept as one JSON object: mean, std, iqm, ci95 (of the IQM), episodes, returns, lengths, cut (how
    many episodes), and of what: env, action or policy and planner, seed, step, which."""
    video: Switch = False
    """Write an episode as episode.gif, too, with step, reward, return and action: at most 1000 steps of it."""


@dataclasses.dataclass(frozen=True)
class RecordArgs:
    """Play an environment, by chance or by the agent of a run, and write its episodes to a folder to train on.

    Each is an .npz file of arrays by name; episodes.json says what they are of. The folder appears when it is whole.
    """

    run: Annotated[tyro.conf.Positional[Path | None], unless_given("none; with --env a policy by chance", "RUN")] = None
    """Run folder, a file of `wmjax export`, or pretrained:NAME, whose agent plays."""
    env: Annotated[str | None, unless_given("the run's", "NAME")] = None
    """Environment, see `wmjax list envs`."""
    out: Annotated[Path | None, unless_given("has to be given", "FOLDER")] = None
    """Where to; not there yet, or empty."""
    steps: Annotated[int | None, unless_given("none")] = None
    """Env steps to record, over all environments."""
    episodes: Annotated[int | None, unless_given("none")] = None
    """Episodes to record, instead of --steps."""
    policy: Annotated[Literal["agent", "random"] | None, unless_given("agent with a RUN", "{agent,random}")] = None
    """Who plays."""
    action: Literal["sample", "mode"] | None = None
    """How actions come from the agent's policy; what its configuration says by default."""
    which: Which = "latest"
    seed: int = 0
    """The same seed gives the same episodes."""
    num_envs: Annotated[int | None, unless_given("16, of a RUN not more than it has")] = None
    """Environments that are stepped at once."""
    image_size: Annotated[int | None, unless_given("the environment's")] = None
    """Side of the pictures in pixels."""
    action_repeat: Annotated[int | None, unless_given("1")] = None
    """Steps of the environment that each action is taken for."""
    env_arg: EnvArgs = ()
    """An argument of the environment; may be given again for others."""
    start_timeout: Start = None
    workers: Annotated[int | None, unless_given("one per processor")] = None
    """Processes that step environments on the host."""
    trust_env: Trust = False


@dataclasses.dataclass(frozen=True)
class DreamArgs:
    """Let the world model predict what it does not see: truth, model and error as dream.gif.

    The error by horizon is in dream.png and dream.json, beside those of two guesses that know no dynamics.
    Reconstructions of what the model does see are in reconstructions.png, each below its original.
    """

    run: RunFolder
    context: Annotated[int | None, unless_given("5, or fewer where episodes are short")] = None
    """Steps that the model sees."""
    horizon: Annotated[int | None, unless_given("15, or fewer where episodes are short")] = None
    """Steps that it predicts from the actions alone."""
    env: OtherEnv = None
    env_arg: OtherArgs = ()
    start_timeout: Start = None
    trust_env: Trust = False
    which: Which = "latest"


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write what acts and dreams of a run to one file of safetensors, which eval, dream and record take as a RUN.

    Its tensors have the names of the modules; configuration, environment and a card are in its metadata. Or, instead of
    it or besides, write one step of the dream for programs without wmjax: state, action and random numbers in; state,
    frame, reward and continue out. Beside it, as .json, are real moments to begin at.
    """

    run: RunFolder
    file: Annotated[tyro.conf.Positional[Path | None], unless_given("none", "FILE.safetensors")] = None
    """Where to; not there yet."""
    onnx: Annotated[Path | None, unless_given("none", "FILE.onnx")] = None
    """Where a step of the dream is written to in ONNX; needs the extra `onnx`."""
    stablehlo: Annotated[Path | None, unless_given("none", "FILE.stablehlo")] = None
    """Where it is written to for `jax.export.deserialize`, for CPUs and NVIDIA's GPUs."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers; float32 is exact."""
    seed: Annotated[int | None, unless_given("the run's; has to be given where it has several")] = None
    """Of a run of several seeds, which one."""
    action: Literal["sample", "mode"] | None = None
    """How actions come from the policy when what is exported is evaluated; what the configuration says by default."""
    episodes: Annotated[int | None, unless_given("none")] = None
    """Episodes to play with what is exported, whose return is then in the card."""
    env: OtherEnv = None
    env_arg: OtherArgs = ()
    start_timeout: Start = None
    trust_env: Trust = False
    which: Which = "latest"


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Make a run folder of what a paper's authors have trained. Their files are read as data: nothing in them is run.

    The configuration follows from the layers where they tell it, else from the preset and the fields that are given.
    """

    path: Annotated[tyro.conf.Positional[Path | None], unless_given("has to be given", "PATH")] = None
    """Of iris the file, of dreamer_v3 the folder of a run or checkpoint or its agent.pkl, of world_models the folder
    that vae/, rnn/ and log/ are in."""
    out: Annotated[Path | None, unless_given("has to be given", "RUN")] = None
    """Run folder; not there yet, or empty."""
    env: Annotated[str | None, unless_given("of world_models what its files are of", "NAME")] = None
    """What the agent was trained in, see `wmjax list envs`."""
    preset: Annotated[str | None, unless_given("the authors'", "NAME")] = None
    """Configuration, where the layers do not tell it."""
    steps: Annotated[int | None, unless_given("what the files say, or 0")] = None
    """Env steps that it was trained for."""
    image_size: Annotated[int | None, unless_given("what the layers are made for")] = None
    """Side of the pictures in pixels."""
    action_repeat: Annotated[int | None, unless_given("the preset's")] = None
    """Steps of the environment that each action is taken for."""
    env_arg: EnvArgs = ()
    """An argument of the environment; may be given again for others."""
    start_timeout: Start = None


@dataclasses.dataclass(frozen=True)
class PlayArgs:
    """Step into the dream: a page in the browser on which a person, the agent or a planner acts in the world model.

    The real environment is beside it, under the same actions. It is served to this machine alone, to who has the link.
    """

    run: RunFolder
    seed: Annotated[int | None, unless_given("the run's; has to be given where it has several")] = None
    """Of a run of several seeds, which one."""
    env: OtherEnv = None
    env_arg: OtherArgs = ()
    start_timeout: Start = None
    trust_env: Trust = False
    which: Which = "latest"
    policy: Annotated[Literal[PLANNERS] | None, unless_given("a small icem", f"{{{','.join(PLANNERS)}}}")] = None
    """The planner that may drive; with --help its fields are shown, too."""
    port: int = 8765
    """Where the page is; the next one that is free where it is in use, and any with 0."""
    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --open-to-network."""
    open_to_network: Switch = False
    """With --host: let every machine that reaches that address, and has the link, play; nothing is encrypted."""
    open: Switch = False
    """Open the page in the browser, instead of printing its link only."""


@dataclasses.dataclass(frozen=True)
class PlotArgs:
    """Draw learning curves, a panel for each environment: returns of evaluations, those of training pale behind them.

    Of several seeds the mean, and its 95% interval from three on. Lines show random play and what counts as learned.
    Where all runs evolve a controller: fitness over generations, of the best candidate, of all, and of the mean.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run folders."""
    out: Path | None = None
    """Picture; by default learning_curve.png or fitness_curve.png in the run's folder, or here for several runs."""


@dataclasses.dataclass(frozen=True)
class SideBySideArgs:
    """What comparisons of agents and of ablations have alike."""

    out: Path | None = None
    """The folder of all runs and of report.html, report.png and report.json; the same one goes on where it was."""
    seeds: int = 3
    """How many; in one program where the environment is on the device, else one after the other."""
    first_seed: int = 0
    """The first of them."""
    steps: Annotated[int | None, unless_given("each preset's")] = None
    """Env steps that all train for."""
    seconds: Annotated[float | None, unless_given("no limit", "FLOAT")] = None
    """Of wall time that all train for, in place of steps."""
    preset: Annotated[str | None, unless_given("small", "NAME")] = None
    """Configuration, see `wmjax list presets`."""
    image_size: Annotated[int | None, unless_given("each preset's, or the environment's")] = None
    """Side of the pictures in pixels."""
    action_repeat: Annotated[int | None, unless_given("each preset's")] = None
    """Steps of the environment that each action is taken for."""
    env_arg: EnvArgs = ()
    """An argument of the environment; may be given again for others."""
    eval_every: Annotated[int | None, unless_given("a tenth of the steps")] = None
    """Env steps between evaluations of 16 episodes, which the curves are made of."""
    jobs: int = 1
    """Runs at once. They share the machine, so that times are then no measure of an agent alone."""
    context: int = 5
    """Steps that models see before they predict."""
    horizon: int = 15
    """Steps that they predict from the actions alone."""
    threshold: Annotated[float | None, unless_given("the environment's, if it is known", "FLOAT")] = None
    """A return that counts as learned."""


@dataclasses.dataclass(frozen=True)
class CompareArgs(SideBySideArgs):
    """Train agents side by side, a run for each seed, and report on them with intervals.

    Called again it goes on where it was: runs that are done are kept, others resumed, those that failed tried again.
    """

    agents: str = "all"
    """Names with commas between them."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """Environment; may be given again for others. By default catch."""
    runs: Annotated[tuple[Path, ...] | None, unless_given("none", "RUN...")] = None
    """Run folders that are there already, put together by agent, environment and settings; nothing is trained."""
    strict: Switch = False
    """End, before anything is trained, where an agent cannot take an environment; else it is named and left out."""
    trust_env: Trust = False


@dataclasses.dataclass(frozen=True)
class AblateArgs(SideBySideArgs):
    """Train an agent as it is and without its parts, one at a time, and report on them as `wmjax compare` does."""

    env: Annotated[str | None, unless_given("that of each ablation, or the agent's own example", "NAME")] = None
    """The task of all."""
    only: Annotated[str | None, unless_given("all", "NAME,...")] = None
    """Names of ablations with commas between them."""


@dataclasses.dataclass(frozen=True)
class ListArgs:
    """List what there is to choose from."""

    what: tyro.conf.Positional[Literal["agents", "envs", "presets", "pretrained"]]
    """Of what."""
    pattern: Annotated[tyro.conf.Positional[str | None], unless_given("all, of environments some", "PATTERN")] = None
    """A part of a name, or a glob such as gym:*Pole*; in any case."""


def parse(args_class: Any, argv: Sequence[str], prog: str, default: Any = None) -> Any:
    """Parses arguments into a dataclass. Whatever is wrong with them becomes a `UsageError` of one line."""
    _check_flags(args_class, argv)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = tyro.cli(args_class, prog=prog, args=list(argv), default=default)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None
    for field in dataclasses.fields(args):
        _check(field.name, getattr(args, field.name))
    return args


def _check(name: str, value: Any) -> None:
    """Raises `UsageError` where a number is out of its bounds, or text could be no name or path."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, Path):
            checks.path(name, one)
        elif isinstance(one, str):
            checks.text(name, one)
        elif name in checks.BOUNDS and one is not None:
            checks.number(name, one)


# What tyro says of text that is no number, with the type that was asked of `int`, `float` or a union.
NO_NUMBER = re.compile(
    r"Error parsing (?P<flag>--\S+): (?:(?P<whole>invalid literal for int\(\) with base 10)|could not convert string "
    r"to float|no type matching (?P<kinds>(?:\{None\}\|)?(?:INT|FLOAT)) could be instantiated from)"
    r"(?:: | \[)(?P<value>'[^']*')"
)


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
    line = " ".join(" ".join(words).split()) or "arguments are not valid"
    if number := NO_NUMBER.match(line):
        whole = number["whole"] or "INT" in (number["kinds"] or "")
        return f"{number['flag']}: {number['value']:.80} is not valid; a {'whole ' if whole else ''}number is"
    return line if len(line) <= 800 else f"{line[:400]} ... {line[-400:]}"  # the value may be a long one


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
            near = did_you_mean(meant(flag, valid))
            raise UsageError(f"{flag}: unknown option; {near or 'see --help'}")


def documented(args_class: type, doc: str | None, *fields: Any) -> type:
    """Arguments with other words at their head, and further fields."""
    name, namespace = args_class.__name__, {"__doc__": doc}
    return dataclasses.make_dataclass(name, fields, bases=(args_class,), frozen=True, namespace=namespace)


def explain(args_class: type, argv: Sequence[str], command: str, agents: Sequence[str]) -> None:
    """The help of a command whose agent is not named, and the end of the program, if help is asked for."""
    if HELP & set(argv):
        about = f"AGENT is one of {', '.join(agents)}. `{command} AGENT --help` shows its fields too."
        parse(documented(args_class, f"{inspect.cleandoc(args_class.__doc__)}\n\n{about}"), argv, f"{command} AGENT")


def parse_with_fields(args_class: type, config: Any, argv: Sequence[str], prog: str, **said: Any) -> Any:
    """As `parse`, with the fields of an agent's configuration as `--agent.FIELD`; `said` are defaults of the others."""
    about = "Fields of the agent's configuration; the defaults are those of the preset, of --config, or of the run."
    # Every field takes a value, switches too.
    fields = Annotated[type(config), tyro.conf.FlagConversionOff, tyro.conf.arg(help=about)]
    args_class = documented(args_class, args_class.__doc__, ("agent", fields, config))
    return parse(args_class, argv, prog, args_class(agent=config, **said))


def parse_with_planner(args_class: type, argv: Sequence[str], prog: str) -> tuple[Any, Any]:
    """As `parse`, and the configuration of the planner that --policy names, of `--planner.FIELD`; None without one."""
    name = value_of("--policy", argv)
    if name not in PLANNERS:
        for token in argv:
            if token.startswith("--planner."):
                raise UsageError(
                    f"{token.partition('=')[0]}: is of a planner, which --policy names: {', '.join(PLANNERS)}"
                )
        return parse(args_class, argv, prog), None
    from wmjax import planning

    config = planning.PLANNERS[name][0]()
    about = "Fields of the planner's configuration."
    fields = Annotated[type(config), tyro.conf.FlagConversionOff, tyro.conf.arg(help=about)]
    args = parse(documented(args_class, args_class.__doc__, ("planner", fields, config)), argv, prog)
    return args, args.planner


def changes(before: Any, after: Any) -> dict[str, Any]:
    """Fields of a configuration that differ, by name; those of a part as a mapping."""
    found = {}
    for name in (field.name for field in dataclasses.fields(before)):
        was, value = getattr(before, name), getattr(after, name)
        if value != was:
            found[name] = changes(was, value) if dataclasses.is_dataclass(was) else value
    return found


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The value of an option that is given, before the arguments can be parsed as a whole."""
    value = None
    for token, following in itertools.zip_longest(argv, argv[1:]):
        if token == flag:
            value = following
        elif token.startswith(flag + "="):
            value = token.partition("=")[2]
    return value


def split_agent(argv: Sequence[str], args_class: type = TrainArgs) -> tuple[str | None, list[str]]:
    """The first argument that is neither an option nor an option's value, and the rest."""
    hints = typing.get_type_hints(args_class, include_extras=True)
    switches = {*HELP, *(f"--{name}" for name, hint in hints.items() if hint is Switch)}
    position = 0
    while position < len(argv):
        token = argv[position]
        if not token.startswith("-"):
            return token, [*argv[:position], *argv[position + 1 :]]
        option = token.replace("-", "_").replace("__", "--", 1)
        position += 3 if option == "--env_arg" else 1 if "=" in token or {token, option} & switches else 2
    return None, list(argv)


# As Python writes them, of which JSON has not all: .5, 5., +3
WORDS = {"True": True, "False": False, "None": None}
NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def env_args(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Arguments of an environment: values are JSON, words and numbers of Python such as True and .5, or else text."""

    def read(name: str, text: str) -> Any:
        try:
            if NUMBER.fullmatch(text):
                return int(text) if text.lstrip("+-").isdigit() else float(text)
            return WORDS[text] if text in WORDS else json.loads(text, parse_constant=lambda word: text)
        except ValueError:
            return text
        except RecursionError:
            raise checks.invalid(f"env_args: {name}", text, f"JSON of at most {checks.LEVELS} levels") from None

    return {name: read(name, text) for name, text in pairs}
