"""Runs from Python: load one from its folder, evaluate it, act with it. `training.py` trains them."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import wmjax
from wmjax import checks, determinism, figures, planning, presets, weights
from wmjax.agents import AGENTS
from wmjax.cache import enable_compilation_cache
from wmjax.envs import own
from wmjax.envs.handed import check_args, check_trust
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, compiler, memory
from wmjax.loops.driver import evaluation_key, make_evaluator
from wmjax.loops.host.rollout import Options
from wmjax.loops.on_data import is_playable
from wmjax.loops.parallel import tree_of_seed
from wmjax.run_folder import BEST, CHECKPOINTS, member_description, members, read_description, say_edits, warn
from wmjax.scores import Scores, record, summarize_seeds
from wmjax.settings import Setup, check_equations, check_idle, make, other_env
from wmjax.types import Agent, AgentState, Array, Env, HostEnv, PyTree, TimeStep, UsageError

FINAL_EPISODES = 100
ACT_KEY = 0x41435431  # folded into the seed, so that no draw of training is met again


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


@dataclasses.dataclass
class Run:
    """A trained agent in its environment, or the agents of several seeds.

    All is a value except what `act` remembers between calls: one stream of observations is being acted on at a time.
    """

    path: Path
    description: dict[str, Any]  # what `config.json` says
    config: Any  # the agent's configuration
    agent: Agent
    env: Env | HostEnv  # takes what the agent emits
    state: AgentState  # of several seeds: every leaf has a leading axis of them
    members: tuple[Run, ...] = ()  # of several seeds: each as a run of its own
    step: int = 0  # env steps that the agent was trained for; of several seeds, the one trained longest
    which: str = "latest"  # the checkpoint, as in `load`
    equations: Any = None  # the agent's own `Equations`, where they are not all the paper's
    planner: planning.PlannerConfig | None = None  # that acts in the place of the agent's policy; see `with_policy`
    _acting: Any = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        about = self.description
        seeds = [run.description.get("seed") for run in self.members or (self,)]
        seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        what = f"{about.get('agent')} on {about.get('env') or 'an Env value'}, preset {about.get('preset')}"
        return f"Run({what}, {seeds}, step {self.step:,} ({self.which}), {str(self.path)!r})"

    def with_policy(self, policy: str | planning.PlannerConfig) -> Run:
        """The same run with a planner in the place of the agent's policy: it evaluates and acts by its world model.

        Where there are several devices, candidates are spread over all of them.

        Args:
          policy: `cem`, `icem`, `mppi` or `gradient`; or the configuration of one, such as
            `wmjax.planning.CEMConfig(horizon=8)`.

        Raises:
          UsageError: it is none of these, a field of it is not valid, or the run's model cannot be planned in.
        """
        devices, state = np.array(jax.local_devices()), self.state
        mesh = Mesh(devices, ("candidates",)) if devices.size > 1 else None
        agent = planning.with_planner(self.agent, self.env.spec, policy, mesh=mesh)
        if mesh is not None:
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        settled = planning.settle(planning.named(policy)[1], self.agent.model)
        members = tuple(member.with_policy(policy) for member in self.members)
        return dataclasses.replace(self, agent=agent, state=state, members=members, planner=settled, _acting=None)

    def how(self, action: str | None = None) -> dict[str, Any]:
        """How it plays, as records of evaluations say it: `action` (by default `eval_action`), or its planner."""
        if self.planner is None:
            return {"action": action or self.config.eval_action}
        return {"policy": planning.named(self.planner)[0], "planner": dataclasses.asdict(self.planner)}

    def evaluate(
        self,
        episodes: int = FINAL_EPISODES,
        seed: int = 0,
        *,
        env: Any = None,
        action: str | None = None,
        max_steps: int | None = None,
        eval_envs: int | None = None,
    ) -> Scores:
        """Scores over the first episodes of fresh environments; of several seeds, over the episodes of all.

        Nothing is written; `wmjax eval` keeps what it finds in the run's folder.

        Args:
          episodes: of each seed, at least 1.
          seed: of the evaluation; the same seed gives the same episodes.
          env: another environment, as for `train`, with the same observations and actions.
          action: "sample" or "mode"; by default what the agent's configuration says (`eval_action`). Not of a planner.
          max_steps: agent steps after which an episode is cut; by default the environment's own limit, or 10,000 where
            it has none. `Scores.cut` says how many were.
          eval_envs: environments on the host to play in at once, never more than episodes; by default as many as in
            training, at most 16. The scores do not depend on it.

        Raises:
          UsageError: one of these is not valid.
          RunError: too many environments on the host were lost, or memory ran out.
        """
        max_steps = checks.optional("max_steps", max_steps)
        eval_envs = checks.optional("eval_envs", eval_envs, checks.BOUNDS["eval_envs"]._replace(low=1))
        episodes, seed = checks.number("episodes", episodes), checks.number("seed", seed)
        agent, where = self.playing(seed, env, action)
        options = {"options": Options(eval_envs=eval_envs)} if isinstance(where, HostEnv) else {}
        evaluator, key = make_evaluator(agent, where, max_steps=max_steps, **options), evaluation_key(seed)
        with memory.running_out():
            return summarize_seeds(
                {run.seed: evaluator(run.state.variables, key, episodes) for run in self.members or (self,)}
            )

    def records(
        self,
        scores: Scores,
        seed: int | None = None,
        *,
        env: str | None = None,
        env_args: Mapping[str, Any] | None = None,
        action: str | None = None,
        max_steps: int | None = None,
    ) -> dict[Path, dict[str, Any]]:
        """An evaluation as it is kept in the run's folder, and of several seeds in that of each; by folder.

        Args:
          scores: what it came to.
          seed, env, action, max_steps: as given to `evaluate`. Seed None: each seed of the run, under its own.
          env_args: of another environment.
        """
        how = self.how(action)
        one = lambda run, scores: record(
            scores, env=env or self.description["env"], env_args=env_args if env else self.description.get("env_args"),
            **how, seed=run.seed if seed is None else seed, step=run.step, which=run.which, max_steps=max_steps,
            version=wmjax.__version__,
        )  # fmt: skip
        return {self.path: one(self, scores)} | {run.path: one(run, scores.seeds[run.seed]) for run in self.members}

    def title(self, env: str | None = None) -> str:
        """What pictures of it are called: the agent, the name of its environment or of another one, and the step."""
        where = env or self.description.get("env") or "an Env value"
        return f"{self.description['agent']} on {where}, {self.step:,} env steps"

    def write_episode(
        self, seed: int = 0, *, env: Any = None, action: str | None = None, title: str | None = None
    ) -> list[Path]:
        """Plays an episode and writes what is seen in it to the run's folder (`figures.write_episode`).

        Of several seeds, the first one plays. Arguments and errors are those of `evaluate`; `title` stands above the
        picture, by default `Run.title`. It returns the files.
        """
        agent, where = self.playing(seed, env, action)
        run = self.members[0] if self.members else self
        title = self.title() if title is None else title
        self.path.mkdir(parents=True, exist_ok=True)  # of a file it is not there yet
        return figures.write_episode(self.path, agent, where, run.state.variables, evaluation_key(seed), title)

    def playing(self, seed: int, env: Any, action: str | None) -> tuple[Agent, Env | HostEnv]:
        """Who plays, and where, for arguments as of `evaluate`; also its errors."""
        checks.number("seed", seed)
        agent, where = self.agent, self.env if env is None else self.env_like(env)
        if not is_playable(where):
            raise UsageError(
                "env: the run was trained on data alone, which is no environment; name one (--env NAME, env=)"
            )
        if action is not None:
            if self.planner is not None:
                name = planning.named(self.planner)[0]
                raise UsageError(f"action: {action!r} is of the agent's own policy; leave it out with policy {name!r}")
            checks.choice("action", action, typing.get_args(typing.get_type_hints(type(self.config))["eval_action"]))
            config = dataclasses.replace(self.config, eval_action=action)
            agent = AGENTS[self.description["agent"]][1](self.env.spec, config, equations=self.equations)
        return agent, where

    @property
    def seed(self) -> int:
        """Of the run; of several, the first."""
        return self.description["seed"]

    def of_seed(self, seed: int | None) -> Run:
        """The run of one seed, which has to be named where there are several. Raises `UsageError`."""
        seeds = [member.seed for member in self.members or (self,)]
        seed = checks.optional("seed", seed)
        if seed is None and self.members:
            raise UsageError(
                f"seed: the run {str(self.path)!r} has the seeds {seeds[0]} to {seeds[-1]}, and one is asked for; "
                f"which one? (--seed {seeds[0]}, seed={seeds[0]})"
            )
        if seed is not None and seed not in seeds:
            raise UsageError(f"seed: {seed} is not in {str(self.path)!r}; {', '.join(map(str, seeds))} is valid")
        return self.members[seeds.index(seed)] if self.members else self

    def env_like(self, env: Any) -> Env | HostEnv:
        """Another environment, as for `train`, that takes what the agent emits.

        Raises `UsageError` where its observations and actions are not those that the agent was trained on.
        """
        env = other_env(self.description, env)
        for name in ("obs", "action"):
            mine, other = getattr(self.env.spec, name), getattr(env.spec, name)
            if mine != other:
                raise UsageError(f"env: its {name} {other} is not what the agent was trained on, {mine}")
        return agent_actions(env)

    def act(self, obs: Any, *, is_first: bool = False, reward: float = 0.0, seed: int = 0) -> Any:
        """Chooses an action for one environment, which may be any program that gives such observations.

        This is the one method with a memory: the agent's belief, its last action and a key are kept in the run from
        call to call, and set back by `is_first=True` (or by the first call).

        Args:
          obs: an observation of the environment's own, which is read as in training (a picture is resized, a `Dict`
            flattened); or what `env.spec.obs` says, without batch axes, as a dictionary or, where there is one entry,
            a bare array. Of an environment on the device pictures may have any size.
          is_first: whether an episode begins here.
          reward: that arrived with `obs`.
          seed: of the action's draws; read when the memory is set back.

        Returns:
          The action in the environment's own form, which its action space contains: of one on the device an int32, or
          floats within the bounds; of Gymnasium's what `step` takes.

        Raises:
          UsageError: an observation that cannot be read; the message names the entry, what was found and what is valid.
            Or `reward` is not one finite number, or `is_first` not True or False.
        """
        if self.members:
            raise UsageError(f"act: this run has {len(self.members)} seeds; choose one, as in run.members[0].act(...)")
        seed = checks.number("seed", seed)
        is_first, reward = _scalar("is_first", is_first, bool), _scalar("reward", reward, float)
        obs = {name: value[None] for name, value in own.read(self.env, obs).items()}
        if self._acting is None:
            self._acting = {"step": _act_program(self.agent, self.env), "carry": None}
        memory = self._acting
        is_first = is_first or memory["carry"] is None
        if is_first:
            key = jax.random.fold_in(jax.random.key(seed), ACT_KEY)
            memory |= {"carry": self.agent.act_carry(self.state.variables, 1), "key": key}
        memory["key"], key = jax.random.split(memory["key"])
        flag = np.zeros(1, bool)
        step = TimeStep(obs, np.full(1, reward, np.float32), np.full(1, is_first), flag, flag)
        memory["carry"], action = memory["step"](self.state.variables, key, memory["carry"], step)
        return own.write(self.env, np.asarray(action))


def _scalar(field: str, value: Any, kind: type) -> Any:
    """A truth value or a finite number of float32, also out of an array without axes. Raises `UsageError`."""
    with contextlib.suppress(ValueError, TypeError), np.errstate(over="ignore"):
        array = np.asarray(value)
        valid = array.dtype.kind == "b" if kind is bool else array.dtype.kind not in "OSUMmc"
        if valid and array.shape == () and np.isfinite(array.astype(np.float32)):
            return kind(array)
    raise checks.invalid(field, value, "True or False" if kind is bool else "a finite number")


def _act_program(agent: Agent, env: Env | HostEnv) -> Any:
    """`act` of one environment, compiled, with the action in the environment's own form."""
    native = agent_actions(HostEnv(env.spec, None)).native

    def act(params: PyTree, key: Array, carry: PyTree, step: TimeStep) -> tuple[PyTree, Array]:
        carry, action, _ = agent.act(params, key, carry, step, explore=False)
        return carry, native(action[0])

    return jax.jit(act, compiler_options=compiler.options())


def load(
    path: str | Path,
    *,
    env: Any = None,
    which: str = "latest",
    env_args: Mapping[str, Any] | None = None,
    start_timeout: float | None = None,
    trust_env: bool = False,
    equations: Any = None,
) -> Run:
    """Reads a run. Where its newest checkpoint is damaged it warns, on standard error, and reads the one before.

    Args:
      path: its folder; a file of `export`, which acts and dreams as the run does; or "pretrained:NAME", one of those
        that `wmjax list pretrained` shows. What is written of the last two is in a folder of their name in the current
        one.
      env: what it was trained on, as for `train`; needed only if no name in `config.json` finds it again, as of a value
        or of what a session without a file defined.
      which: "latest", or "best": the agent at the highest of the periodic evaluations.
      env_args: arguments of the environment that differ from those of the run.
      start_timeout: as for `train`.
      trust_env: whether the code that `config.json` names as the environment's may be imported and run.
      equations: those that the run was trained with, where they are not all the paper's; those of losses alone may be
        left out.

    Raises:
      UsageError: `path` is not a run folder, or has no checkpoint yet; or it is a file that is damaged, or whose
        tensors are not those of its configuration; or there is no pretrained agent of that name.
      UntrustedError: the environment is of a module or file that is not installed with the package, and neither `env`
        nor `trust_env` is given. Nothing has been imported then.
      CheckpointCorruptError: its files are not as they were written.
    """
    enable_compilation_cache()
    path, trust_env = checks.path("run", path), checks.flag("trust_env", trust_env)
    checks.choice("which", which, ("latest", "best"))
    env_args = check_args(env_args)
    located = weights.locate(path)
    file = None if located is None else weights.read(located, warn)
    if file is not None and which != "latest":
        raise UsageError(f"which: {which!r} is of a run folder; {str(path)!r} holds one agent only")
    description = read_description(path, warn) if file is None else file.description
    determinism.turn_on_again(description, warn)
    if description["env"] is None and env is None and not description.get("data"):
        raise UsageError(f"run: {str(path)!r} was trained on an Env value; load it from Python with env=...")
    check_idle()
    own_args = description.get("env_args") or {}
    check_trust(description["env"] if env is None else None, own_args, trust_env, env_args)
    saved, description = description, description | {"env_args": own_args | env_args}
    config = presets.saved_config(description)
    env = description["env"] if env is None else env
    given = check_equations(description["agent"], equations, description, ("networks", "latent", "reward"))
    for name, function in (description.get("equations") or {}).items():
        if given.get(name, function) != function:
            warn(f"warning: {path}: its {name} was {function!r} while it was trained, and given is {given[name]!r}")
    made = make(description | {"devices": 1}, config, env, 1, start_timeout, equations)
    if file is not None:
        state, card = _agent_of(file, made), file.card
        name, step = weights.outputs(path, card["digest"]), card["steps"]
        return Run(
            name, description, config, made.agent, made.env, state, step=step, which=card["which"], equations=equations
        )
    inner = members(path, description)
    found = [_read_agent(folder, made.agent, which, member_description(saved, seed)) for seed, folder in inner.items()]
    found = found or [_read_agent(path, made.agent, which, saved)]
    if which == "latest" and len({step for step, _ in found}) > 1:
        each = ", ".join(f"seed {seed} at {step:,}" for seed, (step, _) in zip(inner, found, strict=True))
        warn(f"warning: {path}: the seeds' newest checkpoints are not of one step: {each}")
    step, state = found[0]
    run = Run(path, description, config, made.agent, made.env, state, step=step, which=which, equations=equations)
    return _with_members(run, found) if inner else run


def _agent_of(file: weights.File, made: Setup) -> AgentState:
    """What acts and dreams, without what only training needs."""
    weights.check_shapes(file, weights.acting(made.agent, made.env.spec))
    return AgentState(weights.load(file), {}, (), jnp.int32(0))


def _read_agent(path: Path, agent: Agent, which: str, description: dict[str, Any]) -> tuple[int, AgentState]:
    folder = path / (CHECKPOINTS if which == "latest" else BEST)
    if checkpoint.latest(folder) is None:
        raise UsageError(f"run: {str(path)!r} has no checkpoint in {folder.name}/ yet")
    state = jax.eval_shape(agent.init, jax.random.key(0))
    if description.get("origin"):  # of an agent that was imported there are parameters alone
        state = state._replace(opt_state={}, stats=())
    template = {"agent": state}
    step, saved = checkpoint.restore_newest(folder, template, warn)
    say_edits(path, description, checkpoint.info(folder, step), warn)
    return step, saved["agent"]


def run_of(made: Setup, path: Path, step: int, state: AgentState) -> Run:
    """The run in a folder, after so many env steps."""
    run = Run(path, made.description, made.config, made.agent, made.env, state, step=step, equations=made.equations)
    count = len(made.seeds)
    return run if count == 1 else _with_members(run, [(step, tree_of_seed(state, i)) for i in range(count)])


def _with_members(run: Run, found: list[tuple[int, AgentState]]) -> Run:
    """The run of several seeds, from the env steps and the state of each."""
    folders = members(run.path, run.description)
    each = tuple(
        dataclasses.replace(
            run, path=path, description=member_description(run.description, seed), state=state, step=step
        )
        for (seed, path), (step, state) in zip(folders.items(), found, strict=True)
    )
    steps, states = zip(*found, strict=True)
    return dataclasses.replace(run, state=jax.tree.map(lambda *x: jnp.stack(x), *states), members=each, step=max(steps))
