"""config.json of the speculators format, vLLM's own.

The drafter's layers have a config of their own, `transformer_layer_config`, in which values equal to the default of
its transformers class may be missing; it may be a Llama layer or a Qwen3 one (with norms of queries and keys). Target
layers are identified by their *input*.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models import reading
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.weights import drafter_fields as fields
from ppow_jax.weights.drafter_tensors import Q_NORM
from ppow_jax.weights.feature_layers import LAYER_IDS, read_layers

_ARCHITECTURES = ("Eagle3DraftModel", "Eagle3Speculator", "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_LAYER = "transformer_layer_config"
_SPECULATIVE_TOKENS = 5  # a server's default number of draft tokens
_DEFAULTS: dict[str, dict[str, Any]] = {  # of the transformers classes, if they differ from those of `layer_fields`
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}
_DRAFT_VOCAB_SIZE = 32000  # default if the key is missing


def to_json(config: DrafterConfig, target_name: str | None, target_architecture: str | None) -> dict[str, Any]:
    """The drafter's config.json, without the dtype of the file."""
    layer = fields.layer_to_json(config) | {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
    }
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": _SPECULATIVE_TOKENS,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": [_ARCHITECTURES[0]],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config.draft_vocab_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "target_hidden_size": None if config.target_hidden_size == config.hidden_size else config.target_hidden_size,
        LAYER_IDS: list(config.feature_layers) or None,
        "tie_word_embeddings": False,
        _LAYER: layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target_name,
                "architectures": [] if target_architecture is None else [target_architecture],
            },
        },
    }


def is_speculators(config: Mapping[str, Any]) -> bool:
    """True if a config.json has this format."""
    return any(key in config for key in ("speculators_model_type", "speculators_config", _LAYER))


def from_json(
    config: Mapping[str, Any],
    tensors: Collection[str],
    num_layers: int | None,
    where: str,
    target_width: int | None = None,
) -> DrafterConfig:
    """Reads a config.json; see `flat.from_json`. A missing norm_before_residual means true, as in vLLM."""
    if config.get("speculators_model_type") != "eagle3":
        kind = config.get("speculators_model_type")
        raise UserError(f"{where}: speculators_model_type = {kind!r} is not supported, only 'eagle3'")
    names = config.get("architectures")
    if names is not None and (not isinstance(names, list) or len(names) != 1 or names[0] not in _ARCHITECTURES):
        raise UserError(f"{where}: architectures = {names!r} is not supported, only {', '.join(_ARCHITECTURES)}")
    layer = config.get(_LAYER)
    if not isinstance(layer, Mapping):
        raise UserError(f"{where}: {_LAYER} = {layer!r} must be an object")
    inner = f"{where}: {_LAYER}"
    kind = layer.get("model_type", "qwen3" if Q_NORM in tensors else "llama")
    if kind not in list(_DEFAULTS):
        raise UserError(f"{inner}: model_type = {kind!r} is not supported, only {' or '.join(_DEFAULTS)}")
    layer = _DEFAULTS[kind] | {key: value for key, value in layer.items() if value is not None}
    described = fields.layer_from_json(layer, tensors, inner)
    return DrafterConfig(
        **described,
        **fields.vocabulary_sizes(layer, config, tensors, where, default=_DRAFT_VOCAB_SIZE),
        **fields.norms(config, tensors, where, norm_output=False),
        num_layers=fields.num_layers(layer, tensors, inner, True, num_layers),
        qk_norm=kind == "qwen3",
        target_hidden_size=fields.target_width(config, tensors, described["hidden_size"], target_width, where),
        feature_layers=read_layers(config, {}, num_layers, where),
        norm_before_residual=reading.boolean(config, "norm_before_residual", where, default=True),
    )


def target_of(config: Mapping[str, Any]) -> str | None:
    """The target's name, if the file has one."""
    value: Any = config
    for key in ("speculators_config", "verifier", "name_or_path"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
