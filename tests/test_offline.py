"""Episodes that are recorded, read and trained on; and all that may be wrong with data."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
import types
import zipfile

import gymnasium
import jax
import numpy as np
import pytest

import wmjax
from tests.agents.test_configurations import TINY as CONFIGS
from tests.marks import partly_long
from tests.run_folders import DESCRIPTION
from tests.test_conformance import ROWS
from tests.test_run import TINY
from wmjax import recording, settings
from wmjax.cli import main
from wmjax.episodes import open_source, runs, stretches
from wmjax.episodes.format import FLAGS
from wmjax.loops import checkpoint, memory, parallel
from wmjax.loops.on_data import OnData, spec_alone
from wmjax.planning import CEMConfig
from wmjax.replay import chunks, host
from wmjax.replay.device import Record
from wmjax.run import Run
from wmjax.run_folder import read_description
from wmjax.types import Box, Discrete, EnvSpec, TimeStep, UsageError

ENV = "probe:act_obs"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wmjax.record(ENV, out=tmp_path_factory.mktemp("data") / "episodes", steps=200, num_envs=4)


def arrays(path):
    with np.load(path) as found:
        return dict(found)


def change(folder, name, **changed):
    """An episode with some arrays changed; None leaves one out."""
    found = {key: value for key, value in (arrays(folder / name) | changed).items() if value is not None}
    np.savez(folder / name, **found)


def train(data, out, steps=60, *, agent="dreamer_v3", **arguments):
    """A tiny run on data, what it said and its digest."""
    stream = io.StringIO()
    fields = TINY if agent == "dreamer_v3" and not arguments.get("resume") else {}
    run = wmjax.train(agent, data=data, steps=steps, out=out, progress=stream, **fields | arguments)
    return run, stream.getvalue(), re.findall(r"^state sha256 ([0-9a-f]{64})$", stream.getvalue(), re.MULTILINE)[-1]


def setup(data, **arguments):
    return settings.setup("dreamer_v3", overrides=TINY, data=data, steps=60, **arguments)


def test_a_recorded_folder_says_what_it_is_of_and_holds_whole_episodes(recorded):
    said = json.loads((recorded / "episodes.json").read_text())
    assert (said["env"], said["seed"], said["policy"], said["records"]) == (ENV, 0, {"kind": "random"}, 200)
    assert said["spec"]["action"] == {"kind": "Discrete", "n": 2} and "jax" in said["versions"]
    for name, length in said["episodes"].items():
        episode = arrays(recorded / name)
        assert name.endswith(f"-{length}.npz") and {len(x) for x in episode.values()} == {length}
        assert episode["is_first"].tolist() == [True] + [False] * (length - 1) and episode["is_last"][-1]
        assert (episode["action"].sum(1) == 1).all() and episode["reward"][0] == 0
        right = episode["action"][0, 1] == (episode["vector"][0, 0] > 0)  # the action beside what it was chosen on
        assert episode["reward"][1] == (1 if right else -1)


def test_the_same_seed_records_the_same_bytes_and_another_other_ones(recorded, tmp_path):
    contents = lambda folder: [path.read_bytes() for path in sorted(folder.glob("*.npz"))]
    again = wmjax.record(ENV, out=tmp_path / "again", steps=200, num_envs=4)
    other = wmjax.record(ENV, out=tmp_path / "other", steps=200, num_envs=4, seed=1)
    assert contents(again) == contents(recorded) != contents(other)


def test_episodes_are_recorded_to_their_end_in_equal_shares(tmp_path):
    out = wmjax.record("catch", out=tmp_path / "data", episodes=7, num_envs=4, image_size=10)
    said = json.loads((out / "episodes.json").read_text())
    assert len(said["episodes"]) == 7 and said["image_size"] == 10
    assert all(arrays(out / name)["is_terminal"][-1] for name in said["episodes"])


def test_episodes_without_an_end_are_cut_and_it_is_said_that_others_did_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "step_limit", lambda spec: 2)
    spec = EnvSpec({"vector": Box(-9, 9, (1,))}, Discrete(2))
    goes_on = lambda key, state, action: (state, wmjax.Outcome(np.float32(1), np.bool_(False), np.bool_(False)))
    endless = wmjax.RawEnv(spec, lambda key: np.zeros(1, np.float32), goes_on, lambda state: {"vector": state})
    said = []
    out = wmjax.record(endless, out=tmp_path / "data", episodes=4, num_envs=2, say=said.append)
    assert [len(arrays(path)["reward"]) for path in out.glob("*.npz")] == [3, 3]
    assert said[0] == "warning: 2 of 4 episodes, for some go on after 2 steps; they are cut"


def test_what_an_agent_plays_is_made_and_described_with_the_arguments_that_are_given(tmp_path):
    made = settings.setup("dreamer_v3", "catch", image_size=16, overrides=TINY)
    run = Run(tmp_path, made.description, made.config, made.agent, made.env, None)
    asked = dict(image_size=None, action_repeat=None, env_args={"flicker": 1.0})
    played = lambda run, env: recording._of_run(run, env, asked, "latest", None, None, False)
    _, _, where, about = played(run, "catch")
    begin = lambda key: where.step(key, where.reset(key)[0], np.eye(3, dtype=np.float32)[0])
    _, after = jax.jit(begin)(jax.random.key(0))
    assert about["env_args"] == {"flicker": 1.0} and about["image_size"] == 16 and not after.obs["image"].any()
    with pytest.raises(UsageError, match="env_args: not valid with a run that is loaded"):
        played(run, None)
    planned = run.with_policy(CEMConfig(horizon=2))
    assert planned.how()["policy"] == "cem" and "action" not in planned.how() and run.how() == {"action": "mode"}


def test_as_many_environments_are_recorded_at_once_as_the_run_has_but_not_more_than_16(tmp_path, monkeypatch):
    made = settings.setup("dreamer_v3", "catch", image_size=16, overrides=TINY)
    run = Run(tmp_path, made.description, made.config, made.agent, made.env, types.SimpleNamespace(variables=()))
    for theirs, at_once in ((1, 1), (16, 16), (64, 16)):
        agent = made.agent._replace(recipe=made.agent.recipe._replace(num_envs=theirs))
        monkeypatch.setattr(recording, "_of_run", lambda *given, agent=agent: (agent, run, made.env, {}))
        assert recording._player(None, run, None, None, "latest", False, None).num_envs == at_once


def test_nothing_is_overwritten_and_what_is_not_finished_is_removed(recorded, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"out: .* exists and is not empty"):
        wmjax.record(ENV, out=recorded, steps=8)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(wmjax.RunError, match=r"out: .* cannot be written \(No space left on device\)"):
        wmjax.record(ENV, out=tmp_path / "full", steps=8, num_envs=4)
    assert not list(tmp_path.iterdir())


def test_a_recording_that_is_told_to_end_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["record", "--env", ENV, "--steps", "200", "--num-envs", "4", "--out", str(tmp_path / "data")]) == 143
    assert capsys.readouterr().err == "wmjax: interrupted\n" and not list(tmp_path.iterdir())


def test_replay_holds_the_records_in_order_and_nothing_is_new_to_the_online_queue(recorded):
    made = setup(recorded)
    assert made.env.spec.action == Discrete(2) and made.agent.recipe.replay_capacity == 200
    records = made.data.take(2, 0, 100)
    programs = OnData(parallel.programs(made.agent, spec_alone(made.env.spec)), made.agent, records, 1)
    run = programs.init(jax.random.key(0))
    line = np.concatenate([arrays(path)["vector"] for path in sorted(recorded.glob("*.npz"))])
    np.testing.assert_array_equal(np.moveaxis(run.replay.data.step.obs["vector"], 0, 1).reshape(-1, 1), line)
    assert int(run.replay.added) == 100 and int(run.replay.cursor) == 100 // 5 * 2
    assert (int(run.stage), int(run.steps)) == (1, 8)  # prefill is done
    saved = programs.gather(run)
    assert saved.replay.data.step == () and saved.replay.data.latent
    for again, before in zip(jax.tree.leaves(programs.place(saved)), jax.tree.leaves(run), strict=True):
        if not jax.dtypes.issubdtype(before.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(again, before)


def foreign(folder, count=4, length=6, seed=0, **changed):
    """Episodes as another program writes them, at most with what is needed."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        found = {
            "image": rng.integers(0, 255, (length, 16, 16, 3), np.uint8), "reward": rng.random(length),
            "action": np.eye(3, dtype=np.float32)[rng.integers(0, 3, length)], "is_terminal": np.eye(length)[-1],
        } | changed  # fmt: skip
        np.savez(folder / f"{number}.npz", **{name: value for name, value in found.items() if value is not None})
    return folder


def test_episodes_of_other_programs_are_read_by_what_they_look_like(tmp_path):
    data = stretches(open_source(foreign(tmp_path / "a", extra=np.zeros(6))), None)
    assert data.spec.obs == {"image": Box(0, 255, (16, 16, 3), "uint8")} and data.spec.action == Discrete(3)
    record = data.read(0)
    assert record.step.is_first.tolist() == [True] + [False] * 5 and record.step.is_last.tolist() == [False] * 5 + [
        True
    ]
    integers = stretches(open_source(foreign(tmp_path / "b", action=np.array([0, 1, 2, 3, 0, 1]))), None)
    assert integers.spec.action == Discrete(4) and integers.read(0).action[3].tolist() == [0, 0, 0, 1]
    floats = foreign(tmp_path / "c", action=np.linspace(-1, 1, 12).reshape(6, 2), image=None, state=np.ones((6, 4)))
    assert stretches(open_source(floats), None).spec == EnvSpec(
        {"state": Box(-np.inf, np.inf, (4,))}, Box(-1.0, 1.0, (2,))
    )


def test_actions_that_led_to_a_record_as_dreamer_v2_writes_them_are_moved_to_the_one_before(tmp_path):
    action = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 1, 0]]
    action[0] = 0
    folder = foreign(tmp_path / "v2", action=action, is_terminal=None, discount=np.array([1, 1, 1, 1, 1, 0.0]))
    said = []
    record = stretches(open_source(folder), None, say=said.append).read(0)
    np.testing.assert_array_equal(record.action[:-1], action[1:])
    assert len(said) == 1 and "4 of 4 episodes begin with an action of zeros" in said[0]
    assert record.step.is_terminal.tolist() == [False] * 5 + [True]


BAD = [
    (dict(reward=None), "it has no 'reward'; it has action"),
    (dict(vector=None), "it has no 'vector'"),
    (dict(is_first=None), "it has no 'is_first'"),
    (dict(is_first=np.zeros(2, bool)), "is_first is False in its first record"),
    (dict(vector=np.full((2, 1), np.nan, np.float32)), "vector is not finite in 2 records"),
    (dict(reward=np.array([0, np.inf], np.float32)), "reward is not finite in 1 records"),
    (dict(vector=np.zeros((2, 3), np.float32)), r"vector is float32 \[3\], where float32 \[1\] is valid"),
    (dict(vector=np.zeros((2, 1), complex)), "vector is complex128; numbers are valid"),
    (dict(vector=np.zeros((3, 1), np.float32)), r"vector has the shape \(3, 1\), where reward has 2 records"),
    (dict(action=np.eye(3, dtype=np.float32)[:2]), r"action is float32 \[3\], where 2 entries are valid"),
    (dict(action=np.array([0, 2])), r"action is in \[0, 2\], where integers below 2 are valid"),
    (dict(action=np.full((2, 2), 0.5, np.float32)), "action is not one-hot in record 0"),
    (dict(reward=np.zeros(3, np.float32)), "it has 3 records, where episodes.json says 2"),
    (dict(reward=np.array([None, None], object)), "holds Python objects, which are not read"),
]


@pytest.mark.parametrize(("changed", "reason"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_an_episode_that_cannot_be_used_is_named_and_left_out_on_request(changed, reason, recorded, tmp_path):
    folder = shutil.copytree(recorded, tmp_path / "data")
    name = sorted(path.name for path in folder.glob("*.npz"))[3]
    change(folder, name, **changed)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=f"1 of 100 episodes cannot be used: {name}: .*{reason}"):
        setup(folder)
    made = setup(folder, skip_damaged=True)
    assert made.data.skipped == 1 and made.data.records == 198 and any(name in note for note in made.notes)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_files_that_are_missing_or_damaged_are_named_the_first_of_them_and_how_many(recorded, tmp_path):
    folder = shutil.copytree(recorded, tmp_path / "data")
    names = sorted(path.name for path in folder.glob("*.npz"))
    (folder / names[0]).unlink()
    content = bytearray((folder / names[1]).read_bytes())
    for place in range(80, len(content), 97):
        content[place] ^= 255
    (folder / names[1]).write_bytes(content)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:100])
    for name in names[3:8]:
        (folder / name).write_bytes(b"")
    with pytest.raises(
        UsageError, match=f"8 of 100 episodes .*{names[0]}: it is missing.*{names[1]}: .*damaged.*others"
    ):
        setup(folder)


HEADERS = ["-" * 9000 + "1", "[" * 9000, "{[]: 3}", "{1: 3, 'descr': 2}", "{'descr': '<f4', 'fortran_order': False"]


@pytest.mark.parametrize("header", HEADERS)
def test_an_array_whose_header_the_parser_fails_at_is_named(header, tmp_path):
    head = header.encode() + b"\n"
    with zipfile.ZipFile(foreign(tmp_path / "data") / "0.npz", "w") as archive:
        archive.writestr("reward.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with pytest.raises(
        UsageError, match=r"1 of 4 episodes cannot be used: 0\.npz: its 'reward' has no readable header"
    ):
        stretches(open_source(tmp_path / "data"), None)


def test_a_damaged_archive_of_another_compression_and_an_array_without_time_are_named(tmp_path):
    folder = foreign(tmp_path / "data")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("reward.npy", bytes(500))
    (folder / "0.npz").write_bytes(content.getvalue().replace(content.getvalue()[48:70], b"\xff" * 22))
    change(folder, "1.npz", reward=np.float32(3))
    change(folder, "2.npz", action=np.int64(1))
    with pytest.raises(UsageError, match=r"3 of 4 .*0\.npz: it is damaged.*1\.npz: .*shape.*2\.npz: .*shape"):
        stretches(open_source(folder), None)
    assert stretches(open_source(folder), None, skip_damaged=True).lengths == (6,)


def test_what_episodes_are_is_not_told_by_those_that_are_short_or_odd(tmp_path):
    short = foreign(tmp_path / "short")
    few = {name: value[:1] for name, value in arrays(short / "0.npz").items()}
    np.savez(short / "0.npz", **few | {"action": np.zeros((1, 3), np.float32)})
    assert stretches(open_source(short), None).spec.action == Discrete(3)
    odd = foreign(tmp_path / "odd", action=np.array([0, 1, 2, 0, 1, 2]), nothing=np.zeros((6, 0)))
    change(odd, "0.npz", action=np.full(6, 2**62))
    data = stretches(open_source(odd), None, skip_damaged=True)
    assert data.spec.action == Discrete(3) and data.skipped == 1 and set(data.spec.obs) == {"image"}
    with pytest.raises(UsageError, match=r"action in .* is in \[-1, -1\]; integers in \[0, 65536\) are valid"):
        stretches(open_source(foreign(tmp_path / "negative", action=np.full(6, -1))), None)


def test_actions_beyond_their_bounds_are_records_of_what_the_environment_took(tmp_path):
    wide = np.array([[-3.0], [0.5], [2.0]], np.float32)
    zeros = {f"replay/data/step/{name}": np.zeros((3, 1), bool) for name in FLAGS}
    leaves = zeros | {"replay/data/step/reward": np.zeros((3, 1), np.float32), "replay/added": np.int32(3)}
    leaves |= {"replay/data/step/obs/vector": np.zeros((3, 1, 2), np.float32), "replay/data/action": wide[:, None]}
    names, read = runs._on_device(leaves, 1)
    assert read(names[0])[0]["action"].tolist() == [[-1], [0.5], [1]]
    step = TimeStep({}, np.zeros(3), *np.zeros((3, 3), bool))
    assert recording._arrays(Record(step, wide, ()))["action"].tolist() == [[-1], [0.5], [1]]


def test_data_is_not_of_an_environment_that_repeats_actions_otherwise(recorded):
    assert setup(recorded).env.spec.action_repeat == 1
    with pytest.raises(UsageError, match="has action_repeat 1; env has action_repeat 2"):
        setup(recorded, action_repeat=2)


PLACES = [
    ("no", "is not a folder"),
    ("empty", "holds no episodes"),
    ("text", "holds no episodes"),
    ("garbled", "episodes.json in .* cannot be read"),
    ("short", "the 6 records of .* are too few for a window of 5 steps"),
    ("minari:none/here-v0", "minari|Minari"),
]


@pytest.mark.parametrize(("name", "reason"), PLACES)
def test_a_place_that_is_no_data_is_one_line(name, reason, tmp_path, capsys):
    for folder, file in (("empty", None), ("text", "a.txt"), ("garbled", "episodes.json")):
        (tmp_path / folder).mkdir()
        if file:
            (tmp_path / folder / file).write_text("{")
    foreign(tmp_path / "short", count=1, image=None, vector=np.zeros((6, 1), np.float32))
    data = name if ":" in name else tmp_path / name
    length = [] if name != "short" else ["--agent.length", "8"]
    tiny = [word for field, value in TINY.items() for word in (f"--agent.{field}", str(value))]
    reason = reason.replace("window of 5", "window of 9")
    assert main(["train", "dreamer_v3", "--data", str(data), "--out", str(tmp_path / "run"), *tiny, *length]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(reason, lines[0]) and not (tmp_path / "run").exists()


def test_data_of_another_environment_and_a_search_in_the_environment_are_refused(recorded, tmp_path):
    with pytest.raises(UsageError, match="is of an environment that observes"):
        setup(recorded, env="catch")
    pictures = foreign(tmp_path / "pictures", image=np.zeros((6, 64, 64, 3), np.uint8))
    with pytest.raises(UsageError, match=r"evolve\.where: 'env' plays in the environment.* 'dream' is valid"):
        settings.setup("world_models", data=pictures)


class Dataset:
    """One of Minari, of two episodes; the second ends by a time limit."""

    observation_space = gymnasium.spaces.Dict(
        {"place": gymnasium.spaces.Box(-5, 5, (2,)), "on": gymnasium.spaces.Discrete(2)}
    )
    action_space = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))
    episode_indices = np.arange(2)

    def iterate_episodes(self, numbers):
        for number in numbers:
            seen = {"place": np.full((4, 2), number, np.float32), "on": np.array([0, 1, 0, 1])}
            actions = np.array([[-2, 0], [0, 0.5], [2, 1]], np.float32)
            ends = np.array([False, False, number == 0])
            yield types.SimpleNamespace(observations=seen, actions=actions, rewards=np.arange(3.0), terminations=ends)


def test_data_sets_of_minari_are_read_from_its_own_store(monkeypatch):
    asked = []
    load = lambda name, download: asked.append((name, download)) or Dataset()
    monkeypatch.setitem(sys.modules, "minari", types.SimpleNamespace(load_dataset=load))
    data = stretches(open_source("minari:a/b-v0"), None)
    assert asked == [("a/b-v0", False)] and data.lengths == (4, 4)
    assert data.spec.obs == {"place": Box(-5.0, 5.0, (2,)), "on": Discrete(2)}
    first, second = data.read(0), data.read(1)
    np.testing.assert_allclose(first.action, [[-1, -1], [0, 0], [1, 1], [1, 1]])
    assert first.step.reward.tolist() == [0, 0, 1, 2] and first.step.obs["on"].tolist() == [0, 1, 0, 1]
    assert first.step.is_terminal.tolist() == [False] * 3 + [True] and not second.step.is_terminal.any()
    assert second.step.is_last.tolist() == [False] * 3 + [True] and second.step.is_first[0]


def in_columns(folder, digests):
    """The blocks of these files as two processes would have written them, and the digests of the lists."""
    lists = np.zeros_like(digests)
    for number in np.flatnonzero(digests.any(1)):
        arrays = chunks.mapped(folder, digests[number].tobytes())
        parts = [chunks.write(folder, {name: x[:, e : e + 1] for name, x in arrays.items()}) for e in range(2)]
        listed = np.stack([np.frombuffer(digest, np.uint8) for digest in parts])
        lists[number] = np.frombuffer(chunks.write(folder, {chunks.PARTS: listed}), np.uint8)
        chunks.path_of(folder, digests[number].tobytes()).unlink()
    return lists, chunks.path_of(folder, parts[1]).name


@pytest.mark.parametrize("processes", [1, 2])
def test_the_replay_of_a_run_on_the_host_is_read_from_its_files_and_one_that_is_lost_is_named(
    processes, tmp_path, monkeypatch
):
    monkeypatch.setattr(host, "CHUNK_BYTES", 6 * 32)  # rows of a block times their bytes
    rng, flag = np.random.default_rng(0), np.zeros((25, 2), bool)
    seen, first = rng.random((25, 2, 1), np.float32), flag | (np.arange(25) % 5 == 0)[:, None]
    step = TimeStep({"vector": seen}, rng.random((25, 2), np.float32), first, flag, flag)
    rows = Record(step, np.eye(2, dtype=np.float32)[rng.integers(0, 2, (25, 2))], ())
    replay = host.HostReplay(jax.tree.map(lambda x: x[0], rows), 2, 40, folder=tmp_path / "replay")
    for i in range(25):  # 20 of them fit
        replay.add(jax.tree.map(lambda x, i=i: x[i : i + 1], rows))
    saved, lost = replay.saved(), None
    if processes == 2:
        lists, lost = in_columns(tmp_path / "replay", saved.digests)
        saved = saved._replace(digests=lists)
    checkpoint.save(tmp_path / "checkpoints", 25, {"replay": saved})
    replay.close()
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION))
    spec = EnvSpec({"vector": Box(-np.inf, np.inf, (1,))}, Discrete(2))
    data = stretches(open_source(tmp_path), spec)
    assert data.lengths == (20, 20) and open_source(tmp_path).settings["env"] == "catch"
    np.testing.assert_array_equal(data.read(1).step.obs["vector"], seen[5:, 1])
    np.testing.assert_array_equal(data.read(0).action, rows.action[5:, 0])
    names = [path.name for path in (tmp_path / "replay").iterdir()]
    lost = lost or sorted(names)[0]
    (tmp_path / "replay" / lost).unlink()
    with pytest.raises(
        UsageError,
        match=f"1 of .* episodes cannot be used: replay/{'.*' if processes == 2 else lost}: it is torn or missing",
    ):
        stretches(open_source(tmp_path), spec)
    rest = stretches(open_source(tmp_path), spec, skip_damaged=True)
    assert rest.skipped == 1 and 0 < rest.records < 40
    assert all(path.name in names for path in (tmp_path / "replay").iterdir())


def test_an_environment_that_data_names_is_not_made_where_it_would_run_code_of_its_own(recorded, tmp_path):
    folder = shutil.copytree(recorded, tmp_path / "data")
    index = folder / "episodes.json"
    for name in ("gym:/nowhere/mine.py:Mine", "gymnax:NoSuch-v0"):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"env": name}))
        made = setup(folder)
        assert made.description["env"] is None and any(name in note for note in made.notes)
        assert made.env.step is None and made.env.spec.action == Discrete(2)
    with pytest.raises(UsageError, match="unknown name"):
        setup(folder, env="gymnax:NoSuch-v0")


@pytest.mark.slow
def test_a_run_on_data_in_two_parts_is_the_same_run_and_what_was_changed_is_refused(recorded, tmp_path):
    folder = shutil.copytree(recorded, tmp_path / "data")
    run, said, whole = train(folder, tmp_path / "whole", eval_every=20)
    assert "of which none is taken" in said and run.step == 60 and int(run.state.step) == 22
    _, _, half = train(folder, tmp_path / "parts", 40)
    _, _, parts = train(None, tmp_path / "parts", 60, resume=True)
    assert parts == whole != half
    assert wmjax.load(tmp_path / "whole").evaluate(4).episodes == 4
    description = read_description(tmp_path / "whole")
    assert description["data"]["path"] == str(folder) and description["env"] == ENV
    change(folder, sorted(path.name for path in folder.glob("*.npz"))[0], reward=np.zeros(2, np.float32))
    with pytest.raises(UsageError, match="is not what the run was trained on"):
        train(None, tmp_path / "whole", 80, resume=True)


@pytest.mark.slow
def test_a_runs_own_replay_is_data_too_and_without_an_environment_nothing_is_evaluated(recorded, tmp_path):
    wmjax.train("dreamer_v3", ENV, steps=100, out=tmp_path / "online", progress=False, **TINY)
    made = setup(tmp_path / "online")
    assert made.data.records == 64 and made.description["env"] == ENV
    folder = foreign(tmp_path / "foreign", 10, image=None, vector=np.zeros((6, 1), np.float32))
    run, said, _ = train(folder, tmp_path / "run")
    assert "no environment: not evaluated" in said
    with pytest.raises(UsageError, match="trained on data alone"):
        wmjax.load(tmp_path / "run").evaluate(2)
    mapped = train(folder, tmp_path / "mapped", memory_map=True)[0]
    assert int(mapped.state.step) == int(run.state.step) == 22
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(mapped.state.params)])).all()


@pytest.mark.slow
@pytest.mark.parametrize("agent", partly_long(sorted(CONFIGS), ("world_models",)))
def test_every_agent_learns_from_pictures_that_were_recorded(agent, tmp_path):
    size = 64 if agent == "world_models" else 16
    data = wmjax.record("catch", out=tmp_path / "data", steps=600, num_envs=4, image_size=size)
    config = CONFIGS[agent]
    if agent == "world_models":
        evolve = dataclasses.replace(config.evolve, where="dream")
        config = dataclasses.replace(config, evolve=evolve, reward_head="mse", done_head=True)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    steps = None if agent == "world_models" else 300
    run = wmjax.train(agent, data=data, steps=steps, out=tmp_path / "run", progress=False, **fields)
    assert int(run.state.step) > 0 and run.description["data"]["records"] == 600
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(run.state.params)])).all()


@pytest.mark.slow
def test_offline_learning_finds_the_action_that_pays(tmp_path):
    data = wmjax.record(ENV, out=tmp_path / "data", steps=4000)
    config = dataclasses.replace(ROWS["dreamer_v3"].probe, entropy_scale=3e-2)  # nothing corrects a bold policy
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    run = wmjax.train("dreamer_v3", data=data, steps=16_000, out=tmp_path / "run", progress=False, **fields)
    assert run.evaluate(100).mean > 0.8


@pytest.mark.parametrize("kept", ["replay/added", "replay/ring/added"])
def test_a_checkpoint_with_a_part_of_its_replay_is_no_data(kept, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION))
    tree = (
        {"replay": {"added": np.int32(3)}} if kept == "replay/added" else {"replay": {"ring": {"added": np.int32(3)}}}
    )
    checkpoint.save(tmp_path / "checkpoints", 25, tree)
    with pytest.raises(UsageError, match=r"data: the replay in the checkpoint of .* is not whole"):
        open_source(tmp_path)


def test_so_many_environments_as_there_is_no_memory_for_are_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "room", lambda: memory.Room(10**6, "1 MB are free"))
    asked = ["record", "--env", "catch", "--steps", "5", "--num-envs", "4096", "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    assert capsys.readouterr().err.startswith("wmjax: error: num_envs: ") and not list(tmp_path.iterdir())
