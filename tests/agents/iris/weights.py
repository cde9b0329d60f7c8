"""Loads the official IRIS weights, named and laid out as in PyTorch, into our parameter trees."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

TOKENIZER = [
    (r"(encoder|decoder)\.(down|up)\.(\d+)\.block\.(\d+)", r"\1/res\3_\4"),
    (r"(encoder|decoder)\.(down|up)\.(\d+)\.attn\.(\d+)", r"\1/attn\3_\4"),
    (r"encoder\.down\.(\d+)\.downsample", r"encoder/down\1"),
    (r"(encoder|decoder)\.mid\.block_1", r"\1/mid_res0"),
    (r"(encoder|decoder)\.mid\.block_2", r"\1/mid_res1"),
    (r"(encoder|decoder)\.mid\.attn_1", r"\1/mid_attn"),
    (r"pre_quant_conv", "pre_quant"),
    (r"post_quant_conv", "post_quant"),
    (r"embedding\.weight", "codebook"),
    (r"proj_out", "proj"),
    (r"nin_shortcut", "skip"),
]
WORLD_MODEL = [
    (r"transformer\.blocks\.(\d+)\.attn", r"blocks_\1"),
    (r"transformer\.blocks\.(\d+)\.mlp\.0", r"blocks_\1/mlp_in"),
    (r"transformer\.blocks\.(\d+)\.mlp\.2", r"blocks_\1/mlp_out"),
    (r"transformer\.blocks\.(\d+)\.ln(\d+)", r"blocks_\1/norm\2"),
    (r"transformer\.ln_f", "norm_out"),
    (r"pos_emb\.weight", "position_table"),
    (r"embedder\.embedding_tables\.0\.weight", "action_table"),
    (r"embedder\.embedding_tables\.1\.weight", "frame_table"),
    (r"head_observations\.head_module\.0", "frame_in"),
    (r"head_observations\.head_module\.2", "frame_out"),
    (r"head_rewards\.head_module\.0", "reward_in"),
    (r"head_rewards\.head_module\.2", "reward_out"),
    (r"head_ends\.head_module\.0", "end_in"),
    (r"head_ends\.head_module\.2", "end_out"),
]
ACTOR_CRITIC = [
    (r"conv(\d+)", lambda match: f"convs/conv{int(match[1]) - 1}"),
    (r"lstm\.weight_ih", "input_gates.weight"),
    (r"lstm\.bias_ih", "input_gates.bias"),
    (r"lstm\.weight_hh", "hidden_gates.weight"),
    (r"lstm\.bias_hh", "hidden_gates.bias"),
    (r"(actor|critic)_linear", r"\1"),
]


def our_name(rules: list, official: str) -> str:
    """`decoder.up.1.upsample.conv.weight` -> `decoder/up0/conv/kernel`."""
    # The official decoder's level i leads to level i - 1.
    name = re.sub(r"decoder\.up\.(\d+)\.upsample", lambda match: f"decoder/up{int(match[1]) - 1}", official)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name = name.replace(".", "/")
    norm = "norm" in name.split("/")[-2] if "/" in name else False
    name = re.sub(r"/weight$", "/scale" if norm else "/kernel", name)
    is_conv = rules is TOKENIZER and not norm and re.search(r"/(kernel|bias)$", name)
    if is_conv and not re.search(r"(down|up)\d/conv/", name):
        name = re.sub(r"/(kernel|bias)$", r"/conv/\1", name)  # our convolutions sit in a wrapper that initializes them
    return name


def our_value(name: str, value: np.ndarray, grid: int | None = None) -> np.ndarray:
    """Convolutions to HWIO, linear layers transposed; `grid`, of the LSTM's inputs: from (C, H, W) to (H, W, C)."""
    if not name.endswith("kernel"):
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if name.startswith("input_gates") and grid:
        value = value.reshape(value.shape[0], -1, grid, grid).transpose(0, 2, 3, 1).reshape(value.shape)
    return value.T


def tree(rules: list, weights: dict[str, np.ndarray], grid: int | None = None) -> dict:
    """Official flat weights, or gradients, as our nested parameters."""
    result: dict = {}
    for official, value in weights.items():
        *path, leaf = (name := our_name(rules, official)).split("/")
        node = result
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(our_value(name, value, grid))
    return result
