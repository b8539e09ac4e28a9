"""Profiler traces of chosen steps, and the time of each part of a step in them.

A step is one fused program, whose parts a clock on the host cannot measure. The trace can: it holds the time of every
XLA operation, and the compiled program records the `jax.named_scope` of the step ("target", "rollouts", "gradient",
"update") in which an operation was written. A fusion over two scopes is assigned to that of its last operation.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.extend.backend import get_backend

from ppow_jax import files

log = logging.getLogger(__name__)

_STEP = "jit_train_step"  # XLA's name of the program of either stage
PARTS = ("target", "rollouts", "gradient", "update")
_PART = re.compile(r"\b(" + "|".join(PARTS) + r")\b")


class Profile:
    """Traces steps first to last of a stage into a directory (see TensorBoard's profile page, or Perfetto)."""

    def __init__(self, directory: Path | None = None, first: int = 0, last: int = 0):
        """directory: None disables tracing."""
        self._directory, self._first, self._last = directory, first, last
        self._begun: int | None = None

    def before(self, step: int) -> None:
        """Starts the trace if due; call it before step `step` (the first is 1) is dispatched."""
        if self._directory and self._begun is None and self._first <= step <= self._last:
            jax.profiler.start_trace(files.writable_directory(self._directory))
            self._begun = step

    def after(self, step: int, results: Any) -> None:
        """Stops the trace if due, after waiting for the step's results; call it after the step was dispatched."""
        if self._begun is not None and step >= self._last:
            jax.block_until_ready(results)
            self._stop(step - self._begun + 1)

    def _stop(self, steps: int) -> None:
        directory = self._directory
        self._directory, self._begun = None, None  # one trace per stage
        jax.profiler.stop_trace()
        parts = {part: seconds / steps for part, seconds in seconds_by_part(directory).items()}
        files.write_atomic(directory / "parts.json", json.dumps({"steps": steps, "seconds": parts}))
        shown = ", ".join(f"{part} {seconds:.4f} s" for part, seconds in parts.items())
        log.info("profile of %d steps in %s; operations of a step: %s", steps, directory, shown or "not in the trace")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun is not None:  # the stage ended within the chosen steps
            self._begun, self._directory = None, None
            jax.profiler.stop_trace()


def seconds_by_part(directory: Path) -> dict[str, float]:
    """Seconds of the operations of each part in the newest trace below a directory; of one device, "other" last.

    Empty where the trace holds no operations. On a CPU, operations that ran concurrently count twice.
    """
    traces = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return {}
    lines = [
        [
            (event.start_ns, event.duration_ns, stats["hlo_op"])
            for event in line.events
            if "hlo_op" in (stats := dict(event.stats)) and stats.get("hlo_module", "").startswith(_STEP)
        ]
        for plane in _first_device(jax.profiler.ProfileData.from_file(str(traces[-1])).planes)
        for line in plane.lines
    ]
    part_of = _parts_of_operations({operation for events in lines for *_, operation in events})
    total: defaultdict[str, float] = defaultdict(float)
    for events in lines:
        for operation, nanoseconds in own_time(events).items():
            total[part_of.get(operation, "other")] += nanoseconds
    return {part: total[part] / 1e9 for part in (*PARTS, "other") if part in total}


def _first_device(planes: Iterable[Any]) -> list[Any]:
    planes = list(planes)
    devices = sorted((p for p in planes if p.name.startswith("/device:")), key=lambda p: p.name)
    return devices[:1] or [p for p in planes if p.name == "/host:CPU"]


def own_time(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Time by name of (start, duration, name) events. The events of a loop's body are subtracted from its own."""
    total: defaultdict[str, float] = defaultdict(float)
    open_: list[tuple[float, str]] = []  # (end, name) of the events that enclose the next one
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            total[open_[-1][1]] -= duration
        total[name] += duration
        open_.append((start + duration, name))
    return dict(total)


def _parts_of_operations(seen: set[str]) -> dict[str, str]:
    """Operation -> part, for the training step on the device that has most of the operations seen."""
    texts = [
        module.to_string()
        for executable in get_backend().live_executables()
        for module in executable.hlo_modules()
        if module.name.startswith(_STEP)
    ]
    return max((parts_of_text(text) for text in texts), key=lambda part_of: len(seen & set(part_of)), default={})


_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')


def parts_of_text(text: str) -> dict[str, str]:
    """Operation -> part, or "other", read from the text of a compiled program.

    An operation that XLA created without a scope, such as a fusion, gets that of the last operation in what it calls.
    """
    part_of: dict[str, str] = {}
    root_part: dict[str, str] = {}
    callee: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        elif found := _OPERATION.match(line):
            name = _NAME.search(line)
            part = _PART.search(name[1]) if name else None
            part_of[found[2]] = "other"
            if part:
                part_of[found[2]] = part[1]
                if found[1] or computation not in root_part:
                    root_part[computation] = part[1]
            elif called := _CALLS.search(line):
                callee[found[2]] = called[1]
    part_of |= {operation: root_part[called] for operation, called in callee.items() if called in root_part}
    return part_of
