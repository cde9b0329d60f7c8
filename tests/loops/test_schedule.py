"""Recipes that cannot be run, and how long the stages of one are."""

import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe, learn
from wmjax.loops.schedule import Schedule, check
from wmjax.types import Evolve, Recipe, Sampling, Stage, Update, UsageError


def test_two_online_samplings_must_have_one_length():
    recipe = fake_recipe(fake_agent().act)
    other = recipe.stages[1].updates[0]._replace(sampling=Sampling(2, online=True))
    stage = recipe.stages[1]._replace(updates=(*recipe.stages[1].updates, other))
    with pytest.raises(UsageError, match="online"):
        check(fake_agent(recipe._replace(stages=(recipe.stages[0], stage))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampling=Sampling(6), batch_size=1), "stage 'evolve': its update 'search' samples 6 steps, but only 4"),
        (dict(batch_size=7), "batch_size 7"),
        (dict(open=True), "may leave its iterations open only if it collects"),
        (dict(empty=True), "neither collects nor learns"),
    ],
)
def test_a_search_that_cannot_be_run_is_refused(change, message):
    evolve = Evolve(
        "search", None, None, None, "dream", rollouts=1, max_steps=3, population=4, generations=1, mean_rollouts=1,
        sampling=Sampling(3), batch_size=5,
    )  # fmt: skip
    collect, search = Stage("collect", 2, 2, None), Stage("evolve", 9, 0, None, evolve=evolve)
    if "open" in change:
        search = search._replace(iterations=None)
    elif "empty" in change:
        search = search._replace(evolve=None)
    else:
        search = search._replace(evolve=search.evolve._replace(**change))
    with pytest.raises(UsageError, match=message):
        check(fake_agent(Recipe(2, 20, (collect, search))))


def test_an_open_stage_uses_up_the_budget_and_no_stage_collects_more():
    stages = (Stage("prefill", 2, 3, None), Stage("still", 5, 0, None, (Update("model", learn, 1, 2, Sampling(3)),)))
    agent, env = fake_agent(Recipe(2, 64, (*stages, Stage("train", None, 4, None)))), counter_env()
    lengths = lambda steps: Schedule(agent, env, steps).lengths
    # Two environments of two frames a step: 24 env steps of prefill, and 16 for each iteration of the last stage.
    assert [lengths(steps) for steps in (10, 24, 25, 40, 41)] == [[1, 5, 0], [2, 5, 0], [2, 5, 1], [2, 5, 1], [2, 5, 2]]
    assert Schedule(agent, env).whole() is None and Schedule(agent, env, 41).records == 21
    assert Schedule(fake_agent(Recipe(2, 64, stages)), env).whole() == 24
