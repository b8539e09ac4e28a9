"""Time accounting of a run over all its attempts, and its goodput.

An attempt is one process that worked on the run. Goodput is the time of training steps that count, without compilation,
as a share of all the time from the start of an attempt to its end that was not spent on answers, features, measuring or
export. Steps lost to a kill, restarts, compilation, saving and simulated acceptance reduce it below 1. The
time between two attempts is not included.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ppow_jax import files
from ppow_jax.compiling import seconds as compile_seconds

BEAT_SECONDS = 10.0  # the end of a killed attempt is known to this precision
START = "start"  # first stage of an attempt: reading the target, the prompts, the settings
_ASIDE = ("answers", "features", "evaluate", "export")  # stages without training steps

Stages = dict[str, dict[str, float]]  # seconds by stage and kind


class Clock:
    """Seconds of this attempt by stage and kind ("wall", "step", "compile", "save", ...), and of earlier attempts.

    path: the ledger, a JSON line per heartbeat with the sums of an attempt so far; None keeps no ledger. In a bucket,
    whose objects cannot grow, it is replaced at every heartbeat, with one line per attempt.
    """

    def __init__(self, path: Path | None = None):
        self._path, self._attempt = path, f"{time.time():.3f}-{os.getpid()}"
        self._before = read_attempts(path) if path else []
        self._ledger = path.read_text() if path and files.is_remote(path) and path.exists() else ""
        self._seconds: Stages = {}
        self._worth: dict[str, float] = {}
        self._stage, self._since = START, time.perf_counter()
        self._beat = self._since
        compile_seconds()  # starts counting compilation

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Assigns the time spent inside to this stage."""
        outer = self._stage
        self._enter(name)
        self.beat(now=True)
        try:
            yield
        finally:
            self._enter(outer)
            self.beat(now=True)

    def _enter(self, name: str) -> None:
        now = time.perf_counter()
        self.add("wall", now - self._since)
        self._stage, self._since = name, now

    def add(self, kind: str, seconds: float) -> None:
        """Adds seconds to the current stage."""
        kinds = self._seconds.setdefault(self._stage, defaultdict(float))
        kinds[kind] += seconds

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Counts the time spent inside; compilation within it is counted separately."""
        begin, compiled = time.perf_counter(), compile_seconds()
        try:
            yield
        finally:
            compiled = compile_seconds() - compiled
            self.add("compile", compiled)
            self.add(kind, time.perf_counter() - begin - compiled)

    def resume(self, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Reads the steps that count from the metrics that a stage resumes from."""
        self._worth[stage] = sum(row.get("seconds", 0.0) - row.get("compile_seconds", 0.0) for row in rows)

    def step(self, stage: str, seconds: float, compiled: float, data: float) -> None:
        """Counts a training step; `compiled` of its seconds were compilation, `data` the making of its batch."""
        self.add("compile", compiled)
        self.add("data", data)
        self.add("step", seconds - compiled - data)
        self._worth[stage] = self._worth.get(stage, 0.0) + seconds - compiled
        self.beat()

    def goodput(self) -> float:
        """Goodput as defined in the module; nan where nothing was trained."""
        wall = sum(stages[name]["wall"] for stages in self.attempts() for name in stages if name not in _ASIDE)
        return sum(self._worth.values()) / wall if self._worth and wall > 0 else float("nan")

    def attempts(self) -> list[Stages]:
        """Seconds by stage and kind of each attempt, this one last."""
        self._enter(self._stage)
        return [*self._before, self._seconds]

    def summary(self) -> dict[str, Any]:
        """Summary for reports: number of attempts, seconds by stage and kind, goodput."""
        total: Stages = {}
        for stages in self.attempts():
            for name, kinds in stages.items():
                sums = total.setdefault(name, defaultdict(float))
                for kind, seconds in kinds.items():
                    sums[kind] += seconds
        return {
            "attempts": len(self._before) + 1,
            "goodput": self.goodput(),
            "seconds": {name: {kind: round(s, 2) for kind, s in kinds.items()} for name, kinds in total.items()},
        }

    def beat(self, now: bool = False) -> None:
        """Writes the sums so far, every few seconds or at once."""
        moment = time.perf_counter()
        if self._path and (now or moment - self._beat > BEAT_SECONDS):
            self._beat = moment
            line = json.dumps({"attempt": self._attempt, "time": time.time(), "stages": self.attempts()[-1]})
            if files.is_remote(self._path):
                files.write_atomic(self._path, f"{self._ledger}{line}\n")
                return
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def read_attempts(path: Path) -> list[Stages]:
    """The last complete line of every attempt in a ledger."""
    found: dict[str, Stages] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            beat = json.loads(line)
        except ValueError:  # an incomplete line, left by a kill
            continue
        found[beat["attempt"]] = beat["stages"]
    return list(found.values())


def memory_bytes() -> int:
    """Peak memory so far: of the first device if it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
