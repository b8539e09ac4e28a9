"""Records of JSON files: lines, arrays, objects one after another, compressed or not.

A custom reader: the records of chat files mix types (a text here, null or a list there), which the tables of Arrow,
and so the `datasets` library, refuse. Other formats are read with that library: `ppow_jax.data.readers`.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from ppow_jax.errors import UserError

LINES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {  # the first bytes decide
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pyarrow.CompressedInputStream(file, "zstd"),
}
MARKS = {  # longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BLANK = re.compile(r"\s*")
_DIGITS = 4300  # Python's limit for the digits of an integer


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, record), place being "file:line" in JSON Lines and "file[index]" otherwise.

    The contents decide, not the file's ending: if the first line is a complete value, the file is JSON Lines, which are
    read one by one; anything else is read at once, an array as its items, several values one after another. A byte
    order mark at the start is skipped.
    Raises UserError with file and line for text that is not UTF-8 or not JSON, and for damaged files.
    """
    by_line = path.name.lower().removesuffix(".gz").endswith(LINES)
    with _reading(path), _open_text(path) as file:
        number, first = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (0, ""))
        if not number:
            raise UserError(f"{path}: the file is empty")
        try:
            record = _parse(first, f"{path}:{number}")
        except UserError as error:
            yield from _values(path, first + file.read(), number, error if by_line else None)
            return
        second = next(((n, line) for n, line in enumerate(file, number + 1) if line.strip()), None)
        if second is None and (not by_line or isinstance(record, list)):
            yield from ((f"{path}[{i}]", item) for i, item in enumerate(_items(record)))
            return
        yield f"{path}:{number}", record
        if second is not None:
            yield f"{path}:{second[0]}", _parse(second[1], f"{path}:{second[0]}")
            for n, line in enumerate(file, second[0] + 1):
                if line.strip():
                    yield f"{path}:{n}", _parse(line, f"{path}:{n}")


def _values(path: Path, text: str, line: int, lines_error: UserError | None) -> Iterator[tuple[str, Any]]:
    """The values of a text one after another; an array yields its items. line: of the text's beginning.

    lines_error: raised instead of an error found here: that of the first line, in a file of JSON Lines.
    """
    decoder, place, found = _decoder(), f"{path}:{line}", []
    _check_text(text, path, line)
    position = _BLANK.match(text).end()
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            place = f"{path}:{line + error.lineno - 1}"
            raise lines_error or UserError(f"{place}: not JSON: {error.msg} (column {error.colno})") from None
        except RecursionError:
            raise UserError(f"{place}: not readable JSON: nested too deeply") from None
        found += _items(value)
        position = _BLANK.match(text, end).end()
    yield from ((f"{path}[{i}]", item) for i, item in enumerate(found))


def _items(value: Any) -> list:
    """The records of a value: the items of an array, unless these are the messages of one chat."""
    is_chat = isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0])
    return value if isinstance(value, list) and not is_chat else [value]


def _parse(line: str, place: str) -> Any:
    _check_text(line, *place.rsplit(":", 1))
    try:
        return _decoder().decode(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{place}: not readable JSON: nested too deeply") from None


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) <= _DIGITS else float(digits))


def _check_text(text: str, path: Path | str, line: int | str) -> None:
    """Raises UserError for bytes that are not UTF-8, which `_open_text` decodes as surrogates."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = int(line) + text.count("\n", 0, error.start)
            raise UserError(f"{path}:{place}: not UTF-8 text") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors from damaged files into UserError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"cannot read data file {path}: it is damaged or truncated ({error})") from None
    except UnicodeError as error:
        rule = "its byte order mark indicates UTF-16 or UTF-32, but its text is neither"
        raise UserError(f"{path}: {rule} ({error})") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read data file {path}: {getattr(error, 'strerror', '') or error}") from None


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        head = file.peek(8)[:8]
        for magic, opener in COMPRESSIONS.items():
            if head.startswith(magic):
                file = stack.enter_context(io.BufferedReader(stack.enter_context(opener(file))))
                head = file.peek(8)[:8]
                break
        yield stack.enter_context(io.TextIOWrapper(file, encoding(head), errors="surrogateescape"))


def encoding(head: bytes) -> str:
    """The encoding indicated by a text's first bytes."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")


def first_bytes(path: Path) -> bytes:
    """The first 8 bytes of a file. Raises UserError where it cannot be read."""
    with _reading(path), open(path, "rb") as file:
        return file.read(8)
