"""Sizes of IRIS's modules, their numbers under bfloat16, and their optimizers."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.iris.made import ATARI, PAPER, batch_for, jit, made, sequence, update_of
from wmjax.agents import iris
from wmjax.agents.iris import modules, tokenizer
from wmjax.types import Discrete


@pytest.mark.slow
@pytest.mark.parametrize("actions", [4, 6])
def test_the_papers_sizes_have_the_papers_parameter_counts(actions):
    spec = ATARI._replace(action=Discrete(actions))
    params = jax.eval_shape(
        lambda key: iris.init_params(iris.networks(spec, PAPER), spec, PAPER, key), jax.random.key(0)
    )
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert {name: count(value) for name, value in params.items()} == {
        "tokenizer": 4_027_523,
        "world_model": 8_446_469 + 256 * actions,
        "actor_critic": 3_215_905 + 513 * actions,
    }
    assert count(params["tokenizer"]["encoder"]) == 1_418_240
    assert count(params["tokenizer"]["decoder"]) == 1_821_827


def test_the_papers_context_holds_exactly_340_tokens_of_16_to_a_frame():
    model = iris.networks(ATARI, PAPER).world_model
    assert (model.tokens, model.block, model.max_tokens) == (16, 17, 340)
    # The first frame, and 19 steps of an action and a frame; the last action's outcome is not used.
    assert 16 + (PAPER.horizon - 1) * model.block <= model.max_tokens < 16 + PAPER.horizon * model.block


@pytest.mark.slow
def test_logits_losses_and_distances_stay_in_float32_under_bfloat16():
    agent, config, nets, state = made(compute_dtype="bfloat16")
    z = jit(tokenizer.latents, nets, config)(state.params, jnp.zeros((1, 16, 16, 3)))
    assert z.dtype == jnp.float32
    for name in ("tokenizer", "world_model", "actor_critic"):
        new, metrics, _ = update_of(agent, name)(state, jax.random.key(0), batch_for(agent, name))
        assert all(value.dtype == jnp.float32 for value in metrics.values())
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    tokens, action = jnp.zeros((1, 2, 4), jnp.int32), jnp.zeros((1, 2, 3))
    logits = jit(sequence, nets)(state.params["world_model"], tokens, action)
    assert all(x.dtype == jnp.float32 for x in logits)


@pytest.mark.slow
def test_embeddings_positions_biases_and_norms_do_not_decay():
    _, config, _, state = made()
    adam = modules.optimizers(config)["world_model"]
    weights = state.params["world_model"]
    changes, _ = adam.update(jax.tree.map(jnp.zeros_like, weights), adam.init(weights), weights)
    moved = {jax.tree_util.keystr(p): bool(np.any(x)) for p, x in jax.tree_util.tree_leaves_with_path(changes)}
    assert {name for name, value in moved.items() if value} == {name for name in moved if "kernel" in name}
