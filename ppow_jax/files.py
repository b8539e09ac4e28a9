"""Files: atomic writes (a kill at any moment leaves the old file or the new one, never half of one), lines of JSON.

A run's directory may also be a bucket's, gs://BUCKET/NAME; only this module knows what is different there. Its paths
are those of `etils.epath`, which reads and writes through gcsfs, as Orbax does. An object is replaced in one step, but
cannot grow, be locked or be mapped into memory; a directory is no more than the common start of some names.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

from ppow_jax.errors import UserError

LOCAL = "must be a path of this machine: mount the bucket on every host, as gcsfuse does (docs/accelerators.md)"
_LAST = "config.json"  # of a drafter: without it a directory holds none


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces the file or object at `path` by `content` (text is written as UTF-8) in one step.

    Raises UserError if a bucket does not take it.
    """
    if is_remote(path):
        with reaching(path):
            at(path).write_bytes(content.encode() if isinstance(content, str) else content)
        return
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see clear_left_over
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shipped(path: str | os.PathLike) -> pathlib.Path:
    """`path`; if only the package has a file of this relative path, that file.

    So `experiments/configs/tiny.flags` names the same file in the repository and, with an installed package, anywhere.
    """
    if is_remote(path):
        return at(path)
    path = pathlib.Path(path)
    beside = pathlib.Path(__file__).parents[1] / path
    return beside if not path.exists() and not path.is_absolute() and beside.is_file() else path


def clear_left_over(directory: pathlib.Path) -> None:
    """Removes temporary files that a kill left below a directory; no other process may be writing there."""
    if is_remote(directory):
        return  # there are none: an object is whole or does not exist
    for temporary in directory.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", temporary.name) and temporary.is_file():
            temporary.unlink(missing_ok=True)


def reserve(file: IO[bytes], size: int) -> None:
    """Makes a file `size` bytes long, and allocates disk space for all of them.

    Raises OSError if there is not enough: otherwise, writing memory-mapped pages to a full disk kills the process.
    """
    file.truncate(size)
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def mistaken(path: pathlib.Path) -> str | None:
    """Describes a file that is not what its name says, and the remedy; None if no known mistake is recognised.

    Git without LFS leaves pointers, a browser's "save as" leaves web pages, and an interrupted download an empty file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(200)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its directory, or download the file"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself: download the file from behind that page"
    return "is empty: download the file again" if not start else None


def is_remote(path: str | os.PathLike) -> bool:
    """True for addresses such as gs://BUCKET/NAME, which are no paths of a file system."""
    return bool(re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", os.fspath(path)))


def at(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file, or of an object in a bucket: an `epath.Path`, which has the methods of a `pathlib.Path`."""
    if not is_remote(path):
        return pathlib.Path(path)
    import fsspec
    from etils import epath

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # other processes write there, too
    return cast(pathlib.Path, epath.Path(path))


def check_address(flag: str, path: str | None) -> None:
    """Raises UserError, naming the flag, for the address of something other than a directory in a bucket of Google's.

    Orbax writes arrays to this machine and to gs://; gcsfs is needed for all other files.
    """
    if path is None or not is_remote(path):
        return
    rule = "must be a directory of this machine, or gs://BUCKET/NAME"
    if not re.fullmatch(r"gs://[^/]+/((?!\.\.?/)[^/]+/)+", path.rstrip("/") + "/"):
        raise UserError(f"{flag}={path}: {rule}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{flag}={path}: needs the package gcsfs: pip install 'ppow_jax[gcs]'")


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Turns any failure to reach a bucket, inside, into a UserError that names the address and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # gcsfs, aiohttp and google-auth raise many kinds of errors
        if not is_remote(path):
            raise
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such bucket, or object" if missing else f"{type(error).__name__}: {error}"
        raise UserError(f"{os.fspath(path)}: cannot be reached ({' '.join(reason.split())[:200]})") from error


def open_directory(path: str | os.PathLike) -> pathlib.Path:
    """Like `writable_directory`, for a directory that may be in a bucket: an object is written there and removed."""
    if not is_remote(path):
        return writable_directory(path)
    directory = at(path)
    probe = directory / f".{socket.gethostname()}.{os.getpid()}.tmp"
    with reaching(path):
        probe.write_bytes(b"")
        probe.unlink()
    return directory


@contextlib.contextmanager
def on_this_machine(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The directory, or a copy that lasts as long as the `with`, if it is in a bucket."""
    if not is_remote(directory):
        yield pathlib.Path(directory)
        return
    with tempfile.TemporaryDirectory() as copies:
        copy = pathlib.Path(copies) / os.path.basename(os.fspath(directory))
        copy.mkdir()
        with reaching(directory):
            for file in at(directory).iterdir():
                (copy / file.name).write_bytes(file.read_bytes())
        yield copy


def writable_directory(path: str | os.PathLike) -> pathlib.Path:
    """Creates the directory at `path` if it is missing, and returns its absolute path.

    Raises:
      UserError: it cannot be created, or cannot be written to, or is the address of an object store.
    """
    if is_remote(path):
        raise UserError(f"{path}: {LOCAL}")
    directory = pathlib.Path(path).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"{directory}: must be a directory that can be written to ({error.strerror})"
        ) from None
    return directory


def replace_directory(directory: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Replaces `directory` by what `write` creates at the path that it is given; a kill leaves no half of either.

    In a bucket, files are replaced one after the other, and config.json is there only when all of them are.
    """
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as parent:
            write(made := pathlib.Path(parent) / directory.name)
            with reaching(directory):
                _upload(made, directory)
        return
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    write(new)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _upload(source: pathlib.Path, directory: pathlib.Path) -> None:
    made = sorted(source.iterdir(), key=lambda file: file.name == _LAST)
    there = list(directory.iterdir()) if directory.exists() else []
    for file in sorted(there, key=lambda file: file.name != _LAST):
        if file.name == _LAST or file.name not in {file.name for file in made}:
            file.unlink()
    for file in made:
        (directory / file.name).write_bytes(file.read_bytes())


def read_result(path: str, kind: str, keys: Iterable[str]) -> dict[str, Any]:
    """A result named by --compare: a JSON object with these keys. Raises UserError for any other file than `kind`."""
    try:
        result = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare={path}: cannot be read as {kind} ({error})") from None
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise UserError(f"--compare={path}: is not {kind}, it lacks {', '.join(missing)}")
    return result


def read_arrays(path: pathlib.Path, names: Iterable[str], given: str, kind: str) -> list[Any]:
    """These arrays of a .npz file. Raises UserError, which begins with `given`, for any other file than `kind`."""
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zip files, compressed data and headers raise many kinds
        raise UserError(f"{given} is no {kind} ({error})") from None


@contextlib.contextmanager
def line_writer(path: str | os.PathLike | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes a value as a line of JSON at once, or nowhere."""
    if path is None:
        yield lambda value: None
        return
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        yield lambda value: print(json.dumps(value, ensure_ascii=False), file=file)
