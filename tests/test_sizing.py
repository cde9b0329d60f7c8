"""What a plan says of a run, against numbers that are known, and what it takes and refuses."""

import json
from types import SimpleNamespace

import jax
import pytest

from tests.marks import partly_long
from wmjax import sizing
from wmjax.agents import AGENTS
from wmjax.arithmetic import Product
from wmjax.cards import CARDS, card, seconds
from wmjax.cli import main
from wmjax.cli import plan as cli_plan
from wmjax.loops import device
from wmjax.replay.host import tree_bytes
from wmjax.settings import setup
from wmjax.types import UsageError

TINY = dict(
    deter=8, hidden=8, stoch=2, classes=4, units=8, blocks=1, bins=5, stem="patch", length=4, batch_size=2, num_envs=2,
    train_ratio=8.0, prefill=16, horizon=3, imagine_last=0, replay_capacity=4096, actor_layers=1, critic_layers=1,
    prior_layers=1,
)  # fmt: skip
WORDS = [word for name, value in TINY.items() for word in (f"--agent.{name}", str(value))]


def test_seconds_are_those_of_the_slowest_of_arithmetic_traffic_and_launch():
    one = CARDS["h100"]._replace(float32=1, default=2, bfloat16=4, bandwidth=1e9, launch=1e-3)
    much = 10**12
    assert seconds({Product("float32 highest", much, 0): 3}, one, 1.0) == pytest.approx(6)
    assert seconds({Product("float32", much, 0): 1}, one, 0.5) == pytest.approx(2)
    assert seconds({Product("bfloat16", much, 0): 1}, one, 0.5, seeds=3) == pytest.approx(3)
    assert seconds({Product("bfloat16", 1, 10**9): 1}, one, 0.25) == pytest.approx(4)
    assert seconds({Product("bfloat16", 1, 8): 5}, one, 0.25) == pytest.approx(5e-3)


def test_a_card_without_a_name_needs_all_numbers_and_a_named_one_may_have_others():
    assert card() is None and card("h200").memory == card("H200").memory == 141e9
    assert card("a100", memory_gb=80).memory == 80e9 and card("a100", memory_gb=80).bfloat16 == CARDS["a100"].bfloat16
    own = card(None, 100, 12, 500)
    assert (own.float32, own.bfloat16, own.memory, own.bandwidth) == (100, 100, 12e9, 500e9)
    with pytest.raises(UsageError, match="--memory-gb, --bandwidth must be given; known are h100"):
        card(None, 100)


@pytest.fixture(scope="module")
def found():
    return sizing.plan("dreamer_v3", "probe:act_obs", card="h100", share=0.5, **TINY)


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs are taken to need a megabyte, and JAX a part of a card as where nobody says anything."""
    monkeypatch.setattr(sizing, "peak_bytes", lambda *_: 2**20)
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=2**20))
    monkeypatch.setattr(sizing, "_compile", lambda *_: compiled)
    for name in sizing.FRACTIONS:
        monkeypatch.delenv(name, raising=False)


def test_what_a_run_holds_is_counted_and_how_fast_its_stages_could_be(found):
    made = setup("dreamer_v3", "probe:act_obs", overrides=TINY)
    run = jax.eval_shape(lambda key: device.init(made.agent, made.env, key), jax.random.key(0))
    held, rest = found.memory, (run.skips, run.key, run.stage, run.iteration, run.steps)
    assert held.parameters + held.optimizer == tree_bytes(run.agent)
    assert held.replay == tree_bytes(run.replay)
    assert held.parameters + held.optimizer + held.replay + held.environments == tree_bytes(run) - tree_bytes(rest)
    assert held.temporaries > held.batch > 0 and found.fits and not found.advice
    (update,) = found.jobs
    assert update.multiply_adds == sum(update.by_kind.values()) > 50 * found.multiply_adds_per_env_step > 0
    prefill, train = found.stages
    assert prefill.updates_per_second == 0
    repeats, collect = made.agent.recipe.stages[-1].updates[0].repeats, made.agent.recipe.stages[-1].collect
    each = repeats * update.seconds + collect * found.acting.seconds
    assert train.updates_per_second == pytest.approx(repeats / each)
    assert train.env_steps_per_second == pytest.approx(collect * 2 / each)


def test_each_device_has_all_parameters_of_all_seeds_and_its_part_of_everything_else(found, uncompiled):
    held, many = found.memory, sizing.plan("dreamer_v3", "probe:act_obs", card="h100", seeds=8, devices=2, **TINY)
    assert many.memory.parameters == 8 * held.parameters and many.memory.optimizer == 8 * held.optimizer
    assert many.memory.environments == 4 * held.environments and many.memory.batch == 4 * held.batch
    assert many.memory.replay == pytest.approx(4 * held.replay, rel=1e-3)
    assert many.memory.temporaries == 8 * 2**20
    assert many.parameters == found.parameters


@pytest.mark.slow
def test_each_device_has_its_part_of_sharded_parameters_and_all_of_them_while_they_are_used(found, uncompiled):
    held = found.memory
    spread = lambda **how: sizing.plan("dreamer_v3", "probe:act_obs", card="h100", devices=2, **how, **TINY).memory
    whole, sharded = spread(), spread(shard_params=2)
    assert whole.parameters == held.parameters and held.parameters / 2 <= sharded.parameters < held.parameters
    assert sharded.optimizer == pytest.approx(held.optimizer / 2, rel=0.01)
    assert sharded.temporaries == whole.temporaries + held.parameters
    assert sharded.replay == whole.replay
    with pytest.raises(UsageError, match="shard_params: 3 is not valid with 2 devices; 1, 2 are"):
        spread(shard_params=3)


def test_all_numbers_are_in_the_table_and_in_json(found):
    table, plain = cli_plan._table(found), json.loads(json.dumps(cli_plan._plain(found)))
    (update,) = found.jobs
    assert "it fits" in table and "at 50% of the peaks of h100" in table and f"{update.multiply_adds:.3e}" in table
    assert plain["memory"]["total"] == found.memory.total and plain["jobs"][0] == update._asdict()


def plan(*words, capsys, code=0):
    capsys.readouterr()
    assert main(["plan", *words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


@pytest.mark.parametrize(
    "words, said",
    [
        ([], ["agent: missing", "dreamer_v1"]),
        (["dreamer_v3", "--card", "h10"], ["card: unknown name 'h10'", "known are h100, h200", "--peak-tflops"]),
        (["dreamer_v3", "--peak-tflops", "9"], ["card: none is named", "--memory-gb, --bandwidth"]),
        (["dreamer_v3", "--card", "h100", "--share", "1.5"], ["share: 1.5", "at most 1"]),
        (["dreamer_v3", "--preset", "papper"], ["preset: unknown name 'papper'", "'paper'"]),
        (["dreamer_v3", "--env", "cach"], ["cach", "catch"]),
        (
            ["dreamer_v3", "--env", "gym:CartPole-v1", "--devices", "2", "--shard-params", "2"],
            ["shard_params: 2 is not valid", "on the host"],
        ),
        (["dreamer_v3", "--devices", "3"], ["devices: 3 cannot share num_envs=16"]),
        (["dreamer_v9"], ["agent: unknown name 'dreamer_v9'"]),
    ],
)
def test_what_is_not_valid_is_one_line(words, said, capsys):
    error = plan(*words, capsys=capsys, code=2)
    assert error.count("\n") == 1 and all(word in error for word in said), error


@pytest.mark.slow
def test_environments_on_the_host_keep_replay_there(capsys, uncompiled, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["dreamer_v3", "--env", "gym:CartPole-v1", "--card", "v100", *WORDS]
    found = json.loads(plan(*words, "--json", capsys=capsys))
    assert found["memory"]["replay"] == 0 < found["memory"]["host_replay"]
    assert found["card"]["name"] == "v100" and found["fits"]
    full = plan(*words, "--memory-gb", "1e-5", capsys=capsys)
    assert "it does not fit: agent: " in full and "v100 has" in full
    assert not list(tmp_path.iterdir())


def test_a_replay_that_this_host_has_no_memory_for_is_refused_if_it_is_filled(capsys, uncompiled):
    words = ["dreamer_v3", "--env", "gym:CartPole-v1", *WORDS, "--agent.replay_capacity", str(2**31 - 1)]
    refused = plan(*words, "--steps", str(2**31 - 1), capsys=capsys).splitlines()[-1]
    assert refused.startswith("it does not fit: replay_capacity: 2147483647 needs") and "--memory-map" in refused


def test_a_replay_that_is_too_large_is_refused_with_what_would_fit(capsys, uncompiled):
    words = ["dreamer_v3", "--env", "probe:act_obs", "--card", "h100", *WORDS, "--agent.replay_capacity"]
    refused = plan(*words, str(2**31 - 1), capsys=capsys).splitlines()[-1]
    assert refused.startswith("it does not fit: replay_capacity: 2147483647 records of")
    assert "h100 has 80 GB, of which JAX takes 75%" in refused
    most = refused.split("at most ")[1].split(" ")[0]
    assert plan(*words, most, capsys=capsys).splitlines()[-1] == "it fits"


@pytest.mark.parametrize("name", sizing.FRACTIONS)
def test_of_a_gpu_there_is_what_jax_is_told_to_take(name, uncompiled, monkeypatch):
    for said, share in (("", 0.75), ("0.5", 0.5), ("1", 1)):
        monkeypatch.setenv(name, said)
        assert sizing.room_of(CARDS["h100"]).bytes == share * 80e9
        assert sizing.room_of(CARDS["tpu-v4"]).bytes == 32e9
    for said in ("half", "nan", "0"):
        monkeypatch.setenv(name, said)
        with pytest.raises(UsageError, match=f"^{name}: '{said}' is not valid; a number above 0 is"):
            sizing.room_of(CARDS["h100"])


@pytest.mark.slow
def test_so_many_seeds_fit_as_is_said(capsys, uncompiled):
    words = ["dreamer_v3", "--env", "probe:act_obs", "--card", "h100", *WORDS, "--memory-gb", "0.02", "--seeds"]
    refused = plan(*words, "100", capsys=capsys).splitlines()[-1]
    assert refused.startswith("it does not fit: seeds: 100 need")
    most = int(refused.split("at most ")[1].split(" ")[0])
    assert 1 < most < 15  # each has a megabyte of temporaries
    assert plan(*words, str(most), capsys=capsys).splitlines()[-1] == "it fits"
    assert plan(*words, str(most + 1), capsys=capsys).splitlines()[-1] != "it fits"


@pytest.mark.slow
def test_memory_is_that_of_the_compiled_program_where_no_card_is_named(found):
    own = sizing.plan("dreamer_v3", "probe:act_obs", **TINY)
    assert own.compiled_for == jax.default_backend() and own.card is None and not own.stages
    assert own.memory.parameters == found.memory.parameters and own.jobs[0].temporary_bytes > 0
    assert own.jobs[0].seconds is None and found.compiled_for in (None, "gpu")


@pytest.mark.slow
@pytest.mark.parametrize("agent", partly_long(AGENTS, ("dreamer_v3", "iris")))
def test_every_agent_can_be_planned(agent):
    found = sizing.plan(agent, card="h100", seeds=2)
    assert found.fits and all(job.multiply_adds and job.seconds for job in found.jobs) and found.stages
