"""World Models as its authors save it: lists of numbers in JSON, for CarRacing and for Doom.

    vae/vae.json, rnn/rnn.json             CarRacing: V and M, numbers times 10,000, rounded
    tf_models/vae.json, tf_models/rnn.json Doom
    log/NAME.best.json                     C, as the search found it, and what it earned

Source: Ha & Schmidhuber 2018; names and layouts as in github.com/hardmaru/WorldModelsExperiments (fd982b9).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from wmjax.agents.world_models.controller import controller_size
from wmjax.authors import numbers_json
from wmjax.authors.stored import Found, Layer, Refused, Stored, by_our_names, in_memory
from wmjax.types import EnvSpec

SOURCE = "github.com/hardmaru/WorldModelsExperiments"
PRESET = "paper_car"
SCALE = 10_000.0  # of V and M
FOLDERS = (("vae", "rnn"), ("tf_models", "tf_models"))  # of V and M: CarRacing, Doom
CAR, DOOM = ("paper_car", "gym:CarRacing-v3", {}), ("paper_doom", "vizdoom:TakeCover", {"actions": "axis"})

# What is in V's and M's files, in this order: name and axes.
VISION = [
    *((f"enc_conv{i}/{kind}", rank) for i in range(1, 5) for kind, rank in (("kernel", 4), ("bias", 1))),
    *((f"{name}/{kind}", rank) for name in ("enc_fc_mu", "enc_fc_log_var", "dec_fc")
      for kind, rank in (("kernel", 2), ("bias", 1))),
    *((f"dec_deconv{i}/{kind}", rank) for i in range(1, 5) for kind, rank in (("kernel", 4), ("bias", 1))),
]  # fmt: skip
MEMORY = [("output_w", 2), ("output_b", 1), ("kernel", 2), ("bias", 1)]
NAMES = {
    "enc_conv": "encoder/conv", "enc_fc_mu": "encoder/mu", "enc_fc_log_var": "encoder/logvar",
    "dec_fc": "decoder/linear", "dec_deconv": "decoder/deconv",
}  # fmt: skip


def read(path: Path) -> Found:
    """What a folder holds. Raises `Refused` where it is none of the authors'; `OSError`."""
    if not path.is_dir():
        raise Refused("it is no folder; one with vae/vae.json, rnn/rnn.json and log/NAME.best.json is valid")
    kinds = [pair for pair in FOLDERS if (path / pair[0] / "vae.json").exists()]
    if not kinds:
        raise Refused("it holds neither vae/vae.json (CarRacing) nor tf_models/vae.json (Doom)")
    best = sorted((path / "log").glob("*.best.json"))
    if len(best) != 1:
        names = ", ".join(place.name for place in best[:4]) or "none"
        raise Refused(f"its log/ has to hold one controller, NAME.best.json; there is {names}")
    vision, memory = path / kinds[0][0] / "vae.json", path / kinds[0][1] / "rnn.json"
    layers = _named(vision, VISION) | {f"RNN/{name}": x for name, x in _named(memory, MEMORY).items()}
    search = _load(best[0])
    if not search or search[0].ndim != 1:
        raise Refused(f"its {best[0].name} does not begin with a list of numbers")
    return Found(layers | {"controller": in_memory(search[0])}, (), (vision, memory, best[0]))


def _load(file: Path) -> list[np.ndarray]:
    if file.is_symlink() or file.parent.is_symlink():
        raise Refused(f"its {file.parent.name}/{file.name} is a link; a file of its own is valid")
    try:
        return numbers_json.load(file)
    except Refused as error:
        raise Refused(f"its {file.parent.name}/{file.name}: {error}") from None


def _named(file: Path, wanted: list[tuple[str, int]]) -> dict[str, Stored]:
    found = _load(file)
    if len(found) != len(wanted):
        raise Refused(f"its {file.name} holds {len(found)} arrays; {len(wanted)} are valid ({wanted[0][0]}, ...)")
    for (name, rank), array in zip(wanted, found, strict=True):
        if array.ndim != rank:
            raise Refused(f"its {file.name} has {name} of shape {array.shape}; {rank} axes are valid")
    return {name: in_memory(x / np.float32(SCALE)) for (name, _), x in zip(wanted, found, strict=True)}


def task(found: Found) -> tuple[str, str, dict[str, Any]]:
    """Preset, environment and its arguments: Doom's M predicts ends too, so it has one output more."""
    latent = found.layers["enc_fc_mu/kernel"].shape[1]
    return DOOM if found.layers["RNN/output_b"].shape[0] % (3 * latent) == 1 else CAR


def fields(found: Found, config: Any) -> tuple[dict[str, Any], int]:
    """The configuration that shapes tell, and the side of pictures in pixels.

    Raises `ZeroDivisionError` where an array is empty.
    """
    shapes = {name: x.shape for name, x in found.layers.items()}
    latent, hidden = shapes["enc_fc_mu/kernel"][1], shapes["RNN/output_w"][0]
    doom = task(found) is DOOM
    action = shapes["RNN/kernel"][0] - latent - hidden - doom
    side = math.isqrt(shapes["enc_fc_mu/kernel"][0] // shapes["enc_conv4/bias"][0])
    inputs = {"z": latent, "zh": latent + hidden, "zc": latent + hidden, "zch": latent + 2 * hidden}
    size = shapes["controller"][0]
    one_layer = lambda name, bias: action * (inputs[name] + bias)
    chosen = (config.inputs, config.controller_bias)
    fits = [(name, bias) for name in inputs for bias in (True, False) if one_layer(name, bias) == size]
    inputs, bias = chosen if chosen in fits or config.controller_units or not fits else fits[0]
    return dict(
        latent=latent, depth=shapes["enc_conv1/bias"][0], hidden=hidden, inputs=inputs, controller_bias=bias,
        decoder_depth=shapes["dec_deconv3/bias"][0] if shapes["dec_deconv3/bias"] != shapes["enc_conv1/bias"] else None,
        mixtures=shapes["RNN/output_b"][0] // (3 * latent), mixture="per_dim", done_head=doom, restart_input=doom,
        layer_norm=False, reward_head="none", memory_action="env", encoder_padding="VALID",
    ), 16 * (side + 2)  # fmt: skip


def ours(found: Found, config: Any, spec: EnvSpec) -> dict[str, Layer]:
    """Layers by our names and in our layout. Raises `Refused` where they cannot be told apart."""
    read = lambda name: found.layers[name].read()
    weights, bias = read("RNN/output_w"), read("RNN/output_b")
    latent, mixtures = config.latent, config.mixtures
    if bias.shape[0] != 3 * latent * mixtures + config.done_head or weights.shape[1:] != bias.shape:
        raise Refused(
            f"its RNN/output_w and output_b have the shapes {weights.shape} and {bias.shape}, which are not the "
            f"mixtures of {latent} latents{', and an end' if config.done_head else ''}"
        )
    if (size := controller_size(spec, config)) != found.layers["controller"].shape[0]:
        how = f"controller_units {config.controller_units}, controller_bias {config.controller_bias}"
        raise Refused(
            f"its controller has {found.layers['controller'].shape[0]:,} numbers; {size:,} are valid for inputs "
            f"{config.inputs!r} with {how}"
        )

    def pairs():
        for official, stored in found.layers.items():
            if official.startswith(("enc_", "dec_")):
                layer, kind = official.split("/")
                number = layer[-1] if layer[-1].isdigit() else ""
                name = NAMES[layer.removesuffix(number)] + (str(int(number) - 1) if number else "")
                yield f"{name}/{kind}", Layer(official, stored)
        for name in ("kernel", "bias"):
            yield f"memory/{name}", Layer(f"RNN/{name}", found.layers[f"RNN/{name}"])
        yield "controller", Layer("controller", found.layers["controller"])
        for kind, official, array in (("kernel", "RNN/output_w", weights), ("bias", "RNN/output_b", bias)):
            ends, mixture = array[..., : config.done_head], array[..., int(config.done_head) :]
            mixture = in_memory(mixture_columns(mixture, latent, mixtures))
            yield f"memory/mixture_out/{kind}", Layer(official, mixture)
            if config.done_head:
                yield f"memory/done_out/{kind}", Layer(official, in_memory(ends))

    return by_our_names(pairs())


def mixture_columns(array: np.ndarray, latent: int, mixtures: int) -> np.ndarray:
    """Columns d * 3 K + [K weights, K means, K deviations] of the authors in our order: kind, component, dimension."""
    order = np.arange(latent * 3 * mixtures).reshape(latent, 3, mixtures).transpose(1, 2, 0).ravel()
    return array[..., order]
