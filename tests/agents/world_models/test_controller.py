"""What C sees, and how its numbers are laid out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.agents.batches import random_step
from tests.agents.world_models.made import CAR, shapes, size, tiny
from wmjax.agents.world_models import controller, memory


def test_controllers_see_what_their_inputs_say():
    for inputs, count in (("z", 99), ("zh", 867), ("zc", 867), ("zch", 1635)):
        assert size(shapes("paper_car", CAR, inputs=inputs)["controller"]) == count
    assert size(shapes("paper_car", CAR, inputs="z", controller_units=40)["controller"]) == 33 * 40 + 41 * 3


def test_the_controller_sees_the_memory_before_the_present_action_is_fed_to_it():
    agent, config, nets, state = tiny(CAR, controller_z="mean")
    step = random_step(CAR, (3, 2))._replace(is_first=jnp.zeros((3, 2), bool).at[0].set(True))
    carry, carries, actions = agent.act_carry(state.params, 2), [], []
    act = jax.jit(lambda key, carry, step: agent.act(state.params, key, carry, step, explore=False))
    for t in range(3):
        carry, action, _ = act(jax.random.key(t), carry, jax.tree.map(lambda x, t=t: x[t], step))
        carries.append(carry.state)
        actions.append(action)
    assert not carries[0].h.any() and not carries[0].c.any()
    zeros, first = jnp.zeros((2, config.hidden)), step.is_first
    z = jnp.stack([s.z for s in carries])
    hidden, _ = memory.unroll(nets, state.params["memory"], zeros, zeros, z, jnp.stack(actions), first)
    np.testing.assert_allclose(carries[1].h, hidden[0], atol=1e-6)
    np.testing.assert_allclose(carries[2].h, hidden[1], atol=1e-6)
    theta = state.params["controller"]
    expected = np.tanh(np.concatenate([carries[2].z, carries[2].h], -1) @ theta[3:].reshape(-1, 3) + theta[:3])
    np.testing.assert_allclose(actions[2], expected, atol=1e-5)


def test_a_controller_is_its_bias_and_then_its_matrix_row_by_row():
    layers = (4, 2)
    bias, kernel = np.array([0.1, -0.2]), np.arange(8.0).reshape(4, 2) / 10
    theta = jnp.asarray(np.concatenate([bias, kernel.ravel()]), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(controller.controller(theta, x, layers), np.tanh(x @ kernel + bias), rtol=1e-5)
    np.testing.assert_allclose(controller.controller(theta[2:], x, layers, bias=False), np.tanh(x @ kernel), rtol=1e-5)


def test_a_population_of_controllers_acts_each_on_its_own_rows():
    layers = (4, 3, 2)
    thetas = jax.random.normal(jax.random.key(0), (3, 5 * 3 + 4 * 2))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    together = controller.controller(thetas, x, layers)
    for p in range(3):
        np.testing.assert_allclose(
            together[2 * p : 2 * p + 2], controller.controller(thetas[p], x[2 * p : 2 * p + 2], layers), atol=1e-6
        )
