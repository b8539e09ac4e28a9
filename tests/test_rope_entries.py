"""Rotary settings as config files have them: two entries, two spellings, nulls, and what contradicts itself."""

import logging

import pytest
from small_configs import LLAMA, LLAMA3, YARN, read

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.rope import Linear, Yarn

LINEAR = {"rope_type": "linear", "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 100000.0}


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
        {"rope_scaling": DEFAULT, "rope_parameters": LINEAR},
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 100000}},
        {"rope_scaling": LINEAR, "rope_parameters": {}},
        {"rope_scaling": {"rope_theta": None}, "rope_parameters": {"type": "linear", "rope_type": None, "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2, "mscale": None}},
        {"rope_scaling": LINEAR | {"partial_rotary_factor": 1.0}, "rope_parameters": None},
    ],
)
def test_the_entry_that_scales_counts(entries):
    config = read(**entries)
    assert config.rope_scaling == Linear(2.0) and config.rope_theta == 1e5


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": None}}, 1e6),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": None, "rope_scaling": LINEAR, "rope_parameters": DEFAULT}, 1e5),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}, 1e6),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 1e4),
        ({"rope_theta": None, "rope_scaling": {"rope_type": None, "type": None, "factor": None}}, 1e4),
    ],
)
def test_theta_from_wherever_it_is_given(changes, theta):
    assert read(**changes).rope_theta == theta


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}}, "contradict each other"),
        ({"rope_scaling": LINEAR, "rope_parameters": YARN}, "rope_scaling and rope_parameters contradict each other"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta = 100000 and rope_parameters.rope_theta = 10000"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2}}, "type = 'linear' contradict"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "type = 'mrope' contradict"),
        ({"rope_scaling": {"factor": 2.0}}, "factor = 2.0 with no rope_type"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "factor = 4 with rope_type 'default'"),
        ({"rope_scaling": {"type": None, "mrope_section": [1, 2]}}, "mrope_section = [1, 2] with no rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' must be an object or null"),
        ({"rope_scaling": [LINEAR]}, "must be an object or null"),
        ({"rope_scaling": False}, "rope_scaling = False must be an object or null"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "only one rope_type of"),
        ({"rope_scaling": LINEAR | {"rope_theta": "x"}}, "rope_scaling: rope_theta = 'x' must be a positive number"),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    ],
)
def test_contradictions_are_refused(changes, said):
    with pytest.raises(UserError) as caught:
        read(**changes)
    assert str(caught.value).startswith("some/config.json: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "original", "factor", "positions"),
    [
        (32768, 32768, 4.0, 131072),  # the original number, as Qwen2.5's cards have it
        (40960, 32768, 4.0, 131072),  # a rounded one, as Qwen3's
        (131072, 32768, 4.0, 131072),  # the whole
        (163840, 4096, 40, 163840),
        (1000, None, 2.0, 2000),
        (300000, 32768, 4.0, 300000),
    ],
)
def test_yarn_stretches_the_positions(named, original, factor, positions, caplog):
    scaling = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config = read(max_position_embeddings=named, rope_scaling=scaling)
    assert config.max_position_embeddings == positions
    assert isinstance(config.rope_scaling, Yarn)
    assert config.rope_scaling.original_max_position_embeddings == (original or named)
    assert ModelConfig.from_hf(config.to_hf(), "x") == config
    guessed = "has no original_max_position_embeddings: max_position_embeddings = 1000 is taken for it" in caplog.text
    assert guessed == (original is None)


def test_other_rules_leave_the_positions(caplog):
    caplog.set_level(logging.WARNING)
    for scaling in (LINEAR, LLAMA3, {"type": "dynamic", "factor": 4.0}, None):
        assert read(rope_scaling=scaling).max_position_embeddings == LLAMA["max_position_embeddings"]
    assert not caplog.text
