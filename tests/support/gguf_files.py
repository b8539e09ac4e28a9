"""Small GGUF files, written with the `gguf` package: models, byte-level and SentencePiece tokenizers."""

import dataclasses
import random
from pathlib import Path

import gguf
import numpy as np
import small_configs
from golden import models
from sentencepiece_reference import BLANK, learn, random_text
from tokenizers import pre_tokenizers

from ppow_jax.models.config import ModelConfig

CONFIG = small_configs.target_config(
    vocab_size=20,
    intermediate_size=64,
    num_layers=2,
    head_dim=16,  # wider than hidden_size // num_heads
    max_position_embeddings=128,
    eos_token_ids=(2,),
)
LAYER = {
    "input_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TOP = {"embed": "token_embd", "norm": "output_norm", "lm_head": "output"}
Type = gguf.GGMLQuantizationType
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|begin|>", "<|end|>"]
TOKENS = [*BYTES, "<|im_start|>", "<|im_end|>", "he"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1],
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.eos_token_id": 257,
}
WHOLE = dataclasses.replace(CONFIG, vocab_size=len(TOKENS))


def named(params: dict) -> dict[str, np.ndarray]:
    """Parameters by their GGUF names, rotary pairs interleaved as llama.cpp's converter leaves them."""
    tensors = {f"{TOP[name]}.weight": x for name, x in params.items() if name != "layers"}
    for n, layer in enumerate(params["layers"]):
        tensors |= {f"blk.{n}.{LAYER[name]}.weight": x for name, x in layer.items()}
    return tensors


def interleaved(w: np.ndarray, num_heads: int) -> np.ndarray:
    halves = w.reshape(num_heads, 2, w.shape[0] // num_heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def metadata(config: ModelConfig) -> dict:
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
    }


def write(path: Path, config=CONFIG, kind=Type.F32, architecture="llama", fields=(), tensors=(), split=0) -> Path:
    """Writes a model; `fields` and `tensors` change or (by None) remove entries. Norms stay float32.

    split: tensors of a part, where the model is written in several; their names are the writer's.
    """
    entries = metadata(config) | dict(fields)
    values = named(models.target_params(config))
    for name in values:
        if ".attn_q." in name or ".attn_k." in name:
            values[name] = interleaved(values[name], len(values[name]) // config.head_dim)
    values |= dict(tensors)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in entries.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in values.items():
        if value is None:
            continue
        stored = kind if value.ndim >= 2 else Type.F32
        if stored in (Type.F32, Type.F16):
            writer.add_tensor(name, value.astype(np.float32 if stored == Type.F32 else np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(path: Path, extra=(), types=None, architecture="llama", **changes) -> Path:
    """A file with all bytes, two control tokens, a merged one, and more tokens (ordinary ones by default)."""
    tokens = [*BYTES, *SPECIAL, "he", *extra]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 256 + [3, 3, 1] + (types or [1] * len(extra)),
        "merges": ["h e"],
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | changes
    return write(
        path, architecture=architecture, fields={f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    )


TEXTS = [random_text(random.Random(seed), "aabbcde  n", 30) for seed in range(60)]
LEARNED = learn(TEXTS, 120)
PIECES = [*LEARNED, *sorted({char for text in TEXTS for char in text.replace(" ", BLANK)} | {BLANK})]
SCORES = {piece: -float(i) for i, piece in enumerate(PIECES)}


def sentencepiece(path: Path, bytes_=True, extra=(), **changes) -> Path:
    """`<unk>`, `<s>`, `</s>`, bytes, pieces, and user-defined tokens."""
    named = [f"<0x{byte:02X}>" for byte in range(256)] if bytes_ else []
    tokens = ["<unk>", "<s>", "</s>", *named, *PIECES, *extra]
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * (3 + len(named)) + list(SCORES.values()) + [-1000.0] * len(extra),
        "token_type": [2, 3, 3] + [6] * len(named) + [1] * len(PIECES) + [4] * len(extra),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    config = dataclasses.replace(CONFIG, vocab_size=len(tokens))
    return write(path, config, fields={f"tokenizer.ggml.{key}": value for key, value in fields.items()})
