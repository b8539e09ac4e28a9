"""Plans as text: one in full, several in a Markdown table, and a plot of message sizes over the number of devices."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ppow_jax import files

GIB = 1 << 30
_NEEDED = ("target", "program", "topology", "mesh", "devices", "fits", "hbm_used_bytes", "collective_bytes")


def read(path: str) -> dict[str, Any]:
    """A plan written by `experiments.plan --output`. Raises UserError for any other file."""
    return files.read_result(path, "a plan", _NEEDED)


def text(result: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [
        f"{result['target']}, {result['program']}, {result['batch_size']} rows on {result['topology']}"
        f" ({result['devices']} devices, --mesh={result['mesh']})",
        f"This is {result['note']}.",
        f"Peaks of the chip: {result['chip']['flops'] / 1e12:.3g} TFLOP/s, {result['chip']['bandwidth'] / 1e9:.3g} GB/s"
        f" ({result['chip']['source']}).",
        "",
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {result['hbm_used_bytes'] / GIB:.2f} GiB of"
        f" {result['hbm_per_device_bytes'] / GIB:.2f} GiB per device",
    ]
    lines += [f"  {kind:<12} {size / GIB:8.3f} GiB" for kind, size in result["hbm_used_bytes_by_kind"].items()]
    lines += [f"largest batch, estimated: {result['largest_batch_estimate']} rows"]
    if "largest_batch" in result:
        lines += [f"largest batch that compiled: {result['largest_batch']} rows"]
    if result["flops"] is None:
        return "\n".join(lines)
    lines += [
        "",
        f"a step ({result['step']}) on one device:",
        f"  compute      {result['flops'] / 1e12:10.4g} TFLOP   {1e3 * result['compute_seconds']:9.3f} ms at the peak",
        f"  memory       {result['bytes_accessed'] / GIB:10.4g} GiB     {1e3 * result['memory_seconds']:9.3f} ms",
        f"  network      {result['collective_bytes'] / GIB:10.4g} GiB     {1e3 * result['network_seconds']:9.3f} ms",
        f"  {result['flops_per_byte']:.3g} FLOP per byte, the chip balances at {result['chip_flops_per_byte']:.3g}",
    ]
    for c in result["collectives"]:
        lines += [
            f"    {c['kind']:<18} among {c['group']:>3}: {c['count']:>5} times, {c['sent_bytes'] / GIB:.4g} GiB sent"
        ]
    per_second = f"{result['tokens_per_second_roofline']:.4g} token/s"
    if "tau" in result:
        per_second += f" if a round gains {result['tau']:g}"
    lines += [
        f"least time of a step: {1e3 * result['step_seconds_roofline']:.3f} ms (limited by {result['limited_by']}),"
        f" {per_second} in all",
    ]
    if result["loops_of_unknown_length"]:
        lines += [f"{result['loops_of_unknown_length']} loops of unknown length were counted as docs/plans.md says"]
    return "\n".join(lines)


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table with a row per plan."""
    return tabulate([_row(plan) for plan in plans], headers="keys", tablefmt="github")


def _row(plan: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "target": plan["target"],
        "program": plan["program"],
        "slice": plan["topology"],
        "mesh": short(plan["mesh"]),
        "rows": plan["batch_size"],
        "fits": "yes" if plan["fits"] else "no",
        "GiB per device": f"{plan['hbm_used_bytes'] / GIB:.1f} of {plan['hbm_per_device_bytes'] / GIB:.0f}",
    }
    if plan["step_seconds_roofline"] is None:
        return row | {"TFLOP": "", "GiB moved": "", "GiB sent": "", "ms at least": "", "limit": ""}
    return row | {
        "TFLOP": f"{plan['flops'] / 1e12:.3g}",
        "GiB moved": f"{plan['bytes_accessed'] / GIB:.3g}",
        "GiB sent": f"{plan['collective_bytes'] / GIB:.3g}",
        "ms at least": f"{1e3 * plan['step_seconds_roofline']:.3g}",
        "limit": plan["limited_by"],
    }


def short(mesh: str) -> str:
    """A mesh without its axes of one device."""
    return ",".join(part for part in mesh.split(",") if not part.endswith(":1")) or "one device"


def plot(path: str, plans: Sequence[Mapping[str, Any]]) -> None:
    """Plots to PNG: bytes that a device sends in a step, over the number of devices, a line per target and program."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=100, layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for plan in plans:
        if plan["collective_bytes"] is not None:
            name = f"{plan['target']}, {plan['program']}"
            lines.setdefault(name, []).append((plan["devices"], plan["collective_bytes"] / GIB))
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({plan["devices"] for plan in plans}), [str(n) for n in ticks])
    axes.set(xlabel="devices", ylabel="GiB sent per device and step", title="Weak scaling, from compiled programs")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
