"""Several processes train one run: each test starts its own, and ends them."""

import contextlib
import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.marks import partly_long
from tests.one_process import RUNS
from wmjax import distributed
from wmjax.cli import arguments
from wmjax.loops import shards
from wmjax.run_folder import CHECKPOINTS, METRICS, REPLAY
from wmjax.types import UsageError

ROOT = Path(__file__).parents[1]
RTOL = 1e-3
SECONDS = 400
# A run that compiles soon: nothing but IRIS's tokenizer learns.
SOON = dict(agent="iris", world_model_after=10**6, actor_critic_after=10**6, eval_every=0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(out, agent="dreamer_v3", *, count=2, devices=2, said=None, env=None, **train):
    """Starts the processes of a run, with so many devices each; `said[i]` are other words for process i."""
    port, found = free_port(), []
    for i in range(count):
        # By the kernels that users get, as in `test_parallel.py`.
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        asked = {"agent": agent, "out": str(out), "train": train} | ({"env": env, "chunk_bytes": 1000} if env else {})
        if count > 1:
            asked |= {"coordinator": f"127.0.0.1:{port}", "num_processes": count, "process_id": i}
        asked |= (said or {}).get(i, {})
        environ = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.one_process", json.dumps(asked)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        found.append(subprocess.Popen(command, cwd=ROOT, text=True, env=environ, **pipes))
    return found


@contextlib.contextmanager
def processes(*args, **how):
    found = start(*args, **how)
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def ended(found, seconds=SECONDS):
    """What each process has said, and its code, once all have ended."""
    return [(*process.communicate(timeout=seconds), process.returncode) for process in found]


def run(*args, **how):
    """What the processes of a run print; they have to end well."""
    with processes(*args, **how) as found:
        results = ended(found)
    for _, error, code in results:
        assert code == 0, error[-3000:]
    return [output for output, _, _ in results]


def digests(outputs):
    return [re.search(r"^digest (\w+)$", output, re.MULTILINE)[1] for output in outputs]


def state_digest(output):
    return re.findall(r"^state sha256 (\w{64})$", output, re.MULTILINE)[-1]


def variables(out):
    with np.load(Path(out) / "variables.npz") as found:
        return dict(found)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / METRICS).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Alone


def test_one_process_asks_nobody():
    assert distributed.count() == 1 and distributed.leads()
    assert distributed.gather([1.5, 2.0]).tolist() == [[1.5, 2.0]]
    assert distributed.exchange({"a": 1}) == [{"a": 1}]
    assert distributed.in_turn(lambda: 3) == 3
    distributed.agree({"a": 1})
    distributed.connect()


def test_the_command_line_knows_what_connects_processes():
    assert arguments.DETECTED == distributed.DETECTED
    parameters = inspect.signature(distributed.connect).parameters
    assert tuple(parameters) == arguments.CONNECTING
    defaults = arguments.TrainArgs()
    assert all(getattr(defaults, name) == parameters[name].default for name in arguments.CONNECTING)


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(coordinator="here:1"), "num_processes: missing"),
        (dict(num_processes=2, process_id=0), "coordinator: missing"),
        (dict(coordinator="here", num_processes=2, process_id=0), "coordinator: 'here' is not valid; HOST:PORT"),
        (dict(coordinator="here:0", num_processes=2, process_id=0), "coordinator: 'here:0' is not valid"),
        (dict(coordinator="here:x", num_processes=2, process_id=0), "coordinator: 'here:x' is not valid"),
        (dict(coordinator=3, num_processes=2, process_id=0), "coordinator: 3 is not valid"),
        (dict(coordinator="here:1", num_processes=2, process_id=2), "process_id: 2 is not valid with 2 processes"),
        (dict(coordinator="here:1", num_processes=0, process_id=0), "num_processes"),
        (dict(coordinator="here:1", num_processes=2, process_id=-1), "process_id"),
        (dict(distributed="slurmy"), "distributed: 'slurmy' is not valid"),
        (dict(distributed="auto", process_id=1), "distributed: 'auto' finds"),
        (dict(coordinator="here:1", num_processes=2, process_id=1, heartbeat_timeout=0), "heartbeat_timeout"),
    ],
)
def test_what_cannot_connect_is_refused_by_name(asked, words):
    with pytest.raises(UsageError, match=f"^{re.escape(words)}"):
        distributed.connect(**asked)


def test_a_coordinator_that_does_not_answer_is_named_after_its_time():
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(UsageError, match=rf"^coordinator: 127.0.0.1:{port} did not answer process 1 of 2 in 2 s"):
        distributed.connect(f"127.0.0.1:{port}", 2, 1, coordinator_timeout=2)
    assert 1.5 < time.monotonic() - begun < 10


def test_a_port_that_is_taken_is_refused_by_the_first_process():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^coordinator: 127.0.0.1:{port} cannot be opened here"):
            distributed.connect(f"127.0.0.1:{port}", 2, 0)


BLOCKS = [
    {"part": i, "name": f"x@{i}", "start": [2 * i, 0], "shape": [2, 3], "sha256": "0" * 64} for i in range(2)
]  # fmt: skip


def test_blocks_of_a_manifest_have_to_make_up_the_array_each_element_once():
    assert shards.fault([4, 3], BLOCKS) is None
    changed = lambda **what: [BLOCKS[0], BLOCKS[1] | what]
    for blocks in (
        None, [], BLOCKS[:1], [BLOCKS[0], BLOCKS[0]], [*BLOCKS, BLOCKS[1]], [1, 2],
        changed(start=[1, 0]), changed(start=[4, 0]), changed(start=[-2, 0]), changed(start=[2]), changed(shape=[2, 2]),
        changed(shape=[0, 3]), changed(part=-1), changed(name=3), changed(sha256="z" * 64), changed(start=[2.0, 0]),
    ):  # fmt: skip
        assert shards.fault([4, 3], blocks) is not None, blocks
    assert shards.fault([2, 6], BLOCKS) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Together


# Environments on the host, in workers of each process.
ON_HOST = {
    "dreamer_v3 host": dict(env="gym:CartPole-v1", steps=400, workers=1),
    "world_models host": dict(env="made:Pictured", workers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", partly_long((*RUNS, *ON_HOST), ("dreamer_v3 host",)))
def test_two_processes_of_two_devices_learn_what_one_of_four_does(which, tmp_path):
    together, alone, agent, how = tmp_path / "together", tmp_path / "alone", which.split()[0], ON_HOST.get(which, {})
    outputs = run(together, agent, **how)
    single = run(alone, agent, count=1, devices=4, **how)
    assert len(set(digests(outputs))) == 1  # replicas are equal bit for bit
    one, two = variables(alone), variables(together)
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}
    # The first updates are the same but for rounding, which later ones amplify: optimizers take whole steps also where
    # a gradient is rounding alone, and samples flip.
    lines = [[line for line in metrics(out) if line["updates"]] for out in (alone, together)]
    watched = [name for name in lines[0][0] if "loss" in name or "grad_norm" in name]
    assert watched and [line["step"] for line in lines[0]][:1] == [line["step"] for line in lines[1]][:1]
    for name in watched:
        np.testing.assert_allclose(lines[1][0][name], lines[0][0][name], rtol=RTOL, atol=1e-4, err_msg=name)
    assert [line["updates"] for line in metrics(together)][-1] >= 20
    assert metrics(together)[-1]["updates"] == metrics(alone)[-1]["updates"]
    assert "state sha256" in outputs[0] and "state sha256" not in outputs[1]
    assert len(single) == 1
    assert len(list(together.rglob(METRICS))) == 1


@pytest.mark.long
@pytest.mark.slow
def test_what_two_processes_saved_goes_on_in_one_and_back_with_the_same_bytes(tmp_path):
    out = tmp_path / "run"
    first = state_digest(run(out, steps=160, **SOON)[0])
    assert (out / CHECKPOINTS / "000000000160" / "blocks-1.safetensors").is_file()
    assert not list((out / CHECKPOINTS).glob(".*"))
    how = SOON | dict(resume=True, steps=160)  # nothing is left to do
    for count, devices in ((1, 1), (4, 1)):
        assert state_digest(run(out, count=count, devices=devices, **how)[0]) == first, (count, devices)
    longer = run(out, resume=True, steps=320, **SOON)
    assert metrics(out)[-1]["step"] == 320 and len(set(digests(longer))) == 1


@pytest.mark.long
@pytest.mark.slow
def test_what_two_processes_collected_on_the_host_goes_on_in_one_and_back(tmp_path):
    out, how = tmp_path / "run", ON_HOST["dreamer_v3 host"] | dict(eval_every=0, steps=240)
    outputs = run(out, **how)
    first, learned = state_digest(outputs[0]), variables(out)
    assert len(list((out / REPLAY).iterdir())) >= 9  # files of each process, and the lists of them
    for count, devices, more in ((1, 1, {}), (4, 1, {}), (2, 2, {"memory_map": True})):
        again = run(out, count=count, devices=devices, resume=True, **how, **more)
        jax.tree.map(np.testing.assert_array_equal, variables(out), learned)
    assert state_digest(again[0]) == first
    assert len(set(digests(run(out, resume=True, **how | {"steps": 320})))) == 1
    assert metrics(out)[-1]["step"] >= 320


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_loses_its_environments_saves_and_ends_all(tmp_path):
    out, how = tmp_path / "run", ON_HOST["dreamer_v3 host"] | dict(steps=10**6, eval_every=0, max_restarts=0)
    with processes(out, checkpoint_seconds=0.0, **how) as found:
        wait_for(lambda: newest(out) > 100, found)
        worker = subprocess.run(["pgrep", "-P", str(found[1].pid)], text=True, capture_output=True).stdout.split()
        os.kill(int(worker[0]), signal.SIGKILL)
        results = ended(found, 60)
    for (_, error, code), begin in zip(results, ("run: process 1: 1 env", "run: 1 env"), strict=True):
        assert code == 1 and f"{begin}ironments were lost within an hour" in error, error[-2000:]
    assert newest(out) == metrics(out)[-1]["step"]
    run(out, **how | dict(resume=True, steps=newest(out) + 64))


@pytest.mark.slow
@pytest.mark.long
def test_parameters_in_parts_of_two_processes_are_saved_once_and_go_on_whole(tmp_path):
    out = tmp_path / "run"
    outputs = run(out, steps=160, shard_params=4, said={1: {"calls_back": True}}, **SOON)  # the other one does not wait
    assert "called back True" in outputs[1] and "called back" not in outputs[0]
    assert len(set(digests(outputs))) == 1
    first, how = state_digest(outputs[0]), SOON | dict(resume=True, steps=160)
    for count, devices, parts in ((1, 1, 1), (2, 2, 2), (1, 4, 4)):
        found = run(out, count=count, devices=devices, shard_params=parts, **how)
        assert state_digest(found[0]) == first, (count, devices, parts)


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_process_that_is_killed_ends_the_other_within_a_minute_and_the_run_goes_on(attempts, tmp_path):
    out, rng = tmp_path / "run", random.Random(attempts)
    how = SOON | dict(steps=1_000_000, checkpoint_seconds=0.0)
    for attempt in range(attempts):
        victim, before = (attempt + 1) % 2, newest(out)
        with processes(out, resume=attempt > 0, **how) as found:
            wait_for(lambda before=before: newest(out) > before, found)
            time.sleep(rng.random())
            saved = newest(out)
            found[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            _, error, code = ended([found[1 - victim]], 90)[0]
            assert time.monotonic() - killed < 60
        if victim == 0 and code == -signal.SIGABRT:  # JAX was faster to miss the process that keeps its store
            assert "distributed service" in error, error[-2000:]
        else:
            assert code == 1 and f"process {victim} of 2 has ended" in error, (attempt, code, error[-2000:])
        assert "Traceback" not in error
        assert newest(out) >= saved
    last = newest(out)
    run(out, count=1, devices=1, **SOON | dict(resume=True, steps=last + 32))
    run(out, **SOON | dict(resume=True, steps=last + 64))
    assert newest(out) >= last + 64


def newest(out):
    return max((int(path.name) for path in (out / CHECKPOINTS).glob("0*")), default=0)


def wait_for(condition, found, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in found), [process.communicate() for process in found]
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(tmp_path):
    out = tmp_path / "run"
    with processes(out, steps=1_000_000, **SOON) as found:
        wait_for(lambda: (out / METRICS).exists() and metrics(out) and metrics(out)[-1]["updates"] > 4, found)
        found[1].send_signal(signal.SIGTERM)
        results = ended(found, 120)
    step = metrics(out)[-1]["step"]
    assert newest(out) == step
    assert all(code for _, _, code in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "said, words",
    [
        ({1: {"train": {"steps": 320}}}, r"steps: is 240 in process 0 and 320 in process 1"),
        pytest.param(
            {1: {"train": {"batch_size": 16}}},
            r"agent.batch_size: is 8 in process 0 and 16 in process 1",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {1: {"out": "elsewhere"}}, r"out: is .* in process 0 and 'elsewhere' in process 1", marks=pytest.mark.long
        ),
    ],
)
def test_processes_that_were_not_given_the_same_are_refused_by_name(said, words, tmp_path):
    with processes(tmp_path / "run", said=said) as found:
        results = ended(found)
    for _, error, code in results:
        assert code == 2 and re.search(words, error), error[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_more_processes_than_the_environments_can_be_shared_by_are_refused(tmp_path):
    with processes(tmp_path / "run", count=3, devices=1) as found:
        results = ended(found)
    for _, error, code in results:
        assert code == 2 and "devices: 3 cannot share num_envs=8 evenly" in error, error[-2000:]


@pytest.mark.long
@pytest.mark.slow
def test_more_processes_than_environments_on_the_host_are_refused(tmp_path):
    with processes(tmp_path / "run", count=2, devices=1, env="gym:CartPole-v1", num_envs=1) as found:
        results = ended(found)
    for _, error, code in results:
        assert code == 2 and "num_processes: 2 cannot share num_envs=1 evenly; valid are" in error, error[-2000:]


LATE = """
import sys, time
from wmjax import distributed
where, process = sys.argv[1], int(sys.argv[2])
distributed.connect(where, 2, process)
time.sleep(3 * process)
print("said", file=sys.stderr)
distributed.leave(2)
"""


@pytest.mark.slow
def test_the_first_process_leaves_last_so_that_a_slower_one_can_say_why_it_fails():
    where, found = f"127.0.0.1:{free_port()}", []
    for process in "01":
        command = [sys.executable, "-c", LATE, where, process]
        found.append(subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for _, error, code in ended(found, 120):
        assert code == 2 and "said" in error, error[-2000:]
