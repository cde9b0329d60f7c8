"""DreamerV1 beside numbers recorded from the authors' code, given the same weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.closeness import CUTS, close, flatten, relative, stepped, swap
from tests.agents.dreamer_v1_weights import our_name, tree
from tests.parity import load
from tests.test_optim import one_step
from wmjax import dreaming, optim
from wmjax.agents import dreamer_v1 as v1
from wmjax.nets import dreamer, strided_codec
from wmjax.nets.gru import GRU
from wmjax.nets.heads import Head
from wmjax.nets.rssm import DenseRSSM, LatentState, feature
from wmjax.ops import action_distributions, distributions, flat, latents, noise, returns
from wmjax.types import Box, Discrete, EnvSpec, TimeStep, Trajectory

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def file():
    return load("dreamer_v1")


@pytest.fixture
def above_the_mean(monkeypatch):
    """The recordings drew 0.3 deviations above the mean, and the most likely discrete action."""

    def draw(key, logits):
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        onehot = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
        return onehot + (probs - jax.lax.stop_gradient(probs))

    monkeypatch.setattr(distributions, "straight_through_sample", draw)
    monkeypatch.setattr(noise, "normal", lambda key, shape: jnp.full(shape, 0.3))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def test_gru_equals_the_cell_of_the_authors(file):
    params = {name: jnp.asarray(value) for name, value in file.tree("params/rssm/gru").items()}
    cell = GRU(file.config["sizes"]["deter"])
    h, x = file["in/gru/h"], file["in/gru/x"]
    close(cell.apply({"params": params}, h, x), file["out/gru/h"], 1e-5)
    # Gates in another order, or with one bias for all, give other numbers.
    columns = np.roll(np.arange(params["bias"].shape[1]), len(h[0]))
    for other in (
        {name: value[..., columns] for name, value in params.items()},
        params | {"bias": jnp.stack([params["bias"].sum(0), jnp.zeros_like(params["bias"][0])])},
    ):
        assert np.abs(cell.apply({"params": other}, h, x) - file["out/gru/h"]).max() > 1e-3


def rssm_of(file):
    sizes = file.config["sizes"]
    config = v1.DreamerV1Config(deter=sizes["deter"], hidden=sizes["deter"], stoch=sizes["stoch"])
    rssm = DenseRSSM(sizes["deter"], sizes["deter"], 2 * sizes["stoch"], file["in/rssm/embed"].shape[-1])
    nets = dreamer.Networks(*[None] * len(dreamer.Networks._fields))._replace(rssm=rssm)
    params = tree({f"rssm/{k}": v for k, v in file.tree("params/rssm").items()})
    return config, rssm, dreamer.world_model(nets, v1.latent_kind(config), feature, None, config.discount), params


def check_states(states, expected):
    found = {"deter": states.deter, "stoch": states.stoch, "mean": states.dist.mean, "std": states.dist.std}
    for name, value in found.items():
        close(swap(value), expected[name], 1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_observe_and_imagine_equal_the_authors(file, cut, above_the_mean):
    file = cut(file, "rssm")
    config, rssm, model, params = rssm_of(file)
    given = file.tree("in/rssm")
    dist = latents.Gaussian(given["state/mean"], given["state/std"])
    start = LatentState(given["state/deter"], given["state/stoch"], dist)
    embed = rssm.apply({"params": params["rssm"]}, swap(given["embed"]), method="project")
    action, no = jnp.asarray(swap(given["action"])), jnp.zeros(swap(given["embed"]).shape[:2], bool)
    for before, prefix in ((start, ""), (model.init_state(params, len(given["state/deter"])), "zero_")):
        _, states = dreaming.observe(model, params, jax.random.key(0), before, action, embed, no)
        check_states(states, file.tree(f"out/rssm/{prefix}post"))
        prior = v1.latent_kind(config).dist(rssm.apply({"params": params["rssm"]}, states.deter, method="prior"))
        prior = LatentState(states.deter, prior.sample(jax.random.key(0)), prior)
        check_states(prior, file.tree(f"out/rssm/{prefix}prior"))
        if before is start:
            close(swap(feature(states)), file["out/rssm/feat"], 1e-5)
            close(swap(states.dist.kl(prior.dist).sum(-1)), file["out/rssm/kl"], 1e-5)
    action = jnp.asarray(swap(given["imagine_action"]))
    policy, carry = dreaming.given_actions(action)
    _, imagined, _ = dreaming.imagine(model, params, jax.random.key(0), start, policy, len(action), policy_carry=carry)
    check_states(jax.tree.map(lambda x: x[1:], imagined), file.tree("out/rssm/imagine"))


def test_encoder_and_decoder_equal_the_authors(file):
    image = jnp.asarray(file["in/encode/image"])
    space = Box(0, 255, image.shape[2:], "uint8")
    style = dict(spaces=(("image", space),), depth=file.config["sizes"]["depth"], units=(), conv_activation="relu")
    params = lambda name: tree({f"{name}/{k}": v for k, v in file.tree(f"params/{name}").items()})
    encoder, decoder = strided_codec.StridedEncoder(**style), strided_codec.StridedDecoder(**style)
    embed = jax.jit(encoder.apply)({"params": params("encode")["encoder"]}, {"image": image})
    close(embed, file["out/encode/embed"], 1e-4)
    output = jax.jit(decoder.apply)({"params": params("decode")["decoder"]}, file["in/decode/feat"])["image"]
    close(output, file["out/decode/mean"], 1e-4)
    close(strided_codec.log_prob(output, image, space), file["out/decode/logp"], 1e-4)


def head_of(file, section, module, discrete=True):
    (params,) = tree({f"{module}/{k}": v for k, v in file.tree(f"params/{section}").items()}, discrete).values()
    units = tuple(layer["bias"].shape[0] for layer in params["mlp"].values())
    sizes = tuple((name, layer["bias"].shape[0]) for name, layer in params.items() if name != "mlp")
    return Head(sizes, units, norm="none", activation="elu").apply({"params": params}, file["in/heads/feat"])


def test_heads_equal_the_authors(file):
    target = jnp.asarray(file["in/heads/target"])
    reward = distributions.UnitNormal(head_of(file, "reward_head", "reward")["mean"][..., 0])
    close(reward.mean(), file["out/reward_head/mode"], 1e-5)
    close(reward.log_prob(target), file["out/reward_head/logp"], 1e-5)
    value = distributions.UnitNormal(head_of(file, "value_head", "value")["mean"][..., 0])
    for name, found in (("mode", value.mean()), ("logp", value.log_prob(target))):
        if f"out/value_head/{name}" in file:
            close(found, file[f"out/value_head/{name}"], 1e-5)
    logits = head_of(file, "pcont_head", "pcont")["logits"][..., 0]
    close(jax.nn.sigmoid(logits), file["out/pcont_head/mean"], 1e-5)
    # This recording's targets were NumPy arrays, which TensorFlow Probability rounds down to the Bernoulli's integers;
    # those of the whole agent are tensors and stay soft (`pcont_logp` below).
    soft = jnp.asarray(file["in/heads/pcont_target"])
    found = [distributions.bernoulli_log_prob(logits, given) for given in (soft, jnp.floor(soft))]
    assert min(np.abs(x - file["out/pcont_head/logp"]).max() for x in found) < 1e-5


def test_discrete_actor_equals_the_authors(file):
    logits = head_of(file, "actor_onehot", "actor")["logits"]
    out = file.tree("out/actor_onehot")
    policy = distributions.OneHotCategorical(logits)
    close(jax.nn.log_softmax(logits), jax.nn.log_softmax(out["logits"]), 1e-5)
    close(policy.probs, out["probs"], 1e-5)
    close(policy.log_prob(jnp.asarray(file["in/actor_onehot/event"])), out["logp"], 1e-5)
    close(policy.entropy(), out["entropy"], 1e-5)
    close(policy.mode(), out["mode"], 0)


def test_continuous_actor_equals_the_authors_with_mode_and_entropy_of_given_draws(file, monkeypatch):
    raw = head_of(file, "actor_tanh", "actor", discrete=False)["mean_std"]
    policy = action_distributions.tanh_normal(*jnp.split(raw, 2, -1))
    out, given = file.tree("out/actor_tanh"), file.tree("in/actor_tanh")
    close(policy.mean, out["normal_mean"], 1e-5)
    close(policy.std, out["normal_std"], 1e-5)
    key = jax.random.key(0)
    monkeypatch.setattr(noise, "normal", lambda key, shape: jnp.asarray(given["eps"]))
    sample = policy.sample(key)
    close(sample, out["sample"], 1e-5)
    close(policy.log_prob(jnp.asarray(given["event"])), out["event_logp"], 1e-4)
    # Their density of a sample knows the normal variable that it came from.
    close(policy._log_prob_of(policy.mean + policy.std * given["eps"]), out["sample_logp"], 1e-5)
    draws, count = jnp.moveaxis(given["mode_eps"], 0, -2), len(given["mode_eps"])
    monkeypatch.setattr(noise, "normal", lambda key, shape: draws)
    close(policy.mode(key, count), out["mode"], 1e-5)
    close(policy._log_prob_of(policy._draw(key, count)), out["mode_samples_logp"], 1e-5)
    close(policy.entropy(key, count), out["entropy_mc"], 1e-5)
    close(jnp.tanh(policy._draw(key, count)).mean(0), out["mean_mc"], 1e-5)


def test_lambda_returns_equal_the_authors(file):
    given = file.tree("in/lambda_return")
    value = np.concatenate([given["value"][1:], given["bootstrap"][None]])
    out = returns.lambda_returns(given["reward"], given["pcont"], value, given["lambda_"])
    close(out, file["out/lambda_return/ret"], 1e-5)


@pytest.mark.parametrize("section", ["optim_clip100", "optim_clip1"])
def test_optimizer_equals_the_authors_over_three_steps(file, section):
    settings = file.config[section]
    chain = optim.clipped_adam_tf(settings["lr"], settings["eps"], settings["clip"])
    params = {name: jnp.asarray(value) for name, value in file.tree("params/optim").items()}
    start, state = params, chain.init(params)
    for t, expected in enumerate(file[f"out/{section}/grad_norm"]):
        grads = {name: jnp.asarray(value[t]) for name, value in file.tree("in/optim/grads").items()}
        params, state, norm = one_step(chain, grads, state, params)
        close(norm, expected, 1e-5)
        for name, value in params.items():
            theirs = file[f"out/{section}/params/{name}"][t]
            assert stepped(value, theirs, start[name], settings["lr"], t + 1, 1e-5) > 100


# ---------------------------------------------------------------------------------------------------------------------
# The whole agent


class Official:
    """An official agent's weights, its batch in our order, and our functions on them."""

    def __init__(self, file, section):
        self.file, self.section, sizes = file, section, file.config["sizes"]
        settings = file.config[section]
        given = file.tree(f"in/{section}")
        self.discrete = section == "train_onehot_pcont"
        image = Box(0, 255, given["image"].shape[2:], "uint8")
        actions = given["action"].shape[-1]
        self.spec = EnvSpec({"image": image}, Discrete(actions) if self.discrete else Box(-1.0, 1.0, (actions,)))
        self.config = v1.DreamerV1Config(
            deter=sizes["deter"], hidden=sizes["deter"], stoch=sizes["stoch"], depth=settings["cnn_depth"],
            units=settings["num_units"], reward_layers=settings["reward_layers"], cont_layers=settings["pcont_layers"],
            actor_layers=settings["actor_layers"], critic_layers=settings["value_layers"],
            free_nats=settings["free_nats"], kl_scale=settings["kl_scale"], cont_scale=settings["pcont_scale"],
            use_continue=settings["pcont"], horizon=settings["horizon"], discount=settings["discount"],
            lambda_=settings["disclam"], grad_clip=settings["grad_clip"], model_lr=settings["model_lr"],
            actor_lr=settings["actor_lr"], critic_lr=settings["value_lr"], batch_size=sizes["B"], length=sizes["T"],
            prefill=100, replay_capacity=1000,
        )  # fmt: skip
        self.parts = v1.assemble(self.spec, self.config)
        self.params = tree(file.tree(f"params/{section}"), self.discrete)
        no = jnp.zeros(given["reward"].shape[::-1], bool)
        terminal = jnp.asarray(swap(given["discount"])) == 0
        obs = {"image": jnp.asarray(swap(given["image"]))}
        self.step = TimeStep(obs, jnp.asarray(swap(given["reward"])), no, no, terminal)
        self.prev_action = jnp.asarray(swap(given["action"]))  # theirs led to the step

    def out(self, name):
        return self.file[f"out/{self.section}/{name}"]


@functools.cache
def official(section):
    return Official(load("dreamer_v1"), section)


@pytest.fixture(params=["train_tanh", "train_onehot_pcont"])
def agent(request, monkeypatch):
    if request.param == "train_onehot_pcont":
        # They leave out the last step of each sequence, which alone can be terminal there; this batch has others.
        counts = lambda step, config: jnp.ones(step.reward.shape).at[-1].set(0.0)
        monkeypatch.setattr(v1, "start_counts", counts)
    return official(request.param)


def by_row(agent, imagined):
    """`[H, T * B, ...]` in our order of starts -> `[H, N, ...]` in theirs, without the starts that do not count."""
    length, batch = agent.step.reward.shape
    x = np.asarray(imagined).reshape(-1, length, batch, *imagined.shape[2:]).swapaxes(1, 2)
    x = x[:, :, :-1] if agent.config.use_continue else x
    return x.reshape(len(x), -1, *x.shape[3:])


def test_losses_states_and_imagined_trajectories_equal_the_authors(agent, above_the_mean):
    keys = jax.random.split(jax.random.key(0), agent.prev_action.shape[1])
    run = jax.jit(lambda params: v1.loss(agent.parts, params, keys, agent.prev_action, agent.step))
    _, (losses, states, imagined, metrics) = run(agent.params)
    check_states(states, agent.file.tree(f"out/{agent.section}/post"))
    close(metrics["loss/model"], agent.out("model_loss")[0], 1e-5)
    close(losses["actor"], agent.out("actor_loss")[0], 1e-5)
    close(losses["critic"], agent.out("value_loss")[0], 1e-5)
    close(metrics["kl"], agent.out("kl").mean(), 1e-5)
    close(-swap(losses["decode/image"]), agent.out("image_logp"), 1e-4)
    close(-swap(losses["reward"]), agent.out("reward_logp"), 1e-5)
    # The horizon's states without the start, and returns of all of them but the last.
    close(by_row(agent, imagined.feat), agent.out("imag_feat"), 1e-5)
    close(by_row(agent, imagined.reward), agent.out("imag_reward"), 1e-5)
    close(by_row(agent, imagined.value), agent.out("imag_value"), 1e-5)
    close(by_row(agent, v1.targets(imagined, agent.config)), agent.out("imag_return"), 1e-5)
    if agent.config.use_continue:
        close(-swap(losses["cont"]), agent.out("pcont_logp"), 1e-5)
        close(by_row(agent, imagined.discount), agent.out("imag_pcont"), 1e-5)


@pytest.mark.slow
def test_gradients_and_three_training_steps_equal_the_authors(agent, above_the_mean):
    ours = v1.dreamer_v1(agent.spec, agent.config)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(ours.init, jax.random.key(0)))
    state = start._replace(params=agent.params)
    # The record in front holds the action that led to the first trained step; the last action is not used.
    step = jax.tree.map(lambda x: jnp.concatenate([x[:1], x]), agent.step)
    action = jnp.concatenate([agent.prev_action, jnp.full_like(agent.prev_action[:1], 9.0)])
    batch = Trajectory(step, action, jnp.ones(action.shape[:2], bool), ())
    learn = jax.jit(ours.recipe.stages[-1].updates[0].fn)
    groups = {"model": "model", "actor": "actor", "critic": "value"}
    steps = len(agent.out("model_loss"))
    for t in range(steps):
        state, metrics, _ = learn(state, jax.random.key(t), batch)
        for mine, theirs in groups.items():
            close(metrics[f"loss/{mine}"], agent.out(f"{theirs}_loss")[t], 1e-4)
            close(metrics[f"grad_norm/{mine}"], agent.out(f"{theirs}_grad_norm")[t], 1e-4)
        if t == 0:
            check_gradients(agent, state.opt_state, metrics, groups)
    found, start = flatten(state.params), flatten(agent.params)
    for name, theirs in agent.file.tree(f"out/{agent.section}/params_after3").items():
        name = our_name(name, agent.discrete)
        rate = agent.config.model_lr if name.startswith("reward") else agent.config.actor_lr
        moved = stepped(found[name], theirs, start[name], rate, steps)
        assert not name.endswith("kernel") or moved > 10, name


def check_gradients(agent, opt_state, metrics, groups):
    """Adam's first moment is a tenth of the clipped gradient."""
    for mine, theirs in groups.items():
        scale = 10 * max(1.0, float(metrics[f"grad_norm/{mine}"]) / agent.config.grad_clip)
        grads = flat.unflatten(scale * optax.tree.get(opt_state[mine], "mu"), optim.apart(agent.params)[mine])
        grads = flatten(grads if mine == "model" else {mine: grads})
        recorded = agent.file.tree(f"grad/{agent.section}/{theirs}")
        norms = agent.file.tree(f"out/{agent.section}/grad_norm_per_tensor/{theirs}")
        assert len(recorded) > 6
        for name, gradient in recorded.items():
            relative(grads[our_name(name, agent.discrete)], gradient)
        for name, norm in norms.items():
            ours = np.linalg.norm(np.asarray(grads[our_name(name, agent.discrete)]).ravel())
            assert abs(ours - norm) <= 1e-4 * max(norm, 1e-3), name
