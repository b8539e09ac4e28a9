"""The description of a target model, read from Hugging Face config files; helpers that a drafter's config shares."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

from ppow_jax.errors import UserError

MAX_SIZE = 1 << 31  # no dimension of a real model comes near; a larger one is a broken file
MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer (the target). Hashable, so it can be a static argument of jit."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> Self:
        """Reads a Hugging Face `config.json`, of transformers 4 or 5.

        Args:
          config: the parsed JSON object.
          where: the place to name in errors, such as the file's path.

        Raises:
          UserError: for an architecture or an option that is not supported, and for a value that is missing,
            of the wrong type or impossible.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"{where}: a model config must be a JSON object, not {type(config).__name__}")
        architecture = _architecture(config, where)
        _FAMILIES[architecture](config, where)
        vocab_size = positive_int(config, "vocab_size", where)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            num_layers=positive_int(config, "num_hidden_layers", where, limit=MAX_LAYERS),
            tie_word_embeddings=boolean(config, "tie_word_embeddings", where, default=False),
            eos_token_ids=_eos_token_ids(config, vocab_size, where),
            **layer_fields(config, where),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` from which `from_hf`, and transformers, rebuild this model."""
        eos = self.eos_token_ids
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            **layer_fields_to_hf(self),
        }


def layer_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that ModelConfig and DrafterConfig share, from a Hugging Face config of Llama's kind.

    Raises:
      UserError: naming key, value, rule and `where`.
    """
    hidden_size = positive_int(config, "hidden_size", where)
    num_heads = positive_int(config, "num_attention_heads", where)
    num_kv_heads = positive_int(config, "num_key_value_heads", where, default=num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads = {num_heads} must be a multiple of num_key_value_heads = {num_kv_heads}"
        )
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(
            f"{where}: hidden_size = {hidden_size} must be a multiple of num_attention_heads = {num_heads}, "
            "or head_dim must be given"
        )
    head_dim = positive_int(config, "head_dim", where, default=hidden_size // num_heads)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim = {head_dim} must be even, since RoPE rotates pairs")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": positive_int(config, "intermediate_size", where),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _positive_float(config, "rms_norm_eps", where, default=1e-6),
        "rope_theta": _rope_theta(config, where),
        "max_position_embeddings": positive_int(config, "max_position_embeddings", where, default=2048),
    }


def layer_fields_to_hf(config: Any) -> dict[str, Any]:
    """The inverse of `layer_fields` (for a ModelConfig or DrafterConfig), in the keys that every loader knows."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def refuse_options(config: Mapping[str, Any], where: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError if a key is present with another value than the supported ones."""
    for key, values in supported.items():
        value = config.get(key)
        if not any(type(value) is type(v) and value == v for v in (*values, None)):
            choice = " or ".join(map(repr, values)) or "absence"
            raise UserError(f"{where}: {key} = {value!r} is not supported, only {choice}")


def positive_int(
    config: Mapping[str, Any], key: str, where: str, default: int | None = None, limit: int = MAX_SIZE
) -> int:
    """`config[key]`, an integer of 1..limit; absent or null it is `default`, if there is one."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= limit:
        rule = "must be a positive integer" if limit == MAX_SIZE else f"must be an integer of 1..{limit}"
        raise UserError(f"{where}: {key} = {value!r} {rule}")
    return value


def boolean(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """`config[key]`, true or false; absent or null it is `default`."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise UserError(f"{where}: {key} = {value!r} must be true or false")
    return value


def _positive_float(config: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{where}: {key} = {value!r} must be a positive number")
    return float(value)


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_FAMILIES):
        raise UserError(
            f"{where}: architectures = {names!r} (model_type {config.get('model_type')!r}) is not supported; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    return names[0]


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """transformers 5 writes rope_parameters {rope_theta, rope_type}; 4 wrote rope_theta and rope_scaling."""
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: {key} = {rope!r} must be an object or null")
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("default", None) or any(isinstance(value, Mapping) for value in rope.values()):
            raise UserError(f"{where}: {key} = {rope!r} is not supported, only rope_type 'default'")
        refuse_options(rope, f"{where}: {key}", {"partial_rotary_factor": (1, 1.0)})
        theta = rope.get("rope_theta", theta)
    return _positive_float({"rope_theta": theta}, "rope_theta", where, default=10000.0)


def _eos_token_ids(config: Mapping[str, Any], vocab_size: int, where: str) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UserError(f"{where}: eos_token_id = {value!r} must be token ids of 0..{vocab_size - 1}")
    return tuple(ids)


def _check_llama(config: Mapping[str, Any], where: str) -> None:
    refuse_options(
        config,
        where,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "partial_rotary_factor": (1, 1.0),
            "quantization_config": (),
        },
    )


# Architecture -> check of the options that this family leaves open. A new family gets its line here.
_FAMILIES: dict[str, Callable[[Mapping[str, Any], str], None]] = {"LlamaForCausalLM": _check_llama}
