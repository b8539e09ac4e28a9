"""Small random targets of every family, which numpy alone rebuilds; families.npz holds what transformers makes of them.

`python -m tests.golden.make` writes the values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig

from .models import matrix, norm

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# Name -> (architecture, what its config has beside the sizes).
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama-linear": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "linear", "factor": 2.5}, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_scaling": YARN}),
    "qwen2-sliding": ("Qwen2ForCausalLM", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 12}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"head_dim": 16, **MOE, "mlp_only_layers": [0]}),
    "qwen3-moe-other": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 8, **MOE, **SLIDING, "norm_topk_prob": False, "decoder_sparse_step": 2, "attention_bias": True},
    ),
}
TARGETS = {
    name: ModelConfig.from_hf({"architectures": [architecture], **SIZES, **more}, name)
    for name, (architecture, more) in _CONFIGS.items()
}
PROMPTS, NEW_TOKENS, LOGIT_ROWS = 20, 64, 2
MARGIN = 1e-3  # greedy texts nearer than this to a tie, in logits, are left out: rounding could turn them


def params(name: str) -> dict:
    """Weights large enough that the next token is far from uniform."""
    random = np.random.RandomState(len(name))

    def values(shapes: dict) -> dict:
        found: dict = {}
        for part, shape in shapes.items():
            if part == "layers":
                found[part] = [values(layer) for layer in shape]
            else:
                found[part] = (norm if part.endswith("norm") else matrix)(random, *shape)
        return found

    return values(transformer.shapes(TARGETS[name]))


def prompts(name: str, number: int) -> list[np.ndarray]:
    """Token ids of ragged prompts."""
    random = np.random.RandomState(7 + len(name))
    return [random.randint(0, SIZES["vocab_size"], random.randint(2, 12)) for _ in range(number)]


def golden_values(torch_model: Callable, torch_logits: Callable) -> dict[str, Any]:
    """By name: length_N of the prompts, tokens_NxL of prompts and greedy texts, and the logits of the first texts."""
    values: dict[str, Any] = {}
    for name, config in TARGETS.items():
        candidates = prompts(name, PROMPTS + PROMPTS // 2)
        length_N, rows = np.array([len(prompt) for prompt in candidates]), np.arange(len(candidates))
        tokens_NxL = np.zeros((len(rows), length_N.max() + NEW_TOKENS), int)
        for tokens, prompt in zip(tokens_NxL, candidates, strict=True):
            tokens[: len(prompt)] = prompt
        margin_N = np.full(len(rows), np.inf)
        with torch_model(config, params(name)) as model:
            for step in range(NEW_TOKENS):  # what lies to the right of a token does not change its logits
                end = length_N.max() + step
                z_NxV = torch_logits(model, tokens_NxL[:, :end])[rows, length_N + step - 1]
                tokens_NxL[rows, length_N + step] = z_NxV.argmax(-1)
                best_Nx2 = np.sort(z_NxV)[:, -2:]
                margin_N = np.minimum(margin_N, best_Nx2[:, 1] - best_Nx2[:, 0])
            sure = np.flatnonzero(margin_N > MARGIN)[:PROMPTS]
            assert len(sure) == PROMPTS, f"{name}: only {len(sure)} prompts lead to sure texts"
            for i, row in enumerate(sure[:LOGIT_ROWS]):
                text_1xT = tokens_NxL[row : row + 1, : length_N[row] + NEW_TOKENS]
                values[f"{name}.logits{i}"] = torch_logits(model, text_1xT)[0]
        values[f"{name}.length"] = length_N[sure].astype(np.uint8)
        values[f"{name}.tokens"] = tokens_NxL[sure].astype(np.uint8)
    return values
