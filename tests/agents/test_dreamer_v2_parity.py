"""DreamerV2 beside numbers recorded from the authors' code, given the same weights."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.closeness import CUTS, close, flatten, relative, stepped, swap
from tests.agents.dreamer_v2_weights import our_name, tree
from tests.parity import load
from tests.test_optim import one_step
from wmjax import dreaming, optim
from wmjax.agents import dreamer_v2 as v2
from wmjax.nets import dreamer, strided_codec
from wmjax.nets.gru import LayerNormGRU
from wmjax.nets.heads import Head
from wmjax.nets.rssm import DenseRSSM, LatentState, feature
from wmjax.ops import action_distributions, distributions, flat, kl, latents, noise, returns
from wmjax.types import AgentState, Box, Discrete, EnvSpec, TimeStep, Trajectory

pytestmark = pytest.mark.parity
NORMS = {"": "none", "_ln": "layer"}


@pytest.fixture(scope="module")
def file():
    return load("dreamer_v2")


@pytest.fixture
def most_likely(monkeypatch):
    """The recordings drew the most likely class, the mean of Gaussian latents and the location of actions."""

    def draw(key, logits):
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        onehot = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
        return onehot + (probs - jax.lax.stop_gradient(probs))

    monkeypatch.setattr(distributions, "straight_through_sample", draw)
    monkeypatch.setattr(noise, "normal", lambda key, shape: jnp.zeros(shape))
    monkeypatch.setattr(action_distributions, "truncated_noise", lambda key, low, high: jnp.zeros_like(low))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def test_layer_norm_gru_equals_the_authors(file):
    params = tree({f"rssm/cell/{k}": v for k, v in file.tree("params/gru").items()})["rssm"]["gru"]
    cell = LayerNormGRU(file.config["sizes"]["deter"])
    h, x = file["in/gru/h"], file["in/gru/x"]
    close(cell.apply({"params": params}, h, x), file["out/gru/h"], 1e-5)
    # Gates in another order give other numbers.
    columns = np.roll(np.arange(params["dense"]["kernel"].shape[1]), len(h[0]))
    params["dense"] = {name: value[..., columns] for name, value in params["dense"].items()}
    assert np.abs(cell.apply({"params": params}, h, x) - file["out/gru/h"]).max() > 1e-2


def rssm_of(file, section):
    sizes = file.config["sizes"]
    config = v2.DreamerV2Config(
        deter=sizes["deter"], hidden=sizes["hidden"], stoch=sizes["stoch"], classes=sizes["classes"],
        latent="gaussian" if section == "rssm_gauss" else "categorical",
    )  # fmt: skip
    outputs = sizes["stoch"] * (2 if section == "rssm_gauss" else sizes["classes"])
    embed = file[f"in/{section}/embed"].shape[-1]
    norm = "layer" if section == "rssm_ln" else "none"
    rssm = DenseRSSM(sizes["deter"], sizes["hidden"], outputs, embed, "layer_norm_gru", norm=norm)
    nets = dreamer.Networks(*[None] * len(dreamer.Networks._fields))._replace(rssm=rssm)
    params = tree({f"rssm/{k}": v for k, v in file.tree(f"params/{section}").items()})
    return config, rssm, dreamer.world_model(nets, v2.latent_kind(config), feature, None, config.discount), params


def check_states(config, states, expected, tolerance=1e-5):
    close(swap(states.deter), expected["deter"], tolerance)
    close(swap(states.stoch), expected["stoch"], tolerance)
    if config.latent == "categorical":
        close(swap(states.dist.logits), expected["logit"], tolerance)
    else:
        close(swap(states.dist.mean), expected["mean"], tolerance)
        close(swap(states.dist.std), expected["std"], tolerance)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("section", ["rssm", "rssm_ln", "rssm_gauss"])
def test_observe_and_imagine_equal_the_authors_across_resets(file, section, cut, most_likely):
    file = cut(file, section)
    config, rssm, model, params = rssm_of(file, section)
    given = file.tree(f"in/{section}")
    start = LatentState(
        given["state/deter"], given["state/stoch"], model.init_state({}, len(given["state/deter"])).dist
    )
    embed = rssm.apply({"params": params["rssm"]}, swap(given["embed"]), method="project")
    _, states = dreaming.observe(
        model, params, jax.random.key(0), start, swap(given["action"]), embed, swap(given["is_first"])
    )
    check_states(config, states, file.tree(f"out/{section}/post"))
    close(swap(feature(states)), file[f"out/{section}/feat"], 1e-5)
    raw = rssm.apply({"params": params["rssm"]}, states.deter, method="prior")
    prior = v2.latent_kind(config).dist(raw)
    prior = LatentState(states.deter, prior.sample(jax.random.key(0)), prior)
    check_states(config, prior, file.tree(f"out/{section}/prior"))
    if section == "rssm":
        close(swap(states.dist.entropy().sum(-1)), file["out/rssm/post_entropy"], 1e-5)
    action = jnp.asarray(swap(given["imagine_action"]))
    policy, carry = dreaming.given_actions(action)
    _, imagined, _ = dreaming.imagine(model, params, jax.random.key(0), start, policy, len(action), policy_carry=carry)
    check_states(config, jax.tree.map(lambda x: x[1:], imagined), file.tree(f"out/{section}/imagine"))


@pytest.mark.parametrize("norm", NORMS)
def test_encoder_and_decoder_equal_the_authors_with_the_image_part_first(file, norm):
    sizes = file.config[f"enc{norm}"]
    obs = {name: jnp.asarray(value) for name, value in file.tree(f"in/enc{norm}").items()}
    spaces = (("image", Box(0, 255, obs["image"].shape[2:], "uint8")), ("vec", Box(-1, 1, obs["vec"].shape[2:])))
    style = dict(spaces=spaces, depth=sizes["cnn_depth"], units=tuple(sizes["mlp_layers"]), norm=NORMS[norm])
    params = lambda name: tree({f"{name}/{k}": v for k, v in file.tree(f"params/{name}{norm}").items()})
    encoder, decoder = strided_codec.StridedEncoder(**style), strided_codec.StridedDecoder(**style)
    close(jax.jit(encoder.apply)({"params": params("enc")["encoder"]}, obs), file[f"out/enc{norm}/embed"], 1e-4)
    outputs = jax.jit(decoder.apply)({"params": params("dec")["decoder"]}, file[f"in/dec{norm}/feat"])
    for name, space in spaces:
        tolerance = 1e-4 if name == "image" else 1e-5
        close(outputs[name], file[f"out/dec{norm}/mean_{name}"], tolerance)
        close(strided_codec.log_prob(outputs[name], obs[name], space), file[f"out/dec{norm}/logp_{name}"], tolerance)


def head_of(file, section, module, discrete=True):
    params = tree({f"{module}/{k}": v for k, v in file.tree(f"params/{section}").items()}, discrete)
    (params,) = params.values()
    norm = "layer" if section.endswith("_ln") else "none"
    sizes = tuple((name, layer["bias"].shape[0]) for name, layer in params.items() if name != "mlp")
    layers = sum(name.startswith("linear") for name in params["mlp"])
    units = tuple(len(params["mlp"][f"linear{i}"]["bias"]) for i in range(layers))
    return Head(sizes, units, norm=norm, activation="elu").apply({"params": params}, file["in/heads/feat"])


@pytest.mark.parametrize("norm", NORMS)
def test_heads_equal_the_authors(file, norm):
    given = {name: jnp.asarray(value) for name, value in file.tree(f"in/heads{norm}").items()}
    out = lambda name: file[f"out/{name}"]
    reward = distributions.number(head_of(file, f"reward{norm}", "reward"), "normal")
    close(reward.mean(), out(f"reward{norm}/mode"), 1e-5)
    close(reward.log_prob(given["scalar_target"]), out(f"reward{norm}/logp"), 1e-5)
    logits = head_of(file, f"discount{norm}", "discount")["logits"][..., 0]
    close(jax.nn.sigmoid(logits), out(f"discount{norm}/mean"), 1e-5)
    # This recording's targets were NumPy arrays, which TensorFlow Probability rounds down to the Bernoulli's integers;
    # those of the whole agent are tensors and stay soft (`likes/discount` below).
    target = jnp.floor(given["discount_target"])
    close(distributions.bernoulli_log_prob(logits, target), out(f"discount{norm}/logp"), 1e-5)
    logits = head_of(file, f"actor_onehot{norm}", "actor")["logits"]
    onehot = distributions.OneHotCategorical(logits)
    section = f"actor_onehot{norm}"
    close(jax.nn.log_softmax(logits), jax.nn.log_softmax(out(f"{section}/logits")), 1e-5)
    close(onehot.log_prob(given["onehot_action"]), out(f"{section}/logp"), 1e-5)
    close(onehot.entropy(), out(f"{section}/entropy"), 1e-5)
    close(onehot.mode(), out(f"{section}/mode"), 0)
    raw = head_of(file, f"actor_trunc{norm}", "actor", discrete=False)
    trunc = action_distributions.truncated_normal(raw["mean"], raw["std"])
    section = f"actor_trunc{norm}"
    for name in ("loc", "scale"):
        close(getattr(trunc, name), out(f"{section}/{name}"), 1e-5)
    close(trunc.mode(), out(f"{section}/mode"), 1e-5)
    close(trunc.log_prob(given["cont_action"]), out(f"{section}/logp"), 1e-5)
    close(trunc.entropy(), out(f"{section}/entropy"), 1e-4)


def test_truncated_normal_and_the_gradient_of_its_sample_equal_the_authors(file, monkeypatch):
    loc, scale, event = (jnp.asarray(file[f"in/truncnormal/{name}"]) for name in ("loc", "scale", "event"))
    make = lambda loc, scale: action_distributions.TruncatedNormal(loc[:, None], scale[:, None])
    both = lambda function: jax.grad(lambda *args: function(make(*args)).sum(), (0, 1))(loc, scale)
    sample = file["out/truncnormal/sample"]
    monkeypatch.setattr(action_distributions, "truncated_noise", lambda *args: ((sample - loc) / scale)[:, None])
    for name, function, tolerance in (
        ("entropy", lambda dist: dist.entropy(), 1e-4),
        ("logp", lambda dist: dist.log_prob(event[:, None]), 1e-5),
        ("sample", lambda dist: dist.sample(jax.random.key(0))[:, 0], 1e-5),
    ):
        close(function(make(loc, scale)), file[f"out/truncnormal/{name}"], tolerance)
        for which, grad in zip(("loc", "scale"), both(function), strict=True):
            close(grad, file[f"grad/truncnormal/{name}_{which}"], 1e-4)
    close(make(loc, scale).mode()[:, 0], file["out/truncnormal/mode"], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize(
    ("forward", "balance", "free", "avg"),
    [*itertools.product((False, True), (0.5, 0.8), (0.0, 1.0, 4.0), (False, True))],
)
def test_kl_loss_equals_the_authors(file, forward, balance, free, avg):
    name = f"forward{forward:d}_balance{balance}_free{free:.0f}_avg{avg:d}"
    # At exactly 0.5 the authors' code takes another branch, which has a name of its own here.
    plain = balance == 0.5
    free_mode = "avg" if avg and not plain else "step"

    def loss(post, prior):
        return kl.kl_loss(
            latents.Categorical(post), latents.Categorical(prior), mode="plain" if plain else "balanced",
            balance=balance, free_nats=free, free_mode=free_mode, forward=forward,
        )  # fmt: skip

    given = [jnp.asarray(file[f"in/kl/{which}_logit"]) for which in ("post", "prior")]
    (value, entries), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*given)
    close(value, file[f"out/kl/{name}/loss"], 1e-5)
    close(entries, file[f"out/kl/{name}/value"], 1e-5)
    for which, grad in zip(("post", "prior"), grads, strict=True):
        relative(grad, file[f"grad/kl/{name}/{which}_logit"])


def test_lambda_returns_equal_the_authors(file):
    given = file.tree("in/lambda_return")
    value = np.concatenate([given["value"][1:], given["bootstrap"][None]])
    out = returns.lambda_returns(given["reward"], given["pcont"], value, given["lambda_"])
    close(out, file["out/lambda_return/ret"], 1e-5)


@pytest.mark.parametrize("section", ["optim_default", "optim_tight"])
def test_optimizer_equals_the_authors_over_three_steps(file, section):
    settings = file.config[section]
    chain = optim.clipped_adam_tf(settings["lr"], settings["eps"], settings["clip"], settings["wd"])
    params = {name: jnp.asarray(value) for name, value in file.tree("params/optim").items()}
    start, state = params, chain.init(params)
    for t, expected in enumerate(file[f"out/{section}/grad_norm"]):
        grads = {name: jnp.asarray(value[t]) for name, value in file.tree("in/optim/grads").items()}
        params, state, norm = one_step(chain, grads, state, params)
        close(norm, expected, 1e-5)
        for name, value in params.items():
            theirs = file[f"out/{section}/params/{name}"][t]
            assert stepped(value, theirs, start[name], settings["lr"], t + 1, 1e-5) > 100


@pytest.mark.parametrize(("section", "rate", "every"), [("slow_hard_every3", 1.0, 3), ("slow_soft_every2", 0.3, 2)])
def test_slow_critic_equals_the_authors(file, section, rate, every):
    fast, slow = file.tree("in/slow/fast_params/critic"), file.tree("params/slow_target_init/critic")
    for t in range(len(next(iter(fast.values())))):
        now = {name: value[t] for name, value in fast.items()}
        slow = optim.soft_update(now, slow, 1.0 if t == 0 else rate, t, every)
        for name, value in slow.items():
            close(value, file[f"out/{section}/target_params/critic/{name}"][t], 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The whole agent


class Official:
    """An official agent's weights, its batch in our order, and our functions on them."""

    def __init__(self, file, section):
        self.file, self.section, sizes = file, section, file.config["sizes"]
        settings = file.config[section]
        given = file.tree(f"in/{section}")
        self.given, self.discrete = given, settings["actor_dist"] == "onehot"
        image = Box(0, 255, given["image"].shape[2:], "uint8")
        actions = given["action"].shape[-1]
        self.spec = EnvSpec({"image": image}, Discrete(actions) if self.discrete else Box(-1.0, 1.0, (actions,)))
        opts = {name: settings[f"{name}_opt"] for name in ("model", "actor", "critic")}
        self.config = v2.DreamerV2Config(
            **{name: sizes[name] for name in ("deter", "hidden", "stoch", "classes", "units")},
            depth=settings["enc_depth"], reward_transform=settings["clip_rewards"],
            kl_balance=settings["kl"]["balance"], free_nats=settings["kl"]["free"],
            free_mode="avg" if settings["kl"]["free_avg"] else "step", kl_scale=settings["loss_scales"]["kl"],
            reward_scale=settings["loss_scales"]["reward"], cont_scale=settings["loss_scales"]["discount"],
            use_continue=settings["pred_discount"], horizon=settings["horizon"], discount=settings["discount"],
            lambda_=settings["discount_lambda"], actor_grad_mix=settings["actor_grad_mix"],
            entropy_scale=settings["actor_ent"], slow_critic_every=settings["slow_target_update"],
            **{f"{name}_lr": opt["lr"] for name, opt in opts.items()}, epsilon=opts["model"]["eps"],
            grad_clip=opts["model"]["clip"], weight_decay=opts["model"]["wd"], batch_size=sizes["B"],
            length=sizes["T"], prefill=100, replay_capacity=1000,
            **{f"{head}_layers": settings["head_layers"] for head in ("reward", "cont", "actor", "critic")},
        )  # fmt: skip
        assert v2.actor_gradient(self.spec, self.config) == settings["default_actor_grad"]
        self.parts = v2.assemble(self.spec, self.config)
        self.params = tree(file.tree(f"params/{section}"), self.discrete)
        step = {name: jnp.asarray(swap(given[name])) for name in ("reward", "is_first", "is_last", "is_terminal")}
        self.step = TimeStep({"image": jnp.asarray(swap(given["image"]))}, **step)
        self.prev_action = jnp.asarray(swap(given["action"]))  # theirs led to the step

    def out(self, name):
        return self.file[f"out/{self.section}/{name}"]

    def world_loss(self, world):
        keys = jax.random.split(jax.random.key(0), self.prev_action.shape[1])
        return v2.world_model_loss(self.parts, world, keys, self.prev_action, self.step)

    @functools.cached_property
    def start(self):
        """Posterior states and terminal flags, rows in their (batch, time) order."""
        post = {name: jnp.asarray(self.out(f"post/{name}")) for name in ("deter", "stoch", "logit")}
        rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in post.items()}
        state = LatentState(rows["deter"], rows["stoch"], latents.Categorical(rows["logit"]))
        return state, jnp.asarray(self.given["is_terminal"]).reshape(-1)

    def imagine(self, actor):
        keys = jax.random.split(jax.random.key(0), self.start[1].shape[0])
        return v2.imagine_behavior(self.parts, self.params, actor, keys, *self.start)

    def check_grads(self, grads, prefix):
        """Gradients by module against those recorded under `prefix`."""
        ours, recorded = flatten(grads), self.file.tree(f"grad/{self.section}/{prefix}")
        assert len(recorded) > 8
        for name, theirs in recorded.items():
            relative(ours[our_name(name, self.discrete)], theirs)


@functools.cache
def official(section):
    return Official(load("dreamer_v2"), section)


@pytest.fixture(params=["agent_disc", pytest.param("agent_cont", marks=pytest.mark.slow)])
def agent(request):
    return official(request.param)


def test_world_model_losses_equal_the_authors(agent, most_likely):
    total, (losses, states, metrics) = jax.jit(agent.world_loss)(optim.apart(agent.params)["model"])
    close(total, agent.out("model_loss"), 1e-5)
    names = {"kl": "kl", "reward": "reward", "decode/image": "image"}
    names |= {"cont": "discount"} if agent.config.use_continue else {}
    for ours, theirs in names.items():
        tolerance = 1e-4 if theirs == "image" else 1e-5
        close(losses[ours].mean(), agent.out(f"model_losses/{theirs}_loss"), tolerance)
        if ours != "kl":
            close(-swap(losses[ours]), agent.out(f"likes/{theirs}"), tolerance)
    check_states(agent.config, states, {name: agent.out(f"post/{name}") for name in ("deter", "stoch", "logit")})
    close(metrics["kl"], agent.out("kl_value").mean(), 1e-5)


@pytest.mark.slow
def test_imagination_behavior_losses_and_their_gradients_equal_the_authors_in_all_modes(agent, most_likely):
    modes = ("reinforce", "dynamics", "both")

    @jax.jit
    def everything(trained):
        def means(trained):
            imagined = agent.imagine(trained["actor"])
            feat = jax.lax.stop_gradient(imagined.feat)
            policy = v2.policy_dist(agent.parts, trained["actor"], feat[:-2])
            critic = v2.critic_dist(agent.parts, trained["critic"], feat[:-1])
            losses = [v2.behavior_losses(policy, critic, imagined, agent.config, mode) for mode in modes]
            terms = [x["actor"].mean() for x, _ in losses] + [losses[0][0]["critic"].mean()]
            return jnp.stack(terms), (imagined, losses[0][1])

        terms, pullback, aux = jax.vjp(means, trained, has_aux=True)
        return terms, aux, jax.vmap(pullback)(jnp.eye(len(terms)))[0]

    terms, (imagined, metrics), grads = everything({name: agent.params[name] for name in ("actor", "critic")})
    # An action of index k led to state k there, and leads from state k here.
    close(imagined.action, agent.out("imagine/action")[1:], 1e-5)
    assert not agent.out("imagine/action")[0].any()
    close(imagined.reward, agent.out("imagine/reward"), 1e-5)
    close(imagined.discount, agent.out("imagine/discount"), 1e-5)
    stoch = agent.out("imagine/stoch").reshape(*imagined.feat.shape[:2], -1)
    close(imagined.feat, np.concatenate([stoch, agent.out("imagine/deter")], -1), 1e-5)
    close(imagined.value, agent.out("target_value"), 1e-5)
    close(v2.targets(imagined, agent.config), agent.out("target"), 1e-5)
    close(returns.discount_weights_before(imagined.discount), agent.out("imagine/weight"), 1e-5)
    close(metrics["policy_entropy"], agent.out("actor_entropy"), 1e-4)
    for index, mode in enumerate(modes):
        close(terms[index], agent.out(f"actor_loss_{mode}"), 1e-5)
        agent.check_grads({"actor": jax.tree.map(lambda x, i=index: x[i], grads["actor"])}, mode)
    close(terms[-1], agent.out("critic_loss"), 1e-5)
    recorded = agent.file.tree(f"grad/{agent.section}/critic")
    ours = flatten({"critic": jax.tree.map(lambda x: x[-1], grads["critic"])})
    for name, theirs in recorded.items():
        relative(ours[our_name(f"critic/{name}", agent.discrete)], theirs)


def test_losses_on_a_given_trajectory_equal_the_authors(agent):
    given = agent.file.tree(f"in/{agent.section}_given_seq")
    out = agent.file.tree(f"out/{agent.section}_given_seq")
    value = v2.critic_dist(agent.parts, agent.params["slow_critic"], given["feat"]).mean()
    imagined = v2.Imagined(given["feat"], jnp.asarray(given["action"][1:]), given["reward"], given["discount"], value)
    close(v2.targets(imagined, agent.config), out["target"], 1e-5)
    policy = v2.policy_dist(agent.parts, agent.params["actor"], given["feat"][:-2])
    critic = v2.critic_dist(agent.parts, agent.params["critic"], given["feat"][:-1])
    for mode in ("reinforce", "dynamics", "both"):
        # Their weights are given too; ours follow from the discounts.
        losses, _ = v2.behavior_losses(policy, critic, imagined, agent.config, mode)
        weights = returns.discount_weights_before(given["discount"])
        rescaled = {name: x / weights[: len(x)] * given["weight"][: len(x)] for name, x in losses.items()}
        close(rescaled["actor"].mean(), out[f"actor_loss_{mode}"], 1e-5)
        close(rescaled["critic"].mean(), out["critic_loss"], 1e-5)


def test_the_policy_equals_the_authors_with_the_state_carried(agent, most_likely):
    ours = v2.dreamer_v2(agent.spec, agent.config)
    carry = ours.act_carry(agent.params, agent.step.reward.shape[1])
    act = jax.jit(lambda carry, step: ours.act(agent.params, jax.random.key(0), carry, step, explore=False))
    for t in range(agent.out("policy_actions").shape[1]):
        carry, action, _ = act(carry, jax.tree.map(lambda x, t=t: x[t], agent.step))
        close(action, agent.out("policy_actions")[:, t], 1e-5)


@pytest.mark.slow
def test_gradients_of_the_world_model_and_three_training_steps_equal_the_authors(agent, most_likely):
    ours = v2.dreamer_v2(agent.spec, agent.config)
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ours.init, jax.random.key(0))[1])
    params = dict(agent.params)
    state = AgentState(params, opt_state, (), jnp.int32(0), {"slow_critic": params.pop("slow_critic")})
    # Our records hold the action that was chosen on seeing the step.
    action = jnp.concatenate([agent.prev_action[1:], jnp.full_like(agent.prev_action[:1], 9.0)])
    batch = Trajectory(agent.step, action, jnp.ones(action.shape[:2], bool), ())
    learn = jax.jit(ours.recipe.stages[-1].updates[0].fn)
    names = {
        "loss/model": "model_loss", "loss/kl": "kl_loss", "loss/decode/image": "image_loss", "loss/actor": "actor_loss",
        "loss/reward": "reward_loss", "loss/critic": "critic_loss", "return_mean": "critic_target",
        "grad_norm/model": "model_grad_norm", "grad_norm/actor": "actor_grad_norm",
        "grad_norm/critic": "critic_grad_norm",
    }  # fmt: skip
    steps = len(agent.out("train3/model_loss"))
    for t in range(steps):
        state, metrics, latent = learn(state, jax.random.key(t), batch)
        assert latent is None
        for mine, theirs in names.items():
            close(metrics[mine], agent.out(f"train3/{theirs}")[t], 1e-4)
        if t == 0:  # Adam's first moment is a tenth of the clipped gradient.
            scale = 10 * max(1.0, float(metrics["grad_norm/model"]) / agent.config.grad_clip)
            moments = optax.tree.get(state.opt_state["model"], "mu")
            grads = flat.unflatten(scale * moments, optim.apart(state.params)["model"])
            agent.check_grads(grads, "wm")
            for name, norm in agent.file.tree(f"out/{agent.section}/grad_norm_per_tensor/wm").items():
                found = np.linalg.norm(np.asarray(flatten(grads)[our_name(name, agent.discrete)]).ravel())
                assert abs(found - norm) <= 1e-4 * max(norm, 1e-3), name
    found, start = flatten(state.variables), flatten(agent.params)
    rates = {"actor": agent.config.actor_lr, "critic": agent.config.critic_lr, "slow_critic": agent.config.critic_lr}
    for name, theirs in agent.file.tree(f"out/{agent.section}/train3_params").items():
        name = our_name(name, agent.discrete)
        rate = rates.get(name.split("/")[0], agent.config.model_lr)
        moved = stepped(found[name], theirs, start[name], rate, steps)
        assert not name.endswith("kernel") or moved > 10, name
