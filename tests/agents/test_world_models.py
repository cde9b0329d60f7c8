"""What World Models promises beyond equal numbers: sizes, the guide's numbers, and each trap of reimplementations."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.batches import perturb, perturbed, random_action, random_step
from wmjax import dreaming, evolution, presets
from wmjax.agents import world_models as wm
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.fields import check_fields
from wmjax.loops import device
from wmjax.nets.mdn import MDNRNN
from wmjax.nets.vae import Decoder, Encoder, decoder_base
from wmjax.types import Box, Discrete, EnvSpec, TimeStep, Trajectory, UsageError

IMAGE = Box(0, 255, (64, 64, 3), "uint8")
CAR = EnvSpec({"image": IMAGE}, Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,)), 1000)
CATCH = EnvSpec({"image": IMAGE}, Discrete(3), 9)
DOOM = EnvSpec({"image": IMAGE}, Box(-1.0, 1.0, (1,)))

TINY = wm.WorldModelsConfig(
    latent=5, depth=2, hidden=6, mixtures=3, reward_head="gaussian", done_head=True, vision_batch_size=4,
    vision_learning_rate=1e-3, vision_updates=4, memory_batch_size=4, memory_length=5, memory_updates=4, num_envs=2,
    replay_capacity=64, collect_steps=64, collection="held", kl_tolerance=0.1,
    evolve=wm.EvolveConfig(
        population=4, rollouts=2, generations=4, mean_every=2, mean_rollouts=4, horizon=6, starts=8, where="dream"
    ),
)  # fmt: skip


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def shapes(preset, spec, **overrides):
    config, _ = presets.resolve("world_models", preset, None, overrides)
    agent = wm.world_models(spec, config)
    return jax.eval_shape(agent.init, jax.random.key(0)).params


MADE: dict = {}  # agents by specification and changes: compiling takes longer than the tests


def tiny(spec=CATCH, **changes):
    """Agent, config, modules and a state with perturbed parameters."""
    name = (str(spec), *sorted(changes.items()))
    if name not in MADE:
        config = dataclasses.replace(TINY, **changes)
        agent = wm.world_models(spec, config)
        state = jax.jit(agent.init)(jax.random.key(0))
        MADE[name] = agent, config, wm.networks(spec, config), perturbed(state, 0.3)
    return MADE[name]


def trajectory(config, spec, length, batch, seed=0):
    """Random records with random latents."""
    rng = np.random.default_rng(seed)
    draw = lambda scale: jnp.asarray(scale * rng.normal(size=(length, batch, config.latent)), config.latent_dtype)
    step, action = random_step(spec, (length, batch), seed), random_action(spec, (length, batch), seed)
    return Trajectory(step, action, jnp.ones((length, batch), bool), {"mu": draw(1.0), "logvar": draw(0.3) - 3})


def memory_params(spec, config, seed=0):
    """Parameters of the memory alone: initializing vision takes longer than most tests."""
    net = wm.networks(spec, config).memory
    z, h = jnp.zeros((1, config.latent)), jnp.zeros((1, config.hidden))
    args = (h, h, z, jnp.zeros((1, net.action)), jnp.zeros(1, bool))
    return jax.jit(lambda key: net.init(key, *args, method="everything"))(jax.random.key(seed))["params"]


def updates(agent):
    return {update.name: update for stage in agent.recipe.stages for update in stage.updates}


def gradient_flow():
    """Which modules each update trains."""
    agent, config, _, state = tiny()
    flow = {}
    for name in ("vision", "memory"):
        update = updates(agent)[name]
        batch = trajectory(config, CATCH, update.sampling.context + update.sampling.length, update.batch_size)
        after = jax.jit(update.fn)(state, jax.random.key(0), batch)[0].params
        moved = lambda module, after=after: any(
            (a != b).any() for a, b in zip(*map(jax.tree.leaves, (after[module], state.params[module])), strict=True)
        )
        flow[name] = set(filter(moved, after))
    return flow


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, presets, the guide


def test_published_sizes_have_the_published_parameter_counts():
    car = shapes("paper_car", CAR)
    assert size(car["encoder"]) + size(car["decoder"]) == 4_348_547
    assert size(car["memory"]) == 422_368
    assert size(car["controller"]) == 867
    doom = shapes("paper_doom", DOOM)
    assert size(doom["encoder"]) + size(doom["decoder"]) == 4_446_915
    assert size(doom["memory"]) == 1_678_785
    assert size(doom["controller"]) == 1088
    tallec = shapes("paper_car", CAR, mixture="shared", reward_head="mse", done_head=True)
    assert size(tallec["memory"]) == 383_047


def test_controllers_see_what_their_inputs_say():
    for inputs, count in (("z", 99), ("zh", 867), ("zc", 867), ("zch", 1635)):
        assert size(shapes("paper_car", CAR, inputs=inputs)["controller"]) == count
    assert size(shapes("paper_car", CAR, inputs="z", controller_units=40)["controller"]) == 33 * 40 + 41 * 3


def test_guide_has_the_numbers_of_the_guide():
    config, run = presets.resolve("world_models", "guide", "racing")
    assert run.image_size == 96 and run.action_repeat == 1
    spec = CAR._replace(obs={"image": Box(0, 255, (96, 96, 3), "uint8")})
    params = shapes("guide", spec)
    assert size(params["encoder"]) + size(params["decoder"]) == 2_457_475
    assert [params["encoder"][f"conv{i}"]["kernel"].shape for i in range(4)] == [
        (4, 4, 3, 32), (4, 4, 32, 64), (4, 4, 64, 128), (4, 4, 128, 256),
    ]  # fmt: skip
    assert params["encoder"]["mu"]["kernel"].shape == (6 * 6 * 256, 32)
    assert [params["decoder"][f"deconv{i}"]["kernel"].shape for i in range(4)] == [
        (5, 5, 128, 256), (5, 5, 64, 128), (6, 6, 32, 64), (6, 6, 3, 32),
    ]  # fmt: skip
    assert size(params["controller"]) == 3 * 32 + 3 == 99
    assert (config.latent, config.hidden, config.mixtures, config.mixture) == (32, 256, 5, "shared")
    assert (config.beta, config.kl_tolerance, config.reduction) == (1.0, 0.0, "sum")  # -0.5 sum(...) over the batch
    assert (config.vision_learning_rate, config.memory_learning_rate) == (1e-3, 1e-3)
    assert config.memory_final_learning_rate == config.memory_learning_rate
    assert (config.reward_head, config.done_head, config.done_pos_weight) == ("gaussian", True, 1.0)
    assert (config.z_source, config.controller_z, config.inputs, config.clip) == ("mean", "mean", "z", "none")
    search = config.evolve
    assert (search.sigma_init, search.generations, search.rollouts, search.where) == (0.5, 100, 3, "env")
    assert search.population == 4 + int(3 * np.log(99)) == 17  # what pycma takes where none is given


def test_vae_of_the_guide():
    """The guide's own unit test: reconstructions of 96x96 pictures, and 32 numbers for each."""
    config, _ = presets.resolve("world_models", "guide", None)
    spec = CAR._replace(obs={"image": Box(0, 255, (96, 96, 3), "uint8")})
    nets = wm.networks(spec, config)
    x = jax.random.randint(jax.random.key(0), (4, 96, 96, 3), 0, 256).astype(jnp.uint8)

    def vae(key):
        params = wm.init_params(nets, spec, config, key)
        mu, logvar = wm.call(nets.encoder, params["encoder"], x)
        return wm.call(nets.decoder, params["decoder"], wm.sample_latent(key, mu, logvar)), mu, logvar

    recon, mu, logvar = jax.jit(vae)(jax.random.key(1))
    assert recon.shape == x.shape
    assert mu.shape == logvar.shape == (4, 32)
    assert (recon > 0).all() and (recon < 1).all()


def test_the_paper_presets_have_the_papers_numbers():
    car, _ = presets.resolve("world_models", "paper_car")
    assert car == wm.WorldModelsConfig()
    assert (car.vision_batch_size, car.vision_learning_rate, car.kl_tolerance) == (100, 1e-4, 0.5)
    assert (car.memory_batch_size, car.memory_length, car.memory_updates, car.clip, car.clip_limit) == (
        100, 999, 4000, "value", 1.0,
    )  # fmt: skip
    assert (car.evolve.population, car.evolve.rollouts, car.evolve.sigma_init, car.evolve.mean_every) == (
        64,
        16,
        0.1,
        25,
    )
    assert car.evolve.mean_rollouts == 1024 and car.controller_z == car.z_source == "sample"
    doom, _ = presets.resolve("world_models", "paper_doom")
    assert (doom.latent, doom.hidden, doom.temperature, doom.done_pos_weight) == (64, 512, 1.15, 10.0)
    assert (doom.evolve.where, doom.evolve.horizon, doom.memory_decay) == ("dream", 2100, 0.99999)


# ---------------------------------------------------------------------------------------------------------------------
# Vision


def test_the_floor_of_the_kl_is_one_of_the_sum_and_below_it_there_is_no_gradient():
    mu = jnp.array([[0.1, 0.1, 0.1], [2.0, 0.1, 0.1]])
    objective = lambda mu: jnp.sum(wm.kl_floor(mu, jnp.zeros((2, 3)), 0.5)[1])
    grads = jax.grad(objective)(mu)
    assert (grads[0] == 0).all()
    np.testing.assert_allclose(grads[1], mu[1], rtol=1e-6)  # small dimensions of a sample above it have their gradient
    assert objective(mu) == pytest.approx(1.5 + 2.01)


def test_the_second_head_is_a_log_variance_not_a_log_deviation():
    log_sigma = 0.4
    kl, _ = wm.kl_floor(jnp.zeros((1, 1)), jnp.full((1, 1), 2 * log_sigma), 0.0)
    assert kl[0] == pytest.approx(np.exp(2 * log_sigma) / 2 - log_sigma - 0.5, rel=1e-5)
    drawn = wm.sample_latent(jax.random.key(0), jnp.zeros((50_000, 1)), jnp.full((50_000, 1), 2 * log_sigma))
    assert np.std(drawn) == pytest.approx(np.exp(log_sigma), rel=0.02)


@pytest.mark.slow
def test_the_relu_after_the_decoders_linear_layer_is_a_choice():
    plain, relu = Decoder(64, depth=2), Decoder(64, depth=2, relu=True)
    z = jax.random.normal(jax.random.key(0), (2, 4))
    params = jax.jit(plain.init)(jax.random.key(1), z)
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(relu.init, jax.random.key(1), z))
    assert np.abs(jax.jit(plain.apply)(params, z) - jax.jit(relu.apply)(params, z)).max() > 1e-4


@pytest.mark.slow
def test_features_are_flattened_by_height_width_and_channel():
    encoder = Encoder(1, depth=2)
    image = jax.random.randint(jax.random.key(0), (1, 64, 64, 3), 0, 256).astype(jnp.uint8)
    params = perturb(encoder.init(jax.random.key(1), image)["params"], scale=0.2)
    read = lambda index: encoder.apply(
        {"params": params | {"mu": {"kernel": jnp.eye(64)[:, index : index + 1], "bias": jnp.zeros(1)}}}, image
    )[0][0, 0]
    x = image / 255
    for i in range(4):
        kernel, bias = params[f"conv{i}"]["kernel"], params[f"conv{i}"]["bias"]
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=dims) + bias)
    assert x.shape == (1, 2, 2, 16)
    for h, w, c in ((0, 0, 3), (0, 1, 2), (1, 0, 15)):
        np.testing.assert_allclose(read((h * 2 + w) * 16 + c), x[0, h, w, c], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transposed_convolutions_lay_their_kernels_down_unflipped():
    decoder = Decoder(64, depth=1)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    zero = jax.tree.map(jnp.zeros_like, params)
    # One feature of the first map, one tap of each kernel: a pixel whose place can be worked out by hand.
    place = lambda kernel, tap: jnp.zeros_like(kernel).at[(*tap, 0, 0)].set(1.0)
    taps = ((1, 3), (0, 2), (4, 1), (2, 5))
    for i, tap in enumerate(taps):
        zero[f"deconv{i}"]["kernel"] = place(params[f"deconv{i}"]["kernel"], tap)
    zero["linear"]["bias"] = jnp.zeros(32).at[0].set(1.0)
    image = decoder.apply({"params": zero}, jnp.zeros((1, 1)))[0, ..., 0]
    row = col = 0
    for y, x in taps:
        row, col = 2 * row + y, 2 * col + x
    assert np.argwhere(np.asarray(image) > 0.6).tolist() == [[row, col]]


@pytest.mark.parametrize("side, base", [(64, 1), (80, 2), (96, 3), (112, 4)])
def test_decoders_give_the_size_back_that_they_were_made_for(side, base):
    assert decoder_base(side) == base
    image = jax.eval_shape(lambda: Decoder(side, depth=2).init_with_output(jax.random.key(0), jnp.zeros((3, 4)))[0])
    assert image.shape == (3, side, side, 3)


@pytest.mark.slow
def test_a_black_picture_is_zeros_and_a_white_one_ones():
    """The authors' resizing shifts every number by one, so that black wraps around to white."""
    _, config, nets, state = tiny()
    params = jax.tree.map(jnp.zeros_like, {name: state.params[name] for name in ("encoder", "decoder")})
    keys = jax.random.split(jax.random.key(0), 1)
    loss = jax.jit(lambda params, image: wm.vision_loss(nets, config, params, keys, image))
    for level in (0, 255):
        params["decoder"]["deconv3"]["bias"] = jnp.full(3, 99.0 if level else -99.0)
        _, metrics = loss(params, jnp.full((1, 64, 64, 3), level, jnp.uint8))
        assert metrics["recon"] < 1e-6


@pytest.mark.parametrize("kind", ["random_features", pytest.param("multiscale", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_perceptual_loss_can_take_the_place_of_the_squared_error(kind):
    _, config, nets, state = tiny()
    config = dataclasses.replace(config, perceptual=kind, recon_scale=0.0, beta=0.0)
    image = random_step(CATCH, (4,)).obs["image"]
    params = {name: state.params[name] for name in ("encoder", "decoder")}
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(jax.value_and_grad(lambda params: wm.vision_loss(nets, config, params, keys, image), has_aux=True))
    (total, metrics), grads = run(params)
    assert total == pytest.approx(config.perceptual_scale * float(metrics["perceptual"]), rel=1e-5) and total > 0
    chex.assert_tree_all_finite(grads)
    assert min(float(jnp.abs(g["conv0"]["kernel"]).max()) for g in (grads["encoder"],)) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_the_forget_gate_is_opened_by_one_at_run_time_and_gates_are_input_candidate_forget_output():
    net = MDNRNN(2, 1, hidden=3, mixtures=2)
    rng = np.random.default_rng(0)
    h, c = rng.normal(size=(2, 1, 3))
    z, a, first = rng.normal(size=(1, 2)), rng.normal(size=(1, 1)), jnp.zeros(1, bool)
    params = perturb(net.init(jax.random.key(0), h, c, z, a, first, method="everything")["params"], scale=0.5)
    new_h, new_c, *_ = net.apply({"params": params}, h, c, z, a, first, method="everything")
    gates = np.concatenate([z, a, h], -1) @ params["kernel"] + params["bias"]
    i, j, f, o = np.split(np.asarray(gates), 4, -1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j)
    np.testing.assert_allclose(new_c, expected, atol=1e-6)
    np.testing.assert_allclose(new_h, np.tanh(expected) * sigmoid(o), atol=1e-6)
    # Where weights bring their own 1, it is folded into the bias.
    folded = params | {"bias": params["bias"].at[6:9].add(1.0)}
    bare = dataclasses.replace(net, forget_bias=0.0, parent=None)
    again, *_ = bare.apply({"params": folded}, h, c, z, a, first, method="everything")
    np.testing.assert_allclose(again, new_h, atol=1e-6)


def test_layer_norm_normalizes_each_gate():
    net = MDNRNN(2, 1, hidden=4, mixtures=2, layer_norm=True)
    z, a, first, h = jnp.ones((1, 2)), jnp.ones((1, 1)), jnp.zeros(1, bool), jnp.ones((1, 4))
    params = net.init(jax.random.key(0), h, h, z, a, first, method="everything")["params"]
    scaled = params | {"kernel": 50 * params["kernel"]}
    run = lambda params: net.apply({"params": params}, h, h, z, a, first, method="everything")[0]
    np.testing.assert_allclose(run(scaled), run(params), rtol=1e-3)
    assert not np.allclose(run(params), run(params | {"kernel": -params["kernel"]}), atol=1e-2)


def test_each_latent_dimension_has_a_mixture_of_its_own():
    from tests.agents.test_world_models_parity import official_head

    latent, mixtures, hidden = 4, 3, 6
    net = MDNRNN(latent, 1, hidden, mixtures)
    h = jnp.zeros((1, hidden))
    args = (h, h, jnp.zeros((1, latent)), jnp.zeros((1, 1)), jnp.zeros(1, bool))
    params = net.init(jax.random.key(0), *args, method="everything")["params"]
    x = jnp.full((1, latent), 0.5)

    def density(column=None):
        # The authors' columns: d * 3 K + [K weights, K means, K deviations].
        bias = np.zeros(latent * 3 * mixtures)
        if column is not None:
            bias[column] = 2.0
        head = official_head(np.zeros((hidden, bias.size)), bias, latent, mixtures)
        mixture = net.apply({"params": params | {"mixture_out": head}}, h, method="predict_latent")
        return np.asarray(mixture.log_prob(x)[0]), np.asarray(jax.nn.softmax(mixture.logits, -2)[0])

    plain, weights = density()
    for d, part in ((0, 1), (2, 0), (3, 2)):
        changed, moved = density(d * 9 + 3 * part + 1)
        others = np.arange(latent) != d
        np.testing.assert_allclose(changed[others], plain[others])
        np.testing.assert_allclose(moved[:, others], weights[:, others])
        assert part == 0 or abs(changed[d] - plain[d]) > 0.05
        assert part != 0 or moved[1, d] > 0.7


def test_a_restart_in_the_middle_of_a_sequence_is_two_sequences():
    config = dataclasses.replace(TINY, restart_input=True)
    nets = wm.networks(CATCH, config)
    params = perturb(memory_params(CATCH, config), scale=0.5)
    batch = trajectory(config, CATCH, 8, 2)
    z, action = batch.latent["mu"].astype(jnp.float32), batch.action
    first = jnp.zeros((8, 2), bool).at[0].set(True).at[5].set(True)
    zeros = jnp.zeros((2, config.hidden))
    unroll = jax.jit(functools.partial(wm.unroll, nets, params))
    run = lambda sl, h, c: unroll(h, c, z[sl], action[sl], first[sl])
    whole, _ = run(slice(0, 8), zeros, zeros)
    one, (h, c) = run(slice(0, 5), zeros, zeros)
    two, _ = run(slice(5, 8), h + 9, c - 9)  # whatever was before
    np.testing.assert_allclose(whole, jnp.concatenate([one, two]), rtol=1e-5)
    unflagged, _ = unroll(zeros, zeros, z[5:], action[5:], jnp.zeros((3, 2), bool))
    assert np.abs(unflagged - two).max() > 1e-3  # the restart is an input, too


@pytest.mark.slow
def test_chunks_that_follow_each_other_hand_on_the_state():
    config = dataclasses.replace(TINY, memory_stateful=True, memory_batch_size=2, memory_learning_rate=1e-9,
                                 memory_final_learning_rate=0.0, z_source="mean")  # fmt: skip
    agent = wm.world_models(CATCH, config)
    state = jax.jit(agent.init)(jax.random.key(0))
    nets, batch = wm.networks(CATCH, config), trajectory(config, CATCH, 11, 2)
    batch = batch._replace(step=batch.step._replace(is_first=jnp.zeros((11, 2), bool)))
    learn = jax.jit(updates(agent)["memory"].fn)
    for start in (0, 5):  # windows of 5 steps and the one after them
        state, _, _ = learn(state, jax.random.key(1), jax.tree.map(lambda x, s=start: x[s : s + 6], batch))
    zeros = jnp.zeros((2, config.hidden))
    z = batch.latent["mu"].astype(jnp.float32)[:10]
    _, (h, c) = wm.unroll(nets, state.params["memory"], zeros, zeros, z, batch.action[:10], jnp.zeros((10, 2), bool))
    np.testing.assert_allclose(state.stats["memory_carry"][0], h, rtol=1e-5)
    np.testing.assert_allclose(state.stats["memory_carry"][1], c, rtol=1e-5)
    assert updates(agent)["memory"].sampling.over == "in_order"


def test_the_action_of_a_step_is_an_input_of_the_prediction_of_the_next():
    """Files of some reimplementations are shifted by one."""
    _, config, nets, state = tiny()
    batch = trajectory(config, CATCH, 6, 1)
    flags = jnp.zeros((6, 1), bool)
    step = TimeStep({}, jnp.zeros((6, 1)), flags, flags, flags)
    zeros = jnp.zeros((1, config.hidden))
    z = batch.latent["mu"].astype(jnp.float32)

    def loss(action, upto):  # of the first predictions only
        cut = jax.tree.map(lambda x: x[: upto + 1], (z, action, step))
        return wm.memory_loss(nets, config, state.params["memory"], (zeros, zeros), *cut)[0]

    for upto in (2, 5):
        grads = np.abs(jax.jit(jax.grad(loss), static_argnums=1)(batch.action, upto)).max((1, 2))
        assert (grads[:upto] > 0).all() and (grads[upto:] == 0).all()


def test_a_memory_learns_what_an_action_does_and_nothing_from_shifted_actions():
    config = dataclasses.replace(TINY, latent=1, hidden=12, mixtures=1, reward_head="none", done_head=False,
                                 memory_learning_rate=2e-2, clip="none")  # fmt: skip
    spec = CAR._replace(action=Box(-1.0, 1.0, (1,)))
    nets = wm.networks(spec, config)
    rng = np.random.default_rng(0)
    action = rng.choice([-1.0, 1.0], size=(20, 64, 1)).astype(np.float32)
    z = np.concatenate([np.zeros_like(action[:1]), action[:-1]]) + 0.1 * rng.normal(size=action.shape)
    flags = jnp.zeros((20, 64), bool)
    step, zeros = TimeStep({}, jnp.zeros((20, 64)), flags, flags, flags), jnp.zeros((64, 12))

    params = memory_params(spec, config)

    def train(action):
        optimizer = wm.memory_optimizer(config)

        def update(carry, _):
            params, opt_state = carry
            objective = lambda params: wm.memory_loss(
                nets, config, params, (zeros, zeros), jnp.float32(z), action, step
            )[0]
            loss, grads = jax.value_and_grad(objective)(params)
            changes, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, changes), opt_state), loss

        return jax.lax.scan(update, (params, optimizer.init(params)), None, 150)[1][-1]

    train = jax.jit(train)
    aligned, shifted = train(jnp.asarray(action)), train(jnp.roll(jnp.asarray(action), 1, 0))
    assert aligned < -0.3 < 1.0 < shifted  # ln(0.1) + 1.42 = -0.88; 1.42 for a deviation of 1


def test_nothing_is_learned_from_the_step_between_two_episodes():
    agent, config, _, state = tiny()
    batch = trajectory(config, CATCH, 6, 4)
    assert batch.step.is_first[3, 0]
    learn = jax.jit(updates(agent)["memory"].fn)
    loss = lambda batch: float(learn(state, jax.random.key(0), batch)[1]["loss"])
    plain = loss(batch)
    other = batch._replace(action=batch.action.at[2, 0].set(jnp.roll(batch.action[2, 0], 1)))
    assert loss(other) == plain  # the last action of an episode leads nowhere
    reward = batch.step._replace(reward=batch.step.reward.at[3, 0].add(5.0))
    assert loss(batch._replace(step=reward)) == plain
    reward = batch.step._replace(reward=batch.step.reward.at[2, 0].add(5.0))
    assert loss(batch._replace(step=reward)) != plain


def test_gradients_are_clipped_entry_by_entry_or_by_their_norm():
    grads = {"a": jnp.array([3.0, -0.2]), "b": jnp.array([-4.0])}
    for clip, expected in (("value", ([1.0, -0.2], [-1.0])), ("norm", (np.array([3.0, -0.2]) / 5.004, [-4 / 5.004]))):
        config = dataclasses.replace(TINY, clip=clip)
        # Adam's first step has the size of the rate whatever the gradient: look at its moments.
        optimizer = wm.memory_optimizer(config)
        _, state = optimizer.update(grads, optimizer.init(grads))
        moments = optax.tree.get(state, "mu")
        np.testing.assert_allclose(moments["a"] * 10, expected[0], rtol=1e-3)
        np.testing.assert_allclose(moments["b"] * 10, expected[1], rtol=1e-3)


def test_ends_weigh_as_much_as_they_are_told_to():
    logits, target = jnp.array([0.3, 0.3]), jnp.array([1.0, 0.0])
    plain, heavy = wm.done_loss(logits, target, 1.0), wm.done_loss(logits, target, 10.0)
    np.testing.assert_allclose(heavy / plain, [10.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(plain, optax.sigmoid_binary_cross_entropy(logits, target), rtol=1e-6)


def test_a_gaussian_reward_is_the_negative_log_of_a_normal_density():
    mean, std, target = 0.3, 1.7, -1.1
    loss = wm.reward_loss(jnp.array([mean, np.log(std)]), jnp.array(target), "gaussian")
    assert loss == pytest.approx(0.5 * ((target - mean) / std) ** 2 + np.log(std * np.sqrt(2 * np.pi)), rel=1e-5)
    assert wm.reward_loss(jnp.array([mean]), jnp.array(target), "mse") == pytest.approx((target - mean) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# Acting and dreaming


def test_the_controller_sees_the_memory_before_the_present_action_is_fed_to_it():
    agent, config, nets, state = tiny(CAR, controller_z="mean")
    step = random_step(CAR, (3, 2))._replace(is_first=jnp.zeros((3, 2), bool).at[0].set(True))
    carry, carries, actions = agent.act_carry(state.params, 2), [], []
    act = jax.jit(lambda key, carry, step: agent.act(state.params, key, carry, step, explore=False))
    for t in range(3):
        carry, action, _ = act(jax.random.key(t), carry, jax.tree.map(lambda x, t=t: x[t], step))
        carries.append(carry.state)
        actions.append(action)
    assert not carries[0].h.any() and not carries[0].c.any()
    zeros, first = jnp.zeros((2, config.hidden)), step.is_first
    z = jnp.stack([s.z for s in carries])
    hidden, _ = wm.unroll(nets, state.params["memory"], zeros, zeros, z, jnp.stack(actions), first)
    np.testing.assert_allclose(carries[1].h, hidden[0], atol=1e-6)
    np.testing.assert_allclose(carries[2].h, hidden[1], atol=1e-6)
    theta = state.params["controller"]
    expected = np.tanh(np.concatenate([carries[2].z, carries[2].h], -1) @ theta[3:].reshape(-1, 3) + theta[:3])
    np.testing.assert_allclose(actions[2], expected, atol=1e-5)


def test_a_controller_is_its_bias_and_then_its_matrix_row_by_row():
    layers = (4, 2)
    bias, kernel = np.array([0.1, -0.2]), np.arange(8.0).reshape(4, 2) / 10
    theta = jnp.asarray(np.concatenate([bias, kernel.ravel()]), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(wm.controller(theta, x, layers), np.tanh(x @ kernel + bias), rtol=1e-5)
    np.testing.assert_allclose(wm.controller(theta[2:], x, layers, bias=False), np.tanh(x @ kernel), rtol=1e-5)


def test_a_population_of_controllers_acts_each_on_its_own_rows():
    layers = (4, 3, 2)
    thetas = jax.random.normal(jax.random.key(0), (3, 5 * 3 + 4 * 2))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    together = wm.controller(thetas, x, layers)
    for p in range(3):
        np.testing.assert_allclose(
            together[2 * p : 2 * p + 2], wm.controller(thetas[p], x[2 * p : 2 * p + 2], layers), atol=1e-6
        )


def test_a_dream_ends_where_the_logit_of_the_end_is_above_zero_and_at_the_horizon():
    agent, _, _, state = tiny(CATCH)

    def episode(bias):
        memory = state.params["memory"]
        done = {"kernel": jnp.zeros_like(memory["done_out"]["kernel"]), "bias": jnp.array([bias])}
        params = state.params | {"memory": memory | {"done_out": done}}
        starts = agent.model.init_state(params, 3)._replace(started=jnp.ones(3, bool))
        env = dreaming.dream_env(agent.model, params, starts, CATCH, horizon=4, obs="state", actions="agent")
        dream, _ = env.reset(jax.random.key(0))
        ends = []
        for t in range(5):
            dream, step = env.step(jax.random.key(t), dream, jnp.array([0.0, 1.0, 0.0]))
            ends.append((bool(step.is_last), bool(step.is_terminal), bool(step.is_first)))
        return ends

    yes, no = True, False
    assert episode(0.01)[:2] == [(yes, yes, no), (no, no, yes)]
    assert episode(-0.01) == [(no, no, no)] * 3 + [(yes, no, no), (no, no, yes)]


def test_dreams_start_from_what_replay_holds_and_never_from_an_end():
    agent, config, _, state = tiny(controller_z="mean")
    batch = trajectory(config, CATCH, 6, 3)
    last = jnp.zeros((6, 3), bool).at[:, 1].set(True).at[2, 0].set(True)
    batch = batch._replace(step=batch.step._replace(is_last=last))
    starts = jax.jit(wm.dream_starts(agent.model, 300))(state.params, jax.random.key(0), batch)
    mu = np.asarray(batch.latent["mu"], np.float32)
    allowed = {tuple(row) for row in mu[~np.asarray(last)]}
    found = {tuple(row) for row in np.asarray(starts.z)}
    assert found == allowed and len(found) == 11
    assert starts.h.any()  # the memory has read what came before


def test_dreams_that_start_from_first_frames_start_with_an_empty_memory():
    _, config, _, state = tiny(controller_z="mean")
    first = dataclasses.replace(config.evolve, where="dream", start_from="first")
    evolve = wm.world_models(CATCH, dataclasses.replace(config, evolve=first)).recipe.stages[-1].evolve
    assert (evolve.sampling.length, evolve.sampling.context, evolve.sampling.starts) == (1, 0, "first")
    batch = trajectory(config, CATCH, 1, 8)
    starts = evolve.starts(state.params, jax.random.key(0), batch)
    assert starts.is_first.all() and not starts.h.any() and not starts.c.any()
    mu = {tuple(row) for row in np.asarray(batch.latent["mu"][0], np.float32)}
    assert {tuple(row) for row in np.asarray(starts.z)} <= mu


@pytest.mark.slow
def test_survival_pays_one_for_each_step_where_no_reward_is_predicted():
    agent, _, _, state = tiny(CATCH, reward_head="none", dream_reward="survival")
    start = agent.model.init_state(state.params, 2)
    after = agent.model.imagine(state.params, jax.random.split(jax.random.key(0)), start, jnp.zeros((2, 3)))
    assert agent.model.predict(state.params, after)[0].tolist() == [1.0, 1.0]


def test_open_loop_predictions_are_pictures():
    agent, config, _, state = tiny()
    batch = trajectory(config, CATCH, 6, 2)
    images = jax.jit(lambda key: dreaming.open_loop(agent.model, state.params, key, batch, 3))(jax.random.key(0))
    assert images["image"].shape == (6, 2, 64, 64, 3)
    assert images["image"].min() >= 0 and images["image"].max() <= 255 and images["image"].std() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Collection


def collected(kind, spec, steps=400, envs=8, first_at=()):
    agent, config, _, state = tiny(spec, collection=kind)
    act, carry = agent.recipe.stages[0].act, agent.act_carry(state.params, envs)
    image = jnp.zeros((envs, 64, 64, 3), jnp.uint8)
    flag = jnp.zeros(envs, bool)

    def step(carry, t):
        first = jnp.full(envs, False) | jnp.isin(t, jnp.array([0, *first_at]))
        record = TimeStep({"image": image}, jnp.zeros(envs), first, flag, flag)
        carry, action, latent = act(state.params, jax.random.fold_in(jax.random.key(0), t), carry, record, explore=True)
        return carry, (action, latent)

    _, (actions, latent) = jax.jit(lambda: jax.lax.scan(step, carry, jnp.arange(steps)))()
    assert latent["mu"].shape == (steps, envs, config.latent) and latent["mu"].dtype == jnp.float16
    return np.asarray(actions)


def test_held_actions_change_on_frames_that_their_number_divides():
    actions = collected("held", CAR)
    assert (np.abs(actions) <= 1).all()
    for env in range(8):
        changes = 1 + np.flatnonzero((np.diff(actions[:, env], axis=0) != 0).any(-1))
        # Between two changes some n in 1 ... 10 divides the later frame's number and none before it.
        for before, after in zip([0, *changes[:-1]], changes, strict=True):
            assert any(after == (before // n + 1) * n for n in range(1, 11))
        assert 400 / 10 < len(changes) < 400
    discrete = collected("held", CATCH)
    assert set(discrete.sum(-1).ravel()) == {1.0} and discrete.mean((0, 1)).min() > 0.2


def test_linear_policies_are_small_mostly_and_differ_between_episodes():
    actions = collected("linear", CAR, envs=64, first_at=(200,))
    assert np.median(np.abs(actions)) < 0.1 and (np.abs(actions) <= 1).all()
    first, second = np.abs(actions[:200]).mean(0), np.abs(actions[200:]).mean(0)
    assert np.median(np.abs(first - second) / (first + second)) > 0.2
    assert (actions[1:] != actions[:-1]).mean() > 0.99  # z is noise, drawn anew in every step


def test_brownian_actions_move_by_the_square_root_of_a_frames_time():
    actions = collected("brown", CAR, envs=32)
    inner = np.abs(actions[:-1]) < 0.5
    assert np.diff(actions, axis=0)[inner].std() == pytest.approx(np.sqrt(1 / 50), rel=0.05)
    assert np.abs(actions).max() == 1
    with pytest.raises(UsageError, match="brown"):
        wm.world_models(CATCH, dataclasses.replace(TINY, collection="brown"))


# ---------------------------------------------------------------------------------------------------------------------
# The recipe in the device loop


@pytest.fixture(scope="module")
def trained():
    """A run through every stage but the last one, on `catch`."""
    env = agent_actions(make_env("catch"))
    agent = wm.world_models(env.spec, dataclasses.replace(TINY, collection="random"))
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    metrics = {}
    for stage in agent.recipe.stages[:-1]:
        run, new = device.compile_stage(agent, env, stage)(run, stage.iterations)
        run = device.next_stage(run)
        metrics |= new
    return agent, env, run, metrics


@pytest.mark.slow
def test_the_recipe_collects_learns_to_see_encodes_and_learns_to_predict(trained):
    agent, _, run, metrics = trained
    assert [stage.name for stage in agent.recipe.stages] == ["collect", "vision", "encode", "memory", "controller"]
    assert int(run.steps) == 32 and int(run.agent.step) == 4 + 4
    assert {"vision/recon", "vision/kl", "encode/kl", "memory/nll", "memory/done", "memory/reward"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_encoding_writes_what_vision_sees_of_every_record_in_half_precision(trained):
    agent, _, run, _ = trained
    latent = run.replay.data.latent
    embed = jax.jit(agent.model.encode)(run.agent.params, run.replay.data.step.obs)
    for name in ("mu", "logvar"):
        assert latent[name].dtype == jnp.float16 and latent[name].shape == (32, 2, TINY.latent)
        np.testing.assert_allclose(np.float32(latent[name]), embed[name], rtol=2e-3, atol=2e-3)


def starts_of(trained, seed=0):
    from wmjax.replay import device as replays

    agent, _, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    return replays.sample(run.replay, jax.random.key(seed), evolve.sampling, evolve.batch_size)[1]


def test_a_generation_in_the_dream_is_one_program_that_leaves_nothing_to_the_host(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    generation = jax.jit(functools.partial(evolution.generation, agent, env, evolve))
    key, batch = jax.random.key(1), starts_of(trained)
    warm, _ = generation(run.agent, key, batch)
    traces = generation._cache_size()
    with jax.transfer_guard("disallow"):
        state, metrics = jax.block_until_ready(generation(warm, key, batch))
    assert generation._cache_size() == traces == 1
    assert int(state.opt_state["controller"].strategy.generation) == 2
    assert set(metrics) >= {"fitness_best", "fitness_mean", "sigma", "length"}
    chex.assert_trees_all_equal_shapes_and_dtypes(state, run.agent)
    chex.assert_trees_all_equal(
        {n: state.params[n] for n in ("encoder", "memory")}, {n: run.agent.params[n] for n in ("encoder", "memory")}
    )


def test_the_agent_acts_by_an_evaluated_mean_and_never_by_the_best_of_a_population(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    iteration = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))
    state, metrics = iteration(run.agent, jax.random.key(1), starts_of(trained))
    evolving = state.opt_state["controller"]
    np.testing.assert_array_equal(state.params["controller"], evolving.strategy.mean)
    assert not np.allclose(state.params["controller"], evolving.strategy.best)
    assert metrics["kept_return"] == metrics["mean_return"] == evolving.kept_return
    # A mean that earns less than one before is not kept.
    proud = state._replace(opt_state=state.opt_state | {"controller": evolving._replace(kept_return=jnp.float32(1e9))})
    after, metrics = iteration(proud, jax.random.key(2), starts_of(trained, 1))
    np.testing.assert_array_equal(after.params["controller"], evolving.kept)
    assert metrics["kept_return"] == 1e9 and metrics["mean_return"] < 1e9


def test_the_population_can_be_evaluated_in_the_environment_itself(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where="env", max_steps=9)
    state, metrics = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))(
        run.agent, jax.random.key(0), None
    )
    assert -1 <= metrics["fitness_mean"] <= metrics["fitness_best"] <= 1
    assert metrics["length"] == 9
    assert int(state.opt_state["controller"].strategy.generation) == 2


@pytest.mark.parametrize("where", ["env", pytest.param("dream", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_population_spread_over_devices_evolves_as_on_one(trained, where):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where=where, generations=1)
    batches = jax.tree.map(lambda *x: jnp.stack(x), starts_of(trained, 0), starts_of(trained, 1))
    part = functools.partial(evolution.iteration, agent, env, evolve, axis_name="devices")
    spread = jax.vmap(lambda batch: part(run.agent, jax.random.key(1), batch)[0], axis_name="devices")
    found = jax.jit(spread)(batches).opt_state["controller"]
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x[0], x[1])
    if where == "env":  # dreams on one device start from half as many records
        alone, _ = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))(
            run.agent, jax.random.key(1), None
        )
        expected = alone.opt_state["controller"]
        np.testing.assert_allclose(found.strategy.mean[0], expected.strategy.mean, atol=1e-5)
        np.testing.assert_allclose(found.kept_return[0], expected.kept_return, atol=1e-4)


def test_a_population_that_devices_cannot_share_evenly_is_refused(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where="env", mean_rollouts=3)
    odd = functools.partial(evolution.iteration, agent, env, evolve, axis_name="devices")
    with pytest.raises(UsageError, match="3 cannot be spread evenly over 2 devices"):
        jax.eval_shape(
            jax.vmap(lambda _: odd(run.agent, jax.random.key(1), None)[0].step, axis_name="devices"), jnp.arange(2)
        )


@pytest.mark.slow
def test_half_batches_of_vision_under_a_named_axis_equal_the_full_batch():  # those of the memory: conformance tests
    name = "vision"
    whole_agent, config, _, state = tiny()
    half_agent = wm.world_models(CATCH, config, axis_name="devices")
    batch = trajectory(config, CATCH, 1, 4)
    whole = jax.jit(updates(whole_agent)[name].fn)
    expected, expected_metrics, _ = whole(state, jax.random.key(0), batch)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]), batch)
    part = jax.vmap(updates(half_agent)[name].fn, (None, None, 1), axis_name="devices")
    found, metrics, _ = jax.jit(part)(state, jax.random.key(0), split)
    moved = 0.0
    for old, new, other in zip(*map(jax.tree.leaves, (state.params, expected.params, found.params)), strict=True):
        np.testing.assert_array_equal(other[0], other[1])
        np.testing.assert_allclose(other[0], new, atol=2e-5)
        moved = max(moved, float(np.abs(np.asarray(new) - old).max()))
    assert moved > 5e-4
    np.testing.assert_allclose(metrics["loss"][0], expected_metrics["loss"], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(evolve=dict(population=3)), "population must be at least 4, got 3"),
        (dict(inputs="zx"), "inputs: 'zx' is not valid; one of z, zh, zc, zch is"),
        (dict(inputs="h"), "inputs"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(evolve=dict(where="dream"), memory_updates=0), "'dream' needs V and M .* memory_updates is 0"),
        (dict(evolve=dict(where="dream"), vision_updates=0), "vision_updates is 0"),
        (dict(evolve=dict(where="dream"), reward_head="none"), "needs a reward, which M does not predict"),
        (dict(evolve=dict(rollouts=0)), "rollouts must be positive"),
        (dict(evolve=dict(popilation=8)), "unknown name 'popilation'; did you mean 'population'"),
        (dict(perceptual="lpips"), "lpips_weights: None is not a file"),
        (dict(memory_length=5000), "replay_capacity must hold a window of memory_length"),
        (dict(collect_steps=64), "collect_steps must reach a window"),
        (dict(memory_stateful=True), "memory_batch_size must be num_envs=16"),
        (dict(memory_decay=1.5), "memory_decay must be in"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(overrides, words):
    with pytest.raises(UsageError, match=words) as caught:
        presets.resolve("world_models", "small", "racing", overrides)
    assert "\n" not in str(caught.value)


def test_a_task_that_does_not_pay_for_survival_is_not_dreamt_as_one_that_does():
    config, _ = presets.resolve("world_models", "paper_doom")
    with pytest.raises(UsageError, match=r"'survival' pays 1 for each step .* not what this task pays; 'predicted'"):
        wm.world_models(make_env("racing", image_size=64).spec, config)
    assert wm.world_models(DOOM, config).recipe  # nobody has said what it pays
    predicted = dataclasses.replace(config, reward_head="mse", dream_reward="predicted")
    assert wm.world_models(make_env("racing", image_size=64).spec, predicted).recipe


@pytest.mark.parametrize(
    "spec, words",
    [
        (CATCH._replace(obs={"image": Box(0, 255, (60, 60, 3), "uint8")}), "image_size 60: .* near it 64, 80"),
        (CATCH._replace(obs={"image": Box(0, 255, (90, 90, 3), "uint8")}), "not 90; .* 64, 80, 96"),
        (CATCH._replace(obs={"image": Box(0, 255, (64, 80, 3), "uint8")}), "64x80 is not supported; valid: square"),
        (CATCH._replace(obs={"vector": Box(-1, 1, (4,))}), r"observations \['vector'\] are not supported"),
        (CATCH._replace(action=Box(-1, 1, (2, 2))), "action space"),
    ],
)
def test_spaces_that_it_cannot_take_are_refused(spec, words):
    with pytest.raises(UsageError, match=words):
        wm.world_models(spec, TINY)


def test_parts_of_a_configuration_are_overridden_field_by_field_and_survive_json():
    import json

    config, _ = presets.resolve("world_models", "small", "racing", {"evolve": {"where": "dream"}})
    small, _ = presets.resolve("world_models", "small", "racing")
    assert config.evolve == dataclasses.replace(small.evolve, where="dream")
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert wm.WorldModelsConfig(**check_fields(wm.WorldModelsConfig, stored)) == config


def test_noise_of_a_row_does_not_depend_on_the_batch():
    agent, _, _, state = tiny(CAR)
    step, keys = random_step(CAR, (3,)), jax.random.split(jax.random.key(0), 3)
    act = jax.jit(lambda keys, step: agent.act(
        state.params, keys, agent.act_carry(state.params, keys.shape[0]), step, explore=True
    )[1])  # fmt: skip
    alone = act(keys[:1], jax.tree.map(lambda x: x[:1], step))
    np.testing.assert_allclose(alone[0], act(keys, step)[0], atol=1e-5)
