"""What DreamerV1 promises beyond equal numbers: each trap of reimplementations by name, and its options."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import MIXED, PIXELS, TINY_V1, random_action, random_step, random_trajectory
from tests.agents.dreamer_traps import VECTOR, Maker, check_reset, directional, echo_loss, held, observed
from wmjax import presets
from wmjax.agents import dreamer_v1 as v1
from wmjax.ops import distributions
from wmjax.types import Box, Discrete, EnvSpec, UsageError

tiny = Maker(v1, v1.dreamer_v1, TINY_V1)
SMALL_BATCH = dict(batch_size=2, length=4, imagine_last=2)


def gradient_flow(spec=VECTOR):
    """Which modules each loss term trains."""
    _, config, parts, state = tiny(spec)
    step, action = random_step(spec, (6, 4)), random_action(spec, (6, 4))
    free = parts._replace(config=dataclasses.replace(config, free_nats=0.0))

    def terms(params):
        losses = v1.loss(free, params, jax.random.split(jax.random.key(0), 4), action, step)[1][0]
        return {name: jnp.mean(term) for name, term in losses.items()}

    values, pullback = jax.vjp(jax.jit(terms), state.params)
    flow = {}
    for name in values:
        (grads,) = pullback({other: jnp.float32(other == name) for other in values})
        flow[name] = {module for module, g in grads.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(g))}
    return flow


@pytest.mark.slow
def test_the_actor_is_trained_through_the_world_model_and_does_not_train_it():
    assert gradient_flow() == {
        "actor": {"actor"},
        "critic": {"critic"},
        "kl": {"rssm", "encoder"},
        "reward": {"reward", "rssm", "encoder"},
        "cont": {"cont", "rssm", "encoder"},
        "decode/vector": {"decoder", "rssm", "encoder"},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.slow
def test_a_reset_inside_the_window_forgets_state_and_action_before_it():
    check_reset(tiny(), PIXELS)


@pytest.mark.slow
def test_a_model_learns_that_observations_are_actions_only_if_time_is_aligned():
    changes = dict(free_nats=0.0, vector_scale=10.0, length=8, batch_size=16, model_lr=3e-3, imagine_last=1)
    aligned, late = echo_loss(tiny, 0, **changes), echo_loss(tiny, -1, **changes)
    assert aligned < 1.2
    assert late > 2 * aligned and late > 2.0  # two bits must come from each observation itself


@pytest.mark.slow
def test_a_window_in_mid_episode_takes_its_first_action_from_the_record_in_front():
    agent, config, _, state = tiny()
    batch = random_trajectory(agent, PIXELS, state, config.length + 1, 4)
    batch = batch._replace(step=batch.step._replace(is_first=jnp.zeros_like(batch.step.is_first)))
    turned = lambda t: batch._replace(action=batch.action.at[t].set(jnp.roll(batch.action[t], 1, -1)))
    learn = lambda batch: tiny().update(state, jax.random.key(0), batch)[1]["loss/model"]
    plain = learn(batch)
    assert learn(turned(0)) != plain
    assert learn(turned(-1)) == plain
    # Nothing else of that record counts, and no action where an episode begins.
    other = jax.tree.map(lambda x: x.at[0].set(jnp.zeros_like(x[0])), batch.step)
    assert learn(batch._replace(step=other)) == plain
    first = batch.step._replace(is_first=batch.step.is_first.at[1].set(True))
    assert learn(batch._replace(step=first)) == learn(turned(0)._replace(step=first))


@pytest.mark.slow
def test_the_continue_target_is_no_end_at_a_time_limit():
    agent, _, parts, state = tiny()
    step = random_step(PIXELS, (6, 2))
    states = observed(agent, state.params, step, random_action(PIXELS, (6, 2)))
    clear = jnp.zeros((6, 2), bool)
    ended = clear.at[4].set(True)

    def cont_loss(last, terminal):
        given = step._replace(is_last=last, is_terminal=terminal)
        return v1.world_model_losses(parts, state.params, states, given)[0]["cont"]

    assert np.array_equal(cont_loss(ended, clear), cont_loss(clear, clear))
    assert not np.allclose(cont_loss(ended, ended)[4], cont_loss(clear, clear)[4])


# ---------------------------------------------------------------------------------------------------------------------
# Imagination, actor and critic

H = 5


def imagined(reward=None, discount=None, value=None, rows=1):
    """A trajectory of H states, the same in every row."""
    column = lambda x, default: jnp.broadcast_to(
        jnp.full((H, 1), default) if x is None else jnp.asarray(x, jnp.float32)[:, None], (H, rows)
    )
    return v1.Imagined(
        jnp.zeros((H, rows, 2)), jnp.zeros((H, rows, 3)), column(reward, 0.0), column(discount, 0.9), column(value, 0.0)
    )


def behave(trajectory, counts=None, **changes):
    rows = trajectory.reward.shape[1]
    critic = distributions.UnitNormal(jnp.zeros((H - 1, rows)))
    config = dataclasses.replace(v1.DreamerV1Config(), **changes)
    entropy = jnp.full((H - 1, rows), 2.0)
    return v1.behavior_losses(critic, entropy, trajectory, jnp.ones(rows) if counts is None else counts, config)[0]


def test_a_target_takes_reward_and_discount_of_its_own_state_and_the_next_value():
    reward, discount, value = [1.0, 2, 3, 4, 5], [0.5, 0.9, 0.8, 0.7, 0.6], [10.0, 20, 30, 40, 50]
    target = v1.targets(imagined(reward, discount, value), v1.DreamerV1Config())
    following, expected = 50.0, []
    for k in (3, 2, 1, 0):
        following = reward[k] + discount[k] * (0.05 * value[k + 1] + 0.95 * following)
        expected.append(following)
    np.testing.assert_allclose(target[:, 0], expected[::-1], rtol=1e-6)


@pytest.mark.slow
def test_imagination_leaves_out_the_start_and_the_last_state_has_no_target():
    agent, config, parts, state = tiny()
    start = agent.model.init_state(state.params, 2)
    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(lambda params: v1.imagine_behavior(parts, params, keys, start))(state.params)
    assert found.feat.shape[:2] == found.reward.shape == found.action.shape[:2] == (config.horizon, 2)
    assert v1.targets(found, config).shape == (config.horizon - 1, 2)
    zero_start = np.concatenate([np.zeros((2, config.stoch + config.deter))])
    assert not np.allclose(found.feat[0], zero_start)


def test_weights_leave_out_the_discount_of_the_state_itself_so_they_start_at_one():
    # Every target is 10 here, so that only the weights differ.
    same = imagined(reward=np.full(H, 1.0), discount=np.full(H, 0.9), value=np.full(H, 10.0))
    assert behave(same)["actor"] == pytest.approx(-10 * np.mean(0.9 ** np.arange(H - 1)), rel=1e-5)


def test_starts_at_terminal_steps_do_not_count_with_a_continue_head():
    step = random_step(PIXELS, (6, 4))
    assert step.is_terminal.sum() == 1
    config = dataclasses.replace(TINY_V1, use_continue=True)
    np.testing.assert_array_equal(v1.start_counts(step, config), 1.0 - step.is_terminal)
    assert np.all(v1.start_counts(step, dataclasses.replace(config, use_continue=False)) == 1)
    two = imagined(reward=np.arange(H), rows=2)
    spoiled = two._replace(reward=two.reward.at[:, 1].set(1e6))
    assert behave(spoiled, jnp.array([1.0, 0.0])) == behave(two, jnp.array([1.0, 0.0]))
    assert behave(spoiled, jnp.array([1.0, 0.0]))["actor"] == pytest.approx(behave(imagined(np.arange(H)))["actor"])


def test_an_entropy_bonus_is_off_in_the_paper_and_adds_the_policys_entropy_if_asked_for():
    plain, bonus = behave(imagined()), behave(imagined(), entropy_scale=0.5)
    assert plain["actor"] == 0 and v1.DreamerV1Config().entropy_scale == 0
    assert bonus["actor"] == pytest.approx(-0.5 * 2.0 * np.mean(0.9 ** np.arange(H - 1)))


def test_a_plain_discounted_sum_is_reached_without_bootstrap():
    config = dataclasses.replace(v1.DreamerV1Config(), bootstrap=False, lambda_=1.0)
    target = v1.targets(imagined([1.0, 2, 3, 4, 5], np.full(H, 0.5), np.full(H, 100.0)), config)
    np.testing.assert_allclose(target[0], [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * (4 + 0.5 * 5)))])


def imagination(actor_params, deter):
    agent, _, parts, state = tiny(VECTOR)
    start = agent.model.init_state(state.params, 2)._replace(deter=deter)
    params, keys = state.params | {"actor": actor_params}, jax.random.split(jax.random.key(0), 2)
    return v1.imagine_behavior(parts, params, keys, start)


@pytest.mark.slow
def test_no_gradient_passes_through_the_inputs_of_the_policy_but_through_the_dynamics():
    _, config, _, state = tiny(VECTOR)
    deter = jnp.full((2, config.deter), 0.1)
    run = jax.jit(lambda deter: imagination(state.params["actor"], deter))
    gradient = lambda read: np.asarray(jax.grad(lambda deter: read(run(deter)).sum())(deter))
    assert not np.any(gradient(lambda trajectory: trajectory.action[0]))
    assert np.all(np.abs(gradient(lambda trajectory: trajectory.feat[0])).max(-1) > 0)
    # The action does depend on the state: only its gradient is cut.
    assert not np.allclose(run(deter + 0.5).action[0], run(deter).action[0])


@pytest.mark.slow
def test_the_gradient_through_the_whole_imagination_agrees_with_finite_differences(monkeypatch):
    _, config, _, state = tiny(VECTOR)
    monkeypatch.setattr(v1, "sg", lambda x: x)  # the cut of the policy's inputs is no part of the true derivative
    deter = jnp.full((2, config.deter), 0.1)
    score = lambda actor: v1.targets(imagination(actor, deter), config).sum()
    automatic, finite = directional(score, state.params["actor"])
    assert abs(automatic) > 1e-3
    assert automatic == pytest.approx(finite, rel=0.02, abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


@functools.cache
def small_update():
    made = tiny(VECTOR, **SMALL_BATCH)
    batch = random_trajectory(made.agent, VECTOR, made.state, 5, 2)
    return made, batch, made.update


@pytest.mark.slow
def test_all_gradients_are_those_of_the_weights_before_the_update():
    made, batch, learn = small_update()
    moving, metrics, _ = learn(made.state, jax.random.key(0), batch)
    still, still_metrics, _ = learn(held(made.state, "model"), jax.random.key(0), batch)
    # The world model moves in one of the two only; actor and critic do not notice.
    kernel = lambda state: state.params["rssm"]["prior_out"]["kernel"]
    assert np.abs(kernel(still) - kernel(made.state)).max() < 1e-5 < 1e-4
    assert np.abs(kernel(moving) - kernel(made.state)).max() > 1e-4
    assert still_metrics["imagined_reward"] == metrics["imagined_reward"]
    for name in ("actor", "critic"):
        for a, b in zip(*map(jax.tree.leaves, (still.params[name], moving.params[name])), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_bfloat16_computation_keeps_the_losses_within_two_percent():
    step, action = random_step(MIXED, (6, 4)), random_action(MIXED, (6, 4))

    def losses(**changes):
        _, _, parts, _ = tiny(MIXED, **changes)
        params = tiny(MIXED).state.params
        loss = lambda params: v1.loss(parts, params, jax.random.split(jax.random.key(0), 4), action, step)
        return jax.jit(loss)(params)[1][3]

    full, low = losses(), losses(compute_dtype="bfloat16")
    assert all(value.dtype == jnp.float32 for value in low.values())
    for name in ("loss/kl", "loss/reward", "loss/cont", "loss/decode/image", "loss/decode/vector"):
        assert np.isclose(full[name], low[name], rtol=0.02), name


# ---------------------------------------------------------------------------------------------------------------------
# Acting


def policy_of(made, explore, rows=400, **params):
    """Actions in one state, with a key for each row."""
    params = made.state.variables | params
    state = made.agent.model.init_state(params, rows)
    keys = jax.random.split(jax.random.key(0), rows)
    return np.asarray(made.agent.policy(params, keys, (), state, explore=explore)[1])


@pytest.mark.slow
def test_evaluation_takes_the_mode_without_noise():
    made = tiny()
    assert len(np.unique(policy_of(made, False), axis=0)) == 1
    assert len(np.unique(policy_of(tiny(eval_action="sample"), False), axis=0)) == 3
    # The mode of a tanh-normal is the best of a hundred draws: it still varies, and is likelier than a sample.
    made, sampling = tiny(VECTOR), tiny(VECTOR, eval_action="sample")
    feat = v1.feature(made.agent.model.init_state(made.state.params, 1))
    dist = v1.policy_dist(made.parts, made.state.params["actor"], feat)
    likeliness = lambda made: np.percentile(dist.log_prob(policy_of(made, False)), 10)
    assert likeliness(made) > likeliness(sampling) + 1


@pytest.mark.slow
def test_collection_adds_clipped_noise_or_random_choices():
    certain = {"logits": {"kernel": jnp.zeros((16, 3)), "bias": jnp.array([0.0, 99.0, 0.0])}}
    made = tiny()
    actor = dict(made.state.params["actor"]) | certain
    actions = policy_of(made, True, 3000, actor=actor, exploration=jnp.float32(0.3))
    np.testing.assert_allclose(actions.mean(0), [0.1, 0.8, 0.1], atol=0.03)
    still = policy_of(made, True, actor=actor, exploration=jnp.float32(0.0))
    np.testing.assert_array_equal(still, np.tile([0, 1, 0], (400, 1)))
    noisy = policy_of(tiny(VECTOR), True, exploration=jnp.float32(0.3))
    assert np.abs(noisy).max() == 1.0


@pytest.mark.slow
def test_exploration_halves_with_the_steps_that_were_taken_and_stops_at_its_minimum():
    changes = dict(exploration=0.4, exploration_min=0.1, exploration_half_life=100)
    config = dataclasses.replace(TINY_V1, **changes, prefill=20, pretrain=10, train_every=8, train_steps=2)
    amount = lambda updates: float(v1.exploration_amount(config, jnp.int32(updates)))
    assert amount(0) == amount(10) == pytest.approx(0.4 * 0.5**0.2)  # after the prefill of 20 steps
    assert amount(10 + 20) == pytest.approx(0.2)  # 20 + 10 bursts of 8 steps
    assert amount(10_000) == pytest.approx(0.1)
    assert float(v1.exploration_amount(TINY_V1, jnp.int32(10**6))) == pytest.approx(0.3)
    batch = small_update()[1]
    decaying = tiny(VECTOR, **SMALL_BATCH, **OPTIONS[0])
    new = decaying.update(decaying.state, jax.random.key(0), batch)[0]
    assert float(new.non_trainable["exploration"]) == pytest.approx(0.4 * 0.5 ** ((16 + 4) / 100))


def test_the_papers_exploration_falls_evenly_to_its_minimum():
    paper = presets.resolve("dreamer_v1", "paper_discrete")[0]  # 0.4 to 0.1 in 200 thousand updates
    amounts = [float(v1.exploration_amount(paper, jnp.int32(n))) for n in (0, 50_000, 100_000, 200_000, 10**6)]
    assert amounts == pytest.approx([0.4, 0.325, 0.25, 0.1, 0.1])
    with pytest.raises(UsageError, match="exploration_half_life and exploration_updates are two schedules"):
        dataclasses.replace(TINY_V1, exploration_half_life=5, exploration_updates=5).validate()


@pytest.mark.slow
def test_the_weight_of_the_entropy_halves_with_the_steps_that_were_taken():
    config = dataclasses.replace(TINY_V1, prefill=20, pretrain=10, train_every=8, train_steps=2)
    left = lambda updates: float(v1.part_left(config, jnp.int32(updates), 100))
    assert left(0) == left(10) == pytest.approx(0.5**0.2)
    assert left(10 + 20) == pytest.approx(0.5)
    assert v1.part_left(config, jnp.int32(10**6), None) == 1

    def updated(**changes):
        made = tiny(VECTOR, **SMALL_BATCH, **changes)
        return jax.device_get(made.update(made.state, jax.random.key(0), small_update()[1])[1])

    none, kept = updated(entropy_scale=0.0), updated(entropy_scale=0.5)
    halved = updated(entropy_scale=1.0, entropy_half_life=TINY_V1.prefill)
    gone = updated(entropy_scale=0.5, entropy_half_life=1)
    for name in ("loss/actor", "grad_norm/actor"):
        assert halved[name] == pytest.approx(kept[name], rel=1e-5)
        assert gone[name] == pytest.approx(none[name], rel=1e-2) and kept[name] != pytest.approx(none[name], rel=0.05)
    assert gone["policy_entropy"] == kept["policy_entropy"]  # which is told as it is


@pytest.mark.slow
def test_steps_of_the_actor_halve_with_the_steps_that_were_taken_and_no_others():
    assert TINY_V1.pretrain == 0
    key, batch = jax.random.key(0), small_update()[1]
    plain = tiny(VECTOR, **SMALL_BATCH)
    halved = tiny(VECTOR, **SMALL_BATCH, actor_lr_half_life=TINY_V1.prefill)
    first, half = (made.update(plain.state, key, batch)[0].params for made in (plain, halved))
    moved = lambda new: jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), new, plain.state.params)
    for name, step in moved(half).items():
        whole = moved(first)[name]
        for x, y in zip(jax.tree.leaves(step), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(x, 0.5 * y if name == "actor" else y, atol=1e-7)
    # As the moments of its optimizer are counted, a run that goes on is the same run.
    state = halved.update(plain.state, key, batch)[0]
    assert jax.tree.structure(state) == jax.tree.structure(plain.state)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_a_burst_of_a_hundred_updates_follows_five_hundred_decisions_which_are_a_thousand_frames():
    config, run = presets.resolve("dreamer_v1", "paper")
    assert run.action_repeat == 2
    recipe = v1.dreamer_v1(PIXELS, dataclasses.replace(config, within_episode=False)).recipe
    prefill, pretrain, train = recipe.stages
    assert prefill.iterations * recipe.num_envs * run.action_repeat == 5000 and prefill.act is None
    assert pretrain.updates[0].repeats == 100 and pretrain.collect == 0
    assert (train.collect * recipe.num_envs * run.action_repeat, train.updates[0].repeats) == (1000, 100)


def test_published_modules_have_the_published_parameter_counts():
    spec = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Box(-1.0, 1.0, (3,)))
    config = v1.DreamerV1Config()
    nets = v1.assemble(spec, config).nets
    params = jax.eval_shape(v1.dreamer_v1(spec, config).init, jax.random.key(0)).params
    counts = {name: sum(x.size for x in jax.tree.leaves(value)) for name, value in params.items()}
    expected = dict(encoder=690_144, rssm=557_320, decoder=3_795_555, reward=253_201, actor=576_006)
    assert {name: counts[name] for name in expected} == expected
    assert nets.rssm.embed == 1024


OPTIONS = [
    dict(
        cell="layer_norm_gru", entropy_scale=0.1, entropy_half_life=50, actor_lr_half_life=70,
        exploration=0.4, exploration_min=0.1, exploration_half_life=100,
    ),
    dict(
        input_layer=False, activation="relu", grad_accum=2, use_continue=False, bootstrap=False, lambda_=1.0,
        reward_transform="tanh", remat=True,
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(changes))
def test_an_update_runs_with_every_option_and_moves_every_module(changes):
    made, (_, batch, _) = tiny(VECTOR, **SMALL_BATCH, **changes), small_update()
    state, metrics, _ = made.update(made.state, jax.random.key(0), batch)
    assert all(np.isfinite(value) for value in metrics.values())
    for name in state.params:
        pairs = zip(*map(jax.tree.leaves, (made.state.params[name], state.params[name])), strict=True)
        assert any(not np.array_equal(old, found) for old, found in pairs), name


REFUSED = [
    (dict(horizon=1), "horizon"),
    (dict(bootstrap=False), "lambda_"),
    (dict(exploration_min=0.5), "exploration_min"),
    (dict(exploration_half_life=0), "exploration_half_life"),
    (dict(imagine_last=100), "imagine_last"),
    (dict(train_every=3), "train_every"),
    (dict(prefill=0), "prefill"),
    (dict(replay_capacity=4), "replay_capacity"),
    (dict(min_std=0.0), "min_std"),
    (dict(discount=1.5), "discount"),
]


@pytest.mark.parametrize(("change", "field"), REFUSED)
def test_options_out_of_range_or_against_each_other_are_refused_by_name(change, field):
    with pytest.raises(UsageError, match=field) as error:
        dataclasses.replace(TINY_V1, **change).validate()
    assert "\n" not in str(error.value)


def test_a_preset_that_needs_longer_episodes_than_the_environment_has_is_refused():
    config, _ = presets.resolve("dreamer_v1", "paper")
    with pytest.raises(UsageError, match=r"episodes of at least length=50 .* 10 "):
        v1.dreamer_v1(PIXELS._replace(max_episode_steps=9), config)
    v1.dreamer_v1(PIXELS._replace(max_episode_steps=500), config)
    with pytest.raises(UsageError, match=r"action space"):
        v1.dreamer_v1(PIXELS._replace(action=Box(-1.0, 1.0, (2, 2))), config)
    v1.dreamer_v1(EnvSpec({"number": Discrete(4)}, Discrete(2)), TINY_V1)
