"""Training runs small enough to be killed many times: flags, the command in a process of its own, what runs leave.

The uninterrupted run is made once per session, for all its worker processes (conftest.py), and never changed.
"""

import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
import time

from ppow_jax import files, flags
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.training.run.metrics import VOLATILE, read_metrics
from ppow_jax.training.settings import TrainSettings

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "experiments" / "configs" / "tiny.flags"
FLAGS = {  # tiny.flags, made smaller still
    "num_answers": 16,
    "data": "builtin[0:60]",
    "held_out": 4,
    "answer_tokens": 12,
    "answer_slots": 8,
    "answer_chunk": 8,
    "draft_vocab_size": 64,
    "row_length": 112,
    "max_anchors": 32,
    "supervised_steps": 24,
    "ttt_steps": 2,
    "warmup_steps": 2,
    "ppow_steps": 16,
    "window": 2,
    "group": 2,
    "windows": 2,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "decoded_mode": "off",
    "num_prompts": 1,
    "max_new_tokens": 8,
}


def arguments(workdir, **changes):
    values = FLAGS | {"benchmarks": cache() / "prompts.jsonl", "workdir": workdir} | changes
    return [f"--flagfile={TINY}", *(f"--{name}={value}" for name, value in values.items())]


def settings(workdir, **changes) -> TrainSettings:
    return flags.parse(TrainSettings, arguments(workdir, **changes))


class Command:
    """`python -m experiments.train` in a process of its own; compiled programs are shared through one cache."""

    def __init__(self, workdir, **changes):
        self.workdir, self.log = pathlib.Path(workdir), cache() / f"{os.getpid()}-{time.monotonic_ns()}.log"
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *arguments(workdir, **changes)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> int:
        try:
            return self.process.wait(timeout=1200)
        finally:
            self.process.kill()
            self.process.wait()
            print(self.log.read_text())  # pytest shows it where a test fails


@functools.cache
def cache() -> pathlib.Path:
    """A directory of compiled programs and logs, with the prompts of the benchmark."""
    directory = pathlib.Path(os.environ["PPOW_JAX_TEST_RUNS"]).resolve() / "compiled"
    directory.mkdir(exist_ok=True)
    prompts = directory / "prompts.jsonl"
    files.write_atomic(prompts, "".join(f'{{"prompt": "What is {i} + 4?"}}\n' for i in (3, 17, 25)))
    return directory


@functools.cache
def whole() -> pathlib.Path:
    """The workdir of an uninterrupted run of every stage: made by the first process of the suite that asks for it."""
    workdir, done = cache().parent / "whole", cache().parent / "done"
    with open(cache().parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            assert Command(workdir).finish() == 0
            done.touch()
    return workdir


def metrics_of(workdir):
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def state_of(workdir, stage, step):
    """[path, dtype, shape, checksum] of every array of a checkpoint, moments of the optimiser included."""
    with Checkpoints(workdir / stage / "checkpoints") as checkpoints:
        return checkpoints._payload(step)["leaves"]


def assert_same_results(workdir, other):
    """Bit for bit: answers, features, checkpoints, drafters; and the metrics of every step once, with equal numbers."""
    for stage in ("supervised", "ppow"):
        last = max(int(path.name) for path in (other / stage / "checkpoints").iterdir() if path.name.isdigit())
        assert state_of(workdir, stage, last) == state_of(other, stage, last)
    for part in ("answers", "drafter_supervised", "drafter", "features"):
        for path in (other / part).iterdir():
            if path.name != "README.md":  # it quotes speeds
                assert (workdir / part / path.name).read_bytes() == path.read_bytes(), path
        assert {path.name for path in (workdir / part).iterdir()} == {path.name for path in (other / part).iterdir()}

    def essence(directory):
        rows = read_metrics(directory / "metrics.jsonl")
        return sorted(json.dumps({k: v for k, v in row.items() if k not in VOLATILE}, sort_keys=True) for row in rows)

    assert essence(workdir) == essence(other)
