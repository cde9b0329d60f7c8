"""Loads the official DreamerV2's flat weights into our parameter tree."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

MODULES = {
    "enc": "encoder", "rssm": "rssm", "dec": "decoder", "reward": "reward", "discount": "cont", "actor": "actor",
    "critic": "critic", "target_critic": "slow_critic",
}  # fmt: skip
LEAVES = {"gamma": "scale", "beta": "bias"}
LAYERS = [
    # RSSM
    (r"img_in", "input"),
    (r"img_in_norm", "input_norm"),
    (r"cell/(\w+)", r"gru/\1"),
    (r"img_out_0", "prior_layer"),
    (r"img_out_norm_0", "prior_norm"),
    (r"img_dist_0", "prior_out"),
    (r"obs_out", "posterior_layer"),
    (r"obs_out_norm", "posterior_norm"),
    (r"obs_dist", "posterior_out"),
    # Encoder and decoder
    (r"convin", "dense"),
    (r"convnorm(\d)", r"norm\1"),
    (r"densenorm(\d)", r"mlp/norm\1"),
    (r"dense(\d)", r"mlp/linear\1"),
    (r"dense_(\w+)/out", r"\1_out"),
    # Heads
    (r"norm(\d)", r"mlp/norm\1"),
    (r"out/std", "std"),
]


def our_name(official: str, discrete: bool) -> str:
    """`wm/rssm/cell/norm/gamma` -> `rssm/gru/norm/scale`; `discrete` says what the actor's output is."""
    module, *middle, leaf = official.removeprefix("wm/").split("/")
    layer = "/".join(middle)
    if layer == "out/out":
        layer = "logits" if module == "discount" or (module == "actor" and discrete) else "mean"
    for pattern, replacement in LAYERS:
        if re.fullmatch(pattern, layer):
            layer = re.sub(pattern, replacement, layer)
            break
    return f"{MODULES[module]}/{layer}/{LEAVES.get(leaf, leaf)}"


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
