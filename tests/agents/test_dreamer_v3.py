"""What DreamerV3 promises beyond equal numbers: sizes, and each trap of reimplementations by name."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.batches import (
    MIXED,
    PIXELS,
    TINY_V3,
    perturb,
    perturbed,
    random_action,
    random_step,
    random_trajectory,
)
from wmjax import dreaming
from wmjax.agents import dreamer_v3 as v3
from wmjax.nets import codec
from wmjax.ops import distributions, normalize
from wmjax.ops.symlog import symlog
from wmjax.types import Box, Discrete, EnvSpec, TimeStep, UsageError

ATARI = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(6))
PUBLISHED = {
    "1m": dict(cont=41_153, decoder=80_595, rssm=376_704, encoder=14_304, actor=49_926, reward=57_663, critic=66_111),
    "12m": dict(
        cont=656_129, decoder=1_272_003, rssm=5_979_648, encoder=220_416, actor=789_510, reward=721_407, critic=853_503
    ),
}
TOTALS = {
    "1m": 0.686, "12m": 10.49, "25m": 23.49, "50m": 41.65, "100m": 93.46, "200m": 165.9, "400m": 372.9,
}  # fmt: skip


def counts(spec, config):
    params = jax.eval_shape(v3.dreamer_v3(spec, config).init, jax.random.key(0)).variables
    return {name: sum(x.size for x in jax.tree.leaves(value)) for name, value in params.items()}


@pytest.mark.parametrize("size", TOTALS)
def test_published_sizes_have_the_published_parameter_counts(size):
    found = counts(ATARI, v3.DreamerV3Config(size=size))
    assert found.pop("slow_critic") == found["critic"]
    digits = 3 if size == "1m" else 2 if TOTALS[size] < 100 else 1
    assert round(sum(found.values()) / 1e6, digits) == TOTALS[size]
    if size in PUBLISHED:
        assert found == PUBLISHED[size]


MADE: dict = {}  # agents by specification and changes: compiling takes longer than the tests


def tiny(spec=PIXELS, **changes):
    """Agent, config, modules and a state with perturbed parameters."""
    name = (str(spec), *sorted(changes.items()))
    if name not in MADE:
        config = dataclasses.replace(TINY_V3, **changes)
        agent = v3.dreamer_v3(spec, config)
        state = jax.jit(agent.init)(jax.random.key(0))
        MADE[name] = agent, config, v3.assemble(spec, config), perturbed(state)
    return MADE[name]


@functools.cache
def update_of(agent):
    return jax.jit(agent.recipe.stages[-1].updates[0].fn)


# ---------------------------------------------------------------------------------------------------------------------
# Alignment of actions, rewards and flags


def observed(agent, state, step, prev_action, start=None):
    model = agent.model
    batch = step.reward.shape[1]
    start = model.init_state(state.params, batch) if start is None else start
    embed = model.encode(state.params, step.obs)
    return dreaming.observe(model, state.params, jax.random.key(1), start, prev_action, embed, step.is_first)[1]


@pytest.mark.slow
def test_a_reset_inside_the_window_forgets_state_and_action_before_it():
    for spec in (PIXELS, MIXED):
        agent, _, _, state = tiny(spec)
        step = random_step(spec, (6, 2))._replace(is_first=jnp.zeros((6, 2), bool).at[3].set(True))
        first, second = (random_action(spec, (6, 2), seed) * 3 for seed in (0, 1))
        second = second.at[4:].set(first[4:])  # the same actions after the reset only
        a, b = observed(agent, state, step, first), observed(agent, state, step, second)
        assert not np.allclose(a.deter[2], b.deter[2])
        assert np.array_equal(a.deter[3:], b.deter[3:])
        assert np.array_equal(a.stoch[3:], b.stoch[3:])


@pytest.mark.slow
def test_the_action_that_led_to_a_step_is_the_one_recorded_a_step_before():
    agent, config, _, state = tiny()
    batch = random_trajectory(agent, PIXELS, state, config.length + 1, 4)
    losses = []
    _, _, plain = update_of(agent)(state, jax.random.key(2), batch)
    for t in range(config.length + 1):
        changed = batch.action.at[t].set(jnp.roll(batch.action[t], 1, -1))
        _, metrics, latent = update_of(agent)(state, jax.random.key(2), batch._replace(action=changed))
        moved = np.abs(np.asarray(latent["deter"]) - plain["deter"]).max((1, 2)) > 0
        # Rewriting the action of record t changes the state at t + 1 and nothing before it; the last one is not used.
        assert not moved[: t + 1].any()
        assert t == config.length or moved[t + 1]
        losses.append(float(metrics["loss"]))
    assert len(set(losses[:-1])) == config.length


@pytest.mark.slow
def test_continuous_actions_are_kept_raw_and_squashed_by_the_model_alone():
    agent, _, parts, state = tiny(MIXED)
    start = agent.model.init_state(state.params, 1)
    advance = lambda action: v3.call(
        parts.nets.rssm, state.params["rssm"], start.deter + 0.1, start.stoch, jnp.array([action]), method="advance"
    )
    assert np.allclose(advance([4.0, 0.5]), advance([1.0, 0.5]), atol=1e-6)
    assert not np.allclose(advance([0.5, 0.5]), advance([1.0, 0.5]), atol=1e-4)
    policy = distributions.bounded_normal(jnp.full((2000, 2), 9.0), jnp.full((2000, 2), 9.0))
    assert policy.sample(seed=jax.random.key(0)).max() > 2.0


@pytest.mark.slow
def test_the_continue_target_is_no_end_at_a_time_limit():
    agent, _, parts, state = tiny()
    step = random_step(PIXELS, (6, 2))
    states = observed(agent, state, step, random_action(PIXELS, (6, 2)))
    clear = jnp.zeros((6, 2), bool)
    cut, ended = clear.at[4].set(True), clear.at[4].set(True)

    def cont_loss(last, terminal):
        given = step._replace(is_last=last, is_terminal=terminal)
        return v3.world_model_losses(parts, state.params, states, given)[0]["cont"]

    assert np.array_equal(cont_loss(cut, clear), cont_loss(clear, clear))
    assert not np.allclose(cont_loss(cut, ended)[4], cont_loss(clear, clear)[4])


def critics(values):
    """Return distributions with the given means: all weight on the two neighbors of each value."""
    bins = distributions.exponential_bins(255)
    values = jnp.asarray(values, jnp.float32)
    below = jnp.clip((bins <= values[..., None]).sum(-1) - 1, 0, 253)
    weight = (values - bins[below]) / (bins[below + 1] - bins[below])
    probs = jax.nn.one_hot(below, 255) * (1 - weight)[..., None] + jax.nn.one_hot(below + 1, 255) * weight[..., None]
    return distributions.TwoHot(jnp.log(probs + 1e-30), bins)


@pytest.mark.slow
def test_replay_returns_stop_at_a_time_limit_but_bootstrap_there():
    config = v3.DreamerV3Config(discount_horizon=1e9)
    reward = jnp.array([[0.0], [1.0], [2.0], [50.0]])
    boot = jnp.array([[9.0], [10.0], [20.0], [30.0]])
    flag = jnp.zeros((4, 1), bool)
    last = flag.at[2].set(True)

    def best_value(terminal):
        """The value at step 0 that the loss likes best."""
        step = TimeStep({}, reward, flag, last, terminal)
        grid = jnp.linspace(0, 40, 161)
        slow = critics(jnp.zeros((4, 1)))
        free = dataclasses.replace(config, slow_critic_scale=0.0)
        score = lambda value: v3.replay_critic_loss(critics(jnp.full((4, 1), value)), slow, step, boot, free)[0, 0]
        return float(grid[jnp.argmin(jax.vmap(score)(grid))])

    # r₁ + (1-λ) b₁ + λ (r₂ + b₂): the reward of 50 in the next episode does not count.
    assert best_value(flag) == pytest.approx(1 + 0.05 * 10 + 0.95 * (2 + 20), abs=0.2)
    assert best_value(last) == pytest.approx(1 + 0.05 * 10 + 0.95 * 2, abs=0.2)


def test_a_step_that_ends_its_episode_carries_no_replay_critic_loss():
    step = TimeStep({}, *[jnp.ones((3, 1))] * 1, *[jnp.zeros((3, 1), bool)] * 3)
    step = step._replace(is_last=step.is_last.at[1].set(True))
    loss = v3.replay_critic_loss(critics(jnp.ones((3, 1))), critics(jnp.ones((3, 1))), step, jnp.ones((3, 1)), TINY_V3)
    assert loss.shape == (2, 1)
    assert loss[1, 0] == 0 and loss[0, 0] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Imagination, actor and critic


def imagination(cont=0.9, horizon=4, **changes):
    config = dataclasses.replace(v3.DreamerV3Config(), **changes)
    logits = jax.random.normal(jax.random.key(0), (horizon + 1, 2, 3))
    action = jax.nn.one_hot(jnp.zeros((horizon, 2), int), 3)
    reward = jnp.arange(1.0, horizon + 2)[:, None] * jnp.ones((1, 2))
    value = jnp.full((horizon + 1, 2), 7.0)
    losses, target, state, _ = v3.imagination_losses(
        distributions.OneHotCategorical(logits), action, reward, jnp.full_like(reward, cont), critics(value),
        critics(value), normalize.init(), config,
    )  # fmt: skip
    return losses, target, state, logits


def test_losses_cover_the_horizon_and_the_last_imagined_state_only_bootstraps():
    losses, target, _, _ = imagination(horizon=4)
    assert losses["actor"].shape == losses["critic"].shape == target.shape == (4, 2)


def test_imagined_returns_use_reward_and_continue_of_the_next_state():
    _, target, _, _ = imagination(cont=0.9, horizon=3)
    # By hand, backwards from v₃ = 7 with rewards 2, 3, 4 on arrival and λ = 0.95.
    expected = []
    following = 7.0
    for reward in (4.0, 3.0, 2.0):
        following = reward + 0.9 * (0.05 * 7.0 + 0.95 * following)
        expected.append(following)
    assert np.allclose(target[:, 0], expected[::-1], rtol=1e-5)


def test_weights_start_at_the_predicted_continue_of_the_start_not_at_one():
    losses, target, _, _ = imagination(cont=0.9, horizon=4, entropy_scale=0.0, slow_critic_scale=0.0)
    ratio = losses["critic"][:, 0] / -critics(jnp.full((4,), 7.0)).log_prob(target[:, 0])
    assert np.allclose(ratio, 0.9 ** np.arange(1, 5), rtol=1e-4)


def test_the_return_range_is_updated_before_it_is_used_and_starts_at_zero():
    _, target, state, _ = imagination()
    low, high = np.percentile(target, [5, 95])
    assert np.allclose(state, (0.01 * low, 0.01 * high), rtol=1e-5)


def gradient_flow(spec=PIXELS):
    """Which modules each loss term trains, at parameters where no head is zero."""
    agent, config, parts, state = tiny(spec)
    start = jax.tree.map(lambda x: x, agent.model.init_state(state.params, 4))
    free = parts._replace(config=dataclasses.replace(config, free_nats=0.0))

    def terms(params):
        _, (losses, *_) = v3.loss(
            free, params | state.non_trainable, {"return_norm": normalize.init()},
            jax.random.split(jax.random.key(0), 4), start, random_action(spec, (6, 4)), random_step(spec, (6, 4)),
        )  # fmt: skip
        return {name: term.mean() for name, term in losses.items()}

    values, pullback = jax.vjp(jax.jit(terms), state.params)
    flow = {}
    for name in values:
        (grads,) = pullback({other: jnp.float32(other == name) for other in values})
        flow[name] = {module for module, g in grads.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(g))}
    return flow


@pytest.mark.slow
def test_actor_and_critic_leave_the_world_model_alone_and_the_replay_critic_shapes_it():
    flow = gradient_flow()
    assert flow == {
        "actor": {"actor"},
        "critic": {"critic"},
        "replay_critic": {"critic", "rssm", "encoder"},
        "reward": {"reward", "rssm", "encoder"},
        "cont": {"cont", "rssm", "encoder"},
        "decode/image": {"decoder", "rssm", "encoder"},
        "dyn": {"rssm", "encoder"},
        "rep": {"rssm", "encoder"},
    }


@pytest.mark.slow
def test_a_gradient_reaches_actions_through_imagination(monkeypatch):
    """With mean-field latents imagination is smooth, and autodiff must agree with finite differences."""
    monkeypatch.setattr(distributions, "straight_through_sample", lambda key, logits: jax.nn.softmax(logits))
    agent, _, _, state = tiny(MIXED)
    start = agent.model.init_state(state.params, 2)

    @jax.jit
    def imagined_return(actions):
        policy, carry = dreaming.given_actions(actions)
        _, states, _ = dreaming.imagine(
            agent.model, state.params, jax.random.key(0), start, policy, 4, policy_carry=carry
        )
        return agent.model.predict(state.params, states)[0].sum()

    actions = 0.5 * random_action(MIXED, (4, 2))
    grads = jax.grad(imagined_return)(actions)
    assert np.abs(grads).min() > 0  # the last action moves the last state too
    step = 1e-2
    for index in [(0, 0, 0), (1, 1, 1), (3, 0, 1)]:
        plus, minus = (imagined_return(actions.at[index].add(sign * step)) for sign in (1, -1))
        assert np.isclose((plus - minus) / (2 * step), grads[index], rtol=0.02, atol=2e-5 * np.abs(grads).max() / 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


@pytest.mark.slow
def test_the_first_update_has_learning_rate_zero_and_the_second_moves_zero_heads():
    agent, config, _, _ = tiny(warmup=10)
    state = jax.jit(agent.init)(jax.random.key(0))
    batch = random_trajectory(agent, PIXELS, state, config.length + 1, 4)
    once, _, _ = update_of(agent)(state, jax.random.key(0), batch)
    for name, module in state.variables.items():
        tolerance = 1e-6 if name == "slow_critic" else 0.0  # 0.98 x + 0.02 x is x but for rounding
        for old, new in zip(*map(jax.tree.leaves, (module, once.variables[name])), strict=True):
            np.testing.assert_allclose(new, old, atol=tolerance, rtol=tolerance)
    twice, _, _ = update_of(agent)(once, jax.random.key(1), batch)
    assert not np.any(state.params["critic"]["logits"]["kernel"])
    assert np.any(twice.params["critic"]["logits"]["kernel"])


@pytest.mark.slow
def test_the_slow_critic_starts_as_a_copy_and_follows_by_two_percent():
    agent, config, _, _ = tiny()
    state = jax.jit(agent.init)(jax.random.key(0))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state.params["critic"], state.non_trainable["slow_critic"]))))
    batch = random_trajectory(agent, PIXELS, state, config.length + 1, 4)
    new, _, _ = update_of(agent)(state, jax.random.key(0), batch)
    for slow, old, fast in zip(
        *map(jax.tree.leaves, (new.variables["slow_critic"], state.variables["slow_critic"], new.params["critic"])),
        strict=True,
    ):
        assert np.allclose(slow, 0.98 * old + 0.02 * fast, atol=1e-6)


@pytest.mark.slow
def test_values_and_rewards_are_exactly_zero_at_first_even_compiled():
    agent, config, parts, _ = tiny(bins=255)
    state = jax.jit(agent.init)(jax.random.key(0))
    feat = jax.random.normal(jax.random.key(0), (64, config.dimensions.deter + 16))
    assert not np.any(jax.jit(lambda p: v3.critic_dists(parts, p["critic"], feat)[0].mean())(state.params))
    reward = lambda p: distributions.number(v3.call(parts.nets.reward, p["reward"], feat), "two_hot")
    assert not np.any(jax.jit(lambda p: reward(p).mean())(state.params))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, loss",
    [("normal", lambda v, x: (v - x) ** 2 / 2), ("symlog_mse", lambda v, x: (symlog(v) - symlog(x)) ** 2)],
)
def test_reward_and_value_are_regressed_where_the_heads_say_so(kind, loss):
    parts = v3.assemble(PIXELS, dataclasses.replace(TINY_V3, reward_head=kind, critic_head=kind))
    feat = jax.random.normal(jax.random.key(0), (3, TINY_V3.dimensions.deter + 16))
    head = perturb(parts.nets.critic.init(jax.random.key(1), feat)["params"])
    (critic,) = v3.critic_dists(parts, head, feat)
    reward = parts.nets.reward.init(jax.random.key(1), feat)["params"]
    assert jax.tree.map(jnp.shape, v3.call(parts.nets.reward, reward, feat)) == {"mean": (3, 1)}
    value, target = critic.mean(), jnp.array([-200.0, 0.5, 30.0])
    assert np.any(value)
    # Likelihoods have a constant in them.
    found, constant = -critic.log_prob(target), -critic.log_prob(value)
    np.testing.assert_allclose(found - constant, loss(value, target), rtol=1e-4)


def test_vectors_are_seen_and_predicted_as_they_are_without_symlog():
    space, x = Box(-1000.0, 1000.0, (3,)), jnp.array([[-300.0, 0.5, 20.0]])
    spec = EnvSpec({"vector": space}, Discrete(2))
    see = lambda squashed: v3.assemble(spec, dataclasses.replace(TINY_V3, symlog_vectors=squashed)).nets.encoder
    params = see(True).init(jax.random.key(0), {"vector": x})
    np.testing.assert_array_equal(
        see(False).apply(params, {"vector": symlog(x)}), see(True).apply(params, {"vector": x})
    )
    raw = dataclasses.replace(TINY_V3, symlog_vectors=False)
    np.testing.assert_allclose(v3.reconstruction_loss(x - 2, x, space, raw), [12.0], rtol=1e-4)
    np.testing.assert_allclose(v3.reconstruction_loss(symlog(x) - 2, x, space, TINY_V3), [12.0], rtol=1e-4)
    assert np.array_equal(codec.mean(x, space, False), x) and not np.array_equal(codec.mean(x, space, True), x)


@pytest.mark.slow
def test_training_on_a_replayed_window_reproduces_the_states_of_acting(monkeypatch):
    """Replay context: the stored latent before the window is the carry, so a window does not start from nothing."""
    monkeypatch.setattr(
        distributions,
        "straight_through_sample",
        lambda key, logits: jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1]),
    )
    agent, config, _, state = tiny(learning_rate=1e-12)
    step = random_step(PIXELS, (20, 4))
    carry, records = agent.act_carry(state.params, 4), []
    act = jax.jit(lambda key, carry, step: agent.act(state.params, key, carry, step, explore=True))
    for t in range(20):
        carry, action, latent = act(jax.random.key(t), carry, jax.tree.map(lambda x, t=t: x[t], step))
        records.append((action, latent))
    action, latent = jax.tree.map(lambda *xs: jnp.stack(xs), *records)
    window = slice(9, 9 + config.length + 1)
    cut = lambda tree: jax.tree.map(lambda x: x[window], tree)
    batch = v3.Trajectory(cut(step), action[window], jnp.ones((config.length + 1, 4), bool), cut(latent))
    # The environment's own flag says nothing at the window's start; a forced one must not be needed.
    _, _, written = update_of(agent)(state, jax.random.key(0), batch)
    assert np.allclose(written["deter"], latent["deter"][window], atol=1e-5)
    assert np.array_equal(written["stoch"], latent["stoch"][window])
    blank = jax.tree.map(jnp.zeros_like, batch.latent)
    _, _, without = update_of(agent)(state, jax.random.key(0), batch._replace(latent=blank))
    assert not np.allclose(without["deter"][1], latent["deter"][window][1], atol=1e-3)


def test_the_optimizer_clips_each_tensor_by_its_own_size_and_averages_after_normalizing():
    """By hand, for one tensor: adaptive clipping, then the second moment, then the first, then the rate."""
    config = v3.DreamerV3Config(learning_rate=0.1, warmup=2, grad_clip=0.3)
    transform = v3.optimizer(config)
    params = {"kernel": jnp.array([3.0, 4.0])}
    state, second, first = transform.init(params), np.zeros(2), np.zeros(2)
    w = np.array([3.0, 4.0])
    for t, gradient in enumerate([[30.0, 40.0], [0.3, -0.4], [-6.0, 8.0]], 1):
        updates, state = transform.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        g = np.array(gradient)
        g *= min(1.0, 0.3 * np.linalg.norm(w) / np.linalg.norm(g))
        second = config.beta2 * second + (1 - config.beta2) * g**2
        normalized = g / np.sqrt(second / (1 - config.beta2**t))
        first = config.beta1 * first + (1 - config.beta1) * normalized
        w = w - 0.1 * min(1.0, (t - 1) / 2) * first / (1 - config.beta1**t)
        np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)
    assert abs(w[0] - 3) > 0.01


@pytest.mark.parametrize("eval_action", ["sample", "mode"])
def test_evaluation_samples_unless_it_is_told_to_take_the_mode(eval_action):
    changes = {} if eval_action == "sample" else {"eval_action": "mode"}
    agent, _, _, state = tiny(**changes)
    keys = jax.random.split(jax.random.key(2), 64)
    policy = jax.jit(functools.partial(agent.policy, explore=False))
    states = agent.model.init_state(state.params, 64)  # all alike
    _, action = policy(state.params, keys, agent.policy_carry(state.params, 64), states)
    assert (len(np.unique(np.asarray(action).argmax(-1))) == 1) == (eval_action == "mode")


@pytest.mark.slow
def test_the_policy_begins_near_its_flat_distribution_and_no_latent_has_more_classes_than_a_byte():
    config = v3.DreamerV3Config(size="1m")
    params = jax.jit(v3.dreamer_v3(ATARI, config).init)(jax.random.key(0)).params
    kernels = [x for x in jax.tree.leaves(params["actor"]) if x.shape == (config.dimensions.units, 6)]
    (last,) = kernels
    np.testing.assert_allclose(last.std(), 0.01 / config.dimensions.units**0.5, rtol=0.15)
    with pytest.raises(UsageError, match="classes must be at most 256"):
        v3.DreamerV3Config(classes=257).validate()


@pytest.mark.slow
def test_bfloat16_computation_keeps_the_losses_within_a_percent():
    agent, config, _, state = tiny(MIXED)
    half, _, _, _ = tiny(MIXED, compute_dtype="bfloat16")
    batch = random_trajectory(agent, MIXED, state, config.length + 1, 4)
    _, full, _ = update_of(agent)(state, jax.random.key(0), batch)
    _, low, latent = update_of(half)(state, jax.random.key(0), batch)
    assert all(value.dtype == jnp.float32 for value in low.values())
    assert latent["deter"].dtype == jnp.float32
    for name in ("loss/dyn", "loss/rep", "loss/reward", "loss/cont", "loss/decode/image"):
        assert np.isclose(full[name], low[name], rtol=0.02), name


@pytest.mark.slow
def test_remat_changes_memory_not_numbers():
    agent, config, _, state = tiny()
    again, _, _, _ = tiny(remat=True)
    batch = random_trajectory(agent, PIXELS, state, config.length + 1, 4)
    a, _, _ = update_of(agent)(state, jax.random.key(0), batch)
    b, _, _ = update_of(again)(state, jax.random.key(0), batch)
    for x, y in zip(jax.tree.leaves(a.variables), jax.tree.leaves(b.variables), strict=True):
        assert np.allclose(x, y, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_updates_per_collected_step_follow_the_train_ratio():
    for num_envs, ratio, batch, length in [(16, 32, 16, 64), (1, 256, 16, 64), (16, 1024, 16, 64), (8, 64, 16, 16)]:
        config = dataclasses.replace(
            v3.DreamerV3Config(), num_envs=num_envs, train_ratio=ratio, batch_size=batch, length=length
        )
        stage = v3.dreamer_v3(PIXELS, dataclasses.replace(config, size="small")).recipe.stages[-1]
        trained = stage.updates[0].repeats * batch * length
        assert Fraction(trained, stage.collect * num_envs) == ratio


def test_convolution_stages_follow_the_image_size():
    assert [codec.image_stages(side) for side in (16, 32, 64, 96, 128)] == [2, 3, 4, 4, 5]
    assert [codec.image_stages(side) for side in (7, 9, 50)] == [None, None, None]


@pytest.mark.parametrize(("stem", "side"), [("pool", 24), ("pool", 40), ("patch", 16), ("patch", 40), ("flat", 24)])
@pytest.mark.slow
def test_every_stem_decodes_what_it_encodes_at_any_size(stem, side):
    spec = EnvSpec({"image": Box(0, 255, (side, side, 1), "uint8")}, Discrete(2))
    agent, _, _, state = tiny(spec, stem=stem)

    @jax.jit
    def decode(params, obs):
        start = agent.model.init_state(params, 2)
        embed = agent.model.encode(params, obs)
        new = agent.model.observe(params, jax.random.key(0), start, jnp.zeros((2, 2)), embed, jnp.ones(2, bool))
        return agent.model.decode(params, new)["image"]

    image = decode(state.params, {"image": jnp.zeros((2, side, side, 1), jnp.uint8)})
    assert image.shape == (2, side, side, 1) and image.dtype == jnp.float32
    assert 0 <= image.min() and 1 < image.max() <= 255


REFUSED = [
    (dict(horizon=0), "horizon"),
    (dict(length=-1), "length"),
    (dict(bins=20), "bins"),
    (dict(batch_size=10_000), "batch_size"),
    (dict(replay_capacity=4), "replay_capacity"),
    (dict(train_ratio=0.0), "train_ratio"),
    (dict(train_ratio=float("nan")), "train_ratio"),
    (dict(unimix=1.5), "unimix"),
    (dict(learning_rate=float("inf")), "learning_rate"),
    (dict(deter=30), "deter"),
    (dict(imagine_last=100), "imagine_last"),
    (dict(return_norm_low=96.0), "return_norm_low"),
    (dict(encoder_units=(0,)), "encoder_units"),
]


@pytest.mark.parametrize(("change", "field"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(change, field):
    with pytest.raises(UsageError, match=field) as error:
        v3.dreamer_v3(PIXELS, dataclasses.replace(TINY_V3, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (PIXELS._replace(action=Box(-1, 1, (2, 3))), "valid: Discrete"),
        (PIXELS._replace(action=Box(-1, 1, (2, 2))), "action space"),
        (PIXELS._replace(obs={"image": Box(0, 255, (50, 50, 3), "uint8")}), "50x50"),
        (PIXELS._replace(obs={"image": Box(0, 1, (64, 64, 3), "float32")}), "image"),
        (PIXELS._replace(obs={"vector": Box(0, 1, (4,), "float64")}), "vector"),
        (PIXELS._replace(obs={}), "no observations"),
    ],
)
def test_a_space_it_cannot_take_is_refused_with_those_it_can(spec, word):
    with pytest.raises(UsageError, match=word) as error:
        v3.dreamer_v3(spec, TINY_V3)
    assert "valid" in str(error.value)
