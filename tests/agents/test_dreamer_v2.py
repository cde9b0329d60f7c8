"""What DreamerV2 promises beyond equal numbers: each trap of reimplementations by name, and its options."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import MIXED, PIXELS, TINY_V2, random_action, random_step, random_trajectory
from tests.agents.dreamer_traps import VECTOR, Maker, check_reset, directional, echo_loss, held, observed
from wmjax import optim, presets
from wmjax.agents import dreamer_v2 as v2
from wmjax.nets import dreamer
from wmjax.ops import distributions
from wmjax.types import Box, Discrete, EnvSpec, UsageError

tiny = Maker(v2, v2.dreamer_v2, TINY_V2)
SMALL_BATCH = dict(batch_size=2, length=4, imagine_last=2)


def gradient_flow(spec=VECTOR):
    """Which modules each loss term trains."""
    _, _, parts, state = tiny(spec)
    step, action = random_step(spec, (6, 4)), random_action(spec, (6, 4))
    keys = jax.random.split(jax.random.key(0), 24)

    def terms(params):
        groups = optim.apart(params)
        _, (losses, states, _) = v2.world_model_loss(
            parts, groups["model"], jax.random.split(jax.random.key(0), 4), action, step
        )
        # The actor is trained from where the model has been, not for where it starts: `update` stops these too.
        rows = jax.tree.map(lambda x: v2.sg(x).reshape(24, *x.shape[2:]), (states, step.is_terminal))
        params = groups.pop("model") | state.non_trainable
        _, (more, _) = v2.behavior_loss(parts, params, groups, keys, *rows)
        return {name: jnp.mean(term) for name, term in (losses | more).items()}

    values, pullback = jax.vjp(jax.jit(terms), state.params)
    flow = {}
    for name in values:
        (grads,) = pullback({other: jnp.float32(other == name) for other in values})
        flow[name] = {module for module, g in grads.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(g))}
    return flow


@pytest.mark.slow
def test_every_head_shapes_the_world_model_and_the_behavior_leaves_it_alone():
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
    changes = dict(kl_scale=1.0, vector_scale=10.0, length=8, batch_size=16, model_lr=3e-3, imagine_last=1)
    aligned, late = echo_loss(tiny, 0, **changes), echo_loss(tiny, -1, **changes)
    assert aligned < 0.8
    assert late > 2 * aligned and late > 1.5  # two bits must come from each observation itself


@pytest.mark.slow
def test_a_window_starts_from_nothing_without_the_action_before_it():
    agent, config, _, state = tiny()
    batch = random_trajectory(agent, PIXELS, state, config.length, 4)
    batch = batch._replace(step=batch.step._replace(is_first=jnp.zeros_like(batch.step.is_first)))
    flagged = batch._replace(step=batch.step._replace(is_first=batch.step.is_first.at[0].set(True)))
    last_action = batch._replace(action=batch.action.at[-1].set(jnp.roll(batch.action[-1], 1, -1)))
    learn = tiny().update
    plain, others = learn(state, jax.random.key(0), batch)[1], [flagged, last_action]
    for other in others:
        assert learn(state, jax.random.key(0), other)[1]["loss/model"] == plain["loss/model"]
    earlier = batch._replace(action=batch.action.at[0].set(jnp.roll(batch.action[0], 1, -1)))
    assert learn(state, jax.random.key(0), earlier)[1]["loss/model"] != plain["loss/model"]


@pytest.mark.slow
def test_the_continue_target_is_no_end_at_a_time_limit():
    agent, _, parts, state = tiny()
    step = random_step(PIXELS, (6, 2))
    states = observed(agent, state.params, step, random_action(PIXELS, (6, 2)))
    clear = jnp.zeros((6, 2), bool)
    ended = clear.at[4].set(True)

    def cont_loss(last, terminal):
        given = step._replace(is_last=last, is_terminal=terminal)
        return v2.world_model_losses(parts, state.params, states, given)[0]["cont"]

    assert np.array_equal(cont_loss(ended, clear), cont_loss(clear, clear))
    assert not np.allclose(cont_loss(ended, ended)[4], cont_loss(clear, clear)[4])


# ---------------------------------------------------------------------------------------------------------------------
# Imagination, actor and critic

H = 4


def imagined(reward=None, discount=None, value=None):
    """A trajectory of H + 1 states of one row."""
    column = lambda x, default: jnp.full((H + 1, 1), default) if x is None else jnp.asarray(x, jnp.float32)[:, None]
    action = jnp.zeros((H, 1, 3)).at[..., 0].set(1.0)
    return v2.Imagined(jnp.zeros((H + 1, 1, 2)), action, column(reward, 0.0), column(discount, 0.9), column(value, 0.0))


def behave(trajectory, mode="reinforce", config=None, logits=None):
    policy = distributions.OneHotCategorical(jnp.zeros((H - 1, 1, 3)) if logits is None else logits)
    config = config or dataclasses.replace(v2.DreamerV2Config(), entropy_scale=0.0)
    critic = distributions.UnitNormal(jnp.zeros((H, 1)))
    return v2.behavior_losses(policy, critic, trajectory, config, mode)[0]


def test_a_target_takes_reward_and_discount_of_its_own_state_and_the_next_value_also_at_the_start():
    reward, discount, value = [1.0, 2, 3, 4, 5], [0.5, 0.9, 0.8, 0.7, 0.6], [10.0, 20, 30, 40, 50]
    target = v2.targets(imagined(reward, discount, value), v2.DreamerV2Config())
    following, expected = 50.0, []
    for k in (3, 2, 1, 0):
        following = reward[k] + discount[k] * (0.05 * value[k + 1] + 0.95 * following)
        expected.append(following)
    np.testing.assert_allclose(target[:, 0], expected[::-1], rtol=1e-6)


@pytest.mark.slow
def test_the_first_imagined_discount_comes_from_the_data_and_the_others_are_predicted():
    agent, config, parts, state = tiny()
    start = agent.model.init_state(state.params, 2)
    terminal = jnp.array([False, True])
    keys = jax.random.split(jax.random.key(0), 2)
    run = lambda terminal: v2.imagine_behavior(parts, state.variables, state.params["actor"], keys, start, terminal)
    found = jax.jit(run)(terminal)
    np.testing.assert_allclose(found.discount[0], [config.discount, 0.0])
    predicted = dreamer.discount_of(parts.nets, state.params, found.feat, config.discount)
    np.testing.assert_allclose(found.discount[1:], predicted[1:], rtol=1e-5)
    assert not np.allclose(predicted[0], found.discount[0])


def test_the_actor_leaves_out_the_last_two_states_and_the_critic_the_last():
    losses = behave(imagined())
    assert losses["actor"].shape == (H - 1, 1)
    assert losses["critic"].shape == (H, 1)


def test_weights_leave_out_the_discount_of_the_state_itself_so_they_start_at_one():
    losses = behave(imagined(reward=np.full(H + 1, 1.0), discount=np.full(H + 1, 0.9), value=np.full(H + 1, 10.0)))
    # Every target is 10 here, so that only the weights differ.
    np.testing.assert_allclose(losses["critic"][:, 0] / losses["critic"][0, 0], 0.9 ** np.arange(H), rtol=1e-5)
    assert losses["critic"][0, 0] == pytest.approx(0.5 * 100 + 0.5 * np.log(2 * np.pi), rel=1e-5)


def test_reinforce_weighs_actions_by_the_next_target_less_the_value_of_the_slow_critic():
    trajectory = imagined(reward=[0.0, 0, 1, 0, 0], value=[0.5, 0.2, 0.1, 0, 0])
    target = v2.targets(trajectory, v2.DreamerV2Config())
    losses = behave(trajectory)
    expected = -(0.9 ** np.arange(H - 1)) * np.log(1 / 3) * (target[1:, 0] - trajectory.value[:-2, 0])
    np.testing.assert_allclose(losses["actor"][:, 0], expected, rtol=1e-5)


def test_both_gradients_mix_a_tenth_of_the_dynamics_with_nine_of_reinforce():
    trajectory = imagined(reward=[0.0, 1, 2, 3, 4])
    separate = {mode: behave(trajectory, mode)["actor"] for mode in ("reinforce", "dynamics", "both")}
    mixed = 0.1 * separate["dynamics"] + 0.9 * separate["reinforce"]
    np.testing.assert_allclose(separate["both"], mixed, rtol=1e-5)


def test_a_plain_discounted_sum_is_reached_without_bootstrap():
    config = dataclasses.replace(v2.DreamerV2Config(), bootstrap=False, lambda_=1.0)
    target = v2.targets(imagined([1.0, 2, 3, 4, 5], np.full(5, 0.5), np.full(5, 100.0)), config)
    np.testing.assert_allclose(target[0], [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * (4 + 0.5 * 5)))])


def continuous_imagination(actor_params, deter):
    agent, _, parts, state = tiny(VECTOR)
    start = agent.model.init_state(state.params, 2)._replace(deter=deter)
    keys, no = jax.random.split(jax.random.key(0), 2), jnp.zeros(2, bool)
    return v2.imagine_behavior(parts, state.variables, actor_params, keys, start, no)


@pytest.mark.slow
def test_no_gradient_passes_through_the_inputs_of_the_policy_but_through_the_dynamics():
    _, config, _, state = tiny(VECTOR)
    deter = jnp.full((2, config.deter), 0.1)
    run = jax.jit(lambda deter: continuous_imagination(state.params["actor"], deter))
    gradient = lambda read: np.asarray(jax.grad(lambda deter: read(run(deter)).sum())(deter))
    assert not np.any(gradient(lambda trajectory: trajectory.action[0]))
    assert np.all(np.abs(gradient(lambda trajectory: trajectory.feat[1])).max(-1) > 0)
    # The action does depend on the state: only its gradient is cut.
    assert not np.allclose(run(deter + 0.5).action[0], run(deter).action[0])


@pytest.mark.slow
def test_the_dynamics_gradient_agrees_with_finite_differences(monkeypatch):
    """With probabilities for latents imagination is smooth, and the noise of actions is the same for equal keys."""
    monkeypatch.setattr(distributions, "straight_through_sample", lambda key, logits: jax.nn.softmax(logits))
    monkeypatch.setattr(v2, "sg", lambda x: x)  # the cut of the policy's inputs is no part of the true derivative
    _, config, _, state = tiny(VECTOR)
    deter = jnp.full((2, config.deter), 0.1)
    # Along scale and location alone: the derivative of a truncated sample leaves out its bounds by design.
    monkeypatch.setattr(v2.action_distributions, "truncated_noise", lambda key, low, high: jnp.full_like(low, 0.2))
    score = lambda actor: v2.targets(continuous_imagination(actor, deter), config).sum()
    automatic, finite = directional(score, state.params["actor"])
    assert abs(automatic) > 1e-3
    assert automatic == pytest.approx(finite, rel=0.02, abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


@functools.cache
def small_update():
    made = tiny(VECTOR, **SMALL_BATCH)
    batch = random_trajectory(made.agent, VECTOR, made.state, 4, 2)
    return made, batch, made.update


@pytest.mark.slow
def test_the_slow_critic_is_copied_after_the_first_update_and_after_every_hundredth():
    made, batch, learn = small_update()
    same = lambda a, b: all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))
    for step, copied in ((0, True), (1, False), (99, False), (100, True), (101, False), (200, True)):
        state = made.state._replace(step=jnp.int32(step))
        new = learn(state, jax.random.key(0), batch)[0].variables
        assert same(new["slow_critic"], new["critic"]) == copied, step
        assert copied or same(new["slow_critic"], state.non_trainable["slow_critic"]), step


@pytest.mark.slow
def test_actor_and_critic_learn_in_the_updated_world_model():
    made, batch, learn = small_update()
    new, moving, _ = learn(made.state, jax.random.key(0), batch)
    same, still, _ = learn(held(made.state, "model"), jax.random.key(0), batch)
    kernel = lambda state: state.params["rssm"]["prior_out"]["kernel"]
    assert (
        np.abs(kernel(same) - kernel(made.state)).max() < 1e-5 < 1e-4 < np.abs(kernel(new) - kernel(made.state)).max()
    )
    assert still["loss/model"] == moving["loss/model"]
    assert still["imagined_reward"] != moving["imagined_reward"]


@pytest.mark.slow
def test_every_weight_decays_by_a_millionth_of_itself_and_no_gradient():
    config, (made, _, _) = v2.DreamerV2Config(), small_update()
    groups = optim.apart(made.state.params)
    for name, chain in optim.model_actor_critic(config).items():
        zeros = jax.tree.map(jnp.zeros_like, groups[name])
        changes, _ = chain.update(zeros, chain.init(groups[name]), groups[name])
        for old, change in zip(*map(jax.tree.leaves, (groups[name], changes)), strict=True):
            np.testing.assert_allclose(change, -1e-6 * np.asarray(old), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_computation_keeps_the_losses_within_two_percent():
    # Gaussian latents: a class that flips by rounding would be a different draw.
    step, action = random_step(MIXED, (6, 4)), random_action(MIXED, (6, 4))

    def losses(**changes):
        _, _, parts, _ = tiny(MIXED, latent="gaussian", **changes)
        world = optim.apart(tiny(MIXED, latent="gaussian").state.params)["model"]
        loss = lambda world: v2.world_model_loss(parts, world, jax.random.split(jax.random.key(0), 4), action, step)
        return jax.jit(loss)(world)[1][2]

    full, low = losses(), losses(compute_dtype="bfloat16")
    assert all(value.dtype == jnp.float32 for value in low.values())
    for name in ("loss/kl", "loss/reward", "loss/cont", "loss/decode/image", "loss/decode/vector"):
        assert np.isclose(full[name], low[name], rtol=0.02), name


# ---------------------------------------------------------------------------------------------------------------------
# Acting


@pytest.mark.slow
def test_evaluation_takes_the_mode_and_collection_samples():
    agent, _, _, state = tiny()
    model_state = agent.model.init_state(state.params, 500)
    keys = jax.random.split(jax.random.key(0), 500)
    policy = lambda agent, explore: agent.policy(state.params, keys, (), model_state, explore=explore)[1]
    assert len(np.unique(policy(agent, False), axis=0)) == 1
    assert len(np.unique(policy(agent, True), axis=0)) == 3
    assert len(np.unique(policy(tiny(eval_action="sample").agent, False), axis=0)) == 3


def test_latents_are_sampled_in_evaluation_unless_their_mode_is_asked_for():
    state = small_update()[0].state
    step = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (64, *x.shape[2:])), random_step(VECTOR, (1, 1)))
    step = step._replace(is_first=jnp.ones(64, bool))
    keys = jax.random.split(jax.random.key(0), 64)

    def stochs(**changes):
        agent = tiny(VECTOR, **SMALL_BATCH, **changes).agent
        (new, _), _, _ = agent.act(state.params, keys, agent.act_carry(state.params, 64), step, explore=False)
        return np.unique(new.stoch.reshape(64, -1), axis=0)

    assert len(stochs()) > 1
    assert len(stochs(eval_latent="mode")) == 1


def test_exploration_noise_is_off_unless_asked_for():
    keys = jax.random.split(jax.random.key(0), 300)
    biased = dict(tiny().state.params)
    biased["actor"] = biased["actor"] | {"logits": {"kernel": jnp.zeros((16, 3)), "bias": jnp.array([0, 99.0, 0])}}
    for amount, kinds in ((0.0, 1), (0.5, 3)):
        agent = tiny(exploration=amount).agent
        model_state = agent.model.init_state(biased, 300)
        assert len(np.unique(agent.policy(biased, keys, (), model_state, explore=True)[1], axis=0)) == kinds
        assert len(np.unique(agent.policy(biased, keys, (), model_state, explore=False)[1], axis=0)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_updates_per_decision_are_those_of_the_published_schedules():
    expected = {"paper": 16, "paper_atari": 4, "paper_dmc": 5, "paper_crafter": 5}
    for preset, every in expected.items():
        config, _ = presets.resolve("dreamer_v2", preset)
        recipe = v2.dreamer_v2(PIXELS, dataclasses.replace(config, within_episode=False, prioritize_ends=False)).recipe
        train = recipe.stages[-1]
        assert train.collect * recipe.num_envs / train.updates[0].repeats == every
        assert [stage.name for stage in recipe.stages] == ["prefill", "pretrain", "train"]
        assert recipe.stages[1].updates[0].repeats == config.pretrain and recipe.stages[1].collect == 0
    counts = presets.resolve("dreamer_v2", "paper")[0]
    assert (counts.prefill, counts.batch_size, counts.length, counts.replay_capacity) == (50_000, 16, 50, 2_000_000)


def test_published_modules_have_the_published_sizes():
    config, _ = presets.resolve("dreamer_v2", "paper")
    gray = EnvSpec({"image": Box(0, 255, (64, 64, 1), "uint8")}, Discrete(18))
    nets = v2.assemble(gray, config).nets
    assert nets.rssm.embed == 1536
    params = jax.eval_shape(v2.dreamer_v2(gray, config).init, jax.random.key(0)).params
    assert params["rssm"]["gru"]["dense"]["kernel"].shape == (1200, 1800)
    assert params["decoder"]["dense"]["kernel"].shape == (600 + 1024, 1536)
    assert [params["encoder"][f"conv{i}"]["kernel"].shape[-1] for i in range(4)] == [48, 96, 192, 384]
    assert [params["decoder"][f"conv{i}"]["kernel"].shape[2] for i in range(4)] == [192, 96, 48, 1]


OPTIONS = [
    dict(latent="gaussian", norm="layer", actor_grad="both"),
    dict(
        latent_estimator="gumbel_straight_through", cell="gru", input_layer=False, activation="relu",
        kl_mode="guide_code", free_mode="latent", free_nats=0.01, reward_head="symlog_mse", critic_head="symlog_mse",
    ),
    dict(use_continue=False, bootstrap=False, lambda_=1.0, reward_transform="tanh", remat=True, grad_accum=2),
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
    (dict(kl_balance=1.2), "kl_balance"),
    (dict(kl_balance=-0.1), "kl_balance"),
    (dict(actor_grad="dynamics", latent_estimator="argmax"), "actor_grad.*argmax"),
    (dict(actor_grad="both", latent_estimator="argmax"), "actor_grad.*argmax"),
    (dict(latent="gaussian", latent_estimator="gumbel_straight_through"), "latent_estimator"),
    (dict(bootstrap=False), "lambda_"),
    (dict(prioritize_ends=True), "within_episode"),
    (dict(imagine_last=100), "imagine_last"),
    (dict(train_every=3), "train_every"),
    (dict(prefill=3), "prefill"),
    (dict(prefill=0), "prefill"),
    (dict(replay_capacity=4), "replay_capacity"),
    (dict(model_lr=float("nan")), "model_lr"),
    (dict(weight_decay=-1.0), "weight_decay"),
]


@pytest.mark.parametrize(("change", "field"), REFUSED)
def test_options_out_of_range_or_against_each_other_are_refused_by_name(change, field):
    with pytest.raises(UsageError, match=field) as error:
        dataclasses.replace(TINY_V2, **change).validate()
    assert "\n" not in str(error.value)


def test_what_contradicts_the_environment_is_refused_when_the_agent_is_built():
    with pytest.raises(UsageError, match=r"dynamics.*argmax"):  # continuous actions take the dynamics gradient
        v2.dreamer_v2(VECTOR, dataclasses.replace(TINY_V2, latent_estimator="argmax"))
    with pytest.raises(UsageError, match="episodes of at least length=6"):
        v2.dreamer_v2(PIXELS._replace(max_episode_steps=4), dataclasses.replace(TINY_V2, within_episode=True))
    v2.dreamer_v2(PIXELS._replace(max_episode_steps=5), dataclasses.replace(TINY_V2, within_episode=True))
    with pytest.raises(UsageError, match=r"50x50.*valid"):
        v2.dreamer_v2(PIXELS._replace(obs={"image": Box(0, 255, (50, 50, 3), "uint8")}), TINY_V2)
