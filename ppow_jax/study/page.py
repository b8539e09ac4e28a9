"""Markdown page of a study: the comparison, the result, and each claim of the paper beside the finding."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

Row = Mapping[str, Any]


def markdown(study: Mapping[str, Any], table: str, plots: Sequence[str]) -> str:
    """The page as Markdown. table: the summary. plots: names of files beside it."""
    s, arms = study["settings"], {row["arm"]: row for row in study["arms"]}
    seeds = len(study["seeds"])
    parts = [
        _opening(study["compared_in"], arms),
        f"Target {s['target']}, {s['ppow_steps']} steps of each arm from one drafter, {seeds} seeds,"
        f" windows of {s['window']}. Compared on {study['test_answers']} answers ({study['test_tokens']} tokens) that"
        " nothing was trained or chosen on,"
        f" in mode {study['compared_in']}, rounds replayed exactly. Device: {study['device']}, {study['precision']}.",
        f"Intervals are 95 %, by bootstrap over answers and seeds, paired where arms are compared. tau: tokens per"
        " verification. Speedup by costs: computed from tau and the measured costs of drafting and "
        f"verifying; a draft step costs {study['costs']['step']:.3f} plain steps.",
        table,
        "## The claims of the paper",
        _claims(arms),
        "## Arms",
        tabulate(
            [[row["arm"], row["about"], f"{row['rate']:g}" if row["rate"] else "-"] for row in study["arms"]],
            ["arm", "what it is", "learning rate"],
            tablefmt="github",
            disable_numparse=True,
        ),
        "## tau by mode, and its paired difference to cst",
        _by_mode(study["arms"]),
    ]
    settings = settings_table(study["arms"])
    if settings:
        parts += ["## Settings, each compared with the first arm of its name", settings]
    if any("tau_by_benchmark" in row for row in study["arms"]):
        parts += ["## Decoded benchmarks", _decoded(study["arms"])]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _opening(mode: str, arms: Mapping[str, Row]) -> str:
    """The finding in a sentence."""
    best = max(arms.values(), key=lambda row: row["tau"]["mean"])
    tau = {name: f"{row['tau']['mean']:.2f}" for name, row in arms.items()}
    name = best["arm"]
    text = f"The highest acceptance length ({mode}) is that of {name}, {tau[name]} tokens per verification"
    if name == "ppow" or "ppow" not in arms:
        return f"{text}."
    differences = [("its start", "paired_difference_to_start"), ("cst", "paired_difference_to_cst")]
    found = [
        "{mean:+.3f} against {name} (95 % interval {low:+.3f} to {high:+.3f})".format(name=name, **arms["ppow"][key])
        for name, key in differences
        if key in arms["ppow"]
    ]
    return f"{text}; ppow has {', '.join([tau['ppow'], *found])}."


# Claims of the paper (2605.14978): claim, the better arm, the worse one, its range of the ratio if it gives one.
CLAIMS = (
    ("PPOW raises tau over EAGLE-3 (by 5.1 to 7.5 %)", "ppow", "eagle3", (1.051, 1.075)),
    ("PPOW beats continued supervised training (CST)", "ppow", "cst", None),
    ("R_dist helps: PPOW without it is worse", "ppow", "ppow_no_rdist", None),
    ("ADAW helps: PPOW without it is worse", "ppow", "ppow_no_adaw", None),
    ("Both help: PPOW without both is worse", "ppow", "ppow_neither", None),
    ("CST rises a little over EAGLE-3", "cst", "eagle3", None),
)


def _claims(arms: Mapping[str, Row]) -> str:
    """Each claim with the evidence from the arms; claims with missing arms are left out."""
    rows = []
    for claim, better, worse, claimed in CLAIMS:
        if better in arms and worse in arms:
            ratio = arms[better]["paired_ratios"][worse]
            found = f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            rows.append([claim, f"{better} / {worse}", found, verdict(ratio, claimed)])
    return tabulate(rows, ["claim", "arms", "ratio of tau", "verdict"], tablefmt="github", disable_numparse=True)


def verdict(ratio: Mapping[str, float], claimed: tuple[float, float] | None) -> str:
    """Verdict on a claim. ratio: paired, with its interval. claimed: the range that the paper gives, if any."""
    if ratio["high"] < 1:
        return "does not hold"
    if ratio["low"] <= 1:
        return "within noise"
    if claimed and (ratio["high"] < claimed[0] or ratio["low"] > claimed[1]):
        return "holds, differs in size"
    return "holds"


def _by_mode(rows: Sequence[Row]) -> str:
    """tau of every mode, and the paired difference to cst."""
    modes = list(rows[0]["tau_by_mode"])
    heads = ["arm", *(head for mode in modes for head in (mode, "minus cst"))]
    table = [[row["arm"], *(cell for mode in modes for cell in _in_mode(row, mode))] for row in rows]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True)


def _in_mode(row: Row, mode: str) -> tuple[str, str]:
    difference = row.get("paired_difference_to_cst_by_mode", {}).get(mode)
    found = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference) if difference else "-"
    return f"{row['tau_by_mode'][mode]['mean']:.3f}", found


def settings_table(rows: Sequence[Row]) -> str:
    """The arms with the same name before the colon, such as ppow and ppow:eta=1: ratios of tau to the first of them."""
    first: dict[str, str] = {}
    table = []
    for row in rows:
        name, _, changes = row["arm"].partition(":")
        base = first.setdefault(name, row["arm"])
        if base != row["arm"]:
            ratio = "{mean:.3f} ({low:.3f} to {high:.3f})".format(**row["paired_ratios"][base])
            flat = f"{row['flat_groups']:.2f}" if row["flat_groups"] is not None else "-"
            table.append([base, changes.replace(";", ", "), ratio, flat])
    heads = ["arm", "changed", "ratio of tau", "flat groups"]
    return tabulate(table, heads, tablefmt="github", disable_numparse=True) if table else ""


def _decoded(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("tau_by_benchmark", {})))
    table = [
        [row["arm"], *(f"{row['tau_by_benchmark'][n]:.2f}, {row['speedup_by_benchmark'][n]:.2f}" for n in names)]
        for row in rows
        if "tau_by_benchmark" in row
    ]
    return tabulate(table, ["tau, speedup", *names], tablefmt="github", disable_numparse=True)
