"""Context shared by all stages of a run."""

import dataclasses
from pathlib import Path

from ppow_jax.training.run.clock import Clock
from ppow_jax.training.run.metrics import MetricsWriter
from ppow_jax.training.run.preemption import StopSignal
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.texts import Corpus
from ppow_jax.weights.targets import Target


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Settings, directory, models and data of a run, its metrics writer, and the signal that stops it.

    shared: directory of files shared by runs on the same answers: the target's features, and measured costs.
    scratch: this process's own directory for features and traces, if the others are in a bucket.
    """

    settings: TrainSettings
    workdir: Path
    target: Target
    corpus: Corpus
    metrics: MetricsWriter
    stop: StopSignal
    clock: Clock
    shared: Path
    scratch: Path | None = None

    @property
    def answers_are_greedy(self) -> bool:
        """True if every answer is the target's own at temperature 0."""
        return self.settings.answer_temperature == 0 and not self.settings.recorded

    @property
    def compute_dtype(self) -> str | None:
        """Dtype of the products with the drafter's float32 parameters; None: float32."""
        return "bfloat16" if self.settings.dtype == "bfloat16" else None
