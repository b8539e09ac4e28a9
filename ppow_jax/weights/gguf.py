"""Targets out of GGUF files, dequantised with the `gguf` package."""

import dataclasses
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig

# GGUF name inside a block -> ours. Q and K rows are permuted there for Llama (interleaved RoPE pairs).
_LAYER = {
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_norm": "post_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_TOP = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
_ARCHITECTURES = {"llama": "LlamaForCausalLM"}


def load_target(path: str | Path, dtype=jnp.float32) -> tuple[ModelConfig, dict]:
    """Reads a GGUF file into (config, parameters), every matrix `[out, in]` in `dtype`.

    Raises UserError for a file that is not GGUF, is cut short, has another architecture than the supported ones,
    or lacks, repeats or mis-shapes a tensor (all of them in one message).
    """
    reader = open_file(path)
    config = _config(reader, str(path))
    return config, _parameters(reader, config, dtype, str(path))


def open_file(path: str | Path) -> gguf.GGUFReader:
    """The file's metadata and tensors, not yet dequantised. Raises UserError if it is not GGUF or is cut short."""
    try:
        return _Reader(path)
    except Exception as error:  # the reader checks little: damaged files end in errors of many kinds
        raise UserError(f"{path}: not a readable GGUF file ({error})") from None


class _Reader(gguf.GGUFReader):
    """Stops at the end of the file; the package's own goes on with empty values, for as long as a length says."""

    def _get(self, offset, dtype, count=1, *rest, **options):
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, *rest, **options)


def _config(reader: gguf.GGUFReader, where: str) -> ModelConfig:
    def get(key, *default):
        field = reader.get_field(key)
        if field is None and not default:
            raise UserError(f"{where}: metadata key {key!r} is missing")
        return default[0] if field is None else field.contents()

    name = get("general.architecture")
    if name not in list(_ARCHITECTURES):
        raise UserError(f"{where}: GGUF architecture {name!r} is not supported (supported: {sorted(_ARCHITECTURES)})")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
    embed_shape = tensors["token_embd.weight"].shape
    if len(embed_shape) != 2:
        raise UserError(f"{where}: tensor 'token_embd.weight' has shape {embed_shape.tolist()}, not two axes")
    scaling = get(f"{name}.rope.scaling.type", "none")
    config = ModelConfig.from_hf(
        {
            "architectures": [_ARCHITECTURES[name]],
            "vocab_size": int(embed_shape[1]),
            "hidden_size": get(f"{name}.embedding_length"),
            "intermediate_size": get(f"{name}.feed_forward_length"),
            "num_hidden_layers": get(f"{name}.block_count"),
            "num_attention_heads": get(f"{name}.attention.head_count"),
            "num_key_value_heads": get(f"{name}.attention.head_count_kv", None),
            "head_dim": get(f"{name}.attention.key_length", None),
            "rms_norm_eps": get(f"{name}.attention.layer_norm_rms_epsilon"),
            "rope_theta": get(f"{name}.rope.freq_base", 10000.0),
            "rope_scaling": None if scaling == "none" else {"rope_type": scaling},
            "max_position_embeddings": get(f"{name}.context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "eos_token_id": get("tokenizer.ggml.eos_token_id", None),
        },
        where,
    )
    rotated = get(f"{name}.rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise UserError(f"{where}: {name}.rope.dimension_count = {rotated} must be the head's {config.head_dim}")
    return config


def _parameters(reader, config: ModelConfig, dtype, where: str) -> dict:
    params: dict = {"layers": [{} for _ in range(config.num_layers)]}
    layers = {f"blk.{n}": layer for n, layer in enumerate(params["layers"])}
    problems = []
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        block, _, rest = name.rpartition(".")
        scope, ours = (layers[block], _LAYER.get(rest)) if block in layers else (params, _TOP.get(name))
        if ours is None or not tensor.name.endswith(".weight"):
            problems.append(f"unknown tensor {tensor.name}")
            continue
        try:
            value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            problems.append(f"{tensor.name}: cannot dequantise {tensor.tensor_type.name} ({error})")
            continue
        if ours in ("q_proj", "k_proj") and value.ndim == 2 and len(value) % config.head_dim == 0:
            value = _unpermute(value, config.head_dim)
        scope[ours] = jnp.asarray(value, dtype)
    problems += config_problems(params, config)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems[:20]))
    return params


def _unpermute(w_OxI: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF stores rotary pairs of Llama interleaved (x0 y0 x1 y1 ..); ours is (x0 x1 .. y0 y1 ..)."""
    rows = w_OxI.reshape(-1, head_dim // 2, 2, w_OxI.shape[1])
    return rows.transpose(0, 2, 1, 3).reshape(w_OxI.shape)


def config_problems(params: dict, config: ModelConfig) -> list[str]:
    """Missing or mis-shaped entries of `params` against what `config` promises."""
    one_layer = dataclasses.replace(config, num_layers=1)
    expected = jax.eval_shape(lambda: transformer.init(jax.random.key(0), one_layer))
    (layer,) = expected.pop("layers")
    scopes = [("", params, expected), *((f"layer {n} ", x, layer) for n, x in enumerate(params["layers"]))]
    problems = []
    for where, found, shapes in scopes:
        for name, leaf in shapes.items():
            if name not in found:
                problems.append(f"{where}{name} is missing")
            elif found[name].shape != leaf.shape:
                problems.append(f"{where}{name} has shape {found[name].shape}, the config says {leaf.shape}")
    return problems
