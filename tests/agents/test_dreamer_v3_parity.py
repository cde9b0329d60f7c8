"""DreamerV3 beside numbers recorded from the authors' code, given the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.closeness import close, flatten, relative, swap
from tests.agents.dreamer_v3_weights import our_name, tree
from tests.parity import load
from wmjax import dreaming
from wmjax.agents import dreamer_v3 as v3
from wmjax.nets import dreamer
from wmjax.nets.codec import Decoder, Encoder
from wmjax.nets.mlp import BlockLinear, Norm
from wmjax.nets.rssm import RSSM, LatentState
from wmjax.ops import distributions, latents, noise, normalize
from wmjax.types import Box, Discrete, EnvSpec, TimeStep

pytestmark = pytest.mark.parity


@pytest.fixture
def most_likely(monkeypatch):
    """The recordings drew the most likely class, and 0.3 standard deviations above the mean."""

    def draw(key, logits):
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        onehot = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
        return onehot + (probs - jax.lax.stop_gradient(probs))

    monkeypatch.setattr(distributions, "straight_through_sample", draw)
    monkeypatch.setattr(noise, "normal", lambda key, shape: jnp.full(shape, 0.3))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.fixture(scope="module")
def nets():
    return load("dreamer_v3_nets")


def test_norm_equals_the_authors(nets):
    out = Norm("rms").apply({"params": {"scale": nets["params/norm/scale"]}}, nets["in/norm/x"])
    close(out, nets["out/norm/y"], 1e-5)


def test_block_linear_equals_the_authors(nets):
    x, kernel = nets["in/blocklinear/x"], nets["params/blocklinear/kernel"]
    blocks, _, features = kernel.shape
    layer = BlockLinear(blocks, features)
    params = {"kernel": kernel, "bias": nets["params/blocklinear/bias"]}
    out = layer.apply({"params": params}, x.reshape(*x.shape[:-1], blocks, -1))
    close(out.reshape(*x.shape[:-1], -1), nets["out/blocklinear/y"], 1e-5)


def test_block_linear_with_shared_inputs_is_the_same_layer_on_copies_of_them():
    own, shared = np.random.default_rng(0).normal(size=(2, 3, 4)), np.random.default_rng(1).normal(size=(2, 5))
    layer = BlockLinear(3, 6)
    copies = np.concatenate([own, np.broadcast_to(shared[:, None], (2, 3, 5))], -1)
    params = layer.init(jax.random.key(0), copies)
    close(layer.apply(params, own, shared=shared), layer.apply(params, copies), 1e-6)


def encoder_of(nets, section):
    obs = nets.tree(f"in/{section}")
    spaces = tuple(sorted((name, space_of(nets, value)) for name, value in obs.items()))
    sizes = nets.config["sizes"]
    return Encoder(spaces, sizes["depth"], units_of(nets)), obs, spaces


def units_of(nets):
    return (nets.config["sizes"]["units"],) * nets.config["encoder"]["layers"]


def space_of(nets, value):
    if value.dtype == np.uint8:
        return Box(0, 255, value.shape[2:], "uint8")
    if value.dtype == np.int32:
        return Discrete(nets.config["sizes"]["dvec"])
    return Box(-np.inf, np.inf, value.shape[2:])


@pytest.mark.parametrize("section", ["enc", "enc96"])
def test_encoder_equals_the_authors_with_the_vector_part_first(nets, section):
    encoder, obs, _ = encoder_of(nets, section)
    params = tree({f"enc/{k}": v for k, v in nets.tree(f"params/{section}").items()})["encoder"]
    close(jax.jit(encoder.apply)({"params": params}, obs), nets[f"out/{section}/tokens"], 1e-4)


@pytest.mark.parametrize("section", ["dec", "dec96"])
def test_decoder_equals_the_authors(nets, section):
    sizes = nets.config["sizes"]
    _, _, spaces = encoder_of(nets, section.replace("dec", "enc"))
    decoder = Decoder(spaces, sizes["depth"], units_of(nets), nets.config["bspace"])
    params = tree({f"dec/{k}": v for k, v in nets.tree(f"params/{section}").items()})["decoder"]
    out = jax.jit(decoder.apply)({"params": params}, nets[f"in/{section}/deter"], nets[f"in/{section}/stoch"])
    close(out["image"], nets[f"out/{section}/pred_image"], 1e-4)
    if section == "dec":
        close(out["vec"], nets["out/dec/pred_vec"], 1e-5)
        close(out["cls"], nets["out/dec/logits_cls"], 1e-5)
        for name, space in spaces:
            target = jnp.asarray(nets[f"in/enc/{name}"])
            close(
                v3.reconstruction_loss(out[name], target, space, v3.DreamerV3Config()),
                nets[f"out/dec/loss_{name}"],
                1e-4,
            )


def rssm_of(nets, section):
    sizes = nets.config["sizes"]
    params = tree({f"dyn/{k}": v for k, v in nets.tree(f"params/{section}").items()})["rssm"]
    action = sizes["nact"] if section == "dyn" else sizes["cact"]
    fields = {name: sizes[name] for name in ("deter", "hidden", "stoch", "classes", "blocks")}
    return RSSM(**fields, embed=nets.config["token_dim"], action=action), params


def actions_of(nets, name, count):
    action = nets[name]
    return np.eye(count, dtype=np.float32)[action] if action.dtype == np.int32 else action


@pytest.mark.parametrize("section", ["dyn", "dync"])
def test_sequence_model_and_prior_equal_the_authors(nets, section):
    rssm, params = rssm_of(nets, section)
    inputs = [nets[f"in/{section}_core/{name}"] for name in ("deter", "stoch", "action")]
    close(rssm.apply({"params": params}, *inputs, method="advance"), nets[f"out/{section}_core/deter"], 1e-5)
    prior = rssm.apply({"params": params}, nets[f"in/{section}_prior/deter"], method="prior")
    close(prior.reshape(*prior.shape[:-1], *inputs[1].shape[-2:]), nets[f"out/{section}_prior/logit"], 1e-5)


def model_of(rssm):
    """The agent's world model around a given RSSM."""
    config = v3.DreamerV3Config(
        deter=rssm.deter, hidden=rssm.hidden, stoch=rssm.stoch, classes=rssm.classes, blocks=rssm.blocks
    )
    modules = dreamer.Networks(*[None] * len(dreamer.Networks._fields))._replace(rssm=rssm)
    return dreamer.world_model(modules, v3.latent_kind(config), v3.feature, None, config.discount)


def state_of(deter, stoch):
    """A state whose logits are of no concern."""
    return LatentState(deter, stoch, latents.Categorical(jnp.zeros_like(stoch)))


@pytest.mark.parametrize("section", ["dyn", "dync"])
def test_observe_equals_the_authors_across_resets(nets, section, most_likely):
    rssm, params = rssm_of(nets, section)
    get = lambda name: nets[f"in/{section}_observe/{name}"]
    deter, stoch = get("carry_deter"), get("carry_stoch")
    tokens = rssm.apply({"params": params}, swap(get("tokens")), method="project")
    action = swap(actions_of(nets, f"in/{section}_observe/action", rssm.action))
    final, states = dreaming.observe(
        model_of(rssm), {"rssm": params}, jax.random.key(0), state_of(deter, stoch), action, tokens,
        swap(get("reset")),
    )  # fmt: skip
    out = nets.tree(f"out/{section}_observe")
    close(swap(states.deter), out["deter"], 1e-5)
    close(swap(states.dist.logits), out["logit"], 1e-5)
    assert np.array_equal(swap(states.stoch), out["stoch"])
    close(final.deter, out["carry_deter"], 1e-5)
    prior = rssm.apply({"params": params}, states.deter, method="prior")
    close(swap(prior.reshape(states.stoch.shape)), out["prior_logit"], 1e-5)


@pytest.mark.parametrize("section", ["dyn", "dync"])
def test_imagine_equals_the_authors(nets, section, most_likely):
    rssm, params = rssm_of(nets, section)
    get = lambda name: nets[f"in/{section}_imagine/{name}"]
    stoch = get("carry_stoch")
    start = state_of(get("carry_deter"), stoch)
    action = swap(actions_of(nets, f"in/{section}_imagine/action", rssm.action))
    policy, carry = dreaming.given_actions(jnp.asarray(action))
    _, states, _ = dreaming.imagine(
        model_of(rssm), {"rssm": params}, jax.random.key(0), start, policy, len(action), policy_carry=carry
    )
    out = nets.tree(f"out/{section}_imagine")
    close(swap(states.deter[1:]), out["deter"], 1e-5)
    close(swap(states.dist.logits[1:]), out["logit"], 1e-5)
    assert np.array_equal(swap(states.stoch[1:]), out["stoch"])


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.fixture(scope="module")
def losses():
    return load("dreamer_v3_losses")


def config_of(losses, **fields):
    given = losses.config
    imagination, norm = given["imag_loss"], given["retnorm"]
    return v3.DreamerV3Config(
        unimix=given["unimix"], free_nats=given["free_nats"], discount_horizon=given["horizon"],
        lambda_=imagination["lam"], entropy_scale=imagination["actent"], slow_critic_scale=imagination["slowreg"],
        return_norm_rate=norm["rate"], return_norm_low=norm["perclo"], return_norm_high=norm["perchi"],
        return_norm_limit=norm["limit"], **fields,
    )  # fmt: skip


@pytest.mark.slow
def test_imagination_losses_equal_the_authors(losses):
    for section in ("imag_disc", "imag_cont"):
        given = losses.tree("in/imag")
        discrete = section == "imag_disc"
        classes = given["policy_logits"].shape[-1]
        action = np.eye(classes, dtype=np.float32)[given["action_disc"]] if discrete else given["action_cont"]
        inputs = [swap(given["policy_logits"])] if discrete else [swap(given["mean"]), swap(given["stddev"])]

        def total(inputs, value_logits, discrete=discrete, given=given, action=action):
            if discrete:
                policy = distributions.OneHotCategorical(inputs[0], 0.0)
            else:
                policy = distributions.distrax.Independent(distributions.distrax.Normal(*inputs), 1)
            bins = distributions.exponential_bins(value_logits.shape[-1])
            terms, target, state, _ = v3.imagination_losses(
                policy,
                jnp.asarray(swap(action)[:-1]),
                jnp.asarray(swap(given["reward"])),
                jnp.asarray(swap(given["cont"])),
                distributions.TwoHot(value_logits, bins),
                distributions.TwoHot(jnp.asarray(swap(given["slowvalue_logits"])), bins),
                normalize.ReturnRange(given["retnorm_lo"], given["retnorm_hi"]),
                config_of(losses),
            )
            return terms["actor"].mean() + terms["critic"].mean(), (terms, target, state)

        grads, (terms, target, state) = jax.grad(total, (0, 1), has_aux=True)(
            inputs, jnp.asarray(swap(given["value_logits"]))
        )
        out = losses.tree(f"out/{section}")
        close(swap(terms["actor"]), out["policy_loss"], 1e-4)
        close(swap(terms["critic"]), out["value_loss"], 1e-4)
        close(swap(target), out["ret"], 1e-4)
        close(state.low, out["retnorm_lo"], 1e-5)
        close(state.high, out["retnorm_hi"], 1e-5)
        expected = losses.tree(f"grad/{section}")
        names = ["policy_logits"] if discrete else ["mean", "stddev"]
        for name, grad in zip(names, grads[0], strict=True):
            relative(swap(grad), expected[name])
        if "value_logits" in expected:
            relative(swap(grads[1]), expected["value_logits"])


def test_replay_critic_loss_equals_the_authors(losses):
    given, out = losses.tree("in/repl"), losses.tree("out/repl")
    zeros = jnp.zeros_like(given["last"])
    step = TimeStep({}, *map(jnp.asarray, map(swap, (given["reward"], zeros, given["last"], given["term"]))))

    def mean(value_logits):
        bins = distributions.exponential_bins(value_logits.shape[-1])
        slow = distributions.TwoHot(jnp.asarray(swap(given["slowvalue_logits"])), bins)
        critic = distributions.TwoHot(value_logits, bins)
        loss = v3.replay_critic_loss(critic, slow, step, jnp.asarray(swap(given["boot"])), config_of(losses))
        return loss.mean(), loss

    grad, loss = jax.grad(mean, has_aux=True)(jnp.asarray(swap(given["value_logits"])))
    close(swap(loss), out["loss"], 1e-5)
    relative(swap(grad), losses["grad/repl/value_logits"])


@pytest.fixture(scope="module", params=["agent_disc", pytest.param("agent_cont", marks=pytest.mark.slow)])
def agent(request, losses):
    """Everything the official agent computed in one loss, and our loss on the same weights and batch."""
    section, sizes = request.param, losses.config["sizes"]
    given = losses.tree(f"in/{section}")
    discrete = section == "agent_disc"
    vector = Box(-np.inf, np.inf, given["vec"].shape[2:])
    obs = {"image": Box(0, 255, given["image"].shape[2:], "uint8"), "vec": vector}
    spec = EnvSpec(obs, Discrete(sizes["nact"]) if discrete else Box(-1.0, 1.0, given["prevact"].shape[2:]))
    dims = {name: sizes[name] for name in ("deter", "hidden", "stoch", "classes", "depth", "units", "blocks")}
    params, scales = tree(losses.tree(f"params/{section}")), losses.config[section]["scales"]
    layers = lambda module: sum(name.startswith("linear") for name in params[module]["mlp"])
    config = config_of(
        losses, **dims, horizon=losses.config["imag_length"], actor_unimix=0.0,
        bins=len(params["critic"]["logits"]["bias"]), encoder_units=(sizes["units"],) * layers("encoder"),
        dyn_scale=scales["dyn"], rep_scale=scales["rep"], image_scale=scales["image"], vector_scale=scales["vec"],
        reward_scale=scales["rew"], cont_scale=scales["con"], actor_scale=scales["policy"],
        critic_scale=scales["value"], replay_critic_scale=scales["repval"],
        **{f"{head}_layers": layers(head) for head in ("reward", "cont", "actor", "critic")},
    )  # fmt: skip
    parts = v3.assemble(spec, config)
    action = np.eye(sizes["nact"], dtype=np.float32)[given["prevact"]] if discrete else given["prevact"]
    start = state_of(given["carry_deter"], given["carry_stoch"])
    step = TimeStep(
        {name: jnp.asarray(swap(given[name])) for name in obs},
        *(jnp.asarray(swap(given[name])) for name in ("reward", "is_first", "is_last", "is_terminal")),
    )
    low, high = (losses[f"params/{section}/retnorm/{end}/value"] for end in ("lo", "hi"))

    def objective(trained, only=None):
        total, aux = v3.loss(
            parts, trained | {"slow_critic": params["slow_critic"]},
            {"return_norm": normalize.ReturnRange(low, high)}, jax.random.split(jax.random.key(0), len(action)), start,
            jnp.asarray(swap(action)), step,
        )  # fmt: skip
        return (total if only is None else aux[0][only].mean()), aux

    trained = {name: value for name, value in params.items() if name != "slow_critic"}
    return section, objective, trained


LOSS_NAMES = {
    "con": "cont", "dyn": "dyn", "rep": "rep", "image": "decode/image", "vec": "decode/vec", "rew": "reward",
    "policy": "actor", "value": "critic", "repval": "replay_critic",
}  # fmt: skip


@pytest.mark.slow
def test_full_agent_losses_and_gradients_equal_the_authors(agent, losses, most_likely):
    section, objective, trained = agent
    out = losses.tree(f"out/{section}")
    (total, (terms, states, stats, *_)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(trained)
    close(total, out["loss_total"], 1e-5)
    close(swap(states.deter), out["repfeat/deter"], 1e-5)
    assert np.array_equal(swap(states.stoch), out["repfeat/stoch"])
    length, batch = terms["dyn"].shape
    for theirs, ours in LOSS_NAMES.items():
        value = terms[ours]
        if theirs in ("policy", "value"):
            horizon = value.shape[0]
            rows = np.asarray(value).reshape(horizon, length, batch).transpose(2, 1, 0)
            close(rows.reshape(-1, horizon), out[f"imag_{theirs}_loss"], 1e-4)
            close(rows.mean(-1), out[f"losses/{theirs}"], 1e-4)
        else:
            close(swap(value), out[f"losses/{theirs}"], 1e-5 if theirs != "image" else 1e-4)
    norm = stats["return_norm"]
    close(norm.low, out["state_after/retnorm/lo/value"], 1e-5)
    close(norm.high, out["state_after/retnorm/hi/value"], 1e-5)
    ours = flatten(grads)
    compared = 0
    for name, theirs in losses.tree(f"grad/{section}").items():
        relative(ours[our_name(name)], theirs)
        compared += 1
    assert compared > 20
    norms = dict(zip(losses.config[section]["grad_norm_per_tensor_rows"], out["grad_norm_per_tensor"], strict=True))
    for name, row in norms.items():
        ours_norm = np.linalg.norm(np.asarray(ours[our_name(name)]).ravel())
        assert abs(ours_norm - row[0]) <= 1e-4 * max(row[0], 1e-3), name


@pytest.mark.slow
def test_each_loss_sends_its_gradient_where_the_authors_loss_does(agent, losses, most_likely):
    section, objective, trained = agent
    rows, cols = losses.config[section]["grad_norm_rows"], losses.config[section]["grad_norm_cols"]
    expected = losses[f"out/{section}/grad_norms"]
    modules = {"con": "cont", "dec": "decoder", "dyn": "rssm", "enc": "encoder", "pol": "actor", "rew": "reward"}
    modules["val"] = "critic"

    def term_means(trained):
        return {name: term.mean() for name, term in objective(trained)[1][0].items()}

    # One forward pass, one backward pass for each term.
    terms, pullback = jax.vjp(jax.jit(term_means), trained)
    for row, name in enumerate(rows):
        if name == "total":
            continue
        (grads,) = pullback({key: jnp.float32(key == LOSS_NAMES[name]) for key in terms})
        for col, module in enumerate(cols):
            norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads[modules[module]])))
            theirs = expected[row, col]
            assert abs(norm - theirs) <= 1e-4 * max(theirs, 1e-3), (name, module, norm, theirs)
            assert (norm == 0) == (theirs == 0), (name, module)
