"""What a run needs in memory is known from shapes, and refused by name where there is less."""

import contextlib
import re

import jax
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe
from tests.test_run import TINY
from wmjax import settings
from wmjax.loops import device, driver, memory, parallel
from wmjax.types import Box, Discrete, EnvSpec, RunError, UsageError


def tiny(env="catch", **overrides):
    return settings.setup("dreamer_v3", env, steps=1000, overrides=TINY | overrides)


def held(made) -> int:
    """Bytes of the state of a run."""
    return memory.tree_bytes(jax.eval_shape(lambda key: device.init(made.agent, made.env, key), jax.random.key(0)))


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(memory, "room", lambda: memory.Room(count, f"{count} bytes are free"))

    return set_free


@pytest.mark.slow
def test_what_is_counted_is_what_the_state_of_a_run_takes(free):
    made = tiny()
    run = jax.jit(lambda key: device.init(made.agent, made.env, key))(jax.random.key(0))
    data = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    size = sum(x.nbytes for x in map(data, jax.tree.leaves(run)))
    assert size == held(made)
    free(1.2 * size)
    memory.check_run(made.agent, made.env)
    free(0.99 * size)
    with pytest.raises(UsageError, match="bytes are free"):
        memory.check_run(made.agent, made.env)


@pytest.mark.parametrize(
    "env, dtype, saves", [("probe:act_obs", "float32", 1), ("probe:act_obs", "bfloat16", 0), ("catch", "float32", 0)]
)
def test_latents_of_16_bits_are_named_where_they_would_save_much(free, env, dtype, saves):
    made = tiny(env, replay_capacity=2**31 - 1, latent_dtype=dtype)
    free(30e6)
    with pytest.raises(UsageError, match=r"^replay_capacity: ") as no:
        memory.check_run(made.agent, made.env)
    assert str(no.value).count("latent_dtype") == saves
    assert len(re.findall(r"; latents of 16 bits \(latent_dtype\) take 34.4 GB less$", str(no.value))) == saves


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_replay_that_is_said_to_be_valid_is_so(free, seeds):
    made = tiny(replay_capacity=2**31 - 1)
    free(seeds * 30e6)
    with pytest.raises(UsageError, match=r"^replay_capacity: 2147483647 records of 12.\d kB need 2\d,\d{3} GB") as no:
        memory.check_run(made.agent, made.env, seeds)
    assert (" for each of 3 seeds, and " in str(no.value)) == (seeds == 3)
    most = int(str(no.value).split("at most ")[1].split()[0])
    assert 1000 < most < 30e6 / 12288
    made = tiny(replay_capacity=most)
    memory.check_run(made.agent, made.env, seeds)
    made = tiny(replay_capacity=most + 100)
    with pytest.raises(UsageError):
        memory.check_run(made.agent, made.env, seeds)


def test_seeds_need_what_each_of_them_needs(free):
    made = tiny()
    free(4.5 * held(made))
    memory.check_run(made.agent, made.env, seeds=4)
    with pytest.raises(UsageError, match=r"^seeds: 400 need .* each, and .*; at most 4 is valid$"):
        memory.check_run(made.agent, made.env, seeds=400)


def fake_program(capacity: int):
    """A recipe with replay of pictures, its second stage, the shapes of a state, and the program compiled for these."""
    agent = fake_agent()
    agent = agent._replace(recipe=fake_recipe(agent.act, capacity=capacity))
    found = parallel.programs(agent, counter_env(size=32))
    stage = agent.recipe.stages[1]
    return agent.recipe, stage, found.template, found.compile_stage(stage).lower(found.template, 1).compile()


def test_what_a_compiled_stage_needs_is_refused_with_a_capacity_that_is_valid(free):
    recipe, stage, run, program = made = fake_program(capacity=6400)
    needed = program.memory_analysis()
    whole = needed.argument_size_in_bytes + needed.temp_size_in_bytes
    assert whole > memory.tree_bytes(run.replay) > 6400 * 3072
    free(1.01 * whole)
    memory.check_program(*made, held=False)
    free(0.5 * whole)
    memory.check_program(*made, held=True)  # what the stage computes at once is small
    with pytest.raises(UsageError, match=r"^stage 'train': replay_capacity 6400 needs 19.\d MB of .* bytes are") as no:
        memory.check_program(*made, held=False)
    most = int(str(no.value).split("replay_capacity of at most ")[1].split(",")[0])
    assert 2900 < most < 3200
    memory.check_program(*fake_program(capacity=most), held=False)
    free(10.0)
    with pytest.raises(UsageError, match=r"computes at once needs \d\d.\d kB besides; 10.0 bytes are free beside the"):
        memory.check_program(recipe, stage, run, program, held=True)


def test_a_run_whose_stages_need_too_much_ends_before_its_state_is_made(free, monkeypatch, tmp_path):
    agent = fake_agent()
    agent = agent._replace(recipe=fake_recipe(agent.act, capacity=6400))
    found = parallel.programs(agent, counter_env(size=32))
    monkeypatch.setattr(found, "init", lambda key: pytest.fail("the state was made"))
    plan = driver.Plan(agent, counter_env(size=32), tmp_path, (0,), 100, 0, 100, 100)
    free(0.9 * memory.tree_bytes(found.template))
    with contextlib.closing(driver.Driver(plan, found, [])) as runs, pytest.raises(UsageError, match="stage 'train'"):
        runs.start(False, print)


@pytest.mark.parametrize(
    ("agent", "env", "overrides", "words"),
    [
        ("dreamer_v3", "catch", {"depth": 65536}, "^agent: parameters and optimizers of these sizes need"),
        ("dreamer_v3", "catch", {"replay_capacity": 2**31 - 1}, "^replay_capacity: 2147483647 records of"),
        ("dreamer_v2", "catch", {"deter": 65536, "hidden": 65536}, "^agent: "),
        (
            "world_models",
            "racing",
            {"evolve": {"population": 2**20}},
            "^population: 1048576 candidates with 4",
        ),
        ("world_models", "racing", {"evolve": {"mean_rollouts": 2**20, "rollouts": 1}}, "mean_rollouts: 1048576"),
        ("world_models", "racing", {"controller_units": 2048, "evolve": {"strategy": "cma_es"}}, "^agent: "),
        ("iris", "catch", {"width": 65536}, "^agent: "),
    ],
)
def test_what_takes_most_is_named(agent, env, overrides, words, free):
    made = settings.setup(agent, env, overrides=overrides)
    free(10e9)
    with pytest.raises(UsageError, match=words) as caught:
        memory.check_run(made.agent, made.env)
    assert "GB" in str(caught.value) and "\n" not in str(caught.value)


def test_on_several_accelerators_environments_and_replay_are_spread(free, monkeypatch):
    made = tiny(replay_capacity=6400)
    whole = held(made)
    free(0.75 * whole)
    with pytest.raises(UsageError):
        memory.check_run(made.agent, made.env, devices=2)  # which are one CPU's
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    memory.check_run(made.agent, made.env, devices=2)


def test_where_nobody_says_what_is_free_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    made = tiny(replay_capacity=2**31 - 1)
    memory.check_run(made.agent, made.env)
    memory.check_records("horizon: 1", made.env.spec, 10**12, 10**12)


def test_records_to_look_at_are_refused_where_they_cannot_fit(free):
    spec = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8"), "vector": Box(-1, 1, (4,))}, Discrete(2))
    free(2e6)
    memory.check_records("horizon: 1", spec, 100, 10)
    with pytest.raises(UsageError, match=r"^horizon: 1: 200 records need 2.46 MB, and 2000000.0 bytes are free"):
        memory.check_records("horizon: 1", spec, 200, 0)


def test_a_limit_of_the_control_group_counts(monkeypatch, tmp_path):
    (tmp_path / "job").mkdir()
    for name, text in (("max", "5000"), ("current", "3000"), ("stat", "anon 1\ninactive_file 500")):
        (tmp_path / "job" / f"memory.{name}").write_text(text + "\n")
    (tmp_path / "cgroup").write_text("0::/job\n")
    monkeypatch.setattr(memory, "GROUPS", {"": (str(tmp_path), "memory.max", "memory.current", "inactive_file")})
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda x: tmp_path / "cgroup" if x == "/proc/self/cgroup" else real(x))
    assert memory.available_bytes() == 2500
    (tmp_path / "job" / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 10**6


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore")])
def test_memory_that_runs_out_ends_a_run_with_one_line(error):
    with pytest.raises(RunError, match=r"^memory ran out") as caught, memory.running_out():
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_of_the_compiler_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.running_out():
        raise jax.errors.JaxRuntimeError("INTERNAL: x")


def test_bytes_of_a_tree_are_those_of_its_leaves():
    assert memory.tree_bytes({"a": np.zeros((2, 3), np.float32), "b": jax.random.key(0)}) == 32
