"""Imagines on four devices under `pmap` and on one, and compares. Run by `test_conformance.py`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests.agents.batches import PIXELS, perturb
from tests.test_conformance import make
from wmjax import dreaming
from wmjax.ops import noise

ROWS, HORIZON = 8, 4


def main(name: str) -> None:
    """Raises AssertionError unless four devices imagine what one does."""
    agent = make(name)
    params = perturb(jax.jit(agent.init)(jax.random.key(0)).variables)
    keys = noise.row_keys(jax.random.key(1), ROWS)
    state = agent.model.init_state(params, ROWS)
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape).astype(x.dtype), state)

    def imagine(keys, state):
        policy = lambda key, carry, state: agent.policy(params, key, carry, state, explore=True)
        carry = agent.policy_carry(params, keys.shape[0])
        _, states, actions = dreaming.imagine(agent.model, params, keys, state, policy, HORIZON, policy_carry=carry)
        return states, actions

    one = jax.jit(imagine)(keys, state)
    split = jax.tree.map(lambda x: x.reshape(4, ROWS // 4, *x.shape[1:]), (keys, state))
    assert len(jax.devices()) == 4
    many = jax.pmap(imagine)(*split)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        joined = jnp.moveaxis(y, 0, 1).reshape(x.shape)
        np.testing.assert_allclose(np.asarray(joined), np.asarray(x), atol=1e-4)
    assert np.asarray(one[1]).shape == (HORIZON, ROWS, PIXELS.action.n)
    print("equal on 4 devices")


if __name__ == "__main__":
    main(sys.argv[1])
