"""config.json of the flat EAGLE-3 format: that of EAGLE, SpecForge, SGLang and sglang-jax, also read by vLLM.

Layer ids: in `eagle_config`, layers are identified by their *output* (SGLang and SpecForge add 1); at the top level,
which vLLM reads, by their *input*, as in `DrafterConfig`. Both are written.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models import reading
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.weights import drafter_fields as fields
from ppow_jax.weights.drafter_tensors import Q_NORM
from ppow_jax.weights.feature_layers import LAYER_IDS, read_layers

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_EAGLE: dict[str, tuple[Any, ...]] = {  # Model-Optimizer's switches, each with one supported value
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "parallel_draft_step": (0, 1),
}


def to_json(config: DrafterConfig, where: str) -> dict[str, Any]:
    """The drafter's config.json, without the dtype of the file.

    Raises:
      UserError: for a drafter that the format cannot represent; it names the format that can.
    """
    reason = reason_against(config)
    if reason is not None:
        raise UserError(f"{where}: {reason}; the speculators format can represent this drafter")
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[0]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        **fields.layer_to_json(config),
        "norm_before_residual": config.norm_before_residual,
        "eagle_config": {"use_aux_hidden_state": True},
    }
    if config.feature_layers:
        result[LAYER_IDS] = list(config.feature_layers)
        result["eagle_config"] = {LAYER_IDS: [i - 1 for i in config.feature_layers]} | result["eagle_config"]
    if config.target_hidden_size != config.hidden_size:
        result["target_hidden_size"] = config.target_hidden_size
    if config.fc_norm or config.norm_output:  # the two switches by which servers recognise EAGLE-3.1
        result |= {"fc_norm": config.fc_norm, "norm_output": config.norm_output}
    if config.norm_before_fc:
        result["norm_before_fc"] = True
    return result


def reason_against(config: DrafterConfig) -> str | None:
    """Reason why the format cannot represent a drafter, or None."""
    if config.num_layers > 1:
        return f"the flat format has one layer, this drafter has {config.num_layers}"
    return "the flat format has no norms of queries and keys" if config.qk_norm else None


def from_json(
    config: Mapping[str, Any],
    tensors: Collection[str],
    num_layers: int | None,
    where: str,
    target_width: int | None = None,
) -> DrafterConfig:
    """Reads a config.json.

    Args:
      tensors: names in the file, in the flat spelling: some parts are recognised by their presence alone. With the
        tensors themselves (a mapping), values missing in the config follow from their shapes.
      num_layers: depth of the target, for files without layer ids; None leaves feature_layers empty.
      target_width: the target's hidden_size, if it is known.

    Raises:
      UserError: for anything missing, impossible or not supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UserError(f"{where}: architectures = {names!r} is not supported, only one of {supported}")
    layer = fields.layer_from_json(config, tensors, where)
    return DrafterConfig(
        **layer,
        **fields.vocabulary_sizes(config, config, tensors, where),
        **fields.norms(config, tensors, where),
        num_layers=fields.num_layers(config, tensors, where, False, num_layers),
        qk_norm=Q_NORM in tensors,
        target_hidden_size=fields.target_width(config, tensors, layer["hidden_size"], target_width, where),
        feature_layers=read_layers(config, _eagle_config(config, where), num_layers, where),
        norm_before_residual=reading.boolean(config, "norm_before_residual", where, default=False),
    )


def _eagle_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    eagle = config.get("eagle_config")
    eagle = {} if eagle is None else eagle
    if not isinstance(eagle, dict):
        raise UserError(f"{where}: eagle_config = {eagle!r} must be an object")
    reading.refuse_options(eagle, f"{where}: eagle_config", _EAGLE)
    return eagle
