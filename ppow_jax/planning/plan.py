"""Compiles a program for devices that may not be available, and reports memory, traffic and minimum time."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from ppow_jax.planning import hlo
from ppow_jax.planning.chips import Chip
from ppow_jax.planning.counting import Counts, count
from ppow_jax.planning.programs import Program

NOTE = "a plan from the compiled program and published peaks, not a measurement"
USABLE = 0.98  # share of a chip's memory; the rest is reserved by the system
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """fits: True if XLA could place the program. used: bytes of a device's memory, also if that is too much.
    temporaries: those that hold neither arguments nor results. counts: None if it does
    not fit. seconds: compilation time.
    """

    fits: bool
    used: int
    temporaries: int | None
    counts: Counts | None
    seconds: float


def compile_program(program: Program, mesh: jax.sharding.Mesh, chip: Chip) -> Compiled:
    """Compiles for the mesh's devices. XLA's own memory check decides whether the program fits; for a machine whose
    memory it does not know (`local`), the chip's size does.
    """
    begin = time.perf_counter()
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        used = out_of_memory(str(error))
        if used is None:
            raise
        return Compiled(False, used, None, None, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    m = compiled.memory_analysis()
    used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    used += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    counts = count(hlo.parse(compiled.as_text()), program.rounds)
    return Compiled(used <= chip.memory, used, m.temp_size_in_bytes, counts, seconds)


def out_of_memory(message: str) -> int | None:
    """Bytes that a program would have used, from XLA's error message; None for other errors.

    >>> out_of_memory("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
    22011707392
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings that are stored on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Minimum seconds of a step by each limit; a step takes the longest of them if all overlap perfectly.

    compute: all matrix products at the bfloat16 peak. memory: all traffic at the full bandwidth. network: all messages
    around rings along one axis of the torus.
    """

    compute: float
    memory: float
    network: float

    @classmethod
    def of(cls, counts: Counts, chip: Chip) -> "Roofline":
        """Limits computed from the counts of one device's step."""
        return cls(counts.flops / chip.flops, counts.bytes / chip.bandwidth, counts.sent_bytes / chip.ring)

    @property
    def seconds(self) -> float:
        """Minimum time of a step."""
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """The limit that takes the longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def largest_batch(used: int, fixed: int, batch: int, parts: int, chip: Chip) -> int:
    """Number of rows that would fit if all memory but `fixed` bytes grows with them; a multiple of `parts`, 0 if none.

    used: bytes of a device at `batch` rows. Buffers that do not grow are counted as growing, so this is a lower bound.
    """
    room = chip.memory * USABLE - fixed
    per_row = max(used - fixed, 1) / batch
    return max(0, int(room / per_row) // parts * parts)


def describe(program: Program, compiled: Compiled, chip: Chip, batch: int, parts: int) -> dict[str, Any]:
    """The plan written to `--output`, see docs/plans.md for its keys. parts: shards of rows. batch: rows of a step."""
    kinds = {kind: bytes_per_device(tree) for kind, tree in program.kinds.items()}
    fixed = sum(kinds.get(kind, 0) for kind in ("target", "drafter", "optimizer"))
    kinds["temporaries"] = compiled.used - sum(kinds.values())
    result: dict[str, Any] = {
        "note": NOTE,
        "fits": compiled.fits,
        "hbm_per_device_bytes": int(chip.memory),
        "hbm_used_bytes": compiled.used,
        "hbm_used_bytes_by_kind": kinds,
        "step": program.step,
        "tokens_per_step": program.tokens,
        "largest_batch_estimate": largest_batch(compiled.used, fixed, batch, parts, chip),
        "compile_seconds": round(compiled.seconds, 1),
    }
    counts = compiled.counts
    if counts is None:
        keys = ("flops", "bytes_accessed", "collective_bytes", "step_seconds_roofline", "tokens_per_second_roofline")
        return result | dict.fromkeys(keys) | {"collectives": []}
    roofline = Roofline.of(counts, chip)
    return result | {
        "flops": counts.flops,
        "bytes_accessed": counts.bytes,
        "collective_bytes": counts.sent_bytes,
        "collectives": [dataclasses.asdict(c) for c in counts.collectives],
        "loops_of_unknown_length": counts.unknown_loops,
        "flops_per_byte": counts.flops / max(counts.bytes, 1),
        "chip_flops_per_byte": chip.intensity,
        "compute_seconds": roofline.compute,
        "memory_seconds": roofline.memory,
        "network_seconds": roofline.network,
        "limited_by": roofline.limit,
        "step_seconds_roofline": roofline.seconds,
        "tokens_per_second_roofline": program.tokens / roofline.seconds,
    }
