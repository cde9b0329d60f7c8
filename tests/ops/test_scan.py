"""`ops.scan` against `jax.lax.scan`, and what is left in its loops."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest

from wmjax.ops.scan import scan

STEPS, ROWS, WIDTH = 7, 2, 5
key = jax.random.key(0)
XS = jnp.arange(STEPS), jax.random.normal(key, (STEPS, ROWS, 3)), jnp.arange(STEPS * ROWS).reshape(STEPS, ROWS) % 5 == 0
INIT = jnp.ones((ROWS, WIDTH)), jnp.int32(3)
WEIGHTS = {"h": 0.3 * jax.random.normal(key, (WIDTH, WIDTH)), "x": jax.random.normal(key, (3, WIDTH))}
either = pytest.mark.parametrize("remat", (False, True))


def recurrence(run, weights, xs, init, key):
    """A small recurrent network with noise, resets, and a count that nothing is differentiated by."""

    def step(carry, inputs):
        (h, count), (t, x, is_first) = carry, inputs
        h = jnp.where(is_first[:, None], 0, h)
        noise = jax.random.normal(jax.random.fold_in(key, t), h.shape)
        h = jnp.tanh(h @ weights["h"] + jax.nn.relu(x @ weights["x"]) + 0.1 * noise)
        return (h, count + 1), (h, h @ weights["h"], count, x.sum(), weights["x"][0, 0])

    return run(step, init, xs)


def value(run, weights, xs, init, key):
    """A number of everything that comes out."""
    outputs = jax.tree.leaves(recurrence(run, weights, (XS[0], xs, XS[2]), (init, INIT[1]), key))
    return sum(jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y) for y in outputs)


def of(derivative, run, weights=WEIGHTS, key=key):
    return jax.jit(derivative(partial(value, run)))(weights, XS[1], INIT[0], key)


@either
def test_carries_and_outputs_are_those_of_lax_scan(remat):
    mine, theirs = (recurrence(run, WEIGHTS, XS, INIT, key) for run in (partial(scan, remat=remat), jax.lax.scan))
    chex.assert_trees_all_close(mine, theirs, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(mine, theirs)


@either
@pytest.mark.parametrize(
    "derivative",
    (
        partial(jax.grad, argnums=(0, 1, 2)),
        lambda f: jax.hessian(lambda w, *rest: f(WEIGHTS | {"x": w["x"]}, *rest)),
        lambda f: jax.grad(lambda *args: optimism(jax.grad(f)(*args))),
    ),
    ids=("gradient", "hessian", "gradient of a gradient"),
)
def test_gradients_are_those_of_lax_scan(derivative, remat):
    chex.assert_trees_all_close(
        of(derivative, partial(scan, remat=remat)), of(derivative, jax.lax.scan), rtol=1e-4, atol=1e-4
    )


def optimism(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def test_gradients_map_over_weights_and_keys():
    weights = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), WEIGHTS)
    mapped = lambda f: jax.vmap(jax.grad(f), (0, None, None, 0))
    both = [of(mapped, run, weights, jax.random.split(key)) for run in (scan, jax.lax.scan)]
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-4)


def loops(function, *args):
    """The primitives in the body of each loop of a function, inner ones apart."""

    def visit(jaxpr, into):
        for eqn in jaxpr.eqns:
            into.append(eqn.primitive.name)
            below = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]
            for inner in below:
                if eqn.primitive.name == "scan":
                    bodies.append([])
                visit(getattr(inner, "jaxpr", inner), bodies[-1] if eqn.primitive.name == "scan" else into)

    is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    bodies = []
    visit(jax.make_jaxpr(function)(*args).jaxpr, [])
    return bodies


def test_noise_and_products_of_inputs_are_not_in_the_loop():
    (body,) = loops(partial(recurrence, scan), WEIGHTS, XS, INIT, key)
    (plain,) = loops(partial(recurrence, jax.lax.scan), WEIGHTS, XS, INIT, key)
    assert "random_bits" in plain and plain.count("dot_general") == 3
    assert "random_bits" not in body and body.count("dot_general") == 2


def test_the_loop_of_the_backward_pass_has_only_the_products_of_the_carry():
    gradient = lambda run: loops(jax.grad(partial(value, run)), WEIGHTS, XS[1], INIT[0], key)
    _, backward = gradient(scan)
    _, plain = gradient(jax.lax.scan)
    assert plain.count("dot_general") == 5  # two for each product by weights, but for that of inputs nothing asks for
    assert backward.count("dot_general") == 1 and "tanh" not in backward


def test_a_carry_of_another_shape_is_refused():
    with pytest.raises(TypeError, match="carry"):
        scan(lambda h, x: (h[None], x), jnp.zeros(3), jnp.zeros((2, 3)))


@pytest.mark.parametrize("step", (lambda carry, x: ([*carry], x), lambda carry, x: ((*carry, x), ())))
def test_a_carry_of_another_structure_is_refused(step):
    with pytest.raises(AssertionError, match="step: the carry it gives"):
        scan(step, (jnp.zeros(2), jnp.zeros(3)), jnp.zeros((4, 2)))


@pytest.mark.parametrize("xs", ((), jnp.zeros((0, 2))))
def test_inputs_without_arrays_or_steps_are_refused(xs):
    with pytest.raises(AssertionError, match="xs: "):
        scan(lambda h, x: (h, x), jnp.zeros(2), xs)


@either
def test_outputs_may_be_numbers(remat):
    constant = lambda run: run(lambda h, x: (h + x, (0.0, True, jnp.float32(1))), jnp.ones(2), jnp.zeros((4, 2)))
    mine, theirs = constant(partial(scan, remat=remat)), constant(jax.lax.scan)
    chex.assert_trees_all_equal(mine, theirs)
    chex.assert_trees_all_equal_shapes_and_dtypes(mine, theirs)


def test_a_step_that_needs_nothing_of_its_inputs_is_repeated():
    double = lambda run: run(lambda x, _: (2 * x, x), jnp.ones(2), jnp.arange(3))
    chex.assert_trees_all_equal(double(scan), double(jax.lax.scan))


@either
def test_every_step_prints_once_and_may_read_what_is_computed_before_the_loop(remat, capsys):
    def step(total, x):
        jax.debug.print("{} {}", total, 2 * x, ordered=True)
        return total + x, total

    run = lambda init: scan(step, init, jnp.arange(3.0), remat=remat)[0]
    jax.block_until_ready(run(1.0))
    assert capsys.readouterr().out.split() == "1.0 0.0 1.0 2.0 2.0 4.0".split()
    jax.block_until_ready(jax.grad(run)(1.0))
    printed = capsys.readouterr().out.split()
    assert printed[:6] == "1.0 0.0 1.0 2.0 2.0 4.0".split() and (remat or len(printed) == 6)


def test_profiles_name_the_lines_of_the_step():
    text = jax.make_jaxpr(jax.grad(partial(value, scan)))(WEIGHTS, XS[1], INIT[0], key).pretty_print(source_info=True)
    lines = [line for line in text.splitlines() if " = tanh " in line or " = dot_general[" in line]
    assert lines and all("test_scan.py" in line for line in lines)
