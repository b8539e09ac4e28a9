"""Rotary position embedding for texts longer than those of pre-training: rules that scale the frequencies.

The rules are Hugging Face's: `linear` divides all frequencies, `llama3` the low ones, `yarn` interpolates between both
and sharpens attention (2309.00071), and factors given one by one (GGUF's `rope_freqs`, `longrope` with one list).
`dynamic` scales only beyond `max_position_embeddings`, where nothing here decodes: it is treated as no scaling.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ppow_jax.errors import UserError
from ppow_jax.models.reading import MAX_SIZE, boolean, positive_float, positive_int, refuse_options

log = logging.getLogger(__name__)
Array = jax.Array
_ENTRIES = ("rope_scaling", "rope_parameters")
_SCALES = ("factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mrope_section")


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor`."""

    factor: float
    attention_factor: ClassVar[float] = 1.0  # factor by which queries and keys are multiplied after rotation

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
    """Dimensions with more than beta_fast turns in the original length keep their frequency, those with fewer
    than beta_slow are divided by `factor`, with a ramp over the dimensions between (YaRN, 2309.00071).
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
            """The (fractional) frequency index with this number of turns in the original length."""
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

    transformers 5 writes `rope_parameters` with theta inside; 4 wrote `rope_theta` beside `rope_scaling`. Where both
    are present, the one that scales is used, not one of type `default`; nulls count as absent.

    Raises:
      UserError: for an unknown rule, rules per kind of layer, two entries that contradict each other, and values that
        are missing or impossible.
    """
    entries = {key: _entry(config[key], f"{where}: {key}") for key in _ENTRIES if config.get(key) is not None}
    scaling = {key: rope for key, rope in entries.items() if rope["rope_type"] != "default"}
    rules = [{name: value for name, value in rope.items() if name != "rope_theta"} for rope in scaling.values()]
    if len(rules) == 2 and rules[0] != rules[1]:
        raise UserError(f"{where}: rope_scaling and rope_parameters contradict each other; delete the wrong one")
    theta = _theta(config, entries, where)
    for key, rope in scaling.items():
        original = config.get("original_max_position_embeddings")  # the config's own value takes precedence
        original = rope.get("original_max_position_embeddings") if original is None else original
        if original is None and rope["rope_type"] in ("llama3", "yarn"):
            original = max_position_embeddings
            log.warning(
                "%s: %s has no original_max_position_embeddings: max_position_embeddings = %d is taken for it",
                where, key, original,
            )  # fmt: skip
        rule = _RULES[rope["rope_type"]](
            rope | {"original_max_position_embeddings": original}, f"{where}: {key}", head_dim
        )
        return theta, rule
    return theta, None


def positions(max_position_embeddings: int, scaling: Scaling | None) -> int:
    """Number of positions of a model: the maximum of the config's own number and, for YaRN, factor times the original.

    Files give the original number, a rounded one or the scaled one: Qwen documents all three.
    """
    if not isinstance(scaling, Yarn):
        return max_position_embeddings
    stretched = min(scaling.factor * scaling.original_max_position_embeddings, float(MAX_SIZE))
    return max(max_position_embeddings, int(stretched))


def _entry(rope: Any, place: str) -> dict[str, Any]:
    """The non-null values of an entry, with its `rope_type`."""
    if not isinstance(rope, Mapping):
        raise UserError(f"{place} = {rope!r} must be an object or null")
    given = {key: value for key, value in rope.items() if value is not None}
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise UserError(f"{place}: rope_type = {kinds[0]!r} and type = {kinds[1]!r} contradict; delete the wrong one")
    kind = kinds[0] if kinds else "default"
    if kind not in list(_RULES) or any(isinstance(value, Mapping) for value in given.values()):
        supported = ", ".join(map(repr, _RULES))
        raise UserError(f"{place} = {rope!r} is not supported, only one rope_type of {supported}")
    refuse_options(given, place, {"partial_rotary_factor": (1, 1.0)})
    scales = [key for key in _SCALES if given.get(key, 1.0) != 1.0]
    if kind == "default" and scales:
        named = "rope_type 'default'" if kinds else "no rope_type"
        raise UserError(f"{place}: {scales[0]} = {given[scales[0]]!r} with {named}; name the type that scales by it")
    return given | {"rope_type": kind}


def _theta(config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], where: str) -> float:
    """rope_theta, wherever it is given; 10000 by default. Raises UserError for values that contradict each other."""
    places = {"": config, **entries}
    named: dict[str, float] = {}
    for key, values in places.items():
        if values.get("rope_theta") is not None:
            place = f"{where}: {key}" if key else where
            named[f"{key}.rope_theta".lstrip(".")] = positive_float(values, "rope_theta", place)
    least = min(named.values(), default=math.inf)
    if least <= 1 and any(rope["rope_type"] == "yarn" for rope in entries.values()):
        raise UserError(f"{where}: rope_theta = {least} must be above 1 for rope_type 'yarn'")
    if len(set(named.values())) > 1:
        both = " and ".join(f"{name} = {value:g}" for name, value in named.items())
        raise UserError(f"{where}: {both} contradict each other; delete the wrong one")
    return next(iter(named.values()), 10000.0)


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
