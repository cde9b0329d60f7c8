"""Loads the official DreamerV1's flat weights into our parameter tree."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

MODULES = {
    "encode": "encoder", "rssm": "rssm", "decode": "decoder", "reward": "reward", "pcont": "cont", "actor": "actor",
    "value": "critic",
}  # fmt: skip
RSSM = {"img1": "input", "img2": "prior_layer", "img3": "prior_out", "obs1": "posterior_layer", "obs2": "posterior_out"}


def our_name(official: str, discrete: bool) -> str:
    """`encode/h1/kernel` -> `encoder/conv0/kernel`; `discrete` says what the actor's output is."""
    module, layer, leaf = official.split("/")
    if module == "rssm":
        layer = RSSM.get(layer, layer)
    elif layer == "hout":
        kinds = {"pcont": "logits", "actor": "logits" if discrete else "mean_std"}
        layer = kinds.get(module, "mean")
    else:
        number = int(re.fullmatch(r"h(\d)", layer)[1])
        if module == "encode":
            layer = f"conv{number - 1}"
        elif module == "decode":
            layer = "dense" if number == 1 else f"conv{number - 2}"
        else:
            layer = f"mlp/linear{number}"
    return f"{MODULES[module]}/{layer}/{leaf}"


def tree(weights: dict[str, np.ndarray], discrete: bool = True) -> dict:
    """Official flat weights, by module, as our nested parameters."""
    result: dict = {}
    for name, value in weights.items():
        *path, leaf = our_name(name, discrete).split("/")
        node = result
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value)
    return result
