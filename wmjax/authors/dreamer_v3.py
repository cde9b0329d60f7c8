"""DreamerV3 as its authors save it: a folder for each checkpoint, with a pickle of the agent's parameters by name.

    LOGDIR/ckpt/latest                       the name of the newest
    LOGDIR/ckpt/20250131T120000.../agent.pkl  {"params": {"dyn/dynin0/kernel": array, ...}, "counters": {...}}
    LOGDIR/ckpt/20250131T120000.../step.pkl   env steps
    LOGDIR/ckpt/20250131T120000.../done       the checkpoint is whole

Source: Hafner et al. 2023; names and layouts as in github.com/danijar/dreamerv3 (e3f0224), from 2025 on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmjax import checks, files
from wmjax.agents.dreamer_v3 import SIZES
from wmjax.authors import arrays
from wmjax.authors.stored import Found, Layer, Refused, by_our_names
from wmjax.types import EnvSpec

SOURCE = "github.com/danijar/dreamerv3"
PRESET, EXAMPLE = "paper", "atari:Breakout"
STAGES = 4  # of the image encoder, each of which halves the picture

MODULES = {
    "enc": "encoder", "dyn": "rssm", "dec": "decoder", "rew": "reward", "con": "cont", "pol": "actor", "val": "critic",
    "slowval": "slow_critic",
}  # fmt: skip
LEFT_OUT = ("opt", "retnorm", "valnorm", "advnorm")  # the optimizer's moments, and ranges of returns
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
    (r"obs(\d)", lambda match: f"posterior_layer_{int(match[1]) - 1}"),
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


def our_name(official: str, modules: Mapping[str, str] = MODULES) -> str:
    """`dyn/dynin0/kernel` -> `rssm/dynin_0/kernel`."""
    module, *middle, leaf = official.split("/")
    layer = "/".join(middle)
    for pattern, replacement in LAYERS:
        if re.fullmatch(pattern, layer):
            layer = re.sub(pattern, replacement, layer)
            break
    return f"{modules[module]}/{layer}/{leaf}"


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _own(path: Path) -> Path:
    """A file or folder within a checkpoint. Raises `Refused` where it is a link."""
    if path.is_symlink():
        raise Refused(f"its {path.name} is a link; a file of its own is valid")
    return path


def _newest(folder: Path) -> Path:
    """The folder of one checkpoint, in that of all of them, or of a whole run."""
    if not (folder / "agent.pkl").exists() and _own(folder / "ckpt").is_dir():
        folder = folder / "ckpt"
    if not (folder / "latest").exists():
        return folder
    try:
        name = files.read(_own(folder / "latest"), 256).decode("ascii").strip()
    except UnicodeDecodeError:
        name = ""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise Refused(f"its latest names {checks.show(name)}, which is no folder in it")
    return _own(folder / name)


def read(path: Path) -> Found:
    """What a checkpoint holds, its arrays not read yet. Raises `Refused` where it is none; `OSError`."""
    file, steps = path, None
    if path.is_dir():
        folder = _newest(path)
        file = _own(folder / "agent.pkl")
        if not file.exists() and (folder / "checkpoint.ckpt").exists():
            raise Refused("it is of the authors' code before 2025, whose networks were other ones; it is not supported")
        if not file.exists():
            raise Refused(f"it holds no agent.pkl; {'latest names ' + folder.name if folder != path else 'ckpt/ does'}")
        if not (folder / "done").exists():
            raise Refused("its checkpoint has no file done: it was not saved as a whole")
        if _own(folder / "step.pkl").exists():
            steps = arrays.load(folder / "step.pkl")
            if type(steps) is not int or not 0 <= steps < 10**12:
                raise Refused(f"its step.pkl holds {checks.show(steps)}, which is no count of steps")
    agent = arrays.load(file)
    params = agent.get("params") if isinstance(agent, dict) else None
    if isinstance(agent, dict) and isinstance(agent.get("agent"), dict):
        raise Refused("it is of the authors' code before 2025, whose networks were other ones; it is not supported")
    if not isinstance(params, dict):
        raise Refused("it holds no params; the agent.pkl of a checkpoint is valid")
    for name, value in params.items():
        if not isinstance(value, arrays.Array) or value.stored is None or not re.fullmatch(r"\w+(/\w+)+", str(name)):
            raise Refused(f"its params hold {checks.show(name)}, which is no array by the name of a layer")
    left_out = tuple(name for name in params if name.split("/")[0] in LEFT_OUT)
    return Found({name: x.stored for name, x in params.items() if name not in left_out}, left_out, (file,), steps)


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


def fields(found: Found, config: Any) -> tuple[dict[str, Any], int | None]:
    """The configuration that shapes tell, and the side of pictures in pixels if it sees any.

    How many latents there are is not in them: `config` says it. Raises `KeyError`, `IndexError` or `ZeroDivisionError`
    where layers are missing or have other axes.
    """
    shapes = {name: x.shape for name, x in found.layers.items()}
    count = lambda pattern: sum(bool(re.fullmatch(pattern + "/kernel", name)) for name in shapes)
    deter, hidden = shapes["dyn/dynin0/kernel"]
    units = shapes["rew/mlp/linear0/kernel"][1]
    stoch = config.dimensions.stoch
    has_image = "enc/cnn0/kernel" in shapes
    depth = shapes["enc/cnn0/kernel"][-1] // 2 if has_image else units // 16
    dims = dict(deter=deter, hidden=hidden, stoch=stoch, classes=shapes["dyn/dynin1/kernel"][0] // stoch, depth=depth,
                units=units)  # fmt: skip
    named = [size for size, known in SIZES.items() if known._asdict() == dims]
    vectors = [shapes[f"enc/mlp{i}/kernel"][1] for i in range(count(r"enc/mlp\d"))]
    found_fields = dict(
        **({"size": named[0], **dict.fromkeys(dims)} if named else dims),
        blocks=shapes["dyn/dyngru/kernel"][0], bins=shapes["rew/head/logits/bias"][0],
        encoder_units=None if not vectors or vectors == [units] * 3 else tuple(vectors),
        prior_layers=count(r"dyn/prior\d"), posterior_layers=count(r"dyn/obs\d"),
        actor_unimix=0.0, stem="pool", cell="block_gru", norm="rms", reward_head="two_hot", critic_head="two_hot",
        **{f"{ours}_layers": count(rf"{theirs}/mlp/linear\d") for theirs, ours in
           (("rew", "reward"), ("con", "cont"), ("pol", "actor"), ("val", "critic"))},
    )  # fmt: skip
    if not has_image:
        return found_fields, None
    tokens = shapes["dyn/obs0/kernel"][0] - deter - (vectors[-1] if vectors else 0)
    return found_fields, 2**STAGES * math.isqrt(tokens // shapes[f"enc/cnn{STAGES - 1}/kernel"][-1])


def ours(found: Found, config: Any, spec: EnvSpec) -> dict[str, Layer]:
    """Layers by our names; the layout is the same. Raises `Refused` where two have one name."""
    del config, spec

    def pairs():
        for official, stored in found.layers.items():
            if official.split("/")[0] not in MODULES or official.count("/") < 2:
                raise Refused(f"it holds {checks.show(official)}, which is of no module of the agent")
            yield our_name(official), Layer(official, stored)

    return by_our_names(pairs())
