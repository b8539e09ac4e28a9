"""Compiling and timing one program."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from ppow_jax.bench.work import Work
from ppow_jax.planning.chips import Chip

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Settings shared by all measurements. chip: peaks of one of the `devices` devices. repetitions: timed runs, of
    which the median counts.
    """

    chip: Chip
    devices: int
    repetitions: int

    def row(self, part: str, seconds: float, work: Work | None, **more: Any) -> Row:
        """A result: `seconds` per step, and the shares of the devices' peaks that `work` amounts to."""
        row: Row = {"part": part} | more | {"seconds": seconds}
        if work is not None:
            row |= {"flops": work.flops, "mfu": work.flops / seconds / (self.chip.flops * self.devices)}
        if work is not None and work.bytes:
            share = work.bytes / seconds / (self.chip.bandwidth * self.devices)
            row |= {"bytes": work.bytes, "bandwidth_share": share}
        return row


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. seconds: of compilation. memory: bytes of one device for arguments, results, temporaries and
    code; None where XLA does not tell.
    """

    call: Callable[..., Any]
    seconds: float
    memory: int | None

    def columns(self) -> Row:
        """Columns of a result."""
        return {"compile_seconds": self.seconds, "program_bytes": self.memory}


def compiled(function: Any, *arguments: Any, **static: Any) -> Compiled:
    """Lowers and compiles a jitted function for these arguments."""
    begin = time.perf_counter()
    program = function.lower(*arguments, **static).compile()
    seconds = time.perf_counter() - begin
    m = program.memory_analysis()
    memory = None
    if m is not None:
        memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        memory += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Compiled(program, seconds, memory)


def median_seconds(once: Callable[[Any], Any], carry: Any, repetitions: int) -> float:
    """Median time of carry = once(carry), after one run that is not counted."""
    seconds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        carry = jax.block_until_ready(once(carry))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
