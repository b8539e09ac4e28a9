"""Rotary position embedding for texts longer than those of pre-training: how each rule scales the frequencies.

The rules are Hugging Face's: `linear` divides all frequencies, `llama3` the low ones, `yarn` ramps between both and
sharpens attention (2309.00071), and factors given one by one (GGUF's `rope_freqs`, `longrope` with one list).
`dynamic` begins to scale behind `max_position_embeddings`, where nothing here decodes: it is no scaling.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppow_jax.errors import UserError
from ppow_jax.models.reading import boolean, positive_float, positive_int, refuse_options

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor`."""

    factor: float
    attention_factor: ClassVar[float] = 1.0  # by which queries and keys are multiplied after rotation

    def scale(self, frequency_h: Array, theta: float) -> Array:
        """Frequencies (radians per token) after scaling."""
        return frequency_h / self.factor

    def to_hf(self) -> dict[str, Any]:
        """The entry `rope_scaling` of a config file."""
        return {"rope_type": "linear"} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Wavelengths above `original / low` tokens are stretched by `factor`, those below `original / high` kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: ClassVar[float] = 1.0

    def scale(self, frequency_h: Array, theta: float) -> Array:
        """Frequencies (radians per token) after scaling."""
        turns_h = self.original_max_position_embeddings * frequency_h / (2 * math.pi)
        kept_h = (turns_h - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept_h = jnp.clip(kept_h, 0.0, 1.0)
        return frequency_h * (kept_h + (1 - kept_h) / self.factor)

    def to_hf(self) -> dict[str, Any]:
        """The entry `rope_scaling` of a config file."""
        return {"rope_type": "llama3"} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Dimensions that turn more than beta_fast times in the original length keep their frequency, those that turn less
    than beta_slow times are divided by `factor`, with a ramp over the dimensions between (YaRN, 2309.00071).
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequency_h: Array, theta: float) -> Array:
        """Frequencies (radians per token) after scaling."""
        half = len(frequency_h)

        def index(turns: float) -> float:
            """The (fractional) frequency index that turns so often in the original length."""
            return half * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high += 0.001 if low == high else 0
        divided_h = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return frequency_h * (1 - divided_h) + frequency_h / self.factor * divided_h

    def to_hf(self) -> dict[str, Any]:
        """The entry `rope_scaling` of a config file."""
        return {"rope_type": "yarn"} | dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Factors:
    """Each frequency divided by a factor of its own."""

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def scale(self, frequency_h: Array, theta: float) -> Array:
        """Frequencies (radians per token) after scaling."""
        return frequency_h / jnp.asarray(self.factors, jnp.float32)

    def to_hf(self) -> dict[str, Any]:
        """The entry `rope_scaling` of a config file."""
        both = dict.fromkeys(("short_factor", "long_factor"), list(self.factors))
        return {"rope_type": "longrope", **both, "factor": 1.0, "attention_factor": self.attention_factor}


Scaling = Linear | Llama3 | Yarn | Factors


def read_rope(
    config: Mapping[str, Any], where: str, head_dim: int, max_position_embeddings: int
) -> tuple[float, Scaling | None]:
    """(rope_theta, scaling or None) of a config of transformers 4 or 5.

    transformers 5 writes `rope_parameters` with theta inside; 4 wrote `rope_theta` beside `rope_scaling`.

    Raises:
      UserError: for an unknown rule, rules per kind of layer, and values that are missing or impossible.
    """
    theta, scaling = config.get("rope_theta"), None
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: {key} = {rope!r} must be an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in list(_RULES) or any(isinstance(value, Mapping) for value in rope.values()):
            supported = ", ".join(map(repr, _RULES))
            raise UserError(f"{where}: {key} = {rope!r} is not supported, only one rope_type of {supported}")
        place = f"{where}: {key}"
        refuse_options(rope, place, {"partial_rotary_factor": (1, 1.0)})
        theta = rope.get("rope_theta", theta)
        values = {"original_max_position_embeddings": max_position_embeddings} | _given(rope)
        if config.get("original_max_position_embeddings") is not None:  # the config's own comes first, if it has one
            values["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        scaling = _RULES[kind](values, place, head_dim)
    theta = positive_float({"rope_theta": theta}, "rope_theta", where, default=10000.0)
    if isinstance(scaling, Yarn) and theta <= 1:
        raise UserError(f"{where}: rope_theta = {theta} must be above 1 for rope_type 'yarn'")
    return theta, scaling


def _given(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if value is not None}


def _linear(rope: Mapping[str, Any], where: str, head_dim: int) -> Linear:
    return Linear(positive_float(rope, "factor", where))


def _llama3(rope: Mapping[str, Any], where: str, head_dim: int) -> Llama3:
    low, high = (positive_float(rope, f"{name}_freq_factor", where) for name in ("low", "high"))
    if low >= high:
        raise UserError(f"{where}: low_freq_factor = {low} must be below high_freq_factor = {high}")
    original = positive_int(rope, "original_max_position_embeddings", where)
    return Llama3(positive_float(rope, "factor", where), low, high, original)


def _yarn(rope: Mapping[str, Any], where: str, head_dim: int) -> Yarn:
    factor = positive_float(rope, "factor", where)
    fast, slow = positive_float(rope, "beta_fast", where, 32.0), positive_float(rope, "beta_slow", where, 1.0)
    if slow >= fast:
        raise UserError(f"{where}: beta_slow = {slow} must be below beta_fast = {fast}")

    def sharpening(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = sharpening(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscales = (positive_float(rope, key, where) for key in ("mscale", "mscale_all_dim"))
        above, below = map(sharpening, mscales)
        attention = above / below
    return Yarn(
        factor=factor,
        original_max_position_embeddings=positive_int(rope, "original_max_position_embeddings", where),
        attention_factor=positive_float(rope, "attention_factor", where, attention),
        beta_fast=fast,
        beta_slow=slow,
        truncate=boolean(rope, "truncate", where, default=True),
    )


def _longrope(rope: Mapping[str, Any], where: str, head_dim: int) -> Factors:
    short, long = rope.get("short_factor"), rope.get("long_factor")
    if short != long:
        raise UserError(f"{where}: rope_type 'longrope' is supported only where short_factor equals long_factor")
    if not isinstance(short, list) or len(short) != head_dim // 2:
        raise UserError(f"{where}: short_factor = {short!r} must be a list of head_dim / 2 = {head_dim // 2} numbers")
    factors = tuple(positive_float({"short_factor": x}, "short_factor", where) for x in short)
    return Factors(factors, positive_float(rope, "attention_factor", where))


_RULES: dict[Any, Callable[[Mapping[str, Any], str, int], Scaling | None]] = {
    "default": lambda *_: None,
    "linear": _linear,
    "dynamic": lambda *_: None,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
