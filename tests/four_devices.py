"""Works on four devices under both backends, and compares with one device.

Run by `test_parallel.py` in a process of its own, for devices can only be forced before JAX starts. With a folder as
its argument it trains whole runs in it instead, and with `FOLDER population` it evolves a controller.
"""

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import wmjax
from tests.agents.batches import PIXELS, random_trajectory
from tests.agents.world_models.made import TINY as TINY_WORLD_MODELS
from tests.test_conformance import last_update, make, updates_of
from tests.test_planning import LINE, SMALL, line_agent, timestep
from tests.test_run import TINY
from wmjax import planning
from wmjax.agents import AGENTS
from wmjax.agents.world_models import EvolveConfig
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device, parallel
from wmjax.loops.parallel import AXIS, BACKENDS
from wmjax.types import UsageError

TOLERANCE = 2e-5
BATCH = {"num_envs": 8, "batch_size": 8, "train_ratio": 4.0, "replay_capacity": 256, "prefill": 64}


def sharded(fn: Callable, backend: str) -> Callable:
    """An update on four devices, which share its batch; the state comes back with what each device has of it."""
    if backend == "shard_map":
        mesh = Mesh(np.array(jax.devices()), (AXIS,))
        specs = dict(in_specs=(P(), P(), P(None, AXIS)), out_specs=(P(), P(), P(None, AXIS)))
        return jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=False, **specs))
    mapped = jax.pmap(fn, AXIS, in_axes=(0, None, 1))
    cut = lambda batch: jax.tree.map(lambda x: x.reshape(x.shape[0], 4, -1, *x.shape[2:]), batch)
    return lambda state, key, batch: mapped(state, key, cut(batch))


def updates_equal_those_of_one_device(name: str) -> None:
    """Five updates on the same batches, of which every device has its part."""
    whole, part = make(name), make(name, axis_name=AXIS)
    one, shared = (updates_of(agent)[last_update(name)] for agent in (whole, part))
    state = jax.jit(whole.init)(jax.random.key(0))
    length = one.sampling.length + one.sampling.context
    batches = [random_trajectory(whole, PIXELS, state, length, 8, seed=i) for i in range(2)]
    states, norms = {}, {}
    for backend in ("one", *BACKENDS):
        update = jax.jit(one.fn) if backend == "one" else sharded(shared.fn, backend)
        now = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape)), state) if backend == "pmap" else state
        norms[backend] = []
        for i in range(5):
            now, metrics, _ = update(now, jax.random.key(i), batches[i % 2])
            norms[backend].append(float(np.ravel(np.asarray(metrics["grad_norm"]))[0]))
        states[backend] = now
    for backend in BACKENDS:
        np.testing.assert_allclose(norms[backend], norms["one"], rtol=1e-3)
        moved = 0.0
        params = [jax.tree.leaves(x.variables) for x in (state, states["one"], states[backend])]
        for old, new, copies in zip(*params, strict=True):
            replicas = [np.asarray(shard.data).reshape(new.shape) for shard in copies.addressable_shards]
            assert len(replicas) == 4 and all(x.tobytes() == replicas[0].tobytes() for x in replicas)
            np.testing.assert_allclose(replicas[0], new, atol=TOLERANCE)
            moved = max(moved, float(np.abs(np.asarray(new) - old).max()))
        assert moved > 100 * TOLERANCE, moved
        print(f"{backend}: five updates of {name} equal, parameters moved by {moved:.4f}")


def environments_are_those_of_one_device() -> None:
    """Before anything is learned, four devices see what one does, and replay holds it in the same places."""
    env = agent_actions(make_env("catch", image_size=16))
    key, one = jax.random.key(3), None
    for backend in (None, *BACKENDS):
        devices = 1 if backend is None else 4
        agent = make("dreamer_v3", env.spec, axis_name=AXIS if devices > 1 else None)
        agent = agent._replace(recipe=agent.recipe._replace(num_envs=8, replay_capacity=8 * 32))
        programs = parallel.programs(agent, env, devices=devices, backend=backend or BACKENDS[0])
        run, metrics = programs.compile_stage(agent.recipe.stages[0])(programs.init(key), 12)
        metrics = {name: float(value) for name, value in metrics.items()}
        programs.check_replicas(run)
        run = programs.gather(run)
        if one is None:
            one = run, metrics
            assert metrics["episode/count"] == 8
            continue
        assert metrics == one[1]
        seen = lambda run: run.replay.data._replace(latent=())
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(*map(np.asarray, (x, y))), seen(run), seen(one[0]))
        assert checkpoint.digest(programs.gather(programs.place(run))) == checkpoint.digest(run)
        print(f"{backend}: environments equal")


def populations_are_shared(folder: Path) -> None:
    """World Models on four devices: a population in the environment is that of one device, one in dreams resumes."""
    env = agent_actions(make_env("catch"))
    search = EvolveConfig(
        population=8, rollouts=2, generations=2, mean_every=2, mean_rollouts=8, starts=32, horizon=9, where="dream"
    )
    config = dataclasses.replace(
        TINY_WORLD_MODELS, collection="random", num_envs=8, collect_steps=128, replay_capacity=128,
        vision_batch_size=8, memory_batch_size=8, evolve=search,
    )  # fmt: skip
    in_env = dataclasses.replace(config, evolve=dataclasses.replace(search, where="env"))
    found = {}
    for backend in (None, *BACKENDS):
        devices, axis_name = (1, None) if backend is None else (4, AXIS)
        agent = AGENTS["world_models"][1](env.spec, in_env, axis_name)
        programs = parallel.programs(agent, env, devices=devices, backend=backend or BACKENDS[0])
        run, metrics = programs.compile_stage(agent.recipe.stages[-1])(programs.init(jax.random.key(0)), 1)
        programs.check_replicas(run)
        found[backend] = programs.gather(run).agent.opt_state["controller"], metrics
    for backend in BACKENDS:
        evolving, metrics = found[backend]
        np.testing.assert_allclose(evolving.strategy.mean, found[None][0].strategy.mean, atol=1e-5)
        np.testing.assert_allclose(evolving.kept_return, found[None][0].kept_return, atol=1e-5)
        assert metrics["controller/fitness_best"] == found[None][1]["controller/fitness_best"]
        assert np.abs(evolving.kept).max() > 1e-2
        print(f"{backend}: a population evolved as on one device")
    agent = AGENTS["world_models"][1](env.spec, config, AXIS)
    programs = parallel.programs(agent, env, devices=4)
    run = programs.init(jax.random.key(0))
    for stage in agent.recipe.stages:
        advance = programs.compile_stage(stage)
        checkpoint.save(folder, 0, programs.gather(run))
        whole, _ = advance(run, 2)
        run, _ = advance(programs.place(checkpoint.restore(folder, programs.template)), 1)
        checkpoint.save(folder, 0, programs.gather(run))
        run, _ = advance(programs.place(checkpoint.restore(folder, programs.template)), 1)
        assert checkpoint.digest(programs.gather(run)) == checkpoint.digest(programs.gather(whole)), stage.name
        programs.check_replicas(run)
        run = device.next_stage(run)
    print("every stage of world_models resumed")


def runs_resume(folder: Path) -> None:
    """Byte for byte, and replicas are checked at the end of every run."""
    for backend in BACKENDS:
        digests = []
        for name, stops in (("whole", (160,)), ("parts", (96, 160))):
            for steps in stops:
                stream = io.StringIO()
                run = wmjax.train(
                    "dreamer_v3", "probe:act_obs", steps=steps, out=folder / backend / name, devices=4,
                    resume=steps != stops[0], parallel=backend, progress=stream, **TINY | BATCH,
                )  # fmt: skip
            digests.append(stream.getvalue().split()[-1])
        assert digests[0] == digests[1]
        assert wmjax.load(folder / backend / "whole").evaluate(16).returns == run.evaluate(16).returns
        print(f"{backend}: resumed")


def plans_are_those_of_one_device() -> None:
    """Candidates spread over devices, also where they do not share out evenly."""
    mesh = Mesh(np.array(jax.devices()), ("candidates",))
    step, keys = timestep([0.9, -0.9], [True, True]), jax.random.split(jax.random.key(0), 2)
    for config in (*SMALL, planning.CEMConfig(candidates=30, elites=5, iterations=3, chunk=8)):
        found = []
        for where in (None, mesh):
            agent = planning.with_planner(line_agent(), LINE, dataclasses.replace(config, horizon=3), mesh=where)
            act = jax.jit(lambda *args, agent=agent: agent.act({}, *args, explore=False)[1])
            found.append(act(keys, agent.act_carry({}, 2), step))
        np.testing.assert_allclose(*found, atol=TOLERANCE)
        assert len(found[1].sharding.device_set) == 4
    print("plans equal those of one device")


def what_cannot_be_shared_is_refused() -> None:
    for change, word in (
        (dict(devices=5), "devices: 5 is more than the 4"),
        (dict(devices=3), "cannot share num_envs=8"),
        (dict(devices=4, batch_size=6, train_ratio=3.0), "cannot share batch_size of update 'train'=6"),
    ):
        try:
            wmjax.train("dreamer_v3", "probe:act_obs", out="refused", **TINY | BATCH | change)
        except UsageError as error:
            assert word in str(error), error
        else:
            raise AssertionError(change)
    assert not Path("refused").exists()
    print("refused")


if __name__ == "__main__":
    assert len(jax.devices()) == 4
    if len(sys.argv) > 2:
        populations_are_shared(Path(sys.argv[1]))
    elif len(sys.argv) > 1:
        runs_resume(Path(sys.argv[1]))
    else:
        updates_equal_those_of_one_device("dreamer_v3")
        environments_are_those_of_one_device()
        plans_are_those_of_one_device()
        what_cannot_be_shared_is_refused()
