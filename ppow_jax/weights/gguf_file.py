"""GGUF files as read by the `gguf` package, validated: metadata by key, and the tensors of all parts of a model."""

import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ppow_jax.errors import UserError

MAGIC = b"GGUF"
_OTHERS = {  # first bytes of other files that are mistaken for GGUF
    b"vers": "a Git LFS pointer: `git lfs pull` fetches the file itself",
    b"lmgg": "GGML, the form before GGUF: convert the model again",
    b"tjgg": "GGML, the form before GGUF: convert the model again",
    b"fmgg": "GGML, the form before GGUF: convert the model again",
    b"<!DO": "a web page: download the file itself",
    b"<!do": "a web page: download the file itself",
    b"<htm": "a web page: download the file itself",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"": "the file is empty",
}
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE)
_CUT = "it is truncated: damaged, or not completely downloaded"
_MOST = 4_000_000  # limit for entries of lists and metadata, and tensors; large vocabularies have 250,000
_ABSENT = (-1, 2**32 - 1)  # token ids that mean none


def is_gguf(path: str | Path) -> bool:
    """True if a file begins with GGUF's four bytes, whatever its name."""
    return Path(path).is_file() and _first_bytes(path) == MAGIC


class GgufFile:
    """A model in one GGUF file or in several parts. path: of the first; tensors: of all, not yet dequantised."""

    def __init__(self, path: str | Path, fields: dict[str, Any], tensors: list[gguf.gguf_reader.ReaderTensor]):
        self.path, self._fields, self.tensors = str(path), fields, tensors

    def get(self, key: str, *default: Any) -> Any:
        """A value of the metadata. Raises UserError for a missing key without default, and for damaged texts."""
        field = self._fields.get(key)
        if field is None and not default:
            raise UserError(f"{self.path}: metadata key {key!r} is missing")
        try:
            return default[0] if field is None else field.contents()
        except ValueError as error:  # text that is not UTF-8
            raise UserError(f"{self.path}: metadata key {key!r} cannot be read ({error})") from None

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of the metadata. Raises UserError for another type."""
        return self._checked(key, default, bool, "true or false")

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text of the metadata. Raises UserError for another type."""
        return self._checked(key, default, str, "a text")

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        """A list of the metadata, None if there is none. Raises UserError for another type, also of an element."""
        values = self.get(key, None)
        if values is not None and (not isinstance(values, list) or any(_other(value, kind) for value in values)):
            raise UserError(f"{self.path}: {key} must be a list of {'texts' if kind is str else 'numbers'}")
        return values

    def token_id(self, use: str) -> int | None:
        """The id of `tokenizer.ggml.USE_token_id`, None if there is none.

        Raises UserError unless it is one of the file's tokens (where it lists them).
        """
        key = f"tokenizer.ggml.{use}_token_id"
        index, tokens = self.get(key, None), self._fields.get("tokenizer.ggml.tokens")
        if index is None or index in _ABSENT and type(index) is int:
            return None
        if type(index) is not int or index < 0 or tokens is not None and index >= len(tokens.data):
            known = f" of 0..{len(tokens.data) - 1}" if tokens is not None else ""
            raise UserError(f"{self.path}: {key} = {index!r} must be a token id{known}")
        return index

    def _checked(self, key, default, kind, rule):
        value = self.get(key, default)
        if value is not default and not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} = {value!r} must be {rule}")
        return value


def open_model(path: str | Path) -> GgufFile:
    """Opens a GGUF file, or all parts of a split model, given any of them.

    Raises UserError for files that are not GGUF or are damaged, and for parts that are missing (named) or do not belong
    together.
    """
    given = _open(path)
    count = _number(given, path, "split.count", 1)
    if count <= 1:
        return GgufFile(path, given.fields, given.tensors)
    paths = _part_paths(Path(path), count)
    tensors: list[gguf.gguf_reader.ReaderTensor] = []
    readers = [_open(part) for part in paths]
    for number, (part, reader) in enumerate(zip(paths, readers, strict=True)):
        found = _number(reader, part, "split.no", None), _number(reader, part, "split.count", None)
        if found != (number, count):
            raise UserError(f"{part}: split.no, split.count = {found[0]}, {found[1]} must be {number}, {count}")
        tensors += reader.tensors
    total = _number(readers[0], paths[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(f"{paths[0]}: its {count} parts contain {len(tensors)} tensors, split.tensors.count = {total}")
    return GgufFile(paths[0], readers[0].fields, tensors)


class _Reader(gguf.GGUFReader):
    """Stops at the end of the file; the package's reader continues with empty values, up to the declared length."""

    def _get(self, offset, dtype, count=1, *rest, **options):
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(_CUT)
        return super()._get(offset, dtype, count, *rest, **options)

    def _build_fields(self, offs, count):
        if count > _MOST:
            raise ValueError(f"it declares {count} metadata entries, more than {_MOST}")
        return super()._build_fields(offs, count)

    def _build_tensor_info(self, offs, count):
        if count > _MOST:
            raise ValueError(f"it declares {count} tensors, more than {_MOST}")
        return super()._build_tensor_info(offs, count)

    def _get_field_parts(self, orig_offs, raw_type):
        """Reads lists with a check of their length first, and a hundred times faster than the package."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        inner, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, start = gguf.GGUFValueType(int(inner[0])), orig_offs + 12
        dtype = self.gguf_scalar_to_np.get(kind)
        if count[0] > _MOST:
            raise ValueError(f"a list has {count[0]} entries, more than {_MOST}")
        if dtype is not None:
            values = self._get(start, dtype, count[0])
            return 12 + values.nbytes, [inner, count, values], [2], [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            raise ValueError("a list of lists is not supported")
        texts, view = [], memoryview(self.data)
        for _ in range(int(count[0])):
            end = start + 8 + int.from_bytes(view[start : start + 8], sys.byteorder)
            if not start + 8 <= end <= len(view):
                raise ValueError(_CUT)
            texts.append(view[start + 8 : end])
            start = end
        return (
            start - orig_offs,
            [inner, count, *texts],
            list(range(2, 2 + len(texts))),
            [gguf.GGUFValueType.ARRAY, kind],
        )


def _open(path: str | Path) -> _Reader:
    try:
        begins = _first_bytes(path)
        if begins != MAGIC:
            raise ValueError(f"it begins with {begins!r}: {_OTHERS.get(begins, 'must be GGUF')}")
        with np.errstate(over="ignore"):  # offsets near 2**64, which _check_places refuses
            reader = _Reader(path)
        _check_places(reader)
        return reader
    except Exception as error:  # the reader checks little: damaged files raise many kinds of errors
        raise UserError(f"{path}: not a readable GGUF file ({error or type(error).__name__})") from None


def _check_places(reader: _Reader) -> None:
    """Requires tensors to be stored back to back, as llama.cpp does; other offsets would alias other tensors."""
    if reader.byte_order == "S":
        raise ValueError("its byte order differs from this machine's")
    place, alignment = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise ValueError(f"tensor {tensor.name} is stored at byte {tensor.data_offset}, must be at {place}")
        place += -(-tensor.n_bytes // alignment) * alignment


def _first_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def _number(reader: _Reader, path: str | Path, key: str, default: int | None) -> int | None:
    field = reader.get_field(key)
    value = default if field is None else field.contents()
    if value is not default and (type(value) is not int or not 0 <= value < 2**31):
        raise UserError(f"{path}: {key} = {value!r} must be a whole number")
    return value


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise UserError(
            f"{path}: is one of {count} parts, which are found by their names: they must end in "
            f"-00001-of-{count:05}.gguf, and so on"
        )
    paths = [path.with_name(f"{match[1]}-{n:05}-of-{match[3]}{match[4] or ''}") for n in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path}: parts of the model are missing: {', '.join(missing[:5])}{more}")
    return paths


def _other(value: Any, kind: type | tuple[type, ...]) -> bool:
    return not isinstance(value, kind) or isinstance(value, bool)
