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
# # Differentiate through a dream
#
# A dream is a function. From a state $s_0$, actions $a_0 \dots a_{H-1}$ and a random key $\varepsilon$ the world model
# makes
#
# $$s_{t+1} = f(s_t, a_t, \varepsilon_t), \qquad R = \sum_{t=1}^{H} w_t\, r(s_t), \qquad
# w_t = \prod_{1 \le j < t} c(s_j),$$
#
# with the reward $r$ and the probability of going on $c$ that it predicts. All of it is one `lax.scan`, so `jax.grad`
# gives $\partial R / \partial a_t$ and $\partial R / \partial s_0$. This notebook takes both, checks them against
# finite differences, and follows the first one uphill until a pendulum swings up, in the dream and then in the real
# environment. Nothing is trained: the model is a DreamerV3 that comes with the package.

# %%
import inspect
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import wmjax
from wmjax import dreaming, figures, planning
from wmjax.agents import dreamer_v3 as v3

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 100))  # of the search for actions
CONTEXT, HORIZON, DREAMS = 4, 30, 16
folder = tempfile.mkdtemp()
run = wmjax.load("pretrained:dreamer_v3/pendulum")
agent, env, params, model = run.agent, run.env, run.state.variables, run.agent.model
print(run.config.size, env.spec.obs, env.spec.action)

# %% [markdown]
# ## A state to dream from
#
# The model sees four frames of a pendulum that nobody pushes; the last one alone would not say how fast it is. Of 64
# such beginnings we take the one that hangs lowest. `dreaming.observe` filters the frames into a state.


# %%
def begin(key):
    """A real state, and the records that led to it, without torque."""
    state, first = env.reset(key)

    def step(state, key):
        return env.step(key, state, jnp.zeros(1))

    state, later = jax.lax.scan(step, state, jax.random.split(key, CONTEXT - 1))
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


@jax.jit
def choose(params, key):
    """The lowest of 64 beginnings: its real state, its records `[T, 1]`, and what the model makes of them `[1]`."""
    real, seen = jax.vmap(begin)(jax.random.split(key, 64))
    real, seen = jax.tree.map(lambda x: x[jnp.argmin(seen.reward[:, -1])], (real, seen))
    seen = jax.tree.map(lambda x: x[:, None], seen)
    embed, nothing = model.encode(params, seen.obs), jnp.zeros((CONTEXT, 1, 1))
    before = model.init_state(params, 1)
    start, _ = dreaming.observe(model, params, jax.random.key(1), before, nothing, embed, seen.is_first)
    return real, seen, start


real, seen, start = choose(params, jax.random.key(0))
fig, axes = plt.subplots(1, CONTEXT, figsize=(8, 2.2))
for t, axis in enumerate(axes):
    axis.imshow(seen.obs["image"][t, 0])
    axis.set(title=f"frame {t + 1}", xticks=[], yticks=[])

# %% [markdown]
# ## The return of a dream
#
# `planning.imagined_return` is $R$, by a scan over `model.imagine`:

# %%
print(inspect.getsource(planning.imagined_return))

# %% [markdown]
# Actions of an agent are in [-1, 1]; we write them as $\tanh u$, so that $u$ may be any number. `imagined_return(model,
# u, start, key)` is the mean over 16 dreams, each with noise of its own.


# %%
def imagined_return(model, u, start, key):
    """The mean of R over dreams of the actions tanh(u), `u` [H, A]; a scalar."""
    rows = lambda x: jnp.broadcast_to(x, (DREAMS, *x.shape[1:]))
    actions = jnp.broadcast_to(jnp.tanh(u)[:, None], (HORIZON, DREAMS, u.shape[-1]))
    keys = jax.random.split(key, DREAMS)
    return planning.imagined_return(model, params, keys, jax.tree.map(rows, start), actions).mean()


def finite_differences(f, x, size):
    """The gradient of f at x `[H, 1]` by central differences, all entries at once."""
    along = jnp.eye(x.shape[0])[:, :, None] * size
    return (jax.vmap(f)(x + along) - jax.vmap(f)(x - along)) / (2 * size)


def cosine(x, y):
    """1 where two vectors have the same direction."""
    return float(jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y)))


key, u = jax.random.key(2), 0.1 * jax.random.normal(jax.random.key(3), (HORIZON, 1))

# %% [markdown]
# ## The gradient with respect to the actions, checked
#
# DreamerV3 draws its latents from categorical distributions. A draw is a step function of its probabilities, so the
# exact derivative of one dream is zero almost everywhere; the package gives draws the *straight-through* gradient, that
# of the probabilities:

# %%
print(inspect.getsource(v3.latent_kind))

# %% [markdown]
# So there are two things to check.
#
# 1. *Is the chain rule right?* We replace the draw by the probabilities themselves, for what latents are is an equation
#    of the agent, and an argument (`docs/equations.md`). Such a dream is smooth, and its gradient has to equal finite
#    differences up to rounding.
# 2. *What is the straight-through gradient worth?* We compare it with finite differences of the mean over sampled
#    dreams, with steps so large (0.1) that the jumps of single draws average out. It is biased; the cosine says how
#    much.


# %%
def probabilities(config):
    """The paper's latents, which are not drawn."""
    return v3.latent_kind(config)._replace(draw=lambda dist, key: jax.nn.softmax(dist.logits))


smooth = v3.dreamer_v3(env.spec, run.config, equations=v3.Equations(latent=probabilities)).model
checks = {"probabilities, step 0.01": (smooth, 0.01), "straight-through, step 0.1": (model, 0.1)}
fig, axes = plt.subplots(1, 2, figsize=(11, 3), sharey=True)
for axis, (name, (dreamed, size)) in zip(axes, checks.items(), strict=True):
    f = lambda u, dreamed=dreamed: imagined_return(dreamed, u, start, key)
    gradient = jax.jit(jax.grad(f))(u)[:, 0]
    finite = jax.jit(lambda u, f=f, size=size: finite_differences(f, u, size))(u)
    print(f"{name}: cosine of the two {cosine(gradient, finite):.4f}")
    axis.plot(gradient, "o", label="chain rule")
    axis.plot(finite, label="finite differences")
    axis.set(title=name, xlabel="step $t$", ylabel=r"$\partial R\,/\,\partial u_t$")
    axis.legend()

# %% [markdown]
# ## The gradient with respect to the initial state
#
# The state is a recurrent vector `deter` and latents `stoch`. The gradient with respect to it says what the model
# wishes were otherwise before anything is done. Along a direction $d$ the derivative of $R$ is $\nabla R \cdot d$,
# which we check for the gradient's own direction and for random ones, in the smooth dream.


# %%
@jax.jit
def of_state(start):
    """R, and its gradient with respect to `deter` and `stoch`."""
    f = lambda deter, stoch: imagined_return(smooth, u, start._replace(deter=deter, stoch=stoch), key)
    return jax.grad(f, (0, 1))(start.deter, start.stoch)


@jax.jit
def moved(start, direction, size):
    """R from a state that is moved by `size` along a direction."""
    deter, stoch = (x + size * d for x, d in zip((start.deter, start.stoch), direction, strict=True))
    return imagined_return(smooth, u, start._replace(deter=deter, stoch=stoch), key)


gradient = of_state(start)
norm = optax.global_norm(gradient)
directions = {"its own": optax.tree_utils.tree_scale(1 / norm, gradient)}
for seed in range(3):
    noise = optax.tree_utils.tree_random_like(jax.random.key(seed), gradient, jax.random.normal)
    directions[f"random {seed}"] = optax.tree_utils.tree_scale(1 / optax.global_norm(noise), noise)
for name, direction in directions.items():
    chain = optax.tree_utils.tree_vdot(gradient, direction)
    finite = (moved(start, direction, 0.01) - moved(start, direction, -0.01)) / 0.02
    print(f"direction {name}: by the chain rule {chain:8.2f}, by finite differences {finite:8.2f}")

# %% [markdown]
# ## Actions found by the gradient
#
# Now gradient ascent on $u$ by Adam, through the sampled dreams of the model as it is. The search is a scan, too: one
# compiled program.


# %%
@jax.jit
def search(params, u):
    """Actions after so many steps uphill, and R before each step."""
    optimizer = optax.adam(0.1)

    def step(carry, _):
        u, state = carry
        value, gradient = jax.value_and_grad(lambda u: imagined_return(model, u, start, key))(u)
        updates, state = optimizer.update(jax.tree.map(jnp.negative, gradient), state)
        return (optax.apply_updates(u, updates), state), value

    (u, _), values = jax.lax.scan(step, (u, optimizer.init(u)), length=STEPS)
    return u, values


@jax.jit
def happened(u):
    """Records of the real environment under these actions."""
    step = lambda state, action: env.step(jax.random.key(0), state, action)
    return jax.lax.scan(step, real, jnp.tanh(u))[1]


found, values = search(params, u)
before, after = happened(u), happened(found)
print(f"imagined: {values[0]:.0f} -> {imagined_return(model, found, start, key):.0f}")
print(f"real:     {before.reward.sum():.0f} -> {after.reward.sum():.0f}")
fig, axes = plt.subplots(1, 3, figsize=(12, 2.8))
axes[0].plot(values)
axes[0].set(xlabel="step of the search", title="imagined return")
axes[1].plot(jnp.tanh(found), drawstyle="steps-post")
axes[1].set(xlabel="step $t$", title="actions found", ylim=(-1.1, 1.1))
axes[2].plot(before.reward, label="first actions")
axes[2].plot(after.reward, label="actions found")
axes[2].set(xlabel="step $t$", title="real reward")
axes[2].legend()
plt.show()

# %% [markdown]
# ## The dream beside what happened
#
# The model predicted all of it from the four frames above. The rod swings back and forth, for the motor is too weak to
# lift it at once. Nobody told the search so; it is in the gradient of the dream.


# %%
@jax.jit
def dream(params, u):
    """Pictures of one dream, `[H + 1, 1, ...]`."""
    policy, carry = dreaming.given_actions(jnp.tanh(u)[:, None])
    _, states, _ = dreaming.imagine(model, params, key, start, policy, HORIZON, policy_carry=carry)
    return model.decode(params, states)["image"]


truth = np.concatenate([seen.obs["image"][:, 0], after.obs["image"]])[:, None]
predicted = np.concatenate([seen.obs["image"][:-1, 0].astype(np.float32), dream(params, found)[:, 0]])[:, None]
window = figures.OpenLoop({"image": truth}, {"image": predicted}, np.ones((HORIZON, 1), bool))
figures.write_dream_strip(f"{folder}/strip.png", window, CONTEXT, "image", "Actions found by the gradient")
figures.show(f"{folder}/strip.png")

# %% [markdown]
# ## Further
#
# `run.with_policy("gradient")` plans so at every step, from several starts (`docs/planning.md`). DreamerV1's latents
# are Gaussian and its gradient is exact; IRIS draws tokens, through which no gradient passes, and says so.
