"""Outputs of a run: measurements of every arm, report, drafters in the EAGLE-3 format."""

import json
import logging
import shlex
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax import distributed, files, flags, sharding
from ppow_jax.errors import UserError
from ppow_jax.evaluation import plots, report
from ppow_jax.evaluation.benchmarks import Benchmark
from ppow_jax.evaluation.measure import environment, evaluate
from ppow_jax.models.drafter import Drafter, cast
from ppow_jax.speculation.settings import of_mode
from ppow_jax.training.context import RunContext
from ppow_jax.training.replays import compare, feature_store, measured_cost_table, replay_modes
from ppow_jax.training.run.metrics import read_metrics
from ppow_jax.training.run.preemption import Stopped
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import hub
from ppow_jax.weights.card import write_card
from ppow_jax.weights.drafters import best_format, export_drafter
from ppow_jax.weights.targets import base_model

log = logging.getLogger(__name__)


def evaluate_arms(context: RunContext, arms: dict[str, Drafter], benchmarks: list[Benchmark]) -> None:
    """Measures every arm, prints the table, writes report.json, report.md and plots.

    An arm that is already in report.json, with the same drafter under the same conditions, is not measured again.
    """
    s, workdir = context.settings, context.workdir
    about, speculations = environment(s.dtype), [of_mode(mode, s.window) for mode in s.modes]
    conditions = zlib.crc32(repr((about, s.target, speculations, s.max_new_tokens, benchmarks)).encode())
    settings = {spec.name: getattr(s, spec.name) for spec in flags.specs(TrainSettings)}
    former, done = former_arms(workdir), []
    replayed = _replayed(context, arms)
    for name, drafter in arms.items():
        made_of = {"drafter": checksum(drafter), "conditions": conditions}
        arm = former.get(name, {})
        if {key: arm.get(key) for key in made_of} == made_of:
            log.info("%s: already measured, taken from report.json (remove that file to measure again)", name)
        else:
            log.info("measuring the drafter of arm %s", name)
            rows = evaluate(
                context.target,
                sharding.committed(cast(drafter, s.dtype)),
                benchmarks,
                speculations=speculations,
                max_new_tokens=s.max_new_tokens,
                skip_long_prompts=True,
                stop=lambda: context.stop.requested,
            )
            if not rows:
                raise Stopped
            arm = report.arm(name, rows) | made_of
        done.append(arm | (replayed.get(name) or {}))
        headline = report.headline(done) if len(done) == len(arms) else ""
        result = (
            {"headline": headline}
            | about
            | {"command": flags.command("experiments.train", s), "settings": settings, "arms": done}
            | {"time": context.clock.summary() | _parts(context.scratch or workdir)}
        )
        distributed.by_leader(lambda: report.write_json(workdir / "report.json", result))  # noqa: B023  (called at once)
    distributed.by_leader(lambda: _report(workdir, result))


def _report(workdir: Path, result: dict) -> None:
    drawn = results, curves = workdir / "results.png", workdir / "curves.png"
    plots.plot_results(results, result)
    shown = ("loss", "held_out_tau_sim", "held_out_tau_decoded", "reward", "accepted_length", "kl", "flat_groups")
    plots.plot_curves(curves, read_metrics(workdir / "metrics.jsonl"), shown)
    report.write_markdown(workdir / "report.md", result, drawn)
    print(f"{result['headline']}\n" if result["headline"] else "")
    print(report.result_table(result))
    print(f"\nreport and plots: {workdir}")


def _replayed(context: RunContext, arms: dict[str, Drafter]) -> dict[str, dict[str, Any]]:
    """Replays each arm in all --modes on --test_answers, and compares it with the first arm."""
    s, test = context.settings, context.corpus.test
    if test is None:
        return {}
    first, *_ = arms.values()
    log.info("computing the acceptance of every arm on %d answers kept for testing", len(test.examples))
    store = feature_store(context, "features_test", test, first.config.feature_layers)
    cost_table = measured_cost_table(context, cast(first, s.dtype), [of_mode(mode, s.window) for mode in s.modes])
    found = {name: replay_modes(context, drafter, s.modes, cost_table, store) for name, drafter in arms.items()}
    start = next(iter(arms))
    compared = {mode: compare({name: replays[mode] for name, replays in found.items()}, start) for mode in s.modes}
    return {name: {"replayed": {mode: rows[name] for mode, rows in compared.items()}} for name in arms}


def _parts(workdir: Path) -> dict[str, dict]:
    """Seconds of a step's operations by part, for each profiled stage."""
    found = sorted((workdir / "profile").glob("*/parts.json"))
    return {"step_parts": {path.parent.name: json.loads(path.read_text())["seconds"] for path in found}}


def export_arm(context: RunContext, arm: str, drafter: Drafter, name: str) -> None:
    """Writes workdir/name, with a model card that has the arm's figures if exactly this drafter was measured."""
    s, workdir = context.settings, context.workdir
    measured = former_arms(workdir).get(arm, {})
    figures = measured["results"] if measured.get("drafter") == checksum(drafter) else []

    params, ids_W, embed_VxE = sharding.fetch((drafter.params, drafter.target_ids_W, drafter.embed_VxE))

    def write(directory: Path) -> None:
        export_drafter(
            directory,
            drafter.config,
            params,
            ids_W,
            target_name=s.base_model or base_model(s.target) or s.target,
            target_architecture=context.target.config.architecture,
            embed_VxE=embed_VxE,
        )
        write_card(
            directory,
            title=f"EAGLE-3 drafter for {s.target}",
            target=s.target,
            base_model=s.base_model,
            figures=figures,
            command=flags.command("experiments.train", s),
            format=best_format(drafter.config),
        )

    distributed.by_leader(lambda: files.replace_directory(workdir / name, write))
    log.info("exported %s: %s", arm, workdir / name)


def push_drafter(directory: Path, name: str) -> None:
    """Uploads an exported drafter to the hub as OWNER/NAME.

    Raises:
      UserError: see `hub.push`; the drafter and the run stay, and the message has the command that uploads it later.
    """
    try:
        with files.on_this_machine(directory) as local:
            url = hub.push(local, name)
    except UserError as error:
        again = f"python -m experiments.convert push --push_to_hub={name} {shlex.quote(str(directory))}"
        raise UserError(f"{error}; the run is complete, and its drafter kept; to upload it: {again}") from None
    print(f"{url}: uploaded from {directory}")


def former_arms(workdir: Path) -> dict[str, dict]:
    """The arms in report.json, by name."""
    path = workdir / "report.json"
    return {arm["name"]: arm for arm in json.loads(path.read_text())["arms"]} if path.exists() else {}


def checksum(drafter: Drafter) -> int:
    """Checksum of a drafter's contents: equal drafters have equal ones."""
    params, ids_W, embed_VxE = sharding.fetch((drafter.params, drafter.target_ids_W, drafter.embed_VxE))
    checksum = zlib.crc32(ids_W, zlib.crc32(repr(drafter.config).encode()))
    own = {} if embed_VxE is None else {"embed": embed_VxE}
    for _, value in sorted((params | own).items()):
        checksum = zlib.crc32(np.ascontiguousarray(value), checksum)
    return checksum
