"""Services that get a copy of the metrics: TensorBoard and Weights & Biases, each behind a flag."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ppow_jax.training.run.tensorboard import TensorBoard, require_tensorboard
from ppow_jax.training.run.weights_and_biases import WeightsAndBiases, require_wandb
from ppow_jax.training.settings import TrainSettings


class Sink(Protocol):
    """Receiver of the rows of `metrics.MetricsWriter`, which calls all of these methods."""

    def resume(self, stage: str, step: int, written: int) -> None:
        """Continues the stage after `step`; steps up to `written` were written before, and will be written again."""

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Adds a row; values are numbers, texts, None, or nested lists of numbers."""

    def flush(self) -> None:
        """Writes what is buffered."""

    def close(self) -> None:
        """Flushes, and ends the connection or closes the files."""


def check_sinks(settings: TrainSettings) -> None:
    """Raises UserError if a chosen service's package is not installed; nothing is written or sent yet."""
    if settings.tensorboard:
        require_tensorboard()
    if settings.wandb:
        require_wandb()


def open_sinks(settings: TrainSettings, workdir: str | os.PathLike, scratch: Path | None = None) -> list[Sink]:
    """The services that the flags choose, for a run in `workdir`. scratch: for their files, instead of the workdir.

    Raises:
      UserError: a package is not installed, or Weights & Biases refuses the run.
    """
    check_sinks(settings)
    sinks: list[Sink] = []
    if settings.tensorboard:
        sinks.append(TensorBoard(Path(scratch or workdir) / "tensorboard"))
    if settings.wandb:
        sinks.append(WeightsAndBiases(workdir, settings, scratch))
    return sinks
