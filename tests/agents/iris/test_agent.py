"""How IRIS acts, its schedule, its batches, and that it resumes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import PIXELS, TINY_IRIS, perturb, random_step
from tests.agents.iris.made import ATARI, PAPER, batch_for, gradient_flow, jit, look, made, update_named, update_of
from wmjax.agents import iris
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device


@pytest.mark.slow
def test_each_update_trains_its_own_module_and_no_other():
    assert gradient_flow() == {name: {name} for name in ("tokenizer", "world_model", "actor_critic")}


@pytest.mark.slow
def test_random_actions_are_taken_while_collecting_only_and_evaluation_samples_at_half_the_temperature():
    agent, config, nets, state = made(epsilon=0.5, eval_temperature=0.5)
    rows = 4000
    state = state._replace(params=state.params | {"actor_critic": perturb(state.params["actor_critic"], 1, 0.5)})
    step = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), random_step(PIXELS, (1,)))
    memory = agent.policy_carry(state.params, rows)
    tokens = jit(iris.encode, nets, config)(state.params, step.obs["image"][:1])
    one = jax.tree.map(lambda x: x[:1], memory)
    _, logits = jit(look, nets)(state.params, one, jit(iris.decode, nets)(state.params, tokens))
    act = jax.jit(agent.act, static_argnames="explore")
    share = lambda explore: act(state.params, jax.random.key(0), memory, step, explore=explore)[1].mean(0)
    np.testing.assert_allclose(share(True), 0.5 * jax.nn.softmax(logits[0]) + 0.5 / 3, atol=0.03)
    np.testing.assert_allclose(share(False), jax.nn.softmax(logits[0] / 0.5), atol=0.03)
    greedy = jax.jit(iris.iris(PIXELS, dataclasses.replace(config, eval_action="mode")).act, static_argnames="explore")
    assert greedy(state.params, jax.random.key(0), memory, step, explore=False)[1].std(0).max() == 0


def test_the_first_epochs_that_train_are_the_6th_the_26th_and_the_51st():
    config = dataclasses.replace(PAPER, collect_epochs=500, final_epochs=100)
    stages = iris.iris(ATARI, config).recipe.stages
    epochs = [(s.iterations, s.collect, [u.name for u in s.updates]) for s in stages]
    names = ["tokenizer", "world_model", "actor_critic"]
    assert epochs == [
        (5, 200, []), (20, 200, names[:1]), (25, 200, names[:2]), (450, 200, names), (100, 0, names)
    ]  # fmt: skip
    updates = {n: sum(s.iterations * u.repeats for s in stages for u in s.updates if u.name == n) for n in names}
    assert updates == {"tokenizer": 119_000, "world_model": 115_000, "actor_critic": 110_000}


def test_batches_come_from_episodes_uniformly_padded_after_for_the_models_and_before_for_the_policy():
    _, _, _, everything = [u.updates for u in iris.iris(ATARI, PAPER).recipe.stages]
    found = {u.name: (u.batch_size, u.sampling) for u in everything}
    assert {name: (s.over, s.pad) for name, (_, s) in found.items()} == {
        "tokenizer": ("episodes", "right"), "world_model": ("episodes", "right"), "actor_critic": ("episodes", "left")
    }  # fmt: skip
    assert {name: (batch, s.context, s.length) for name, (batch, s) in found.items()} == {
        "tokenizer": (256, 0, 1), "world_model": (64, 0, 21), "actor_critic": (64, 20, 1)
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "world_model"])
@pytest.mark.parametrize("changes", [{}, {"codebook": "ema", "codebook_reset": 0.5, "dropout": 0.3}], ids=str)
def test_half_batches_under_a_named_axis_equal_the_full_batch_where_padding_differs(name, changes):
    """The conformance tests do this for the actor-critic."""
    agent, config, _, state = made(**changes)
    half = iris.iris(PIXELS, config, axis_name="devices")
    batch = batch_for(agent, name)
    if name == "world_model":
        batch = batch._replace(mask=batch.mask.at[2:, 0].set(False).at[1:, 1].set(False))
    expected, metrics, _ = update_of(agent, name)(state, jax.random.key(0), batch)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]), batch)
    update = jax.jit(jax.vmap(update_named(half, name).fn, (None, None, 1), axis_name="devices"))
    found, other, _ = update(state, jax.random.key(0), split)
    for (path, new), pair in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(pair[0], pair[1])
        # The bias of keys moves all logits of a query alike: its gradient is rounding alone, which Adam scales up.
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith("key/bias"):
            np.testing.assert_allclose(pair[0], new, atol=2e-5)
    for term, value in metrics.items():
        np.testing.assert_allclose(other[term][0], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_resumes_byte_for_byte_in_every_phase_of_the_recipe(tmp_path):
    env = agent_actions(make_env("catch", image_size=16))
    agent = iris.iris(env.spec, dataclasses.replace(TINY_IRIS, collect_epochs=5, final_epochs=2))
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    template = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    assert [stage.name for stage in agent.recipe.stages] == ["collect", "tokenizer", "world_model", "train", "final"]
    for number, stage in enumerate(agent.recipe.stages):
        advance = device.compile_stage(agent, env, stage)
        whole, _ = advance(jax.tree.map(jnp.copy, run), 2)
        part, _ = advance(run, 1)
        checkpoint.save(tmp_path, number, part)
        again, _ = advance(checkpoint.restore(tmp_path, template), 1)
        assert checkpoint.digest(again) == checkpoint.digest(whole)
        run = device.next_stage(again)
