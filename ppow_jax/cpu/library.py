"""Compiles kernels.cc for this processor, once, and registers what it holds with XLA."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

log = logging.getLogger(__name__)

SWITCH = "PPOW_JAX_CPU_KERNELS"  # environment: 0 leaves everything to XLA
_SOURCE = Path(__file__).with_name("kernels.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


@functools.cache
def available() -> bool:
    """Whether XLA:CPU has our products and attention: built and registered on the first call.

    Without a C++ compiler (`CXX`, or c++, g++ or clang++ on the path) they are left to XLA, with one warning.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return False
    return bool(kinds())


@functools.cache
def kinds() -> tuple[str, ...]:
    """The kinds of product that this processor has, slowest first: `vectors`, `dots` (AVX-512 BF16), `tiles` (AMX).

    Empty where nothing could be compiled.
    """
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home directory
        log.warning("attention and bfloat16 products are left to XLA, which is slower on a CPU: %s", _said(error))
        return ()
    library.ppow_kinds.restype = ctypes.c_char_p
    there = tuple(library.ppow_kinds().decode().split())
    products = [target(kind, transposed) for kind in there for transposed in (False, True)]
    for name in ("ppow_attention", "ppow_norm_factor", *products):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return there


def target(kind: str, transposed: bool) -> str:
    """The name under which XLA knows a product."""
    return f"ppow_product_{kind}" + "_transposed" * transposed


def _said(error: Exception) -> str:
    """One line: the compiler's first complaint, or the error itself."""
    lines = (getattr(error, "stderr", None) or "").splitlines()
    return next((line for line in lines if "error" in line), str(error))


def _built() -> Path:
    """The compiled library; processes that build it at once each put the same file in place.

    Raises OSError without a compiler or a place to write to, CalledProcessError where it does not compile.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler found (install g++, or name one in CXX)")
    sources = (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))
    made_of = (*(source.read_text() for source in sources), compiler, *_FLAGS, jaxlib.__version__, _processor())
    name = f"kernels-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppow_jax"
    path = directory / name
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / name
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, path)
    return path


def _processor() -> str:
    """What -march=native means here: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model", "cpu family")}
        return "\n".join(sorted(told))
    except OSError:
        return platform.processor() or platform.machine()
