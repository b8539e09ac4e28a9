"""Common parts of the config files of both drafter formats."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models import config as models
from ppow_jax.models import reading
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.weights.drafter_tensors import EMBED, FC, FC_NORMS, NORM_BEFORE_FC, O_BIAS, Q_BIAS
from ppow_jax.weights.feature_layers import NUMBERS

log = logging.getLogger(__name__)
LEAST_DEPTH = 7  # least number of layers of a target; drafters have fewer
_ONLY = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "num_aux_hidden_states": (3,),
    "num_eagle_features": (3,),
}


def layer_from_json(config: Mapping[str, Any], tensors: Collection[str], where: str) -> dict[str, Any]:
    """The fields of DrafterConfig that describe its layers."""
    reading.refuse_options(config, where, _ONLY)
    refuse_windows(config, where)
    bias = reading.boolean(config, "attention_bias", where, default=Q_BIAS in tensors)
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


def refuse_windows(config: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a config has a sliding window, which is not supported for drafters.

    A window at least as long as all positions is not a restriction, and is accepted.
    """
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    named = kinds if isinstance(kinds, list) else [] if kinds is None else [kinds]
    key, value = "sliding_window", window
    if any(kind != "full_attention" for kind in named):
        key, value = "layer_types", kinds
    elif config.get("attention_chunk_size") is not None:
        key, value = "attention_chunk_size", config["attention_chunk_size"]
    elif not reading.boolean(config, "use_sliding_window", where, default=window is not None):
        return
    elif type(window) is int and window >= reading.positive_int(config, "max_position_embeddings", where, default=2048):
        return
    raise UserError(
        f"{where}: {key} = {value!r}: sliding windows are not supported in drafters, only full attention"
        " (where it was trained without one, set use_sliding_window to false)"
    )


def num_layers(
    config: Mapping[str, Any], tensors: Collection[str], where: str, several: bool, of_target: int | None
) -> int:
    """Number of layers with weights in the file: configs often give the target's number instead.

    several: the format supports drafters of several layers. A number that may be the drafter's own (less than
    LEAST_DEPTH, and not of_target, the target's) is then kept, so that missing weights are detected.
    """
    count = 1
    while count < models.MAX_LAYERS and any(name.startswith(f"layers.{count}.") for name in tensors):
        count += 1
    named = reading.positive_int(config, "num_hidden_layers", where, default=count, limit=models.MAX_LAYERS)
    if several and count < named < LEAST_DEPTH and named != of_target:
        return named
    if named != count:
        log.warning("%s: num_hidden_layers = %d, but there are weights of %d: taken as %d", where, named, count, count)
    return count


def target_width(
    config: Mapping[str, Any], tensors: Collection[str], width: int, of_target: int | None, where: str
) -> int:
    """Width of the target's features: from the config, else from the given target, else from the shape of fc.weight.

    width: the drafter's own, usually the same. of_target: the target's, None if it is unknown.
    Raises UserError if fc takes a number of features other than three.
    """
    shape: tuple[int, ...] = tensors[FC].shape if isinstance(tensors, Mapping) and FC in tensors else ()
    columns = shape[1] if len(shape) == 2 and shape[0] == width else 0
    D = reading.positive_int(config, "target_hidden_size", where, default=_guess_width(columns, width, of_target))
    count, left = divmod(columns, D)
    if count in NUMBERS and count != 1 and not left:
        raise UserError(
            f"{where}: {FC} of shape {list(shape)} takes {NUMBERS[count]} features of width {D} from the target:"
            f" {NUMBERS[count]} features are not supported, only three"
        )
    if config.get("target_hidden_size") is None and D != width:
        log.info("%s: target_hidden_size is not given: %d, by the shape of %s", where, D, FC)
    return D


def _guess_width(columns: int, width: int, of_target: int | None) -> int:
    if columns in (0, 3 * width):
        return width
    if of_target is not None and columns % of_target == 0:
        return of_target
    if columns % width == 0 and columns // width in (1, 2, 4, 5):
        return width
    return width if columns % 3 else columns // 3


def vocabulary_sizes(
    target: Mapping[str, Any],
    drafter: Mapping[str, Any],
    tensors: Collection[str],
    where: str,
    default: int | None = None,
) -> dict[str, Any]:
    """V and W; `target` is the object that holds vocab_size, `drafter` the one with draft_vocab_size.

    Without draft_vocab_size it is the length of d2t, else `default`, else V.
    """
    V = reading.positive_int(target, "vocab_size", where)
    default = V if default is None else default
    if isinstance(tensors, Mapping) and len(tensors["d2t"].shape if "d2t" in tensors else ()) == 1:
        default = max(1, tensors["d2t"].shape[0])
    W = reading.positive_int(drafter, "draft_vocab_size", where, default=default)
    if W > V:
        raise UserError(f"{where}: draft_vocab_size = {W} must not exceed vocab_size = {V}")
    return {"vocab_size": V, "draft_vocab_size": W}


def norms(
    config: Mapping[str, Any], tensors: Collection[str], where: str, norm_output: bool | None = None
) -> dict[str, Any]:
    """The norms around fc, on which config and file must agree, and whether the normed output is fed back.

    norm_output: the default of files without that key; None: the same as fc_norm (EAGLE-3.1 has both).
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
