"""What is imported of files with the recorded weights gives the recorded outputs."""

from __future__ import annotations

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmjax
from tests.agents.closeness import close, swap
from tests.agents.dreamer_v3_weights import tree as dreamer_tree
from tests.agents.iris.weights import tree
from tests.authors import written
from tests.parity import load
from wmjax import dreaming
from wmjax.agents import dreamer_v3 as v3
from wmjax.agents import iris
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import memory
from wmjax.authors.iris import ACTOR_CRITIC, TOKENIZER, WORLD_MODEL, grid_of
from wmjax.authors.stored import Layer, Refused, by_our_names, in_memory
from wmjax.cli import main
from wmjax.loops import checkpoint
from wmjax.nets.mlp import call
from wmjax.ops import distributions, latents
from wmjax.types import Box, Discrete

pytestmark = pytest.mark.parity


def same(ours, theirs):
    """Two trees are equal bit for bit."""
    assert checkpoint.digest(ours) == checkpoint.digest(theirs)


# ---------------------------------------------------------------------------------------------------------------------
# IRIS

PLACE = written.environment({"image": written.image()}, Discrete(4))


@pytest.fixture(scope="module")
def imported_iris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iris")
    written.state_dict(folder / "last.pt", written.iris_weights())
    origin = wmjax.import_weights("iris", folder / "last.pt", folder / "run", env=PLACE, heads=2, steps=400_000)
    return wmjax.load(folder / "run", env=PLACE), origin


def test_an_imported_iris_has_the_recorded_weights_and_the_configuration_that_their_shapes_tell(imported_iris):
    run, origin = imported_iris
    files = {"tokenizer": TOKENIZER, "world_model": WORLD_MODEL, "actor_critic": ACTOR_CRITIC}
    for module, rules in files.items():
        weights = load(f"iris_{module}").tree("w")
        grid = grid_of({name: x.shape for name, x in weights.items()}) if module == "actor_critic" else None
        same(run.state.params[module], tree(rules, weights, grid))
    data, config = load("iris_tokenizer"), run.config
    assert config.attention == (8, 16) and config.res_blocks == data["cfg/num_res_blocks"]
    assert config.max_blocks == load("iris_world_model")["cfg/max_blocks"]
    assert (config.heads, config.discount, config.collect_epochs) == (2, 0.995, 500)  # as stated, and as the paper's
    assert run.step == 400_000 and run.description["preset"] == "paper"
    assert run.description["origin"] == origin and origin["left_out"] == 2
    assert origin["parameters"] == sum(x.size for x in jax.tree.leaves(run.state.params))
    assert origin["files"][0]["name"] == "last.pt" and len(origin["files"][0]["sha256"]) == 64


def test_an_imported_iris_predicts_what_was_recorded(imported_iris):
    run, _ = imported_iris
    data, nets = load("iris_world_model"), iris.networks(PLACE.spec, run.config)
    blocks = data["in/tokens"].reshape(len(data["in/tokens"]), -1, nets.world_model.block)
    tokens, action = blocks[:, :, :-1], np.eye(4, dtype=np.float32)[blocks[:, :, -1]]
    logits = jax.jit(lambda p: call(nets.world_model, p, tokens, action, jnp.zeros(action.shape[:2])))(
        run.state.params["world_model"]
    )
    for found, name in zip(logits, ("observations", "rewards", "ends"), strict=True):
        close(found, data[f"out/logits_{name}"], 5e-5)


@pytest.mark.slow
def test_an_imported_iris_sees_what_was_recorded_and_is_evaluated_and_dreams(imported_iris):
    run, _ = imported_iris
    data = load("iris_tokenizer")
    image = np.moveaxis(data["in/images_u8"], -3, -1)
    tokens = jax.jit(lambda p: run.agent.model.encode(p, {"image": image}))(run.state.variables)
    np.testing.assert_array_equal(tokens, data["out/tokens"])
    assert run.evaluate(2).episodes == 2


# ---------------------------------------------------------------------------------------------------------------------
# DreamerV3


@pytest.fixture(scope="module")
def losses():
    return load("dreamer_v3_losses")


@pytest.fixture(scope="module")
def field(losses):
    """Where the recorded agent was."""
    vector = Box(-np.inf, np.inf, losses["in/agent_disc/vec"].shape[2:])
    return written.environment({"image": written.image(), "vec": vector}, Discrete(losses.config["sizes"]["nact"]))


@pytest.fixture(scope="module")
def imported_dreamer(losses, field, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dreamer")
    params = losses.tree("params/agent_disc") | {"opt/state/mu": np.ones((400, 3), np.float32)}
    written.checkpoint(folder / "logdir", params | {"opt/state/count": np.asarray(7, np.int32)})
    said = []
    how = dict(stoch=losses.config["sizes"]["stoch"], compute_dtype="float32", say=said.append)
    origin = wmjax.import_weights("dreamer_v3", folder / "logdir", folder / "run", env=field, **how)
    return wmjax.load(folder / "run", env=field), origin, said


def test_an_imported_dreamer_has_the_recorded_weights_and_the_configuration_that_their_shapes_tell(
    imported_dreamer, losses
):
    run, origin, said = imported_dreamer
    same(run.state.variables, dreamer_tree(losses.tree("params/agent_disc")))
    sizes, config = losses.config["sizes"], run.config
    for name in ("deter", "hidden", "stoch", "classes", "depth", "units", "blocks"):
        assert getattr(config, name) == sizes[name], name
    assert (config.actor_layers, config.cont_layers, config.bins, config.actor_unimix) == (3, 1, 255, 0.0)
    assert run.step == 4321 and origin["left_out"] == 4 and "4 arrays" in said[0]
    assert origin["files"][0]["name"].endswith("agent.pkl")


def test_an_imported_dreamer_believes_what_was_recorded(imported_dreamer, losses, monkeypatch):
    run, *_ = imported_dreamer

    def most_likely(key, logits):
        return jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])

    monkeypatch.setattr(distributions, "straight_through_sample", most_likely)
    parts = v3.assemble(run.env.spec, run.config)
    given, out = losses.tree("in/agent_disc"), losses.tree("out/agent_disc")
    action = np.eye(run.env.spec.action.n, dtype=np.float32)[given["prevact"]]
    stoch = given["carry_stoch"]
    start = v3.LatentState(given["carry_deter"], stoch, latents.Categorical(jnp.zeros_like(stoch)))

    @jax.jit
    def observed(params):
        obs = {name: jnp.asarray(swap(given[name])) for name in ("image", "vec")}
        embed = parts.model.encode(params, obs)
        first = jnp.asarray(swap(given["is_first"]))
        return dreaming.observe(parts.model, params, jax.random.key(0), start, jnp.asarray(swap(action)), embed, first)

    _, states = observed(run.state.variables)
    close(swap(states.deter), out["repfeat/deter"], 1e-5)
    close(swap(states.dist.logits), out["repfeat/logit"], 1e-4)
    assert np.array_equal(swap(states.stoch), out["repfeat/stoch"])


def test_a_checkpoint_of_pickles_fifth_protocol_and_its_file_alone_are_the_same(
    imported_dreamer, losses, field, tmp_path
):
    written.checkpoint(tmp_path / "logdir", losses.tree("params/agent_disc"), protocol=5)
    (file,) = (tmp_path / "logdir").rglob("agent.pkl")
    how = dict(stoch=losses.config["sizes"]["stoch"], compute_dtype="float32", steps=7)
    origin = wmjax.import_weights("dreamer_v3", file, tmp_path / "run", env=field, **how)
    assert origin["digest"] == imported_dreamer[1]["digest"]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == 7


@pytest.mark.slow
def test_an_imported_dreamer_is_evaluated_and_dreams_and_is_exported(imported_dreamer, field, tmp_path):
    run, origin, _ = imported_dreamer
    assert run.evaluate(2).episodes == 2
    card = wmjax.export(run, tmp_path / "again.safetensors")
    assert card["command"].startswith("none: imported") and origin["source"] in card["command"]
    again = wmjax.load(tmp_path / "again.safetensors", env=field)
    assert again.description["origin"] == origin and again.evaluate(2).mean == run.evaluate(2).mean


def test_an_imported_run_is_not_resumed(imported_dreamer, field):
    run, *_ = imported_dreamer
    with pytest.raises(wmjax.UsageError, match="was imported; it has no replay"):
        wmjax.train("dreamer_v3", env=field, out=run.path, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# World Models


def vision_lists(latent, depth=2, seed=0):
    """V of the authors' layout, with numbers by chance."""
    draw = np.random.default_rng(seed).normal
    sizes = [3, depth, 2 * depth, 4 * depth, 8 * depth]
    found = [x for a, b in itertools.pairwise(sizes) for x in (draw(size=(4, 4, a, b)), draw(size=b))]
    for rows, columns in ((4 * sizes[-1], latent), (4 * sizes[-1], latent), (latent, 32 * depth)):
        found += [draw(size=(rows, columns)), draw(size=columns)]
    sizes = [32 * depth, 4 * depth, 2 * depth, depth, 3]
    for kernel, (a, b) in zip((5, 5, 6, 6), itertools.pairwise(sizes), strict=True):
        found += [draw(size=(kernel, kernel, b, a)), draw(size=b)]
    return found


def small_memory(latent, hidden, draw):
    """M of CarRacing in the authors' layout."""
    shapes = (hidden, 15 * latent), 15 * latent, (latent + 3 + hidden, 4 * hidden), 4 * hidden
    return [draw(size=shape) for shape in shapes]


def tallecs_lists(w):
    """Tallec's V in the authors' layout: HWIO, features as (H, W, C), and the logarithm of the variance."""
    conv = lambda name: [w[f"{name}.weight"].transpose(2, 3, 1, 0), w[f"{name}.bias"]]
    channels = w["encoder.conv4.weight"].shape[0]

    def head(name, scale):
        kernel = w[f"{name}.weight"].reshape(-1, channels, 2, 2).transpose(2, 3, 1, 0).reshape(4 * channels, -1)
        return [scale * kernel, scale * w[f"{name}.bias"]]

    found = [x for i in range(1, 5) for x in conv(f"encoder.conv{i}")]
    found += head("encoder.fc_mu", 1) + head("encoder.fc_logsigma", 2)
    found += [w["decoder.fc1.weight"].T, w["decoder.fc1.bias"]]
    return found + [x for i in range(1, 5) for x in conv(f"decoder.deconv{i}")]


def write_world_models(folder, vision, memory_lists, controller, places=("vae", "rnn")):
    scaled = lambda arrays: [np.float64(x) * 10_000 for x in arrays]
    written.json_lists(folder / places[0] / "vae.json", scaled(vision))
    written.json_lists(folder / places[1] / "rnn.json", scaled(memory_lists))
    written.json_lists(folder / "log" / "task.cma.16.64.best.json", [controller, 900.5])


def memory_lists(file, prefix=""):
    return [file[f"{prefix}w/{name}"] for name in ("output_w", "output_b", "lstm_kernel", "lstm_bias")]


def test_an_imported_memory_of_carracing_predicts_what_was_recorded(tmp_path):
    file = load("wm_mdn_official_layout")
    latent, hidden = int(file["cfg/latents"]), int(file["cfg/hiddens"])
    theta = np.random.default_rng(1).normal(size=3 * (latent + hidden + 1)).round(4)
    write_world_models(tmp_path / "car", vision_lists(latent), memory_lists(file), theta)
    road = written.environment({"image": written.image()}, Box(-1.0, 1.0, (3,)))
    wmjax.import_weights("world_models", tmp_path / "car", tmp_path / "run", env=road)
    run = wmjax.load(tmp_path / "run", env=road)
    assert (run.config.inputs, run.config.mixtures, run.description["preset"]) == ("zh", 5, "paper_car")
    np.testing.assert_array_equal(run.state.params["controller"], np.float32(theta))
    z, action = swap(file["in/z"]), swap(file["in/action"])
    assert np.abs(action).max() <= 1
    nets = wm.networks(road.spec, run.config)
    zeros, first = jnp.zeros((z.shape[1], hidden)), jnp.zeros(z.shape[:2], bool)
    params = run.state.params["memory"]
    out, _ = jax.jit(lambda p: memory.unroll(nets, p, zeros, zeros, z, action, first))(params)
    close(out, swap(file["out/h"]), 1e-5)
    mixture = call(nets.memory, params, out, method="predict_latent")
    close(mixture.mean, np.swapaxes(swap(file["out/mean"]), -1, -2), 1e-5)
    close(mixture.log_std, np.swapaxes(swap(file["out/logstd"]), -1, -2), 1e-5)


def test_an_imported_memory_of_doom_predicts_what_was_recorded(tmp_path):
    file = load("wm_mdn_official_layout")
    latent, hidden = int(file["cfg/latents"]), int(file["cfg/hiddens"])
    theta = np.random.default_rng(1).normal(size=latent + 2 * hidden).round(4)
    folder = tmp_path / "doom"
    write_world_models(folder, vision_lists(latent), memory_lists(file, "doom/"), theta, ("tf_models", "tf_models"))
    room = written.environment({"image": written.image()}, Box(-1.0, 1.0, (1,)))
    wmjax.import_weights("world_models", folder, tmp_path / "run", env=room)
    run = wmjax.load(tmp_path / "run", env=room)
    assert (run.config.inputs, run.config.controller_bias, run.description["preset"]) == ("zch", False, "paper_doom")
    nets, params = wm.networks(room.spec, run.config), run.state.params["memory"]
    z, restart = swap(file["doom/in/z"])[:-1], jnp.asarray(swap(file["doom/in/restart"])[:-1] > 0.5)
    action = swap(file["doom/in/action"])[:-1, :, None]
    assert np.abs(action).max() <= 1
    h, c = file["doom/in/h0"], file["doom/in/c0"]
    out, _ = jax.jit(lambda p: memory.unroll(nets, p, h, c, z, action, restart))(params)
    close(out, swap(file["doom/out/h"]), 1e-5)
    ends = call(nets.memory, params, out, method="predict_outcome")["done"][..., 0]
    close(ends, swap(file["doom/out/restart_logit"]), 1e-5)
    mixture = call(nets.memory, params, out, method="predict_latent")
    close(mixture.mean, np.swapaxes(swap(file["doom/out/mean"]), -1, -2), 1e-5)


def test_an_imported_vision_sees_and_draws_what_was_recorded(tmp_path):
    file = load("wm_ctallec_vae")
    latent, hidden, draw = int(file["cfg/latent"]), 4, np.random.default_rng(2).normal
    small = small_memory(latent, hidden, draw)
    write_world_models(tmp_path / "car", tallecs_lists(file.tree("w")), small, draw(size=3 * (latent + hidden + 1)))
    road = written.environment({"image": written.image()}, Box(-1.0, 1.0, (3,)))
    wmjax.import_weights("world_models", tmp_path / "car", tmp_path / "run", env=road, decoder_relu=True)
    run = wmjax.load(tmp_path / "run", env=road)
    nets, params = wm.networks(road.spec, run.config), run.state.params
    image = np.moveaxis(file["in/images_u8"], -3, -1)
    mu, logvar = jax.jit(lambda p: call(nets.encoder, p, image))(params["encoder"])
    close(mu, file["out/mu"], 1e-5)
    close(logvar / 2, file["out/logsigma"], 1e-5)
    drawn = jax.jit(lambda p: call(nets.decoder, p, file["out/mu"]))(params["decoder"])
    close(drawn, np.moveaxis(file["out/recon_of_mu"], -3, -1), 1e-5)


def test_a_memory_that_sees_actions_as_the_environment_takes_them_sees_gas_and_brake():
    from wmjax.envs.racing import steer_gas_brake

    road = written.environment({"image": written.image()}, Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,))).spec
    taken = lambda spec, action: wm.modules.as_taken(spec)(jnp.asarray(action, jnp.float32)).tolist()
    assert taken(road._replace(action_map=steer_gas_brake), [0.5, 0.0, -0.5]) == [0.5, 0.5, 0.0]
    assert taken(road, [0.5, 0.0, -3.0]) == [0.5, 0.5, 0.0]


def test_numbers_are_rounded_to_a_ten_thousandth_in_the_authors_files(tmp_path):
    written.json_lists(tmp_path / "a.json", [[[1, -2], [3, 4]], [5]])
    from wmjax.authors import numbers_json

    first, second = numbers_json.load(tmp_path / "a.json")
    assert first.tolist() == [[1, -2], [3, 4]] and second.tolist() == [5]
    assert json.loads((tmp_path / "a.json").read_text()) == [[[1, -2], [3, 4]], [5]]


@pytest.mark.slow
def test_the_command_imports_evaluates_and_dreams(tmp_path, capsys):
    latent, hidden, draw = 6, 4, partial(np.random.default_rng(2).normal, scale=0.1)
    small = small_memory(latent, hidden, draw)
    write_world_models(
        tmp_path / "car", [0.1 * x for x in vision_lists(latent)], small, draw(size=3 * (latent + hidden + 1))
    )
    run = str(tmp_path / "run")
    assert main(["import", "world_models", str(tmp_path / "car"), "--out", run, "--env", "catch"]) == 0
    assert "parameters; digest" in capsys.readouterr().out
    assert main(["eval", run, "--episodes", "2"]) == 0
    assert main(["dream", run, "--context", "2", "--horizon", "2"]) == 0
    assert (tmp_path / "run" / "dream.gif").exists()
    assert main(["import", "world_models", str(tmp_path / "car"), "--out", run]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def test_layers_that_are_not_those_of_the_environment_or_configuration_are_listed_with_both_shapes(
    losses, field, tmp_path
):
    params = losses.tree("params/agent_disc")
    params["dec/extra/kernel"] = params.pop("con/mlp/norm0/scale")
    other = written.environment(field.spec.obs, Discrete(4))
    written.checkpoint(tmp_path / "logdir", params)
    with pytest.raises(wmjax.UsageError) as error:
        wmjax.import_weights("dreamer_v3", tmp_path / "logdir", tmp_path / "run", env=other, stoch=8)
    line = str(error.value)
    assert "5 layers do not fit the configuration and environment: " in line and "\n" not in line
    assert "pol/head/action/logits/bias has (5,) and actor/logits/bias should have (4,)" in line
    assert "dyn/dynin2/kernel has (5, 16) and rssm/dynin_2/kernel should have (4, 16)" in line
    assert "cont/mlp/norm0/scale (16,) is not in it" in line and "dec/extra/kernel (16,) is in it, too" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value, words",
    [
        (np.array([np.nan], np.float32), "'con/head/logit/bias' holds numbers that are not finite"),
        (np.array([1], np.int64), "'con/head/logit/bias' is of int64, not of floats"),
        (np.array([1e300]), "'con/head/logit/bias' holds numbers that are not finite"),
    ],
)
def test_numbers_that_nothing_acts_by_are_refused(value, words, losses, field, tmp_path):
    written.checkpoint(tmp_path / "logdir", losses.tree("params/agent_disc") | {"con/head/logit/bias": value})
    with pytest.raises(wmjax.UsageError, match=words):
        wmjax.import_weights("dreamer_v3", tmp_path / "logdir", tmp_path / "run", env=field, stoch=8)
    assert not (tmp_path / "run").exists()


def test_two_layers_of_one_name_are_refused():
    one = in_memory(np.zeros(2, np.float32))
    with pytest.raises(Refused, match=r"'a\.b' and 'a/b' are the same one"):
        by_our_names([("a/b", Layer("a.b", one)), ("a/b", Layer("a/b", one))])


def test_a_checkpoint_that_cannot_be_written_leaves_no_folder(tmp_path, monkeypatch):
    latent, hidden, draw = 6, 4, np.random.default_rng(2).normal
    small = small_memory(latent, hidden, draw)
    write_world_models(tmp_path / "car", vision_lists(latent), small, draw(size=3 * (latent + hidden + 1)))

    def full(folder, step, tree, **how):
        (folder / "000000000000").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(wmjax.UsageError, match="No space left"):
        wmjax.import_weights("world_models", tmp_path / "car", tmp_path / "run", env="catch")
    assert not (tmp_path / "run").exists()
