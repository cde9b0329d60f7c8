"""One way to run environments in these tests."""

import jax
import jax.numpy as jnp


def rollout(env, key, policy, steps, num_envs):
    """Records `[steps + 1, num_envs, ...]` and actions `[steps, num_envs, ...]`; `policy(key, TimeStep) -> action`."""

    def one(carry, key):
        state, now = carry
        key_act, key_step = jax.random.split(key)
        action = jax.vmap(policy)(jax.random.split(key_act, num_envs), now)
        state, then = jax.vmap(env.step)(jax.random.split(key_step, num_envs), state, action)
        return (state, then), (then, action)

    @jax.jit
    def run(key):
        key_reset, key = jax.random.split(key)
        state, first = jax.vmap(env.reset)(jax.random.split(key_reset, num_envs))
        _, (records, actions) = jax.lax.scan(one, (state, first), jax.random.split(key, steps))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, records), actions

    return run(key)


def mean_return(env, key, policy, episodes):
    """Mean return of `episodes` first episodes of `spec.max_episode_steps` steps or fewer."""
    records, _ = rollout(env, key, policy, env.spec.max_episode_steps, episodes)
    ended_before = jnp.cumsum(records.is_first, 0) > 1
    return float(jnp.where(ended_before, 0, records.reward).sum(0).mean())
