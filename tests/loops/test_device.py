import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe, learn
from wmjax import evolution
from wmjax.loops import checkpoint
from wmjax.loops import device as loop
from wmjax.loops.schedule import Schedule
from wmjax.types import Evolve, Recipe, Sampling, Stage, Update, UsageError


def with_recipe(**kwargs):
    return fake_agent(fake_recipe(fake_agent().act, **kwargs))


def begin(agent, env):
    return jax.jit(lambda key: loop.init(agent, env, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def programs():
    agent, env = with_recipe(), counter_env()
    return agent, env, [loop.compile_stage(agent, env, stage) for stage in agent.recipe.stages]


@pytest.fixture(scope="module")
def prefilled(programs):
    """From a seed to a run at the start of its second stage; a fresh one each time, for runs are donated."""
    agent, env, (prefill, _) = programs
    start = jax.jit(lambda key: loop.init(agent, env, key))
    return lambda seed=0: loop.next_stage(prefill(start(jax.random.key(seed)), 3)[0])


def test_a_stage_collects_and_learns_as_often_as_its_recipe_says(programs):
    agent, env, (prefill, train) = programs
    run, metrics = prefill(begin(agent, env), 3)
    assert (int(run.steps), int(run.replay.added), int(run.agent.step)) == (6, 6, 0)
    assert set(metrics) == {"episode/return", "episode/length", "episode/count"}
    run, metrics = train(loop.next_stage(run), 5)
    assert (int(run.steps), int(run.replay.added), int(run.agent.step)) == (16, 16, 10)
    assert (int(run.stage), int(run.iteration)) == (1, 5)
    assert Schedule(agent, env).env_steps(run) == 16 * 2 * 2  # environments, action repeat
    assert float(metrics["model/step"]) == 4.5  # the mean over updates 0..9
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_replay_holds_the_stream_without_gaps_and_the_latents_of_acting(programs, prefilled):
    run, _ = programs[2][1](prefilled(), 0)
    assert run.replay.data.step.obs["vector"][:6, 1, 0].tolist() == [0, 1, 2, 3, 4, 0]
    assert not run.replay.data.latent.any()  # random acting stores zeros
    assert run.timestep.obs["vector"].tolist() == [[1.0], [1.0]]


def test_the_latents_that_an_update_gives_are_written_to_replay(programs, prefilled):
    run, _ = programs[2][1](prefilled(), 1)  # the online queue holds one window of each environment: rows 0..3
    assert run.replay.data.latent[:4, :, 0].max() <= 2 and (run.replay.data.latent[:4] >= 1).all()
    assert run.replay.data.latent[8:].max() == 0


def test_episodes_are_summed_across_iterations():
    env, agent = counter_env(), with_recipe()
    prefill = loop.compile_stage(agent, env, agent.recipe.stages[0])
    run, metrics = prefill(begin(agent, env), 2)  # four records: the episode's fifth, its last, is yet to come
    assert float(metrics["episode/count"]) == 0 and np.isnan(metrics["episode/return"])
    run, metrics = prefill(run, 4)  # records 5 to 12; the second episode ends with record 10
    assert float(metrics["episode/count"]) == 4 and float(metrics["episode/length"]) == 4
    rewards = np.asarray(run.replay.data.step.reward[:10])
    assert float(metrics["episode/return"]) == pytest.approx(rewards.sum() / 4)


def test_any_cut_in_chunks_gives_the_same_run_byte_for_byte(programs, prefilled):
    train = programs[2][1]
    whole, _ = train(prefilled(), 12)
    for cut in ([6, 6], [1, 4, 7]):
        run = prefilled()
        for iterations in cut:
            run, _ = train(run, iterations)
        assert checkpoint.digest(run) == checkpoint.digest(whole)
    other, _ = train(prefilled(seed=1), 12)
    assert checkpoint.digest(other) != checkpoint.digest(whole)


def test_every_number_of_iterations_is_one_program():
    agent, env, traces = with_recipe(), counter_env(), []
    spy = env._replace(step=lambda *args: traces.append(1) or env.step(*args))
    prefill = loop.compile_stage(agent, spy, agent.recipe.stages[0])
    run, _ = prefill(begin(agent, spy), 1)
    first = len(traces)
    for iterations in (2, 7, 1):
        run, _ = prefill(run, iterations)
    assert len(traces) == first > 0


def test_the_state_is_donated(programs, prefilled):
    run = prefilled()
    image = run.replay.data.step.obs["vector"]
    programs[2][1](run, 1)
    assert image.is_deleted()


def test_a_stage_without_collecting_only_learns():
    update = Update("encode", lambda s, k, b: (*learn(s, k, b)[:2], None), 3, 2, Sampling(2))
    recipe = Recipe(2, 20, (Stage("collect", 4, 1, None), Stage("learn", 2, 0, None, (update,))))
    agent, env = fake_agent(recipe), counter_env()
    run, _ = loop.compile_stage(agent, env, recipe.stages[0])(begin(agent, env), 4)
    run, metrics = loop.compile_stage(agent, env, recipe.stages[1])(loop.next_stage(run), 2)
    assert (int(run.steps), int(run.agent.step)) == (4, 6)
    assert set(metrics) == {"encode/seen", "encode/step", "encode/skipped"}
    assert not run.replay.data.latent.any()  # an update that gives no latents writes none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": 0}, "stage 'train': its update 'model' samples 4 steps, but only 2"),
        ({"batch_size": 17}, "batch_size 17"),
        ({"capacity": 6}, "length 3"),
        ({"collect": 40}, "stage 'prefill': collect 40"),
        ({"prefill": None}, "stage 'prefill': only the last stage"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_before_anything_is_compiled(change, message):
    agent = with_recipe(**change)
    with pytest.raises(UsageError, match=message):
        loop.make_stage(agent, counter_env(), agent.recipe.stages[1])
    with pytest.raises(UsageError, match=message):
        loop.init(agent, counter_env(), jax.random.key(0))


# ---------------------------------------------------------------------------------------------------------------------
# Searches for parameters


@pytest.fixture
def searching(monkeypatch):
    """Makes an agent that collects four steps and then moves a weight by noise and by what it is given of replay."""

    def make(where="env", metric=lambda state: state.params["w"].mean()):
        seen = []

        def iterate(agent, env, evolve, state, key, batch, axis_name):
            seen.append((agent, env, evolve, axis_name))
            noise = jax.random.normal(key, state.params["w"].shape)
            given = 0.0 if batch is None else batch.step.obs["vector"].mean()
            state = state._replace(params={"w": 0.9 * state.params["w"] + given + noise}, step=state.step + 1)
            return state, {"fitness": metric(state)}

        monkeypatch.setattr(evolution, "iteration", iterate)
        evolve = Evolve(
            "search", None, None, None, where, rollouts=1, max_steps=3, population=4, generations=1, mean_rollouts=1,
            sampling=Sampling(3), batch_size=5,
        )  # fmt: skip
        stages = (Stage("collect", 2, 2, None), Stage("evolve", 9, 0, None, evolve=evolve))
        return fake_agent(Recipe(2, 20, stages)), seen

    return make


def collected_and(agent):
    env = counter_env()
    collect, search = [loop.compile_stage(agent, env, stage) for stage in agent.recipe.stages]
    return lambda: loop.next_stage(collect(begin(agent, env), 2)[0]), search


@pytest.mark.parametrize("where", ["env", "dream"])
def test_a_search_goes_on_byte_for_byte_however_it_is_cut(searching, where):
    agent, seen = searching(where)
    start, search = collected_and(agent)
    whole, metrics = search(start(), 6)
    run, first = search(start(), 2)
    run, second = search(run, 4)
    assert checkpoint.digest(run) == checkpoint.digest(whole)
    assert (int(whole.agent.step), int(whole.iteration), int(whole.steps)) == (6, 6, 4)
    assert float(metrics["search/fitness"]) == pytest.approx(
        (2 * first["search/fitness"] + 4 * second["search/fitness"]) / 6
    )
    assert seen[0][2].name == "search" and seen[0][3] is None


def test_a_search_in_dreams_is_given_windows_of_replay_and_one_in_the_environment_nothing(searching, monkeypatch):
    agent, _ = searching("dream")
    stages, shapes = agent.recipe.stages, []
    spy = lambda agent, env, evolve, state, key, batch, axis_name: (
        shapes.append(jax.tree.map(jnp.shape, batch)) or (state, {})
    )
    monkeypatch.setattr(evolution, "iteration", spy)
    start, search = collected_and(agent)
    search(start(), 1)
    assert shapes[0].action == (3, 5, 3) and shapes[0].step.reward == (3, 5)
    shapes.clear()
    here = stages[1]._replace(evolve=stages[1].evolve._replace(where="env"))
    start, search = collected_and(agent._replace(recipe=agent.recipe._replace(stages=(stages[0], here))))
    search(start(), 1)
    assert shapes[0] is None


def test_a_fitness_that_is_not_finite_is_no_reason_to_skip_a_generation(searching):
    agent, _ = searching(metric=lambda state: jnp.where(state.step == 2, jnp.nan, 1.0))
    start, search = collected_and(agent)
    run, metrics = search(start(), 3)
    assert int(run.agent.step) == 3 and int(run.skips.total) == 0
    assert np.isnan(metrics["search/fitness"]) and "search/skipped" not in metrics


# ---------------------------------------------------------------------------------------------------------------------
# Updates that are not finite


def poisoned(state, key, batch):
    """As `learn`, but its loss or what it changes is not finite, as the number of the update in `key` says."""
    new, metrics, latent = learn(state, key, batch)
    kind = jax.random.randint(jax.random.fold_in(key, 7), (), 0, 4)
    bad = jnp.where(kind == 0, jnp.nan, 0.0)
    new = new._replace(params={"w": new.params["w"] + jnp.where(kind == 1, jnp.inf, 0.0)})
    return new, metrics | {"loss": bad, "actor_grad_norm": jnp.where(kind == 2, -jnp.inf, 1.0)}, latent


def with_update(fn, **kwargs):
    recipe = with_recipe(**kwargs).recipe
    prefill, train = recipe.stages
    return fake_agent(recipe._replace(stages=(prefill, train._replace(updates=(train.updates[0]._replace(fn=fn),)))))


def test_an_update_that_is_not_finite_leaves_the_whole_agent_and_its_latents_and_is_counted():
    env, steps, kept = counter_env(), 40, []

    def watched(state, key, batch):
        new, metrics, latent = poisoned(state, key, batch)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["actor_grad_norm"])
        jax.debug.callback(lambda *x: kept.append(x), finite & jnp.isfinite(new.params["w"]).all(), new, ordered=True)
        return new, metrics, latent

    agent = with_update(watched, repeats=1)
    prefill, train = [loop.compile_stage(agent, env, stage) for stage in agent.recipe.stages]
    run = loop.next_stage(prefill(begin(agent, env), 3)[0])
    run, metrics = train(run, steps)
    jax.effects_barrier()
    good = [new for ok, new in kept if ok]
    assert len(kept) == steps and 5 < len(good) < steps - 5
    np.testing.assert_array_equal(run.agent.params["w"], good[-1].params["w"])
    assert int(run.agent.step) == len(good) == good[-1].step
    assert int(run.skips.total) == float(metrics["model/skipped"]) == steps - len(good)
    rows = "".join(" x"[not ok] for ok, _ in kept).split(" ")
    assert int(run.skips.longest) == max(map(len, rows)) and int(run.skips.in_a_row) == len(rows[-1])
    assert np.isfinite(metrics["model/seen"]) and float(metrics["model/loss"]) == 0
    # A written latent is the number of the update that wrote it: those of skipped ones are not there.
    assert run.replay.data.latent.max() <= len(good)


def test_metrics_are_means_over_the_updates_that_were_kept():
    def half(state, key, batch):
        new, _, _ = learn(state, key, batch)
        draw = jax.random.uniform(key)
        return new, {"draw": draw, "loss": jnp.where(draw < 0.5, jnp.nan, 1.0)}, None

    agent, env = with_update(half, repeats=1), counter_env()
    prefill, train = [loop.compile_stage(agent, env, stage) for stage in agent.recipe.stages]
    _, metrics = train(loop.next_stage(prefill(begin(agent, env), 3)[0]), 60)
    assert 0.65 < float(metrics["model/draw"]) < 0.85 and float(metrics["model/loss"]) == 1
    assert 15 < float(metrics["model/skipped"]) < 45


def test_where_no_update_is_finite_the_agent_stays_as_it_was():
    agent = with_update(lambda s, k, b: (s._replace(step=s.step + 1), {"loss": jnp.float32(jnp.nan)}, b.latent + 1))
    env = counter_env()
    prefill, train = [loop.compile_stage(agent, env, stage) for stage in agent.recipe.stages]
    before = loop.next_stage(prefill(begin(agent, env), 3)[0])
    digest = checkpoint.digest(before.agent)
    run, metrics = train(before, 4)
    assert checkpoint.digest(run.agent) == digest
    assert [int(x) for x in run.skips] == [8, 8, 8] and np.isnan(metrics["model/loss"])
    assert run.replay.data.latent.max() <= 4  # what acting stored


@pytest.mark.parametrize("seed", range(5))
def test_a_run_restored_at_a_random_iteration_goes_on_byte_for_byte(programs, prefilled, tmp_path, seed):
    agent, env, (_, train) = programs
    stop = int(np.random.default_rng(seed).integers(1, 12))
    whole, _ = train(prefilled(seed), 12)
    run, _ = train(prefilled(seed), stop)
    checkpoint.save(tmp_path, stop, run)
    template = jax.eval_shape(lambda key: loop.init(agent, env, key), jax.random.key(0))
    run, _ = train(checkpoint.restore(tmp_path, template), 12 - stop)
    assert checkpoint.digest(run) == checkpoint.digest(whole)
