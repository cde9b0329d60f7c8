"""One step down a gradient, optimizers as chains of optax links, learning rates, slowly following copies of parameters.

DreamerV3's optimizer is `flat(optax.chain(adaptive_grad_clip(0.3), laprop(warmup_schedule(4e-5, 1000))))`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmjax.ops.flat import all_columns, flatten, norm, over, own_columns, own_means, spread, tensor_norms, unflatten
from wmjax.types import Array, Axes, Metrics, PyTree, UsageError


class Descent(NamedTuple):
    """What `descend` gives. The dicts have an entry for each optimizer."""

    params: dict[str, PyTree]
    opt_state: dict[str, PyTree]
    metrics: Metrics  # means over devices
    aux: PyTree  # of this device
    grad_norm: dict[str, Array]  # of the mean gradient over devices, before clipping
    update_norm: dict[str, Array]  # of what was added to the parameters


def descend(
    objective: Callable,
    optimizers: dict[str, optax.GradientTransformation],
    opt_state: dict[str, PyTree],
    params: dict[str, PyTree],
    axis_name: str | Axes | None,
    batch: Microbatches | None = None,
) -> Descent:
    """One gradient of an objective, averaged over devices, and one step of each optimizer on its part of it.

    Args:
      objective: `params -> (loss, (metrics, aux))`, a float32 scalar, scalars by name, and anything else.
      optimizers, opt_state: by name; those that `params` has are used.
      params: what each optimizer trains.
      axis_name: the named axis that the batch is spread over, or None. Of `Axes`, `params` are whole on every device,
        but it has its own columns alone of the optimizers' states, and takes the step of those.
      batch: further arguments of the objective, which may be computed part by part: the gradient and the metrics are
        the means over the parts then, which are those of the whole batch if loss and metrics are means over its rows.
    """
    grads, metrics, aux = _gradient(objective, params, batch)
    changes, new_state, grad_norm = {}, {}, {}
    grads = grads if isinstance(axis_name, Axes) else pmean(grads, axis_name)
    for name, part in params.items():
        step = _step_of_parts if isinstance(axis_name, Axes) else _step
        found = step(optimizers[name], grads[name], opt_state[name], part, axis_name)
        changes[name], new_state[name], grad_norm[name] = found
    update_norm = {name: norm(flatten(tree)) for name, tree in changes.items()}
    params = optax.apply_updates(params, changes)
    return Descent(params, new_state, pmean(metrics, axis_name), aux, grad_norm, update_norm)


def _step(
    optimizer: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree, _: str | None
) -> tuple[PyTree, PyTree, Array]:
    """What is added to the parameters, the optimizer's state, and the norm of the gradient, a mean over devices."""
    return *optimizer.update(grads, state, params), norm(flatten(grads))


def _step_of_parts(
    optimizer: optax.GradientTransformationExtraArgs, grads: PyTree, state: PyTree, params: PyTree, axes: Axes
) -> tuple[PyTree, PyTree, Array]:
    """As `_step`, by a gradient that each device brings, and for a `flat` optimizer of whose state it has columns."""
    own = own_means(flatten(grads), axes)
    return *optimizer.update(own, state, params, parts=axes.parts), norm(own, axes.parts)


class Microbatches(NamedTuple):
    """Arguments of a function of a batch, which can be divided into parts."""

    args: tuple[PyTree, ...]
    axes: tuple[int, ...]  # of the arrays of each argument: which one is the batch
    parts: int = 1  # computed one after the other, so that the insides of only one are in memory; divides the batch
    aux_axes: PyTree = 0  # as `axes`, of what an objective gives as `aux`; None for what is alike in all parts

    def each(self, function: Callable) -> PyTree:
        """What a function of the arguments gives for each part, one after the other: `[parts, ...]`."""
        return jax.lax.map(lambda part: function(*part), self.divided())

    def divided(self) -> tuple[PyTree, ...]:
        """The arguments of each part, `[parts, ...]`."""

        def divide(x: Array, axis: int) -> Array:
            parted = x.reshape(*x.shape[:axis], self.parts, x.shape[axis] // self.parts, *x.shape[axis + 1 :])
            return jnp.moveaxis(parted, axis, 0)

        pairs = zip(self.args, self.axes, strict=True)
        return tuple(jax.tree.map(lambda x, axis=axis: divide(x, axis), arg) for arg, axis in pairs)

    def together(self, aux: PyTree) -> PyTree:
        """The `aux` of all parts, `[parts, ...]`, as if it were of the whole batch."""

        def join(x: Array, axis: int | None) -> Array:
            if axis is None:
                return x[0]
            return jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : 1 + axis], -1, *x.shape[2 + axis :])

        joined = lambda axis, tree: jax.tree.map(lambda x: join(x, axis), tree)
        return jax.tree.map(joined, self.aux_axes, aux, is_leaf=lambda axis: axis is None)


def _gradient(objective: Callable, params: PyTree, batch: Microbatches | None) -> tuple[PyTree, Metrics, PyTree]:
    """Gradient, metrics and `aux` of an objective, as `descend` says."""
    run = jax.value_and_grad(objective, has_aux=True)
    if batch is None or batch.parts == 1:
        (_, (metrics, aux)), grads = run(params, *(batch.args if batch else ()))
        return grads, metrics, aux

    def part(total: PyTree, args: tuple) -> tuple[PyTree, tuple]:
        (_, (metrics, aux)), grads = run(params, *args)
        return jax.tree.map(jnp.add, total, grads), (metrics, aux)

    total, (metrics, aux) = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, params), batch.divided())
    mean = lambda x: x.mean(0)
    return jax.tree.map(lambda x: x / batch.parts, total), jax.tree.map(mean, metrics), batch.together(aux)


def weighted_sum(losses: dict[str, Array], scales: dict[str, float]) -> tuple[Array, Metrics]:
    """The scalar to minimize: Σ scale · mean(term). With it, the means by name, `loss/TERM`.

    Args:
      losses: terms of any shapes, float32.
      scales: by name; of a term that is not named, 1.
    """
    means = {name: jnp.mean(value) for name, value in losses.items()}
    total = sum(scales.get(name, 1.0) * mean for name, mean in means.items())
    return total, {f"loss/{name}": mean for name, mean in means.items()}


def all_terms(*losses: dict[str, Array]) -> dict[str, Array]:
    """The terms of several losses together. Raises `UsageError` where two have one name: one would be lost."""
    found: dict[str, Array] = {}
    for terms in losses:
        if twice := sorted(found.keys() & terms.keys()):
            raise UsageError(f"equations: the term {twice[0]!r} is there already; another name is valid")
        found |= terms
    return found


def pmean(tree: PyTree, axis_name: str | Axes | None) -> PyTree:
    """The mean of each leaf over devices, `jax.lax.pmean`; the tree itself where `axis_name` is None."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def flat(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation on one array instead of a tree: few kernels, whatever the number of parameters.

    `inner` gets updates and parameters as `ops.flat.flatten` makes them, and as the keyword `like` the tree that they
    were; its state consists of such rows too. All that it does is done to whole rows, or by `ops.flat`, and so may be
    done to some columns of them: with the keyword `parts`, the named axis of devices with columns of their own, which
    a link reads where it sums over them. Then `updates` are the columns of this device already, and so is the state.
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, parts: str | None = None
    ) -> tuple[PyTree, Any]:
        if parts is not None:
            own = own_columns(flatten(params), parts)
            changes, state = inner.update(updates, state, own, like=params, parts=parts)
            return unflatten(all_columns(changes, parts), params), state
        params = None if params is None else flatten(params)
        changes, state = inner.update(flatten(updates), state, params, like=updates, parts=None)
        return unflatten(changes, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(flatten(params)), update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Bounds the norm of all gradients together: g ← g · limit / ‖g‖ where ‖g‖ is `limit` or more.

    A link of a `flat` chain, as `optax.clip_by_global_norm` is of one that sees all columns.

    Args:
      limit: more than 0.
    """

    def update(
        gradient: Array, state: optax.EmptyState, params: Any = None, *, parts: str | None = None, **_: Any
    ) -> tuple[Array, Any]:
        size = jnp.sqrt(over(jnp.sum(jnp.square(gradient)), parts))
        return jnp.where(size < limit, gradient, gradient / size * limit), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def adaptive_grad_clip(clip: float, floor: float = 1e-3) -> optax.GradientTransformation:
    """Bounds the norm of each gradient by a fraction of the norm of its parameter; a link of a `flat` chain.

        g ← g / max(1, ‖g‖ / (clip · max(floor, ‖p‖)))

    Norms are those of whole tensors, biases included. (`optax.adaptive_grad_clip` clips output units one by one.)

    Args:
      clip: more than 0.
      floor: least norm that a parameter counts with, so that what starts at zero can move.

    Source: Brock et al. 2021 (NFNets), equation 3, per tensor as in the official DreamerV3 code.
    """

    def update(
        gradient: Array, state: optax.EmptyState, params: Array, *, like: PyTree, parts: str | None = None
    ) -> tuple[Array, Any]:
        limit = clip * jnp.maximum(floor, tensor_norms(params, like, parts))
        return gradient / spread(jnp.maximum(1.0, tensor_norms(gradient, like, parts) / limit), like), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def add_decayed_weights(weight_decay: float, pattern: str) -> optax.GradientTransformation:
    """u ← u + decay p where the regular expression is found in the path of the parameter (`actor/linear0/kernel`).

    A link of a `flat` chain.
    """

    def update(
        updates: Array, state: optax.EmptyState, params: Array, *, like: PyTree, parts: str | None = None
    ) -> tuple[Array, Any]:
        del parts  # nothing is summed up
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        decays = [re.search(pattern, name(path)) is not None for path, _ in jax.tree.leaves_with_path(like)]
        return updates + spread(weight_decay * np.array(decays, np.float32), like) * params, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class MomentumState(NamedTuple):
    """State of `scale_by_momentum`."""

    count: Array  # int32 scalar, updates so far
    mu: PyTree  # moving average of the updates, like the parameters


def scale_by_momentum(beta: float, nesterov: bool = False) -> optax.GradientTransformation:
    """Replaces updates by their moving average, corrected for its start at 0: m ← β m + (1 - β) u, m / (1 - βᵗ).

    Args:
      beta: in [0, 1).
      nesterov: look one step ahead by averaging the update in once more.
    """

    def init(params: PyTree) -> MomentumState:
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: MomentumState, params: PyTree | None = None) -> tuple[PyTree, MomentumState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = optax.tree.update_moment(updates, mu, beta, 1) if nesterov else mu
        return optax.tree.bias_correction(ahead, beta, count), MomentumState(count, mu)

    return optax.GradientTransformation(init, update)


def laprop(
    learning_rate: optax.ScalarOrSchedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-20,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_pattern: str = r"/kernel$",
) -> optax.GradientTransformation:
    """Normalizes gradients by their size first and averages them second, where Adam does the reverse.

        v ← β₂ v + (1 - β₂) g²,   u = g / (√(v / (1 - β₂ᵗ)) + ε)
        m ← β₁ m + (1 - β₁) u,    p ← p - lr (m / (1 - β₁ᵗ) + decay p)

    A single outlier then moves parameters by a bounded amount, which permits an ε as small as 1e-20.

    Args:
      learning_rate: a number, or a schedule from the count of earlier updates.
      beta1, beta2: in [0, 1).
      eps: added after the root.
      nesterov: see `scale_by_momentum`.
      weight_decay: scaled by the learning rate; if there is one, this is a link of a `flat` chain.
      decay_pattern: regular expression, searched in the paths of parameters (`actor/linear0/kernel`): what decays.

    Source: Ziyin et al. 2020 (LaProp), algorithm 1, with the bias corrections of the official DreamerV3 code.
    """
    links = [
        optax.scale_by_rms(beta2, eps, eps_in_sqrt=False, bias_correction=True),
        scale_by_momentum(beta1, nesterov),
    ]
    if weight_decay:
        links.append(add_decayed_weights(weight_decay, decay_pattern))
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))


def adam_tf(
    learning_rate: optax.ScalarOrSchedule, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam as TensorFlow has it: ε joins the root of the second moment *before* the correction for its start at 0.

        m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
        p ← p - lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)

    `optax.adam` adds it after the correction, so its first steps are larger where gradients are small.

    Args:
      learning_rate: a number, or a function from the count of earlier updates to it.
      beta1, beta2: in [0, 1).
      eps: TensorFlow's "epsilon hat".

    Source: Kingma & Ba 2015, the form at the end of section 2; DreamerV1 and DreamerV2 ran on it.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = rate * jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clipped_adam_tf(
    learning_rate: optax.ScalarOrSchedule, eps: float, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The optimizer of DreamerV1 and DreamerV2: global clipping -> `adam_tf`, beside a decay of every weight.

    Args:
      learning_rate, eps: of `adam_tf`.
      clip: largest norm of all gradients together; 0 turns it off.
      weight_decay: every weight is multiplied by 1 - weight_decay at each step, whatever the learning rate.
    """
    links = [clip_by_global_norm(clip)] if clip else []
    links.append(adam_tf(learning_rate, eps=eps))
    if weight_decay:
        links.append(optax.add_decayed_weights(-weight_decay))  # after the learning rate, so not scaled by it
    chain = optax.chain(*links)
    return flat(chain)


def model_actor_critic(config: Any, actor_lr: optax.Schedule | None = None) -> dict[str, optax.GradientTransformation]:
    """The optimizers of DreamerV1 and DreamerV2, by their configuration: of the world model, the actor, the critic.

    `actor_lr` is in place of a rate of the actor that stays.
    """
    rates = {"model": config.model_lr, "actor": actor_lr or config.actor_lr, "critic": config.critic_lr}
    rest = (config.epsilon, config.grad_clip, config.weight_decay)
    return {name: clipped_adam_tf(rate, *rest) for name, rate in rates.items()}


def apart(params: dict) -> dict[str, dict]:
    """What each of them trains: all modules but actor and critic are the world model."""
    model = {name: value for name, value in params.items() if name not in ("actor", "critic")}
    return {"model": model, "actor": params["actor"], "critic": params["critic"]}


def together(groups: dict[str, dict]) -> dict:
    """The parameters by module that `apart` took apart."""
    return groups["model"] | {name: groups[name] for name in ("actor", "critic")}


def warmup_schedule(lr: float, warmup: int, kind: str = "const", anneal_steps: int = 0) -> optax.Schedule:
    """Rises linearly to `lr` and then stays or falls. The first update has a rate of exactly 0 if there is a warm-up.

    Args:
      lr: the highest rate.
      warmup: updates until `lr` is reached; 0 starts there.
      kind: what follows: "const"; "linear", down to lr / 10; "cosine", down to lr² / 10, which is practically 0 and
        what the official DreamerV3 code does (it passes lr / 10 where a fraction of lr is expected).
      anneal_steps: updates until the lowest rate is reached, counted from the first; more than `warmup`. Not used by
        "const".

    Returns:
      A function from the count of earlier updates to the learning rate.

    Raises:
      UsageError: for an unknown kind, or too few `anneal_steps`.
    """
    kinds = ("const", "linear", "cosine")
    if kind not in kinds:
        nearest = difflib.get_close_matches(kind, kinds, 1, 0)[0]
        raise UsageError(f"schedule: {kind!r} is none of {', '.join(kinds)}; did you mean {nearest!r}?")
    if kind != "const" and anneal_steps <= warmup:
        raise UsageError(f"anneal_steps: {anneal_steps} is not more than warmup ({warmup}), as {kind!r} requires")
    if kind == "const":
        after = optax.constant_schedule(lr)
    elif kind == "linear":
        after = optax.linear_schedule(lr, 0.1 * lr, anneal_steps - warmup)
    else:
        after = optax.cosine_decay_schedule(lr, anneal_steps - warmup, 0.1 * lr)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])


def soft_update(fast: PyTree, slow: PyTree, rate: float, step: Array | int = 0, every: int = 1) -> PyTree:
    """Lets a copy of parameters follow slowly: slow ← rate · fast + (1 - rate) · slow.

    Args:
      fast, slow: parameters of equal structure.
      rate: in [0, 1]; 1 copies.
      step: int scalar, how many times this has been called before.
      every: only calls with `step % every == 0` change anything, so the first one does.

    Returns:
      The new slow parameters.
    """
    followed = optax.incremental_update(fast, slow, rate)
    if every == 1:
        return followed
    return jax.tree.map(lambda new, old: jnp.where(step % every == 0, new, old), followed, slow)
