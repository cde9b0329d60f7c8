"""Configurations and spaces that IRIS refuses."""

from __future__ import annotations

import dataclasses

import pytest

from tests.agents.batches import PIXELS, TINY_IRIS
from wmjax.agents import iris
from wmjax.types import Box, MultiDiscrete, UsageError

REFUSED = [
    (dict(vocab_size=1), "vocab_size"),
    (dict(horizon=1), "horizon"),
    (dict(heads=3), "width must be a multiple of heads=3"),
    (dict(world_model_length=5), r"world_model_length must be in \[1, max_blocks=4\]"),
    (dict(channels=48, multipliers=(1,)), "channels"),
    (dict(multipliers=(), patch=1), "multipliers"),
    (dict(policy_channels=(4, 0)), "policy_channels"),
    (dict(policy_channels=(4, 8, 8, 8)), "policy_channels: 4 layers"),
    (dict(tokenizer_after=9), "tokenizer_after"),
    (dict(final_epochs=3), "final_epochs needs collect_epochs"),
    (dict(collect_epochs=3), "collect_epochs"),
    (dict(replay_capacity=7), "replay_capacity"),
    (dict(dropout=1.5), "dropout"),
    (dict(world_model_rate=float("nan")), "world_model_rate"),
    (dict(grad_clip=float("inf")), "grad_clip"),
    (dict(patch=3), r"image size 16x16 .* 3 pixels .* sides such as"),
    (dict(patch=16, multipliers=(1,)), "image size 16x16"),
    (dict(perceptual="lpips"), "lpips_weights.*tools/lpips_to_npz.py"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_values_out_of_range_or_against_each_other_are_refused_by_name(change, words):
    with pytest.raises(UsageError, match=words) as error:
        iris.iris(PIXELS, dataclasses.replace(TINY_IRIS, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (PIXELS._replace(action=MultiDiscrete((2, 3))), "MultiDiscrete"),
        (PIXELS._replace(action=Box(-1, 1, (2,))), "action space"),
        (PIXELS._replace(obs={"image": Box(0, 255, (20, 20, 3), "uint8")}), "20x20"),
        (PIXELS._replace(obs={"image": Box(0, 255, (16, 32, 3), "uint8")}), "16x32"),
        (PIXELS._replace(obs={"vector": Box(0, 1, (4,))}), "one uint8 image"),
        (PIXELS._replace(obs=PIXELS.obs | {"vector": Box(0, 1, (4,))}), "one uint8 image"),
    ],
)
def test_a_space_it_cannot_take_is_refused_with_those_it_can(spec, word):
    with pytest.raises(UsageError, match=word) as error:
        iris.iris(spec, TINY_IRIS)
    assert "valid" in str(error.value)
