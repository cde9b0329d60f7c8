"""Works on four devices with parameters in parts, and compares with parameters that every device has.

Run by `test_parallel.py` in a process of its own, as `four_devices.py` is: with an agent, a folder and a number of
parts it learns and saves, with a folder alone it trains whole runs.
"""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wmjax
from tests.four_devices import BATCH
from tests.one_process import RUNS
from tests.test_conformance import ROWS
from tests.test_run import TINY
from wmjax import settings
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device, parallel
from wmjax.loops.device import RunState
from wmjax.loops.parallel import Programs
from wmjax.run_folder import CHECKPOINTS
from wmjax.types import Agent, AgentState, Env

UPDATES = 2
# Of how far parameters have moved: an optimizer takes whole steps of entries whose gradient is nothing but rounding.
TOLERANCE = 0.01


def made(name: str, devices: int, parts: int) -> tuple[Agent, Env, Programs]:
    config = dataclasses.replace(ROWS[name].config, **RUNS[name][1])
    env = agent_actions(make_env("catch", image_size=16))
    agent = AGENTS[name][1](env.spec, config, parallel.axis_name(devices, parts))
    return agent, env, parallel.programs(agent, env, devices=devices, shard_params=parts)


def held(state: AgentState) -> list[int]:
    """Bytes of parameters and optimizers' states on each device."""
    leaves = jax.tree.leaves((state.params, state.opt_state, state.non_trainable))
    return [sum(x.addressable_shards[i].data.nbytes for x in leaves) for i in range(4)]


def learned(name: str, parts: int) -> tuple[list[AgentState], RunState, Programs, list[int]]:
    """The agent's state at the beginning and after every stage that learns, and the run after some updates of each."""
    agent, _, programs = made(name, 4, parts)
    run = programs.init(jax.random.key(5))
    states, sizes = [jax.device_get(programs.gather(run).agent)], held(run.agent)
    for stage in agent.recipe.stages:
        learns = bool(stage.updates)
        run, metrics = programs.compile_stage(stage)(run, UPDATES if learns else stage.iterations)
        if learns:
            states.append(jax.device_get(programs.gather(run).agent))
            assert all(float(value) == 0 for name, value in metrics.items() if name.endswith("skipped"))
        run = device.next_stage(run)
    programs.check_replicas(run)
    assert held(run.agent) == sizes
    return states, run, programs, sizes


def distance(first: Any, second: Any) -> float:
    """Between all entries of two trees."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return float(np.sqrt(sum(np.sum(np.square(np.float64(x) - np.float64(y))) for x, y in pairs)))


def parts_learn_as_the_whole(name: str, folder: Path, parts: int) -> None:
    whole, run, programs, sizes = learned(name, 1)
    states, sharded, others, own = learned(name, parts)
    assert max(own) <= (0.3 if parts == 4 else 0.55) * min(sizes), (own, sizes)
    for i, (mine, theirs) in enumerate(zip(states, whole, strict=True)):
        for tree in (lambda state: state.variables, lambda state: state.opt_state):
            moved = distance(tree(theirs), tree(whole[0]))
            apart = distance(tree(mine), tree(theirs))
            assert apart <= TOLERANCE * moved, (parts, i, apart, moved)
    moved, apart = (distance(x.variables, whole[-1].variables) for x in (whole[0], states[-1]))
    assert moved > 0.1
    words = f"{parts} parts of {4 // parts} copies"
    print(f"{name}: learned in {words} as in one; {max(own)} of {max(sizes)} bytes, {apart:.1e} apart of {moved:.1e}")
    # What either saves, the other reads, and one device as well.
    alone = made(name, 1, 1)[-1]
    digest = checkpoint.digest(others.gather(sharded))
    checkpoint.save(folder, 0, others.gather(sharded))
    for reader in (programs, alone, others):
        found = reader.place(checkpoint.restore(folder, reader.template))
        assert checkpoint.digest(reader.gather(found)) == digest
    assert max(held(found.agent)) == max(own)
    assert checkpoint.digest(others.gather(others.place(jax.device_get(run)))) == checkpoint.digest(run)
    acted = others.replica(sharded.agent)
    assert checkpoint.digest(acted) == checkpoint.digest(others.gather(sharded).agent)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(acted))
    print(f"{name}: saved and restored")


def runs_go_on(folder: Path) -> None:
    """Evaluated on the way, and read by what knows nothing of parts."""
    steps = 96
    for devices, parts in ((4, 4), (4, 2), (1, 1), (4, 4)):
        stream = io.StringIO()
        run = wmjax.train(
            "dreamer_v3", "probe:act_obs", steps=steps, out=folder / "run", devices=devices, shard_params=parts,
            resume=steps > 96, eval_every=32, progress=stream, **TINY | BATCH,
        )  # fmt: skip
        assert ("4 devices (shard_map, parameters in 4 parts)" in stream.getvalue()) == (parts == 4)
        digest = stream.getvalue().split()[-1]
        alone = made_alone(folder / "run")
        assert checkpoint.digest(alone) == digest
        assert wmjax.load(folder / "run").evaluate(16).returns == run.evaluate(16).returns
        steps += 32
    print("resumed in 4, 2, 1 and 4 parts")


def made_alone(path: Path) -> RunState:
    """The newest checkpoint of a run, as one device reads it."""
    setup = settings.setup("dreamer_v3", "probe:act_obs", overrides=TINY | BATCH)
    template = parallel.programs(setup.agent, setup.world).template
    return checkpoint.restore(path / CHECKPOINTS, template)


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    if len(sys.argv) > 2:
        parts_learn_as_the_whole(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        runs_go_on(Path(sys.argv[1]))
