"""What the config files of both drafter formats have in common."""

from collections.abc import Mapping, Set
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models import config as models
from ppow_jax.models import reading
from ppow_jax.models.drafter_config import DrafterConfig, check_feature_layers, default_feature_layers
from ppow_jax.weights.drafter_tensors import EMBED, FC_NORMS, NORM_BEFORE_FC, O_BIAS

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_ONLY = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}


def layer_from_json(config: Mapping[str, Any], tensors: Set[str], where: str) -> dict[str, Any]:
    """The fields of DrafterConfig that say what its layers look like."""
    reading.refuse_options(config, where, _ONLY)
    bias = reading.boolean(config, "attention_bias", where, default=False)
    bias = reading.boolean(config, "qkv_bias", where, default=bias) or bias
    result = models.layer_fields(config, where)
    return result | {
        "attention_bias": bias,
        "output_bias": bias and O_BIAS in tensors,
        "own_embed": EMBED in tensors,
    }


def layer_to_json(config: DrafterConfig) -> dict[str, Any]:
    """The inverse of `layer_from_json`."""
    result = models.layer_fields_to_hf(config) | {"attention_bias": config.attention_bias}
    return result | ({"qkv_bias": True} if config.attention_bias and not config.output_bias else {})


def vocabulary_sizes(
    target: Mapping[str, Any], drafter: Mapping[str, Any], where: str, default: int | None = None
) -> dict[str, Any]:
    """V and W; `target` is the object that holds vocab_size, `drafter` the one with draft_vocab_size."""
    V = reading.positive_int(target, "vocab_size", where)
    W = reading.positive_int(drafter, "draft_vocab_size", where, default=V if default is None else default)
    if W > V:
        raise UserError(f"{where}: draft_vocab_size = {W} must not exceed vocab_size = {V}")
    return {"vocab_size": V, "draft_vocab_size": W}


def norms(config: Mapping[str, Any], tensors: Set[str], where: str, norm_output: bool | None = None) -> dict[str, Any]:
    """The norms around fc, which config and file must agree upon, and what is fed back.

    norm_output: what a file without that key means; None: the same as fc_norm (EAGLE-3.1 has both).
    """
    found = {"fc_norm": FC_NORMS[0] in tensors, "norm_before_fc": NORM_BEFORE_FC in tensors}
    for key, name in (("fc_norm", FC_NORMS[0]), ("norm_before_fc", NORM_BEFORE_FC)):
        if reading.boolean(config, key, where, default=found[key]) != found[key]:
            verb = "have" if found[key] else "lack"
            raise UserError(f"{where}: {key} = {config[key]}, but the weights {verb} {name}")
    if all(found.values()):
        raise UserError(f"{where}: the weights have both {FC_NORMS[0]} and {NORM_BEFORE_FC}; only one can be")
    default = found["fc_norm"] if norm_output is None else norm_output
    return found | {"norm_output": reading.boolean(config, "norm_output", where, default=default)}


def layer_ids(
    config: Mapping[str, Any], key: str, shift: int, num_layers: int | None, where: str
) -> tuple[int, ...] | None:
    """The target layers that `config` names, as ids of inputs; None where it names none."""
    ids = config.get(LAYER_IDS)
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{where}: {key} = {ids!r} must be a list of layer ids")
    layers = tuple(i + shift for i in ids)
    check_feature_layers(layers, num_layers, f"{where}: {key} = {ids}")
    return layers


def default_layers(num_layers: int | None) -> tuple[int, ...]:
    """EAGLE-3's own choice for a target of that depth, which files that name no layers mean; () if it is not known."""
    return () if num_layers is None else default_feature_layers(num_layers)
