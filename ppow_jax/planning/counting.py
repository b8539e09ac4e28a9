"""Work of a compiled program on one device: operations of its matrix products, traffic with main memory, messages.

    flops: 2 per multiply-add of matrix products and convolutions; all other operations are negligible.
    bytes: what instructions read from and write to main memory. Values that XLA keeps on the chip between two
      instructions cost nothing here, a slice costs its own size, an update in place the size of the update.
    messages: see `Collective`.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from ppow_jax.planning.hlo import Computation, Instruction, Module, Rounds, Shape

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_FREE = {  # move nothing, or are counted elsewhere: an asynchronous operation counts where it starts
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "iota", "opt-barrier", "add-dependency", "domain", "infeed", "outfeed",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication among groups of `group` devices, `count` times a step.

    payload_bytes: total size of the results. sent_bytes: bytes that a device sends for them around a ring, the least
    that any algorithm needs: of n devices and b bytes of the whole array, (n-1)/n b for all-gather or reduce-scatter,
    twice that for all-reduce, (n-1)/n of its own part for all-to-all, b for a permutation.
    """

    kind: str
    group: int
    count: int
    payload_bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one step on one device. unknown_loops: loops that were counted as one round."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends to others."""
        return sum(c.sent_bytes for c in self.collectives)


def count(module: Module, assumed: Rounds = lambda loop: None) -> Counts:
    """Walks the program as it runs and counts. assumed: rounds of loops of unknown length, see `Module.executed`."""
    flops = moved = 0.0
    messages: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    spread: set[str] = set()  # channels of collectives that span several fusions, also in loops: they count once
    for computation, instruction, times in module.executed(assumed):
        flops += times * _flops(module, computation, instruction)
        moved += times * _bytes(module, computation, instruction)
        for inner, collective in _collectives(module, computation, instruction):
            channel = collective.attribute("channel_id") or collective.name
            if inner is not computation:
                if channel in spread:
                    continue
                spread.add(channel)
                moved += times * (sum(map(_main, _shapes_of(inner, collective))) + _main(collective.shapes))
            kind, group, payload, sent = _message(module, collective, instruction)
            for i, value in enumerate((1, payload, sent)):
                messages[kind, group][i] += times * value
    found = tuple(Collective(kind, group, *map(round, sums)) for (kind, group), sums in sorted(messages.items()))
    loops = [
        c for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"
        if module.trip_count(c, i) is None
    ]  # fmt: skip
    return Counts(flops, moved, found, len(loops))


def _shapes_of(computation: Computation, instruction: Instruction) -> list[tuple[Shape, ...]]:
    return [computation.instructions[name].shapes for name in instruction.operands]


def _inner(module: Module, instruction: Instruction) -> Computation | None:
    """The computation of a fusion."""
    return module.computations[instruction.called("calls")] if instruction.opcode == "fusion" else None


# Matrix products.


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    if inner := _inner(module, instruction):
        return sum(_flops(module, inner, i) for i in inner.instructions.values())
    if instruction.opcode == "dot":
        (lhs,), _ = _shapes_of(computation, instruction)[:2]
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        return 2.0 * instruction.shapes[0].size * math.prod(lhs.dims[d] for d in contracted)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "ragged-dot":
        (lhs,), (rhs,) = _shapes_of(computation, instruction)[:2]
        return 2.0 * lhs.size * rhs.dims[-1]
    called = instruction.attribute("custom_call_target") or ""
    if instruction.opcode == "custom-call" and ("matmul" in called or "ppow_product" in called):  # cpu/product.py
        (lhs,), (rhs,) = _shapes_of(computation, instruction)[:2]
        out = instruction.shapes[0]
        batch = math.prod(out.dims[:-2])
        return 2.0 * batch * math.sqrt(lhs.size / batch * (rhs.size / batch) * (out.size / batch))
    if instruction.opcode == "custom-call" and called == "ppow_attention":  # cpu/attention.py
        (q,), *blocks = _shapes_of(computation, instruction)
        return 4.0 * q.size * sum(k.dims[-1] for (k,) in blocks[::3])  # scores and values, for all keys
    return 0.0


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Operations of a convolution. XLA writes products for a TPU as convolutions, and batches of them as dilated
    windows that are mostly padding: only taps that meet values count.
    """
    (lhs,), (rhs,) = _shapes_of(computation, instruction)[:2]
    out = instruction.shapes[0]
    left, right, result = re.split(r"_|->", instruction.attribute("dim_labels"))
    window = instruction.attribute("window") or ""
    spatial = [label for label in result if label.isdigit()]

    def setting(name: str, default: str) -> list[list[int]]:
        found = re.search(rf"\b{name}=([\d_\-x]+)", window)
        parts = found[1].split("x") if found else [default] * len(spatial)
        return [[int(n) for n in part.split("_")] for part in parts]

    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    sizes = zip(*(setting(name, default) for name, default in defaults.items()), strict=True)
    taps = 1
    for label, ((stride,), (low, _), (spread,), (dilate,)) in zip(spatial, sizes, strict=True):
        positions = np.arange(out.dims[result.index(label)])[:, None] * stride - low
        positions = positions + np.arange(rhs.dims[right.index(label)]) * dilate
        last = (lhs.dims[left.index(label)] - 1) * spread
        taps *= int(((positions >= 0) & (positions <= last) & (positions % spread == 0)).sum())
    return 2.0 * out.dims[result.index("b")] * out.dims[result.index("f")] * rhs.dims[right.index("i")] * taps


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


# Traffic with main memory.


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if inner := _inner(module, instruction):
        reads = sum(
            _read(module, inner, number, parameter, computation.instructions[name])
            for name, (number, parameter) in zip(instruction.operands, sorted(inner.parameters.items()), strict=True)
        )
        return reads + _written(module, inner, instruction)
    if opcode.startswith(COLLECTIVES):
        return _main(instruction.shapes[:1]) * 2.0
    if opcode == "copy-start":
        return _main(instruction.shapes[:2])
    if opcode == "slice-start":
        source, part, *_ = instruction.shapes
        return float(part.bytes * ((source.memory == 0) + (part.memory == 0)))
    operands = [_main(shapes) for shapes in _shapes_of(computation, instruction)]
    if opcode in ("slice", "dynamic-slice", "gather"):
        return min(operands[0], instruction.shapes[0].bytes) + _main(instruction.shapes)
    if opcode == "dynamic-update-slice":
        return 2 * _shapes_of(computation, instruction)[1][0].bytes if operands[0] else operands[1]
    if opcode == "scatter":
        return 3 * operands[-1] + sum(operands[1:-1])
    return sum(operands) + _main(instruction.shapes)


def _main(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.memory == 0))


def _read(module: Module, inner: Computation, number: int, parameter: Instruction, source: Instruction) -> float:
    """Bytes of an operand that a fusion reads from main memory: all, or slices, or nothing if it writes in place."""
    whole = _main(source.shapes)
    if not whole:
        return 0.0
    taken = _taken(module, inner, parameter)
    return whole if taken is None else min(whole, taken)


def _taken(module: Module, inner: Computation, source: Instruction) -> float | None:
    """Bytes that slices read from a value within a fusion; None if something reads all of it."""
    total = 0.0
    for user in inner.instructions.values():
        if source.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == source.name:
            total += user.shapes[0].bytes
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == source.name:
            total += 0.0  # in place; the update counts as written
        elif user.opcode in COLLECTIVES or (user.opcode == "tuple" and user.root):
            total += 0.0  # counted by `count`; passed on
        elif user.opcode in ("bitcast", "get-tuple-element"):
            below = _taken(module, inner, user)
            if below is None:
                return None
            total += below
        elif deeper := _inner(module, user):
            parts = [
                _taken(module, deeper, deeper.parameters[i]) for i, o in enumerate(user.operands) if o == source.name
            ]
            if _source(deeper) in [deeper.parameters[i] for i, o in enumerate(user.operands) if o == source.name]:
                parts.append(_taken(module, inner, user))  # hands the value on
            if None in parts:
                return None
            total += sum(parts)
        elif user.opcode not in ("dynamic-slice", "gather", "dynamic-update-slice") or source.shapes[0].dims:
            return None
    return total


def _source(computation: Computation) -> Instruction:
    """The value that a computation returns, apart from its shape."""
    value = computation.root
    while value.opcode == "bitcast":
        value = computation.instructions[value.operands[0]]
    return value


def _written(module: Module, inner: Computation, instruction: Instruction) -> float:
    """Bytes that a fusion writes to main memory: its results, or the updates of those that it changes in place."""
    root = inner.root
    roots = [inner.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(instruction.shapes):
        return _main(instruction.shapes)
    return sum(
        min(shape.bytes, _update(module, inner, value)) for value, shape in zip(roots, instruction.shapes, strict=True)
        if shape.memory == 0
    )  # fmt: skip


def _update(module: Module, inner: Computation, value: Instruction) -> float:
    while value.opcode in ("bitcast", "copy") and value.operands:
        value = inner.instructions[value.operands[0]]
    if value.opcode in COLLECTIVES or value.opcode == "parameter":  # counted by `count`; passed on
        return 0.0
    if value.opcode == "dynamic-update-slice":
        return inner.instructions[value.operands[1]].shapes[0].bytes
    if value.opcode == "scatter":  # read, added to, written
        return 2.0 * inner.instructions[value.operands[-1]].shapes[0].bytes
    if deeper := _inner(module, value):
        return _update(module, deeper, deeper.root) if deeper.root.opcode != "tuple" else math.inf
    return math.inf


# Communication.


def _collectives(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[Computation, Instruction]]:
    """The instruction itself, or the collectives in a fusion, each with its computation."""
    if inner := _inner(module, instruction):
        return [found for i in inner.instructions.values() for found in _collectives(module, inner, i)]
    return [(computation, instruction)] if instruction.opcode.removesuffix("-start") in COLLECTIVES else []


def _message(module: Module, collective: Instruction, around: Instruction) -> tuple[str, int, int, int]:
    """(kind, devices of a group, bytes of the result, bytes sent)."""
    kind = collective.opcode.removesuffix("-start")
    shapes = collective.shapes
    if collective.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = [s for s in shapes if s.dims or s.kind[0] != "u"]
        shapes = tuple(arrays[len(arrays) // 2 :])  # operands, then results
    payload = sum(shape.bytes for shape in shapes)
    n = group_size(collective, module.devices)
    if kind == "all-reduce" and around is not collective and "all-reduce-scatter" in (around.called("calls") or ""):
        kind, payload = "reduce-scatter", payload // n  # the form in a TPU program
    if kind == "all-reduce":
        sent = 2 * payload * (n - 1) // n
    elif kind == "reduce-scatter":
        sent = payload * (n - 1)
    elif kind == "collective-permute":
        sent = payload
    else:
        sent = payload * (n - 1) // n
    return kind, n, payload, sent


def group_size(collective: Instruction, devices: int) -> int:
    """Number of devices in one group of a collective.

    Groups are written as `{{0,1},{2,3}}`, `[4,2]<=[8]` (four groups of two) or `mesh['x'=4,'y'=2] {'y'}`.
    """
    if collective.attribute("source_target_pairs"):
        return devices
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", collective.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    groups = collective.attribute("replica_groups") or ""
    if groups.startswith("["):
        return int(re.match(r"\[(?:\d+,)*(\d+)\]", groups)[1])
    first = re.search(r"\{([\d,]+)\}", groups)
    return len(first[1].split(",")) if first else devices
