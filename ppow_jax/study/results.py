"""The results of a study: every arm with intervals, paired with continued supervised training and with the start."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ppow_jax.evaluation.intervals import Counts, micro_average, paired_difference, paired_ratio
from ppow_jax.evaluation.replay import Replayed
from ppow_jax.files import write_atomic
from ppow_jax.study import page, plots
from ppow_jax.study.arms import Arm
from ppow_jax.training.replays import interval

START, BASELINE = "eagle3", "cst"


def counts(replayed: Replayed) -> dict[str, list]:
    """The stored part of a replay: tokens, rounds and cost in plain steps per answer; histogram of accepted drafts."""
    return {
        "tokens": replayed.tokens_N.tolist(),
        "rounds": replayed.rounds_N.tolist(),
        "cost": np.round(replayed.cost_N, 3).tolist(),
        "drafted": int(replayed.drafted_N.sum()),
        "accepted_histogram": replayed.accepted_NxK1.sum(0).tolist(),
    }


def tau(result: Mapping[str, Any], mode: str) -> float:
    """Acceptance length of one arm and seed."""
    found = result["replayed"][mode]
    return float(np.sum(found["tokens"]) / np.sum(found["rounds"]))


def plain(value: Any) -> Any:
    """Converts numpy values to JSON's own types."""
    return json.loads(json.dumps(value, default=lambda x: x.tolist()))


def write(
    workdir: Path, arms: Sequence[Arm], seeds: Sequence[int], mode: str, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes study.json, study.csv, study.md and plots of all measurements so far.

    mode: the speculation mode that arms are compared in; the others are reported beside it.
    """
    modes = about["settings"]["modes"]
    found = {arm.name: _results(workdir, arm, seeds, modes) for arm in arms}
    complete = [seed for seed in seeds if all(seed in results for results in found.values())]
    if not complete:
        return {}
    kept = {name: [results[seed] for seed in complete] for name, results in found.items()}
    rows = [_row(workdir, arm, kept, complete, mode) | _decoded(workdir, arm, seeds) for arm in arms]
    study = {"schema": 1, **plain(dict(about)), "compared_in": mode, "seeds": complete, "arms": rows}
    write_atomic(workdir / "study.json", json.dumps(study, indent=1) + "\n")
    write_atomic(workdir / "study.csv", _csv(rows))
    curves = {arm.name: _curve(workdir, arm, complete) for arm in arms if arm.stage}
    names = plots.draw(workdir, study, curves)
    write_atomic(workdir / "study.md", page.markdown(study, summary_table(study, "github"), names))
    return study


def _results(workdir: Path, arm: Arm, seeds: Sequence[int], modes: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The results by seed, of those whose modes have all been replayed."""
    its = {seed: seed if arm.stage else seeds[0] for seed in seeds}  # the start has no seed
    paths = {seed: arm_directory(workdir, arm.name, its[seed]) / "result.json" for seed in seeds}
    found = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
    return {seed: result for seed, result in found.items() if set(modes) <= set(result["replayed"])}


def arm_directory(workdir: Path, name: str, seed: int) -> Path:
    """Directory of an arm's training and results."""
    return workdir / "arms" / name.replace(":", "+").replace(";", "+") / f"seed{seed}"


def _counts(results: Sequence[Mapping[str, Any]], mode: str, per: str = "rounds") -> Counts:
    """Counts [S, N] of some seeds."""
    replayed = [result["replayed"][mode] for result in results]
    return Counts(*(np.array([x[name] for x in replayed], float) for name in ("tokens", per)))


def _row(workdir: Path, arm: Arm, kept: Mapping[str, list], seeds: Sequence[int], mode: str) -> dict[str, Any]:
    """Statistics of an arm; differences are paired over answers and seeds."""
    mine = kept[arm.name]
    chain = "chain" if "chain" in mine[0]["replayed"] else mode
    row = {
        "arm": arm.name,
        "about": arm.about,
        "seeds": list(seeds),
        "rate": mine[0]["rate"],
        "tau": interval(micro_average(_counts(mine, mode))),
        "speedup": interval(micro_average(_counts(mine, mode, "cost"))),
        "tau_by_mode": {m: interval(micro_average(_counts(mine, m))) for m in mine[0]["replayed"]},
        "tau_by_seed": [tau(result, mode) for result in mine],
        "candidates_by_mode": {m: _candidates(mine, m) for m in mine[0]["replayed"]},
        "accepted_histogram": np.sum([r["replayed"][chain]["accepted_histogram"] for r in mine], 0).tolist(),
        "seconds": float(np.mean([result["seconds"] for result in mine])),
        "flat_groups": _flat_groups(workdir, arm, seeds),
    }
    for other, key in ((BASELINE, "cst"), (START, "start")):
        if other in kept and other != arm.name:
            pair = _counts(mine, mode), _counts(kept[other], mode)
            row[f"paired_difference_to_{key}"] = interval(paired_difference(*pair))
            paid = _counts(mine, mode, "cost"), _counts(kept[other], mode, "cost")
            row[f"paired_speedup_ratio_to_{key}"] = interval(paired_ratio(*paid))
            by_mode = {m: (_counts(mine, m), _counts(kept[other], m)) for m in mine[0]["replayed"]}
            row[f"paired_difference_to_{key}_by_mode"] = {
                m: interval(paired_difference(*p)) for m, p in by_mode.items()
            }
    others = {name: _counts(results, mode) for name, results in kept.items() if name != arm.name}
    row["paired_ratios"] = {name: interval(paired_ratio(_counts(mine, mode), x)) for name, x in others.items()}
    return row


def _candidates(results: Sequence[Mapping[str, Any]], mode: str) -> float:
    """Drafted tokens per verification."""
    replayed = [result["replayed"][mode] for result in results]
    return float(sum(x["drafted"] for x in replayed) / sum(np.sum(x["rounds"]) for x in replayed))


def _flat_groups(workdir: Path, arm: Arm, seeds: Sequence[int]) -> float | None:
    """Share of groups of windows with equal rewards, the mean over steps and seeds; None for arms without rewards."""
    rows = [row for seed in seeds for row in _metrics(arm_directory(workdir, arm.name, seed))]
    found = [row["flat_groups"] for row in rows if "flat_groups" in row]
    return float(np.mean(found)) if found else None


def _metrics(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _decoded(workdir: Path, arm: Arm, seeds: Sequence[int]) -> dict[str, Any]:
    """Benchmark results of decoding with an arm's drafters, where available."""
    paths = [arm_directory(workdir, arm.name, seed) / "decoded.json" for seed in seeds]
    rows = [row for path in paths if path.exists() for row in json.loads(path.read_text())]
    if not rows:
        return {}
    kinds = sorted({(row["benchmark"], row["temperature"]) for row in rows})
    named = {f"{name} T={temperature:g}": (name, temperature) for name, temperature in kinds}

    def mean(kind, key) -> float:
        return float(np.mean([row[key] for row in rows if (row["benchmark"], row["temperature"]) == kind]))

    return {
        "tau_by_benchmark": {name: mean(kind, "tau") for name, kind in named.items()},
        "speedup_by_benchmark": {name: mean(kind, "speedup") for name, kind in named.items()},
    }


def _curve(workdir: Path, arm: Arm, seeds: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Held-out simulated tau by step, a curve per seed."""
    curves = []
    for seed in seeds:
        rows = _metrics(arm_directory(workdir, arm.name, seed))
        curves.append([(row["step"], row["held_out_tau_sim"]) for row in rows if "held_out_tau_sim" in row])
    return curves


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", "seed", "tau"])
    writer.writerows(
        [row["arm"], seed, tau] for row in rows for seed, tau in zip(row["seeds"], row["tau_by_seed"], strict=True)
    )
    return file.getvalue()


def shown(bounds: Mapping[str, float] | None, digits: int = 3, sign: bool = False) -> str:
    """`2.534 (2.510 to 2.560)`; - where there is none."""
    if bounds is None:
        return "-"
    one = f"{'+' if sign else ''}.{digits}f"
    return f"{bounds['mean']:{one}} ({bounds['low']:{one}} to {bounds['high']:{one}})"


def summary_table(study: Mapping[str, Any], style: str = "simple") -> str:
    """A line per arm: acceptance length and differences with 95 % intervals."""
    table = [
        [
            row["arm"],
            shown(row["tau"]),
            shown(row.get("paired_difference_to_cst"), sign=True),
            shown(row.get("paired_difference_to_start"), sign=True),
            shown(row["speedup"], 2),
            shown(row.get("paired_speedup_ratio_to_cst")),
            f"{row['seconds']:.0f}",
        ]
        for row in study["arms"]
    ]
    heads = [
        "arm",
        f"tau ({study['compared_in']})",
        "minus cst",
        "minus the start",
        "speedup by costs",
        "ratio to cst's",
        "seconds",
    ]
    return tabulate(table, heads, tablefmt=style, disable_numparse=True)
