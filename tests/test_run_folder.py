"""Run folders that others have written to: what is read is checked, and nothing outside of them is written."""

import errno
import json
import os
import resource

import filelock
import pytest

from tests.run_folders import DESCRIPTION
from wmjax import files
from wmjax.run_folder import alone, open_folder, read_description, say_edits, write_json
from wmjax.types import UsageError

GOOD = {name: value for name, value in DESCRIPTION.items() if name != "env_args"}  # what has to be there
VALID = {"seed": "in [0, 2**31)", "action_repeat": "in [1, 1000]", "parallel": "'pmap'", "config": "an object"}
ODD = [
    None,
    [],
    {},
    True,
    -1,
    1.5,
    10**9,
    "",
    "x" * 5000,
    "a\nb",
    "\ud800",
    {"a": [[[[[[1]]]]]]},
    10**300,
    {"a": 10**300},
]
IS_VALID = [  # by the place in ODD
    *((name, 0) for name in ("env", "parallel", "image_size", "action_repeat")),
    *((name, 6) for name in ("seed", "steps")),
    ("config", 2),
]
CASES = [(name, odd) for name in GOOD for odd in range(len(ODD)) if (name, odd) not in IS_VALID]


def write(path, value):
    path.mkdir(exist_ok=True)
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    (path / "config.json").write_bytes(data)
    return path


def refusal(path):
    with pytest.raises(UsageError) as caught:
        read_description(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "is not a run folder" in text and len(text) < 500
    return text


def test_a_value_of_config_json_that_is_not_valid_is_named_with_what_is(tmp_path):
    for name, odd in CASES:
        text = refusal(write(tmp_path / "run", GOOD | {name: ODD[odd]}))
        assert f" {name}: " in text and VALID.get(name, "is not valid; ") in text, (name, odd, text)
    for name, odd in IS_VALID:
        assert read_description(write(tmp_path / "run", GOOD | {name: ODD[odd]}))[name] == ODD[odd]


def nested(levels, name="env_args"):
    return GOOD | {name: {"a": json.loads("[" * levels + "1" + "]" * levels)}}


def test_what_is_nested_too_deeply_to_be_walked_is_refused(tmp_path):
    for name in ("env_args", "about", "future"):
        for levels in (33, 600):
            assert "nested too deeply" in refusal(write(tmp_path / "run", nested(levels, name)))
        assert read_description(write(tmp_path / "run", nested(31, name))) == nested(31, name)
    for name, value in (("env_args", []), ("about", "x"), ("about", 3)):
        assert f" {name}: " in refusal(write(tmp_path / "run", GOOD | {name: value}))


def test_a_command_of_any_length_may_have_started_the_run(tmp_path):
    said = GOOD | {"about": {"command": f"wmjax train --out {'x' * 1000}\n\u2028", "devices": [None]}}
    assert read_description(write(tmp_path / "run", said)) == said


def test_what_a_checkpoint_says_of_config_json_may_be_anything(tmp_path):
    said = []
    for saved in (None, 3, {}, {"config": 3}, nested(600)):
        say_edits(tmp_path, GOOD, {"description": saved}, said.append)
    assert not said
    say_edits(tmp_path, GOOD, {"description": GOOD | {"preset": "x", "image_size": [1] * 10**5}}, said.append)
    assert len(said) == 1 and "image_size was [1, 1" in said[0] and len(said[0]) < 500
    say_edits(tmp_path, GOOD, {"description": GOOD | {"a\n\x1b[2J" + "b" * 10**5: 1}}, said.append)
    assert said[1].isprintable() and r"a\n\x1b[2Jbbb" in said[1] and len(said[1]) < 500


@pytest.mark.parametrize("name", GOOD)
def test_a_value_that_is_missing_is_named(name, tmp_path):
    assert f"{name}: <missing>" in refusal(write(tmp_path / "run", {k: v for k, v in GOOD.items() if k != name}))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "readable"),
        (b"{", "readable"),
        (b"3", "must be an object"),
        (b"null", "must be an object"),
        (b"\0" * 100, "readable"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"seed": 1, "seed": 2}', "'seed' is given twice"),
        (b'{"seed": NaN}', "NaN"),
        (b'{"seed": -Infinity}', "Infinity"),
        (b'{"seed": 1e999}', "1e999"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "beyond any float"),
        (b" " * 2**21, "larger than"),
    ],
)
def test_what_is_no_json_of_ours_is_refused_in_one_line(data, word, tmp_path):
    assert word in refusal(write(tmp_path / "run", data))


def test_a_config_json_that_never_ends_is_not_waited_for(tmp_path):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), os.mkdir):
        (tmp_path / "run").mkdir(exist_ok=True)
        make(tmp_path / "run" / "config.json")
        refusal(tmp_path / "run")
        files.remove(tmp_path / "run" / "config.json")


def test_a_newer_version_is_said_and_so_are_names_that_are_not_known_let_pass(tmp_path):
    said = []
    assert read_description(write(tmp_path / "run", GOOD), said.append) == GOOD and not said
    with_mark = b"\xef\xbb\xbf" + json.dumps(GOOD | {"future": [{}]}).encode()
    assert read_description(write(tmp_path / "run", with_mark), said.append)["future"] == [{}] and not said
    long = GOOD | {"about": {"command": "wmjax train " + "--agent.units 8 " * 100}}
    assert read_description(write(tmp_path / "run", long), said.append) == long and not said
    read_description(write(tmp_path / "run", GOOD | {"version": "99.1"}), said.append)
    assert len(said) == 1 and "wmjax 99.1, which is newer" in said[0]
    assert "wmjax 99.1, which is newer" in refusal(write(tmp_path / "run", GOOD | {"version": "99.1", "seed": "x"}))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.fixture
def victim(tmp_path):
    """A folder with files that nobody may touch."""
    place = tmp_path / "victim"
    (place / "folder").mkdir(parents=True)
    for name in ("file", "folder/000000000001.safetensors", "folder/config.json"):
        (place / name).write_text("precious")
    before = state(place)
    yield place
    assert state(place) == before


def state(place):
    return {path: (path.lstat().st_ino, path.is_dir() or path.read_bytes()) for path in place.rglob("*")}


def enter(path, *, resume=True, description=GOOD, **options):
    with open_folder(path, resume, description, lambda folder: None, lambda text: None, **options) as found:
        return found


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(UsageError, match="env_args: too long"):
        enter(tmp_path / "run", resume=False, description=GOOD | {"env_args": {"level": "x" * 2**20}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["checkpoints", "best", "replay", "wandb"])
def test_a_run_is_not_trained_where_one_of_its_folders_is_a_link(name, tmp_path, victim):
    path = write(tmp_path / "run", GOOD)
    (path / name).symlink_to(victim / "folder")
    before = state(path)
    with pytest.raises(UsageError, match=f"{name}' is a link"):
        enter(path)
    assert state(path) == before


def test_nor_where_the_folder_of_a_seed_is_one(tmp_path, victim):
    path, several = tmp_path / "run", GOOD | {"seeds": 2}
    write(path, several)
    (path / "seed-1").symlink_to(victim / "folder")
    with pytest.raises(UsageError, match="seed-1' is a link"):
        enter(path, description=several)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_nor_where_what_is_written_in_place_is_a_file_of_others(link, name, tmp_path, victim):
    path = write(tmp_path / "run", GOOD)
    link(victim / "file", path / name)
    with pytest.raises(UsageError, match=f"{name}' is a link or not a file of its own"):
        enter(path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_is_written_whole_takes_the_place_of_a_link(link, tmp_path, victim):
    path = write(tmp_path / "run", GOOD)
    link(victim / "folder" / "config.json", path / "linked.json")
    (path / ".linked.json.tmp").symlink_to(victim / "file")
    write_json(path / "linked.json", {"a": 1})
    assert json.loads((path / "linked.json").read_text()) == {"a": 1} and not (path / "linked.json").is_symlink()
    assert (path / "linked.json").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert len(list(path.iterdir())) == 3


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_run_folder_that_is_reached_through_a_link_is_one(tmp_path):
    write(tmp_path / "run", GOOD)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert enter(tmp_path / "link") == tmp_path / "link"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=r"not a regular file|a folder"):
            files.write(tmp_path / name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_it_is_said_and_nothing_is_left_and_no_lock_goes_on(code, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match=r"no locks; .* \(--no-lock\) is valid"):
        enter(tmp_path / "new" / "run", resume=False)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "run", GOOD)
    before = state(tmp_path)
    with pytest.raises(UsageError, match="no locks"):
        enter(tmp_path / "run")
    assert state(tmp_path) == before
    enter(tmp_path / "run", no_lock=True)
    assert enter(tmp_path / "new" / "run", resume=False, no_lock=True).is_dir()


def test_a_folder_in_use_is_refused_as_before(tmp_path):
    write(tmp_path / "run", GOOD)
    with filelock.FileLock(tmp_path / "run" / ".lock"), pytest.raises(UsageError, match="another process is training"):
        enter(tmp_path / "run")


@pytest.fixture
def full_disk():
    """No file takes another byte: as on a full disk, `write` fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_disk_that_is_full_leaves_no_folder_behind(seeds, tmp_path, full_disk):
    with pytest.raises(UsageError, match="cannot be written"):
        enter(tmp_path / "new" / "run", resume=False, description=GOOD | {"seeds": seeds})
    assert not list(tmp_path.iterdir())


def test_what_a_config_json_says_of_data_is_whole(tmp_path):
    said = {"path": "episodes", "fingerprint": "0", "spec": {}}
    for path in ("episodes", "/データ\u3000一/a\nb"):
        read_description(write(tmp_path / "run", GOOD | {"data": said | {"path": path}}))
    for name in said:
        missing = {key: value for key, value in said.items() if key != name}
        for other in (said | {name: 3}, *([] if name == "path" else [missing])):  # a file of an export has no path
            assert f"data: {name}: " in refusal(write(tmp_path / "run", GOOD | {"data": other}))


def test_a_folder_of_runs_that_cannot_be_locked_is_left_as_it_was(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new" / "runs", tmp_path / "there"):
        with pytest.raises(UsageError, match="its file system has no locks"), alone(folder):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_number_that_no_float_reaches_is_no_number():
    for text in ("1" + 400 * "0", "-1" + 400 * "0", "1e999"):
        with pytest.raises(ValueError, match=r"no number in JSON|is beyond any float"):
            files.parse_json(f'{{"a": {text}}}'.encode())
    assert files.parse_json(b'{"a": 123456789012345678901234567890}') == {"a": 123456789012345678901234567890}
