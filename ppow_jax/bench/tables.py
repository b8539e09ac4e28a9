"""Tables, comparisons and plots of benchmark results."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ppow_jax import files

GIB = 1 << 30
KEY = ("part", "mode", "batch", "width")  # columns that tell rows of one result apart
_NEEDED = ("bench", "device", "target", "peak", "results")

Row = Mapping[str, Any]


def read(path: str) -> dict[str, Any]:
    """A result of `experiments.bench --output`. Raises UserError for any other file."""
    return files.read_result(path, "a benchmark", _NEEDED)


def table(rows: Sequence[Row], style: str = "simple") -> str:
    """A line per result; a share that is not counted, and a ratio where there is none, stay empty."""
    lines = [
        {
            "part": row["part"] + (f" {row['mode']}" if "mode" in row else ""),
            "batch": row["batch"],
            "width": row.get("width", ""),
            "ms": _number(row, "seconds", 1e3),
            "ratio": _number(row, "ratio"),
            "token/s": _number(row, "tokens_per_second"),
            "answer/s": _number(row, "answers_per_second"),
            "MFU %": _number(row, "mfu", 100),
            "bandwidth %": _number(row, "bandwidth_share", 100),
            "compile s": _number(row, "compile_seconds"),
            "program GiB": _number(row, "program_bytes", 1 / GIB),
        }
        for row in rows
        if "error" not in row
    ]
    failed = [f"{_name(row)}: {row['error']}" for row in rows if "error" in row]
    columns = [key for key in (lines[0] if lines else {}) if any(line[key] != "" for line in lines)]
    shown = [{key: line[key] for key in columns} for line in lines]
    text = tabulate(shown, headers="keys", tablefmt=style, disable_numparse=True, **_right(columns))
    return "\n".join([text, *failed])


def comparison(results: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    """Times of several results side by side, and how many times as fast each is as the first; rows that all have."""
    by_key = [{_key(row): row for row in result["results"] if "error" not in row} for result in results]
    lines = []
    for key, first in by_key[0].items():
        if not all(key in rows for rows in by_key):
            continue
        line = {"part": first["part"] + (f" {first['mode']}" if "mode" in first else ""), "batch": first["batch"]}
        line |= {"width": first.get("width", ""), "ms 1": _number(first, "seconds", 1e3)}
        for n, rows in enumerate(by_key[1:], start=2):
            line |= {
                f"ms {n}": _number(rows[key], "seconds", 1e3),
                f"speed {n}/1": f"{first['seconds'] / rows[key]['seconds']:.3f}",
                f"compile {n}/1": _ratio(rows[key], first, "compile_seconds"),
            }
        lines.append(line)
    head = [f"{n}: {r['target']}, {r['dtype']}, {r['device']}" for n, r in enumerate(results, start=1)]
    columns = list(lines[0]) if lines else []
    text = tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True, **_right(columns))
    return "\n".join([*head, text if lines else "no measurement is in all of them"])


def plot(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Plots to PNG: plain decoding over the batch, verification over the width, and shares of the peaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), dpi=100, layout="constrained")
    for n, result in enumerate(results, start=1):
        prefix = f"{n}: " if len(results) > 1 else ""
        rows = [row for row in result["results"] if "error" not in row]
        for part, key, axes in (("decode", "tokens_per_second", left), ("verify", "ratio", middle)):
            points = [(row["batch" if part == "decode" else "width"], row[key]) for row in rows if row["part"] == part]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{prefix}{result['target']}")
                axes.set_xscale("log", base=2)
        shares = [(_name(row), max(row.get("mfu") or 0, row.get("bandwidth_share") or 0)) for row in rows]
        shares = [(name, share) for name, share in shares if share]
        place = [len(shares) - i + (n - 1) / (len(results) + 1) for i in range(len(shares))]
        lengths, width = [100 * share for _, share in shares], 1 / (len(results) + 1)
        right.barh(place, lengths, width, label=f"{prefix}{result['device']}")
        if n == 1:
            right.set_yticks(place, [name for name, _ in shares], fontsize=7)
    left.set(xlabel="batch", ylabel="token/s", title="plain decoding")
    middle.set(xlabel="tokens verified at once", ylabel="plain steps", title="verification")
    right.set(xlabel="% of the peak (compute or bandwidth)", title="share of the device's peak")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def _name(row: Row) -> str:
    return " ".join(str(part) for part in _key(row) if part is not None)


def _number(row: Row, key: str, scale: float = 1.0) -> str:
    value = row.get(key)
    return "" if value is None else f"{value * scale:.4g}"


def _ratio(row: Row, first: Row, key: str) -> str:
    mine, other = row.get(key), first.get(key)
    return f"{mine / other:.2f}" if mine and other else ""


def _right(columns: Sequence[str]) -> dict[str, Any]:
    return {"colalign": ["left" if name == "part" else "right" for name in columns]} if columns else {}
