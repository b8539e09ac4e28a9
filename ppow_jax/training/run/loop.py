"""The training loop shared by both stages: resume, step, measure, save, stop."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ppow_jax import progress, sharding
from ppow_jax.compiling import seconds as compile_seconds
from ppow_jax.errors import UserError
from ppow_jax.training.run.checkpoint import Best, Checkpoints
from ppow_jax.training.run.clock import Clock, memory_bytes
from ppow_jax.training.run.metrics import MetricsWriter, NonFiniteError, require_finite
from ppow_jax.training.run.preemption import StopSignal
from ppow_jax.training.run.profile import Profile
from ppow_jax.training.steps.state import TrainState

log = logging.getLogger(__name__)
_SHOWN = ("loss", "tau_sim", "reward", "accepted_length")  # metrics shown beside the progress bar


@dataclasses.dataclass(frozen=True)
class Loop:
    """Definition of a stage for the training loop.

    data: index -> batch, on the host. step: (state, index, batch) -> (state, metrics), jitted inside. measure:
    parameters -> metrics, `score` of which selects the best checkpoint; with select="last" it is the last one.
    skip_nonfinite: maximum number of skipped non-finite updates, in the whole stage. position: index of the first batch
    in the data. about: settings and seed, stored with every checkpoint.
    """

    stage: str
    total: int
    data: Callable[[int], Any]
    step: Callable[[TrainState, int, Any], tuple[TrainState, dict[str, Any]]]
    measure: Callable[[dict], dict[str, Any]]
    score: str
    checkpoint_every: int
    evaluate_every: int
    select: str = ""
    skip_nonfinite: int = 0
    position: int = 0
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(
    loop: Loop,
    state: TrainState,
    directory: Path,
    metrics: MetricsWriter,
    stop: StopSignal,
    clock: Clock | None = None,
    profile: Profile | None = None,
) -> tuple[dict, bool]:
    """Runs a stage, or resumes it -> (the best parameters so far, whether the stage is complete).

    Checkpoints are stored in directory/checkpoints, the best by loop.score in directory/best. Metrics of a step are
    read after the next one was dispatched. Raises NonFiniteError, after the metrics were written and without touching
    the last good checkpoint, when one of them is not finite and no more updates may be skipped.
    """
    clock = clock or Clock()
    with Checkpoints(directory / "checkpoints") as checkpoints, Best(directory / "best") as best:
        stage = _Stage(loop, state, checkpoints, best, metrics, clock)
        stage.restore()
        if stage.done == 0:
            stage.measure()
        with progress.bar(loop.total, loop.stage, initial=stage.done) as bar, profile or Profile() as profile:
            stage.train(stop, profile, bar)
        if stage.done < loop.total:
            stage.save()
            checkpoints.wait()
            log.warning("%s: stopped; saved after step %d of %d", loop.stage, stage.done, loop.total)
        return stage.best_params(), stage.done == loop.total


class _Stage:
    """A stage in progress: its state, the number of steps done, and where both are stored."""

    def __init__(
        self,
        loop: Loop,
        state: TrainState,
        checkpoints: Checkpoints,
        best: Best,
        metrics: MetricsWriter,
        clock: Clock,
    ):
        self.loop, self.checkpoints, self.best, self.metrics, self.clock = loop, checkpoints, best, metrics, clock
        self.done = 0
        self.state = sharding.committed(state)  # like a restored one: a resumed run reuses the compiled programs
        self.abstract = sharding.like(self.state)

    def restore(self) -> None:
        """Continues from the latest checkpoint, if there is one, with the metrics of its steps."""
        loop, metrics = self.loop, self.metrics
        with self.clock.on("restore"):
            found = self.checkpoints.restore_latest(self.abstract)
        if found is not None:
            self.done, self.state, extra = found
            _check_position(loop, self.checkpoints.directory, self.done, extra)
            if self.done < loop.total:
                log.info("%s: resuming after step %d of %d", loop.stage, self.done, loop.total)
        rows = metrics.resume(loop.stage, self.done)
        self.clock.resume(loop.stage, rows)
        if len(rows) < self.done:
            log.warning("%s: %s has no metrics of %d finished steps", loop.stage, metrics.path, self.done - len(rows))
        metrics.resume(f"{loop.stage}_held_out", self.done or -1)  # step 0 is measured again

    def train(self, stop: StopSignal, profile: Profile, bar: Any) -> None:
        """Runs steps until the stage is complete or a signal stops it, measuring and saving in between."""
        loop = self.loop
        recorder = _Recorder(loop, self.metrics, self.clock, self.checkpoints, bar, int(self.state.skipped))
        while self.done < loop.total and not stop.requested:
            self._step(recorder, profile)
            for every, action in ((loop.evaluate_every, self.measure), (loop.checkpoint_every, self.save)):
                if self.done % every == 0 or self.done == loop.total:
                    recorder.flush()
                    action()
                    recorder.restart()
        recorder.flush()

    def _step(self, recorder: "_Recorder", profile: Profile) -> None:
        profile.before(self.done + 1)
        begin = time.perf_counter()
        batch = self.loop.data(self.done)
        data_seconds = time.perf_counter() - begin
        self.state, step_metrics = self.loop.step(self.state, self.done, batch)
        self.done += 1
        profile.after(self.done, step_metrics)
        recorder.add(self.done, step_metrics, data_seconds)

    def measure(self) -> None:
        """Measures the parameters, and keeps them if they are the best so far."""
        loop, clock = self.loop, self.clock
        with clock.on("measure"):
            measured = loop.measure(self.state.best_params)
        measured |= {"goodput": clock.goodput(), "memory_bytes": memory_bytes()}
        self.metrics.write(self.done, f"{loop.stage}_held_out", measured)
        score = measured[loop.score]
        log.info("%s: after step %d, %s on held-out answers is %.3f", loop.stage, self.done, loop.score, score)
        with clock.on("save"):
            self.checkpoints.wait()  # one save at a time per process: Orbax's barriers share one name
            score = self.done if loop.select == "last" else measured[loop.score]
            self.best.offer(self.done, score, self.state.best_params)

    def save(self) -> None:
        """Saves a checkpoint, after all metrics up to it."""
        self.metrics.sync()
        about = {"position": self.loop.position + self.done, "about": dict(self.loop.about)}
        with self.clock.on("save"):
            self.checkpoints.save(self.done, self.state, about)

    def best_params(self) -> dict:
        """The parameters of the best checkpoint."""
        with self.clock.on("restore"):
            self.checkpoints.wait()
            _, params, _ = self.best.restore(self.abstract.params)
        log.info("%s: finished; the checkpoint of step %d is used", self.loop.stage, self.best.step)
        return params


def _check_position(loop: Loop, directory: Path, done: int, extra: Mapping[str, Any]) -> None:
    """Raises if a checkpoint was made on other batches: it would silently resume at a wrong position in the data."""
    position = extra.get("position", loop.position + done)
    if position != loop.position + done:
        place = directory / str(done)
        rule = "bring the directories of the other stages back, or remove this one"
        raise UserError(f"{place}: ends at batch {position}, but would go on at {loop.position + done}; {rule}")


class _Recorder:
    """Writes the metrics of each step once the next one was dispatched, so that the device never waits for them."""

    def __init__(
        self, loop: Loop, metrics: MetricsWriter, clock: Clock, checkpoints: Checkpoints, bar, skipped: int
    ):
        self.loop, self.metrics, self.clock, self.checkpoints, self.bar = loop, metrics, clock, checkpoints, bar
        self.skipped = skipped
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.restart()

    def restart(self) -> None:
        """Excludes the time until now, such as saving, from the next step's time."""
        self.since, self.compiled = time.perf_counter(), compile_seconds()

    def add(self, step: int, values: dict[str, Any], data_seconds: float) -> None:
        self.flush()
        self.pending = (step, values | {"data_seconds": data_seconds})

    def flush(self) -> None:
        """Writes pending metrics; then raises NonFiniteError if they hold a value that is not finite."""
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        values = jax.device_get(values)
        seconds, compiled = time.perf_counter() - self.since, compile_seconds() - self.compiled
        self.restart()
        clocked = {"seconds": seconds, "compile_seconds": compiled, "memory_bytes": memory_bytes()}
        self.metrics.write(step, self.loop.stage, values | clocked)
        self.clock.step(self.loop.stage, seconds, compiled, values["data_seconds"])
        self._check_finite(step, values)
        shown = {k: f"{float(values[k]):.3f}" for k in _SHOWN if k in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)

    def _check_finite(self, step: int, values: dict[str, Any]) -> None:
        """Accepts a skipped update as long as --skip_nonfinite allows it."""
        before, self.skipped = self.skipped, int(values.get("skipped", self.skipped))
        try:
            require_finite(step, values)
        except NonFiniteError as error:
            allowed = self.loop.skip_nonfinite
            if before < self.skipped <= allowed:
                log.warning("%s: %s; update skipped (%d of %d)", self.loop.stage, error, self.skipped, allowed)
                return
            steps = self.checkpoints.steps
            good = f"is {self.checkpoints.directory / str(steps[-1])}" if steps else "is none: it was the first steps"
            after = f" after {allowed} skipped updates (--skip_nonfinite)" if allowed else ""
            message = f"{self.loop.stage}: {error}{after}; the last good checkpoint {good}"
            raise NonFiniteError(message) from None
