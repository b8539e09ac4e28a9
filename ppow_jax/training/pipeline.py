"""The training pipeline, stage by stage: data, supervised, ppow, evaluate, export. `run` reads from top to bottom."""

import dataclasses
import errno
import logging
from pathlib import Path

from ppow_jax import distributed, files, flags, sharding
from ppow_jax.data.conversations import check_hub_sources
from ppow_jax.data.templates import with_date
from ppow_jax.errors import UserError
from ppow_jax.evaluation.benchmarks import Benchmark, draw, load_benchmark
from ppow_jax.evaluation.dialogues import require_known_texts, short_enough
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.models import precision
from ppow_jax.training.context import RunContext
from ppow_jax.training.results import evaluate_arms, export_arm, push_drafter
from ppow_jax.training.run.clock import Clock
from ppow_jax.training.run.metrics import MetricsWriter, NoMetrics, NonFiniteError
from ppow_jax.training.run.preemption import Stopped, StopSignal
from ppow_jax.training.run.sinks import check_sinks, open_sinks
from ppow_jax.training.run.space import check_space
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.stages import train_arms
from ppow_jax.training.start import find_start, keep_start, new_config
from ppow_jax.training.texts import collect_questions, collect_recorded, load_corpus
from ppow_jax.training.workdir import fix_date, hold_workdir, scratch_of
from ppow_jax.weights import hub, targets

log = logging.getLogger(__name__)


EXIT_NONFINITE = 3
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(settings: TrainSettings) -> int:
    """Runs the chosen stages, or resumes them; returns the exit code.

    0: all done. 130 and 143: stopped by SIGINT or SIGTERM; finished work is kept. 3: a number was not finite. Raises
    UserError for bad settings, data or files, before anything is compiled where possible, and for a full disk.
    """
    s = settings
    with distributed.connect(s.coordinator, s.num_processes, s.process_id, s.multihost), StopSignal() as stop:
        try:
            mesh = sharding.make_mesh(MeshShape.parse(s.mesh))
            s.check_rows(sharding.shape_of(mesh))
            with precision.use(precision.of_flag(s.precision, s.dtype)), sharding.use(mesh):
                s = fix_date(s)
                if s.push_to_hub is not None:
                    distributed.by_leader(lambda: hub.check_upload(settings.push_to_hub))
                with hold_workdir(s) as workdir:
                    _stages(s, workdir, stop)
        except Stopped:
            log.warning("stopped; the same command resumes from here")
            return stop.exit_code
        except NonFiniteError as error:
            log.error("error: %s", error)
            return EXIT_NONFINITE
        except OSError as error:
            if error.errno not in _FULL:
                raise
            place = f" ({error.filename})" if error.filename else ""
            rule = "what was finished is kept; free space, and run the same command again"
            raise UserError(f"--workdir={settings.workdir}: {error.strerror}{place}; {rule}") from error
    return 0


def _stages(settings: TrainSettings, workdir: Path, stop: StopSignal) -> None:
    distributed.wait("workdir")  # from here on only one process writes there
    leader, scratch = distributed.leader(), scratch_of(settings)
    check_sinks(settings)
    clock = Clock(workdir / "attempts.jsonl" if leader else None)
    for data in filter(None, (settings.data, settings.recorded)):
        check_hub_sources(data)  # what fails within a second is not told after all else was read
    benchmarks = _benchmarks(settings)
    target = targets.scanned(targets.load(settings.target, settings.dtype), settings.scan_layers)
    target = dataclasses.replace(target, tokenizer=with_date(target.tokenizer, settings.date))
    require_known_texts(target, benchmarks)
    start = find_start(settings, workdir, target)
    questions = collect_questions(settings, target)
    recorded = collect_recorded(settings, target, questions)
    benchmarks = [short_enough(target, benchmark, settings.max_prompt_tokens) for benchmark in benchmarks]
    benchmarks = [draw(benchmark, settings.num_prompts, settings.seed) for benchmark in benchmarks]
    config = start.config if start else new_config(settings, target)
    check_space(settings, workdir, config, target, questions, scratch)
    if stop.requested:
        raise Stopped
    # only now: settings that fail do not claim a workdir
    distributed.by_leader(lambda: flags.write_flagfile(workdir / "flags.txt", settings))
    distributed.by_leader(lambda: files.clear_left_over(workdir))
    keep_start(start, workdir)
    with _metrics(settings, workdir, scratch) if leader else NoMetrics(workdir) as metrics:
        with clock.stage("answers"):
            corpus = load_corpus(settings, workdir, target, questions, recorded, stop)
        context = RunContext(settings, workdir, target, corpus, metrics, stop, clock, workdir, scratch)
        if set(settings.stages) <= {"data"}:
            return
        arms = train_arms(context, start)
        if "evaluate" in settings.stages:
            with clock.stage("evaluate"):
                evaluate_arms(context, arms, benchmarks)
        if "export" in settings.stages:
            best = "ppow" if "ppow" in arms else "supervised"
            with clock.stage("export"):
                export_arm(context, best, arms[best], "drafter")
                if settings.push_to_hub is not None:
                    distributed.by_leader(lambda: push_drafter(workdir / "drafter", settings.push_to_hub))


def _metrics(settings: TrainSettings, workdir: Path, scratch: Path | None) -> MetricsWriter:
    return MetricsWriter(workdir, sinks=open_sinks(settings, workdir, scratch), scratch=scratch)


def _benchmarks(settings: TrainSettings) -> list[Benchmark]:
    if "evaluate" not in settings.stages:
        return []
    names = settings.benchmarks
    flags.require(bool(names), "--benchmarks: must name one at least, for --stages=evaluate")
    return [load_benchmark(name, None, settings.seed, settings.benchmark_dir) for name in names]
