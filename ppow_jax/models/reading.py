"""Validated reading of values from Hugging Face config files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppow_jax.errors import UserError

MAX_SIZE = 1 << 31  # far above any dimension of a real model; a larger one is a broken file


def shortest(value: float) -> float:
    """The value with the fewest digits that is the same in float32: 1e-05 for 9.999999747378752e-06."""
    short = float(str(np.float32(value)))
    return short if math.isclose(short, value, rel_tol=1e-6) else value  # beyond float32: as it is


def positive_int(
    config: Mapping[str, Any], key: str, where: str, default: int | None = None, limit: int = MAX_SIZE
) -> int:
    """`config[key]`, an integer of 1..limit; `default`, if there is one, where it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= limit:
        rule = "must be a positive integer" if limit == MAX_SIZE else f"must be an integer of 1..{limit}"
        raise UserError(f"{where}: {key} = {value!r} {rule}")
    return value


def boolean(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """`config[key]`, true or false; `default` where it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise UserError(f"{where}: {key} = {value!r} must be true or false")
    return value


def positive_float(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """`config[key]`, a finite number above 0; `default`, if there is one, where it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{where}: {key} = {value!r} must be a positive number")
    return float(value)


def indices(config: Mapping[str, Any], key: str, where: str, below: int) -> tuple[int, ...]:
    """`config[key]`, a list of integers of 0..below-1, in ascending order; empty where it is absent or null."""
    value = config.get(key)
    value = [] if value is None else value
    if not isinstance(value, Sequence) or not all(type(i) is int and 0 <= i < below for i in value):
        raise UserError(f"{where}: {key} = {value!r} must be a list of integers of 0..{below - 1}")
    return tuple(sorted(set(value)))


def refuse_options(config: Mapping[str, Any], where: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError if a key is present with an unsupported value."""
    for key, values in supported.items():
        value = config.get(key)
        if not any(type(value) is type(v) and value == v for v in (*values, None)):
            choice = " or ".join(map(repr, values)) or "absence"
            raise UserError(f"{where}: {key} = {value!r} is not supported, only {choice}")
