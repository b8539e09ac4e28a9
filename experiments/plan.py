"""Plans a run for devices that are not available: compiles its programs, and reports memory and a lower bound of time.

    python -m experiments.plan --target=llama-3.1-8b --topology=v5e:4x4 --mesh=data:4,tensor:4 --program=supervised \\
        --output=plan.json

It accepts the flags of `experiments.train`, so --flagfile=FILE plans that run. It needs no weights: --target may be a
config.json. The result is an estimate, not a measurement: memory is what XLA allocates, time is a lower bound from the
chip's published peaks. docs/plans.md explains every figure. TPU topologies need libtpu: pip install 'ppow_jax[plan]'.
"""

import dataclasses
import json
from typing import Any, NoReturn

from ppow_jax import cli, files
from ppow_jax.flags import field
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.training.settings import TrainSettings

PROGRAMS = ("supervised", "ppow", "decode", "prefill")
GIB = 1 << 30
DEFAULTS = {
    "target": "llama-3.1-8b",
    "batch_size": 16,
    "row_length": 2048,
    "max_anchors": 1024,
    "draft_vocab_size": 32000,
    "gamma": 0.12,
    "scan_layers": True,
}


@dataclasses.dataclass(frozen=True)
class Settings(TrainSettings):
    """The flags of this program: those of a training run, and what to plan."""

    topology: str = field("local", "local, or CHIP:GRID such as v5e:4x4, v5p:2x2x2.", group="Plan")
    program: str = field("supervised", "The program to compile.", choices=PROGRAMS, group="Plan")
    search: bool = field(False, "Find the largest batch by compiling, in at most three trials.", group="Plan")
    output: str | None = field(None, "JSON file for the plan.", group="Plan")
    compare: tuple[str, ...] = field(
        (), "Instead of planning, print a table of these plans (JSON files).", group="Plan"
    )
    plot: str | None = field(
        None, "With --compare: PNG file, bytes sent per device over the number of devices.", group="Plan"
    )
    prompt_tokens: int = field(512, "Tokens per prompt.", low=1, group="Plan, decoding")
    new_tokens: int = field(
        512, "Tokens per answer; caches have room for prompt and answer.", low=1, group="Plan, decoding"
    )
    tree_depth: int = field(6, "Levels of the tree; 0: a chain of --window tokens.", low=0, group="Plan, decoding")
    tree_branch: int = field(10, "Nodes expanded per level, and children per node.", low=1, group="Plan, decoding")
    tree_nodes: int = field(59, "Verified nodes of the tree.", low=1, group="Plan, decoding")
    cache_dtype: str = field(
        "bfloat16", "Dtype of the target's cache.", choices=("bfloat16", "float32"), group="Plan, decoding"
    )
    tau: float = field(3.0, "Assumed tokens gained per round, for token/s of decoding.", low=1, group="Plan, decoding")


def main(settings: Settings) -> None:
    """Compiles, prints and writes the plan."""
    cli.check_output("--output", settings.output)
    if settings.compare:
        compare(settings)
        return
    result = plan(settings)
    print(report(result))
    if settings.output:
        files.write_atomic(settings.output, json.dumps(result, indent=1) + "\n")
        print(f"plan: {settings.output}")


def compare(settings: Settings) -> None:
    """Prints plans that were written before as a table, and plots them."""
    from ppow_jax.planning import tables

    cli.check_output("--plot", settings.plot)
    plans = [tables.read(path) for path in settings.compare]
    print(tables.table(plans))
    if settings.plot:
        tables.plot(settings.plot, plans)
        print(f"plot: {settings.plot}")


def plan(settings: Settings) -> dict[str, Any]:
    """What --output keeps (docs/plans.md)."""
    from ppow_jax.planning import topology

    devices, chip = topology.find(settings.topology)

    from ppow_jax import sharding
    from ppow_jax.planning import plan as planning
    from ppow_jax.planning import published

    config = published.read(settings.target)
    mesh = sharding.make_mesh(MeshShape.parse(settings.mesh), devices)
    shape = sharding.shape_of(mesh)
    settings.check_rows(shape)

    def compiled(batch_size: int):
        sized = dataclasses.replace(settings, batch_size=batch_size)
        program = build(sized, config, mesh)
        return program, planning.compile_program(program, mesh, chip)

    program, outcome = compiled(settings.batch_size)
    result = planning.describe(program, outcome, chip, settings.batch_size, shape.rows)
    if settings.search:
        result["largest_batch"] = search(result, settings.batch_size, shape.rows, lambda n: compiled(n)[1].fits)
    if settings.program == "decode" and result["step_seconds_roofline"]:
        rows_per_second = settings.batch_size / result["step_seconds_roofline"]
        result |= {"tau": settings.tau, "tokens_per_second_roofline": settings.tau * rows_per_second}
    named = {name: getattr(settings, name) for name in ("target", "topology", "program", "batch_size")}
    return named | {"mesh": str(shape), "devices": len(devices), "chip": dataclasses.asdict(chip)} | result


def build(settings: Settings, config, mesh):
    """The program that --program names, with its abstract arguments."""
    from ppow_jax.planning import programs
    from ppow_jax.speculation.settings import chain, tree

    models = programs.models(settings, config, mesh, settings.scan_layers)
    if settings.program in ("supervised", "ppow"):
        return programs.training(settings.program, settings, models, mesh)
    speculation = chain(settings.window)
    if settings.tree_depth:
        speculation = tree(settings.tree_branch, settings.tree_depth, settings.tree_nodes)
    return programs.decoding(
        settings,
        models,
        mesh,
        speculation,
        settings.prompt_tokens,
        settings.new_tokens,
        settings.cache_dtype,
        prefill=settings.program == "prefill",
    )


def search(result: dict[str, Any], batch: int, parts: int, fits) -> int:
    """The largest batch that compiled, of at most three tries from the estimate on."""
    best = batch if result["fits"] else 0
    guess = result["largest_batch_estimate"]
    for _ in range(3):
        if guess <= best or guess < parts:
            break
        if fits(guess):
            best, guess = guess, guess * 5 // 4 // parts * parts
        else:
            guess = (best + guess) // 2 // parts * parts
    return best


def report(result: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [
        f"{result['target']}, {result['program']}, {result['batch_size']} rows on {result['topology']}"
        f" ({result['devices']} devices, --mesh={result['mesh']})",
        f"This is {result['note']}.",
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


def command_line() -> NoReturn:
    """`ppow-plan`, and `python -m experiments.plan`."""
    cli.run(main, Settings, DEFAULTS)


if __name__ == "__main__":
    command_line()
