"""World Models beside numbers recorded from Tallec's PyTorch code, and from the formulas of the authors' own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import memory, vision
from wmjax.authors.world_models import mixture_columns
from wmjax.nets.mdn import MDNRNN
from wmjax.nets.mlp import call
from wmjax.nets.vae import Decoder, Encoder
from wmjax.types import TimeStep

pytestmark = pytest.mark.parity


def close(ours, theirs, tolerance=1e-5):
    """Largest difference, relative to the largest entry where that is above 1."""
    theirs = np.asarray(theirs, np.float64)
    assert np.shape(ours) == theirs.shape
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs))
    assert error <= tolerance * max(1.0, np.max(np.abs(theirs))), f"off by {error}"


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder, from PyTorch


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def vae_params(w):
    """PyTorch's weights in our layout. Features before a linear layer are (C, H, W) there and (H, W, C) here."""

    def conv(name):
        return {"kernel": w[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": w[f"{name}.bias"]}

    def deconv(name):  # (in, out, kh, kw) -> (kh, kw, out, in), the adjoint's layout: nothing is flipped
        return {"kernel": w[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": w[f"{name}.bias"]}

    channels = w["encoder.conv4.weight"].shape[0]
    side = int((w["encoder.fc_mu.weight"].shape[1] / channels) ** 0.5)

    def head(name, scale=1):
        kernel = w[f"{name}.weight"].reshape(-1, channels, side, side).transpose(2, 3, 1, 0)
        return {"kernel": scale * kernel.reshape(-1, kernel.shape[-1]), "bias": scale * w[f"{name}.bias"]}

    # Their second head is the logarithm of the deviation, ours that of the variance.
    encoder = {f"conv{i}": conv(f"encoder.conv{i + 1}") for i in range(4)}
    encoder |= {"mu": head("encoder.fc_mu"), "logvar": head("encoder.fc_logsigma", 2)}
    decoder = {f"deconv{i}": deconv(f"decoder.deconv{i + 1}") for i in range(4)}
    decoder["linear"] = {"kernel": w["decoder.fc1.weight"].T, "bias": w["decoder.fc1.bias"]}
    return {"encoder": encoder, "decoder": decoder}


def defined_weights(file):
    """The weights of the full-size network by the rule that defines them."""
    weights = {}
    with np.errstate(over="ignore"):
        for p, name in enumerate(file["full/names"]):
            shape = [int(n) for n in str(file["full/shapes"][p]).replace("x", ",").strip("()").split(",") if n.strip()]
            x = np.uint32((p + 1) * 0x9E3779B1 & 0xFFFFFFFF) + np.arange(np.prod(shape), dtype=np.uint32)
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            x = x ^ (x >> np.uint32(16))
            value = (2 * x.astype(np.float64) / 2**32 - 1) * file["full/bounds"][p]
            weights[str(name)] = value.astype(np.float32).reshape(shape)
    return weights


@pytest.fixture(scope="module")
def vae():
    return load("wm_ctallec_vae")


def make_vae(w):
    depth, latent = w["encoder.conv1.weight"].shape[0], w["encoder.fc_mu.weight"].shape[0]
    encoder, decoder = (
        Encoder(latent, depth),
        Decoder(64, w["decoder.deconv4.weight"].shape[1], w["decoder.deconv3.weight"].shape[1], relu=True),
    )
    return wm.Networks(encoder, decoder, None), vae_params(w)


@pytest.mark.slow
def test_the_autoencoder_equals_tallecs(vae):
    nets, params = make_vae(vae.tree("w"))
    mu, logvar = call(nets.encoder, params["encoder"], nhwc(vae["in/images_u8"]))
    close(mu, vae["out/mu"])
    close(logvar / 2, vae["out/logsigma"])
    z = mu + jnp.exp(logvar / 2) * vae["in/eps"]
    close(z, vae["out/z"])
    close(call(nets.decoder, params["decoder"], mu), nhwc(vae["out/recon_of_mu"]))
    close(call(nets.decoder, params["decoder"], z), nhwc(vae["out/recon_of_z"]))


@pytest.mark.slow
def test_the_autoencoder_of_published_size_equals_tallecs(vae):
    w = defined_weights(vae)
    np.testing.assert_array_equal(w["decoder.deconv2.weight"][3, 2, 1, 0:4], vae["full/probe"])
    nets, params = make_vae(w)
    mu, logvar = call(nets.encoder, params["encoder"], nhwc(vae["in/images_u8"]))
    close(mu, vae["full/mu"])
    close(logvar / 2, vae["full/logsigma"])
    close(call(nets.decoder, params["decoder"], mu), nhwc(vae["full/recon_of_mu"]))


@pytest.mark.slow
def test_the_loss_of_the_autoencoder_and_its_gradients_equal_tallecs(vae, monkeypatch):
    nets, params = make_vae(vae.tree("w"))
    monkeypatch.setattr(vision, "sample_latent", lambda key, mu, logvar: mu + jnp.exp(logvar / 2) * vae["in/eps"])
    config = wm.WorldModelsConfig(latent=vae["in/eps"].shape[1], kl_tolerance=0.0, reduction="sum")
    objective = lambda params: vision.vision_loss(nets, config, params, None, nhwc(vae["in/images_u8"]))
    (total, (metrics, _)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    rows = vae["in/eps"].shape[0]
    close(metrics["recon"] * rows, vae["loss/mse_sum"])
    close(metrics["kl"] * rows, vae["loss/kl_sum"])
    close(total, vae["loss/total"])
    # The chain rule of logvar = 2 logsigma: their gradient is twice ours, whose weights are twice theirs.
    theirs = dict(zip(map(str, vae["grad/names"]), vae["grad/norms"], strict=True))
    place = {"mu": "encoder.fc_mu", "logvar": "encoder.fc_logsigma", "linear": "decoder.fc1"}
    place |= {f"conv{i}": f"encoder.conv{i + 1}" for i in range(4)}
    place |= {f"deconv{i}": f"decoder.deconv{i + 1}" for i in range(4)}
    compared = 0
    for part in grads.values():
        for layer, leaves in part.items():
            for kind, name in (("kernel", "weight"), ("bias", "bias")):
                factor = 2 if layer == "logvar" else 1
                norm = factor * float(jnp.linalg.norm(leaves[kind].ravel()))
                assert norm == pytest.approx(theirs[f"{place[layer]}.{name}"], rel=1e-4), (layer, kind)
                compared += 1
    assert compared == len(theirs)


def test_the_floor_of_the_kl_is_that_of_the_authors(vae):
    mu, logvar = vae["oracle_floor/mu"], vae["oracle_floor/logvar"]
    kl, floored = vision.kl_floor(mu, logvar, 0.5)
    close(kl, vae["oracle_floor/kl_per_sample"])
    close(jnp.mean(floored), vae["oracle_floor/kl_loss"])
    assert (kl < 0.5 * mu.shape[1]).any() and (kl > 0.5 * mu.shape[1]).any()
    target, recon = (nhwc(vae[name]).astype(np.float32) for name in ("in/images_u8", "out/recon_of_z"))
    close(((recon - target / 255) ** 2).sum((1, 2, 3)), vae["oracle_floor/recon_per_sample"])


# ---------------------------------------------------------------------------------------------------------------------
# The memory, from PyTorch: one mixture for all dimensions


@pytest.fixture(scope="module")
def torch_memory():
    file = load("wm_ctallec_mdnrnn")
    latent, actions, hidden, mixtures = (int(file[f"cfg/{n}"]) for n in ("latents", "actions", "hiddens", "gaussians"))
    net = MDNRNN(latent, actions, hidden, mixtures, "shared", "mse", done_head=True, forget_bias=0.0)
    w = file.tree("w")
    # PyTorch's gates are i, f, g, o, ours i, j (its g), f, o; it has two biases; and it sees the action first.
    gates = lambda x: np.concatenate([np.split(x, 4)[i] for i in (0, 2, 1, 3)])
    inputs = gates(w["rnn.weight_ih_l0"]).T
    inputs = np.concatenate([inputs[actions:], inputs[:actions]])
    bias = gates(w["rnn.bias_ih_l0"] + w["rnn.bias_hh_l0"])
    kernel, out_bias = w["gmm_linear.weight"].T, w["gmm_linear.bias"]
    size = latent * mixtures
    order = np.r_[2 * size : 2 * size + mixtures, 0 : 2 * size]  # weights, means, deviations
    dense = lambda columns: {"kernel": kernel[:, columns], "bias": out_bias[columns]}
    params = {
        "kernel": np.concatenate([inputs, gates(w["rnn.weight_hh_l0"]).T]),
        "bias": bias,
        "mixture_out": dense(order),
        "reward_out": dense([2 * size + mixtures]),
        "done_out": dense([2 * size + mixtures + 1]),
    }
    return file, wm.Networks(None, None, net), params


def outputs(net, params, hidden):
    mixture = call(net, params, hidden, method="predict_latent")
    return mixture, call(net, params, hidden, method="predict_outcome")


def test_the_memory_equals_tallecs_over_a_sequence(torch_memory):
    file, nets, params = torch_memory
    zeros = jnp.zeros((file["in/actions"].shape[1], nets.memory.hidden))
    first = jnp.zeros(file["in/rewards"].shape, bool)
    hidden, _ = memory.unroll(nets, params, zeros, zeros, file["in/latents"], file["in/actions"], first)
    mixture, heads = outputs(nets.memory, params, hidden)
    close(mixture.mean, file["out/mus"])
    close(jnp.exp(mixture.log_std), file["out/sigmas"])
    close(jax.nn.log_softmax(mixture.logits[..., 0]), file["out/logpi"])
    close(heads["reward"][..., 0], file["out/reward"])
    close(heads["done"][..., 0], file["out/done_logit"])
    close(-mixture.log_prob(file["in/next_latents"])[..., 0], file["loss/gmm_unreduced"])


@pytest.mark.slow
def test_the_loss_of_the_memory_and_its_gradients_equal_tallecs(torch_memory):
    file, nets, params = torch_memory
    steps, batch = file["in/rewards"].shape
    first = jnp.zeros((steps, batch), bool)
    zeros = jnp.zeros((batch, nets.memory.hidden))
    heads = lambda params: outputs(nets.memory, params, memory.unroll(
        nets, params, zeros, zeros, file["in/latents"], file["in/actions"], first
    )[0])  # fmt: skip

    def terms(params):
        mixture, out = heads(params)
        gmm = -jnp.mean(mixture.log_prob(file["in/next_latents"]))
        bce = jnp.mean(memory.done_loss(out["done"][..., 0], file["in/terminals"], 1.0))
        return gmm, bce, jnp.mean(memory.reward_loss(out["reward"], file["in/rewards"], "mse"))

    for ours, name in zip(terms(params), ("gmm", "bce", "mse"), strict=True):
        close(ours, file[f"loss/{name}"])
    latent = nets.memory.latent
    total, grads = jax.value_and_grad(lambda params: sum(terms(params)) / (latent + 2))(params)
    close(total, file["loss/total_with_reward"])
    gmm, bce, _ = terms(params)
    close((gmm + bce) / (latent + 1), file["loss/total_without_reward"])
    theirs = dict(zip(map(str, file["grad/names"]), file["grad/norms"], strict=True))
    norm = lambda *xs: float(jnp.sqrt(sum(jnp.sum(x**2) for x in xs)))
    heads_of = lambda kind: [grads[name][kind] for name in ("mixture_out", "reward_out", "done_out")]
    inputs = nets.memory.latent + nets.memory.action
    for ours, name in (
        (norm(grads["kernel"][:inputs]), "rnn.weight_ih_l0"),
        (norm(grads["kernel"][inputs:]), "rnn.weight_hh_l0"),
        (norm(grads["bias"]), "rnn.bias_ih_l0"),
        (norm(grads["bias"]), "rnn.bias_hh_l0"),
        (norm(*heads_of("kernel")), "gmm_linear.weight"),
        (norm(*heads_of("bias")), "gmm_linear.bias"),
    ):
        assert ours == pytest.approx(theirs[name], rel=1e-4), name


def test_one_step_of_the_memory_equals_tallecs(torch_memory):
    file, nets, params = torch_memory
    cell = file.tree("cell_in")
    first = jnp.zeros(len(cell["h"]), bool)
    h, c, mixture, heads = call(
        nets.memory, params, cell["h"], cell["c"], cell["latent"], cell["action"], first, method="everything"
    )
    close(h, file["cell_out/h"])
    close(c, file["cell_out/c"])
    close(mixture.mean, file["cell_out/mus"])
    close(heads["done"][:, 0], file["cell_out/done_logit"])


# ---------------------------------------------------------------------------------------------------------------------
# The memory, from the formulas of the authors' code: a mixture for each dimension


def official_head(kernel, bias, latent, mixtures):
    """Columns of the authors in our order."""
    return {"kernel": mixture_columns(kernel, latent, mixtures), "bias": mixture_columns(bias, latent, mixtures)}


@pytest.fixture(scope="module")
def official():
    return load("wm_mdn_official_layout")


def official_memory(file):
    latent, actions, hidden, mixtures = (int(file[f"cfg/{n}"]) for n in ("latents", "actions", "hiddens", "mixtures"))
    net = MDNRNN(latent, actions, hidden, mixtures)
    params = {"kernel": file["w/lstm_kernel"], "bias": file["w/lstm_bias"]}
    params["mixture_out"] = official_head(file["w/output_w"], file["w/output_b"], latent, mixtures)
    return wm.Networks(None, None, net), params


def swap(x):
    """Batch first <-> time first."""
    return np.swapaxes(x, 0, 1)


def dims_last(x):
    """[..., D, K] -> [..., K, D]."""
    return np.swapaxes(x, -1, -2)


def test_the_memory_equals_the_authors_formulas(official):
    nets, params = official_memory(official)
    z, action = swap(official["in/z"]), swap(official["in/action"])
    zeros = jnp.zeros((z.shape[1], nets.memory.hidden))
    hidden, (h, c) = memory.unroll(nets, params, zeros, zeros, z, action, jnp.zeros(z.shape[:2], bool))
    close(hidden, swap(official["out/h"]))
    close(h, official["out/h"][:, -1])
    close(c, official["out/c"][:, -1])
    mixture, _ = outputs(nets.memory, params, hidden)
    close(jax.nn.log_softmax(mixture.logits, -2), dims_last(swap(official["out/logmix"])))
    close(mixture.mean, dims_last(swap(official["out/mean"])))
    close(mixture.log_std, dims_last(swap(official["out/logstd"])))
    nll = -mixture.log_prob(swap(official["in/next_z"]))
    close(nll, swap(official["loss/nll_per_dim"]))
    close(jnp.mean(nll), official["loss/nll"])


def test_the_loss_of_the_memory_is_the_authors_mean_over_dimensions(official):
    nets, params = official_memory(official)
    # Their targets are not the inputs of the next step, so only the first step is a sequence of ours.
    z = np.stack([official["in/z"][:, 0], official["in/next_z"][:, 0]])
    action = np.stack([official["in/action"][:, 0]] * 2)
    flags = jnp.zeros(z.shape[:2], bool)
    step = TimeStep({}, jnp.zeros(z.shape[:2]), flags, flags, flags)
    zeros = jnp.zeros((z.shape[1], nets.memory.hidden))
    total, _ = memory.memory_loss(nets, wm.WorldModelsConfig(), params, (zeros, zeros), z, action, step)
    close(total, official["loss/nll_per_dim"][:, 0].mean())


def test_temperature_draws_what_the_authors_formulas_draw(official):
    nets, params = official_memory(official)
    z, action = swap(official["in/z"]), swap(official["in/action"])
    zeros = jnp.zeros((z.shape[1], nets.memory.hidden))
    hidden, _ = memory.unroll(nets, params, zeros, zeros, z, action, jnp.zeros(z.shape[:2], bool))
    mixture, _ = outputs(nets.memory, params, hidden[-1])
    for i, tau in enumerate(official["temperature/tau"]):
        probs = jax.nn.softmax(mixture.logits / tau, -2)
        close(probs, dims_last(official["temperature/probs"][i]))
        found = mixture.draw(official["temperature/uniform"], official["temperature/normal"], tau)
        close(found, official["temperature/next_z"][i])


@pytest.mark.parametrize("start", ["doom", "doom_from_zero"])
def test_the_memory_for_doom_equals_the_authors_formulas(official, start):
    latent, hidden, mixtures = (int(official[f"cfg/{n}"]) for n in ("latents", "hiddens", "mixtures"))
    kernel, bias = official["doom/w/output_w"], official["doom/w/output_b"]
    net = MDNRNN(latent, 1, hidden, mixtures, done_head=True, restart_input=True)
    params = {
        "kernel": official["doom/w/lstm_kernel"],
        "bias": official["doom/w/lstm_bias"],
        "done_out": {"kernel": kernel[:, :1], "bias": bias[:1]},  # column 0
        "mixture_out": official_head(kernel[:, 1:], bias[1:], latent, mixtures),
    }
    nets = wm.Networks(None, None, net)
    z, restart = swap(official["doom/in/z"]), swap(official["doom/in/restart"])
    action = swap(official["doom/in/action"])[..., None]
    h, c = official["doom/in/h0"], official["doom/in/c0"]
    if start == "doom_from_zero":
        h, c = 0 * h, 0 * c
    first = jnp.asarray(restart > 0.5)
    found, (_, last_c) = memory.unroll(nets, params, h, c, z[:-1], action[:-1], first[:-1])
    close(found, swap(official[f"{start}/out/h"]))
    mixture, heads = outputs(net, params, found)
    logits = heads["done"][..., 0]
    close(logits, swap(official[f"{start}/out/restart_logit"]))
    factor = float(official["doom/cfg/restart_factor"])
    nll = -jnp.mean(mixture.log_prob(z[1:]))
    done = jnp.mean(memory.done_loss(logits, jnp.asarray(restart[1:]), factor))
    close(nll, official[f"{start}/loss/z"])
    close(done, official[f"{start}/loss/restart"])
    close(nll + done, official[f"{start}/loss/total"])
    if start == "doom":
        close(last_c, official["doom/out/final_c"])
        close(mixture.mean, dims_last(swap(official["doom/out/mean"])))
