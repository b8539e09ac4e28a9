"""The services that get a copy of the metrics; wandb is a stand-in, so that nothing is sent."""

import json
import sys
import types

import numpy as np
import pytest

from ppow_jax.errors import UserError
from ppow_jax.training.run.metrics import MetricsWriter, read_metrics
from ppow_jax.training.run.sinks import check_sinks, open_sinks
from ppow_jax.training.run.tensorboard import TensorBoard
from ppow_jax.training.run.weights_and_biases import WeightsAndBiases
from ppow_jax.training.settings import TrainSettings


class Run:
    """The records of one run in the stand-in."""

    def __init__(self, name: str):
        self.id, self.rows, self.axes, self.finished = name, [], {}, False

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric

    def log(self, row):
        assert not self.finished
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module with the part of wandb's interface that is used; `started` holds the arguments and runs of `init`."""
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.started = []

    def init(**arguments):
        run = Run(arguments["id"] or f"run{len(module.started)}")
        module.started.append((arguments, run))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def attempt(workdir, first, last, restored):
    """One process of a run: resumes after step `restored`, and writes steps first to last."""
    with MetricsWriter(workdir, sinks=open_sinks(TrainSettings(wandb=True, seed=5), workdir)) as metrics:
        metrics.resume("ppow", restored)
        for step in range(first, last + 1):
            row = {"loss": np.float32(step / 2), "histogram": np.arange(2) + step, "mode": "chain", "none": None}
            metrics.write(step, "ppow", row)
        metrics.sync()


def test_wandb_gets_the_rows_by_stage(wandb, tmp_path):
    attempt(tmp_path / "mine", 1, 2, 0)
    ((arguments, run),) = wandb.started
    assert run.rows == [
        {"ppow/step": 1, "ppow/loss": 0.5, "ppow/histogram/1": 1.0, "ppow/histogram/2": 2.0},
        {"ppow/step": 2, "ppow/loss": 1.0, "ppow/histogram/1": 2.0, "ppow/histogram/2": 3.0},
    ]
    assert run.finished and run.axes == {"ppow/step": None, "ppow/*": "ppow/step"}
    assert (arguments["project"], arguments["name"], arguments["id"]) == ("ppow_jax", "mine", None)
    assert arguments["config"]["seed"] == 5 and arguments["dir"] == str(tmp_path / "mine")
    assert [row["step"] for row in read_metrics(tmp_path / "mine" / "metrics.jsonl")] == [1, 2], "always written"


def test_a_resumed_run_continues_the_same_wandb_run_without_repeating_steps(wandb, tmp_path):
    attempt(tmp_path, 1, 4, 0)
    attempt(tmp_path, 3, 6, 2)  # the last checkpoint was that of step 2: steps 3 and 4 are done again
    (_, first), (arguments, second) = wandb.started
    assert arguments["id"] == first.id == second.id and arguments["resume"] == "allow"
    assert [row["ppow/step"] for row in first.rows + second.rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "run0"}


def test_a_run_that_begins_with_wandb_later_sends_from_there(wandb, tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 5):
            metrics.write(step, "ppow", {"loss": 1.0})
    attempt(tmp_path, 3, 5, 2)
    assert [row["ppow/step"] for row in wandb.started[0][1].rows] == [3, 4, 5]


def test_the_environment_names_another_project(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "drafters")
    WeightsAndBiases(tmp_path, TrainSettings()).close()
    assert wandb.started[0][0]["project"] == "drafters"


def test_a_refused_run_is_a_user_error(wandb, tmp_path):
    def refuse(**_):
        raise wandb.Error("No API key\n configured.")

    wandb.init = refuse
    with pytest.raises(UserError, match="^--wandb: No API key configured.; WANDB_MODE=offline needs no account$"):
        WeightsAndBiases(tmp_path, TrainSettings())
    assert not (tmp_path / "wandb.json").exists()


def test_without_the_package_the_flag_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"--wandb: needs the package wandb: pip install 'ppow_jax\[wandb\]'"):
        check_sinks(TrainSettings(wandb=True))
    with pytest.raises(UserError, match=r"--tensorboard: needs the package tensorboardX"):
        check_sinks(TrainSettings(tensorboard=True))
    check_sinks(TrainSettings())
    assert open_sinks(TrainSettings(), tmp_path) == [] and not list(tmp_path.iterdir())


def test_both_flags_make_two_sinks(wandb, tmp_path):
    pytest.importorskip("tensorboardX", reason="an extra: pip install 'ppow_jax[tensorboard]'")
    sinks = open_sinks(TrainSettings(wandb=True, tensorboard=True), tmp_path)
    assert [type(sink) for sink in sinks] == [TensorBoard, WeightsAndBiases]
    for sink in sinks:
        sink.close()
