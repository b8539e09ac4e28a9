"""The costs in the reward of stage 2: by flags, and otherwise as measured, once for each workdir."""

import dataclasses
import types

import pytest

from ppow_jax.inference.costs import Costs
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.training import stages
from ppow_jax.training.settings import TrainSettings


@pytest.fixture
def costs(tmp_path, monkeypatch):
    """settings -> the reward's costs, on a device where a draft step takes 0.1 steps and a verification 1.5."""
    measured = []

    def measure(target, drafter, speculation, L):
        measured.append((speculation.window, L))
        return Costs(draft=0.1 * speculation.window, verify=1.5, plain_step=1.0, steps=speculation.window)

    monkeypatch.setattr(stages, "measure_costs", measure)
    monkeypatch.setattr(stages, "cast", lambda drafter, dtype: drafter)

    def find(**changes):
        settings = dataclasses.replace(TrainSettings(workdir=str(tmp_path)), window=4, **changes)
        return stages._costs(types.SimpleNamespace(settings=settings, shared=tmp_path, target=None), None)

    find.measured = measured
    return find


def test_what_is_given_is_not_measured(costs):
    assert costs(gamma=0.2) == CostModel(0.2)
    assert costs(gamma=0.2, general_cost=True, verify_cost=1.25) == CostModel(0.2, True, 1.25)
    assert not costs.measured


def test_what_is_left_open_is_measured_once_at_the_windows_width(costs):
    assert costs().gamma == 0.1
    assert costs(general_cost=True) == CostModel(0.1, True, 1.5)
    assert costs(general_cost=True, gamma=0.3) == CostModel(0.3, True, 1.5)
    assert costs(general_cost=True, verify_cost=1.1, bonus=1.0) == CostModel(0.1, True, 1.1, bonus=1.0)
    assert costs.measured == [(4, TrainSettings(workdir="x").row_length)]
