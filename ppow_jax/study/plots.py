"""Plots of a study: training curves, the ADAW switch, acceptance by position, tau by mode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ppow_jax.evaluation import plots

Curves = Mapping[str, Sequence[Sequence[tuple[int, float]]]]


def draw(workdir: Path, study: Mapping[str, Any], curves: Curves) -> list[str]:
    """Writes the plots into the workdir -> their names."""
    with matplotlib.rc_context(plots.STYLE):
        panels = {
            "tau_by_step.png": lambda ax: _curves(ax, study, curves),
            "acceptance_by_position.png": lambda ax: _acceptance(ax, study),
            "tau_by_candidates.png": lambda ax: _candidates(ax, study),
            "difference_to_cst.png": lambda ax: _differences(ax, study),
            "adaw_switch.png": lambda ax: _switch(ax, workdir, study),
        }
        for name, fill in panels.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            fill(figure.subplots())
            plots.save_figure(figure, workdir / name)
    return list(panels)


def _curves(ax, study, curves: Curves) -> None:
    """The mean over seeds, and each seed faintly; the common start as a line."""
    start = None
    for i, (name, by_seed) in enumerate(curves.items()):
        lines = [dict(curve) for curve in by_seed if curve]
        if not lines:
            continue
        steps = sorted(set.intersection(*(set(line) for line in lines)))
        values_SxN = np.array([[line[step] for step in steps] for line in lines])
        start = values_SxN[:, 0].mean() if start is None and steps[:1] == [0] else start
        ax.plot(steps, values_SxN.mean(0), color=plots.colour(i), label=name, linewidth=1.8)
        ax.plot(steps, values_SxN.T, color=plots.colour(i), alpha=0.2, linewidth=0.8)
    if start is not None:
        ax.axhline(start, color="#444444", linewidth=0.9, linestyle=(0, (1, 2)), label="start")
    ax.set(title="Held-out simulated acceptance length", xlabel="step")
    ax.legend(fontsize=8)


def _acceptance(ax, study) -> None:
    """Conditional acceptance by position, of chains where they were replayed."""
    for i, row in enumerate(study["arms"]):
        at_least = np.cumsum(np.asarray(row["accepted_histogram"], float)[::-1])[::-1]
        conditional = at_least[1:] / np.maximum(at_least[:-1], 1)
        ax.plot(
            range(1, len(conditional) + 1),
            conditional,
            marker="o",
            markersize=4,
            color=plots.colour(i),
            label=row["arm"],
        )
    ax.set(title="Acceptance by position, all before accepted", xlabel="position in the window")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.legend(fontsize=8)


def _candidates(ax, study) -> None:
    """Acceptance length against the cost of a verification: a point for each mode, a line for each arm."""
    modes = study["arms"][0]["tau_by_mode"]
    for i, row in enumerate(study["arms"]):
        points = sorted((row["candidates_by_mode"][mode], row["tau_by_mode"][mode]["mean"]) for mode in modes)
        ax.plot(*zip(*points, strict=True), marker="o", markersize=4, color=plots.colour(i), label=row["arm"])
    for mode in modes:
        at = study["arms"][0]["candidates_by_mode"][mode], study["arms"][0]["tau_by_mode"][mode]["mean"]
        ax.annotate(mode, at, textcoords="offset points", xytext=(4, -12), fontsize=8)
    ax.set(title="Acceptance length, by mode", xlabel="drafted tokens per verification")
    ax.legend(fontsize=8)


def _differences(ax, study) -> None:
    """Paired differences of tau to continued supervised training, with intervals."""
    rows = [row for row in study["arms"] if "paired_difference_to_cst" in row]
    for y, row in enumerate(rows):
        d = row["paired_difference_to_cst"]
        ax.plot([d["low"], d["high"]], [y, y], color=plots.colour(1), linewidth=2)
        ax.plot(d["mean"], y, "o", color=plots.colour(1))
    ax.axvline(0, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    ax.invert_yaxis()
    ax.set_title(f"Acceptance length ({study['compared_in']}) minus cst's, 95 % intervals")


def _switch(ax, workdir: Path, study) -> None:
    """Reward and KL of PPOW as published around the step at which ADAW begins."""
    path = workdir / "arms" / "ppow" / f"seed{study['seeds'][0]}" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if "reward" in row]
    for i, name in enumerate(("reward", "kl")):
        if rows:
            ax.plot([row["step"] for row in rows], [row[name] for row in rows], color=plots.colour(i + 1), label=name)
    ax.axvline(study["settings"]["adaw_start"], color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set(title="PPOW as published: reward and KL at ADAW's start (dashed)", xlabel="step")
    if rows:
        ax.legend(fontsize=8)
