"""Compiles product.cc for this processor, once, and registers it with XLA."""

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

SWITCH = "PPOW_JAX_CPU_PRODUCT"  # environment: 0 leaves every product to XLA
TARGETS = ("ppow_product", "ppow_product_transposed")
_SOURCE = Path(__file__).with_name("product.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


@functools.cache
def available() -> bool:
    """Whether XLA:CPU has our products: built and registered on the first call.

    Without a C++ compiler (`CXX`, or c++, g++ or clang++ on the path) they are left to XLA, with one warning.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home directory
        log.warning("bfloat16 products are left to XLA, which is slower on a CPU: %s", _said(error))
        return False
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


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
    made_of = (_SOURCE.read_text(), compiler, *_FLAGS, jaxlib.__version__, _processor())
    name = f"product-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
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
