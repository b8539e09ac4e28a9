"""Bar chart of speedups over plain decoding, from result files of `experiments.evaluate`.

    python docs/tools/speedups.py docs/figures/speedups.png docs/runs/A.json docs/runs/B.json
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"adaptive": "#1f6f8b", "mixture": "#d9822b", "ngram": "#9aa5b1"}
NAMES = {"adaptive": "drafter", "mixture": "drafter and lookup", "ngram": "lookup alone"}


def name(benchmark: str) -> str:
    """A benchmark's short name: of a file without directory and ending, of a source without its slice."""
    return Path(benchmark).stem.split("[")[0].removesuffix("_40").removesuffix("_test_200")


def main(output: str, *paths: str) -> None:
    """Draws all rows of the files: a group of bars per benchmark, one bar per mode."""
    rows = [row for path in paths for row in json.loads(Path(path).read_text())["results"]]
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    modes = [mode for mode in COLOURS if any(row["mode"] == mode for row in rows)]
    speedup = {(row["benchmark"], row["mode"]): row["speedup"] for row in rows}
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    width = 0.8 / len(modes)
    for m, mode in enumerate(modes):
        places = [i + (m - (len(modes) - 1) / 2) * width for i in range(len(benchmarks))]
        heights = [speedup.get((benchmark, mode), 0) for benchmark in benchmarks]
        bars = axes.bar(places, heights, width, label=NAMES[mode], color=COLOURS[mode])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="#555", linewidth=0.8)
    axes.set_xticks(range(len(benchmarks)), [name(benchmark) for benchmark in benchmarks])
    axes.set_ylabel("speedup over plain decoding")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(modes), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
