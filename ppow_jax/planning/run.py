"""Plans a program: finds devices and configs, builds and compiles it, and searches for the largest batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ppow_jax import progress, sharding
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.models import platforms, precision
from ppow_jax.models.config import ModelConfig
from ppow_jax.planning import plan as planning
from ppow_jax.planning import programs, published, topology
from ppow_jax.planning.chips import Chip
from ppow_jax.planning.settings import PlanSettings
from ppow_jax.speculation.settings import chain, tree


def plan(settings: PlanSettings) -> dict[str, Any]:
    """The plan as the dictionary that --output writes (docs/plans.md)."""
    with progress.activity("looking for the devices; those of this machine are measured"):
        devices, chip = topology.find(settings.topology)
    policy = precision.of_flag(settings.precision, settings.dtype)
    with precision.use(policy), platforms.use(None if settings.topology == topology.LOCAL else "tpu"):
        return _plan(settings, devices, chip)


def _plan(settings: PlanSettings, devices: list[Any], chip: Chip) -> dict[str, Any]:
    config = published.read(settings.target)
    mesh = sharding.make_mesh(MeshShape.parse(settings.mesh), devices)
    shape = sharding.shape_of(mesh)
    settings.check_rows(shape)

    def compiled(batch_size: int):
        sized = dataclasses.replace(settings, batch_size=batch_size)
        with progress.activity(f"compiling the {settings.program} program for {batch_size} rows"):
            program = build(sized, config, mesh)
            return program, planning.compile_program(program, mesh, chip)

    program, outcome = compiled(settings.batch_size)
    result = planning.describe(program, outcome, chip, settings.batch_size, shape.rows)
    if settings.topology == topology.LOCAL:
        result["note"] = result["note"].replace("published peaks", "peaks measured on this machine")
    if settings.search:
        result["largest_batch"] = search(result, settings.batch_size, shape.rows, lambda n: compiled(n)[1].fits)
    if settings.program == "decode" and result["step_seconds_roofline"]:
        rows_per_second = settings.batch_size / result["step_seconds_roofline"]
        result |= {"tau": settings.tau, "tokens_per_second_roofline": settings.tau * rows_per_second}
    named = {name: getattr(settings, name) for name in ("target", "topology", "program", "batch_size")}
    return named | {"mesh": str(shape), "devices": len(devices), "chip": dataclasses.asdict(chip)} | result


def build(settings: PlanSettings, config: ModelConfig, mesh: jax.sharding.Mesh) -> programs.Program:
    """The program that --program names, with its abstract arguments."""
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


def search(result: dict[str, Any], batch: int, parts: int, fits: Callable[[int], bool]) -> int:
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
