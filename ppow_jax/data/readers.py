"""Records of files, directories and Hugging Face data sets.

The `datasets` library reads tables and text, always as a stream, and the hub; JSON is read in
`ppow_jax.data.json_files`, which explains why.
"""

import glob
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ppow_jax.data import json_files
from ppow_jax.data.hub_access import offline_if_unreachable
from ppow_jax.errors import UserError

TABLES = {  # ending -> builder of `datasets`, and its options
    ".csv": ("csv", {"sep": ","}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
ENDINGS = (".json", *json_files.LINES, *TABLES)
SPLITS = {  # by words in names of files and folders
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `datasets`
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}  # the first bytes take precedence over the ending
_REFUSED = {b"PK\x03\x04": "a zip archive", b"SQLite f": "an SQLite database", b"\x89HDF": "an HDF5 file"}


def ending(name: str) -> str | None:
    """The ending, in lower case and without that of a compression, if a data file can have it."""
    name = name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return next((known for known in ENDINGS if name.endswith(known)), None)


def stem(name: str) -> str:
    """The last part of a path without the endings of data files."""
    base = os.path.basename(name.rstrip("/"))
    known = ending(base)
    return base[: base.lower().rfind(known)] if known else base


def is_place(name: str) -> bool:
    """True if a name can only be that of a file or a directory, whether it exists or not."""
    name = os.path.expanduser(name)
    return os.path.exists(name) or ending(name) is not None or name.startswith(("/", "./", "../", "~"))


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) from a data file: "file:line" in JSON Lines, "file[index]" otherwise.

    Raises UserError with the place for a file that is missing, damaged, or of an unknown kind.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        raise UserError(f"cannot read data file {path}: it is a directory")
    is_pipe = os.path.exists(path) and not os.path.isfile(path)  # a pipe can be read only once
    head = b"" if is_pipe else json_files.first_bytes(path)
    for magic, kind in _REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"cannot read data file {path}: it is {kind}; use one of {', '.join(ENDINGS)}")
    kind = next((known for magic, known in _MAGIC.items() if head.startswith(magic)), ending(path.name))
    if kind in TABLES:
        yield from _read_table(path, kind, json_files.encoding(head))
    else:
        yield from json_files.read_json(path)


def read_place(name: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of a file, of all files of a pattern, or of a directory (see `read_directory`)."""
    path = os.path.expanduser(name)
    directory, _, split = path.rpartition(":")
    if os.path.isdir(path):
        yield from read_directory(Path(path))
    elif not os.path.exists(path) and os.path.isdir(directory):
        yield from read_directory(Path(directory), split)
    elif not os.path.exists(path) and glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise UserError(f"data source {name!r}: no file matches it")
        for file in files:
            yield from read_records(Path(file))
    else:
        yield from read_records(Path(path))


def read_directory(directory: Path, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of a directory: the output of `Dataset.save_to_disk`, or its data files, by name.

    Files and folders named after splits (`test.jsonl`, `data/validation-00000-of-00002.parquet`) belong to these, as on
    the hub; all others are "train". Raises UserError if nothing belongs to the requested split.
    """
    inner = directory / split if (directory / "dataset_dict.json").is_file() else directory
    if (inner / "state.json").is_file():
        yield from _saved(inner)
        return
    splits: dict[str, list[Path]] = {}
    for file in _data_files(directory):
        words = re.split(r"[^a-z]+", file.relative_to(directory).as_posix().lower())
        name = next((name for name, spellings in SPLITS.items() if set(words) & set(spellings)), "train")
        splits.setdefault(name, []).append(file)
    if (directory / "dataset_dict.json").is_file():
        splits = {path.parent.name: [] for path in sorted(directory.glob("*/state.json"))}
    if split not in splits:
        rule = "it contains no data files"
        if splits:
            rule = f"no split {split!r}, but {', '.join(splits)}; name one, as in {directory}:{next(iter(splits))}"
        raise UserError(f"cannot read data directory {directory}: {rule}")
    for file in splits[split]:
        yield from read_records(file)


def _data_files(directory: Path) -> list[Path]:
    """Its data files, by name; text files, which may be licences, only if there are no others."""
    files = [file for file in sorted(directory.rglob("*")) if ending(file.name) and file.is_file()]
    files = [file for file in files if not re.search(r"(^|/)[._]", file.relative_to(directory).as_posix())]
    files = [file for file in files if file.name not in _NOTES]
    return [file for file in files if ending(file.name) != ".txt"] or files


def _saved(directory: Path) -> Iterator[tuple[str, Any]]:
    import datasets  # takes seconds: imported only when needed

    try:
        for i, row in enumerate(datasets.load_from_disk(str(directory))):
            yield f"{directory}[{i}]", row
    except Exception as error:  # noqa: BLE001 (as in load_hub)
        raise UserError(f"cannot read data directory {directory}: {_reason(error)}") from None


def load_hub(name: str, split: str, config: str | None = None, stop: int | None = None) -> Iterable[dict]:
    """Rows of a Hugging Face data set, streamed when only the first `stop` are wanted.

    Raises UserError that names the data set for any failure, within seconds where the hub cannot be reached.
    """
    where = f"Hugging Face data set {name!r} (config {config or 'default'!r}, split {split!r})"
    how = {"split": split, "streaming": stop is not None}
    with offline_if_unreachable() as offline:
        try:
            yield from _hub_rows(name, config, how)
        except Exception as error:  # noqa: BLE001 (the hub client raises dozens of types: network, name, split, disk)
            why = f"{offline}, and it was not downloaded before; name a file instead" if offline else _reason(error)
            raise UserError(f"cannot load {where}: {why}") from None


def _hub_rows(name: str, config: str | None, how: dict[str, Any]) -> Iterable[dict]:
    import datasets

    try:
        return datasets.load_dataset(name, config, **how)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(name, config, **how, revision="refs/convert/parquet")  # the hub's own copy


def _read_table(path: Path, kind: str, encoding: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table; lines of a text as prompts. CSV values stay texts: "007" and "NA" are not converted."""
    import datasets

    builder, options = TABLES[kind]
    options = dict(options)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # errors are reported once, below
    try:
        if builder == "csv":
            options |= _csv_options(path, options["sep"], encoding)
        elif builder == "text":
            options |= {"encoding": encoding}
        with tempfile.TemporaryDirectory() as cache:
            files = glob.escape(str(path.absolute()))
            rows = datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, cache_dir=cache, **options
            )
            for i, row in enumerate(rows):
                place = f"{path}:{i + 1}" if builder == "text" else f"{path}[{i}]"
                yield place, {"prompt": row["text"]} if builder == "text" else row
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (as in load_hub: Arrow, pandas, codecs, compressions)
        raise UserError(f"cannot read data file {path}: {_reason(error)}") from None


def _csv_options(path: Path, separator: str, encoding: str) -> dict[str, Any]:
    """Separator and columns of a CSV file; raises the errors of pandas, which reads CSV in `datasets`."""
    import datasets
    import pandas

    kinds = zip(_COMPRESSED, ("gzip", "bz2", "xz", "zstd"), strict=True)
    compression = next((kind for suffix, kind in kinds if path.name.lower().endswith(suffix)), None)
    how: dict[str, Any] = {"encoding": encoding, "compression": compression}
    columns = list(pandas.read_csv(path, sep=separator, nrows=0, **how).columns)
    if len(columns) == 1 and separator == ",":  # as spreadsheets write it where the comma is a decimal sign
        separator = next((sign for sign in ";\t" if sign in columns[0]), separator)
        columns = list(pandas.read_csv(path, sep=separator, nrows=0, **how).columns)
    # a first row that is longer than the header would be read as one with an index; here it is an error
    pandas.read_csv(path, sep=separator, nrows=2, header=None, dtype=str, **how)
    features = datasets.Features({str(column): datasets.Value("string") for column in columns})
    return {"sep": separator, "encoding": encoding, "keep_default_na": False, "index_col": False, "features": features}


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {lines[0]}")
