"""Results as console table, JSON and Markdown (`evaluation.plots` draws them).

A report is `{"schema": 1, "device", "precision", "versions", "settings", "arms": [{"name", "results": [row],
"mean_tau", "mean_speedup"}]}`; a row holds the results of one benchmark (`benchmark`, `tau`, `speedup`, ...). A
training run adds two checksums to each arm, `drafter` and `conditions`, by which it later recognises what it measured.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import tabulate as tabulating
from tabulate import tabulate

from ppow_jax.files import write_atomic

tabulating.MIN_PADDING = 0  # no blanks beside headings: tables have to be narrow
WIDTH = 100  # characters: wider tables are cut into several
FEWEST = 5  # prompts, or batches of prompts, for an interval; a bootstrap over fewer says little

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
    "baseline_tokens_per_second": "plain",
    "identical": "identical",
    "drafter_acceptance_rate": "drafter acc.",
    "ngram_acceptance_rate": "n-gram acc.",
    "ngram_share": "n-gram share",
    "both_share": "both",
    "gamma": "gamma",
    "verify_cost_ratio": "verify",
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
_LABELS = ("arm", "name", "benchmark", "stage", "mode", "temperature", "batch_size", "window")  # of a row

_MEANING = (
    "tau is the number of tokens gained per verification, the bonus token included (plain decoding: 1). `95 %` is its "
    "interval over prompts, or that of the speedup. Speedup is against plain decoding of the same prompts in the same "
    "run (`plain`, in token/s); `identical` counts the outputs that are token for token the same as plain decoding's. "
    "`gamma` and `verify` are times of a draft step and of a verification, in steps of plain decoding."
)


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
    found = _ranked(results)
    best: dict[tuple, dict[str, Any]] = {}
    for group in found:
        best.setdefault((group["temperature"], group["batch_size"], group["mode"]), group)
    return list(best.values()) if len(found) > 1 else []


def _ranked(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Means of every mode and size, for each temperature and batch size, the fastest first."""
    groups: dict[tuple, list[Row]] = {}
    for row in results:
        groups.setdefault((row["temperature"], row["batch_size"], row["mode"], _size(row)), []).append(row)
    keys = ("temperature", "batch_size", "mode", "window")
    found = [dict(zip(keys, group, strict=True)) | arm("", rows) for group, rows in groups.items()]
    return sorted(found, key=lambda group: (group["temperature"], group["batch_size"], -_rank(group["mean_speedup"])))


def opening(results: Sequence[Row]) -> str:
    """First sentence of an evaluation: the fastest mode and what it gains, at the first temperature and batch size."""
    best, *_ = ranked = _ranked(results)
    same = [group for group in ranked if all(group[key] == best[key] for key in ("temperature", "batch_size"))]
    of_many = f", the fastest of {len(same)} measured modes and sizes," if len(same) > 1 else ""
    where = f"at temperature {best['temperature']:g}, batch {best['batch_size']}"
    benchmarks = list(dict.fromkeys(str(row["benchmark"]) for row in best["results"]))
    on = f"on {benchmarks[0]}" if len(benchmarks) == 1 else f"on average over {', '.join(benchmarks)}"
    if not np.isfinite(best["mean_tau"]):
        return f"No token was drafted {on} {where}."
    gains = f"gains {best['mean_tau']:.2f} tokens per verification"
    if np.isfinite(best["mean_speedup"]):
        gains += f" and is {best['mean_speedup']:.2f} times as fast as plain decoding"
    return f"Decoding in mode {best['mode']}, window {best['window']}{of_many} {gains} {on} {where}."


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
        speed = f"Decoding with {final['name']} is {final['mean_speedup']:.2f} times as fast as plain decoding"
        if len(rows) == 1 and (few := _few(rows[0])):
            speed += f" ({few}: too few for an interval)"
        elif len(rows) == 1 and (spread := rows[0].get("speedup_interval")):
            speed += " (95 % interval {:.2f} to {:.2f})".format(*spread)
        same, total = (sum(row.get(key) or 0 for row in rows) for key in ("identical", "total"))
        alike = f"; {same} of {total} outputs are identical to plain decoding's" if total else ""
        sentences.append(f"{speed}{alike}.")
    return " ".join(sentences)


def _signed(bounds: Mapping[str, float]) -> str:
    return "{mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}".format(**bounds)


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    names = ("ppow_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in metadata.distributions()}
    return {name: metadata.version(name) for name in names if name.replace("_", "-") in installed}


def console_table(
    rows: Sequence[Row], columns: Mapping[str, str] = COLUMNS, style: str = "simple", width: int = WIDTH
) -> str:
    """A table of `rows`; columns that no row has are left out.

    A table that is too wide becomes several, each with the labels of the rows; what is the same in all rows is said
    once, above them.

    Args:
      rows: dicts of numbers and texts.
      columns: key of a row -> heading, in order.
      style: a format of `tabulate`, such as "simple" or "github".
      width: characters of a line.
    """
    shown = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    whole = _table(rows, shown, style)
    if _widest(whole) <= width:
        return whole
    labels = {key: heading for key, heading in shown.items() if key in _LABELS}
    same = [key for key in _LABELS[4:] if key in labels and len({_cell(key, row) for row in rows}) == 1]
    above = ", ".join(f"{labels.pop(key)} {_cell(key, rows[0])}" for key in same)
    parts: list[dict[str, str]] = []
    for key, heading in shown.items():
        if key in _LABELS:
            continue
        pair = {key: heading} | {k: h for k, h in shown.items() if k == f"{key}_interval"}  # never apart
        if parts and _widest(_table(rows, labels | parts[-1] | pair, style)) <= width:
            parts[-1] |= pair
        elif not any(key in part for part in parts):
            parts.append(pair)
    tables = [_table(rows, labels | part, style) for part in parts]
    return "\n\n".join([f"In all rows: {above}.", *tables] if above else tables)


def _table(rows: Sequence[Row], columns: Mapping[str, str], style: str) -> str:
    left = ("arm", "name", "benchmark", "mode")
    align = ["left" if key in left else "right" for key in columns]
    table = [[_cell(key, row) for key in columns] for row in rows]
    return tabulate(table, list(columns.values()), tablefmt=style, disable_numparse=True, colalign=align)


def _widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def result_table(report: Report, style: str = "simple") -> str:
    """A table with one line per arm and benchmark."""
    return console_table(_rows(report), style=style)


def _rows(report: Report) -> list[dict[str, Any]]:
    return [{"arm": a["name"], **row} for a in report["arms"] for row in a["results"]]


def _cell(key: str, row: Row) -> str:
    value = row.get(key)
    if key.endswith("_interval") and (few := _few(row)):
        return few
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


def _few(row: Row) -> str:
    """Number of prompts (or of batches, where prompts are decoded together) where they are too few for an interval."""
    prompts, batch = row.get("num_prompts"), row.get("batch_size") or 1
    if prompts is None or -(-prompts // batch) >= FEWEST:
        return ""
    number, unit = (prompts, "prompt") if batch == 1 else (-(-prompts // batch), "batch")
    return f"{number} {unit}{'' if number == 1 else 'es' if unit == 'batch' else 's'}"


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
    """Writes the report as a page: the finding in a sentence, results, acceptance by position, plots, settings.

    Args:
      path: the file; plots are named relative to its folder.
      report: see the module.
      plots: PNG files.
    """
    folder = pathlib.Path(path).parent
    parts = [report.get("headline") or "No prompt was decoded."]
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
    if command := report.get("command"):
        told = "This command repeats it; settings that are not in it have their defaults."
        parts += ["## Command", told, f"```\n{command}\n```"]
    elif settings := report.get("settings"):
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
