"""Every public function of `ops` names the argument whose rank, shape or dtype is wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts import KEY, check_that_wrong_arguments_are_named, floats, function_of, ints, public_functions
from wmjax.ops import action_distributions, distributions, flat, latents, mixture, normalize, vq
from wmjax.types import Axes, Discrete

B, S, K, A, V, D, T = 2, 3, 4, 5, 6, 7, 8

TANH = action_distributions.TanhNormal(floats(B, A), floats(B, A))
TRUNCATED = action_distributions.TruncatedNormal(floats(B, A), floats(B, A))
ONE_HOTS = distributions.OneHotCategoricals((distributions.OneHotCategorical(floats(B, A)),) * 2)
TWO_HOT = distributions.TwoHot(floats(B, 3), distributions.exponential_bins(3))
MIXTURE = mixture.Mixture(floats(B, K, D), floats(B, K, D), floats(B, K, D))
CODES = vq.init_state(floats(V, D))
TAKEN = vq.Assigned(floats(B, D), ints(B), floats(V), floats(V, D))
TREE = {"kernel": floats(3, 100), "bias": floats(A)}
AXES = Axes("copies", "parts")


def under_axes(function, name):
    """The function of one array, of that name, in a program of one device of a mesh of `AXES`."""
    for axis in AXES:
        function = jax.vmap(function, axis_name=axis)
    return lambda **given: function(jnp.asarray(given[name])[None, None])


# Right arguments of each function. Those that a loose rule reads, or that are no arrays, are left as they are: `FREE`.
RIGHT = {
    "action_distributions.TanhNormal.sample": (TANH.sample, dict(seed=KEY)),
    "action_distributions.TanhNormal.log_prob": (TANH.log_prob, dict(action=floats(B, A))),
    "action_distributions.TanhNormal.mode": (TANH.mode, dict(seed=KEY)),
    "action_distributions.TanhNormal.entropy": (TANH.entropy, dict(seed=KEY)),
    "action_distributions.TruncatedNormal.sample": (TRUNCATED.sample, dict(seed=KEY)),
    "action_distributions.TruncatedNormal.log_prob": (TRUNCATED.log_prob, dict(action=floats(B, A))),
    "action_distributions.tanh_normal": dict(mean=floats(B, A), std=floats(B, A)),
    "action_distributions.truncated_normal": dict(loc=floats(B, A), scale=floats(B, A)),
    "action_distributions.truncated_noise": dict(key=KEY, low=floats(B, A), high=floats(B, A)),
    "action_distributions.explore": dict(key=KEY, action=floats(B, A), amount=0.5, counts=(2, 3)),
    "action_distributions.random_action": dict(space=Discrete(3), key=KEY),
    "distributions.unimix_logits": dict(logits=floats(B, K), unimix=0.0),
    "distributions.straight_through_sample": dict(key=KEY, logits=floats(B, S, K)),
    "distributions.split_choices": dict(action=floats(B, A), counts=(2, 3)),
    "distributions.OneHotCategoricals.sample": (ONE_HOTS.sample, dict(seed=KEY)),
    "distributions.OneHotCategoricals.log_prob": (ONE_HOTS.log_prob, dict(action=floats(B, 2 * A))),
    "distributions.choices": dict(outputs={"logits": floats(B, A)}),
    "distributions.bernoulli_log_prob": dict(logits=floats(B), target=floats(B)),
    "distributions.TwoHot.log_prob": (TWO_HOT.log_prob, dict(target=floats(B))),
    "distributions.SymlogMSE.log_prob": (distributions.SymlogMSE(floats(B)).log_prob, dict(target=floats(B))),
    "distributions.UnitNormal.log_prob": (
        distributions.UnitNormal(floats(B, A), 1).log_prob, dict(target=floats(B, A))
    ),
    "distributions.number": dict(outputs={"mean": floats(B, 1)}),
    "distributions.bounded_normal": dict(mean=floats(B, A), std=floats(B, A)),
    "flat.flatten": dict(tree=TREE),
    "flat.unflatten": dict(rows=floats(3, 256), like=TREE),
    "flat.norm": dict(rows=floats(3, 256)),
    "flat.over": (lambda sums: flat.over(sums, None), dict(sums=floats(3))),
    "flat.own_columns": (under_axes(lambda rows: flat.own_columns(rows, "parts"), "rows"), dict(rows=floats(3, 256))),
    "flat.own_means": (under_axes(lambda rows: flat.own_means(rows, AXES), "rows"), dict(rows=floats(3, 256))),
    "flat.all_columns": (under_axes(lambda own: flat.all_columns(own, "parts"), "own"), dict(own=floats(3, 256))),
    "flat.tensor_norms": dict(rows=floats(3, 256), like=TREE),
    "flat.spread": dict(values=floats(2), like=TREE),
    "kl.balanced_kl": dict(post_logits=floats(B, S, K), prior_logits=floats(B, S, K), free_nats=1.0, unimix=0.0),
    "kl.above_free_nats": dict(value=floats(B, S), free_nats=1.0),
    "kl.kl_loss": dict(post=latents.Categorical(floats(B, S, K)), prior=latents.Categorical(floats(B, S, K))),
    "latents.Categorical.sample": (latents.Categorical(floats(B, S, K)).sample, dict(key=KEY)),
    "latents.Categorical.kl": (
        latents.Categorical(floats(B, S, K)).kl, dict(other=latents.Categorical(floats(B, S, K)))
    ),
    "latents.Gaussian.sample": (latents.Gaussian(floats(B, A), floats(B, A)).sample, dict(key=KEY)),
    "latents.Gaussian.kl": (
        latents.Gaussian(floats(B, A), floats(B, A)).kl, dict(other=latents.Gaussian(floats(B, A), floats(B, A)))
    ),
    "masks.masked_mean": dict(x=floats(T, B), mask=floats(T, B)),
    "mixture.Mixture.log_prob": (MIXTURE.log_prob, dict(x=floats(B, D))),
    "mixture.Mixture.sample": (MIXTURE.sample, dict(key=KEY)),
    "mixture.Mixture.draw": (MIXTURE.draw, dict(uniform=floats(B, D), normal=floats(B, D))),
    "noise.row_keys": dict(key=KEY, rows=3),
    "noise.fold_in": dict(key=KEY, data=3),
    "noise.split": dict(key=KEY, num=2),
    "noise.gumbel": dict(key=KEY, shape=(B, A)),
    "noise.normal": dict(key=KEY, shape=(B, A)),
    "noise.uniform": dict(key=KEY, shape=(B, A)),
    "normalize.update": dict(state=normalize.init(), x=floats(T, B)),
    "normalize.scale": dict(state=normalize.init()),
    "returns.lambda_returns": dict(reward=floats(T, B), discount=floats(T, B), value=floats(T, B), lambda_=0.95),
    "returns.state_returns": dict(reward=floats(T, B), discount=floats(T, B), value=floats(T, B), lambda_=0.95),
    "returns.discount_weights": dict(cont=floats(T, B)),
    "returns.discount_weights_before": dict(cont=floats(T, B)),
    "scan.scan": dict(step=lambda carry, x: (carry, x), init=floats(B), xs={"embed": floats(T, B)}),
    "symlog.symlog": dict(x=floats(B)),
    "symlog.symexp": dict(x=floats(B)),
    "vq.distances": dict(z=floats(B, D), codebook=floats(V, D)),
    "vq.normalize": dict(x=floats(B, D)),
    "vq.nearest": dict(z=floats(B, D), codebook=floats(V, D)),
    "vq.straight_through": dict(z=floats(B, D), quantized=floats(B, D)),
    "vq.codebook_losses": dict(z=floats(B, D), quantized=floats(B, D)),
    "vq.init_state": dict(codebook=floats(V, D)),
    "vq.assigned": dict(z=floats(B, D), tokens=ints(B), size=V),
    "vq.update_usage": dict(state=CODES, counts=floats(V), decay=0.9),
    "vq.ema_update": dict(state=CODES, batch=TAKEN),
    "vq.cosine_update": dict(codebook=floats(V, D), batch=TAKEN),
    "vq.health": dict(counts=floats(V), usage=floats(V), dead_below=0.1),
    "vq.revive": dict(key=KEY, state=CODES, codebook=floats(V, D), batch=TAKEN, dead_below=0.1),
}  # fmt: skip
ANY_SHAPE = {("symlog.symlog", "x"), ("symlog.symexp", "x"), ("normalize.update", "x"), ("flat.over", "sums")}
ANY_SHAPE |= {("noise.fold_in", "key"), ("noise.split", "key")}
ANY_DTYPE = {("masks.masked_mean", "mask"), ("distributions.split_choices", "action")}
ANY_DTYPE |= {("flat.unflatten", "rows"), ("flat.spread", "values"), ("scan.scan", "xs")}
FREE = {("vq.update_usage", "state"), ("vq.ema_update", "state"), ("vq.revive", "state")}  # other arguments follow them
FREE |= {("flat.flatten", "tree"), ("scan.scan", "init")}
FREE |= {(f"flat.{name}", "like") for name in ("unflatten", "tensor_norms", "spread")}


def call_of(name):
    return RIGHT[name] if isinstance(RIGHT[name], tuple) else (function_of(f"ops.{name}"), RIGHT[name])


def test_every_public_function_that_takes_arrays_has_a_row():
    found = {name.removeprefix("ops.") for name in public_functions("ops")}
    assert {name for name in found if not name.startswith("contracts.")} == set(RIGHT)


@pytest.mark.parametrize("name", RIGHT)
def test_a_wrong_argument_is_named(name):
    free, any_dtype, any_shape = ({arg for row, arg in rule if row == name} for rule in (FREE, ANY_DTYPE, ANY_SHAPE))
    check_that_wrong_arguments_are_named(*call_of(name), free, any_dtype, any_shape)


def test_what_functions_demand_leaves_nothing_in_the_program():
    logits, target = floats(B, 3), floats(B)
    loss = lambda logits, target: distributions.TwoHot(logits, TWO_HOT.bins).log_prob(target).sum()
    checked = str(jax.make_jaxpr(jax.grad(loss))(logits, target))
    chex.disable_asserts()
    try:
        assert str(jax.make_jaxpr(jax.grad(loss))(logits, target)) == checked
    finally:
        chex.enable_asserts()


def test_numbers_of_python_and_numpy_are_arrays_too():
    assert float(distributions.symexp(0.0)) == 0.0
    assert np.isfinite(distributions.bernoulli_log_prob(np.float32(0.0), np.float32(1.0)))
