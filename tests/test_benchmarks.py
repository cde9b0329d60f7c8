"""What benchmarks count, by a program whose launches are known."""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import pytest

import wmjax
from benchmarks import launches, learning, replay, scaling, speed, timing, traffic
from tests.agents.batches import PIXELS, TINY_V3
from wmjax.comparison.summary import score

PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/jax/core.py"
2 "/home/wmjax/wmjax/optim.py"

FunctionNames
1 "bind"
2 "descend.<locals>.step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=51 end_line=51 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%p)
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="mul" stack_frame_id=2}
  %g = (f32[4]{0}, s8[8]{0}) custom-call(%f), custom_call_target="__cublas$gemm", metadata={stack_frame_id=9}
  %again = (s32[], f32[4]) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %t = (s32[], f32[4]) tuple(%x, %f)
}

ENTRY %main (a: f32[4], i: s32[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %u = (s32[], f32[4]) while(%a), condition=%c, body=%inner
  %b = f32[4]{0} conditional(%i, %a, %a), branch_computations={%nothing, %inner}
  %d = f32[4]{0} call(%a), to_apply=%inner
  ROOT %e = f32[4]{0} fusion(%b), kind=kLoop, calls=%fused, metadata={op_name="add" stack_frame_id=1}
}
"""


def test_launches_are_counted_with_the_trips_of_their_loops_and_by_the_lines_they_are_for():
    module = launches.read_module(PROGRAM)
    found, unknown = launches.loops(module)
    by_name = {loop.name: loop for loop in found if loop.times != 15}
    assert launches.total(found) == {"fusion": 3 + 1, "__cublas$gemm": 3, "copy": 3 * 5 + 1 + 1 + 1}
    assert by_name["body"].places == {"optim.py:51 step": 1, "elsewhere": 1}
    assert by_name["main"].places == {"optim.py:51 step": 1, "the compiler": 2} and by_name["main"].times == 1
    assert unknown == ["inner"] and found[0].times * found[0].launches == 15


@pytest.mark.long
@pytest.mark.slow
def test_what_training_is_made_of_is_timed(monkeypatch):
    monkeypatch.setattr(speed, "PIXELS", PIXELS)
    table = timing.Table("")
    speed.matmul(table)
    speed.update(table, "update", "dreamer_v3", TINY_V3)
    speed.policy_step(table, "policy", "dreamer_v3", TINY_V3, 2)
    speed.imagination(table, "imagination", "dreamer_v3", TINY_V3, rows=4, horizon=3)
    speed.environment(table, "catch", envs=2, steps=20)
    assert all(row["value"] > 0 for row in table.rows)
    (update,) = (row for row in table.rows if row["name"] == "update")
    assert 0 < update["limit_ms"] < update["value"] and update["compile_s"] > 0


@pytest.mark.slow
def test_every_form_of_sampling_is_timed_on_the_device_and_on_the_host(tmp_path):
    replay.main(replay.Args(rows=300, num_envs=(2,), out=tmp_path / "replay.json"))
    rows = json.loads((tmp_path / "replay.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + len(replay.FORMS)) and all(0 < row["value"] < 1000 for row in rows)


@pytest.mark.parametrize(
    ("returns", "fine"),
    [((0.95, 1.0, 0.9), True), ((1.0, 0.89, 1.0), False), ((1.0, 1.0), False), ((1.0, None, 1.0), False), ((), False)],
)
def test_the_gate_of_learning_is_passed_only_where_every_seed_reaches_the_threshold(returns, fine):
    group = {"agent": "iris", "end": score(returns), "seconds": [60.0], "budget": 1000}
    report = {"environments": [{"groups": [group] if returns else []}]}
    cells, found = learning.judge(learning.Row("iris", "catch", 0.9), report, 3)
    assert found == fine and cells[-1] == ("yes" if fine else "**no**")
    assert cells[3] == {(0.95, 1.0, 0.9): "0.95 [0.90, 1.00]", (1.0, 1.0): "1.00"}.get(returns, cells[3])


def test_the_gate_of_learning_is_not_passed_by_asking_for_nothing():
    assert [row.agent for row in learning.chosen(("iris",))] == ["iris"]
    for only, words in ((("iris", "pendulum"), "nothing is demanded of iris"), (("irsi",), "unknown irsi")):
        with pytest.raises(SystemExit, match=words):
            learning.chosen(only)


def test_bytes_that_go_around_a_ring_are_counted_by_kind_axis_and_loop():
    def program(x):  # float32 [8], on 2 copies of 4 parts
        x = jax.lax.psum(x, ("copies", "parts"))  # 2 · 7/8 of 32
        own = jax.lax.psum_scatter(x, "parts", tiled=True)  # 3/4 of 32
        own = jax.lax.fori_loop(0, 5, lambda _, own: own + jax.lax.pmax(own, "copies"), own)  # 5 · 2 · 1/2 of 8
        return jax.lax.all_gather(own, "parts", tiled=True)  # 3 times 8

    sizes = {"copies": 2, "parts": 4}
    traced = jax.make_jaxpr(program, axis_env=list(sizes.items()))(jnp.ones(8))
    assert traffic.through(traced, sizes) == 56 + 24 + 40 + 24
    assert traffic.sent(traced) == {"psum": 32, "reduce_scatter": 32, "pmax": 40, "all_gather": 8}
    assert traffic.through(traced, {"copies": 1, "parts": 1}) == 0


@pytest.mark.slow
@pytest.mark.parametrize("row", [scaling.Row(4, 1, 16), scaling.Row(4, 1, 16, shard_params=4)])
def test_what_an_update_sends_is_what_it_should_by_hand(row):
    counted, by_hand = scaling.sent(row)
    assert counted == pytest.approx(by_hand, rel=0.05)


def test_the_table_of_scaling_has_every_row():
    row = dict(devices=4, processes=2, batch_size=16, shard_params=1, seconds=0.0123, bytes_sent=2e6, by_hand=1.9e6)
    lines = scaling.table([row | {"bytes_held": 5e6}, row | {"bytes_held": 1e6, "shard_params": 4}]).splitlines()
    assert lines[2] == "| 4 | 2 | 16 | 12 ms | 2.00 MB | 1.90 MB | 5.00 MB |"
    assert lines[3].startswith("| 4, parameters in 4 parts | 2 | 16 |")


def test_a_checkout_that_is_not_installed_says_what_it_was_measured_with(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    versions = timing.machine()["versions"]
    assert versions["wmjax"] == wmjax.__version__ and versions["jax"] == jax.__version__
