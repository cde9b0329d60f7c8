# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DreamerV2: categorical latents, and three gradients for one actor
#
# Hafner, Lillicrap, Norouzi, Ba, *Mastering Atari with Discrete World Models* ([arXiv
# 2010.02193](https://arxiv.org/abs/2010.02193)). The code is one file, `wmjax/agents/dreamer_v2.py`; its page is
# `docs/papers/dreamer_v2.md`.
#
# ## The idea
#
# The stochastic part of a state is a set of categorical choices $z_t$ instead of a normal distribution. A choice has no
# derivative; the *straight-through* estimator takes that of its probabilities $p$:
#
# $$z = \mathrm{onehot}(\mathrm{sample}(p)) + p - \mathrm{sg}(p).$$
#
# The KL is *balanced*: it trains the prior $p$ more than it pulls the posterior $q$ towards a prior that is not good
# yet,
#
# $$L_{\mathrm{KL}} = \alpha\, \mathrm{KL}[\mathrm{sg}(q) \Vert p] + (1 - \alpha)\, \mathrm{KL}[q \Vert \mathrm{sg}(p)],
# \qquad \alpha = 0.8.$$
#
# The actor mixes two gradients of what imagined states are worth, $V_k$, and a bonus for entropy:
#
# $$L_\pi = -\rho\, \ln \pi(a_k)\, \mathrm{sg}(V_{k+1} - v_k) - (1 - \rho)\, V_{k+1} - \eta\, H(\pi),$$
#
# REINFORCE ($\rho = 1$, unbiased and noisy) and the derivative through the dynamics ($\rho = 0$, smooth, and biased by
# the straight-through latents). The critic regresses on $V$, which is computed with a slow copy of it.

# %%
import dataclasses
import functools
import inspect
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import wmjax
from wmjax import dreaming, figures, optim
from wmjax.agents import dreamer_v2 as v2
from wmjax.nets.mlp import call
from wmjax.ops import distributions, kl

PRETRAINED = "dreamer_v2/catch"
STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 150))  # of gradient, of what is trained here
folder = tempfile.mkdtemp()

# %% [markdown]
# ## The equations in the package
#
# The straight-through sample, and the balanced KL:

# %%
print(inspect.getsource(distributions.straight_through_sample))
print(inspect.getsource(kl.kl_loss))

# %% [markdown]
# What the actor makes large, with its three gradients:

# %%
print(inspect.getsource(v2.actor_objective))

# %% [markdown]
# ## A trained run
#
# One comes with the package; `wmjax list pretrained` says by which command it was trained.

# %%
run = wmjax.load(f"pretrained:{PRETRAINED}")
scores = run.evaluate(episodes=32)
print(f"{run.title()}: mean return {scores.mean:.2f} over {scores.episodes} episodes (random play: -0.6, best: 1)")

# %% [markdown]
# ## What it sees
#
# `figures.open_loop` plays episodes, lets the model see the first steps of each, and has it predict the rest from the
# actions alone. First the frames that it saw:

# %%
env, params = run.env, run.state.variables
seen = figures.open_loop(run.agent, env, params, jax.random.key(1))
figures.write_reconstructions(f"{folder}/seen.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/seen.png")

# %% [markdown]
# ## What it dreams
#
# Green: the model sees the frame. Orange: it sees nothing but the actions.

# %%
figures.write_dream_strip(f"{folder}/dream.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/dream.png")

# %% [markdown]
# The error over all such windows, beside two guesses that know no dynamics:

# %%
errors = figures.horizon_errors(seen, seen.context)
figures.plot_horizon_errors(f"{folder}/errors.png", errors, seen.context, run.title())
figures.show(f"{folder}/errors.png")

# %% [markdown]
# ## What the latents say
#
# We filter an episode and look at which class (column) each latent (row) takes, step by step.

# %%
records = figures.play(run.agent, env, params, jax.random.key(2), 16, 10)


def filtered(model, params, records, key):
    """The posterior states `[T, B]` of records."""
    step = records.step
    prev_action = jnp.concatenate([jnp.zeros_like(records.action[:1]), records.action[:-1]])
    embed, start = model.encode(params, step.obs), model.init_state(params, step.reward.shape[1])
    return dreaming.observe(model, params, key, start, prev_action, embed, step.is_first)[1]


states = jax.jit(filtered, static_argnums=0)(run.agent.model, params, records, jax.random.key(3))
fig, axes = plt.subplots(2, 10, figsize=(12, 3))
for t in range(10):
    axes[0, t].imshow(records.step.obs["image"][t, 0])
    axes[1, t].imshow(states.stoch[t, 0], cmap="gray")
    for axis in axes[:, t]:
        axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## Change an equation
#
# `v2.Equations` holds the functions of the paper; each of them may be another one. The KL counts above `free_nats`, of
# the sum over all latents. Here each latent has an equal share of free nats of its own instead.


# %%
def free_each(posterior, prior, config, axis_name, mean):
    """The balanced KL, of which each latent has some nats for free: a scalar; and the KL, `[T, B]`, to watch."""
    sg, alpha = (lambda dist: jax.tree.map(jax.lax.stop_gradient, dist)), config.kl_balance
    each = alpha * sg(posterior).kl(prior) + (1 - alpha) * posterior.kl(sg(prior))  # [T, B, S]
    return jnp.maximum(each, config.free_nats / each.shape[-1]).sum(-1).mean(), posterior.kl(prior).sum(-1)


# %% [markdown]
# `wmjax.train("dreamer_v2", "catch", equations=v2.Equations(kl=free_each))` trains a run with it. To see the effect in
# seconds we train world models alone, from new parameters, on the records above. This is all there is to it:


# %%
@functools.partial(jax.jit, static_argnums=0)
def learned(equations, records, key):
    """How many nats each latent carries, `[S]`, after `STEPS` steps of Adam."""
    agent = v2.dreamer_v2(env.spec, run.config, equations=equations)
    parts = v2.assemble(env.spec, run.config, equations=equations)
    optimizer = optax.adam(1e-3)

    def loss(params, key):
        losses, _ = equations.world_model(parts, params, filtered(agent.model, params, records, key), records.step)
        return optim.weighted_sum(losses, v2.scales(parts))[0]

    def descend(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    params = agent.init(key).params
    (params, _), _ = jax.lax.scan(descend, (params, optimizer.init(params)), jax.random.split(key, STEPS))
    states = filtered(agent.model, params, records, key)
    prior = parts.latent.dist(call(parts.nets.rssm, params["rssm"], states.deter, method="prior"))
    return states.dist.kl(prior).mean((0, 1))


fig, axis = plt.subplots(figsize=(7, 3))
for i, (name, equations) in enumerate({"paper": v2.Equations(), "free_each": v2.Equations(kl=free_each)}.items()):
    nats = np.sort(learned(equations, records, jax.random.key(0)))[::-1]
    axis.bar(np.arange(len(nats)) + 0.4 * i, nats, 0.4, label=f"{name}: {nats.sum():.2f} nats in all")
axis.set(xlabel="latent, sorted", ylabel="KL in nats", title="what each latent carries")
axis.legend()
plt.show()

# %% [markdown]
# ## Three gradients
#
# `actor_grad`, a field of the configuration, says which gradient the actor follows: "reinforce", "dynamics" or "both".
# Given the same imagined trajectories they point in different directions; the cosine says how different. Here for an
# actor and a critic that have learned nothing yet, in the world model of the run.

# %%
fresh = run.agent.init(jax.random.key(0))
variables = fresh.variables | params | {name: fresh.params[name] for name in ("actor", "critic")}
start = jax.tree.map(lambda x: x[4], states)
keys, alive = jax.random.split(jax.random.key(3), len(start.deter)), jnp.zeros(len(start.deter), bool)


def gradient(mode):
    """The actor's, as one vector."""
    parts = v2.assemble(env.spec, dataclasses.replace(run.config, actor_grad=mode))
    trained = {name: variables[name] for name in ("actor", "critic")}
    loss = lambda trained: v2.behavior_loss(parts, variables, trained, keys, start, alive)[0]
    return jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(trained)["actor"])[0]


reinforce, dynamics = gradient("reinforce"), gradient("dynamics")
lengths = jnp.linalg.norm(reinforce), jnp.linalg.norm(dynamics)
print(f"length of reinforce {lengths[0]:.2g}, of dynamics {lengths[1]:.2g}; ", end="")
print(f"cosine {jnp.vdot(reinforce, dynamics) / lengths[0] / lengths[1]:.2f}")

# %% [markdown]
# What else may be changed: `docs/equations.md`.
