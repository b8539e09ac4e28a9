"""Targets out of GGUF files, dequantised with the `gguf` package."""

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError
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
    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error})") from None
    config = _config(reader, str(path))
    return config, _parameters(reader, config, dtype, str(path))


def _config(reader: gguf.GGUFReader, where: str) -> ModelConfig:
    def get(key, default=None):
        field = reader.get_field(key)
        if field is None and default is None:
            raise UserError(f"{where}: metadata key {key!r} is missing")
        return default if field is None else field.contents()

    name = get("general.architecture")
    if name not in _ARCHITECTURES:
        raise UserError(
            f"{where}: GGUF architecture {name!r} is not supported (supported: {sorted(_ARCHITECTURES)})"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
    D, H = get(f"{name}.embedding_length"), get(f"{name}.attention.head_count")
    eos = get("tokenizer.ggml.eos_token_id", -1)
    return ModelConfig.from_hf(
        {
            "architectures": [_ARCHITECTURES[name]],
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "hidden_size": D,
            "intermediate_size": get(f"{name}.feed_forward_length"),
            "num_hidden_layers": get(f"{name}.block_count"),
            "num_attention_heads": H,
            "num_key_value_heads": get(f"{name}.attention.head_count_kv", H),
            "head_dim": get(f"{name}.attention.key_length", D // H),
            "rms_norm_eps": get(f"{name}.attention.layer_norm_rms_epsilon"),
            "rope_theta": get(f"{name}.rope.freq_base", 10000.0),
            "max_position_embeddings": get(f"{name}.context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            **({"eos_token_id": eos} if eos >= 0 else {}),
        },
        where,
    )


def _parameters(reader, config: ModelConfig, dtype, where: str) -> dict:
    params: dict = {"layers": [{} for _ in range(config.num_layers)]}
    problems = []
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        if name == "rope_freqs":
            continue
        scope, ours = params, _TOP.get(name)
        if name.startswith("blk."):
            _, n, rest = name.split(".", 2)
            known = n.isdigit() and int(n) < config.num_layers
            scope, ours = (params["layers"][int(n)], _LAYER.get(rest)) if known else (params, None)
        if ours is None or not tensor.name.endswith(".weight"):
            problems.append(f"unknown tensor {tensor.name}")
            continue
        try:
            value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            problems.append(f"{tensor.name}: cannot dequantise {tensor.tensor_type.name} ({error})")
            continue
        if ours in ("q_proj", "k_proj"):
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
    import jax

    from ppow_jax.models import transformer

    expected = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    paths = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    problems = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = paths.get(jax.tree_util.keystr(path))
        if found is None:
            problems.append(f"missing tensor {jax.tree_util.keystr(path)}")
        elif found.shape != leaf.shape:
            problems.append(
                f"{jax.tree_util.keystr(path)} has shape {found.shape}, the config says {leaf.shape}"
            )
    return problems
