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
# # World Models: see, remember, and evolve a controller in a dream
#
# Three parts that are trained one after the other: an autoencoder sees (V), a recurrent mixture network predicts (M),
# and CMA-ES looks for a small linear controller (C). A generation of CMA-ES — population, episodes, ranking — is one
# compiled call, in the environment or in M's dream. Everything below runs on a laptop's CPU. `STEPS` is the number of
# environment steps that are collected; the default here only shows the mechanics.

# %%
import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import dreaming, evolution, figures, presets
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import controller
from wmjax.loops import device
from wmjax.loops.rollout import Evaluator

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 4096))
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Train
# On `catch`, evolved in the dream alone: after collection no step of the environment is taken. The stages are data.

# %%
small, _ = presets.resolve("world_models", "small", "catch")
search = dataclasses.replace(
    small.evolve, where="dream", population=16, rollouts=8, generations=20, mean_every=5, mean_rollouts=64, horizon=9
)
run = wmjax.train(
    "world_models", "catch", seed=0, out=f"{folder}/catch", progress=False,
    collection="random", collect_steps=STEPS, replay_capacity=STEPS, vision_updates=STEPS // 10,
    memory_updates=STEPS // 10, memory_length=9, evolve=search,
)  # fmt: skip
for stage in run.agent.recipe.stages:
    print(f"{stage.name}: {stage.iterations} iterations, collects {stage.collect}, updates {len(stage.updates)}")
scores = run.evaluate(episodes=64)
print(f"mean return {scores.mean:.2f} over {scores.episodes} episodes (random: about -0.6, best: 1)")

# %% [markdown]
# ## What V sees and M expects
# The same pictures as `wmjax dream` and `wmjax plot` draw: originals above their reconstructions, and fitness over
# generations. The best of a population is best by luck, too; what counts is the distribution's mean.

# %%
agent, env, params = run.agent, run.env, run.state.variables
seen = figures.open_loop(agent, env, params, jax.random.key(1), 2, 6)
figures.write_reconstructions(f"{folder}/reconstructions.png", seen, 2, "image")
figures.plot_fitness_curves(f"{folder}/fitness.png", [("catch, in the dream", run.path)])
print("error of the reconstruction:", figures.reconstruction_errors(seen, 2)["image"])
print("error by horizon:", np.round(figures.horizon_errors(seen, 2)["image"]["model"], 4))
figure, axes = plt.subplots(1, 2, figsize=(13, 5))
for axis, name in zip(axes, ("reconstructions", "fitness"), strict=True):
    axis.imshow(plt.imread(f"{folder}/{name}.png"))
    axis.axis("off")
figure.savefig(f"{folder}/figures.png")
plt.close(figure)

# %% [markdown]
# ## One generation by hand
# `ask`, play, `tell`: fitness is maximized, and only ranks matter. The dream is an environment like any other, built
# inside of the traced function; here it starts from nothing, in training from states that M reached on real records.

# %%
strategy = evolution.make_strategy(evolution.StrategyConfig(dims=params["controller"].size, population=16))
starts = jax.tree.map(lambda x: jnp.repeat(x, 8, 0), agent.model.init_state(params, 1))


@jax.jit
def generation(params, key, state):
    key_ask, key_play, key_tell = jax.random.split(key, 3)
    candidates, state = strategy.ask(key_ask, state)
    dream = dreaming.dream_env(agent.model, params, starts, env.spec, horizon=9, obs="state", actions="agent")
    act = lambda params, key, carry, step: agent.policy(params, key, carry, step.obs["state"], explore=True)
    population = params | {"controller": candidates}
    keys = evolution.episode_keys(key_play, 16, 4)
    returns = evolution.play(dream, act, population, agent.policy_carry(population, 64), keys, 9).returns
    return strategy.tell(key_tell, state, candidates, returns.mean(1)), returns.mean(1)


state = strategy.init(jax.random.key(2), params["controller"])
for i in range(3):
    state, fitness = generation(params, jax.random.key(i), state)
    print(f"generation {i}: mean {fitness.mean():.3f}, best {fitness.max():.3f}, sigma {state.sigma:.4f}")

# %% [markdown]
# ## Change one equation
# A controller that acts on z alone is the paper's weak ablation, and an option (`inputs="z"`). Here is one that is not:
# C is given rounded numbers. Replace the function, make the agent, and evolve in the environment.

# %%
linear = controller.controller


def rounded(theta, inputs, layers, bias=True):
    """The same controller with inputs that are rounded to quarters: how fine must a latent be?"""
    return linear(theta, jnp.round(4 * inputs) / 4, layers, bias)


controller.controller = rounded
try:
    config = dataclasses.replace(run.config, evolve=dataclasses.replace(search, where="env"))
    mine = wm.world_models(env.spec, config)
    state = jax.jit(lambda key: device.init(mine, env, key))(jax.random.key(0))
    state = state._replace(agent=state.agent._replace(params=state.agent.params | {"encoder": params["encoder"]}))
    evolve = device.compile_stage(mine, env, mine.recipe.stages[-1])  # one compiled program: ask, play, tell
    state, metrics = evolve(state, 2)
    score = Evaluator(mine, env)(state.agent.variables, jax.random.key(3), 64)
finally:
    controller.controller = linear
print(f"fitness {metrics['controller/fitness_mean']:.2f}, return {score.returns.mean():.2f}")
assert np.isfinite(metrics["controller/fitness_mean"])
