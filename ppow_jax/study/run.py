"""Runs a study, arm by arm: train, replay on answers that no choice depended on, compare. Resumable after every arm."""

import dataclasses
import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppow_jax import files, flags, sharding
from ppow_jax.corpus.answers import Question
from ppow_jax.corpus.features import FeatureStore
from ppow_jax.data.templates import with_date
from ppow_jax.evaluation import measure
from ppow_jax.evaluation.benchmarks import load_benchmark
from ppow_jax.models.drafter import Drafter, cast
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import of_mode
from ppow_jax.study import results
from ppow_jax.study.arms import Arm, find_arm, settings_of
from ppow_jax.study.settings import StudySettings
from ppow_jax.training.context import RunContext
from ppow_jax.training.replays import feature_store, measured_cost_table, replay_modes
from ppow_jax.training.run.checkpoint import Best
from ppow_jax.training.run.clock import Clock
from ppow_jax.training.run.metrics import MetricsWriter, NoMetrics
from ppow_jax.training.run.preemption import Stopped, StopSignal
from ppow_jax.training.run.sinks import check_sinks, open_sinks
from ppow_jax.training.stages import train_stage_2
from ppow_jax.training.start import find_start, keep_start
from ppow_jax.training.texts import answer, batches_of, collect_questions, collect_recorded, load_corpus, read_questions
from ppow_jax.training.workdir import fix_date, hold_workdir
from ppow_jax.weights import targets

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Study:
    settings: StudySettings
    workdir: Path
    context: RunContext
    start: Drafter
    held_out: FeatureStore
    test: FeatureStore
    cost_table: CostTable


def run(settings: StudySettings) -> int:
    """Runs the missing parts of a study, and writes its results after every arm -> exit code."""
    settings = fix_date(settings)
    check_sinks(settings)
    with StopSignal() as stop, hold_workdir(settings) as workdir:
        try:
            study = _open(settings, workdir, stop)
            tuning = _tune(study)
            rates = {family: max(tried, key=lambda rate: tried[rate]) for family, tried in tuning.items()}
            for seed in settings.seeds:
                for arm in map(find_arm, settings.arms):
                    _measured(study, arm, seed, rates.get(arm.family), study.test, study.workdir)
                    _write(study, rates, tuning)
            _decode(study, rates)
            _write(study, rates, tuning)
        except Stopped:
            log.warning("stopped; the same command resumes here")
            return stop.exit_code
    print(results.summary_table(json.loads((workdir / "study.json").read_text())))
    print(f"\nstudy: {workdir}")
    return 0


def _open(settings: StudySettings, workdir: Path, stop: StopSignal) -> _Study:
    """Sets up what all arms share: reads the models, answers the prompts, stores features."""
    target = targets.scanned(targets.load(settings.target, settings.dtype), settings.scan_layers)
    target = dataclasses.replace(target, tokenizer=with_date(target.tokenizer, settings.date))
    start = find_start(settings, workdir, target)
    flags.require(start is not None, "--drafter: a study needs a drafter to start from")
    questions = collect_questions(settings, target)
    recorded = collect_recorded(settings, target, questions)
    tests = _more_tests(settings, target, questions)
    flags.write_flagfile(workdir / "flags.txt", settings)
    files.clear_left_over(workdir)
    keep_start(start, workdir)
    corpus = load_corpus(settings, workdir, target, questions, recorded, stop)
    if tests:
        answered = answer(settings, settings.test_data, workdir / "answers_test", target, tests, stop)
        corpus = corpus._replace(test=batches_of(settings, [*corpus.test.examples, *answered]))
    context = RunContext(settings, workdir, target, corpus, NoMetrics(workdir), stop, Clock(), workdir)

    layers = start.config.feature_layers
    held_out = feature_store(context, "features_held_out", corpus.held_out, layers)
    test = feature_store(context, "features_test", corpus.test, layers)
    speculations = [of_mode(mode, settings.window) for mode in settings.modes]
    cost_table = measured_cost_table(context, cast(start, settings.dtype), speculations)
    return _Study(settings, workdir, context, start, held_out, test, cost_table)


def _more_tests(settings: StudySettings, target: targets.Target, questions: Sequence[Question]) -> list[Question]:
    """The prompts of --test_data; raises UserError where there are too few, or one is among the other questions."""
    if not settings.test_data:
        return []
    number, given = settings.test_data_answers, f"--test_data={settings.test_data}"
    found = read_questions(settings, target, settings.test_data, number)
    rule = f"has {len(found)} prompts of at most {settings.max_prompt_tokens} tokens, but --test_data_answers={number}"
    flags.require(len(found) == number, f"{given}: {rule}")
    known = {question.prompt.tobytes() for question in questions}
    both = [question.source for question in found if question.prompt.tobytes() in known]
    flags.require(not both, f"{given}: {', '.join(both[:3])} are in --data, too; arms are compared on other prompts")
    return found


def _tune(study: _Study) -> dict[str, dict[float, float]]:
    """tau on the held-out answers by family of arms and learning rate, of --rates; the highest is used.

    tau is the mean over --modes, which is less noisy than that of one. One seed, of the first arm of a family.
    """
    s = study.settings
    if not s.rates:
        return {}
    tuning: dict[str, dict[float, float]] = {}
    for arm in map(find_arm, s.arms):
        if arm.stage is None or arm.family in tuning:
            continue
        tried = tuning[arm.family] = {}
        for rate in s.rates:
            found = _measured(study, arm, s.tuning_seed, rate, study.held_out, study.workdir / "tuning" / f"{rate:g}")
            tried[rate] = statistics.mean(results.tau(found, mode) for mode in s.modes)
        shown = ", ".join(f"{rate:g}: {tau:.3f}" for rate, tau in tried.items())
        log.info("%s: held-out tau by learning rate, mean over modes: %s", arm.family, shown)
    return tuning


def _measured(
    study: _Study, arm: Arm, seed: int, rate: float | None, answers: FeatureStore, parent: Path
) -> dict[str, Any]:
    """Replay counts of an arm on some answers; trained and replayed once, then read back."""
    if arm.stage is None and seed != study.settings.seeds[0]:  # the start has no seed
        return _measured(study, arm, study.settings.seeds[0], rate, answers, parent) | {"seed": seed}
    directory = results.arm_directory(parent, arm.name, seed)
    path = directory / "result.json"
    if path.exists():
        result = json.loads(path.read_text())
    else:
        log.info("%s, seed %d", arm.name, seed)
        begin = time.perf_counter()
        _trained(study, arm, seed, rate, directory)
        seconds = time.perf_counter() - begin
        result = {"arm": arm.name, "seed": seed, "rate": rate, "seconds": seconds, "replayed": {}}
        directory.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, json.dumps(result))
        shutil.rmtree(directory / (arm.stage or "none") / "checkpoints", ignore_errors=True)  # the best one stays
    missing = [mode for mode in study.settings.modes if mode not in result["replayed"]]
    if missing:
        drafter = _trained(study, arm, seed, rate, directory)  # restored
        found = replay_modes(study.context, drafter, missing, study.cost_table, answers)
        log.info("%s, seed %d: tau %s", arm.name, seed, {mode: round(x.tau, 3) for mode, x in found.items()})
        result["replayed"] |= {mode: results.counts(x) for mode, x in found.items()}
        files.write_atomic(path, json.dumps(result))
    return result


def _trained(study: _Study, arm: Arm, seed: int, rate: float | None, directory: Path) -> Drafter:
    if arm.stage is None:
        return study.start
    if (directory / "result.json").exists():
        with Best(directory / arm.stage / "best") as best:
            _, params, _ = best.restore(sharding.like(study.start.params))
        return study.start.replace(params=params)
    settings, corpus = settings_of(arm, study.settings, seed, rate), study.context.corpus
    directory.mkdir(parents=True, exist_ok=True)
    fresh = batches_of(settings, corpus.fresh.examples)  # in the order of the arm's seed
    with MetricsWriter(directory, sinks=open_sinks(settings, directory)) as metrics:
        context = dataclasses.replace(
            study.context,
            settings=settings,
            workdir=directory,
            corpus=corpus._replace(fresh=fresh),
            metrics=metrics,
            clock=Clock(),
        )
        return train_stage_2(context, study.start, arm.stage)


def _decode(study: _Study, rates: dict[str, float]) -> None:
    """Decodes the benchmarks with the drafters of the first seeds, arm by arm."""
    s, target = study.settings, study.context.target
    if not s.decode_seeds:
        return
    benchmarks = [load_benchmark(name, s.num_prompts, s.seed, s.benchmark_dir) for name in s.benchmarks]
    for seed, arm in ((seed, find_arm(name)) for seed in s.seeds[: s.decode_seeds] for name in s.arms):
        path = results.arm_directory(study.workdir, arm.name, seed) / "decoded.json"
        if path.exists():
            continue
        drafter = cast(_trained(study, arm, seed, rates.get(arm.family), path.parent), s.dtype)
        rows: list[dict[str, Any]] = []
        for temperature in s.decode_temperatures:
            rows += measure.evaluate(
                target,
                drafter,
                benchmarks,
                speculations=[of_mode(s.modes[0], s.window)],
                temperature=temperature,
                max_new_tokens=s.max_new_tokens,
                skip_long_prompts=True,
                stop=lambda: study.context.stop.requested,
            )
            if study.context.stop.requested:
                raise Stopped
        files.write_atomic(path, json.dumps(results.plain(rows)))


def _write(study: _Study, rates: dict[str, float], tuning: dict[str, dict[float, float]]) -> None:
    s = study.settings
    about = measure.environment(s.dtype) | {
        "settings": {spec.name: getattr(s, spec.name) for spec in flags.specs(StudySettings)},
        "rates": rates,
        "tuning": tuning,
        "costs": json.loads((study.workdir / "prices.json").read_text()),
        "test_answers": len(study.test.batches.examples),
        "test_tokens": int(sum(e.answer_mask.sum() for e in study.test.batches.examples)),
    }
    results.write(study.workdir, [find_arm(name) for name in s.arms], s.seeds, s.modes[0], about)
