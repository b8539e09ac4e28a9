"""Targets from GGUF files, dequantised with the `gguf` package."""

import re
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.reading import shortest
from ppow_jax.weights import ends
from ppow_jax.weights.gguf_file import GgufFile, open_model
from ppow_jax.weights.layout import Path as Place
from ppow_jax.weights.layout import Put, put_whole

# GGUF name inside a block -> ours.
_LAYER = {
    "attn_norm.weight": "input_norm",
    "attn_output.weight": "o_proj",
    "attn_output.bias": "o_bias",
    "ffn_norm.weight": "post_norm",
    "ffn_gate_inp.weight": "router",
    **{f"attn_{x}.weight": f"{x}_proj" for x in "qkv"},
    **{f"attn_{x}.bias": f"{x}_bias" for x in "qkv"},
    **{f"attn_{x}_norm.weight": f"{x}_norm" for x in "qk"},
    **{f"ffn_{x}.weight": f"{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}.bias": f"{x}_bias" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_exps.weight": f"{x}_proj" for x in ("gate", "up", "down")},  # all experts of the layer
}
_TOP = {"token_embd.weight": "embed", "output_norm.weight": "norm", "output.weight": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling in a GGUF file
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
_INTERLEAVED = ("llama",)  # families with interleaved rotary pairs in the rows of Q and K; all others use our layout


def load_target(path: str | Path, dtype=jnp.float32, put: Put = put_whole) -> tuple[ModelConfig, dict]:
    """Reads a GGUF file, or the parts of a split one, into (config, parameters). See `read_target`."""
    return read_target(open_model(path), dtype, put)


def read_target(file: GgufFile, dtype=jnp.float32, put: Put = put_whole) -> tuple[ModelConfig, dict]:
    """Reads a GGUF file into (config, parameters), every matrix `[out, in]` in `dtype`. put: places parameters.

    Raises UserError for a file with an unsupported architecture, or with missing, repeated or mis-shaped
    tensors (all of them in one message).
    """
    config = read_config(file)
    return config, _parameters(file, config, dtype, put)


def read_config(file: GgufFile) -> ModelConfig:
    """The config of a GGUF file's model. Raises UserError for an unsupported or damaged one."""
    get, where = file.get, file.path
    kind = get("general.type", "model")
    if kind != "model":
        raise UserError(f"{where}: contains no model: general.type = {kind!r}")
    name = get("general.architecture")
    if name not in list(_ARCHITECTURES):
        raise UserError(f"{where}: GGUF architecture {name!r} is not supported (supported: {sorted(_ARCHITECTURES)})")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
    embed_shape = tensors["token_embd.weight"].shape
    if len(embed_shape) != 2:
        raise UserError(f"{where}: tensor 'token_embd.weight' has shape {embed_shape.tolist()}, not two axes")
    config = ModelConfig.from_hf(
        {
            **_family_keys(name, get, tensors),
            "architectures": [_ARCHITECTURES[name]],
            "vocab_size": int(embed_shape[1]),
            "hidden_size": get(f"{name}.embedding_length"),
            "intermediate_size": get(f"{name}.feed_forward_length"),
            "num_hidden_layers": get(f"{name}.block_count"),
            "num_attention_heads": get(f"{name}.attention.head_count"),
            "num_key_value_heads": get(f"{name}.attention.head_count_kv", None),
            "head_dim": get(f"{name}.attention.key_length", None),
            "rms_norm_eps": _decimal(get(f"{name}.attention.layer_norm_rms_epsilon")),
            "rope_theta": get(f"{name}.rope.freq_base", 10000.0),
            "rope_scaling": _rope_scaling(name, get, tensors.get(_ROPE_FACTORS), where),
            "max_position_embeddings": get(f"{name}.context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "eos_token_id": list(ends.of_gguf(file)),
        },
        where,
    )
    rotated = get(f"{name}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise UserError(f"{where}: {name}.rope.dimension_count = {rotated} must be the head's {config.head_dim}")
    return config


def _decimal(value: Any) -> Any:
    """A number as it was before it was stored in float32; anything else unchanged, to be refused."""
    return shortest(value) if isinstance(value, float) else value


def _family_keys(name: str, get, tensors) -> dict:
    """The input of `families.FAMILIES`, from metadata and the names of the tensors."""
    keys: dict = {"attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_down.bias" in tensors}
    if name == "qwen3moe":
        dense = (re.fullmatch(r"blk\.(\d{1,9})\.ffn_gate\.weight", tensor) for tensor in tensors)
        keys |= {
            "num_experts": get(f"{name}.expert_count"),
            "num_experts_per_tok": get(f"{name}.expert_used_count"),
            "moe_intermediate_size": get(f"{name}.expert_feed_forward_length"),
            "norm_topk_prob": get(f"{name}.expert_weights_norm", True),  # llama.cpp always norms them
            "mlp_only_layers": [int(match[1]) for match in dense if match],
        }
    return keys


def _rope_scaling(name: str, get, factors, where: str) -> dict | None:
    linear = get(f"{name}.rope.scale_linear", None)  # the key of old files
    kind = get(f"{name}.rope.scaling.type", "none" if linear in (None, 1.0) else "linear")
    if factors is not None:
        if factors.tensor_type != gguf.GGMLQuantizationType.F32:
            raise UserError(f"{where}: {_ROPE_FACTORS} must be F32, not {factors.tensor_type.name}")
        divisors = np.asarray(factors.data, np.float64).reshape(-1).tolist()
        both = {"short_factor": divisors, "long_factor": divisors}
        return {"rope_type": "longrope", "attention_factor": 1.0, **both}
    if kind == "none":
        return None
    return {
        "rope_type": kind,
        "factor": get(f"{name}.rope.scaling.factor", linear),
        "original_max_position_embeddings": get(f"{name}.rope.scaling.original_context_length", None),
    }


def _parameters(file: GgufFile, config: ModelConfig, dtype, put: Put) -> dict:
    params: dict = {"layers": [{} for _ in range(config.num_layers)]}
    layers = {f"blk.{n}": layer for n, layer in enumerate(params["layers"])}
    shapes = transformer.shapes(config)
    known = {f"blk.{n}": layer for n, layer in enumerate(shapes["layers"])}
    interleaved = file.get("general.architecture") in _INTERLEAVED
    problems = []
    for tensor in file.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        block, rest = ".".join(tensor.name.split(".")[:2]), ".".join(tensor.name.split(".")[2:])
        scope, ours = (layers[block], _LAYER.get(rest)) if block in layers else (params, _TOP.get(tensor.name))
        expected = known.get(block, shapes)
        if ours is None or ours not in expected:
            problems.append(f"unknown tensor {tensor.name}")
            continue
        if ours in scope:
            problems.append(f"duplicate tensor {tensor.name}")
            continue
        try:
            value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            problems.append(f"{tensor.name}: cannot dequantise {tensor.tensor_type.name} ({error})")
            continue
        if interleaved and ours[:2] in ("q_", "k_") and len(value) % config.head_dim == 0:
            value = _unpermute(value, config.head_dim)
        path: Place = ("layers", int(block[4:]), ours) if block in known else (ours,)
        scope[ours] = None
        if value.shape != expected[ours]:
            problems.append(f"{_place(path)} has shape {value.shape}, the config says {expected[ours]}")
            continue
        scope[ours] = put(path, value.shape, value.astype(dtype).__getitem__)
    problems += _missing(params, shapes)
    if problems:
        raise UserError(f"{file.path}: " + "; ".join(problems[:20]))
    return params


def _unpermute(rows_O: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes GGUF's interleaving of Llama's rotary pairs (x0 y0 x1 y1 .. -> x0 x1 .. y0 y1 ..). A matrix or bias."""
    pairs = rows_O.reshape(-1, head_dim // 2, 2, *rows_O.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows_O.shape)


def _missing(params: dict, shapes: dict) -> list[str]:
    missing: list[Place] = [(name,) for name in shapes if name not in params]
    for n, (found, wanted) in enumerate(zip(params["layers"], shapes["layers"], strict=True)):
        missing += [("layers", n, name) for name in wanted if name not in found]
    return [f"{_place(path)} is missing" for path in missing]


def _place(path: Place) -> str:
    return f"layer {path[1]} {path[2]}" if len(path) == 3 else str(path[0])
