from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity import load
from wmjax.ops.flat import all_columns, own_columns, unflatten
from wmjax.optim import (
    Microbatches,
    adam_tf,
    adaptive_grad_clip,
    add_decayed_weights,
    clip_by_global_norm,
    clipped_adam_tf,
    descend,
    flat,
    laprop,
    scale_by_momentum,
    soft_update,
    warmup_schedule,
)
from wmjax.types import Axes, UsageError


def run(optimizer, params, gradients):
    """Parameters after each of the given gradients."""
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def one_step(optimizer, gradient, opt_state, params, axis=None):
    """`descend` by a given gradient: parameters, the optimizer's state, the norm of the gradient."""
    objective = lambda params: (optax.tree.vdot(params["x"], gradient), ({}, ()))
    done = descend(objective, {"x": optimizer}, {"x": opt_state}, {"x": params}, axis)
    return done.params["x"], done.opt_state["x"], done.grad_norm["x"]


def test_clipping_uses_the_norm_of_the_whole_tensor_and_a_floor_for_what_is_zero():
    params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros(4), "small": jnp.array([10.0])}
    gradients = {"kernel": jnp.array([[6.0, 0.0], [8.0, 0.0]]), "bias": jnp.ones(4), "small": jnp.array([0.1])}
    clip = flat(adaptive_grad_clip(0.3))
    clipped, _ = clip.update(gradients, clip.init(params), params)
    np.testing.assert_allclose(clipped["kernel"], [[0.9, 0], [1.2, 0]], rtol=1e-6)  # norm 10 -> 0.3 * 5
    np.testing.assert_allclose(clipped["bias"], np.full(4, 1.5e-4), rtol=1e-6)  # norm 2 -> 0.3 * 1e-3
    np.testing.assert_array_equal(clipped["small"], gradients["small"])


def test_laprop_normalizes_first_and_averages_second():
    beta1, beta2, gradients = 0.9, 0.99, np.array([1e-8, 3.0, -2.0, 0.0, 1e6])
    v = m = p = 0.0
    expected = []
    for t, g in enumerate(gradients, 1):
        v = beta2 * v + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * g / (np.sqrt(v / (1 - beta2**t)) + 1e-20)
        p -= 0.1 * m / (1 - beta1**t)
        expected.append(p)
    history = run(laprop(0.1, beta1, beta2), jnp.array(0.0), [jnp.array(g, jnp.float32) for g in gradients])
    np.testing.assert_allclose(history, expected, rtol=1e-4)


def test_the_first_step_of_laprop_is_the_sign_of_the_gradient_however_small_and_zero_stays_zero():
    history = run(laprop(0.5), jnp.zeros(3), [jnp.array([1e-15, -1e15, 0.0])])
    np.testing.assert_allclose(history[0], [-0.5, 0.5, 0], rtol=1e-4)


def test_weight_decay_touches_only_the_matching_parameters_and_is_scaled_by_the_rate():
    params = {"linear": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "kernel_scale": jnp.ones(2)}
    history = run(flat(laprop(0.1, weight_decay=0.5)), params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(history[0]["linear"]["kernel"], 0.95)
    np.testing.assert_array_equal(history[0]["linear"]["bias"], 1)
    np.testing.assert_array_equal(history[0]["kernel_scale"], 1)


def test_the_first_update_changes_nothing_and_a_zero_head_moves_at_the_second():
    params = {"head": jnp.zeros(3), "body": jnp.ones(3)}
    gradient = {"head": jnp.array([1.0, 2.0, 3.0]), "body": jnp.ones(3)}
    optimizer = flat(optax.chain(adaptive_grad_clip(0.3), laprop(warmup_schedule(4e-5, 1000))))
    first, second = run(optimizer, params, [gradient, gradient])
    for name in params:
        np.testing.assert_array_equal(first[name], params[name])
    np.testing.assert_allclose(second["head"], -4e-8, rtol=1e-4)


def test_warmup_is_a_ramp_from_zero_followed_by_the_chosen_shape():
    counts = jnp.arange(8)
    rates = lambda **kwargs: jax.vmap(warmup_schedule(0.5, 2, **kwargs))(counts)
    np.testing.assert_allclose(rates(), [0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    linear = rates(kind="linear", anneal_steps=6)
    np.testing.assert_allclose(linear, [0, 0.25, 0.5, 0.3875, 0.275, 0.1625, 0.05, 0.05], rtol=1e-6)
    cosine = rates(kind="cosine", anneal_steps=6)
    np.testing.assert_allclose(cosine[jnp.array([1, 2, 4, 6, 7])], [0.25, 0.5, 0.2625, 0.025, 0.025], rtol=1e-5)
    assert warmup_schedule(0.5, 0)(0) == 0.5


def test_a_schedule_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"'cosin'.*const, linear, cosine.*mean 'cosine'"):
        warmup_schedule(1e-3, 10, "cosin", 100)
    with pytest.raises(UsageError, match=r"anneal_steps: 10 .*warmup \(10\)"):
        warmup_schedule(1e-3, 10, "linear", 10)


def test_gradients_are_averaged_over_devices_before_anything_else():
    params = jnp.ones(2)
    optimizer = flat(optax.chain(adaptive_grad_clip(0.3), laprop(0.1)))
    shards = jnp.array([[1.0, 5.0], [3.0, -1.0]])
    step = lambda gradient, axis: one_step(optimizer, gradient, optimizer.init(params), params, axis)[0]
    spread = jax.vmap(lambda g: step(g, "devices"), axis_name="devices")(shards)
    single = step(shards.mean(0), None)
    np.testing.assert_array_equal(spread, [single, single])
    np.testing.assert_allclose(
        single - params, -0.1, rtol=1e-4
    )  # the mean of normalized shards would be 0 in the second entry


def test_a_slow_copy_follows_by_its_rate_and_rate_1_copies():
    fast, slow = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}
    np.testing.assert_allclose(soft_update(fast, slow, 0.25)["w"], [0.25, 3.5])
    np.testing.assert_array_equal(soft_update(fast, slow, 1.0)["w"], fast["w"])


def test_a_periodic_copy_happens_at_the_first_call_and_then_every_nth():
    slow, seen = jnp.array(-1.0), []
    for step in range(7):
        slow = soft_update(jnp.array(float(step)), slow, 1.0, step, every=3)
        seen.append(slow.item())
    assert seen == [0, 0, 0, 3, 3, 3, 6]


# --- the official code


def official_optimizer(config):
    schedule = warmup_schedule(config["lr"], config["warmup"], config["schedule"], config["anneal"])
    scaling = laprop(
        schedule,
        config["beta1"],
        config["beta2"],
        config["eps"],
        config.get("nesterov", False),
        config["wd"],
        config["wd_pattern"],
    )
    return flat(optax.chain(adaptive_grad_clip(config["agc"]), scaling) if config["agc"] else scaling)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["default", "fast", "noclip", "decay", "linear", "nesterov"])
def test_updates_agree_with_the_official_optimizer(name):
    f = load("dreamer_v3_optim")
    config = f.config["default"] | f.config["configs"][name]
    gradients, expected = f.tree("in/grads"), f.tree(f"out/{name}/updates")
    params = {key: jnp.array(value) for key, value in f.tree("params").items() if key in gradients}
    optimizer = official_optimizer(config)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(f.config["steps"]):
        updates, state = update({key: jnp.array(value[i]) for key, value in gradients.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for key in expected:
            np.testing.assert_allclose(
                updates[key], expected[key][i], rtol=1e-5, atol=2e-5 * config["lr"], err_msg=f"{key}, step {i}"
            )
            np.testing.assert_allclose(params[key], f[f"out/{name}/params/{key}"][i], rtol=1e-5, atol=2e-5)


@pytest.mark.parity
def test_clipping_alone_agrees_with_the_official_code():
    f = load("dreamer_v3_optim")
    gradients = f.tree("in/grads")
    params = {key: value for key, value in f.tree("params").items() if key in gradients}
    clip = flat(adaptive_grad_clip(f.config["default"]["agc"]))
    for i in range(f.config["steps"]):
        updates, _ = clip.update({key: value[i] for key, value in gradients.items()}, clip.init(params), params)
        for key, update in updates.items():
            np.testing.assert_allclose(update, f[f"out/agc_only/updates/{key}"][i], rtol=1e-5, err_msg=f"{key} {i}")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["rate0.02_every1", "rate1_every3"])
def test_slow_parameters_agree_with_the_official_code(name):
    f = load("dreamer_v3_optim")
    config = f.config["slow"][name]
    fast, expected = f.tree("in/slow/fast_params"), f.tree(f"out/slow_{name}/params")
    slow = f.tree("params/critic_init")
    for step in range(f.config["steps"]):
        now = {key: value[step] for key, value in fast.items()}
        slow = soft_update(now, slow, config["rate"], step, config["every"])
        for key in slow:
            np.testing.assert_allclose(slow[key], expected[key][step], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow's Adam


def test_adam_adds_its_epsilon_before_the_bias_correction():
    history = run(adam_tf(1e-3, eps=1e-5), jnp.array(0.0), [jnp.array(1e-5)] * 3)
    np.testing.assert_allclose(history, [-3.0653e-5, -7.3450e-5, -1.2535e-4], rtol=1e-4)
    other = run(optax.adam(1e-3, eps=1e-5), jnp.array(0.0), [jnp.array(1e-5)] * 3)
    np.testing.assert_allclose(other, [-5e-4, -1e-3, -1.5e-3], rtol=1e-3)  # sixteen times as far at first


def test_weights_decay_by_a_share_of_themselves_that_the_learning_rate_does_not_scale():
    params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([-3.0])}
    for rate in (1e-3, 1.0):
        chain = clipped_adam_tf(rate, 1e-5, 100.0, weight_decay=0.01)
        after = run(chain, params, [jax.tree.map(jnp.zeros_like, params)])[0]
        assert float(after["kernel"][0, 0]) == pytest.approx(2 * 0.99)
        assert float(after["bias"][0]) == pytest.approx(-3 * 0.99)


def test_clipping_is_by_the_norm_of_all_gradients_together_and_off_at_zero():
    params, grads = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    moments = lambda clip: clipped_adam_tf(1e-3, 1e-5, clip).update(
        grads, clipped_adam_tf(1e-3, 1e-5, clip).init(params), params
    )[1]
    for clip, expected in ((1.0, 0.06), (100.0, 0.3), (0.0, 0.3)):
        assert float(unflatten(optax.tree.get(moments(clip), "mu"), grads)["a"][0]) == pytest.approx(expected)


def test_a_step_takes_the_mean_of_the_gradients_of_all_devices_and_reports_its_norm():
    chain = clipped_adam_tf(0.1, 1e-8, 100.0)
    params, grads = jnp.zeros(1), jnp.array([[2.0], [4.0]])
    step = jax.vmap(lambda g: one_step(chain, g, chain.init(params), params, "devices"), axis_name="devices")
    new, _, norm = step(grads)
    assert norm.tolist() == [3.0, 3.0]
    np.testing.assert_allclose(new, -0.1, rtol=1e-5)


def test_each_optimizer_steps_on_its_own_part_of_one_gradient_and_metrics_are_means_over_devices():
    chains = {"fast": optax.sgd(1.0), "slow": optax.sgd(0.25)}
    params = {"fast": jnp.array([1.0, 1.0]), "slow": {"bias": jnp.array(2.0)}}

    def step(x):
        objective = lambda p: (jnp.sum(p["fast"] * x) + 4 * p["slow"]["bias"], ({"x": x}, x))
        return descend(objective, chains, {k: c.init(params[k]) for k, c in chains.items()}, params, "devices")

    done = jax.vmap(step, axis_name="devices")(jnp.array([2.0, 4.0]))
    assert done.params["fast"].tolist() == [[-2.0, -2.0]] * 2 and done.params["slow"]["bias"].tolist() == [1.0, 1.0]
    assert done.metrics["x"].tolist() == [3.0, 3.0] and done.aux.tolist() == [2.0, 4.0]
    assert done.grad_norm["slow"].tolist() == [4.0, 4.0] and done.update_norm["slow"].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(done.grad_norm["fast"], 18**0.5)


def test_a_gradient_in_parts_is_that_of_the_whole_batch():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    params = {"all": jnp.asarray(rng.normal(size=2), jnp.float32)}

    def objective(params, x, y):
        error = x - (y @ params["all"])[None]  # [3, batch]
        return (error**2).mean(), ({"error": jnp.abs(error).mean()}, ({"error": error}, params["all"].sum()))

    def step(parts):
        batch = Microbatches((x, y), (1, 0), parts, aux_axes=(1, None))
        return descend(objective, {"all": optax.sgd(0.1)}, {"all": optax.sgd(0.1).init(params)}, params, None, batch)

    whole, parted = step(1), step(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parted)
    assert not np.allclose(whole.params["all"], params["all"], atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# One array instead of a tree


def clip_each(clip, floor=1e-3):
    """`adaptive_grad_clip`, tensor by tensor."""

    def clip_one(gradient, param):
        limit = clip * jnp.maximum(floor, jnp.linalg.norm(param.ravel()))
        return gradient / jnp.maximum(1.0, jnp.linalg.norm(gradient.ravel()) / limit)

    return optax.stateless(lambda updates, params: jax.tree.map(clip_one, updates, params))


KERNELS = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
FLAT = {
    "laprop": (
        flat(optax.chain(adaptive_grad_clip(0.3), laprop(warmup_schedule(0.1, 2), weight_decay=0.1))),
        optax.chain(
            clip_each(0.3),
            optax.scale_by_rms(0.999, 1e-20, eps_in_sqrt=False, bias_correction=True),
            scale_by_momentum(0.9),
            optax.add_decayed_weights(0.1, KERNELS),
            optax.scale_by_learning_rate(warmup_schedule(0.1, 2)),
        ),
    ),
    "adamw": (
        flat(
            optax.chain(
                clip_by_global_norm(2.0),
                optax.scale_by_adam(),
                add_decayed_weights(0.1, "kernel$"),
                optax.scale(-0.1),
            )
        ),
        optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(0.1, weight_decay=0.1, mask=KERNELS)),
    ),
    "adam_tf": (
        clipped_adam_tf(0.1, 1e-8, 2.0, 0.01),
        optax.chain(optax.clip_by_global_norm(2.0), adam_tf(0.1, eps=1e-8), optax.add_decayed_weights(-0.01)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAT)
def test_one_array_of_all_parameters_steps_as_its_tensors_do_one_by_one(name):
    mine, reference = FLAT[name]
    sizes = {"scale": (), "bias": 3, "whole": 256, "over": 257, "kernel": (30, 50), "deep": {"kernel": (7, 2, 3)}}
    shapes = jax.tree.map(np.zeros, {"net": sizes}, is_leaf=lambda x: not isinstance(x, dict))
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * rng.choice([1e-3, 30.0]), jnp.float32), shapes
    )
    params, gradients = draw(), [draw() for _ in range(4)]
    for found, expected in zip(run(mine, params, gradients), run(reference, params, gradients), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
    leaves = jax.tree.leaves(mine.init(params))
    assert {x.shape for x in leaves} == {(), (12, 256)}  # rows: 1 + 1 + 1 + 2 + 6 + 1
    mapped = jax.vmap(lambda scale: run(mine, params, [jax.tree.map(lambda g: scale * g, gradients[0])])[0])
    doubled = run(mine, params, [jax.tree.map(lambda g: 2 * g, gradients[0])])[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), mapped(jnp.array([1.0, 2.0])), doubled)


@pytest.mark.parametrize(
    "name", [name if name == "adam_tf" else pytest.param(name, marks=pytest.mark.slow) for name in FLAT]
)
def test_devices_that_hold_columns_of_an_optimizers_state_step_as_one_that_holds_all(name):
    optimizer, axes, rng = FLAT[name][0], Axes("copies", "parts"), np.random.default_rng(1)
    shapes = {"scale": (), "over": (257,), "kernel": (30, 50)}
    draw = lambda *lead: {name: jnp.float32(rng.normal(size=(*lead, *shape))) for name, shape in shapes.items()}
    params, gradients = draw(), draw(2, 4, 3)  # [copies, parts, updates]
    own = lambda tree: jax.tree.map(lambda x: x if x.ndim < 2 else own_columns(x, "parts"), tree)
    whole = lambda tree: jax.tree.map(lambda x: x if x.ndim < 2 else all_columns(x, "parts"), tree)

    def descended(gradients, axes=None):
        now, state, norms = params, optimizer.init(params), []
        state = state if axes is None else own(state)
        for i in range(3):
            gradient = {name: x[i] for name, x in gradients.items()}
            now, state, norm = one_step(optimizer, gradient, state, now, axes)
            norms.append(norm)
        return now, state if axes is None else whole(state), norms

    spread = jax.vmap(jax.vmap(partial(descended, axes=axes), axis_name="parts"), axis_name="copies")
    mean = {name: x.mean((0, 1)) for name, x in gradients.items()}
    for expected, found in zip(*map(jax.tree.leaves, (descended(mean), spread(gradients))), strict=True):
        assert all((found == found[0, 0]).ravel())  # on all devices
        np.testing.assert_allclose(found[0, 0], expected, rtol=2e-4, atol=1e-6)
