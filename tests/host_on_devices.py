"""Learns on four devices from environments on the host, and compares with one device; run by `test_parallel.py`."""

import io
import sys
from pathlib import Path

import jax
import numpy as np

import wmjax
from tests.test_run import TINY
from wmjax.loops import checkpoint
from wmjax.loops.report import read_metrics
from wmjax.types import UsageError

ENV = "gym:CartPole-v1"
# One environment, so that four devices get the batches that one would have got; steps of a size at which the rounding
# of zeros stays rounding.
HOW = TINY | dict(num_envs=1, batch_size=4, epsilon=1e-6, workers=1, eval_every=64)


def train(out: Path, steps: int, **how):
    return wmjax.train("dreamer_v3", ENV, steps=steps, out=out, progress=io.StringIO(), **HOW | how)


def main(folder: Path) -> None:
    one, four = train(folder / "one", 96), train(folder / "four", 96, devices=4)
    lines = [read_metrics(folder / name) for name in ("one", "four")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    updates = [line["updates"] for line in lines[1]]
    watched = [name for name in lines[0][-1] if "loss" in name]
    first = next(i for i, line in enumerate(lines[0]) if line["updates"])
    for name in watched:
        a, b = (found[first][name] for found in lines)
        assert abs(a - b) <= 1e-3 * max(1, abs(a)), (name, a, b)
    moved = max(float(np.abs(x).max()) for x in jax.tree.leaves(four.state.params))
    assert updates[-1] >= 8 and watched and moved > 0
    for leaf in jax.tree.leaves(four.state):
        assert len(leaf.sharding.device_set) == 1  # what a run gives is on one device, as of any run
    assert one.evaluate(2, seed=3).episodes == four.evaluate(2, seed=3).episodes == 2
    # Saved by four devices, it goes on with one, with two, and with four again.
    saved = checkpoint.digest(four.state)
    for devices in (1, 2, 4):
        again = train(folder / "four", 96, devices=devices, resume=True)
        assert checkpoint.digest(again.state) == saved, devices
    longer = train(folder / "four", 128, devices=4, resume=True)
    assert read_metrics(folder / "four")[-1]["step"] == 128 and int(longer.state.step) > int(four.state.step)
    for wrong, words in (
        (dict(devices=3), "devices: 3 cannot share batch_size of update"),
        (dict(devices=2, parallel="pmap"), "parallel: 'pmap' is not valid with environments on the host"),
        (dict(devices=2, shard_params=2), "shard_params: 2 is not valid with environments on the host"),
    ):
        try:
            train(folder / "refused", 64, **wrong)
        except UsageError as error:
            assert words in str(error), error
        else:
            raise AssertionError(wrong)
    assert not (folder / "refused").exists()
    print("all of it holds")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
