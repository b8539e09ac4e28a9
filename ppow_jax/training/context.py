"""What every stage of a run is given."""

import dataclasses
from pathlib import Path

from ppow_jax.training.clock import Clock
from ppow_jax.training.corpus import Corpus
from ppow_jax.training.metrics import MetricsWriter
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights.targets import Target


@dataclasses.dataclass(frozen=True)
class Context:
    """Settings, directory, models and data of a run, the place of its metrics, and the signal that ends it.

    shared: directory of what runs on the same answers share: the target's features, and measured costs.
    """

    settings: TrainSettings
    workdir: Path
    target: Target
    corpus: Corpus
    metrics: MetricsWriter
    stop: StopSignal
    clock: Clock
    shared: Path

    @property
    def greedy_text(self) -> bool:
        """Whether every answer is the target's own at temperature 0."""
        return self.settings.answer_temperature == 0 and not self.settings.recorded

    @property
    def mixed(self) -> bool:
        """Whether the drafter's products are computed in bfloat16."""
        return self.settings.dtype == "bfloat16"
