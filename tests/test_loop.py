"""The loop that both stages share: stops, kills, numbers that are not finite, checkpoints that cannot be written."""

import dataclasses
import errno
import itertools
import logging
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppow_jax import files
from ppow_jax.errors import UserError
from ppow_jax.training.run import clock as clock_of_runs
from ppow_jax.training.run import loop
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.training.run.clock import Clock, read_attempts
from ppow_jax.training.run.metrics import MetricsWriter, NonFiniteError, read_metrics
from ppow_jax.training.run.preemption import StopSignal
from ppow_jax.training.steps.state import TrainState


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


def run_loop(directory, made=None, stop=None, clock=None):
    state = TrainState.create({"w": jnp.ones(3)}, optax.sgd(1.0))
    with MetricsWriter(directory) as metrics:
        return loop.run(made or fake_loop(), state, directory / "stage", metrics, stop or StopSignal(), clock)


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


def test_a_resumed_loop_runs_the_program_of_the_first(tmp_path):
    step = jax.jit(lambda state, index: state.advance({"w": state.params["w"] * 0.9 + index}, state.opt_state))
    made = fake_loop(step=lambda state, index, _: (step(state, index), {"loss": 1.0}))
    assert not run_loop(tmp_path, made, stop=StopAfter(5))[1]
    assert run_loop(tmp_path, made)[1] and step._cache_size() == 1


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


def test_bad_updates_are_skipped_up_to_a_bound_over_resumes(tmp_path, caplog):
    """Steps 3, 8 and 11 are bad. Two may be: the third stops the run, and one more allowed lets it come to its end."""
    bad = (2, 7, 10)
    assert not run_loop(tmp_path, fake_loop(bad, skip_nonfinite=2), stop=StopAfter(5))[1]
    with pytest.raises(NonFiniteError, match=r"step 11: .*after 2 skipped updates \(--skip_nonfinite\); .*/9$"):
        run_loop(tmp_path, fake_loop(bad, skip_nonfinite=2))
    with caplog.at_level(logging.WARNING):
        params, complete = run_loop(tmp_path, fake_loop(bad, skip_nonfinite=3))
    assert complete and "step 11: loss is nan, parts is [nan, nan]; update skipped (3 of 3)" in caplog.text
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["stage"] == "stage"]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    with Checkpoints(tmp_path / "stage" / "checkpoints") as checkpoints:
        assert checkpoints.read_extra(13)["position"] == 20


def test_a_checkpoint_of_another_place_in_the_data_is_refused(tmp_path):
    run_loop(tmp_path, stop=StopAfter(5))
    moved = fake_loop(position=9)
    with pytest.raises(UserError, match=r"checkpoints/5: ends at batch 12, but would go on at 14; bring"):
        run_loop(tmp_path, moved)


def test_metrics_that_are_missing_are_named(uninterrupted, tmp_path, caplog):
    run_loop(tmp_path, stop=StopAfter(5))
    (tmp_path / "metrics.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        assert run_loop(tmp_path)[1]
    assert f"stage: {tmp_path / 'metrics.jsonl'} has no metrics of 5 finished steps" in caplog.text


@pytest.fixture
def seconds_by_looks(monkeypatch):
    """A clock that goes on by a second whenever it is looked at; nothing is compiled."""
    looks = itertools.count()
    ticking = types.SimpleNamespace(perf_counter=lambda: float(next(looks)), time=time.time)
    for module in (loop, clock_of_runs):
        monkeypatch.setattr(module, "time", ticking)
        monkeypatch.setattr(module, "compile_seconds", lambda: 0.0)


@pytest.mark.usefixtures("seconds_by_looks")
def test_the_clock_counts_what_counts(tmp_path):
    clock = Clock(tmp_path / "attempts.jsonl")
    with clock.stage("stage"):
        run_loop(tmp_path, stop=StopAfter(5), clock=clock)
    steps = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["stage"] == "stage"]
    worth = sum(row["seconds"] - row["compile_seconds"] for row in steps)
    (attempt,) = read_attempts(tmp_path / "attempts.jsonl")
    seconds = attempt["stage"]
    assert len(steps) == 5 and seconds["data"] == 5  # one second per batch
    assert seconds["step"] + seconds["data"] == worth == sum(row["seconds"] for row in steps)
    parts = [seconds.get(kind, 0) for kind in ("step", "data", "save", "measure", "restore")]
    assert seconds["compile"] == 0 and sum(parts) < seconds["wall"]
    again = Clock(tmp_path / "attempts.jsonl")
    with again.stage("stage"):
        run_loop(tmp_path, clock=again)
    assert again.summary()["attempts"] == 2 and 0 < again.goodput() < 1
    measured = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["stage"] == "stage_held_out"]
    assert all(row["memory_bytes"] > 0 for row in [*steps, *measured]) and 0 < measured[-1]["goodput"] < 1


# Disks that are full.


def test_a_failing_save_names_the_last_good_checkpoint_and_leaves_it(uninterrupted, tmp_path, monkeypatch):
    save = Checkpoints.save

    def full(self, step, state, extra=None):
        if step == 6 and self.directory.name == "checkpoints":
            self.wait()
            with self._saving():
                raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, state, extra)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        message = r"cannot be saved \(No space left on device\); .*/stage/checkpoints/3 is whole; free space"
        with pytest.raises(UserError, match=message):
            run_loop(tmp_path)
    params, complete = run_loop(tmp_path)
    assert complete and essentials(tmp_path) == essentials(uninterrupted[0])
    np.testing.assert_array_equal(params["w"], uninterrupted[1]["w"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """Checkpoints of 1.2 MB that do not compress: the second or third does not fit, and the one before is whole."""
    state = {"x": jax.random.normal(jax.random.key(0), (300_000,)), "step": jnp.int32(0)}
    saved = []
    with pytest.raises(UserError, match=r"cannot be saved \(No space left on device\); .*checkpoints/\d is whole"):
        with Checkpoints(small_disk / "checkpoints", keep=2) as checkpoints:
            for step in range(1, 5):
                checkpoints.save(step, state | {"step": jnp.int32(step)})
                checkpoints.wait()
                saved.append(step)
    assert saved
    with Checkpoints(small_disk / "checkpoints", keep=2) as checkpoints:
        step, restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    assert step == saved[-1] == int(restored["step"])
    np.testing.assert_array_equal(restored["x"], state["x"])
    with pytest.raises(OSError, match="No space left"), open(small_disk / "features", "wb") as file:
        files.reserve(file, 4 << 20)  # at once, and not as a fault in mid-pass
