"""IRIS beside numbers recorded from the authors' code, given the same weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.closeness import close, flatten
from tests.agents.iris.weights import tree
from tests.nets.test_transformer import kept_positions
from tests.parity import Fixture, load
from wmjax.agents import iris
from wmjax.agents.iris import behavior, dynamics
from wmjax.agents.iris.modules import optimizers
from wmjax.agents.iris.tokenizer import loss_scales, tokenizer_losses
from wmjax.authors.iris import ACTOR_CRITIC, TOKENIZER, WORLD_MODEL, channels_of, grid_of, our_name, our_value
from wmjax.nets import transformer, vqgan
from wmjax.nets.actor_critic import ActorCritic, Memory
from wmjax.nets.mlp import call
from wmjax.ops import vq
from wmjax.types import Box, Discrete, EnvSpec

pytestmark = pytest.mark.parity
PAPER = iris.IRISConfig(perceptual="none")
ANY = 3  # actions, where they do not matter


def spec_of(side, channels=3, actions=ANY):
    return EnvSpec({"image": Box(0, 255, (side, side, channels), "uint8")}, Discrete(actions))


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def onehot(action, count):
    return np.eye(count, dtype=np.float32)[action]


def assert_gradients(rules, grads, names, norms, tolerance=1e-4):
    """The norm of every parameter's gradient is the recorded one."""
    ours = flatten(grads)
    assert len(names) == len(ours)
    for name, norm in zip(names, norms, strict=True):
        found = np.linalg.norm(np.asarray(ours[our_name(rules, str(name))], np.float64))
        assert abs(found - norm) <= tolerance * max(norm, 1e-2), (name, found, norm)


def assert_gradient(rules, grads, name, theirs, grid=None, tolerance=1e-4):
    path = our_name(rules, name)
    difference = np.linalg.norm(flatten(grads)[path] - our_value(path, theirs, grid))
    assert difference <= tolerance * np.linalg.norm(theirs), (name, difference)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """The recording, our modules and their weights."""
    data = load("iris_tokenizer")
    size = lambda name: int(data[f"cfg/{name}"])
    sizes = lambda name: tuple(int(n) for n in data[f"cfg/{name}"])
    config = dataclasses.replace(
        PAPER, vocab_size=size("vocab_size"), embed_dim=size("embed_dim"), latents=size("z_channels"),
        channels=size("ch"), multipliers=sizes("ch_mult"), res_blocks=size("num_res_blocks"),
        attention=sizes("attn_resolutions"), policy_channels=(1,),
    )  # fmt: skip
    params = {"tokenizer": tree(TOKENIZER, data.tree("w"))}
    return data, iris.networks(spec_of(size("resolution"), size("in_channels")), config), config, params


def rollout_tokens():
    """Tokens `[B, T, K]` of the recorded imagined rollout."""
    given = load("iris_actor_critic").tree("rollout_in")
    return np.concatenate([given["initial_frame_tokens"][:, None], given["sampled_tokens"]], 1)


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    """Losses, latents and tokens, the gradient of each term, and reconstructions: one compilation."""
    data, nets, config, params = tokenizer
    image = jnp.asarray(nhwc(data["in/images_u8"]))

    @jax.jit
    def everything(weights):
        keys = jax.random.split(jax.random.key(0), image.shape[0])
        losses = lambda weights: tokenizer_losses(nets, config, {"tokenizer": weights}, keys, image)
        values, pull, aux = jax.vjp(losses, weights, has_aux=True)
        terms = ("codebook", "commit", "recon")
        rows = jnp.concatenate([jnp.eye(3), jnp.ones((1, 3))])
        grads = jax.lax.map(
            lambda row: pull(dict(zip(terms, row, strict=True)) | {"perceptual": jnp.float32(0)})[0], rows
        )
        rollout = rollout_tokens()
        tokens = jnp.concatenate([aux[1].reshape(len(image), -1), rollout.reshape(-1, rollout.shape[-1])])
        return values, aux, grads, iris.decode(nets, {"tokenizer": weights}, tokens)

    values, aux, grads, frames = everything(params["tokenizer"])
    names = ("codebook", "commit", "recon", "total")
    grads = {name: jax.tree.map(lambda x, i=i: x[i], grads) for i, name in enumerate(names)}
    return values, aux, grads, frames


@pytest.mark.slow
@pytest.mark.parametrize("block", ["norm", "attn", "down", "up"])
def test_blocks_of_the_tokenizer_equal_the_authors(tokenizer, block):
    data, *_ = tokenizer
    x = nhwc(data[f"block/{block}/in"])
    weights = data.tree(f"block/{block}/w")
    channels = x.shape[-1]
    if block == "norm":
        module, params = vqgan.Norm(activate=False), {"scale": weights["weight"], "bias": weights["bias"]}
    elif block == "attn":
        module = vqgan.AttnBlock()
        params = tree(TOKENIZER, {f"x.{name}": value for name, value in weights.items()})["x"]
    else:
        module = vqgan.Conv(channels, stride=2) if block == "down" else vqgan.Conv(channels, upsample=True)
        params = {"conv": {"kernel": weights["conv.weight"].transpose(2, 3, 1, 0), "bias": weights["conv.bias"]}}
    close(module.apply({"params": params}, x), nhwc(data[f"block/{block}/out"]), 1e-5)


@pytest.mark.slow
def test_tokens_equal_the_authors_exactly_and_latents_and_frames_closely(tokenizer, tokenized):
    data, _, _, params = tokenizer
    _, (z, tokens), _, frames = tokenized
    close(z, nhwc(data["out/z"]), 5e-5)
    found = np.sort(vq.distances(z, params["tokenizer"]["codebook"]), -1).reshape(data["out/best_distance"].size, -1)
    close(found[:, 0], data["out/best_distance"].ravel(), 5e-5)
    close(found[:, 1] - found[:, 0], data["out/distance_gap"].ravel(), 5e-5)
    images = len(data["out/tokens"])
    np.testing.assert_array_equal(tokens.reshape(images, -1), data["out/tokens"])
    close(frames[:images], np.clip(nhwc(data["out/reconstruction_01"]), 0, 1), 5e-5)
    rollout = nhwc(load("iris_actor_critic")["rollout_in/frames"])
    close(frames[images:], rollout.reshape(-1, *rollout.shape[2:]), 5e-5)


@pytest.mark.slow
def test_tokenizer_losses_and_gradients_equal_the_authors_term_by_term(tokenizer, tokenized):
    data, _, config, _ = tokenizer
    values, _, grads, _ = tokenized
    for ours in ("codebook", "commit", "recon"):
        close(values[ours], data[f"loss/{ours}"], 1e-5)
    scales = loss_scales(config)
    close(sum(scales[name] * value for name, value in values.items()), data["loss/total"], 1e-5)
    assert_gradients(TOKENIZER, grads["total"], data["grad/names"], data["grad/norms"])
    whole = [name for name in data.tree("grad") if name in data.tree("w")]
    assert len(whole) > 3
    for name in whole:
        assert_gradient(TOKENIZER, grads["total"], name, data[f"grad/{name}"])
    ours = {"pre_quant_conv": "pre_quant", "embedding": "codebook", "post_quant_conv": "post_quant"}
    groups = [ours.get(str(name), str(name)) for name in data["gradgroup/names"]]
    for term in ("codebook", "commit", "recon", "total"):
        norms = [float(optax.tree.norm(grads[term][group])) for group in groups]
        np.testing.assert_allclose(norms, data[f"gradgroup/{term}"], rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# World model


def of_other_sizes(data):
    """The same recording of fewer rows, with an action and a frame token more, which nobody uses."""
    data, unlikely = Fixture(data), -20.0
    row = lambda x, value=0.0: np.concatenate([x, np.full_like(x[:1], value)])
    data["in/tokens"] = data["in/tokens"][:2]
    for name, value in data.items():
        if name.startswith(("out/", "cached/hidden", "cached/logits")):
            data[name] = value[:2]
        elif name.startswith(("env_in/", "env/")) and not name.startswith("env/cache"):
            data[name] = value[:1]
    for name in ("cfg/act_vocab_size", "cfg/obs_vocab_size"):
        data[name] = data[name] + 1
    for name in ("w/embedder.embedding_tables.0.weight", "w/embedder.embedding_tables.1.weight"):
        data[name] = row(data[name])
    data["grad/embedding_actions"] = row(data["grad/embedding_actions"])
    head = "w/head_observations.head_module.2"
    data[f"{head}.weight"], data[f"{head}.bias"] = row(data[f"{head}.weight"]), row(data[f"{head}.bias"], unlikely)
    for name, value in data.items():
        if "/logits_observations" in name:
            data[name] = np.concatenate([value, np.full_like(value[..., :1], unlikely)], -1)
    return data


@pytest.fixture(scope="module", params=["recorded", pytest.param("of_other_sizes", marks=pytest.mark.slow)])
def world(request):
    """The recording, the transformer and its weights."""
    data = load("iris_world_model")
    data = of_other_sizes(data) if request.param == "of_other_sizes" else data
    size = lambda name: int(data[f"cfg/{name}"])
    module = transformer.TokenTransformer(
        size("tokens_per_block") - 1, size("max_blocks"), size("obs_vocab_size"), size("act_vocab_size"),
        size("num_layers"), size("num_heads"), size("embed_dim"), 4 * size("embed_dim"),
    )  # fmt: skip
    return data, module, tree(WORLD_MODEL, data.tree("w"))


def blocks_of(tokens, block):
    """`[B, L (K + 1)]` to frames `[B, L, K]` and actions `[B, L]`."""
    split = tokens.reshape(len(tokens), -1, block)
    return split[:, :, :-1], split[:, :, -1]


def test_a_full_pass_equals_the_authors(world):
    data, module, params = world
    tokens, action = blocks_of(data["in/tokens"], module.block)
    reward, action = jnp.zeros(action.shape), onehot(action, module.actions)
    logits = jax.jit(lambda p: call(module, p, tokens, action, reward))
    for found, name in zip(logits(params), ("observations", "rewards", "ends"), strict=True):
        close(found, data[f"out/logits_{name}"], 5e-5)


def test_the_cache_token_by_token_equals_the_authors_and_the_full_pass(world):
    data, module, params = world
    tokens = data["in/tokens"]
    apply = lambda *args, method: call(module, params, *args, method=method)

    @jax.jit
    def run(tokens):
        cache = module.init_cache(len(tokens))

        def step(cache, inputs):
            place, token = inputs
            frame = apply(jnp.minimum(token, module.vocab_size - 1), method="embed_frame")
            action = apply(jax.nn.one_hot(token, module.actions), method="embed_action")
            x = jnp.where(place % module.block == module.tokens, action, frame)[:, None]
            hidden, cache = apply(x, cache, method="advance")
            return cache, hidden[:, 0]

        _, hidden = jax.lax.scan(step, cache, (jnp.arange(tokens.shape[1]), tokens.T))
        hidden = hidden.swapaxes(0, 1)
        return hidden, apply(hidden, method="frame_logits"), *apply(hidden, method="outcome_logits")

    hidden, frames, rewards, ends = run(tokens)
    close(hidden, data["out/hidden"], 5e-5)
    close(hidden, data["cached/hidden"], 5e-5)
    kept = lambda kinds: np.array(kept_positions(tokens.shape[1], module.block, kinds))
    close(frames[:, kept(module.frame_positions)], data["cached/logits_observations"], 5e-5)
    close(rewards[:, kept((module.tokens,))], data["cached/logits_rewards"], 5e-5)
    close(ends[:, kept((module.tokens,))], data["cached/logits_ends"], 5e-5)


def test_heads_keep_the_positions_that_the_authors_keep(world):
    data, module, _ = world
    at_action = (module.tokens,)
    kinds = {
        "observations": module.frame_positions, "rewards": at_action, "ends": at_action, "embed_actions": at_action,
        "embed_observations": tuple(range(module.tokens)),
    }  # fmt: skip
    cases = {name.removeprefix("embed_actions_") for name in data.tree("kept") if name.startswith("embed_actions_")}
    assert len(cases) > 3
    for case in cases:
        actions = data[f"kept/embed_actions_{case}"]
        tokens = len(actions) + len(data[f"kept/embed_observations_{case}"])  # each is of one kind or the other
        past = (module.tokens - actions[0]) % module.block if case.startswith("after") else 0
        for head, kept in kinds.items():
            found = kept_positions(tokens, module.block, kept, past)
            assert list(found) == data[f"kept/{head}_{case}"].tolist(), (head, case)
    for place, counts in enumerate(data["cached/counts"]):
        heads = (module.frame_positions, at_action, at_action)
        assert [len(kept_positions(1, module.block, kept, place)) for kept in heads] == counts.tolist()


def test_world_model_losses_and_gradients_equal_the_authors_with_padding_and_ends(world):
    data, module, params = world
    given = data.tree("loss_in")
    tokens, mask = jnp.asarray(given["obs_tokens"]), jnp.asarray(given["mask_padding"])

    def objective(params):
        action = onehot(given["actions"], module.actions)
        logits = call(module, params, tokens, action, np.sign(given["rewards"]))
        end = jnp.asarray(given["ends"], bool)
        losses = iris.world_model_losses(logits, tokens, jnp.asarray(given["rewards"]), end, mask, mask)
        return sum(losses.values()), losses

    (total, losses), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    for ours, theirs in (("frame", "obs"), ("reward", "rewards"), ("end", "ends")):
        close(losses[ours], data[f"loss/{theirs}"], 1e-5)
    close(total, data["loss/total"], 1e-5)
    assert_gradients(WORLD_MODEL, grads, data["grad/names"], data["grad/norms"])
    close(grads["position_table"], data["grad/pos_emb.weight"], 1e-4)
    close(grads["action_table"], data["grad/embedding_actions"], 1e-4)
    whole = [name for name in data.tree("grad") if name in data.tree("w") and name != "pos_emb.weight"]
    assert whole
    for name in whole:
        assert_gradient(WORLD_MODEL, grads, name, data[f"grad/{name}"])


@pytest.mark.slow
def test_an_imagined_rollout_equals_the_authors_and_restarts_where_theirs_does(world):
    data, module, params = world
    given, out = data.tree("env_in"), data.tree("env")
    same = {name: getattr(module, name) for name in ("vocab_size", "max_blocks", "layers", "heads", "width")}
    config = dataclasses.replace(PAPER, **same, dropout=0.0, world_model_length=module.max_blocks)
    spec = spec_of(round(module.tokens**0.5) * config.downsampling, actions=module.actions)
    nets = iris.networks(spec, config)
    assert nets.world_model == module
    model = iris.world_model(nets, spec, config)
    weights = {"world_model": params}
    apply = lambda *args, method: call(module, params, *args, method=method)

    @jax.jit
    def step(state, action, following, needed):
        """A step whose drawn tokens are replaced by those that the authors drew."""
        before = state.cache.length
        rooms = [dynamics.make_room(nets, weights, state.cache, state.tokens, n) for n in (module.block, 1)]
        cache = jax.tree.map(lambda a, b: jnp.where(needed == module.block, a, b), *rooms)
        restarted = cache.length < before
        state, hidden = dynamics.respond(nets, weights, jax.random.key(0), state._replace(cache=cache), action)
        hidden_all, full = apply(apply(following, method="embed_frame"), state.cache, method="advance")
        hidden = jnp.concatenate([hidden[:, None], hidden_all[:, :-1]], 1)
        logits = apply(hidden, method="frame_logits")
        return state._replace(tokens=following, cache=full), state, logits, restarted

    state = jax.jit(lambda tokens: iris.start_state(nets, model, weights, tokens))(given["initial_tokens"])
    rows, steps = given["actions"].shape
    for t in range(steps):
        last = t == steps - 1  # of which only the answer is recorded
        following = jnp.asarray(given["sampled_tokens"][:, min(t, steps - 2)])
        action = onehot(given["actions"][:, t], module.actions)
        new, answered, logits, restarted = step(state, action, following, 1 if last else module.block)
        assert restarted.tolist() == [bool(out["cache_restarted"][t])] * rows
        assert answered.cache.length.tolist() == [int(out["cache_length_after_action"][t])] * rows
        probs = jax.nn.softmax(out["logits_rewards"][:, t])
        close(answered.reward_mean, probs[:, 2] - probs[:, 0], 5e-5)
        close(answered.cont, jax.nn.softmax(out["logits_ends"][:, t])[:, 0], 5e-5)
        expected = out["logits_observations_last_step_first_token"] if last else out["logits_observations"][:, t]
        close(logits[:, 0] if last else logits, expected, 5e-5)
        state = new


# ---------------------------------------------------------------------------------------------------------------------
# Actor-critic


@pytest.fixture(scope="module")
def actor():
    """The recording, our module and its weights."""
    data = load("iris_actor_critic")
    number = lambda name: float(data[f"cfg/{name}"])
    config = dataclasses.replace(
        PAPER, policy_channels=tuple(int(c) for c in data["cfg/conv_channels"]), lstm_units=int(number("lstm_dim")),
        multipliers=(1,), discount=number("gamma"), lambda_=number("lambda"), entropy_scale=number("entropy_weight"),
    )  # fmt: skip
    side, channels = data["fwd_in/frames_u8"].shape[-1], data["fwd_in/frames_u8"].shape[-3]
    nets = iris.networks(spec_of(side, channels, int(number("num_actions"))), config)
    return data, nets, config, {"actor_critic": tree(ACTOR_CRITIC, data.tree("w"), grid_of(shapes_of(data.tree("w"))))}


def shapes_of(weights):
    return {name: x.shape for name, x in weights.items()}


def time_first(x):
    return jnp.asarray(np.swapaxes(x, 0, 1))


def test_burn_in_logits_and_values_equal_the_authors(actor):
    data, nets, config, params = actor
    frames = time_first(nhwc(data["fwd_in/frames_u8"]).astype(np.float32) / 255)
    mask = time_first(data["fwd_in/burnin_mask"])
    memory = jax.jit(lambda p: behavior.burn_in(nets, config, p, frames[: len(mask)], mask))(params)
    close(memory.hidden, data["fwd/h_after_burnin"], 1e-5)
    close(memory.cell, data["fwd/c_after_burnin"], 1e-5)
    logits, value = jax.jit(lambda p: behavior.replay_frames(nets, p["actor_critic"], memory, frames[len(mask) :]))(
        params
    )
    close(np.swapaxes(logits, 0, 1), data["fwd/logits"], 1e-5)
    close(np.swapaxes(value, 0, 1), data["fwd/values"], 1e-5)


def test_lambda_returns_equal_the_authors(actor):
    data, *_ = actor
    reward, value, end = (np.swapaxes(data[f"returns_in/{name}"], 0, 1) for name in ("rewards", "values", "ends"))
    for discount, lambda_, name in (
        (float(data["cfg/gamma"]), float(data["cfg/lambda"]), "lambda_returns"),
        (0.995, 0.95, "lambda_returns_995_95"),
    ):
        found = behavior.lambda_returns(
            jnp.asarray(reward[:-1]), jnp.asarray(end[:-1]), jnp.asarray(value), discount, lambda_
        )
        close(np.swapaxes(found, 0, 1), data[f"returns/{name}"], 1e-6)


@pytest.mark.slow
def test_actor_critic_losses_and_gradients_equal_the_authors(actor):
    data, nets, config, params = actor
    given, out = data.tree("rollout_in"), data.tree("rollout")
    frames = time_first(nhwc(given["frames"]))
    burnin = time_first(nhwc(given["burnin_frames"]))
    mask, action = time_first(given["burnin_mask"]), time_first(onehot(given["actions"], nets.actor_critic.actions))
    reward, end = time_first(given["rewards"]), time_first(given["ends"])

    def objective(weights):
        memory = behavior.burn_in(nets, config, params, burnin, mask)
        logits, value = behavior.replay_frames(nets, weights, memory, frames)
        losses, target = behavior.actor_critic_losses(logits, value, action[:-1], reward[:-1], end[:-1], config)
        return sum(losses.values()), (logits, value, losses, target)

    (total, aux), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params["actor_critic"])
    logits, value, losses, target = aux
    for found, name in ((logits, "logits"), (value, "values"), (target, "lambda_returns")):
        close(np.swapaxes(found, 0, 1), out[name], 1e-5)
    for ours, theirs in (("actor", "actions"), ("critic", "values"), ("entropy", "entropy")):
        close(losses[ours], out[f"loss_{theirs}"], 1e-5)
    close(total, out["loss_total"], 1e-5)
    assert_gradients(ACTOR_CRITIC, grads, out["grad_names"], out["grad_norms"])
    whole = [name for name in data.tree("w") if f"grad_{name}" in out]
    assert len(whole) >= 3
    for name in whole:
        assert_gradient(ACTOR_CRITIC, grads, name, out[f"grad_{name}"], grid_of(shapes_of(data.tree("w"))))


def defined_weights(names, shapes, bounds):
    """Weights of the full size are not stored, but defined by a hash of their place."""
    result = {}
    for number, (name, shape, bound) in enumerate(zip(names, shapes, bounds, strict=True)):
        shape = tuple(int(n) for n in str(shape).strip("()").split(",") if n.strip()) if shape else ()
        x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64((number + 1) * 0x9E3779B1)
        x &= np.uint64(0xFFFFFFFF)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x ^= x >> np.uint64(shift)
            x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        value = (2 * (x.astype(np.float64) / 2**32) - 1) * np.float64(bound)
        result[str(name)] = value.astype(np.float32).reshape(shape)
    return result


def test_the_actor_critic_in_its_full_size_equals_the_authors(actor):
    data, *_ = actor
    weights = defined_weights(data["full/names"], data["full/shapes"], data["full/bounds"])
    np.testing.assert_allclose(weights["conv3.weight"][2, 1, 0], data["full/probe"])
    units = weights["lstm.weight_hh"].shape[1]
    module = ActorCritic(len(weights["actor_linear.bias"]), channels_of(shapes_of(weights)), units)
    nets = iris.Networks(None, None, module)
    frames = time_first(nhwc(data["fwd_in/frames_u8"]).astype(np.float32) / 255)
    frames = frames[data["fwd_in/burnin_mask"].shape[1] :]
    memory = Memory(*jnp.zeros((2, *data["full/h"].shape)))
    params = tree(ACTOR_CRITIC, weights, grid_of(shapes_of(weights)))
    logits, value = jax.jit(lambda p: behavior.replay_frames(nets, p, memory, frames))(params)
    close(np.swapaxes(logits, 0, 1), data["full/logits"], 1e-5)
    close(np.swapaxes(value, 0, 1), data["full/values"], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


@pytest.fixture(scope="module")
def optim_data():
    return load("iris_optim")


def decayed(params):
    """Names of the parameters that a step with a zero gradient makes smaller."""
    config = dataclasses.replace(PAPER, weight_decay=0.1)
    adam = optimizers(config)["world_model"]
    ones, zeros = jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.zeros_like, params)
    changes, _ = adam.update(zeros, adam.init(ones), ones)
    return {name for name, change in flatten(changes).items() if np.any(change)}


@pytest.mark.slow
def test_the_same_parameters_decay_as_the_authors(optim_data):
    given = {kind: optim_data[f"names_full_size/{kind}"].tolist() for kind in ("decayed", "undecayed")}
    layers = {int(match[1]) for name in given["decayed"] if (match := re.search(r"blocks\.(\d+)", name))}
    config, spec = dataclasses.replace(PAPER, layers=len(layers)), spec_of(64)
    shapes = jax.eval_shape(
        lambda key: iris.init_params(iris.networks(spec, config), spec, config, key)["world_model"], jax.random.key(0)
    )
    ours = decayed(jax.tree.map(lambda x: jnp.zeros(()), shapes))
    expected, others = ({our_name(WORLD_MODEL, name) for name in names} for names in given.values())
    assert ours == expected and len(ours) == len(given["decayed"])
    assert set(flatten(shapes)) - ours == others and len(others) == len(given["undecayed"])


def test_steps_of_the_world_models_optimizer_equal_the_authors(optim_data):
    rate, decay = (float(optim_data[f"cfg/{name}"]) for name in ("learning_rate", "weight_decay"))
    beta1, beta2 = map(float, optim_data["cfg/betas"])
    config = dataclasses.replace(
        PAPER, world_model_rate=rate, weight_decay=decay, grad_clip=1e9, beta1=beta1, beta2=beta2
    )
    adam = optimizers(config)["world_model"]
    params = tree(WORLD_MODEL, optim_data.tree("w0"))
    state = adam.init(params)
    step = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*adam.update(g, s, p)))
    for t in steps_of(optim_data):
        params, state = step(tree(WORLD_MODEL, optim_data.tree(f"g{t}")), state, params)
        expected = flatten(tree(WORLD_MODEL, optim_data.tree(f"w{t}")))
        for name, value in flatten(params).items():
            close(value, expected[name], 1e-5)


def steps_of(arrays):
    """Numbers of the recorded steps, from 1."""
    count = len({name.split("/")[0] for name in arrays if re.match(r"g\d+/", name)})
    assert count > 1
    return range(1, count + 1)


def test_clipping_and_adam_equal_the_authors(optim_data):
    given = optim_data.tree("adam")
    rate = float(optim_data["cfg/learning_rate"])
    config = dataclasses.replace(PAPER, actor_critic_rate=rate, grad_clip=float(given["max_norm"]))
    adam = optimizers(config)["actor_critic"]
    get = lambda prefix: {n[len(prefix) + 1 :]: jnp.asarray(v) for n, v in given.items() if n.startswith(prefix + "/")}
    params = get("w0")
    state = adam.init(params)
    for t in steps_of(given):
        changes, state = adam.update(get(f"g{t}"), state, params)
        params = optax.apply_updates(params, changes)
        for name, value in params.items():
            close(value, get(f"w{t}")[name], 1e-5)
