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
# # DreamerV1: learn to act by differentiating a dream
#
# Hafner, Lillicrap, Ba, Norouzi, *Dream to Control* ([arXiv 1912.01603](https://arxiv.org/abs/1912.01603)). The code is
# one file, `wmjax/agents/dreamer_v1.py`; its page is `docs/papers/dreamer_v1.md`.
#
# ## The idea
#
# A state has a recurrent part $h_t$ and a stochastic part $s_t$, a normal distribution:
#
# $$h_t = f(h_{t-1}, s_{t-1}, a_{t-1}), \qquad s_t \sim q(s_t \mid h_t, x_t), \qquad
# \hat s_t \sim p(\hat s_t \mid h_t).$$
#
# The model explains pictures and rewards, while the posterior $q$, which sees the picture, stays close to the prior
# $p$, which does not:
#
# $$L = -\ln p(x_t \mid h_t, s_t) - \ln p(r_t \mid h_t, s_t)
# + \beta \max\big(\mathrm{free},\, \mathrm{KL}[q \Vert p]\big).$$
#
# The actor then follows the model into the future without pictures. Each imagined state is worth
#
# $$V_k = r_k + \gamma_k \big[(1 - \lambda)\, v(s_{k+1}) + \lambda V_{k+1}\big],$$
#
# and since draws are $s = \mu + \sigma \epsilon$ and all else is smooth, $V$ is a differentiable function of the
# actor's parameters $\phi$: the actor's loss is $-\sum_k V_k$ itself, and its gradient passes through values, rewards,
# dynamics and actions. The critic regresses $v$ on $\mathrm{sg}(V)$.

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
from wmjax import dreaming, figures
from wmjax.agents import dreamer_v1 as v1
from wmjax.nets.mlp import call
from wmjax.ops import distributions, kl, returns
from wmjax.types import Trajectory

PRETRAINED = "dreamer_v1/catch"
STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 200))  # of gradient, of what is trained here
folder = tempfile.mkdtemp()

# %% [markdown]
# ## The equations in the package
#
# The KL above its free nats, and the returns of imagined states, a scan from the end:

# %%
print(inspect.getsource(kl.kl_loss))
print(inspect.getsource(returns.state_returns))

# %% [markdown]
# The actor followed through imagination. What comes out is differentiable in `params["actor"]`:

# %%
print(inspect.getsource(v1.imagine_behavior))
print(inspect.getsource(v1.behavior_losses))

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
# ## What it is not sure of
#
# Latents are drawn, so the same actions may be dreamed in several ways. Here are three dreams of one episode, by three
# keys; where the model does not know, they differ.

# %%
records = figures.play(run.agent, env, params, jax.random.key(2), 16, 9)
batch = Trajectory(records.step, records.action, jnp.ones(records.action.shape[:2], bool), ())
dream = jax.jit(lambda params, key: dreaming.open_loop(run.agent.model, params, key, batch, 2)["image"])
rows = {"truth": records.step.obs["image"]} | {f"dream {i}": dream(params, jax.random.key(i)) for i in range(3)}
fig, axes = plt.subplots(len(rows), 9, figsize=(10, 4.7))
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for t, axis in enumerate(row):
        axis.imshow(np.clip(pictures[t, 0], 0, 255).astype(np.uint8))
        axis.set(xticks=[], yticks=[], title=("sees" if t < 2 else f"+{t - 1}") if row is axes[0] else "")
    row[0].set_ylabel(name)

# %% [markdown]
# ## Change an equation
#
# `v1.Equations` holds the functions of the paper; each of them may be another one. The actor climbs λ-returns, which
# end in the value of the last imagined state. Here are plain sums of imagined rewards instead, which know nothing
# beyond the horizon.


# %%
def plain_sums(imagined, config):
    """Discounted sums of imagined rewards up to the horizon, `[H - 1, N]`."""

    def add(later, now):
        total = now[0] + now[1] * later
        return total, total

    reward, discount = imagined.reward, imagined.discount
    return jax.lax.scan(add, reward[-1], (reward[:-1], discount[:-1]), reverse=True)[1]


# %% [markdown]
# `wmjax.train("dreamer_v1", "catch", equations=v1.Equations(returns=plain_sums))` trains a run with it. To see the
# effect in seconds we train actors alone, from new parameters, in the dreams of the run's world model. This is all
# there is to it:


# %%
@jax.jit
def filtered(params, records, key):
    """The posterior states `[T, B]` of records, which dreams begin from."""
    model, step = run.agent.model, records.step
    prev_action = jnp.concatenate([jnp.zeros_like(records.action[:1]), records.action[:-1]])
    embed, start = model.encode(params, step.obs), model.init_state(params, step.reward.shape[1])
    return dreaming.observe(model, params, key, start, prev_action, embed, step.is_first)[1]


start = dreaming.last_steps(filtered(params, records, jax.random.key(3)), 8)


@functools.partial(jax.jit, static_argnums=0)
def learned(equations, params, start, key):
    """An actor and a critic after `STEPS` steps of Adam, the mean imagined reward on the way, and V at the end."""
    parts = v1.assemble(env.spec, run.config, equations=equations)
    optimizer, size = optax.adam(1e-3), len(start.deter)

    def loss(trained, key):
        imagined = v1.imagine_behavior(parts, params | trained, jax.random.split(key, size), start)
        feat = jax.lax.stop_gradient(imagined.feat[:-1])
        critic = distributions.number(call(parts.nets.critic, trained["critic"], feat))
        entropy = v1.policy_entropy(v1.policy_dist(parts, trained["actor"], feat), jax.random.split(key, size))
        losses, metrics = v1.behavior_losses(critic, entropy, imagined, jnp.ones(size), run.config, equations=equations)
        return losses["actor"] + losses["critic"], (metrics["imagined_reward"], equations.returns(imagined, run.config))

    def descend(carry, key):
        trained, state = carry
        gradient, (reward, target) = jax.grad(loss, has_aux=True)(trained, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(trained, updates), state), (reward, target.mean(1))

    trained = {name: run.agent.init(key).params[name] for name in ("actor", "critic")}
    (trained, _), (rewards, targets) = jax.lax.scan(
        descend, (trained, optimizer.init(trained)), jax.random.split(key, STEPS)
    )
    return trained, rewards, targets[-1]


fig, axes = plt.subplots(1, 2, figsize=(10, 3))
for name, equations in {"λ-returns": v1.Equations(), "plain sums": v1.Equations(returns=plain_sums)}.items():
    trained, rewards, worth = learned(equations, params, start, jax.random.key(0))
    axes[0].plot(rewards, label=name)
    axes[1].plot(np.arange(1, len(worth) + 1), worth, "-o", label=name)
    acting = dataclasses.replace(run, state=run.state._replace(params=params | trained))
    print(f"{name}: imagined reward {rewards[-1]:.3f} a step, real return {acting.evaluate(episodes=64).mean:.2f}")
axes[0].set(xlabel="step of gradient", ylabel="mean imagined reward")
axes[1].set(xlabel="imagined state $k$", ylabel="$V_k$ at the end")
axes[0].legend()
plt.show()

# %% [markdown]
# `bootstrap=False, lambda_=1` is the same as an option. What else may be changed: `docs/equations.md`. The gradient
# with respect to the actions and the initial state has a notebook of its own, `differentiate_through_a_dream`.
