"""Target layers in a drafter's files: outputs or inputs, in one place or two, or nowhere."""

import logging

import pytest

from ppow_jax.errors import UserError
from ppow_jax.weights.feature_layers import LAYER_IDS, read_layers


def layers(outputs=None, inputs=None, num_layers: int | None = 7):
    return read_layers({LAYER_IDS: inputs}, {LAYER_IDS: outputs}, num_layers, "d/config.json")


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_both_places_in_agreement_need_no_word(logged):
    assert layers([1, 2, 3], [2, 3, 4]) == (2, 3, 4) == layers([1, 2, 3], [2, 3, 4], None)
    assert not logged.text


@pytest.mark.parametrize(
    ("outputs", "inputs", "num_layers", "found", "said"),
    [
        ([1, 3, 5], None, 7, (2, 4, 6), "are read as outputs of the target's layers (inputs of 2, 4, 6)"),
        ([1, 3, 6], [], 7, (2, 4, 7), "are read as outputs"),
        ([1, 30, 60], None, None, (2, 31, 61), "are read as outputs"),
        ([], [1, 3, 5], 7, (1, 3, 5), "are read as inputs of the target's layers (inputs of 1, 3, 5)"),
        (None, [0, 1, 2], 2, (0, 1, 2), "are read as inputs"),
    ],
)
def test_the_reading_is_said(outputs, inputs, num_layers, found, said, logged):
    assert layers(outputs, inputs, num_layers) == found
    assert said in logged.text and not warnings(logged)


@pytest.mark.parametrize(
    ("outputs", "inputs", "num_layers", "found", "said"),
    [
        ([3, 5, 7], None, 7, (3, 5, 7), "cannot be outputs of layers of a target with 7 layers: read as inputs"),
        ([3, 5, 7], [3, 5, 7], 7, (3, 5, 7), "read as inputs"),
        (None, [-1, 3, 5], 7, (0, 4, 6), "cannot be inputs of layers of a target with 7 layers: read as outputs"),
        (None, [-1, 3, 5], None, (0, 4, 6), "read as outputs"),
        ([2, 3, 4], None, 7, (3, 4, 5), "these are the default layers if they are meant as inputs; `python -m"),
        (None, None, 30, (2, 15, 27), "assumed to be the inputs of 2, 15, 27, the default for 30 layers; `python"),
        ([], [], 7, (2, 3, 4), "assumed to be the inputs of 2, 3, 4"),
    ],
)
def test_what_is_guessed_is_warned_of(outputs, inputs, num_layers, found, said, logged):
    assert layers(outputs, inputs, num_layers) == found
    (warning,) = warnings(logged)
    assert said in warning and "config.json" in warning


@pytest.mark.parametrize(
    ("outputs", "inputs", "said"),
    [
        ([3, 5, 8], None, "must be three ascending ids of 0..7"),
        (None, [3, 5, 8], "must be three ascending ids of 0..7"),
        (None, [-2, 3, 5], "must be three ascending ids"),
        ([5, 2, 3], None, "must be three ascending ids"),
        ([2, 2, 3], None, "must be three ascending ids"),
        ([1, 2, 3], [1, 2, 3], "contradicts eagle_config"),
        ([1, 2, 3], [2, 3, 5], "delete the wrong one"),
        ([1, 2, 3, 4], None, "four features are not supported"),
        (None, [1, 2, 3, 4, 5], "five features are not supported"),
        ([1], None, "one feature is not supported"),
        ("1,2,3", None, "must be a list of layer ids"),
        ([1.0, 2.0, 3.0], None, "must be a list of layer ids"),
        ([True, 2, 3], None, "must be a list of layer ids"),
        ({"0": 1}, None, "must be a list of layer ids"),
    ],
)
def test_impossible_ids_are_refused(outputs, inputs, said):
    with pytest.raises(UserError) as caught:
        layers(outputs, inputs)
    assert str(caught.value).startswith("d/config.json: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_guess_without_the_target_or_for_a_shallow_one(logged):
    assert layers(num_layers=None) == () and not logged.text
    with pytest.raises(UserError, match="does not name the target layers .* a target of 6 layers has no default"):
        layers(num_layers=6)
