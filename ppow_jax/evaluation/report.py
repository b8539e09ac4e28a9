"""Results as console table, JSON, Markdown and plots.

A report is `{"schema": 1, "device", "precision", "versions", "settings", "arms": [{"name", "results": [row],
"mean_tau", "mean_speedup"}]}`; a row holds the results of one benchmark (`benchmark`, `tau`, `speedup`, ...). A
training run adds two checksums to each arm, `drafter` and `conditions`, by which it later recognises what it measured.
"""

import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from ppow_jax.files import write_atomic

Report = Mapping[str, Any]
Row = Mapping[str, Any]

# Columns of the table: key of a result row -> heading.
COLUMNS = {
    "arm": "drafter",
    "benchmark": "benchmark",
    "mode": "mode",
    "temperature": "temp.",
    "batch_size": "batch",
    "window": "window",
    "tau": "tau",
    "tau_interval": "95 %",
    "speedup": "speedup",
    "speedup_interval": "95 %",
    "tokens_per_second": "token/s",
    "baseline_tokens_per_second": "plain token/s",
    "identical": "identical",
    "drafter_acceptance_rate": "drafter acc.",
    "ngram_acceptance_rate": "n-gram acc.",
    "ngram_share": "n-gram share",
    "both_share": "both",
    "gamma": "gamma",
    "verify_cost_ratio": "verify cost",
}
WINNER_COLUMNS = {
    "temperature": "temp.",
    "batch_size": "batch",
    "mode": "mode",
    "window": "window",
    "mean_tau": "mean tau",
    "mean_speedup": "mean speedup",
}
ARM_COLUMNS = {"name": "drafter", "mean_tau": "mean tau", "mean_speedup": "mean speedup"}

_MEANING = (
    "tau is the number of tokens gained per verification, the bonus token included (plain decoding: 1). "
    "Speedup is against plain decoding of the same prompts in the same run; `identical` counts the outputs "
    "that are token for token the same as plain decoding's."
)

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
_SHARED = ("tau_sim",)  # comparable between stages: one panel for all of them


def arm(name: str, results: Sequence[Row]) -> dict[str, Any]:
    """An arm of a report: its rows and the plain means of tau and speedup over them.

    Rows without a verification have neither, and are left out; if no row is left, the means are nan.
    """
    finite = [row for row in results if np.isfinite(_number(row["tau"]))]
    means = {f"mean_{key}": _mean([_number(row[key]) for row in finite]) for key in ("tau", "speedup")}
    return {"name": name, "results": list(results), **means}


def winners(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Best sizes where several speculation modes were measured: of each mode the one with the highest mean speedup over
    the benchmarks, for each temperature and batch size, best first.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in results:
        groups.setdefault((row["temperature"], row["batch_size"], row["mode"], _size(row)), []).append(row)
    keys = ("temperature", "batch_size", "mode", "window")
    found = [dict(zip(keys, group, strict=True)) | arm("", rows) for group, rows in groups.items()]
    found.sort(key=lambda group: (group["temperature"], group["batch_size"], -_rank(group["mean_speedup"])))
    best: dict[tuple, dict[str, Any]] = {}
    for group in found:
        best.setdefault((group["temperature"], group["batch_size"], group["mode"]), group)
    return list(best.values()) if len(found) > 1 else []


def acceptance_table(rows: Sequence[Row]) -> str:
    """Table of the acceptance of each position, given that all before it were accepted."""
    positions = {str(j): str(j) for j in range(1, max(row["window"] for row in rows) + 1)}
    table = [dict(row) | dict(zip(positions, row["acceptance_by_position"], strict=False)) for row in rows]
    about = ("benchmark", "mode", "temperature", "batch_size", "window")
    return console_table(table, {key: COLUMNS[key] for key in about} | positions)


def arms_by_mode(results: Sequence[Row]) -> list[dict[str, Any]]:
    """One arm for each speculation mode and size: `chain 5`, `tree 5 (15 nodes)`, ..."""
    groups: dict[str, list[Row]] = {}
    for row in results:
        groups.setdefault(f"{row['mode']} {_size(row)}", []).append(row)
    return [arm(name, rows) for name, rows in groups.items()]


def _size(row: Row) -> str:
    """K, and the number of nodes of a tree."""
    tree = row.get("tree")
    return f"{row['window']} ({tree['nodes']} nodes)" if tree else str(row["window"])


def _rank(speedup: float) -> float:
    return speedup if np.isfinite(speedup) else -math.inf


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def _number(value: float | None) -> float:
    """nan for None, which stands for nan in JSON."""
    return math.nan if value is None else value


def headline(arms: Sequence[Mapping[str, Any]]) -> str:
    """Summary of a run's gain, in a sentence or two: acceptance length against the start, speed against plain decoding.

    arms: as in the report, the start first; the gain is that of the arm `ppow`, or else of the last arm.
    """
    start, *others = arms
    final = next((a for a in others if a["name"] == "ppow"), others[-1] if others else start)
    sentences = []
    for mode, mine in (final.get("replayed") or {}).items():
        if final is start:
            break
        gain = mine["paired_difference_to_start"]
        before = start["replayed"][mode]["tau"]["mean"]
        text = f"On answers that nothing was trained on, {final['name']} changed the acceptance length ({mode}) from "
        text += f"{before:.2f} to {mine['tau']['mean']:.2f} tokens per verification ({_signed(gain)})"
        rest = [a for a in others if a is not final]
        text += "".join(f"; {a['name']}: {_signed(a['replayed'][mode]['paired_difference_to_start'])}" for a in rest)
        sentences.append(text + ".")
    if rows := [row for row in final["results"] if np.isfinite(_number(row["speedup"]))]:
        speed = f"Decoding with it is {final['mean_speedup']:.2f} times as fast as plain decoding"
        spread = rows[0].get("speedup_interval")
        if len(rows) == 1 and spread and spread[0] < spread[1]:
            speed += " (95 % interval {:.2f} to {:.2f})".format(*spread)
        same, total = (sum(row.get(key) or 0 for row in rows) for key in ("identical", "total"))
        sentences.append(f"{speed}; {same} of {total} outputs are identical to its." if total else f"{speed}.")
    return " ".join(sentences)


def _signed(bounds: Mapping[str, float]) -> str:
    return "{mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}".format(**bounds)


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    names = ("ppow_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in metadata.distributions()}
    return {name: metadata.version(name) for name in names if name.replace("_", "-") in installed}


def console_table(rows: Sequence[Row], columns: Mapping[str, str] = COLUMNS, style: str = "simple") -> str:
    """A table of `rows`; columns that no row has are left out.

    Args:
      rows: dicts of numbers and texts.
      columns: key of a row -> heading, in order.
      style: a format of `tabulate`, such as "simple" or "github".
    """
    shown = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    table = [[_cell(key, row) for key in shown] for row in rows]
    left = ("arm", "name", "benchmark", "mode")
    align = ["left" if key in left else "right" for key in shown]
    return tabulate(table, list(shown.values()), tablefmt=style, disable_numparse=True, colalign=align)


def result_table(report: Report, style: str = "simple") -> str:
    """A table with one line per arm and benchmark."""
    return console_table(_rows(report), style=style)


def _rows(report: Report) -> list[dict[str, Any]]:
    return [{"arm": a["name"], **row} for a in report["arms"] for row in a["results"]]


def _cell(key: str, row: Row) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if key == "identical" and "total" in row:
        return f"{value}/{row['total']}"
    if key == "window":
        return _size(row)
    if key.endswith("_interval"):
        return "{:.2f}-{:.2f}".format(*value)
    if not isinstance(value, float):
        return str(value)
    if key == "temperature":
        return f"{value:g}"
    return f"{value:.1f}" if "per_second" in key else f"{value:.3f}" if key == "gamma" else f"{value:.2f}"


def write_json(path: str | os.PathLike, report: Report) -> None:
    """Writes `report` as JSON: numpy and JAX values become plain numbers and lists, nan and infinity null."""
    write_atomic(path, json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    return _plain(np.asarray(value).tolist())


def write_markdown(path: str | os.PathLike, report: Report, plots: Sequence[str | os.PathLike] = ()) -> None:
    """Writes the report as a readable page: summary, results, acceptance by position, plots, settings.

    Args:
      path: the file; plots are named relative to its folder.
      report: see the module.
      plots: PNG files.
    """
    folder = pathlib.Path(path).parent
    parts = ["# Report", *filter(None, [report.get("headline")])]
    parts.append(f"Device: {report.get('device')}. Precision: {report.get('precision')}.")
    parts += ["## Summary", console_table(report["arms"], ARM_COLUMNS, "github"), _MEANING]
    parts += ["## Results", result_table(report, "github")]
    acceptance = [(row, row.get("acceptance_by_position") or ()) for row in _rows(report)]
    if depth := max((len(positions) for _, positions in acceptance), default=0):
        columns = {
            "arm": "drafter",
            "benchmark": "benchmark",
            **{str(i): str(i) for i in range(1, depth + 1)},
        }
        table = [row | {str(i): p for i, p in enumerate(positions, 1)} for row, positions in acceptance]
        parts += ["## Acceptance by position, given that all before were accepted"]
        parts += [console_table(table, columns, "github")]
    for plot in plots:
        name = os.path.relpath(plot, folder)
        parts.append(f"![{pathlib.Path(name).stem.replace('_', ' ')}]({name})")
    if spent := report.get("time"):
        parts += ["## Time", _time(spent)]
    if settings := report.get("settings"):
        lines = [f"--{key}={_flag(value)}" for key, value in settings.items()]
        parts += ["## Settings", "\n".join(["```", *lines, "```"])]
    if packages := report.get("versions"):
        parts += ["## Versions", ", ".join(f"{name} {version}" for name, version in packages.items())]
    write_atomic(path, "\n\n".join(parts) + "\n")


def _flag(value: Any) -> str:
    """A setting in the syntax of its flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_flag, value))
    return "none" if value is None else str(value)


def _time(spent: Mapping[str, Any]) -> str:
    """Breakdown of a training run's time (see `training.run.clock`)."""
    kinds = list(dict.fromkeys(["wall", *(kind for seconds in spent["seconds"].values() for kind in seconds)]))
    rows = [{"name": stage, **seconds} for stage, seconds in spent["seconds"].items()]
    columns = {"name": "seconds", **{kind: kind for kind in kinds}}
    parts = [console_table(rows, columns, "github")]
    parts += [
        f"Attempts: {spent['attempts']}. Goodput: {_number(spent['goodput']):.3f}, training steps that count as a "
        "share of the time of all attempts that was not spent on answers, features, measuring or export. What `wall` "
        "holds beyond the other columns is starting and waiting."
    ]
    if by_stage := spent.get("step_parts"):
        names = list(dict.fromkeys(name for seconds in by_stage.values() for name in seconds))
        rows = [
            {"name": stage, **{name: f"{s:.4f}" for name, s in seconds.items()}} for stage, seconds in by_stage.items()
        ]
        parts += ["Operations of a step by part, in seconds, from the profiled steps:"]
        parts += [console_table(rows, {"name": "stage", **{name: name for name in names}}, "github")]
    return "\n\n".join(parts)


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
        values = [_number(row[key]) for row in rows.values()]
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
    offset = 0
    for stage in having:
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and row.get(name) is not None]
        step, value = np.asarray(points, float).T
        mine = colour(stages.index(stage) + 1)
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
            ax.plot(step + offset, _smooth(value, len(value) // 30), color=mine, linewidth=1.8)
        if len(having) > 1:
            ax.text(offset + step[0], 1.0, f" {stage}", color=mine, transform=ax.get_xaxis_transform(), va="top")
            if offset:
                ax.axvline(offset, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
        offset += int(max(row["step"] for row in rows if row["stage"] == stage))
    ax.set_title(f"{name} ({having[0]})" if len(having) == 1 else name)
    ax.set_xlabel("step")


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
