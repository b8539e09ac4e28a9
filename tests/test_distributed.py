"""Processes that train together: one that is killed ends the other, both go on where they were, and the result is that
of one process.

The processes are started for real, and talk over gloo on this machine; see `train_in_processes.py`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick_compilation
from safetensors.numpy import load_file

from ppow_jax import distributed, mesh_shape, progress
from ppow_jax.errors import UserError
from ppow_jax.training.run.metrics import VOLATILE, NoMetrics, read_metrics

SCRIPT = pathlib.Path(__file__).parent / "support" / "train_in_processes.py"
STAGES, ALL_STAGES = "data,supervised,export", "data,supervised,ppow,evaluate,export"


def start(workdir, number=1, devices=1, die_at=0, stages=STAGES):
    """Starts the processes -> (exit codes, logs)."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick_compilation.flags()}",
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(workdir), str(port), str(number), str(me), str(die_at), stages],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(number)
    ]
    logs = [process.communicate()[1] for process in processes]
    return [process.returncode for process in processes], logs


def result(workdir):
    """(rows of metrics without times, the drafter's tensors)."""
    rows = [
        {name: value for name, value in row.items() if name not in VOLATILE}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]
    return rows, load_file(workdir / "drafter" / "model.safetensors")


def assert_same(ours, theirs):
    for row, expected in zip(ours[0], theirs[0], strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if isinstance(row[name], str):
                assert row[name] == expected[name]
            else:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert ours[1].keys() == theirs[1].keys()
    for name, x in ours[1].items():
        np.testing.assert_allclose(x.astype(np.float32), theirs[1][name].astype(np.float32), atol=4e-3, err_msg=name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(directory):
    codes, logs = start(directory / "alone")
    assert codes == [0], logs[0][-3000:]
    return result(directory / "alone")


@pytest.mark.full
def test_a_killed_process_ends_the_other_and_both_go_on(directory, alone):
    workdir = directory / "two"
    codes, logs = start(workdir, number=2, die_at=4)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    assert "Connection closed by peer" in logs[0] or "another task died" in logs[0], logs[0][-3000:]
    codes, logs = start(workdir, number=2)
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert "resuming after step" in logs[0] and "resuming" not in logs[1]  # one voice
    assert_same(result(workdir), alone)


@pytest.mark.slow
def test_two_processes_of_two_devices_run_every_stage(directory):
    """Answers, both stages, the measurement with its texts, the drafter: those of one process of one device."""
    codes, logs = start(directory / "one", stages=ALL_STAGES)
    assert codes == [0], logs[0][-3000:]
    codes, logs = start(directory / "four", number=2, devices=2, stages=ALL_STAGES)
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert "process 0 of 2, 4 devices in all" in logs[0]
    assert_same(result(directory / "four"), result(directory / "one"))
    four, one = (json.loads((directory / name / "report.json").read_text())["arms"] for name in ("four", "one"))
    assert [arm["name"] for arm in four] == [arm["name"] for arm in one] == ["supervised", "ppow"]
    for ours, theirs in zip(four, one, strict=True):
        for name in ("tau", "identical", "total"):
            assert [row[name] for row in ours["results"]] == [row[name] for row in theirs["results"]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("here:1", None, None), "--num_processes: is missing"),
        ((None, 2, None), "--coordinator: is missing"),
        (("here", 2, 0), "--coordinator=here: must be HOST:PORT"),
        (("here:port", 2, 0), "must be HOST:PORT"),
        (("here:1", 2, 2), "--process_id=2: must be less than --num_processes=2"),
    ],
)
def test_flags_that_do_not_fit(given, says):
    with pytest.raises(UserError, match=says):
        mesh_shape.check_processes(*given)
    mesh_shape.check_processes(None, None, None)
    mesh_shape.check_processes("here:1", 2, 1)


def test_one_process_needs_nobody(tmp_path):
    done = []
    with distributed.connect():
        assert distributed.leader() and distributed.from_leader(0.3) == 0.3 and distributed.least(4) == 4
        distributed.by_leader(lambda: done.append(1))
        distributed.wait("for nobody")
        assert [distributed.Agreement().ask(mine) for mine in (False, True)] == [False, True]
    assert done == [1] and jax.process_count() == 1
    silent = NoMetrics(tmp_path)
    silent.write(1, "ppow", {})
    assert silent.resume("ppow", 1) == [] and not silent.path.exists()


def test_what_is_silent_shows_no_progress(monkeypatch):
    monkeypatch.setattr(progress, "SILENT", True)
    with progress.bar(3, "steps") as bar, progress.off_the_clock(bar):
        bar.update(1)
    assert bar.disable
