"""Files that are damaged, or made to do harm: each gives one line, runs nothing, and takes little memory."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

import wmjax
from tests.authors.written import EMPTY, archive, checkpoint, dictionary, name, state_dict, tensor, text, whole
from wmjax import importing  # noqa: F401, its imports are not measured
from wmjax.cli import main

MOST_BYTES = 100e6
ONE = np.zeros(4, np.float32)
TOUCH = b"(" + text("touch MARK") + b"t"  # MARK is a path


SLOW = ("very many numbers", "very many lists", "too many opcodes", "tuples within tuples", "a bomb")


def cases(table):
    """Names of a table; those that go up to a bound take seconds."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in table]


def refused(agent, path, out, words):
    """The import ends in one line with these words; nothing is written, and less than 100 MB is taken meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(wmjax.UsageError) as error:
            wmjax.import_weights(agent, path, out)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(error.value)
    assert words in line and "\n" not in line and len(line) < 1000, line
    assert line.startswith("path: ") and str(path) in line
    assert most < MOST_BYTES, most
    assert not out.exists() and not os.path.lexists(out.parent / "mark")


# ---------------------------------------------------------------------------------------------------------------------
# Pickles, in archives of torch.save and in checkpoints of DreamerV3

CALLS = "calls what no tensors need"
NAMES = "which no tensors need; it is not imported"
CUT = "is cut off"
OPCODE = "which no tensors need and which is not followed"
long_text = lambda size: b"\x8d" + struct.pack("<Q", size)

PICKLES = {
    "os.system": (name("os", "system") + TOUCH + b"R", "names 'os.system', " + NAMES),
    "posix.system": (name("posix", "system") + TOUCH + b"R", NAMES),
    "eval": (name("builtins", "eval") + TOUCH + b"R", "'builtins.eval'"),
    "exec by the stack": (text("builtins") + text("exec") + b"\x93" + TOUCH + b"R", "'builtins.exec'"),
    "getattr": (name("builtins", "getattr"), "'builtins.getattr'"),
    "a process": (name("subprocess", "Popen") + TOUCH + b"R", "'subprocess.Popen'"),
    "a name within another": (name("torch._utils", "os.system") + TOUCH + b"R", "'torch._utils.os.system'"),
    "a name with line breaks": (text("os\r\n") + text("sys\x00tem") + b"\x93", NAMES),
    "a loader": (name("torch", "load") + TOUCH + b"R", "'torch.load'"),
    "numpy's loader": (name("numpy", "load") + TOUCH + b"R", "'numpy.load'"),
    "a name that is no text": (b"N" + text("system") + b"\x93", NAMES),
    "a call of a text": (text("os.system") + TOUCH + b"R", CALLS),
    "arguments that are no tuple": (name("collections", "OrderedDict") + b"]R", CALLS),
    "arguments of another kind": (name("collections", "OrderedDict") + TOUCH + b"R", "in a way that is not known"),
    "attributes of a list": (b"]}b", "sets attributes of what has none"),
    "an object": (b"(" + name("os", "system") + b"o", NAMES),
    "an instance": (b"(" + text("touch MARK") + b"ios\nsystem\n", "opcode INST, " + OPCODE),
    "a new object": (EMPTY + b")\x81", "opcode NEWOBJ, "),
    "an extension": (b"\x82\x01", "opcode EXT1, "),
    "a place elsewhere as text": (b"Pevil\n", "opcode PERSID, "),
    "next buffer": (b"\x97", "opcode NEXT_BUFFER, "),
    "an integer of any length": (b"\x8b" + struct.pack("<i", 2**31 - 1), "opcode LONG4, "),
    "an integer of 255 bytes": (b"\x8a\xff" + b"\x01" * 255, "an integer of 255 bytes"),
    "an unknown opcode": (b"\xff", "opcode b'\\xff'"),
    "a text of an exabyte": (long_text(2**60), "a text of 1,152,921,504,606,846,976 bytes"),
    "a text that is not there": (b"X" + struct.pack("<I", 1000) + b"abc", CUT),
    "bytes of exabytes": (b"\x8e" + struct.pack("<Q", 2**62), CUT),
    "a frame of exabytes": (b"\x95" + struct.pack("<Q", 2**63), CUT),
    "text that is not UTF-8": (b"X\x02\x00\x00\x00\xff\xff", "not UTF-8"),
    "what was never kept": (b"h\x07", "takes what is not there"),
    "an empty stack": (b"R", "takes what is not there"),
    "what lies before a mark": (b"N(R", "takes what is not there"),
    "a list of what is none": (b"NNa", "appends to what is no list"),
    "unhashable keys": (b"}]Ns", "keys that are neither text nor integers"),
    "nested keys": (b"}" + b")" + b"\x85" * 10_000 + b"Ns", "keys that are neither text nor integers"),
    "odd entries": (b"}(Nu", "sets entries of what is no dictionary"),
    "a value taken off": (b"NN0", "opcode POP, "),
    "too many opcodes": (b"N" * 100_001, "more than 100,000 opcodes"),
    "many long texts": ((b"X" + struct.pack("<I", 60_000) + b"a" * 60_000) * 300, "bytes besides its tensors"),
    "tuples within tuples": (b")" + b"\x85" * 50_000, "it holds"),
    "a list within itself": (b"]q\x00h\x00a", "it holds"),
    "kept at a far place": (b"Nr\xff\xff\xff\xff", "it holds"),
    "not a number": (b"G" + struct.pack(">d", float("nan")), "it holds"),
}  # fmt: skip


def marked(body: bytes, folder) -> bytes:
    """With the path of the file that the code in it would make; of a text the length changes, too."""
    old, new = text("touch MARK"), text(f"touch {folder / 'mark'}")
    return body.replace(old, new)


@pytest.mark.parametrize("case", cases(PICKLES))
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_by_name(case, tmp_path):
    body, words = PICKLES[case]
    body = marked(body, tmp_path)
    limit = "at most 16,777,216 are read" if len(body) > 2**24 else words
    archive(tmp_path / "last.pt", {"a/data.pkl": whole(body)})
    refused("iris", tmp_path / "last.pt", tmp_path / "run", limit)
    (tmp_path / "agent.pkl").write_bytes(whole(body, 4))
    words = NAMES if b"OrderedDict" in body else words  # which arrays of NumPy do not need
    refused("dreamer_v3", tmp_path / "agent.pkl", tmp_path / "run", words)


def test_code_would_run_if_python_unpickled_it(tmp_path):
    """The files above are what they are said to be."""
    pickle.loads(whole(marked(PICKLES["os.system"][0], tmp_path)))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_files_that_are_cut_off_are_refused(share, tmp_path):
    state_dict(tmp_path / "last.pt", {"tokenizer.a": np.arange(500.0, dtype=np.float32)})
    data = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(share * len(data))])
    refused("iris", tmp_path / "cut.pt", tmp_path / "run", "cannot be imported: it ")
    data = pickle.dumps({"params": {"dyn/dynin0/kernel": np.zeros((50, 9), np.float32)}})
    (tmp_path / "agent.pkl").write_bytes(data[: int(share * len(data))])
    refused("dreamer_v3", tmp_path / "agent.pkl", tmp_path / "run", "cut off")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors

GLOBAL = name("torch", "FloatStorage")


def stored_elsewhere(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"tQ"


TENSORS = {
    "a storage that is not there": (tensor("7", ONE), "holds no 'a/data/7'"),
    "a storage outside": (tensor("../../x", ONE), "holds no 'a/data/../../x'"),
    "more than the storage has": (tensor("0", ONE, count=2**31 - 1), "has 16 bytes, and its pickle says 8,589,934,588"),
    "fewer than none": (tensor("0", ONE, count=-1), "has 16 bytes"),
    "an unknown kind": (stored_elsewhere(text("storage"), EMPTY, text("0"), text("cpu"), b"K\x04"), "stored elsewhere"),
    "something else elsewhere": (stored_elsewhere(text("module"), text("os")), "stored elsewhere"),
    "a text elsewhere": (text("storage") + b"Q", "stored elsewhere"),
    "beyond the end": (tensor("0", ONE, offset=1), "is not all in its storage of 4 numbers"),
    "before the start": (tensor("0", ONE, offset=-1), "described in a way that is not known"),
    "repeated without end": (tensor("0", ONE, shape=(2**30,), strides=(0,)), "is not all in its storage"),
    "far apart": (tensor("0", ONE, shape=(2, 2), strides=(2**30, 1)), "is not all in its storage"),
    "a negative side": (tensor("0", ONE, shape=(-4,)), "has the shape (-4,)"),
    "negative steps": (tensor("0", ONE, strides=(-1,)), "has the shape (-1,)"),
    "many axes": (tensor("0", ONE, shape=(1,) * 40, strides=(1,) * 40), "has the shape"),
    "steps of other axes": (tensor("0", ONE, strides=(1, 1)), "described in a way that is not known"),
    "no tensor": (b"N", "other things than tensors by name"),
    "no module of an agent": (tensor("0", ONE), "holds no actor_critic"),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(TENSORS))
def test_tensors_that_are_not_in_the_file_are_refused_before_they_are_read(case, tmp_path):
    body, words = TENSORS[case]
    members = {"a/data.pkl": whole(dictionary({"tokenizer.x": body})), "a/data/0": ONE.tobytes()}
    archive(tmp_path / "last.pt", members)
    refused("iris", tmp_path / "last.pt", tmp_path / "run", words)


class Arrays:
    """Pickles that say an array is other than its bytes are."""

    def __init__(self, shape, code="f4", data=b"\x00" * 16):
        self.shape, self.code, self.data = shape, code, data

    def body(self) -> bytes:
        dtype = name("numpy", "dtype") + b"(" + text(self.code) + b"\x89\x88tR"
        dtype += b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        made = name("numpy.core.multiarray", "_reconstruct") + b"(" + name("numpy", "ndarray") + b"K\x00\x85C\x01btR"
        shape = b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in self.shape) + b"t"
        return made + b"(K\x01" + shape + dtype + b"\x89C" + bytes([len(self.data)]) + self.data + b"tb"


ARRAYS = {
    "more entries than bytes": (Arrays((2**38,)).body(), "should have other than 16 bytes"),
    "an endless product": (Arrays((2**39,) * 8).body(), "should have other than 16 bytes"),
    "a negative side": (Arrays((-4,)).body(), "has the shape (-4,)"),
    "Python's objects": (Arrays((2,), "O8").body(), "has the dtype 'O8'"),
    "a structure": (Arrays((2,), "V8").body(), "has the dtype 'V8'"),
    "an array of JAX": (name("jax._src.array", "_reconstruct_array"), "'jax._src.array._reconstruct_array'"),
    "no array": (b"K\x01", "no array by the name of a layer"),
    "no state": (
        name("numpy.core.multiarray", "_reconstruct") + b"(" + name("numpy", "ndarray") + b"K\x00\x85C\x01btR",
        "no array by the name of a layer",
    ),
}


@pytest.mark.parametrize("case", cases(ARRAYS))
def test_arrays_that_are_not_in_the_file_are_refused_before_they_are_read(case, tmp_path):
    body, words = ARRAYS[case]
    params = dictionary({"dyn/dynin0/kernel": body}, ordered=False)
    (tmp_path / "agent.pkl").write_bytes(whole(dictionary({"params": params}, ordered=False), 4))
    refused("dreamer_v3", tmp_path / "agent.pkl", tmp_path / "run", words)


# ---------------------------------------------------------------------------------------------------------------------
# Archives

BODY = whole(dictionary({"tokenizer.x": tensor("0", ONE)}))
WHOLE = {"a/data.pkl": BODY, "a/data/0": ONE.tobytes()}


def linked() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("a/data/0")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


def entries(path, *members, **how):
    with zipfile.ZipFile(path, "w", **how) as file:
        for member, data in members:
            file.writestr(member, data)


def patched(path, old: bytes, new: bytes, last: bool = False):
    """With some bytes in the place of others, of which the last or first is meant."""
    archive(path, WHOLE)
    data = path.read_bytes()
    at = data.rfind(old) if last else data.find(old)
    path.write_bytes(data[:at] + new + data[at + len(new) :])


def end_record(path, count, length, start):
    archive(path, WHOLE)
    path.write_bytes(
        path.read_bytes()[:-22] + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, length, start, 0)
    )


def directory_entry(path, offset, form, value):
    """One field of the first entry of the directory."""
    archive(path, WHOLE)
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.find(b"PK\x01\x02") + offset, value)
    path.write_bytes(data)


def overlapping(path):
    archive(path, WHOLE)
    data = bytearray(path.read_bytes())
    first = data.find(b"PK\x01\x02")
    place = struct.unpack_from("<I", data, first + 42)[0]
    struct.pack_into("<I", data, data.find(b"PK\x01\x02", first + 4) + 42, place)
    path.write_bytes(data)


def huge(path):
    """Sizes that agree with each other and not with the file."""
    archive(path, WHOLE)
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, data.find(b"PK\x01\x02") + 20, 2**30, 2**30)
    path.write_bytes(data)


def bomb(path):
    archive(path, WHOLE | {"a/data/1": bytes(150_000_000)}, compression=zipfile.ZIP_DEFLATED)


ARCHIVES = {
    "a bomb": (bomb, "is compressed, which torch.save does not do"),
    "a size that is not so": (lambda p: directory_entry(p, 24, "<I", 2**31), "would have 2,147,483,648 bytes"),
    "sizes beyond the file": (huge, CUT),
    "an encrypted member": (lambda p: directory_entry(p, 8, "<H", 1), "is encrypted"),
    "a link": (lambda p: entries(p, ("a/data.pkl", BODY), (linked(), "/etc/passwd")), "is a link or no file"),
    "a name twice": (lambda p: entries(p, *WHOLE.items(), ("a/data/0", b"")), "holds 'a/data/0' twice"),
    "an absolute name": (lambda p: archive(p, {"a/data.pkl": BODY, "/etc/passwd": b""}), "'/etc/passwd' has a name"),
    "a name upwards": (lambda p: archive(p, {"a/data.pkl": BODY, "a/../../x": b""}), "has a name that is not valid"),
    "a name of Windows": (lambda p: archive(p, {"a/data.pkl": BODY, "C:/x": b""}), "has a name that is not valid"),
    "a folder": (lambda p: archive(p, {"a/data.pkl": BODY, "a/data/": b""}), "has a name that is not valid"),
    "another name where it lies": (lambda p: patched(p, b"a/data/0", b"a/data/9"), "has another name where it lies"),
    "members within each other": (overlapping, "has another name where it lies"),
    "a flipped bit": (lambda p: patched(p, b"tokenizer", b"tokenizes"), "does not match its CRC-32"),
    "no pickle": (lambda p: archive(p, {"a/data/0": b""}), "does not hold one data.pkl"),
    "two pickles": (lambda p: archive(p, {"a/data.pkl": BODY, "b/data.pkl": BODY}), "does not hold one data.pkl"),
    "big-endian numbers": (lambda p: archive(p, WHOLE | {"a/byteorder": b"big"}), "not little-endian"),
    "very many members": (lambda p: end_record(p, 60_000, 50, 0), "60,000 members"),
    "a long directory": (lambda p: end_record(p, 2, 2**31, 0), "directory has"),
    "a directory elsewhere": (lambda p: end_record(p, 2, 60, 2**31), "directory has"),
    "a directory of nothing": (lambda p: end_record(p, 2, 100, 10), "its directory is not valid"),
    "64 bits without them": (lambda p: end_record(p, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), "record at its end is not valid"),
    "an empty file": (lambda p: p.write_bytes(b""), "not an archive"),
    "text": (lambda p: p.write_text("weights " * 1000), "not an archive"),
    "a pickle of old PyTorch": (lambda p: p.write_bytes(whole(b"\x8a\x0a" + b"l\xfc" * 5)), "from PyTorch 1.6 on"),
    "a folder in its place": (lambda p: p.mkdir(), "it is a folder"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "nothing": (lambda p: None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(ARCHIVES))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_not_as_torch_writes_them_are_refused(case, tmp_path):
    write, words = ARCHIVES[case]
    write(tmp_path / "last.pt")
    refused("iris", tmp_path / "last.pt", tmp_path / "run", words)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of DreamerV3


def run_of(folder, latest=None, step=None):
    checkpoint(folder, {"dyn/dynin0/kernel": np.zeros((4, 4), np.float32)})
    (place,) = (path for path in (folder / "ckpt").iterdir() if path.is_dir())
    if latest is not None:
        (folder / "ckpt" / "latest").write_bytes(latest)
    if step is not None:
        (place / "step.pkl").write_bytes(step)
    return place


def link_of_agent(folder):
    place = run_of(folder)
    (place / "agent.pkl").rename(folder / "else.pkl")
    (place / "agent.pkl").symlink_to(folder / "else.pkl")


def link_of_folder(folder):
    place = run_of(folder, b"elsewhere")
    (folder / "ckpt" / "elsewhere").symlink_to(place)


def pipe(folder):
    place = run_of(folder)
    (place / "agent.pkl").unlink()
    os.mkfifo(place / "agent.pkl")


def old(folder):
    folder.mkdir()
    (folder / "checkpoint.ckpt").write_bytes(pickle.dumps({"agent": {}, "step": 3}))


def older_agent(folder):
    place = run_of(folder)
    (place / "agent.pkl").write_bytes(pickle.dumps({"agent": {"wm/rssm/x": 0}}))


FOLDERS = {
    "latest upwards": (lambda f: run_of(f, b"../../etc"), "which is no folder in it"),
    "latest elsewhere": (lambda f: run_of(f, b"/etc"), "which is no folder in it"),
    "latest of other bytes": (lambda f: run_of(f, b"\xff\xfe"), "which is no folder in it"),
    "a long latest": (lambda f: run_of(f, b"a" * 1000), "larger than 256 bytes"),
    "latest that is not there": (lambda f: run_of(f, b"2024"), "holds no agent.pkl; latest names 2024"),
    "a link for the agent": (link_of_agent, "agent.pkl is a link"),
    "a link for the folder": (link_of_folder, "elsewhere is a link"),
    "a pipe": (pipe, "not a regular file"),
    "not saved to its end": (lambda f: (run_of(f) / "done").unlink(), "no file done"),
    "steps that run code": (lambda f: run_of(f, step=whole(name("os", "system"), 4)), NAMES),
    "steps that are text": (lambda f: run_of(f, step=pickle.dumps("9")), "no count of steps"),
    "the code before": (old, "before 2025"),
    "an agent of the code before": (older_agent, "before 2025"),
    "an empty folder": (lambda f: f.mkdir(), "holds no agent.pkl"),
    "bytes after the end": (lambda f: append(run_of(f) / "agent.pkl", b"more"), "4 bytes follow"),
    "text for the agent": (lambda f: (run_of(f) / "agent.pkl").write_text("agent"), "is not a pickle"),
    "a pickle of protocol 0": (lambda f: (run_of(f) / "agent.pkl").write_bytes(pickle.dumps({}, 0)), "is not a pickle"),
    "other layers": (run_of, "it holds no 'rew/mlp/linear0/kernel', which github.com/danijar/dreamerv3 has"),
}  # fmt: skip


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


@pytest.mark.parametrize("case", cases(FOLDERS))
def test_folders_that_are_no_checkpoints_of_dreamer_v3_are_refused(case, tmp_path, monkeypatch):
    write, words = FOLDERS[case]
    write(tmp_path / "logdir")
    how = {"env": "catch"} if case == "other layers" else {}
    monkeypatch.setattr(wmjax, "import_weights", lambda *args, real=wmjax.import_weights: real(*args, **how))
    refused("dreamer_v3", tmp_path / "logdir", tmp_path / "run", words)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers in JSON

JSON = {
    "nothing": (b"", "no JSON list"),
    "an object": (b'{"a": 1}', "no JSON list"),
    "text": (b'[["a"]]', "at byte 2"),
    "not a number": (b"[[1, NaN]]", "no JSON list of numbers"),
    "an infinity": (b"[[1, -Infinity]]", "no JSON list of numbers"),
    "too large for float32": (b"[[1e39]]", "that float32 cannot hold"),
    "an integer of any length": (b"[[" + b"9" * 5000 + b"]]", "no JSON list of numbers"),
    "zeros before a number": (b"[[01]]", "no JSON list of numbers"),
    "no number between commas": (b"[[1,,2]]", "no JSON list of numbers"),
    "a comma at the end": (b"[[1,]]", "no JSON list of numbers"),
    "numbers without commas": (b"[[1 2]]", "no JSON list of numbers"),
    "rows of other lengths": (b"[[[1, 2], [3]]]", "not regular"),
    "numbers beside lists": (b"[[1, [2]]]", "not regular"),
    "very deep": (b"[" * 100_000, "more than 8 deep"),
    "very many lists": (b"[" + b"[1]," * 100_001, "or are more than 100,000"),
    "cut off": (b"[[1, 2", "cut off"),
    "cut off between": (b"[[1, 2],", "cut off"),
    "more than one": (b"[[1]] [2]", "more follows"),
    "too few arrays": (b"[[1]]", "holds 1 arrays; 22 are valid (enc_conv1/kernel, ...)"),
    "other axes": (b"[" + b"[1]," * 21 + b"[1]]", "has enc_conv1/kernel of shape (1,); 4 axes are valid"),
    "very many numbers": (b"[[" + b"0," * 9_000_000 + b"0]]", "more than 8,000,000 numbers"),
    "not text": (bytes(range(256)), "no JSON list"),
}


@pytest.mark.parametrize("case", cases(JSON))
def test_json_that_is_not_lists_of_numbers_is_refused(case, tmp_path):
    data, words = JSON[case]
    folder = tmp_path / "car"
    (folder / "vae").mkdir(parents=True)
    (folder / "log").mkdir()
    (folder / "vae" / "vae.json").write_bytes(data)
    (folder / "log" / "a.best.json").write_text("[[1.0], 900]")
    refused("world_models", folder, tmp_path / "run", words)


def large(folder):
    with (folder / "vae" / "vae.json").open("wb") as file:
        file.truncate(2**40)


def link(folder):
    (folder / "vae" / "vae.json").symlink_to("/etc/hostname")


def two_controllers(folder):
    (folder / "vae" / "vae.json").write_text("[]")
    (folder / "log" / "b.best.json").write_text("[]")


CARS = {
    "a terabyte": (large, "larger than 40,000,000 bytes"),
    "a link": (link, "vae/vae.json is a link"),
    "two controllers": (two_controllers, "there is a.best.json, b.best.json"),
    "nothing": (lambda folder: None, "neither vae/vae.json (CarRacing) nor tf_models/vae.json (Doom)"),
    "a pipe": (lambda folder: os.mkfifo(folder / "vae" / "vae.json"), "not a regular file"),
}


@pytest.mark.parametrize("case", cases(CARS))
def test_folders_that_are_none_of_world_models_are_refused(case, tmp_path):
    write, words = CARS[case]
    folder = tmp_path / "car"
    for inner in ("vae", "log"):
        (folder / inner).mkdir(parents=True)
    (folder / "log" / "a.best.json").write_text("[[1.0], 900]")
    write(folder)
    refused("world_models", folder, tmp_path / "run", words)


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


@pytest.mark.parametrize(
    "words, error",
    [
        ([], "agent: missing; valid are iris, dreamer_v3, world_models"),
        (["irs", "FILE", "--out", "run"], "'irs'"),
        (["dreamer_v2", "FILE", "--out", "run"], "dreamer_v2"),
        (["iris", "--out", "run"], "path: missing"),
        (["iris", "FILE"], "out: missing"),
        (["iris", "FILE", "--out", "full"], "exists and is not empty"),
        (["iris", "FILE", "--out", "run", "--agent.head", "2"], "--agent.head: unknown option"),
        (["iris", "FILE", "--out", "run"], "env: missing; the environment that the agent was trained in"),
        (["iris", "FILE", "--out", "run", "--steps", "0"], "steps: 0 is not valid"),
    ],
)
def test_what_is_missing_or_not_valid_is_named(words, error, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    state_dict(tmp_path / "FILE", {f"{module}.x": ONE for module in ("tokenizer", "world_model", "actor_critic")})
    assert main(["import", *words]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert (tmp_path / "full" / "mine").read_text() == "kept" and not (tmp_path / "run").exists()
