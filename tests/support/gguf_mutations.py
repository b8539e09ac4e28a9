"""GGUF files that are written with one thing wrong, from a seed; the writer here is plain, so that it can lie."""

import dataclasses
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_ALIGNMENT = 32


@dataclasses.dataclass
class Field:
    """A metadata entry. key and value as bytes; length: what is written before a list or text instead of its own."""

    key: str
    kind: int
    value: Any
    inner: int | None = None
    length: int | None = None

    def encode(self) -> bytes:
        return text(self.key) + struct.pack("<I", self.kind) + self._content()

    def _content(self) -> bytes:
        if self.kind == ARRAY:
            count = len(self.value) if self.length is None else self.length
            return struct.pack("<IQ", self.inner, count) + b"".join(scalar(self.inner, x) for x in self.value)
        if self.kind == STRING and self.length is not None:
            return struct.pack("<Q", self.length) + raw(self.value)
        return scalar(self.kind, self.value)


@dataclasses.dataclass
class Stored:
    """A tensor. shape, type and offset may differ from what its numbers are."""

    name: str
    values: np.ndarray
    shape: tuple[int, ...] = ()
    kind: int = 0  # F32
    offset: int | None = None

    def __post_init__(self):
        self.shape = self.shape or self.values.shape[::-1]


@dataclasses.dataclass
class File:
    """A whole file; counts and version may lie."""

    fields: list[Field]
    tensors: list[Stored]
    version: int = 3
    num_fields: int | None = None
    num_tensors: int | None = None

    def encode(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_fields = len(self.fields) if self.num_fields is None else self.num_fields
        head = b"GGUF" + struct.pack("<IQQ", self.version, num_tensors, num_fields)
        head += b"".join(field.encode() for field in self.fields)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            head += text(tensor.name) + dims + struct.pack("<IQ", tensor.kind, offset)
            data += _padded(tensor.values.astype("<f4").tobytes())
        return _padded(head) + data

    def field(self, key: str) -> Field:
        return next(field for field in self.fields if field.key == key)


def raw(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def text(value: str | bytes) -> bytes:
    return struct.pack("<Q", len(raw(value))) + raw(value)


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + _FORMATS[kind], value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


# ---------------------------------------------------------------- mutations

HUGE = (0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
SCALARS = (
    *((U8, 0), (U8, 255), (I8, -1), (U16, 65535), (I16, -2), (U32, 0), (U32, 1), (U32, 2**32 - 1), (I32, -1)),
    *((I32, -(2**31)), (F32, 0.5), (F32, float("nan")), (F32, float("inf")), (F64, -1e308), (BOOL, True)),
    *((BOOL, False), (STRING, ""), (STRING, "x"), (STRING, "2"), (STRING, b"\xff\xfe"), (U64, 2**64 - 1)),
    *((I64, -(2**63)), (U64, 7), (STRING, "\u0000"), (STRING, "a" * 5000)),
)
LISTS = ((U8, []), (U32, [1, 2]), (STRING, ["a"]), (STRING, ["a", "a"]), (F32, [float("nan")]), (BOOL, [True]))


def _retype(file: File, rng: random.Random) -> str:
    field = rng.choice(file.fields)
    field.kind, field.value = rng.choice(SCALARS)
    return f"{field.key} as {field.kind} {field.value!r:.20}"


def _list(file: File, rng: random.Random) -> str:
    field = rng.choice(file.fields)
    field.kind = ARRAY
    field.inner, field.value = rng.choice(LISTS)
    return f"{field.key} as list {field.value!r}"


def _drop(file: File, rng: random.Random) -> str:
    field = file.fields.pop(rng.randrange(len(file.fields)))
    return f"without {field.key}"


def _twice(file: File, rng: random.Random) -> str:
    field = rng.choice(file.fields)
    file.fields.insert(rng.randrange(len(file.fields) + 1), dataclasses.replace(field))
    return f"{field.key} twice"


def _length(file: File, rng: random.Random) -> str:
    field = rng.choice([field for field in file.fields if field.kind in (ARRAY, STRING)])
    field.length = rng.choice([*HUGE, len(field.value) + 1, max(0, len(field.value) - 1)])
    return f"{field.key} of length {field.length}"


def _counts(file: File, rng: random.Random) -> str:
    which = rng.choice(("num_fields", "num_tensors"))
    own = len(file.fields if which == "num_fields" else file.tensors)
    setattr(file, which, rng.choice([*HUGE, own - 1, own + 1]))
    return f"{which} = {getattr(file, which)}"


def _version(file: File, rng: random.Random) -> str:
    file.version = rng.choice([0, 1, 4, 2**24 * 3, 2**31, 2**32 - 1])
    return f"version {file.version}"


def _key(file: File, rng: random.Random) -> str:
    field = rng.choice(file.fields)
    old, field.key = field.key, rng.choice(["", "x", field.key + "x", "general.alignment", "\u00e9" * 50])
    return f"{old} named {field.key}"


def _element(file: File, rng: random.Random) -> str:
    lists = [field for field in file.fields if field.kind == ARRAY and field.inner in (STRING, I32, F32)]
    field = rng.choice([field for field in lists if field.value] or [Field("a.list", ARRAY, ["a"], STRING)])
    at = rng.randrange(len(field.value))
    texts = ["", " ", "  ", "a", "<|im_end|>", b"\xc3", "\u2581" * 40, "x y", "a" * 2000, "<0x41>", "\U0010fffd3"]
    numbers = {I32: [-1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1], F32: [float("nan"), float("inf"), -1e30, 0.0]}
    field.value = [*field.value]
    field.value[at] = rng.choice(texts if field.inner == STRING else numbers[field.inner])
    return f"{field.key}[{at}] = {field.value[at]!r:.20}"


def _nested(file: File, rng: random.Random) -> str:
    """A list of lists of lists."""
    field = rng.choice(file.fields)
    depth = rng.choice([1, 3, 2000, 20000])
    field.kind, field.inner = ARRAY, U8
    field.value, field.length = [], None
    level = struct.pack("<IQ", ARRAY, 1) * depth
    field.encode = lambda: text(field.key) + struct.pack("<I", ARRAY) + level + struct.pack("<IQ", U8, 0)
    return f"{field.key} nested {depth} deep"


def _tensor(file: File, rng: random.Random) -> str:
    tensor = rng.choice(file.tensors)
    match rng.randrange(6):
        case 0:
            tensor.offset = rng.choice([0, 32, 31, *HUGE[2:]])
        case 1:
            tensor.kind = rng.choice([1, 2, 8, 12, 14, 16, 24, 26, 30, 31, 200, 2**32 - 1])
        case 2:
            tensor.shape = rng.choice(
                [(), (0,), (2**32, 2**32), (2**63, 2), (1,) * 40, (*tensor.shape, 1), (2**64 - 1,)]
            )
        case 3:
            tensor.name = rng.choice(["", "x", b"\xff", "blk.0", "blk.99999999999.ffn_up.weight", file.tensors[0].name])
        case 4:
            tensor.shape = tuple(reversed(tensor.shape)) if len(set(tensor.shape)) > 1 else (*tensor.shape, 2)
        case 5:
            file.tensors.remove(tensor)
    return f"{tensor.name!r:.30} kind {tensor.kind} shape {tensor.shape!s:.40} offset {tensor.offset}"


STRUCTURED: tuple[Callable[[File, random.Random], str], ...] = (
    *(_retype, _retype, _list, _drop, _twice, _length, _counts, _version, _key, _element, _element, _nested),
    *(_tensor, _tensor),
)


def _bytes(data: bytes, header: int, rng: random.Random) -> bytes:
    """Cut, flipped, doubled and overwritten bytes, most of them in the header."""
    damaged = bytearray(data)
    at = rng.randrange(header if rng.random() < 0.9 else len(data))
    match rng.randrange(4):
        case 0:
            del damaged[at:]
        case 1:
            damaged[at] ^= 1 << rng.randrange(8)
        case 2:
            damaged[at:at] = damaged[at : at + rng.randrange(1, 40)]
        case 3:
            damaged[at : at + 8] = bytes(rng.choice(b"\x00\x01\xff\x09\x08") for _ in range(8))
    return bytes(damaged)


def mutate(make: Callable[[], File], seed: int) -> tuple[str, bytes]:
    """(a description, the content of a file with one or two things wrong)."""
    rng, file = random.Random(seed), make()
    if rng.random() < 0.25:
        whole = file.encode()
        return f"seed {seed}: bytes", _bytes(whole, len(whole) - sum(t.values.nbytes for t in file.tensors), rng)
    said = [rng.choice(STRUCTURED)(file, rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    return f"seed {seed}: {', '.join(said)}", file.encode()
