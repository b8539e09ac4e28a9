"""Comparison of trained drafters on answers used for no training or choice: decoding rounds, replayed exactly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax import distributed, files
from ppow_jax.corpus.features import FeatureStore
from ppow_jax.data.batches import Batches
from ppow_jax.evaluation.intervals import Counts, Estimate, micro_average, paired_difference, paired_ratio
from ppow_jax.evaluation.replay import Replayed, replay_all
from ppow_jax.inference.costs import measure_cost_table
from ppow_jax.models.drafter import Drafter, cast
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import Speculation, ngram, of_mode
from ppow_jax.training.context import RunContext
from ppow_jax.training.run.preemption import Stopped

TYPICAL_CACHE = 256  # tokens: the cache length at which costs are measured


def feature_store(context: RunContext, name: str, batches: Batches, layers: tuple[int, ...]) -> FeatureStore:
    """The target's features of some answers, in the shared or the scratch directory; raises Stopped on a signal."""
    target, stop, own = context.target, context.stop, context.scratch is not None
    place = (context.scratch or context.shared) / name
    store = FeatureStore(place, batches, target.params, target.config, layers, lambda: stop.requested, own)
    if not store.complete:
        raise Stopped
    return store


def measured_cost_table(context: RunContext, drafter: Drafter, speculations: Sequence[Speculation]) -> CostTable:
    """Cost table of drafting trees and verifying, measured once per shared directory, so resumed runs repeat decisions.

    It holds as many verified tokens as the widest of the modes verifies; a stored one that is too short is replaced.
    """
    path: Path = context.shared / "prices.json"
    most = max(speculation.verified for speculation in speculations)
    table = json.loads(path.read_text()) if path.exists() else None
    distributed.wait("cost_table")  # no process writes before all have looked
    if table is None or len(table["verify"]) <= most:
        found = _measure_cost_table(context, drafter, most)
        table = {"step": float(found.step), "verify": np.asarray(found.verify_N1).tolist()}
        distributed.by_leader(lambda: files.write_atomic(path, json.dumps(table)))
        table = json.loads(path.read_text())
    return CostTable.of(table["step"], np.array(table["verify"]))


def _measure_cost_table(context: RunContext, drafter: Drafter, most: int) -> CostTable:
    """Costs of adaptive trees; of verifying more than their nodes, up to `most`, those of n-gram lookup."""
    found = measure_cost_table(context.target, drafter, of_mode("adaptive", context.settings.window), TYPICAL_CACHE)
    known = np.asarray(found.verify_N1)
    if len(known) > most:
        return found
    longer = np.asarray(measure_cost_table(context.target, None, ngram(most), TYPICAL_CACHE).verify_N1)
    return CostTable.of(float(found.step), np.maximum.accumulate(np.append(known, longer[len(known) :])))


def replay_modes(
    context: RunContext, drafter: Drafter, modes: Sequence[str], cost_table: CostTable, answers: FeatureStore
) -> dict[str, Replayed]:
    """Replayed decoding of the answers with a drafter, in each mode."""
    speculations = [of_mode(mode, context.settings.window) for mode in modes]
    mine, target = cast(drafter, context.settings.dtype), context.target
    found = replay_all(mine, target.params, target.config, answers.batches, speculations, cost_table, answers)
    return dict(zip(modes, found, strict=True))


def interval(estimate: Estimate) -> dict[str, float]:
    """An estimate in the form of result files."""
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}


def compare(arms: Mapping[str, Replayed], start: str) -> dict[str, dict[str, Any]]:
    """Each arm in one mode: tau, the speedup by costs, and the difference of tau to the start, paired by answers."""
    rounds = {name: Counts(arm.tokens_N, arm.rounds_N) for name, arm in arms.items()}
    costs = {name: Counts(arm.tokens_N, arm.cost_N) for name, arm in arms.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in arms:
        found[name] = {
            "tau": interval(micro_average(rounds[name])),
            "speedup": interval(micro_average(costs[name])),
        }
        if name != start:
            found[name]["paired_difference_to_start"] = interval(paired_difference(rounds[name], rounds[start]))
            found[name]["paired_ratio_to_start"] = interval(paired_ratio(rounds[name], rounds[start]))
            found[name]["paired_speedup_ratio_to_start"] = interval(paired_ratio(costs[name], costs[start]))
    return found
