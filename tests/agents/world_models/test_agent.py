"""How the agent acts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.agents.batches import random_step
from tests.agents.world_models.made import CAR, tiny


@pytest.mark.slow
def test_noise_of_a_row_does_not_depend_on_the_batch():
    agent, _, _, state = tiny(CAR)
    step, keys = random_step(CAR, (3,)), jax.random.split(jax.random.key(0), 3)
    act = jax.jit(lambda keys, step: agent.act(
        state.params, keys, agent.act_carry(state.params, keys.shape[0]), step, explore=True
    )[1])  # fmt: skip
    alone = act(keys[:1], jax.tree.map(lambda x: x[:1], step))
    np.testing.assert_allclose(alone[0], act(keys, step)[0], atol=1e-5)
