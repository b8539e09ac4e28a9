"""The metrics as TensorBoard events, beside metrics.jsonl."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax.errors import UserError


def require_tensorboard() -> Any:
    """The class `tensorboardX.SummaryWriter`; raises UserError if it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        rule = "needs the package tensorboardX: pip install 'ppow_jax[tensorboard]'"
        raise UserError(f"--tensorboard: {rule}") from None
    return SummaryWriter


class TensorBoard:
    """One folder of events per stage. Steps that a resumed run repeats are purged from TensorBoard's display."""

    def __init__(self, directory: str | os.PathLike):
        """Raises UserError if the writer is not installed."""
        self._directory, self._make = Path(directory), require_tensorboard()
        self._writers: dict[str, Any] = {}

    def resume(self, stage: str, step: int, written: int) -> None:
        """Continues the stage after `step`: events written past it are discarded."""
        if stage in self._writers:
            self._writers.pop(stage).close()
        purge = step + 1 if (self._directory / stage).exists() else None
        suffix = f".{time.time_ns()}"  # the writer's own names are equal within one second
        self._writers[stage] = self._make(str(self._directory / stage), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Numbers as scalars, lists as one scalar per element (`name/1`, ...); None and texts are left out."""
        if stage not in self._writers:
            self.resume(stage, step - 1, step - 1)
        writer = self._writers[stage]
        for name, value in metrics.items():
            if value is None or isinstance(value, str):
                continue
            values = np.asarray(value, np.float64)
            if values.ndim == 0:
                writer.add_scalar(name, float(values), step)
            else:
                for i, part in enumerate(values.reshape(-1).tolist(), 1):
                    writer.add_scalar(f"{name}/{i}", part, step)

    def flush(self) -> None:
        """Flushes all events to disk."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Flushes and closes all writers."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
