"""Plots of results and of training curves, as PNG files."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppow_jax.files import write_atomic

Report = Mapping[str, Any]
Row = Mapping[str, Any]

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
_COLOURS = ("#9aa5b1", "#1f6f8b", "#d9822b", "#7a5195", "#4c9f70", "#c0504d", "#b8a038", "#5b7fd1", "#d67fb0")
_SHARED = ("tau_sim", "held_out_tau_sim", "held_out_tau_decoded")  # comparable: one panel for all stages


def plot_results(path: str | os.PathLike, report: Report) -> None:
    """Draws tau and speedup per benchmark and arm, and acceptance by position, to a PNG file."""
    arms = [a for a in report["arms"] if a["results"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        tau, speedup, conditional, marginal = figure.subplots(2, 2).flat
        _bars(tau, arms, "tau", "tokens per verification (tau)")
        _bars(speedup, arms, "speedup", "speedup over plain decoding")
        _acceptance(conditional, arms, "acceptance_by_position", "acceptance, all before accepted")
        _acceptance(marginal, arms, "marginal_acceptance_by_position", "acceptance of the whole prefix")
        handles, labels = tau.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(labels)))
        save_figure(figure, path)


def plot_curves(
    path: str | os.PathLike,
    rows: Sequence[Row],
    names: Sequence[str] = ("loss", "tau_sim", "reward", "accepted_length"),
) -> None:
    """Draws training curves to a PNG file.

    Args:
      path: the file.
      rows: rows of metrics.jsonl (`step`, `stage`, metrics), as `read_metrics` returns them.
      names: the metrics to draw, each in a panel per stage; `tau_sim`, which stages share, in one panel.
    """
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    panels = []
    for name in names:
        having = [stage for stage in stages if any(name in row and row["stage"] == stage for row in rows)]
        panels += [(name, having)] if name in _SHARED and having else [(name, [stage]) for stage in having]
    with matplotlib.rc_context(STYLE):
        lines = max(1, -(-len(panels) // 2))
        figure = Figure(figsize=(10, 2.6 * lines), layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(lines, 2, squeeze=False)).flat)
        for ax, (name, having) in zip(axes, panels, strict=False):
            _curve(ax, rows, name, having, stages)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        save_figure(figure, path)


def _bars(ax: Axes, arms: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    labels = list(dict.fromkeys(_label(row, arms) for a in arms for row in a["results"]))
    width = min(0.3, 0.8 / max(1, len(arms)))
    crowded = len(labels) * len(arms) > 12
    for i, a in enumerate(arms):
        rows = {_label(row, arms): row for row in a["results"]}
        at = [labels.index(label) + (i - (len(arms) - 1) / 2) * width for label in rows]
        values = [math.nan if row[key] is None else row[key] for row in rows.values()]
        bars = ax.bar(at, values, width * 0.92, label=a["name"], color=colour(i))
        labels_above = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        ax.bar_label(bars, labels_above, fontsize=7.5, padding=2, rotation=90 if crowded else 0)
    ax.axhline(1, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_xticks(range(len(labels)), labels, fontsize=9 if len(labels) <= 4 else 7.5)
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.margins(y=0.2 if crowded else 0.12)
    ax.grid(visible=False, axis="x")
    ax.set_title(title)


def _label(row: Row, arms: Sequence[Mapping[str, Any]]) -> str:
    """The benchmark, and the other keys by which rows of an arm differ."""
    label = str(row["benchmark"])
    for key, short in (("mode", ""), ("temperature", "T="), ("batch_size", "B="), ("window", "K=")):
        if any(len({str(other.get(key)) for other in a["results"]}) > 1 for a in arms):
            value = row.get(key)
            label += f"\n{short}{value:g}" if isinstance(value, float) else f"\n{short}{value}"
    return label


def _acceptance(ax: Axes, arms: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    """One faint line per row, and the mean over an arm's rows in full colour."""
    for i, a in enumerate(arms):
        lines = [np.asarray(row[key], float) for row in a["results"] if row.get(key)]  # None: position never reached
        if not lines:
            continue
        for line in lines:
            ax.plot(range(1, len(line) + 1), line, color=colour(i), alpha=0.3, linewidth=0.9)
        depth = max(map(len, lines))
        padded = np.array([np.pad(line, (0, depth - len(line)), constant_values=np.nan) for line in lines])
        known = np.isfinite(padded)
        means = np.where(known, padded, 0).sum(0) / np.maximum(known.sum(0), 1)
        ax.plot(
            np.arange(1, depth + 1)[known.any(0)],
            means[known.any(0)],
            color=colour(i),
            marker="o",
            markersize=3.5,
        )
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("position in the window")
    ax.set_title(title)


def _curve(ax: Axes, rows: Sequence[Row], name: str, having: Sequence[str], stages: Sequence[str]) -> None:
    """One metric over the steps of some stages, with the value before the first step as a line."""
    found = {stage: [row for row in rows if row["stage"] == stage and row.get(name) is not None] for stage in having}
    points = {stage: np.array([(row["step"], row[name]) for row in mine], float).T for stage, mine in found.items()}
    limits = spike_limits(np.concatenate([value for _, value in points.values()]))
    offset = 0
    for stage, (step, value) in points.items():
        mine = colour(stages.index(stage) + 1)
        if step[0] == 0 and not offset:
            ax.axhline(value[0], color="#444444", linewidth=0.9, linestyle=(0, (1, 2)))
            ax.annotate("start", (1, value[0]), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right", fontsize=7.5, color="#444444")
        dense = len(value) > 60
        ax.plot(
            step + offset,
            value,
            color=mine,
            alpha=0.3 if dense else 1,
            linewidth=1,
            marker="" if dense else ".",
        )
        if dense:
            usual = np.where((value >= limits[0]) & (value <= limits[1]), value, np.nan) if limits else value
            ax.plot(step + offset, _smooth(usual, len(value) // 30), color=mine, linewidth=1.8)
        if len(having) > 1:
            ax.text(offset + step[0], 1.0, f" {stage}", color=mine, transform=ax.get_xaxis_transform(), va="top")
            if offset:
                ax.axvline(offset, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
        offset += int(max(row["step"] for row in rows if row["stage"] == stage))
    if limits:
        *bounds, number = limits
        ax.set_ylim(*bounds)
        outside = f"{number} value{'s' if number > 1 else ''} outside"
        ax.text(0.99, 0.97, outside, transform=ax.transAxes, ha="right", va="top", fontsize=7.5, color="#444444")
    ax.set_title(f"{name} ({having[0]})" if len(having) == 1 else name)
    ax.set_xlabel("step")


def spike_limits(values: np.ndarray) -> tuple[float, float, int] | None:
    """Limits of an axis that leave out single spikes, and the number of values beyond; None if there are no spikes.

    A spike is far from the median of the values around it: ten times as far as most. A steep beginning is none.
    """
    values = values[np.isfinite(values)]
    if len(values) < 10:
        return None
    near = 2  # on each side
    padded = np.pad(values, near, mode="reflect")
    around = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * near + 1), axis=1)
    distance = np.abs(values - around)
    distance[:near] = 0  # they are far from what follows
    normal = np.percentile(values, 95) - np.percentile(values, 5)
    spikes = distance > max(10 * np.percentile(distance, 80), normal)
    if not spikes.any():
        return None
    low, high = values[~spikes].min(), values[~spikes].max()
    margin = 0.05 * (high - low) or 1.0
    return float(low - margin), float(high + margin), int(spikes.sum())


def _smooth(value: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over `width` points; points that are not finite are ignored."""
    finite = np.isfinite(value)
    window = np.ones(width)
    total = np.convolve(np.where(finite, value, 0), window, mode="same")
    return total / np.maximum(np.convolve(finite, window, mode="same"), 1)


def colour(index: int) -> str:
    """Colour of an arm by its index."""
    return _COLOURS[index % len(_COLOURS)]


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as a PNG file."""
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    write_atomic(path, png.getvalue())
