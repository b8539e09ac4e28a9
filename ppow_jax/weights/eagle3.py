"""EAGLE-3 drafters in the flat format, the one of EAGLE, SpecForge and SGLang, which vLLM reads too.

Layer ids: in the file, `eagle_config` names layers by their *output* (SGLang and SpecForge add 1); ours name
them by their *input*, so ours are one larger. A top-level `eagle_aux_hidden_state_layer_ids` (vLLM's) has the
input ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models import config as models
from ppow_jax.models.drafter_config import DrafterConfig, check_feature_layers, default_feature_layers
from ppow_jax.weights import huggingface as hf

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_EMBED = "embed_tokens.weight"
_NAMES = {
    "fc": "fc.weight",
    "input_norm": "midlayer.input_layernorm.weight",
    "hidden_norm": "midlayer.hidden_norm.weight",
    "q_proj": "midlayer.self_attn.q_proj.weight",
    "k_proj": "midlayer.self_attn.k_proj.weight",
    "v_proj": "midlayer.self_attn.v_proj.weight",
    "o_proj": "midlayer.self_attn.o_proj.weight",
    "post_norm": "midlayer.post_attention_layernorm.weight",
    "gate_proj": "midlayer.mlp.gate_proj.weight",
    "up_proj": "midlayer.mlp.up_proj.weight",
    "down_proj": "midlayer.mlp.down_proj.weight",
    "norm": "norm.weight",
    "lm_head": "lm_head.weight",
}
_FC_NORMS = tuple(f"fc_norm.{i}.weight" for i in range(3))


def export_drafter(
    directory: str | Path,
    config: DrafterConfig,
    params: Mapping[str, Any],
    target_ids_W: Any,
    *,
    dtype: str = "bfloat16",
    target_name: str | None = None,
) -> None:
    """Writes a drafter; a directory that holds one already gets the new one, whole.

    The embedding is never written: servers take the target's when there is none.

    Args:
      params: the drafter's matrices `[out, in]`, see `tensor_shapes`.
      target_ids_W: target id of each draft id, ascending.
      dtype: of the weights in the file: bfloat16, float16 or float32.
      target_name: the target's name, recorded in config.json for people.

    Raises:
      UserError: for an unknown dtype, weights that are not finite in it, a directory that cannot be written.
      ValueError: if parameters and config do not belong together.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}")
    ids_W = np.asarray(target_ids_W, np.int64)
    if ids_W.shape != (config.draft_vocab_size,) or not _ascending_ids(ids_W, config.vocab_size):
        raise ValueError(f"needed: {config.draft_vocab_size} ascending target ids below {config.vocab_size}")
    shapes = tensor_shapes(config)
    if {name: np.shape(value) for name, value in params.items()} != shapes:
        raise ValueError(f"parameters {sorted(params)} do not have the names and shapes {shapes}")

    tensors: dict[str, np.ndarray] = {}
    with np.errstate(over="ignore"):
        for ours in shapes:
            value = np.asarray(params[ours]).astype(DTYPES[dtype])
            if not np.isfinite(value).all():
                raise UserError(f"{directory}: not written, {ours} has values that are not finite in {dtype}")
            names = _FC_NORMS if ours == "fc_norm" else (_NAMES[ours],)
            tensors |= dict(zip(names, value if ours == "fc_norm" else [value], strict=True))
    mask_V = np.zeros(config.vocab_size, np.bool_)
    mask_V[ids_W] = True
    tensors |= {"d2t": ids_W - np.arange(len(ids_W)), "t2d": mask_V}
    json_config = config_to_json(config) | {"torch_dtype": dtype}
    if target_name is not None:
        json_config["target_name_or_path"] = target_name
    hf.replace_files(
        directory, {hf.WEIGHTS: hf.tensors_writer(tensors), hf.CONFIG: hf.json_writer(json_config)}
    )


def import_drafter(
    directory: str | Path, *, num_target_layers: int | None = None, target_embed_VxD: Any = None
) -> tuple[DrafterConfig, dict[str, np.ndarray], np.ndarray]:
    """Reads a drafter, ours or anyone's, into (config, parameters as stored, target_ids_W int32 ascending).

    Names may begin with `midlayer.` or `layers.0.`, and with `model.` before that. Draft ids that are not in
    the order of target ids are sorted, the rows of the head with them.

    Args:
      num_target_layers: N of the target, needed only for files that do not say which layers feed them: they
        use the default choice.
      target_embed_VxD: the target's embedding, needed only for files that carry a copy of it: it is compared
        and left out.

    Raises:
      UserError: for a config that is not supported, broken or missing files, an embedding of the drafter's
        own, and for unknown, missing, duplicated, mis-shaped tensors or ids (all of them in one message).
    """
    directory = Path(directory)
    config_json = hf.read_json(directory / hf.CONFIG)
    if not (directory / hf.WEIGHTS).exists() and (directory / "pytorch_model.bin").exists():
        raise UserError(
            f"{directory / 'pytorch_model.bin'}: pickled weights are not read; save them as {hf.WEIGHTS}"
        )
    stored, problems = _canonical(hf.open_safetensors(directory / hf.WEIGHTS))
    config = _config(config_json, _FC_NORMS[0] in stored, num_target_layers, str(directory / hf.CONFIG))
    V, W = config.vocab_size, config.draft_vocab_size
    embed = stored.pop(_EMBED, None)

    expected = {_NAMES[ours]: shape for ours, shape in tensor_shapes(config).items() if ours != "fc_norm"}
    if config.fc_norm:
        expected |= dict.fromkeys(_FC_NORMS, (config.target_hidden_size,))
    expected |= {name: shape for name, shape in {"d2t": (W,), "t2d": (V,)}.items() if name in stored}
    problems += hf.tensor_problems(stored, expected, {"d2t": ("I64", "I32"), "t2d": ("BOOL",)})
    if not {"d2t", "t2d"} & stored.keys() and W != V:
        problems.append(f"d2t: missing (without d2t and t2d, draft_vocab_size {W} must equal vocab_size {V})")
    hf.raise_problems(str(directory), problems)

    if embed is not None:
        _check_embedding(embed, target_embed_VxD, str(directory))
    params = {ours: stored[name].read() for ours, name in _NAMES.items()}
    if config.fc_norm:
        params["fc_norm"] = np.stack([stored[name].read() for name in _FC_NORMS])
    problems = [f"{ours}: not finite" for ours, value in params.items() if not np.isfinite(value).all()]
    ids_W, order_W = _target_ids(stored, V, W, problems)
    hf.raise_problems(str(directory), problems)
    params["lm_head"] = params["lm_head"][order_W]
    return config, params, ids_W.astype(np.int32)


def tensor_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each of the drafter's parameters, by our names."""
    E, D, W = config.hidden_size, config.target_hidden_size, config.draft_vocab_size
    I = config.intermediate_size  # noqa: E741
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc": (E, 3 * D),
        "input_norm": (E,),
        "hidden_norm": (E,),
        "q_proj": (q, 2 * E),
        "k_proj": (kv, 2 * E),
        "v_proj": (kv, 2 * E),
        "o_proj": (E, q),
        "post_norm": (E,),
        "gate_proj": (I, E),
        "up_proj": (I, E),
        "down_proj": (E, I),
        "norm": (E,),
        "lm_head": (W, E),
    }
    return shapes | ({"fc_norm": (3, D)} if config.fc_norm else {})


def config_to_json(config: DrafterConfig) -> dict[str, Any]:
    """The drafter's config.json, without the dtype of the file."""
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[0]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        **models.layer_fields_to_hf(config),
        "norm_before_residual": config.norm_before_residual,
        "eagle_config": {_LAYER_IDS: [i - 1 for i in config.feature_layers], "use_aux_hidden_state": True},
    }
    if config.target_hidden_size != config.hidden_size:
        result["target_hidden_size"] = config.target_hidden_size
    if config.fc_norm:  # the two switches by which servers know EAGLE-3.1
        result |= {"fc_norm": True, "norm_output": True}
    return result


def _config(config: Mapping[str, Any], fc_norm: bool, num_layers: int | None, where: str) -> DrafterConfig:
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        raise UserError(f"{where}: the speculators format is not supported, only the flat EAGLE-3 format")
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UserError(f"{where}: architectures = {names!r} is not supported, only one of {supported}")
    models.refuse_options(
        config,
        where,
        {
            "hidden_act": ("silu",),
            "num_hidden_layers": (1,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "partial_rotary_factor": (1, 1.0),
            "norm_before_fc": (False,),
            "quantization_config": (),
        },
    )
    for key in ("fc_norm", "norm_output"):
        if models.boolean(config, key, where, default=fc_norm) != fc_norm:
            has = "has" if fc_norm else "lacks"
            raise UserError(f"{where}: {key} = {config[key]}, but {hf.WEIGHTS} {has} {_FC_NORMS[0]}")
    vocab_size = models.positive_int(config, "vocab_size", where)
    draft_vocab_size = models.positive_int(config, "draft_vocab_size", where, default=vocab_size)
    if draft_vocab_size > vocab_size:
        raise UserError(f"{where}: draft_vocab_size = {draft_vocab_size} must not exceed {vocab_size = }")
    fields = models.layer_fields(config, where)
    width = models.positive_int(config, "target_hidden_size", where, default=fields["hidden_size"])
    return DrafterConfig(
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=width,
        feature_layers=_feature_layers(config, num_layers, where),
        fc_norm=fc_norm,
        norm_before_residual=models.boolean(config, "norm_before_residual", where, default=False),
        **fields,
    )


def _feature_layers(config: Mapping[str, Any], num_layers: int | None, where: str) -> tuple[int, int, int]:
    eagle = config.get("eagle_config")
    eagle = {} if eagle is None else eagle
    if not isinstance(eagle, dict):
        raise UserError(f"{where}: eagle_config = {eagle!r} must be an object")
    models.refuse_options(eagle, f"{where}: eagle_config", {"use_aux_hidden_state": (True,)})
    key, shift = (f"eagle_config.{_LAYER_IDS}", 1) if eagle.get(_LAYER_IDS) is not None else (_LAYER_IDS, 0)
    ids = eagle.get(_LAYER_IDS) if shift else config.get(_LAYER_IDS)
    if ids is None and num_layers is None:
        raise UserError(f"{where}: {key} is missing; name the target, whose depth tells the default")
    if ids is None:
        return default_feature_layers(num_layers)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{where}: {key} = {ids!r} must be a list of layer ids")
    layers = tuple(i + shift for i in ids)
    check_feature_layers(layers, num_layers, f"{where}: {key} = {ids}")
    return layers


def _canonical(stored: Mapping[str, hf.StoredTensor]) -> tuple[dict[str, hf.StoredTensor], list[str]]:
    """The tensors under the names of the flat format, and which of them come twice."""
    result: dict[str, hf.StoredTensor] = {}
    problems = []
    for name, tensor in stored.items():
        short = name.removeprefix("model.")
        short = "midlayer." + short.removeprefix("layers.0.") if short.startswith("layers.0.") else short
        if hf.is_buffer(short):
            continue
        if short in result:
            problems.append(f"{name}: duplicated, under another spelling")
        result[short] = tensor
    return result, problems


def _target_ids(
    stored: Mapping[str, hf.StoredTensor], V: int, W: int, problems: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(target ids ascending, order of the file's rows that makes them so); adds to `problems`."""
    mask_V = stored["t2d"].read() if "t2d" in stored else None
    if "d2t" in stored:
        ids_W = stored["d2t"].read().astype(np.int64) + np.arange(W)
    elif mask_V is not None:
        ids_W = np.flatnonzero(mask_V)
    else:
        ids_W = np.arange(W)
    order_W = np.argsort(ids_W, kind="stable")
    sorted_W = ids_W[order_W]
    if len(ids_W) != W:
        problems.append(f"t2d: marks {len(ids_W)} tokens, draft_vocab_size is {W}")
    elif not _ascending_ids(sorted_W, V):
        problems.append(f"d2t: draft id + offset must give different target ids of 0..{V - 1}")
    elif mask_V is not None and not np.array_equal(np.flatnonzero(mask_V), sorted_W):
        problems.append("t2d: marks other tokens than d2t names")
    return sorted_W, order_W


def _ascending_ids(ids_W: np.ndarray, V: int) -> bool:
    return bool(ids_W[0] >= 0 and ids_W[-1] < V and (np.diff(ids_W) > 0).all())


def _check_embedding(stored: hf.StoredTensor, target_VxD: Any, where: str) -> None:
    """A drafter may carry a copy of the target's embedding; one of its own is more than we can run."""
    if target_VxD is None:
        raise UserError(f"{where}: {_EMBED} can only be checked beside the target; give the target too")
    target_VxD = np.asarray(target_VxD)
    same = stored.shape == target_VxD.shape and stored.dtype in hf.FLOATS
    if not same or not np.allclose(
        stored.read().astype(np.float32), target_VxD.astype(np.float32), rtol=1e-2, atol=1e-4
    ):
        raise UserError(f"{where}: {_EMBED} is not the target's; a drafter with its own is not supported")
