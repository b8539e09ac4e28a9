"""Configuration of a target model, read from Hugging Face config files, and helpers shared with drafter configs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ppow_jax.errors import UserError
from ppow_jax.models.families import FAMILIES, Experts, experts_to_hf
from ppow_jax.models.reading import boolean, positive_float, positive_int, refuse_options, shortest
from ppow_jax.models.rope import Scaling, positions, read_rope

MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer (the target). Hashable, so it can be a static argument of jit.

    qkv_bias, o_bias, mlp_bias: the projections that add a bias. qk_norm: queries and keys are normed, head by head.
    sliding_layers: layers whose tokens attend only to themselves and the sliding_window - 1 tokens before. experts:
    settings of the layers that have a mixture of experts instead of one MLP.
    """

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
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    experts: Experts | None = None

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
        family = FAMILIES[architecture]
        supported = {"hidden_act": ("silu",), "partial_rotary_factor": (1, 1.0), "quantization_config": ()}
        refuse_options(config, where, supported)
        vocab_size = positive_int(config, "vocab_size", where)
        num_layers = positive_int(config, "num_hidden_layers", where, limit=MAX_LAYERS)
        layer = layer_fields(config, where, family.head_dim)
        layer["max_position_embeddings"] = positions(layer["max_position_embeddings"], layer["rope_scaling"])
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            num_layers=num_layers,
            tie_word_embeddings=boolean(config, "tie_word_embeddings", where, default=False),
            eos_token_ids=_eos_token_ids(config, vocab_size, where),
            **layer,
            **family.read(config, num_layers, where),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` from which `from_hf`, and transformers, rebuild this model."""
        eos = self.eos_token_ids
        result = {
            "architectures": [self.architecture],
            "model_type": FAMILIES[self.architecture].model_type,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            **layer_fields_to_hf(self),
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
        }
        if self.architecture != "LlamaForCausalLM":
            result |= {"use_sliding_window": bool(self.sliding_layers), "sliding_window": self.sliding_window}
        if self.architecture == "Qwen3MoeForCausalLM":
            return result | experts_to_hf(self.experts, self.num_layers)
        if self.sliding_layers:
            kinds = ["full_attention", "sliding_attention"]
            result["layer_types"] = [kinds[n in self.sliding_layers] for n in range(self.num_layers)]
        return result

    def window(self, layer: int) -> int | None:
        """Number of tokens, itself included, that a token of this layer attends to at most; None: no limit."""
        return self.sliding_window if layer in self.sliding_layers else None


def layer_fields(config: Mapping[str, Any], where: str, default_head_dim: int | None = None) -> dict[str, Any]:
    """The fields that ModelConfig and DrafterConfig share, from a Hugging Face config in Llama's format.

    default_head_dim: used where the config has none; None for hidden_size / num_attention_heads.

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
    if config.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise UserError(
            f"{where}: hidden_size = {hidden_size} must be a multiple of num_attention_heads = {num_heads}, "
            "or head_dim must be given"
        )
    head_dim = positive_int(config, "head_dim", where, default=default_head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim = {head_dim} must be even, since RoPE rotates pairs")
    max_position_embeddings = positive_int(config, "max_position_embeddings", where, default=2048)
    theta, scaling = read_rope(config, where, head_dim, max_position_embeddings)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": positive_int(config, "intermediate_size", where),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": positive_float(config, "rms_norm_eps", where, default=1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": max_position_embeddings,
    }


def layer_fields_to_hf(config: Any) -> dict[str, Any]:
    """The inverse of `layer_fields` (for a ModelConfig or DrafterConfig), in the keys that every loader supports."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.to_hf() if config.rope_scaling else None,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        raise UserError(
            f"{where}: architectures = {names!r} (model_type {config.get('model_type')!r}) is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return names[0]


def _eos_token_ids(config: Mapping[str, Any], vocab_size: int, where: str) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UserError(f"{where}: eos_token_id = {value!r} must be token ids of 0..{vocab_size - 1}")
    return tuple(ids)
