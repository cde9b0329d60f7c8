"""How much of the gradient of the returns comes through one-hot actions, of runs of DreamerV1 on `catch`.

    python -m benchmarks.straight_through RUN [RUN ...]

At states of random play, each action is imagined first, and then the policy, which tells what the return would be for
each of the three. From these follows the exact gradient of the expected return in the policy's logits there, π (Q - V).
Beside it stands the straight-through one that DreamerV1 learns by, from the same number of dreams: its length, whether
it points the same way, and whether it prefers the best action of a state in which it matters which one is taken.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

import wmjax
from wmjax import dreaming
from wmjax.agents import dreamer_v1 as v1
from wmjax.loops.rollout import Position, random_act, rollout
from wmjax.nets.mlp import call
from wmjax.ops.distributions import number
from wmjax.types import Array

EPISODES, STEPS, DREAMS = 64, 10, 32  # STEPS: records of an episode of catch; DREAMS: of each state, for each action
MATTERS = 0.5  # a state counts where the best action is worth so much more than the worst
sg = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of `wmjax train dreamer_v1`


def states_of_random_play(run: wmjax.Run, key: Array) -> v1.LatentState:
    """Posteriors of all steps but the last of episodes, `[N]`."""
    agent, env, params = run.agent, run.env, run.state.variables
    key_reset, key_act, key_model = jax.random.split(key, 3)
    state, first = jax.vmap(env.reset)(jax.random.split(key_reset, EPISODES))
    begin = Position(state, first, agent.act_carry(params, EPISODES))
    act = partial(random_act(agent, env.spec), explore=True)
    step, action = rollout(act, env, params, key_act, begin, STEPS)[1][:2]
    previous = jnp.concatenate([jnp.zeros_like(action[:1]), action[:-1]])
    start, keys = agent.model.init_state(params, EPISODES), jax.random.split(key_model, EPISODES)
    embed = agent.model.encode(params, step.obs)
    _, states = dreaming.observe(agent.model, params, keys, start, previous, embed, step.is_first)
    return jax.tree.map(lambda x: x[:-1].reshape(-1, *x.shape[2:]), states)


def measure(run: wmjax.Run, key: Array) -> dict[str, Array]:
    """What is printed of a run, float32 scalars."""
    config, params, model = run.config, run.state.variables, run.agent.model
    parts = v1.assemble(run.env.spec, config)
    key_states, key_dreams = jax.random.split(key)
    states = states_of_random_play(run, key_states)
    policy_of = lambda state: v1.policy_dist(parts, params["actor"], v1.feature(state))
    logits = policy_of(states).logits

    def returns(action: Array, key: Array) -> Array:
        """`[N]`, the lambda-return of what follows an action `[N, 3]`; differentiable in it."""
        key_first, key_rest = (jax.random.split(k, len(action)) for k in jax.random.split(key))
        start = model.imagine(params, key_first, states, action)
        sample = lambda key, carry, state: (carry, policy_of(sg(state)).sample(seed=key))
        _, feat, actions = dreaming.imagine(model, params, key_rest, start, sample, config.horizon - 1, emit=v1.feature)
        reward = parts.equations.reward(call(parts.nets.reward, params["reward"], feat), config).mean()
        value = number(call(parts.nets.critic, params["critic"], feat)).mean()
        discount = v1.dreamer.discount_of(parts.nets, params, feat, config.discount)
        return v1.targets(v1.Imagined(feat, actions, reward, discount, value), config)[0]

    def through_samples(key: Array) -> Array:
        """`[N, 3]`, the gradient in the logits from one dream of each state."""
        key_action, key_dream = jax.random.split(key)

        def total(logits):
            probs = jax.nn.softmax(logits)
            action = jax.nn.one_hot(jax.random.categorical(key_action, sg(logits)), 3) + probs - sg(probs)
            return returns(action, key_dream).sum()

        return jax.grad(total)(logits)

    keys = jax.random.split(key_dreams, DREAMS)
    over = lambda function: jax.lax.map(function, keys).mean(0)
    each = [over(partial(returns, jnp.tile(jax.nn.one_hot(a, 3), (len(logits), 1)))) for a in range(3)]
    q, pi, straight = jnp.stack(each, -1), jax.nn.softmax(logits), over(through_samples)
    exact = pi * (q - (pi * q).sum(-1, keepdims=True))
    matters = jnp.ptp(q, axis=-1) > MATTERS
    mean = lambda x: x.mean(where=matters)
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    return {
        "updates": run.state.step,
        "states_that_matter": matters.mean(),
        "exact": mean(length(exact)),
        "straight_through": mean(length(straight)),
        "same_way": mean((exact * straight).sum(-1) > 0),
        "prefers_best": mean(straight.argmax(-1) == q.argmax(-1)),
        "policy_takes_best": mean(pi.argmax(-1) == q.argmax(-1)),
    }


def main(args: Args) -> None:
    for path in args.runs:
        run = wmjax.load(path)
        found = jax.jit(partial(measure, run))(jax.random.key(0))
        print(json.dumps({"run": path.name, **{name: round(float(x), 4) for name, x in found.items()}}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
