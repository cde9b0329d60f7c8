"""Loads the official DreamerV3's flat weights into our parameter tree."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

MODULES = {
    "enc": "encoder", "dyn": "rssm", "dync": "rssm", "dec": "decoder", "rew": "reward", "con": "cont", "pol": "actor",
    "val": "critic", "slowval": "slow_critic",
}  # fmt: skip
LAYERS = [
    # RSSM
    (r"dynin(\d)norm", r"dynin_norm_\1"),
    (r"dynin(\d)", r"dynin_\1"),
    (r"dynhid0norm", "dynhid_norm"),
    (r"dynhid0", "dynhid"),
    (r"prior(\d)norm", r"prior_norm_\1"),
    (r"prior(\d)", r"prior_layer_\1"),
    (r"priorlogit", "prior_logits"),
    (r"obs(\d)norm", r"posterior_norm_\1"),
    (r"obs0", "posterior_first"),
    (r"obslogit", "posterior_logits"),
    # Encoder and decoder
    (r"cnn(\d)norm", r"norm\1"),
    (r"cnn(\d)", r"conv\1"),
    (r"mlp(\d)norm", r"mlp/norm\1"),
    (r"mlp(\d)", r"mlp/linear\1"),
    (r"sp0", "deter_in"),
    (r"sp1norm", "stoch_norm"),
    (r"sp1", "stoch_in"),
    (r"sp2", "stoch_out"),
    (r"spnorm", "norm_in"),
    (r"conv(\d)norm", r"norm\1"),
    (r"imgout", "image_out"),
    (r"vec/(\w+)/(pred|logits)", r"\1_out"),
    # Heads
    (r"head/action/stddev", "std"),
    (r"head/action/(\w+)", r"\1"),
    (r"head/logits?", "logits"),
]


def our_name(official: str) -> str:
    """`dyn/dynin0/kernel` -> `rssm/dynin_0/kernel`."""
    module, *middle, leaf = official.split("/")
    layer = "/".join(middle)
    for pattern, replacement in LAYERS:
        if re.fullmatch(pattern, layer):
            layer = re.sub(pattern, replacement, layer)
            break
    return f"{MODULES[module]}/{layer}/{leaf}"


def tree(weights: dict[str, np.ndarray]) -> dict:
    """Official flat weights as our nested parameters; statistics such as `retnorm` are left out."""
    result: dict = {}
    for name, value in weights.items():
        if name.split("/")[0] not in MODULES:
            continue
        *path, leaf = our_name(name).split("/")
        node = result
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(value)
    return result
