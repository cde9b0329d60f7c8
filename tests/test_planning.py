"""Planners, on models that can be planned in by hand."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import PIXELS, TINY_V1, TINY_V2, perturbed, random_step
from tests.agents.world_models import made as world_models
from tests.marks import partly_long
from tests.test_conformance import ROWS, make, pixels
from tests.test_run import train
from wmjax import planning
from wmjax.agents import AGENTS
from wmjax.cli import arguments, main
from wmjax.ops.symlog import symexp
from wmjax.planning import CEMConfig, GradientConfig, ICEMConfig, MPPIConfig
from wmjax.types import Agent, Box, Discrete, EnvSpec, MultiDiscrete, TimeStep, UsageError, WorldModel

LINE = EnvSpec({"vector": Box(-9, 9, (1,))}, Box(-1.0, 1.0, (1,)))
SMALL = [
    CEMConfig(candidates=64, elites=8, iterations=6),
    ICEMConfig(candidates=64, elites=8, iterations=4, noise_beta=0.5),
    MPPIConfig(candidates=256, iterations=6, temperature=0.02, fit_std=True, min_std=0.02),
    GradientConfig(candidates=4, iterations=60, learning_rate=0.05),
]
names = lambda config: type(config).__name__


class State(NamedTuple):
    at: jax.Array  # [..., 1]
    reward: jax.Array  # [...]
    cont: jax.Array  # [...]


def line_model() -> WorldModel:
    """s' = s + a, which pays -(s'² + a²); what is observed is s."""

    def init_state(params, rows):
        return State(jnp.zeros((rows, 1)), jnp.zeros(rows), jnp.ones(rows))

    def observe(params, key, state, prev_action, embed, is_first):
        return State(embed, jnp.zeros_like(state.reward), jnp.ones_like(state.cont))

    def imagine(params, key, state, action):
        at = state.at + action
        return State(at, -(at**2 + action**2)[..., 0], state.cont)

    predict = lambda params, state: (state.reward, state.cont)
    return WorldModel(init_state, lambda params, obs: obs["vector"], observe, imagine, predict, lambda *_: {})


def code_model(code: tuple[int, ...], counts: tuple[int, ...]) -> WorldModel:
    """Pays 1 after the last of some choices, if all were right; a state is the step and the product so far."""
    onehots = jnp.asarray([np.eye(sum(counts))[entry] for entry in code], jnp.float32)  # of the first choice

    def imagine(params, key, state, action):
        step, right = state.at[..., 0], state.at[..., 1]
        right = right * (action * onehots[step.astype(int)]).sum(-1)
        reward = right * (step == len(code) - 1)
        return State(jnp.stack([step + 1, right], -1), reward, state.cont)

    return line_model()._replace(imagine=imagine)


def worth_of(model, state, config):
    return planning.objective(model, {}, state, config, None, None)


def planner_of(config, spec, horizon):
    return planning.PLANNERS[planning.named(config)[0]][1](config, spec, horizon)


def plan_once(config, spec, model, state, horizon, key=0):
    planner = planner_of(config, spec, horizon)
    run = lambda key: planner.step(key, worth_of(model, state, config), planner.start)
    return jax.jit(run)(jax.random.key(key))


def first_of(plan):
    """The action that a plan begins with."""
    dist = plan.dist if isinstance(plan, planning.ICEMPlan) else plan
    return float((dist.mean if isinstance(dist, planning.Gaussian) else dist)[0, 0])


@pytest.mark.parametrize("config", SMALL, ids=names)
def test_planners_find_the_optimum_of_a_line_and_hand_on_the_rest_of_the_plan(config):
    # Riccati, with three steps to go: a = -s 1.6 / 2.6; with two: a = -s 1.5 / 2.5.
    at = 0.8
    best = -at * 1.6 / 2.6
    state = State(jnp.array([at]), jnp.float32(0), jnp.float32(1))
    action, plan = plan_once(config, LINE, line_model(), state, 3)
    assert action.shape == (1,)
    np.testing.assert_allclose(action, [best], atol=0.05)
    np.testing.assert_allclose(first_of(plan), -(at + best) * 1.5 / 2.5, atol=0.08)


@pytest.mark.parametrize("config", SMALL, ids=names)
def test_planners_find_the_only_choices_that_pay(config):
    code, counts = (2, 0, 1), (3, 2)
    spec = EnvSpec(LINE.obs, MultiDiscrete(counts))
    if isinstance(config, GradientConfig):
        config = GradientConfig(candidates=128, iterations=2)
    state = State(jnp.array([0.0, 1.0]), jnp.float32(0), jnp.float32(1))
    action, plan = plan_once(config, spec, code_model(code, counts), state, 3)
    assert action[:3].tolist() == [0, 0, 1] and sorted(action[3:].tolist()) == [0, 1]
    probs = plan.dist if isinstance(plan, planning.ICEMPlan) else plan
    assert [int(row[:3].argmax()) for row in probs[:2]] == [0, 1]  # what is to follow


def test_a_return_counts_what_is_expected_to_be_reached():
    """1 + ½ 2 + ¼ 3 + ⅛ 10."""

    def imagine(params, key, state, action):
        return State(state.at + 1, state.at[..., 0] + 1, jnp.full_like(state.cont, 0.5))

    model = line_model()._replace(imagine=imagine)
    state = model.init_state({}, 2)._replace(cont=jnp.zeros(2))  # of the start does not matter: it is going
    actions = jnp.zeros((3, 2, 1))
    plain = planning.imagined_return(model, {}, jax.random.key(0), state, actions)
    value = planning.imagined_return(model, {}, jax.random.key(0), state, actions, lambda params, state: 10.0)
    assert plain.tolist() == [2.75, 2.75] and value.tolist() == [4.0, 4.0]


def test_chunks_change_nothing_and_nothing_is_worth_less_than_what_is_not_a_number():
    def imagine(params, key, state, action):  # with noise
        return State(action, action[..., 0] + jax.vmap(jax.random.normal)(key), state.cont)

    model, state = line_model()._replace(imagine=imagine), State(jnp.zeros(1), jnp.float32(0), jnp.float32(1))
    actions = jnp.linspace(-1, 1, 7).reshape(7, 1, 1).at[3].set(jnp.nan)
    worth = lambda chunk: jax.jit(worth_of(model, state, CEMConfig(chunk=chunk, particles=2)))
    each = [worth(chunk)(jax.random.key(0), actions) for chunk in (None, 3)]
    assert each[0].tolist() == each[1].tolist()
    assert int(each[0].argmin()) == 3 and np.isfinite(each[0]).all()


def test_a_shifted_plan_begins_one_step_later_and_is_as_wide_as_the_first():
    drawing = planning.draw(LINE, 3, CEMConfig(init_std=0.7))
    later = drawing.shift(planning.Gaussian(jnp.array([[1.0], [2.0], [3.0]]), jnp.full((3, 1), 0.1)))
    assert later.mean.ravel().tolist() == [2, 3, 0]
    np.testing.assert_allclose(later.std, 0.7)
    choices = planning.draw(EnvSpec({}, Discrete(2)), 2, CEMConfig())
    np.testing.assert_allclose(choices.shift(jnp.array([[1.0, 0.0], [0.0, 1.0]])), [[0.25, 0.75], [0.5, 0.5]])


def test_choices_are_fitted_to_shares_and_drawn_by_them():
    drawing = planning.draw(EnvSpec({}, Discrete(3)), 1, CEMConfig(smoothing=0.1))
    actions = jnp.eye(3)[jnp.array([0, 0, 0, 2])][:, None]
    probs = drawing.fit(drawing.start, actions, jnp.full(4, 0.25))
    np.testing.assert_allclose(probs, [[0.9 * 0.75 + 0.1 / 3, 0.1 / 3, 0.9 * 0.25 + 0.1 / 3]], rtol=1e-5)
    drawn = jax.jit(drawing.sample, static_argnums=2)(jax.random.key(0), probs, 20_000)
    np.testing.assert_allclose(drawn.mean(0), probs, atol=0.015)


def test_colored_noise_keeps_its_deviation_and_is_alike_from_step_to_step():
    white, red = planning.colored(8, 0.0), planning.colored(8, 2.0)
    np.testing.assert_allclose(white, np.eye(8), atol=1e-6)
    np.testing.assert_allclose((red @ red.T).diagonal(), 1, rtol=1e-5)
    neighbor, far = (red @ red.T)[3, 4:6]  # correlations
    assert neighbor > 0.5 and neighbor > far + 0.2


# ---------------------------------------------------------------------------------------------------------------------
# As a policy


def line_agent() -> Agent:
    return Agent(None, None, None, None, None, line_model(), None)


def timestep(at, first):
    flags = jnp.zeros(len(at), bool)
    return TimeStep({"vector": jnp.array(at)[:, None]}, jnp.zeros(len(at)), jnp.array(first), flags, flags)


def test_a_plan_is_kept_within_an_episode_and_begins_anew_with_the_next():
    agent = planning.with_planner(line_agent(), LINE, CEMConfig(horizon=3, candidates=32, elites=4, iterations=1))
    act = jax.jit(lambda *args: agent.act({}, *args, explore=False))
    fresh, keys = agent.act_carry({}, 2), jax.random.split(jax.random.key(0), 2)
    carry, action, latent = act(keys, fresh, timestep([0.9, -0.9], [True, True]))
    assert latent == () and action.shape == (2, 1) and action[0, 0] < 0 < action[1, 0]
    assert jnp.abs(carry.plan.mean).max() > 0.05
    again = timestep([0.5, 0.5], [True, False])
    _, kept, _ = act(keys, carry, again)
    _, anew, _ = act(keys, fresh, again)
    assert kept[0] == anew[0] and kept[1] != anew[1]


def test_an_episode_is_planned_as_it_is_alone():
    agent = planning.with_planner(line_agent(), LINE, ICEMConfig(horizon=2, candidates=16, elites=4, iterations=2))
    keys, step = jax.random.split(jax.random.key(0), 3), timestep([0.9, -0.9, 0.1], [True] * 3)
    act = jax.jit(lambda *args: agent.act({}, *args, explore=False)[1])
    together = act(keys, agent.act_carry({}, 3), step)
    alone = act(keys[1:2], agent.act_carry({}, 1), jax.tree.map(lambda x: x[1:2], step))
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "context", "message"),
    [
        (CEMConfig(horizon=5), 4, r"horizon: 5 is not valid; an integer in \[1, 4\] is"),
        (CEMConfig(horizon=0), None, r"horizon must be in \[1, 4096\]"),
        (CEMConfig(elites=5, candidates=4), None, "elites must be at most candidates=4, got 5"),
        (MPPIConfig(elites=501), None, "elites must be at most candidates=500"),
        (MPPIConfig(temperature=0.0), None, "temperature must be positive"),
        (ICEMConfig(decay=0.5), None, "decay must be 1 or more"),
        (CEMConfig(chunk=0), None, "chunk must be positive"),
        (CEMConfig(horizon="5"), None, "horizon: '5' is not valid; an integer or None is"),
        (CEMConfig(candidates=9.5), None, "candidates: 9.5 is not valid; an integer is"),
        ("cme", None, "policy: 'cme' is not valid; one of cem, icem, mppi, gradient"),
        (CEMConfig, None, "policy: .* is not valid"),
    ],
)
def test_what_cannot_be_planned_is_refused(policy, context, message):
    agent = line_agent()._replace(model=line_model()._replace(context=context))
    with pytest.raises(UsageError, match=message):
        planning.with_planner(agent, LINE, policy)


def test_a_horizon_that_is_not_given_is_the_papers_or_what_the_context_holds():
    found = [planning.settle(CEMConfig(), line_model()._replace(context=n)).horizon for n in (None, 4, 40)]
    assert found == [12, 4, 12]


def test_the_command_line_knows_the_planners_that_there_are():
    assert tuple(planning.PLANNERS) == arguments.PLANNERS


# ---------------------------------------------------------------------------------------------------------------------
# In the models of the agents


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiny"), [("dreamer_v1", TINY_V1), ("dreamer_v2", TINY_V2)])
def test_rewards_are_predicted_in_the_units_of_the_environment(name, tiny):
    agents = {
        kind: AGENTS[name][1](PIXELS, dataclasses.replace(tiny, reward_transform=kind))
        for kind in ("identity", "symlog", "tanh")
    }
    params = perturbed(jax.jit(agents["identity"].init)(jax.random.key(0)), 1.0).params
    state = agents["identity"].model.init_state(params, 1)
    reward = {kind: float(agent.model.predict(params, state)[0][0]) for kind, agent in agents.items()}
    assert abs(reward["identity"]) > 0.01
    np.testing.assert_allclose(reward["symlog"], symexp(jnp.float32(reward["identity"])), rtol=1e-5)
    np.testing.assert_allclose(np.tanh(reward["tanh"]), np.clip(reward["identity"], -0.999, 0.999), rtol=1e-5)


def test_models_say_what_they_cannot_be_planned_by():
    without = dataclasses.replace(
        world_models.TINY, reward_head="none", evolve=dataclasses.replace(world_models.TINY.evolve, where="env")
    )
    spec = pixels("world_models")
    with pytest.raises(UsageError, match=r"^reward_head: 'none' predicts no rewards; mse or gaussian is valid"):
        planning.with_planner(make("world_models", config=without), spec, "cem")
    pays = dataclasses.replace(without, dream_reward="survival")
    planning.with_planner(make("world_models", config=pays), spec, "cem")
    iris, blocks = make("iris"), ROWS["iris"].config.max_blocks
    with pytest.raises(UsageError, match=r"^policy: 'gradient' is not valid here: .*tokens.*; cem, icem or mppi is"):
        planning.with_planner(iris, pixels("iris"), "gradient")
    with pytest.raises(UsageError, match=rf"^horizon: {blocks + 1} is not valid; an integer in \[1, {blocks}\] is"):
        planning.with_planner(iris, pixels("iris"), CEMConfig(horizon=blocks + 1))
    planning.with_planner(iris, pixels("iris"), CEMConfig(horizon=blocks))


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(ROWS, ("iris",)))
def test_every_agent_can_be_planned_in(name):
    agent, spec = make(name), pixels(name)
    state = perturbed(jax.jit(agent.init)(jax.random.key(0)))
    step = jax.tree.map(lambda x: x[0], random_step(spec, (1, 2)))
    for policy, (config_class, _) in planning.PLANNERS.items():
        if name == "iris" and policy == "gradient":
            continue
        more = {} if policy == "gradient" else {"elites": 2}
        planned = planning.with_planner(agent, spec, config_class(horizon=2, candidates=4, iterations=2, **more))
        act = lambda key, carry, planned=planned: planned.act(state.variables, key, carry, step, explore=False)
        carry = planned.act_carry(state.variables, 2)
        if policy == "mppi":  # others are traced alone
            carry, action, _ = jax.jit(act)(jax.random.key(0), carry)
            assert action.sum(-1).tolist() == [1, 1] and action.max() == 1
        after, action, latent = jax.eval_shape(act, jax.random.key(1), carry)
        alike = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
        assert action.shape == (2, 3) and latent == () and jax.tree.all(jax.tree.map(alike, carry, after))


# ---------------------------------------------------------------------------------------------------------------------
# Of a run


@pytest.mark.slow
def test_a_run_is_evaluated_and_acts_by_a_planner(tmp_path, capsys):
    run, _ = train(tmp_path / "run", 200)
    small = CEMConfig(horizon=1, candidates=8, elites=2, iterations=2)
    planned = run.with_policy(small)
    scores = planned.evaluate(6, seed=3)
    assert scores == planned.evaluate(6, seed=3) and planned.planner == small and run.planner is None
    assert planned.act({"vector": np.array([1.0], np.float32)}, is_first=True) in (0, 1, 2)
    with pytest.raises(UsageError, match=r"^action: 'mode' is of the agent's own policy"):
        planned.evaluate(1, action="mode")
    words = "--planner.horizon 1 --planner.candidates 8 --planner.elites 2 --planner.iterations 2".split()
    command = ["eval", str(run.path), "--episodes", "6", "--seed", "3"]
    assert main([*command, "--policy", "cem", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["returns"] == scores.returns and found["policy"] == "cem" and "action" not in found
    assert found["planner"] == dataclasses.asdict(small)
    assert main([*command, "--policy", "mppi", "--planner.horizon", "2", "--planner.candidates", "8"]) == 0
    assert main(command) == 0
    kept = [path.name.split("-")[-5] for path in (run.path / "evals").glob("*-seed-3-*")]
    assert sorted(kept) == ["cem", "mode", "mppi"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--policy cme", ["--policy", "'cme'", "cem", "icem"]),
        ("--planner.horizon 3", ["--planner.horizon", "--policy", "cem"]),
        ("--policy cem --planner.horizn 3", ["--planner.horizn", "did you mean --planner.horizon"]),
        ("--policy mppi --planner.keep 0.5", ["--planner.keep", "unknown option"]),
        ("--policy cem --planner.elites many", ["--planner.elites", "many"]),
    ],
)
def test_a_planner_that_is_not_asked_for_rightly_is_refused(words, found, tmp_path, capsys):
    assert main(["eval", str(tmp_path), *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in found), said
