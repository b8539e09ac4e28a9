"""Which cases the default suite keeps: the others are marked `full`, for `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def keep(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Values of a parametrisation, in their order; those that are not among `kept` run in the full suite only."""
    kept, values = list(kept), list(values)
    assert all(value in values for value in kept), f"{kept} must be among {values}"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.full) for value in values]
