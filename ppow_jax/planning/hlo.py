"""Parser of a compiled XLA program's text (HLO): instructions with shapes, and trip counts of its loops.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; layers that are scanned over would be
counted as one. Here the program is walked with the trip counts that follow from its loops' conditions.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # all other type names end in their number of bits, such as bf16, f8e4m3fn
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_MEMORY = re.compile(r"S\((\d+)\)")
_MAX_TRIPS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array. memory: its memory space; 0 is the device's main memory, others are on the chip or the host's."""

    kind: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of a layout."""
        bits = _BITS.get(self.kind)
        if bits is None:
            found = re.match(r"[a-z]+(\d+)", self.kind)
            bits = int(found[1]) if found else 0
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """shapes: of the result; a tuple's are flattened. operands: names. rest: attributes as written."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """`name=VALUE` as text: a braced value with its braces, any other up to the comma."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        if not found:
            return None
        begin = found.end()
        if self.rest[begin : begin + 1] == "{":
            return self.rest[begin : _closing(self.rest, begin, "{}") + 1]
        return re.split(r", (?=[\w]+=)", self.rest[begin:], maxsplit=1)[0].strip()

    @property
    def scopes(self) -> str:
        """Scope of the traced program that it comes from, such as `jit(f)/layers/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, name: str) -> str | None:
        """The computation named by an attribute such as `body`."""
        value = self.attribute(name)
        return value.lstrip("%") if value else None


# Trip count of a loop of unknown length; None if it is unknown here too.
Rounds = Callable[[Instruction], float | None]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, operands before users."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction that computes the result."""
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(i.argument): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program of one device. devices: number of devices that run it."""

    entry: str
    computations: Mapping[str, Computation]
    devices: int

    def executed(self, assumed: Rounds = lambda loop: None) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that is run, outside of fusions, with the number of times that it is run.

        A loop of unknown length counts `assumed` times, once if that is None. All branches of a conditional count.
        """
        yield from self._executed(self.entry, 1, assumed)

    def _executed(self, name: str, times: float, assumed) -> Iterator[tuple[Computation, Instruction, float]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                trips: float | None = self.trip_count(computation, instruction)
                if trips is None:
                    trips = assumed(instruction) or 1
                yield from self._executed(instruction.called("body"), times * trips, assumed)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._executed(branch, times, assumed)
            elif instruction.opcode in ("call", "async-start"):
                target = instruction.called("to_apply") or instruction.called("calls")
                yield from self._executed(target, times, assumed)
            else:
                yield computation, instruction, times

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Trip count of a `while`; None if it is not a constant."""
        known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.called(part)] for part in ("condition", "body"))
        start = computation.instructions[loop.operands[0]]
        state: dict[int, int] = {}
        if start.opcode == "tuple":
            outside = _Frame(self, computation, lambda _: None)
            state = _known(outside.value(name) for name in start.operands)
        if body.root.opcode != "tuple":
            return None
        for trips in range(_MAX_TRIPS):
            go_on = _Frame(self, condition, {0: state}.get).value(condition.root.name)
            if go_on is None:
                return None
            if not go_on:
                return trips
            round_ = _Frame(self, body, {0: state}.get)
            state = _known(round_.value(name) for name in body.root.operands)
        return None


def _known(values: Iterable[int | None]) -> dict[int, int]:
    return {i: value for i, value in enumerate(values) if value is not None}


class _Frame:
    """Evaluation of a computation: its integers, as far as they follow from constants and arguments. Each is computed
    at most once, on demand.

    argument: number of a parameter -> its value, a tuple's as a mapping, None if it is unknown.
    """

    def __init__(self, module: Module, computation: Computation, argument: Callable[[int], Any]):
        self._module, self._computation, self._argument = module, computation, argument
        self._values: dict[str, int | None] = {}
        self._calls: dict[str, _Frame] = {}

    def value(self, name: str) -> int | None:
        """The value of an instruction, None if it is unknown."""
        if name not in self._values:
            self._values[name] = self._evaluate(self._computation.instructions[name])
        return self._values[name]

    def _evaluate(self, instruction: Instruction) -> int | None:
        if instruction.shapes and (instruction.shapes[0].dims or instruction.shapes[0].kind[0] not in "sup"):
            return None
        opcode = instruction.opcode
        if opcode == "constant":
            text = instruction.argument
            return {"true": 1, "false": 0}.get(text) if text in ("true", "false") else int(text)
        if opcode == "parameter":
            value = self._argument(int(instruction.argument))
            return value if isinstance(value, int) else None
        if opcode == "get-tuple-element":
            source = self._computation.instructions[instruction.operands[0]]
            index = int(instruction.attribute("index"))
            if source.opcode == "fusion":
                return self._result(source, index)
            values = self._argument(int(source.argument)) if source.opcode == "parameter" else None
            return values.get(index) if isinstance(values, Mapping) else None
        if opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
            return self.value(instruction.operands[0])
        if opcode in ("fusion", "call"):
            return self._result(instruction)
        if opcode not in _ARITHMETIC and opcode != "compare":
            return None
        values = [self.value(operand) for operand in instruction.operands]
        if any(value is None for value in values):
            return None
        if opcode == "compare":
            return int(_COMPARISONS[instruction.attribute("direction")](*values))
        return _ARITHMETIC[opcode](*values)

    def _result(self, call: Instruction, index: int | None = None) -> int | None:
        """Result of a fusion or a call; of a tuple, the element at `index`."""
        callee = self._module.computations[call.called("calls") or call.called("to_apply")]
        inner = self._calls.get(call.name)
        if inner is None:
            inner = _Frame(self._module, callee, lambda i: self.value(call.operands[i]))
            self._calls[call.name] = inner
        root = callee.root
        name = root.operands[index] if root.opcode == "tuple" and index is not None else root.name
        return inner.value(name)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: 1 - a,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def parse(text: str) -> Module:
    """Parses the output of `compiled.as_text()`. Raises ValueError if it is no HLO module."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, instructions = found[2], {}
            entry = name if found[1] else entry
            computations[name] = Computation(name, instructions)
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("not an HLO module: it has no ENTRY computation")
    header = text.split("\n", 1)[0]
    devices = re.search(r"num_partitions=(\d+)", header)
    replicas = re.search(r"replica_count=(\d+)", header)
    return Module(entry, computations, int(devices[1]) if devices else int(replicas[1]) if replicas else 1)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0, "()") + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(_shapes(text[:end]))
    opcode, _, after = text[end:].strip().partition("(")
    close = _closing("(" + after, 0, "()") - 1
    argument, rest = after[:close], after[close + 1 :].lstrip(", ")
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, opcode, shapes, operands, argument, rest, root)


def _shapes(text: str) -> Iterator[Shape]:
    for kind, dims, layout in _ARRAY.findall(text):
        found = _MEMORY.search(layout)
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        yield Shape(kind, sizes, int(found[1]) if found else 0)


def _closing(text: str, begin: int, pair: str) -> int:
    """Index of the bracket that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"unbalanced {pair} in HLO: {text[:200]}")


def _branches(instruction: Instruction) -> list[str]:
    listed = instruction.attribute("branch_computations")
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.strip("{}"))
    return [instruction.called("true_computation"), instruction.called("false_computation")]
