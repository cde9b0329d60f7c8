import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe
from tests.marks import partly_long
from wmjax.loops import compiler, device, parallel, schedule
from wmjax.types import Evolve, Recipe, Stage, UsageError

ROOT = Path(__file__).parents[2]


def on_four_devices(*arguments: str, module: str = "four_devices") -> str:
    """What `four_devices.py` prints, or another module of `tests`."""
    # By the kernels that users get: others round a row as its batch is wide, and a sample may change with it.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    environment = os.environ | flags | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"tests.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_replicas_on_four_devices_are_bit_identical_and_equal_one_device_with_the_same_global_batch():
    said = on_four_devices()
    for backend in parallel.BACKENDS:
        assert f"{backend}: five updates of dreamer_v3 equal" in said
        assert f"{backend}: environments equal" in said
    assert "plans equal" in said
    assert "refused" in said


@pytest.mark.long
@pytest.mark.slow
def test_environments_on_the_host_are_learned_from_by_four_devices_as_by_one(tmp_path):
    assert "all of it holds" in on_four_devices(str(tmp_path), module="host_on_devices")


@pytest.mark.slow
@pytest.mark.long
def test_runs_on_four_devices_resume_byte_for_byte(tmp_path):
    said = on_four_devices(str(tmp_path))
    assert all(f"{backend}: resumed" in said for backend in parallel.BACKENDS)


@pytest.mark.long
@pytest.mark.slow
def test_a_population_on_four_devices_evolves_as_on_one_and_every_stage_of_world_models_resumes(tmp_path):
    said = on_four_devices(str(tmp_path), "population")
    assert all(f"{backend}: a population evolved as on one device" in said for backend in parallel.BACKENDS)
    assert "every stage of world_models resumed" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "parts"), partly_long(itertools.product(("dreamer_v3", "iris"), (2, 4)), (("dreamer_v3", 2),))
)
def test_sharded_parameters_learn_as_replicated_ones_and_each_device_holds_its_part(agent, parts, tmp_path):
    said = on_four_devices(agent, str(tmp_path), str(parts), module="sharded")
    assert f"{agent}: learned in {parts} parts of {4 // parts} copies as in one" in said
    assert f"{agent}: saved and restored" in said


@pytest.mark.slow
@pytest.mark.long
def test_a_run_goes_on_with_parameters_in_other_numbers_of_parts(tmp_path):
    assert "resumed in 4, 2, 1 and 4 parts" in on_four_devices(str(tmp_path), module="sharded")


def test_what_is_shared_between_devices_adds_up_to_the_whole():
    recipe = fake_recipe(None, num_envs=6, capacity=70, batch_size=4)
    shared = parallel.share(recipe, 2)
    assert (shared.num_envs, shared.replay_capacity, shared.stages[1].updates[0].batch_size) == (3, 33, 2)
    assert [stage.collect for stage in shared.stages] == [stage.collect for stage in recipe.stages]
    with pytest.raises(UsageError, match="cannot share num_envs=6"):
        parallel.share(recipe, 4)
    with pytest.raises(UsageError, match="cannot share batch_size of update 'model'=4"):
        parallel.share(recipe, 3)


def test_a_search_shares_its_batch_and_is_refused_where_its_population_cannot_be_shared():
    numbers = dict(rollouts=1, max_steps=3, population=8, generations=1, mean_rollouts=4, batch_size=12)
    evolve = Evolve("search", None, None, None, "dream", **numbers)
    recipe = lambda **change: Recipe(12, 96, (Stage("evolve", 9, 0, None, evolve=evolve._replace(**change)),))
    share = lambda **change: parallel.share(recipe(**change), 4)
    shared = share().stages[0].evolve
    assert (shared.batch_size, shared.population, shared.mean_rollouts) == (3, 8, 4)  # all devices tell for the whole
    for change in (dict(population=6), dict(mean_rollouts=5), dict(batch_size=9)):
        ((name, value),) = change.items()
        with pytest.raises(UsageError, match=f"cannot share {name} of search 'search'={value} evenly"):
            share(**change)
    assert share(batch_size=9, where="env")  # which reads no replay


@pytest.mark.parametrize(
    ("devices", "backend", "words"),
    [
        (0, "pmap", "devices: 0"),
        (True, "pmap", "devices: True"),
        (10_000, "pmap", "devices: 10000 is more than"),
        (1, "xmap", "parallel: 'xmap'"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices, backend, words):
    with pytest.raises(UsageError, match=words):
        parallel.check_devices(devices, backend)


@pytest.mark.parametrize(
    ("parts", "devices", "backend", "words"),
    [
        (3, 4, "shard_map", "shard_params: 3 is not valid with 4 devices; 1, 2, 4 are"),
        (8, 4, "shard_map", "shard_params: 8 is not valid with 4 devices; 1, 2, 4 are"),
        (3, 6, "shard_map", "shard_params: 3 is not valid with 6 devices; 1, 2 are"),
        (2, 1, "shard_map", "shard_params: 2 is not valid with one device; 1 is"),
        (2, 4, "pmap", "parallel: 'pmap' is not valid with shard_params=2; 'shard_map' is"),
        (0, 4, "shard_map", "shard_params: 0 is not valid"),
    ],
)
def test_parts_that_devices_cannot_hold_are_refused(parts, devices, backend, words):
    with pytest.raises(UsageError, match=words):
        parallel.check_devices(devices, backend, parts)


def test_replicas_that_differ_are_named():
    class Shard:
        def __init__(self, data, index=()):
            self.data, self.index = data, index

    class Spread:  # as an array on two devices
        dtype = np.dtype("float32")

        def __init__(self, *copies):
            self.addressable_shards = [x if isinstance(x, Shard) else Shard(np.float32(x)) for x in copies]

    check = lambda run, **axes: parallel.ShardMap.check_replicas(SimpleNamespace(_axes=axes), run)
    check({"a": Spread(1, 1), "b": Spread(1, 2)}, a=-1, b=0)
    with pytest.raises(parallel.ReplicasDifferError, match="b differs"):
        check({"a": Spread(1, 1), "b": Spread(1, 2)}, a=-1, b=-1)
    part = lambda value, start: Shard(np.float32(value), (slice(start, start + 1),))
    check({"a": Spread(part(1, 0), part(2, 1), part(1, 0), part(2, 1))}, a=-1)
    with pytest.raises(parallel.ReplicasDifferError, match="a differs"):
        check({"a": Spread(part(1, 0), part(2, 1), part(1, 0), part(3, 1))}, a=-1)


def test_only_what_is_spread_is_gathered_for_a_replica():
    leaf = lambda value, whole: SimpleNamespace(
        is_fully_replicated=whole, addressable_shards=[SimpleNamespace(data=value)]
    )  # fmt: skip
    gathered = []

    def gather(parts):
        gathered.append(len(parts))
        return [leaf(10 * x.addressable_shards[0].data, True) for x in parts]

    replica = lambda tree, wrappers: parallel.ShardMap.replica(SimpleNamespace(_wrappers=wrappers, _whole=gather), tree)
    tree = [leaf(1, True), leaf(2, False), leaf(3, True), leaf(4, False)]
    assert replica(tree[::2], {"each": None}) == [1, 3] and not gathered
    assert replica(tree, {"each": None}) == [1, 20, 3, 40] and gathered == [2]
    assert replica(tree, {}) == [1, 2, 3, 4] and gathered == [2]  # such as by `pmap`, whose leaves have an axis more


@pytest.mark.slow
def test_programs_of_several_seeds_give_what_each_seed_gives_alone():
    agent, env = fake_agent(fake_recipe(fake_agent().act)), counter_env()
    train = agent.recipe.stages[1]

    def run(programs, key):
        state, _ = programs.compile_stage(agent.recipe.stages[0])(programs.init(key), 3)
        return programs.compile_stage(train)(device.next_stage(state), 4)

    keys = jnp.stack([jax.random.key(seed) for seed in (4, 5, 6)])
    programs = parallel.programs(agent, env, seeds=3)
    many, metrics = run(programs, keys)
    assert metrics["model/seen"].shape == (3,)
    assert jax.tree.map(jnp.shape, many) == jax.tree.map(jnp.shape, programs.template)
    for i, key in enumerate(keys):
        alone, _ = run(parallel.programs(agent, env), key)
        mine = parallel.tree_of_seed(many, i)
        np.testing.assert_allclose(mine.agent.params["w"], alone.agent.params["w"], rtol=1e-5)
        np.testing.assert_array_equal(mine.replay.data.action, alone.replay.data.action)
        assert schedule.first(many.steps) == int(alone.steps)


def test_on_a_cpu_only_stages_that_act_for_moments_are_compiled_in_haste_and_searches_with_care(monkeypatch):
    act, (train,) = Stage("act", parallel.BRIEF // 4, 4, None), fake_recipe(None, capacity=32).stages[1:]
    longer, endless = act._replace(collect=5), act._replace(iterations=None)
    learning, searching = act._replace(updates=train.updates), act._replace(evolve=object())
    options = lambda: [parallel._options(stage) for stage in (act, longer, endless, learning, searching)]
    assert options() == [None] * 5  # `XLA_FLAGS`, which tests run with, says the level
    monkeypatch.delenv("XLA_FLAGS")
    hasty = {"xla_backend_optimization_level": 0} | compiler._EMITTERS
    assert options() == [hasty, *[{"xla_backend_optimization_level": 1}] * 3, None]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert options() == [None] * 5
