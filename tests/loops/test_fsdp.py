import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_conformance import ROWS, make
from wmjax.loops import fsdp
from wmjax.ops.flat import WIDTH
from wmjax.types import AgentState


def test_rules_say_by_the_path_and_the_shape_along_which_axis_a_leaf_is_spread():
    zeros = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    kernels = {"tall": zeros(64, 12), "wide": zeros(12, 64), "square": zeros(32, 32), "odd": zeros(63, 8)}
    small = {"bias": zeros(64), "prime": zeros(17, 17), "scalar": zeros()}
    rows = {"mu": zeros(7, WIDTH), "few": zeros(1, WIDTH), "count": zeros(), "other": zeros(64, 64)}
    search = {"covariance": zeros(WIDTH, WIDTH)}
    state = AgentState(
        kernels | small, {"all": rows, "controller": search}, zeros(64, 64), zeros(), {"slow": zeros(5, 64)}
    )
    found = fsdp.axes(state, 4)
    assert found.params == dict(tall=0, wide=1, square=1, odd=1) | dict.fromkeys(small, fsdp.WHOLE)
    assert found.opt_state == {
        "all": dict(mu=1, few=1, count=fsdp.WHOLE, other=fsdp.WHOLE), "controller": {"covariance": fsdp.WHOLE}
    }  # fmt: skip
    assert (found.stats, found.step, found.non_trainable) == (fsdp.WHOLE, fsdp.WHOLE, {"slow": 1})
    seeds = jax.tree.map(lambda x: zeros(8, *x.shape), state)
    assert fsdp.axes(seeds, 4, lead=1) == found  # counted from the axes of one seed


@pytest.mark.parametrize("name", ROWS)
def test_every_agent_may_be_divided_and_nearly_all_of_it_is(name):
    state = jax.eval_shape(make(name).init, jax.random.key(0))
    whole, part = fsdp.part_bytes(state, 1), fsdp.part_bytes(state, 4)
    assert whole / 4 <= part <= 0.3 * whole
    rows = [axis for axis in jax.tree.leaves(fsdp.axes(state, 4).opt_state) if axis == 1]
    assert rows  # of moments


def test_a_function_of_whole_parameters_gets_them_and_gives_back_parts():
    state = AgentState(
        {"w": jnp.arange(1024.0).reshape(16, 64), "b": jnp.ones(3)}, {"all": jnp.zeros((2, WIDTH))}, {}, jnp.int32(0),
        {"slow": jnp.full((512, 2), 7.0)},
    )  # fmt: skip
    where, seen = fsdp.axes(state, 4), []

    def learn(state, by):
        seen.append(jax.tree.map(jnp.shape, state))
        params = {"w": state.params["w"] * by, "b": state.params["b"] + by}
        return state._replace(params=params, step=state.step + 1), {"sum": state.params["w"].sum()}

    cut = lambda x, axis: jnp.stack(jnp.split(x, 4, axis)) if axis != fsdp.WHOLE else jnp.stack([x] * 4)
    spread = jax.vmap(lambda state: fsdp.on_parts(where, learn)(state, 2.0), axis_name=fsdp.AXES.parts)
    new, sums = spread(jax.tree.map(cut, state, where))
    assert seen[0].params == {"w": (16, 64), "b": (3,)} and seen[0].opt_state == {"all": (2, WIDTH // 4)}
    expected, _ = learn(state, 2.0)
    assert sums["sum"].tolist() == [float(state.params["w"].sum())] * 4
    jax.tree.map(np.testing.assert_array_equal, new, jax.tree.map(cut, expected, where))
