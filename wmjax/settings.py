"""From what is asked for to a run before its first step: names and settings made into values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import wmjax
from wmjax import checks, estimate, offline, presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.handed import check_args, check_trust, handed
from wmjax.envs.wrappers import agent_actions
from wmjax.episodes import Data, Source, spec_of, stretches
from wmjax.fields import replace
from wmjax.loops.on_data import is_playable, spec_alone
from wmjax.loops.parallel import BACKENDS, axis_name, check_devices, default_devices, share
from wmjax.loops.schedule import Schedule, check
from wmjax.suites import gym_suite
from wmjax.suites.pictures import DEFAULT_SIZE
from wmjax.types import Agent, Axes, Env, EnvSpec, HostEnv, UsageError

# Arguments of `train` that `setup` reads, besides those it names itself.
ASKED = ("preset", "seed", "seeds", "steps", "devices", "parallel", "shard_params", "image_size", "action_repeat")
ASKED += ("env_args",)
ASKED += ("start_timeout", "trust_env", "data", "skip_damaged", "memory_map", "equations")


class Setup(NamedTuple):
    """A run before its first step, or one that is read back: all that `config.json` says, made into values."""

    description: dict[str, Any]  # what `config.json` holds
    config: Any  # the agent's frozen dataclass
    agent: Agent
    env: Env | HostEnv  # takes what the agent emits
    steps: int  # env steps to train for
    data: Data | None = None  # what it is trained on instead of what it collects
    equations: Any = None  # the agent's own `Equations`, where they are not all the paper's
    notes: tuple[str, ...] = ()  # on that, a line each

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the run, one after the other."""
        return tuple(self.description["seed"] + i for i in range(self.description["seeds"]))

    @property
    def on_host(self) -> bool:
        """Whether replay is in the host's memory or on its disk; else it is on the device."""
        return self.description["data"]["memory_map"] if self.data is not None else isinstance(self.env, HostEnv)

    @property
    def world(self) -> Env | HostEnv:
        """What training runs in: the environment, or of a run on data no more than its spec."""
        if self.data is None:
            return self.env
        return HostEnv(self.env.spec, None) if self.on_host else spec_alone(self.env.spec)

    @property
    def records(self) -> int:
        """That come into replay in all."""
        return self.data.records if self.data is not None else Schedule(self.agent, self.env, self.steps).records


def setup(
    agent: str = "dreamer_v3",
    env: Any = None,
    *,
    overrides: dict[str, Any] | None = None,
    before: dict[str, Any] | None = None,
    **asked: Any,
) -> Setup:
    """Resolves names and settings. Raises `UsageError` before anything is computed.

    Args:
      agent, env, overrides: as for `train`.
      before: what `config.json` says of a run that goes on, which holds for what is not given.
      asked: those of `ASKED`, as for `train`.
    """
    if unknown := asked.keys() - set(ASKED):
        raise TypeError(f"setup: unknown arguments {', '.join(sorted(unknown))}")
    before = before if before and before["agent"] == agent else {}
    given = lambda field, default: before.get(field, default) if asked.get(field) is None else asked[field]
    check_idle()
    own_args = before.get("env_args") or {}
    trust_env, env_args = checks.flag("trust_env", asked.get("trust_env", False)), check_args(asked.get("env_args"))
    check_trust(before.get("env") if env is None else None, own_args, trust_env, env_args)
    asked_env = env
    source, said, notes = offline.given_data(asked.get("data"), before, env, trust_env)
    default = None if before or source else presets.default_env(agent)
    env = before.get("env", said.get("env", default)) if env is None else env
    if env is None and source is None:
        raise UsageError("env: the run was trained on an Env value, which has to be given again")
    recorded = env if isinstance(env, str) and env == before.get("env") else None
    env, name, args = handed(env, env_args) if env is not None else (None, None, {})
    name = recorded or name
    config = replace(presets.starting_config(agent, asked.get("preset"), before, name), overrides or {})
    config.validate()
    equations = asked.get("equations")
    replaced = check_equations(agent, equations, before)
    preset = given("preset", presets.DEFAULT_PRESET)
    _, settings = presets.resolve(agent, preset, name)
    settings = settings._replace(**{field: said[field] for field in ("image_size", "action_repeat") if field in said})
    args = (own_args if before else said.get("env_args", settings.env_args)) | args
    parallel = given("parallel", None)
    parallel = BACKENDS[0] if parallel is None else parallel
    defaults = {"seed": 0, "seeds": 1, "devices": default_devices(), "steps": settings.steps, "shard_params": 1}
    numbers = [checks.number(field, given(field, value)) for field, value in defaults.items()]
    seed, seeds, devices, budget, shard_params = numbers
    checks.number("seed + seeds", seed + seeds, checks.BOUNDS["seed"])
    check_devices(devices, parallel, shard_params)
    image_size, action_repeat = (asked.get(field) for field in ("image_size", "action_repeat"))
    if name is None and (image_size, action_repeat) != (None, None):
        raise UsageError("image_size, action_repeat: not valid with an Env value, which has its own")
    if name is not None:
        image_size = checks.optional("image_size", given("image_size", settings.image_size))
        action_repeat = checks.optional("action_repeat", given("action_repeat", settings.action_repeat))
    description = {
        "version": wmjax.__version__, "agent": agent, "env": name, "preset": preset, "seed": seed, "seeds": seeds,
        "devices": devices, "parallel": parallel if devices > 1 else None, "shard_params": shard_params,
        "env_args": args, "image_size": image_size, "action_repeat": action_repeat, "steps": budget,
        "config": dataclasses.asdict(config),
    } | ({"equations": replaced} if replaced else {})  # fmt: skip
    if source is None:
        made = make(description, config, env, budget, asked.get("start_timeout"), equations)
    else:
        given_env = asked_env is not None or bool(before)
        made = _on_data(source, description, config, env, budget, asked, before, notes, given_env)
    fixed = Schedule(made.agent, made.env).whole()
    if fixed is None:
        _check_learns(made)
        return made
    if asked.get("steps") not in (None, fixed):
        raise UsageError(
            f"steps: {asked['steps']} is not valid; the stages of {agent} have lengths of their own, which fields of "
            f"its configuration set: {fixed} env steps in all"
        )
    return made._replace(steps=fixed, description=made.description | {"steps": fixed})


def _on_data(
    source: Source, description: dict[str, Any], config: Any, env: Any, steps: int, asked: Mapping[str, Any],
    before: Mapping[str, Any], notes: list[str], given_env: bool,
) -> Setup:  # fmt: skip
    """A run on fixed records. Where there is no environment, what it is follows from them."""
    had = before.get("data") or {}
    memory_map, skip = (
        checks.flag(name, asked.get(name) or had.get(name, False)) for name in ("memory_map", "skip_damaged")
    )
    if memory_map and max(description["seeds"], description["devices"]) > 1:
        raise UsageError("memory_map: is not valid with several seeds or devices on data; one is")
    made = None
    try:
        how = asked.get("start_timeout"), asked.get("equations")
        made = make(description, config, env, steps, *how) if env is not None else None
    except UsageError as error:
        if given_env:
            raise
        notes.append(f"data: its environment {env!r} cannot be made for this run ({error})")
        description = description | dict.fromkeys(("env", "image_size", "action_repeat")) | {"env_args": {}}
    spec = made and made.env.spec
    offline.checked_spec(source, spec)
    data = stretches(source, spec, skip_damaged=skip, keep=not memory_map, say=notes.append)
    offline.check_same(data, before)
    description = description | {"data": offline.described(data, memory_map, skip)}
    made = made or make(description, config, None, steps, equations=asked.get("equations"))
    axes = axes_of(description)
    make_agent = lambda config: AGENTS[description["agent"]][1](made.env.spec, config, axes, made.equations)
    agent = offline.fitted(config, make_agent, data, description["devices"])
    check(agent)
    description = made.description | {"data": description["data"]}
    return made._replace(description=description, agent=agent, data=data, notes=tuple(notes))


def _check_learns(made: Setup) -> None:
    """Raises `UsageError` where the steps end before anything is learned."""
    stages, schedule, updates = made.agent.recipe.stages, Schedule(made.agent, made.env, made.steps), 0
    for stage, iterations in zip(stages, schedule.lengths, strict=True):
        updates += iterations * (sum(update.repeats for update in stage.updates) + bool(stage.evolve))
        if iterations < (stage.iterations or 0):  # the steps end here
            break
    if not updates:
        learns = next(i for i, stage in enumerate(stages) if stage.updates or stage.evolve)
        first = schedule.before(learns) + stages[learns].collect * schedule.frames
        raise UsageError(
            f"steps: {made.steps} is not valid, for nothing would be learned; the first update comes after {first} env "
            "steps, as the agent's configuration says (prefill and the like)"
        )


def check_equations(
    agent: str, equations: Any, before: Mapping[str, Any], needed: Collection[str] | None = None
) -> dict[str, str]:
    """Which equations are not the paper's, and the names of the functions that stand there: what `config.json` says.

    Args:
      agent, equations: as for `train`.
      before: what `config.json` says of a run that is read back, if it is one.
      needed: the fields that have to be given again, if they were replaced; None: all of them.

    Raises:
      UsageError: they are not the agent's, one of them is no function, or a run that is read back has others.
    """
    kind, had = AGENTS[agent][2], before.get("equations") or {}
    if equations is not None and not isinstance(equations, kind):
        raise UsageError(
            f"equations: {checks.show(equations)} is not valid; {kind.__module__}.Equations(NAME=function) is, with "
            f"names of {', '.join(kind._fields)}"
        )
    found = {}
    for name, paper in kind._field_defaults.items():
        mine = paper if equations is None else getattr(equations, name)
        if not callable(mine):
            raise UsageError(f"equations: {name} is {checks.show(mine)}; a function is valid")
        if mine is not paper:
            found[name] = _function_name(mine)
    if not before:
        return found
    if unknown := sorted(had.keys() - set(kind._fields)):
        raise UsageError(f"equations: the run has {unknown[0]!r}, which this version's {agent} has not")
    missing = [name for name in had if name not in found and (needed is None or name in needed)]
    if missing:
        said = ", ".join(f"{name} ({had[name]})" for name in missing)
        raise UsageError(f"equations: the run was trained with {said}; from Python, give that again (equations=...)")
    if more := sorted(found.keys() - had.keys()):
        raise UsageError(f"equations: the run was trained with the paper's {more[0]}; leave it as it is")
    return found


def _function_name(function: Any) -> str:
    """Module and name; of a `functools.partial`, with what is given to it."""
    if isinstance(function, functools.partial):
        given = [*map(checks.show, function.args), *(f"{k}={checks.show(v)}" for k, v in function.keywords.items())]
        return f"{_function_name(function.func)}({', '.join(given)})"[:200]
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"[:200]


def make(
    description: dict[str, Any],
    config: Any,
    env: Any,
    steps: int,
    start_timeout: float | None = None,
    equations: Any = None,
) -> Setup:
    """The values that a description stands for; `env` None: its data alone says what the environment is."""
    description = {"shard_params": 1} | description  # one that is older does not say it
    if env is None:
        named, env = False, spec_alone(spec_of(description["data"]["spec"]))
    else:
        named = handed(env).name is not None
        env = agent_actions(make_env(env, **env_settings(description, env), start_timeout=start_timeout))
    on_host = isinstance(env, HostEnv)
    if on_host:
        check_on_host(**{name: description[name] for name in ("seeds", "parallel", "shard_params")})
    axes = axes_of(description)
    factory = functools.partial(AGENTS[description["agent"]][1], equations=equations)
    if on_host and (not named or description["image_size"] is None):
        env, size = _sized(env, lambda spec: factory(spec, config, axes))
        description = description | ({} if size is None else {"image_size": size})
    agent = factory(env.spec, config, axes)
    check(agent)
    if axes is not None:
        check(agent._replace(recipe=share(agent.recipe, description["devices"], on_host)))
    return Setup(description, config, agent, env, steps, equations=equations)


def axes_of(description: Mapping[str, Any]) -> str | Axes | None:
    """The named axis, or axes, that the agent of a run is made for."""
    return axis_name(description["devices"], description["shard_params"])


def check_on_host(seeds: int, parallel: str | None, shard_params: int) -> None:
    """Raises `UsageError` where environments on the host cannot be trained in so."""
    where = "is not valid with environments on the host"
    if seeds > 1:
        raise UsageError(f"seeds: {seeds} {where}; 1 is (several runs may be started side by side)")
    if parallel == "pmap":
        raise UsageError(f"parallel: 'pmap' {where}; 'shard_map' is")
    if shard_params > 1:
        raise UsageError(f"shard_params: {shard_params} {where}; 1 is")


def _sized(env: HostEnv, make_agent: Callable[[EnvSpec], Agent]) -> tuple[HostEnv, int | None]:
    """The environment, with pictures of 64x64 where an agent takes those and not their own; and that size, if so."""
    if env.resized is not None:
        try:
            make_agent(env.spec)
        except UsageError:
            with contextlib.suppress(UsageError):  # the first says what is wrong
                make_agent(env.resized(DEFAULT_SIZE).spec)
                return env.resized(DEFAULT_SIZE), DEFAULT_SIZE
    return env, None


def env_settings(description: Mapping[str, Any], env: Any) -> dict[str, Any]:
    """What a run says of how its environment is made; nothing for an environment that is a value."""
    if handed(env).name is None:
        return {}
    sizes = {name: description[name] for name in ("image_size", "action_repeat")}
    return sizes | {"env_args": description.get("env_args") or {}}


def other_env(
    description: Mapping[str, Any], env: Any, env_args: Mapping[str, Any] | None = None, **how: Any
) -> Env | HostEnv:
    """Another environment for the agent of a run: shown as its own, and played as the preset of the run has it played.

    `how` are further arguments of `make_env`.
    """
    name = handed(env).name
    if name is None:
        return make_env(env, env_args=env_args, **how)
    args = other_args(description, name, env_args)
    return make_env(env, **env_settings(description, env) | {"env_args": args}, **how)


def other_args(
    description: Mapping[str, Any], name: str | None, env_args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments that `other_env` gives an environment: those of the preset of the run, but as given."""
    own = {} if name is None else presets.resolve(description["agent"], description["preset"], name)[1].env_args
    return dict(own) | check_args(env_args)


def check_idle() -> None:
    """Raises `UsageError` where a module that is imported for its environment trains."""
    source = gym_suite.importing()
    if source is not None:
        raise UsageError(
            f"train: {source!r} is being imported for its environment; put what trains there under "
            '`if __name__ == "__main__":`'
        )


def _of_stages(made: Setup) -> list[str]:
    """Notes: that stages take at least twice the steps asked for, or are not reached by them."""
    stages, schedule = made.agent.recipe.stages, Schedule(made.agent, made.env, made.steps)
    each = list(zip(stages, schedule.lengths, strict=True))
    # To finish its last iteration a run takes some more than was asked for; that is worth no word.
    taken = sum(stage.collect * length for stage, length in each) * schedule.frames
    said = [f"{taken:,} env steps are taken, for a stage collects many at once"] if taken >= 2 * made.steps else []
    return said + [
        f"the steps end before the stage {stage.name!r}, which begins after {schedule.before(i):,}"
        for i, (stage, length) in enumerate(each)
        if not length and stage.iterations != 0 and (stage.updates or stage.evolve)
    ]


def describe(made: Setup, path: Path | None) -> str:
    """The resolved configuration in some lines of text."""
    d = made.description
    told = d.get("about") or estimate.about(made)
    repeat = f", action repeat {made.env.spec.action_repeat}" if made.env.spec.action_repeat > 1 else ""
    seeds = f"seed {d['seed']}" if d["seeds"] == 1 else f"seeds {made.seeds[0]} to {made.seeds[-1]}"
    parts = f", parameters in {d['shard_params']} parts" if d.get("shard_params", 1) > 1 else ""
    spread = f", {d['devices']} devices ({d['parallel']}{parts})" if d["devices"] > 1 else ""
    args = "".join(f", {name} {value}" for name, value in d["env_args"].items())
    on = d["env"] or ("an Env value" if is_playable(made.env) else "data")
    own = ", ".join(f"{name} by {function}" for name, function in d.get("equations", {}).items())
    head = f"{d['agent']}{own and f' ({own})'} on {on}{args}{repeat}, preset {d['preset']}, {seeds}{spread}"
    shown = lambda value: "x".join(map(str, value)) if isinstance(value, list) else value
    fields = " ".join(f"{name}={shown(value)}" for name, value in told["config"].items())
    obs = ", ".join(f"{name} {space}" for name, space in made.env.spec.obs.items())
    lines = [f"{head}, {made.steps:,} env steps", f"observes {obs}; acts in {made.env.spec.action}"]
    if made.data is None:
        lines[1:1] = _of_stages(made)
    else:
        lines[0] = f"{head}, as many updates as in {made.steps:,} env steps, of which none is taken"
        lines.insert(1, f"data {made.data.path}: {len(made.data.lengths):,} episodes, {made.data.records:,} records")
        lines += made.notes if is_playable(made.env) else (*made.notes, "no environment: not evaluated")
    notes = made.env.notes if isinstance(made.env, HostEnv) else ()
    folder = [] if path is None else [f"run folder {path}"]
    return "\n".join([*lines, *notes, *textwrap.wrap(fields, 118), *estimate.header(told), *folder])
