"""The main job, stage by stage: data, supervised, ppow, evaluate, export. `run` reads from top to bottom."""

import logging

from ppow_jax import config as config_lib
from ppow_jax.evaluation.benchmarks import Benchmark, load_benchmark
from ppow_jax.training.context import Context, Stopped
from ppow_jax.training.corpus import collect_jobs, load_batches
from ppow_jax.training.metrics import MetricsWriter
from ppow_jax.training.preemption import StopSignal
from ppow_jax.training.results import evaluate_arms, export_arm
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.stages import train_arms
from ppow_jax.training.start import find_start, keep_start
from ppow_jax.training.workdir import open_workdir
from ppow_jax.weights import targets

log = logging.getLogger(__name__)


def run(settings: TrainSettings) -> int:
    """Runs the chosen stages, or goes on with them; returns the exit code.

    Raises UserError for bad settings, data or files, before anything is compiled where that can be known.
    """
    workdir = open_workdir(settings)
    benchmarks = _benchmarks(settings)
    target = targets.load(settings.target, settings.dtype)
    start = find_start(settings, workdir, target)
    jobs = collect_jobs(settings, target)
    config_lib.write_flagfile(workdir / "flags.txt", settings)  # only now: settings that fail bind no workdir
    keep_start(start, workdir)
    with StopSignal() as stop, MetricsWriter(workdir) as metrics:
        try:
            train, held_out = load_batches(settings, workdir, target, jobs, stop)
            context = Context(settings, workdir, target, train, held_out, metrics, stop)
            if set(settings.stages) <= {"data"}:
                return 0
            arms = train_arms(context, start)
            if "evaluate" in settings.stages:
                evaluate_arms(context, arms, benchmarks)
            if "export" in settings.stages:
                best = "ppow" if "ppow" in arms else "supervised"
                export_arm(context, best, arms[best], "drafter")
        except Stopped:
            log.warning("stopped; the same command goes on from here")
            return stop.exit_code
    return 0


def _benchmarks(settings: TrainSettings) -> list[Benchmark]:
    if "evaluate" not in settings.stages:
        return []
    names = settings.benchmarks
    config_lib.require(bool(names), "--benchmarks: must name one at least, for --stages=evaluate")
    return [load_benchmark(name, settings.num_prompts, settings.seed, settings.benchmark_dir) for name in names]
