"""IRIS as its authors save it: the state of an agent's modules, by `torch.save`.

Source: Micheli, Alonso, Fleuret 2023; names and layouts as in github.com/eloialonso/iris (24326aa), whose trainer
writes `checkpoints/last.pt`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wmjax import checks
from wmjax.authors import archive
from wmjax.authors.stored import Found, Layer, Refused, Stored, by_our_names
from wmjax.types import EnvSpec

SOURCE = "github.com/eloialonso/iris"
PRESET, EXAMPLE = "paper", "atari:Breakout"

Rules = list[tuple[str, str | Callable[[re.Match], str]]]
TOKENIZER: Rules = [
    # The official decoder's level i leads to level i - 1.
    (r"decoder\.up\.(\d+)\.upsample", lambda match: f"decoder/up{int(match[1]) - 1}"),
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
WORLD_MODEL: Rules = [
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
ACTOR_CRITIC: Rules = [
    (r"conv(\d+)", lambda match: f"convs/conv{int(match[1]) - 1}"),
    (r"lstm\.weight_ih", "input_gates.weight"),
    (r"lstm\.bias_ih", "input_gates.bias"),
    (r"lstm\.weight_hh", "hidden_gates.weight"),
    (r"lstm\.bias_hh", "hidden_gates.bias"),
    (r"(actor|critic)_linear", r"\1"),
]
MODULES = {"tokenizer": TOKENIZER, "world_model": WORLD_MODEL, "actor_critic": ACTOR_CRITIC}
# The network of the perceptual loss, and constants: masks, and which positions a head keeps.
LEFT_OUT = re.compile(r"tokenizer\.lpips\..*|world_model\..*\.(mask|indices)")


def our_name(rules: Rules, official: str) -> str:
    """`decoder.up.1.upsample.conv.weight` -> `decoder/up0/conv/kernel`."""
    name = official
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    name = name.replace(".", "/")
    norm = "norm" in name.split("/")[-2] if "/" in name else False
    name = re.sub(r"/weight$", "/scale" if norm else "/kernel", name)
    is_conv = rules is TOKENIZER and not norm and re.search(r"/(kernel|bias)$", name)
    if is_conv and not re.search(r"(down|up)\d/conv/", name):
        name = re.sub(r"/(kernel|bias)$", r"/conv/\1", name)  # our convolutions sit in a wrapper that initializes them
    return name


def our_value(name: str, value: Any, grid: int | None = None) -> Any:
    """Convolutions to HWIO, linear layers transposed; `grid`, of the LSTM's inputs: from (C, H, W) to (H, W, C).

    `value` is an array of NumPy or JAX, `name` ours.
    """
    if not name.endswith("kernel"):
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if name.startswith("input_gates") and grid:
        value = value.reshape(value.shape[0], -1, grid, grid).transpose(0, 2, 3, 1).reshape(value.shape)
    return value.T


def grid_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Side of the feature map that the LSTM sees, from shapes of the actor-critic by its authors' names."""
    return round((shapes["lstm.weight_ih"][1] / channels_of(shapes)[-1]) ** 0.5)


def channels_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Of each convolution of the actor-critic."""
    return tuple(shapes[name][0] for name in sorted(shapes) if re.fullmatch(r"conv\d\.weight", name))


def read(path: Path) -> Found:
    """What a checkpoint holds, nothing of it read yet. Raises `Refused` where it is none; `OSError`."""
    if path.is_dir():
        raise Refused("it is a folder; a file such as checkpoints/last.pt is valid")
    state = archive.load(path)
    if not isinstance(state, dict) or not all(isinstance(x, Stored) for x in state.values()):
        raise Refused("it holds other things than tensors by name; the agent's state dict is valid")
    names = [str(name) for name in state]
    left_out = tuple(name for name in names if LEFT_OUT.fullmatch(name))
    layers = {name: state[name] for name in names if name not in left_out}
    if missing := MODULES.keys() - {name.partition(".")[0] for name in layers}:
        raise Refused(f"it holds no {min(missing)}; the state of a whole agent is valid")
    return Found(layers, left_out, (path,))


def _shapes(found: Found, module: str) -> dict[str, tuple[int, ...]]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): x.shape for name, x in found.layers.items() if name.startswith(prefix)}


def fields(found: Found, config: Any) -> tuple[dict[str, Any], int]:
    """The configuration that shapes tell, and the side of pictures in pixels.

    Heads of attention and what was done in training are not in them. Raises `KeyError`, `IndexError` or
    `ZeroDivisionError` where layers are missing or have other axes.
    """
    tokenizer, world, actor = (_shapes(found, module) for module in MODULES)
    numbers = lambda pattern, names: 1 + max(int(m[1]) for m in (re.match(pattern, name) for name in names) if m)
    channels, levels = tokenizer["encoder.conv_in.weight"][0], numbers(r"encoder\.down\.(\d+)\.", tokenizer)
    policy, lstm = channels_of(actor), actor["lstm.weight_hh"][1]
    side = grid_of(actor) * 2 ** len(policy)
    attends = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tokenizer]
    positions, width = world["pos_emb.weight"]
    block = (side // 2 ** (levels - 1)) ** 2 + 1
    vocab_size, embed_dim = tokenizer["embedding.weight"]
    ff = world["transformer.blocks.0.mlp.0.weight"][0]
    found_fields = dict(
        vocab_size=vocab_size, embed_dim=embed_dim, latents=tokenizer["encoder.conv_out.weight"][0], channels=channels,
        multipliers=tuple(tokenizer[f"encoder.down.{i}.block.0.conv1.weight"][0] // channels for i in range(levels)),
        res_blocks=numbers(r"encoder\.down\.0\.block\.(\d+)\.", tokenizer),
        attention=tuple(sorted(side // 2**level for level in attends)), patch=1, perceptual="none",
        max_blocks=positions // block, layers=numbers(r"transformer\.blocks\.(\d+)\.", world), width=width,
        ff=None if ff == 4 * width else ff, world_model_length=min(config.world_model_length, positions // block),
        policy_channels=policy, lstm_units=lstm, reward_tokens=False, norm="pre",
    )  # fmt: skip
    return found_fields, side


def ours(found: Found, config: Any, spec: EnvSpec) -> dict[str, Layer]:
    """Layers by our names and in our layout. Raises `Refused` where two have one name."""
    del config, spec
    grid = grid_of(_shapes(found, "actor_critic"))

    def pairs():
        for official, stored in found.layers.items():
            module, _, rest = official.partition(".")
            if module not in MODULES:
                raise Refused(f"it holds {checks.show(official)}, which is of no module of the agent")
            name = our_name(MODULES[module], rest)
            layer = Layer(official, stored.changed(partial(our_value, name, grid=grid)))
            yield f"{module}/{name}", layer

    return by_our_names(pairs())
