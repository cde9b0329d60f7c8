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
# # DreamerV3: one set of hyperparameters
#
# Hafner, Pasukonis, Ba, Lillicrap, *Mastering Diverse Domains through World Models* ([arXiv
# 2301.04104](https://arxiv.org/abs/2301.04104)). The code is one file, `wmjax/agents/dreamer_v3.py`; its page is
# `docs/papers/dreamer_v3.md`.
#
# ## The idea
#
# A recurrent state $h_t$ remembers, a discrete latent $z_t$ says what is seen:
#
# $$h_t = f(h_{t-1}, z_{t-1}, a_{t-1}), \qquad z_t \sim q(z_t \mid h_t, x_t), \qquad
# \hat z_t \sim p(\hat z_t \mid h_t).$$
#
# From $(h_t, z_t)$ heads predict the picture $x_t$, the reward $r_t$ and whether the episode goes on, $c_t$. The
# posterior $q$ sees the picture, the prior $p$ does not: where the two agree, the model can go on without pictures,
# which is a dream. All is trained at once,
#
# $$L = -\ln p(x_t, r_t, c_t \mid h_t, z_t) + \max\big(1, \mathrm{KL}[\mathrm{sg}(q) \,\Vert\, p]\big)
# + 0.1 \max\big(1, \mathrm{KL}[q \,\Vert\, \mathrm{sg}(p)]\big),$$
#
# where $\mathrm{sg}$ stops gradients: the first KL trains the prior, the second, weaker one the posterior, and neither
# counts below one nat. The actor learns in dreams alone, from λ-returns $R_t$ that are divided by their own range $S$
# but never by less than 1, so that the same entropy bonus fits all games:
#
# $$R_t = r_t + \gamma c_t \big[(1 - \lambda) v_{t+1} + \lambda R_{t+1}\big], \qquad
# L_\pi = -\mathrm{sg}\Big(\frac{R_t - v_t}{\max(1, S)}\Big) \ln \pi(a_t) - \eta\, H(\pi).$$
#
# Rewards and values are predicted through $\mathrm{symlog}(x) = \mathrm{sign}(x) \ln(|x| + 1)$, as distributions over
# bins.

# %%
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
from wmjax import dreaming, figures, optim, weights
from wmjax.agents import dreamer_v3 as v3
from wmjax.nets.spaces import is_image
from wmjax.ops import kl, normalize, returns, symlog

PRETRAINED = "dreamer_v3/catch"
STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 150))  # of gradient, of what is trained here
folder = tempfile.mkdtemp()

# %% [markdown]
# ## The equations in the package
#
# The two KL terms, with their free nats and the 1 % of a uniform distribution that is mixed into both:

# %%
print(inspect.getsource(kl.balanced_kl))

# %% [markdown]
# The λ-returns, a scan from the end; the range $S$, between percentiles of the returns; and symlog:

# %%
print(inspect.getsource(returns.lambda_returns))
print(inspect.getsource(normalize.scale))
print(inspect.getsource(symlog.symlog))

# %% [markdown]
# And where the model's terms come together. Each term is `[T, B]`; its name is the one in `metrics.jsonl`.

# %%
print(inspect.getsource(v3.world_model_losses))

# %% [markdown]
# ## A trained run
#
# A run is an agent in its environment, with its parameters. This one comes with the package; its card says how it was
# trained and what it earned.

# %%
run = wmjax.load(f"pretrained:{PRETRAINED}")
card = weights.read(weights.locate(f"pretrained:{PRETRAINED}")).card
print(card["command"])
print(f"card: mean return {card['return']['mean']:.2f} over {card['return']['episodes']} episodes")
scores = run.evaluate(episodes=32)
print(f"here: mean return {scores.mean:.2f} over {scores.episodes} episodes (random play: -0.6, best: 1)")

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
# ## Change an equation
#
# `v3.Equations` holds the functions of the paper; each of them may be another one. The first change replaces a term:
# absolute instead of squared errors of pictures.


# %%
def absolute(output, target, space, config):
    """The decoder's loss on one entry of the observations, `[T, B]`: absolute errors of images."""
    if not is_image(space):
        return v3.reconstruction_loss(output, target, space, config)
    return jnp.abs(output - target.astype(jnp.float32) / 255).sum((-3, -2, -1))


# %% [markdown]
# The second adds a term: the recurrent state shall change little from step to step. A new name in the losses is a new
# term.


# %%
def smooth(parts, params, states, step):
    """The paper's terms, and the squared change of h."""
    losses, metrics = v3.world_model_losses(parts, params, states, step)
    change = jnp.diff(states.deter, axis=0, prepend=states.deter[:1])  # [T, B, D]
    change = jnp.where(step.is_first[..., None], 0, change)
    return losses | {"smooth": jnp.sum(change**2, -1)}, metrics


# %% [markdown]
# `wmjax.train("dreamer_v3", "catch", equations=v3.Equations(world_model=smooth))` trains a run with it. To see the
# effect in seconds we train its world model alone a little further, on the records of a few episodes. This is all there
# is to it:

# %%
records = figures.play(run.agent, env, params, jax.random.key(2), 16, 10)


def filtered(model, params, records, key):
    """The posterior states `[T, B]` of records."""
    step = records.step
    prev_action = jnp.concatenate([jnp.zeros_like(records.action[:1]), records.action[:-1]])
    embed, start = model.encode(params, step.obs), model.init_state(params, step.reward.shape[1])
    return dreaming.observe(model, params, key, start, prev_action, embed, step.is_first)[1]


@functools.partial(jax.jit, static_argnums=0)
def learned(equations, params, records, key):
    """Parameters of a world model after `STEPS` steps of Adam, what it reconstructs, and how far h moves in a step."""
    agent = v3.dreamer_v3(env.spec, run.config, equations=equations)
    parts = v3.assemble(env.spec, run.config, equations=equations)
    optimizer = optax.adam(1e-3)

    def loss(params, key):
        losses, _ = equations.world_model(parts, params, filtered(agent.model, params, records, key), records.step)
        return optim.weighted_sum(losses, v3.scales(parts))[0]

    def descend(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(descend, (params, optimizer.init(params)), jax.random.split(key, STEPS))
    states = filtered(agent.model, params, records, key)
    moves = jnp.square(jnp.diff(states.deter, axis=0)).sum(-1).mean()
    return agent.model.decode(params, states)["image"], moves


rows = {"truth": records.step.obs["image"]}
changes = {
    "paper": v3.Equations(),
    "absolute": v3.Equations(reconstruction=absolute),
    "smooth": v3.Equations(world_model=smooth),
}
for name, equations in changes.items():
    rows[name], moves = learned(equations, params, records, jax.random.key(0))
    error = (rows[name] - rows["truth"]) / 255
    print(f"{name:9s} squared error {jnp.square(error).mean():.4f}, absolute {jnp.abs(error).mean():.4f}; ", end="")
    print(f"h moves by {moves:.2f}")

fig, axes = plt.subplots(len(rows), 8, figsize=(10, 5.2))
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for t, axis in enumerate(row):
        axis.imshow(np.clip(pictures[t, 0], 0, 255).astype(np.uint8))
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)

# %% [markdown]
# `wmjax.load(path, equations=...)` reads such a run back; its `config.json` says which functions are not the paper's.
# What else may be changed: `docs/equations.md`.
