"""Files of the layouts in which the papers' authors save, written here: pickles opcode by opcode, and archives."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np

from tests.parity import load
from wmjax.types import Box, Discrete, Env, EnvSpec, TimeStep

# ---------------------------------------------------------------------------------------------------------------------
# Opcodes


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def integers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


EMPTY = name("collections", "OrderedDict") + b")R"


def tensor(key: str, array: np.ndarray, kind: str = "Float", shape=None, strides=None, offset=0, count=None) -> bytes:
    """A tensor that is the whole of a storage, if nothing else is said."""
    strides = [stride // array.itemsize for stride in array.strides] if strides is None else strides
    stored = b"(" + text("storage") + name("torch", f"{kind}Storage") + text(key) + text("cpu")
    stored += integer(array.size if count is None else count) + b"tQ"
    parts = stored + integer(offset) + integers(array.shape if shape is None else shape) + integers(strides)
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"\x89" + EMPTY + b"tR"


def dictionary(entries: dict[str, bytes], ordered: bool = True) -> bytes:
    items = b"".join(text(key) + value for key, value in entries.items())
    return (EMPTY if ordered else b"}") + b"(" + items + b"u"


def whole(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


# ---------------------------------------------------------------------------------------------------------------------
# Archives of torch.save


def archive(path, members: dict[str, bytes], **how) -> None:
    with zipfile.ZipFile(path, "w", **how) as file:
        for member, data in members.items():
            file.writestr(member, data)


def state_dict(path, arrays: dict[str, np.ndarray], metadata: bool = True) -> None:
    """As `torch.save(module.state_dict(), path)`."""
    entries = {key: tensor(str(i), np.ascontiguousarray(x)) for i, (key, x) in enumerate(arrays.items())}
    versions = dictionary({"": b"}" + text("version") + b"K\x01s"})
    body = dictionary(entries) + (b"}" + text("_metadata") + versions + b"sb" if metadata else b"")
    members = {"last/data.pkl": whole(body), "last/byteorder": b"little"}
    members |= {f"last/data/{i}": np.ascontiguousarray(x).tobytes() for i, x in enumerate(arrays.values())}
    archive(path, members | {"last/version": b"3\n"})


def iris_weights() -> dict[str, np.ndarray]:
    """Of the three recordings, which make one agent, with what a checkpoint has besides."""
    modules = {"tokenizer": "iris_tokenizer", "world_model": "iris_world_model", "actor_critic": "iris_actor_critic"}
    found = {f"{module}.{key}": x for module, file in modules.items() for key, x in load(file).tree("w").items()}
    found["tokenizer.lpips.net.slice1.0.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    found["world_model.transformer.blocks.0.attn.mask"] = np.tril(np.ones((68, 68), np.float32))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of DreamerV3


def checkpoint(folder, params: dict[str, np.ndarray], step: int = 4321, protocol: int = 4) -> None:
    """As `elements.Checkpoint` writes one, in the folder of a run."""
    place = folder / "ckpt" / "20250131T120000F123456-000000004321"
    place.mkdir(parents=True)
    (folder / "ckpt" / "latest").write_text(place.name)
    agent = {"params": params, "counters": {"updates": 7, "batches": 7, "actions": 9}}
    (place / "agent.pkl").write_bytes(pickle.dumps(agent, protocol))
    (place / "step.pkl").write_bytes(pickle.dumps(step, protocol))
    (place / "done").write_bytes(b"")


# ---------------------------------------------------------------------------------------------------------------------
# World Models


def json_lists(path, arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([np.asarray(x).tolist() for x in arrays], indent=0))


# ---------------------------------------------------------------------------------------------------------------------
# Environments of the recordings' spaces


def environment(obs: dict, action: Discrete | Box) -> Env:
    """Zeros to look at, and episodes of four steps."""
    shown = {key: jnp.zeros(space.shape, space.dtype) for key, space in obs.items()}

    def step_of(count):
        false = jnp.zeros((), bool)
        return TimeStep(shown, jnp.float32(0), count == 0, count == 4, false)

    def step(key, count, action):
        count = jnp.where(count == 4, 0, count + 1)
        return count, step_of(count)

    return Env(EnvSpec(obs, action, 4), lambda key: (jnp.int32(0), step_of(jnp.int32(0))), step)


def image(side: int = 64, channels: int = 3) -> Box:
    return Box(0, 255, (side, side, channels), "uint8")


def pickled(value) -> bytes:
    file = io.BytesIO()
    pickle.dump(value, file, 2)
    return file.getvalue()
