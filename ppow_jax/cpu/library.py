"""Compiles kernels.cc for this processor, once, and registers its kernels with XLA."""

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

SWITCH = "PPOW_JAX_CPU_KERNELS"  # environment variable: 0 disables the kernels
_SOURCE = Path(__file__).with_name("kernels.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


@functools.cache
def available() -> bool:
    """True if the custom kernels can be used in XLA:CPU: built and registered on the first call.

    Without a C++ compiler (`CXX`, or c++, g++ or clang++ on the path) XLA's own code is used, with one warning.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return False
    return bool(kinds())


@functools.cache
def kinds() -> tuple[str, ...]:
    """Product kernels that this processor supports, slowest first: `vectors`, `dots` (AVX-512 BF16), `tiles` (AMX).

    Empty if nothing could be compiled.
    """
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home directory
        text = "the compiled CPU kernels are not available (%s); decoding uses XLA's, which are slower"
        log.warning(text, _said(error))
        return ()
    library.ppow_kinds.restype = ctypes.c_char_p
    there = tuple(library.ppow_kinds().decode().split())
    products = [target(kind, transposed) for kind in there for transposed in (False, True)]
    for name in ("ppow_attention", "ppow_norm_factor", *products):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return there


def target(kind: str, transposed: bool) -> str:
    """Name under which a product is registered with XLA."""
    return f"ppow_product_{kind}" + "_transposed" * transposed


def _said(error: Exception) -> str:
    """One line: the compiler's first error, or the exception itself."""
    lines = (getattr(error, "stderr", None) or "").splitlines()
    return next((line for line in lines if "error" in line), str(error))


def _built() -> Path:
    """Path of the compiled library; processes that build it at the same time each put the same file in place.

    Raises OSError without a compiler or a writable directory, CalledProcessError if compilation fails.
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
    """Identifies the target of -march=native: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = {line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model", "cpu family")}
        return "\n".join(sorted(told))
    except OSError:
        return platform.processor() or platform.machine()
