"""The table of bounds, and the checks of single values."""

import dataclasses
import typing

import numpy as np
import pytest

from wmjax import checks, presets
from wmjax.agents import AGENTS
from wmjax.types import UsageError


def configurations(config):
    """A configuration, and those of its parts."""
    yield config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from configurations(getattr(config, field.name))


def kinds(hint) -> set:
    """The types that a hint names, wherever in it."""
    inner = typing.get_args(hint)
    return {hint}.union(*map(kinds, inner)) if inner else {hint}


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_every_count_of_every_agent_has_a_bound_and_every_preset_keeps_it(agent):
    for config in (presets.resolve(agent, preset)[0] for preset in presets.PRESETS[agent]):
        for part in configurations(config):
            for name, hint in typing.get_type_hints(type(part)).items():
                if int in kinds(hint):
                    assert name in checks.BOUNDS, name


@pytest.mark.parametrize(
    ("agent", "values", "words"),
    [
        ("dreamer_v3", {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ("dreamer_v3", {"unimix": 1.0}, r"unimix must be in \[0, 1\), got 1.0"),
        ("dreamer_v3", {"bins": 2**31 - 1}, "bins must be at most 65,536, got 2147483647"),
        ("dreamer_v3", {"warmup": 2**31}, r"warmup must be below 2\*\*31, got 2147483648"),
        ("dreamer_v3", {"train_ratio": 1e300}, r"train_ratio must be a number of at most 1e\+06, got 1e\+300"),
        ("dreamer_v3", {"free_nats": 1e39}, r"free_nats must be a number of at most 3.4e\+38, got 1e\+39"),
        ("dreamer_v3", {"epsilon": 1e-300}, "epsilon must be at least 1.2e-38 in size, or it is 0 in float32"),
        ("dreamer_v3", {"encoder_units": (8,) * 129}, "encoder_units must have at most 128 entries, got 129"),
        (
            "dreamer_v3",
            {"encoder_units": (8, 2**40)},
            r"encoder_units must be at most 65,536, got \(8, 1099511627776\)",
        ),
        ("dreamer_v2", {"encoder_padding": -1}, "encoder_padding must be 0 or more, got -1"),
        ("dreamer_v1", {"weight_decay": 1.0}, r"weight_decay must be in \[0, 1\), got 1.0"),
        ("iris", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("iris", {"policy_channels": ()}, r"policy_channels must be one or more, got \(\)"),
        ("iris", {"layers": 10**6}, "layers must be at most 128, got 1000000"),
        ("world_models", {"evolve": {"population": 4_000_000_000}}, "population must be at most 1,048,576, got 4000"),
        ("world_models", {"evolve": {"horizon": 10**400}}, "horizon must be at most 100,000, got 1000.*401 characters"),
    ],
)
def test_a_field_beyond_its_bound_is_refused_with_the_bound(agent, values, words):
    with pytest.raises(UsageError, match=f"^{words}") as caught:
        presets.resolve(agent, "small", None, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("agent", "values", "valid"),
    [
        ("dreamer_v1", {"encoder_padding": "FULL"}, "VALID, SAME"),
        ("dreamer_v2", {"actor_grad": "x"}, "auto, reinforce, dynamics, both"),
        ("dreamer_v3", {"compute_dtype": 16}, "float32, bfloat16"),
        ("world_models", {"eval_action": "sample"}, "mode"),
        ("iris", {"norm": None}, "pre, post"),
    ],
)
def test_a_choice_is_checked_in_a_configuration_made_in_python_too(agent, values, valid):
    ((name, value),) = values.items()
    with pytest.raises(UsageError, match=f"^{name}: {value!r} is not valid; one of {valid} is$"):
        AGENTS[agent][0](**values).validate()


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), 3])
def test_whole_numbers_of_numpy_are_taken_as_python_s_own(value):
    assert checks.number("seeds", value) == 3 and type(checks.number("seeds", value)) is int


@pytest.mark.parametrize("value", [np.float32(1.5), np.float64(1.5), 1.5])
def test_numbers_of_numpy_are_taken_as_python_s_own(value):
    assert checks.number("worker_timeout", value) == 1.5 and type(checks.number("worker_timeout", value)) is float


@pytest.mark.parametrize(
    "value",
    [True, np.True_, "3", b"3", 3.0, np.float64(3), None, [3], np.array([3]), 3j, 0, -1, 10_001, 2**31, 10**5000, ()],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_whole_number_in_the_bounds_is_refused_in_one_short_line(value):
    with pytest.raises(UsageError, match=r"^seeds: .* is not valid; an integer in \[1, 10000\]") as caught:
        checks.number("seeds", value)
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "1", float("nan"), -1.0, 0, 10**400, 1j, None])
def test_what_is_no_number_in_the_bounds_is_refused(value):
    with pytest.raises(UsageError, match=r"^worker_timeout: .* is not valid; a number above 0 is"):
        checks.number("worker_timeout", value)


def test_seconds_may_be_without_end():
    assert checks.number("checkpoint_seconds", float("inf")) == float("inf")


@pytest.mark.parametrize("value", [3, None, b"x", "", "a\0b", "a\nb", "\x1b[31m", "x" * 4097, "\udcff", ["x"]])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(UsageError, match=r"^wandb: .* is not valid; a name of 1 to 4096 printable characters is$"):
        checks.text("wandb", value)


@pytest.mark.parametrize("value", [3, None, b"x", "", "a\0b", "a" * 300, "a/" * 5000, "\udcff", ["x"], True])
def test_what_is_no_path_is_refused_in_one_line(value):
    with pytest.raises(UsageError, match=r"^out: .* is not valid") as caught:
        checks.path("out", value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_path_through_a_ring_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match=r"^out: .*symbolic links"):
        checks.path("out", tmp_path / "a" / "x")


def test_paths_may_be_absent_long_and_in_any_language(tmp_path):
    for name in ("absent/below", "ä ö/走", "x" * 255):
        assert checks.path("out", str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize("value", ["yes", 1, 0, None, [], "True"])
def test_what_is_no_truth_value_is_refused(value):
    with pytest.raises(UsageError, match=r"^resume: .* is not valid; True or False is$"):
        checks.flag("resume", value)


def test_truth_values_of_numpy_are_taken():
    assert checks.flag("resume", np.True_) is True and checks.flag("resume", False) is False
