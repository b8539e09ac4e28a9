import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.evaluation import plots, report


def row(benchmark: str, tau: float, **changes) -> dict:
    return {
        "benchmark": benchmark,
        "mode": "chain",
        "temperature": 0.0,
        "batch_size": 1,
        "window": 3,
        "tau": tau,
        "tokens_per_second": 61.25,
        "baseline_tokens_per_second": 40.0,
        "speedup": 1.5,
        "identical": 20,
        "total": 20,
        "verify_cost_ratio": 1.1,
        "gamma": 0.0712,
        "acceptance_by_position": [0.7, 0.6, None],
        "marginal_acceptance_by_position": [0.7, 0.42, 0.0],
        "accepted_histogram": [3, 2, 1, 0],
    } | changes


@pytest.fixture
def results() -> dict:
    arms = [
        report.arm("supervised", [row("gsm8k", 2.0), row("mt_bench", 1.5)]),
        report.arm("ppow", [row("gsm8k", 2.5), row("mt_bench", 2.0, temperature=1.0)]),
    ]
    settings = {"window": 3, "target": "tiny"}
    return {"schema": 1, "device": "cpu", "precision": "float32", "versions": report.versions(),
            "settings": settings, "arms": arms}  # fmt: skip


def is_png(path, at_least: int = 10_000) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > at_least


def test_arm_means(results):
    assert [(a["name"], a["mean_tau"], a["mean_speedup"]) for a in results["arms"]] == [
        ("supervised", 1.75, 1.5),
        ("ppow", 2.25, 1.5),
    ]


def test_rows_without_a_verification_do_not_count():
    nothing = row("empty", math.nan, num_verifications=0, speedup=0.0)  # plain decoding had tokens, the other none
    read_back = row("empty", None, speedup=None)
    made = report.arm("x", [nothing, row("gsm8k", 2.0), row("mt_bench", 3.0, speedup=math.nan), read_back])
    assert (made["mean_tau"], made["mean_speedup"]) == (2.5, 1.5) and len(made["results"]) == 4
    alone = report.arm("x", [nothing])
    assert math.isnan(alone["mean_tau"]) and math.isnan(alone["mean_speedup"])
    assert report.console_table([nothing], {"tau": "tau", "speedup": "speedup"}).split()[-2:] == ["-", "0.00"]


def test_console_table_formats_and_leaves_out_what_no_row_has():
    table = report.console_table([row("gsm8k", 2.0), row("mt_bench", math.pi) | {"gamma": None}])
    lines = table.splitlines()
    assert len(lines) == 4 and "drafter" not in lines[0]
    assert lines[2].split() == "gsm8k chain 0 1 3 2.00 1.50 61.2 40.0 20/20 0.071 1.10".split()
    assert lines[3].split()[5] == "3.14" and lines[3].split()[-2] == "-"


def test_ways_to_speculate_are_told_apart(tmp_path, results):
    small, large = ({"branch": 4, "depth": 3, "nodes": nodes} for nodes in (8, 15))
    rows = [
        row(benchmark, tau, mode=mode, tree=tree, tau_interval=[tau - 0.1, tau + 0.1], speedup_interval=None)
        for benchmark in ("gsm8k", "mt_bench")
        for mode, tree, tau in (("chain", None, 2.0), ("tree", small, 2.5), ("tree", large, 3.0))
    ]
    arms = report.arms_by_mode(rows)
    assert [(a["name"], a["mean_tau"]) for a in arms] == [
        ("chain 3", 2.0),
        ("tree 3 (8 nodes)", 2.5),
        ("tree 3 (15 nodes)", 3.0),
    ]
    lines = report.console_table(rows, width=150).splitlines()
    assert "3 (15 nodes)" in lines[4] and "2.90-3.10" in lines[4] and lines[2].split()[8] == "-"
    plots.plot_results(tmp_path / "ways.png", results | {"arms": arms})
    assert is_png(tmp_path / "ways.png")
    labels = {plots._label(row, arms) for a in arms for row in a["results"]}
    assert labels == {"gsm8k", "mt_bench"}  # the bars of a benchmark stand side by side


def test_json_is_plain_and_valid(tmp_path, results):
    values = {"tau": np.float32(2.5), "gamma": float("nan"), "histogram": jnp.arange(3)}
    results["arms"][0]["results"][0] |= values
    report.write_json(tmp_path / "report.json", results)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    first = read["arms"][0]["results"][0]
    assert (first["tau"], first["gamma"], first["histogram"]) == (2.5, None, [0, 1, 2])
    assert read["schema"] == 1 and read["versions"]["jax"].startswith("0.")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_markdown_holds_tables_plots_and_settings(tmp_path, results):
    plot = tmp_path / "plots" / "results.png"
    report.write_markdown(tmp_path / "report.md", results, [plot])
    text = (tmp_path / "report.md").read_text()
    image = "![results](plots/results.png)"
    for part in ("| supervised | gsm8k", "| ppow", "2.25", image, "--window=3", "jax 0."):
        assert part in text
    told = {"headline": "ppow is faster.", "command": "python -m experiments.train \\\n  --window=3"}
    report.write_markdown(tmp_path / "report.md", results | told, [plot])
    text = (tmp_path / "report.md").read_text()
    assert text.splitlines()[0] == "ppow is faster." and f"```\n{told['command']}\n```" in text


def test_wide_tables_are_cut_to_the_width():
    spread = {"tau_interval": [1.9, 2.1], "speedup_interval": [1.4, 1.6], "num_prompts": 20}
    tree = {"branch": 3, "depth": 3, "nodes": 15}
    rows = [row(name, 2.0, arm=arm, tree=tree, **spread) for name in ("gsm8k", "mt_bench") for arm in ("start", "ppow")]
    for style in ("simple", "github"):
        above, *tables = report.console_table(rows, style=style).split("\n\n")
        assert above == "In all rows: mode chain, temp. 0, batch 1, window 3 (15 nodes)."
        assert all(len(line) <= report.WIDTH for table in tables for line in table.splitlines())
        assert all(table.count("gsm8k") == table.count("start") == 2 for table in tables)
        headings = [word for table in tables for word in table.splitlines()[0].replace("|", " ").split()]
        for key, heading in report.COLUMNS.items():
            if key in rows[0] and heading not in ("mode", "temp.", "batch", "window"):
                assert heading.split()[0] in headings
        first = tables[0].splitlines()[0]
        assert first.index("tau") < first.index("95 %") < first.index("speedup")  # an interval follows its value


@pytest.mark.parametrize("prompts, batch, shown", [(1, 1, "1 prompt"), (4, 1, "4 prompts"), (20, 8, "3 batches")])
def test_intervals_over_few_prompts_are_not_shown(prompts, batch, shown):
    few = row("gsm8k", 2.24, num_prompts=prompts, batch_size=batch, tau_interval=[2.24, 2.24])
    table = report.console_table([few], {"tau": "tau", "tau_interval": "95 %"})
    assert table.splitlines()[2].split(maxsplit=1) == ["2.24", shown]
    enough = few | {"num_prompts": 5 * batch, "tau_interval": [2.1, 2.4]}
    assert "2.10-2.40" in report.console_table([enough], {"tau_interval": "95 %"})


def test_headline_of_one_arm_names_it():
    few = row("gsm8k", 2.0, num_prompts=4, speedup_interval=[1.5, 1.5])
    text = report.headline([report.arm("start", [few])])
    assert text == (
        "Decoding with start is 1.50 times as fast as plain decoding (4 prompts: too few for an interval); "
        "20 of 20 outputs are identical to plain decoding's."
    )


def test_opening_names_the_fastest_mode():
    rows = [row("gsm8k", 2.0), row("mt_bench", 3.0), row("gsm8k", 2.5, mode="tree", speedup=1.2)]
    assert report.opening(rows) == (
        "Decoding in mode chain, window 3, the fastest of 2 measured modes and sizes, gains 2.50 tokens per "
        "verification and is 1.50 times as fast as plain decoding on average over gsm8k, mt_bench at temperature 0, "
        "batch 1."
    )
    assert report.opening([row("gsm8k", math.nan)]) == "No token was drafted on gsm8k at temperature 0, batch 1."


def test_plots_of_every_shape_of_report(tmp_path, results):
    plots.plot_results(tmp_path / "two.png", results)
    plots.plot_results(tmp_path / "none.png", results | {"arms": [report.arm("x", [row("a", 1.0)])]})
    bare = {"benchmark": "a", "tau": 1.0, "speedup": 1.0}
    plots.plot_results(tmp_path / "bare.png", results | {"arms": [report.arm("x", [bare])]})
    empty = [report.arm("x", [row("a", None, speedup=math.nan)]), report.arm("y", [row("a", 2.0)])]
    plots.plot_results(tmp_path / "empty.png", results | {"arms": empty})
    plots.plot_results(tmp_path / "nothing.png", results | {"arms": empty[:1]})
    assert all(is_png(path) for path in tmp_path.iterdir())


def test_spikes_do_not_set_the_scale():
    steps = np.arange(1, 101)
    decay = 1 + 9 / steps  # steep at first, without a spike
    assert plots.spike_limits(decay) is None and plots.spike_limits(np.ones(3)) is None
    spiked = decay.copy()
    spiked[60] = 500.0
    low, high, number = plots.spike_limits(np.append(spiked, math.nan))
    assert number == 1 and low < decay.min() and decay.max() < high < 12


def test_curves_mark_the_start(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    rows = [{"step": i, "stage": "ppow_held_out", "held_out_tau_sim": 2 + i / 100} for i in (0, 50, 100)]
    plots.plot_curves(tmp_path / "curves.png", rows, ("held_out_tau_sim",))
    ax = drawn[0].axes[0]
    assert list(ax.lines[0].get_ydata()) == [2.0, 2.0] and [text.get_text() for text in ax.texts] == ["start"]


def test_curves(tmp_path):
    rows = [{"step": i, "stage": "supervised", "loss": 9 / i} for i in range(1, 101)]
    rows += [{"step": i, "stage": "supervised", "tau_sim": 1.0} for i in (50, 100)]
    rows += [{"step": i, "stage": "ppow", "loss": math.nan, "reward": 1.0} for i in range(1, 9)]
    rows += [{"step": 8, "stage": "ppow", "tau_sim": 1.5}]
    plots.plot_curves(tmp_path / "curves.png", rows)
    plots.plot_curves(tmp_path / "empty.png", [])
    assert is_png(tmp_path / "curves.png") and is_png(tmp_path / "empty.png", 100)
