"""The training loop that both stages share: resume, step, measure, save, stop."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ppow_jax import progress
from ppow_jax.training.checkpoint import Best, Checkpoints
from ppow_jax.training.metrics import MetricsWriter, NonFiniteError, require_finite
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.supervised import TrainState

log = logging.getLogger(__name__)
_SHOWN = ("loss", "tau_sim", "reward", "accepted_length")  # beside the progress bar


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a stage is made of.

    step: (state, index) -> (state, metrics), jitted inside. measure: parameters -> metrics, `score` of which chooses
    the best checkpoint.
    """

    stage: str
    total: int
    step: Callable[[TrainState, int], tuple[TrainState, dict[str, Any]]]
    measure: Callable[[dict], dict[str, Any]]
    score: str
    checkpoint_every: int
    evaluate_every: int


def run(loop: Loop, state: TrainState, directory: Path, metrics: MetricsWriter, stop: StopSignal) -> tuple[dict, bool]:
    """Runs a stage, or goes on with it -> (the best parameters so far, whether the stage is complete).

    Checkpoints lie in directory/checkpoints, the best by loop.score in directory/best. Metrics of a step are read
    after the next one was dispatched. Raises NonFiniteError, after the metrics were written and without touching the
    last good checkpoint, when one of them is not finite.
    """
    with Checkpoints(directory / "checkpoints") as checkpoints, Best(directory / "best") as best:
        done = 0
        abstract = jax.eval_shape(lambda: state)
        if (found := checkpoints.restore_latest(abstract)) is not None:
            done, state, _ = found
            if done < loop.total:
                log.info("%s: going on after step %d of %d", loop.stage, done, loop.total)
        metrics.resume(loop.stage, done)
        metrics.resume(f"{loop.stage}_held_out", done or -1)  # step 0 is measured again
        if done == 0:
            _offer(loop, best, metrics, 0, state)
        with progress.bar(loop.total, loop.stage, initial=done) as bar:
            recorder = _Recorder(loop, metrics, bar)
            while done < loop.total and not stop.requested:
                state, step_metrics = loop.step(state, done)
                done += 1
                recorder.add(done, step_metrics)
                if done % loop.evaluate_every == 0 or done == loop.total:
                    recorder.flush()
                    _offer(loop, best, metrics, done, state)
                if done % loop.checkpoint_every == 0 or done == loop.total:
                    recorder.flush()
                    checkpoints.save(done, state)
            recorder.flush()
        if done < loop.total:
            checkpoints.save(done, state)
            log.warning("%s: saved after step %d of %d", loop.stage, done, loop.total)
        _, params, _ = best.restore(abstract.params)
        log.info("%s: best %s %.3f at step %d", loop.stage, loop.score, best.score, best.step)
        return params, done == loop.total


class _Recorder:
    """Writes the metrics of each step once the next one was dispatched, so that the device never waits for them."""

    def __init__(self, loop: Loop, metrics: MetricsWriter, bar):
        self.loop, self.metrics, self.bar = loop, metrics, bar
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.clock = time.perf_counter()

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.flush()
        self.pending = (step, values)

    def flush(self) -> None:
        """Writes what is pending; raises NonFiniteError after that if it holds a value that is not finite."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        values = jax.device_get(values)
        now = time.perf_counter()
        self.metrics.write(step, self.loop.stage, values | {"seconds": now - self.clock})
        self.clock = now
        try:
            require_finite(step, values)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.loop.stage}: {error}; the last good checkpoint is kept") from None
        shown = {k: f"{float(values[k]):.3f}" for k in _SHOWN if k in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)


def _offer(loop: Loop, best: Best, metrics: MetricsWriter, step: int, state: TrainState) -> None:
    measured = loop.measure(state.params)
    metrics.write(step, f"{loop.stage}_held_out", measured)
    log.info("%s: step %d, %s %.3f", loop.stage, step, loop.score, measured[loop.score])
    best.offer(step, measured[loop.score], state.params)
