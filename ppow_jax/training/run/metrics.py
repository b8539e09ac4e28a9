"""Metrics of a run: exact means, and one JSON line per step that survives kills and resumes; sinks get copies."""

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.files import at, open_directory, write_atomic
from ppow_jax.training.run.sinks import Sink

_RESERVED = ("step", "stage", "time")

# Metrics that depend on the clock, the memory and earlier attempts: they differ between otherwise equal runs.
VOLATILE = ("time", "seconds", "data_seconds", "compile_seconds", "memory_bytes", "goodput")


class NonFiniteError(RuntimeError):
    """A loss, gradient or other metric became nan or infinite."""


class Mean(NamedTuple):
    """A mean as sum and weight (number of values), both scalars: parts add up exactly."""

    total: jax.Array | float
    weight: jax.Array | float

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> "Mean":
        """The mean of `values` where `mask` (same shape) is true; values outside the mask are ignored."""
        if mask is None:
            return cls(jnp.sum(values, dtype=jnp.float32), jnp.float32(values.size))
        mask = mask.astype(bool)
        return cls(jnp.sum(jnp.where(mask, values, 0), dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32))

    def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> jax.Array:
        """The mean; 0 where nothing was counted."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


def to_python(value: Any) -> Any:
    """A metric (Mean, array of any shape, number) as float, int, text or nested lists of them."""
    if isinstance(value, Mean):
        value = value.value
    return value if isinstance(value, str) or value is None else np.asarray(value).tolist()


def require_finite(step: int, metrics: Mapping[str, Any]) -> None:
    """Raises NonFiniteError that names the step and every metric that is nan or infinite."""
    bad = [
        f"{name} is {value}"
        for name, value in ((name, to_python(value)) for name, value in metrics.items())
        if not (isinstance(value, str) or value is None or np.all(np.isfinite(value)))
    ]
    if bad:
        raise NonFiniteError(f"step {step}: {', '.join(bad)}")


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl, each line whole when `write` returns.

    A row is `{"step": 10, "stage": "ppow", "time": 1750000000.0, "loss": 0.5, ...}`, where time is in seconds
    since 1970. Numbers that JSON lacks are written as "nan", "inf", "-inf"; `read_metrics` turns them back.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        name: str = "metrics.jsonl",
        sinks: Sequence[Sink] = (),
        scratch: pathlib.Path | None = None,
    ):
        """Opens the file; an incomplete line that a kill left at its end is cut off. sinks: get every row, too.

        scratch: for a workdir in a bucket, whose objects cannot grow: rows are appended to a copy of the file there,
        which replaces the object at every `sync`.

        Raises:
          UserError: the directory cannot be written to.
        """
        self.path = open_directory(workdir) / name
        self._written = self.path if scratch is None else scratch / name
        if scratch is not None:
            self._written.write_bytes(self.path.read_bytes() if self.path.exists() else b"")
        if self._written.exists():
            _cut_torn_line(self._written)
        self._file = open(self._written, "a", buffering=1, encoding="utf-8")
        self._sinks = tuple(sinks)

    def resume(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Drops the rows of `stage` past `step`, which a run resumed from there writes again; returns its others."""
        rows = _rows(self._written)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            self._file.close()
            write_atomic(self._written, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = open(self._written, "a", buffering=1, encoding="utf-8")
        written = max((row["step"] for row in rows if row["stage"] == stage), default=step)
        for sink in self._sinks:
            sink.resume(stage, step, max(step, written))
        return [row for row in kept if row["stage"] == stage]

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Appends one row; `metrics` maps names to what `to_python` takes."""
        if clash := set(metrics) & set(_RESERVED):
            raise ValueError(f"metrics may not be named {sorted(clash)}")
        row = {"step": int(step), "stage": stage, "time": round(time.time(), 3)}
        values = {name: to_python(value) for name, value in metrics.items()}
        self._file.write(json.dumps(row | {name: _encode(v) for name, v in values.items()}, allow_nan=False) + "\n")
        for sink in self._sinks:
            sink.write(step, stage, values)

    def sync(self) -> None:
        """Blocks until every row is on disk: a checkpoint is never newer than the metrics of its steps."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._written != self.path:
            write_atomic(self.path, self._written.read_bytes())
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Closes the file and all sinks."""
        if self._written != self.path:
            self.sync()
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoMetrics(MetricsWriter):
    """No-op writer for non-leader processes; it can still read existing rows."""

    def __init__(self, workdir: str | os.PathLike, name: str = "metrics.jsonl"):
        self.path = at(workdir) / name

    def resume(self, stage: str, step: int) -> list[dict[str, Any]]:
        """The rows of `stage` up to `step`."""
        rows = _rows(self.path) if self.path.exists() else []
        return [row for row in rows if row["stage"] == stage and row["step"] <= step]

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; an incomplete last line is ignored."""
    return [{name: _decode(value) for name, value in row.items()} for row in _rows(at(path))]


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _cut_torn_line(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _encode(value: Any) -> Any:
    if isinstance(value, list):
        return [_encode(part) for part in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(part) for part in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
