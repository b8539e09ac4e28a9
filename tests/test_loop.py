"""The loop that both stages share: stops, kills, numbers that are not finite, checkpoints that cannot be written."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppow_jax.training import loop
from ppow_jax.training.checkpoint import Checkpoints
from ppow_jax.training.metrics import MetricsWriter, NonFiniteError, read_metrics
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.supervised import TrainState


def fake_loop(poison=None, **changes):
    def step(state, index, batch):
        assert batch == index + 7
        bad = poison is not None and index in np.atleast_1d(poison)
        loss = float("nan") if bad else 1.0 / (index + 1)
        params = {"w": state.params["w"] * 0.9 + index}
        state = state.advance(params, state.opt_state, jnp.float32(loss))
        return state, {"loss": loss, "parts": np.arange(2) * loss, "skipped": state.skipped}

    def measure(params):
        return {"tau": -abs(float(params["w"][0]) - 8.0)}  # best in mid-run

    base = loop.Loop(
        "stage", 13, lambda i: i + 7, step, measure, score="tau", checkpoint_every=3, evaluate_every=4, position=7
    )
    return dataclasses.replace(base, **changes)


def run_loop(directory, made=None, stop=None):
    state = TrainState.create({"w": jnp.ones(3)}, optax.sgd(1.0))
    with MetricsWriter(directory) as metrics:
        return loop.run(made or fake_loop(), state, directory / "stage", metrics, stop or StopSignal())


def essentials(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return sorted((row["stage"], row["step"], row.get("loss", row.get("tau"))) for row in rows)


class StopAfter(StopSignal):
    """Asks to stop when it was looked at n times."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    params, complete = run_loop(directory)
    assert complete
    return directory, params


def test_the_best_parameters_are_returned(uninterrupted):
    directory, params = uninterrupted
    taus = {row["step"]: row["tau"] for row in read_metrics(directory / "metrics.jsonl") if "tau" in row}
    assert list(taus) == [0, 4, 8, 12, 13]
    w, expected = 1.0, {}
    for index in range(13):
        w = w * 0.9 + index
        expected[index + 1] = w
    best = max(taus, key=taus.get)
    assert best == 4  # neither the first nor the last
    np.testing.assert_allclose(params["w"], expected[best], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 12])
def test_a_stopped_loop_goes_on_where_it_was(uninterrupted, tmp_path, steps):
    _, complete = run_loop(tmp_path, stop=StopAfter(steps))
    assert not complete
    with Checkpoints(tmp_path / "stage" / "checkpoints") as checkpoints:
        assert checkpoints.steps[-1] == steps
    params, complete = run_loop(tmp_path)
    assert complete and essentials(tmp_path) == essentials(uninterrupted[0])
    np.testing.assert_array_equal(params["w"], uninterrupted[1]["w"])
    assert run_loop(tmp_path)[1] and essentials(tmp_path) == essentials(uninterrupted[0])  # finished work stays


def test_a_killed_loop_goes_on_from_its_last_checkpoint(uninterrupted, tmp_path):
    """Killed in step 9: steps 7 and 8 come again, and step 8 is not measured into the metrics twice."""
    whole = fake_loop()

    def step(state, index, batch):
        if index == 8:
            raise KeyboardInterrupt
        return whole.step(state, index, batch)

    with pytest.raises(KeyboardInterrupt):
        run_loop(tmp_path, fake_loop(step=step))
    params, complete = run_loop(tmp_path)
    assert complete and essentials(tmp_path) == essentials(uninterrupted[0])
    np.testing.assert_array_equal(params["w"], uninterrupted[1]["w"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(uninterrupted, tmp_path):
    message = r"stage: step 8: loss is nan, parts is \[nan, nan\]; the last good checkpoint is .*/checkpoints/6$"
    with pytest.raises(NonFiniteError, match=message):
        run_loop(tmp_path, fake_loop(poison=7))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 8 and np.isnan(rows[-1]["loss"])  # written before it stopped
    with Checkpoints(tmp_path / "stage" / "checkpoints") as checkpoints:
        assert checkpoints.steps == [3, 6]
    assert run_loop(tmp_path)[1] and essentials(tmp_path) == essentials(uninterrupted[0])
