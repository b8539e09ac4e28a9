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


def run(
    loop: Loop, state: TrainState, directory: Path, metrics: MetricsWriter, stop: StopSignal
) -> tuple[dict, bool]:
    """Runs a stage, or goes on with it -> (the best parameters so far, whether the stage is complete).

    Checkpoints lie in directory/checkpoints, the best by loop.score in directory/best. Metrics of a step are read
    after the next one was dispatched. Raises NonFiniteError, after the metrics were written and without touching the
    last good checkpoint, when one of them is not finite.
    """
    with Checkpoints(directory / "checkpoints") as checkpoints, Best(directory / "best") as best:
        first = 0
        abstract = jax.eval_shape(lambda: state)
        if (found := checkpoints.restore_latest(abstract)) is not None:
            first, state, _ = found
            if first < loop.total:
                log.info("%s: going on after step %d of %d", loop.stage, first, loop.total)
        metrics.resume(loop.stage, first)
        if first == 0:
            _offer(loop, best, metrics, 0, state)
        pending = None
        with progress.bar(loop.total, loop.stage, initial=first) as bar:
            for index in range(first, loop.total):
                if stop.requested:
                    break
                began = time.perf_counter()
                state, step_metrics = loop.step(state, index)
                pending, last = (index + 1, step_metrics, began), pending
                _record(loop, metrics, bar, last)
                done = index + 1
                if done % loop.evaluate_every == 0 or done == loop.total:
                    _record(loop, metrics, bar, pending)
                    pending = None
                    _offer(loop, best, metrics, done, state)
                if done % loop.checkpoint_every == 0 or done == loop.total:
                    _record(loop, metrics, bar, pending)
                    pending = None
                    checkpoints.save(done, state)
            else:
                index = loop.total - 1
            _record(loop, metrics, bar, pending)
        if stop.requested and first < loop.total:
            done = int(state.step)
            checkpoints.save(done, state)
            log.warning("%s: saved after step %d of %d", loop.stage, done, loop.total)
        complete = int(state.step) >= loop.total
        restored = best.restore(abstract.params)
        log.info("%s: best %s %.3f at step %d", loop.stage, loop.score, best.score, best.step)
        return restored[1], complete


def _record(loop: Loop, metrics: MetricsWriter, bar, entry) -> None:
    if entry is None:
        return
    step, values, began = entry
    values = jax.device_get(values)
    seconds = time.perf_counter() - began
    metrics.write(step, loop.stage, values | {"seconds": seconds})
    try:
        require_finite(step, values)
    except NonFiniteError as error:
        raise NonFiniteError(f"{loop.stage}: {error}; the last good checkpoint is kept") from None
    shown = {
        k: f"{float(values[k]):.3f}" for k in ("loss", "tau_sim", "reward", "accepted_length") if k in values
    }
    bar.set_postfix(shown, refresh=False)
    bar.update(1)


def _offer(loop: Loop, best: Best, metrics: MetricsWriter, step: int, state: TrainState) -> None:
    measured = loop.measure(state.params)
    metrics.write(step, f"{loop.stage}_held_out", measured)
    log.info("%s: step %d, held-out %s %.3f", loop.stage, step, loop.score, measured[loop.score])
    best.offer(step, measured[loop.score], state.params)
