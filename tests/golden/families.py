"""Small random targets of every family, which numpy alone rebuilds; families.npz holds what transformers makes of them.

`python -m experiments.parity --make_golden=tests/golden` writes the values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig

from .models import matrix, norm

SIZES = {
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
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

# Name -> (architecture, what its config has beside the sizes).
_CONFIGS = {
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
        found = {}
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


def golden_values(torch_model: Callable, torch_answer: Callable, torch_logits: Callable) -> dict[str, np.ndarray]:
    """By name: length_N of the prompts, tokens_NxL of prompts and greedy texts, and the logits of the first texts."""
    values: dict[str, Any] = {}
    for name, config in TARGETS.items():
        texts: list[np.ndarray] = []
        with torch_model(config, params(name)) as model:
            for prompt in prompts(name, 3 * PROMPTS):
                if len(texts) == PROMPTS:
                    break
                text = np.r_[prompt, torch_answer(model, prompt, NEW_TOKENS, ())]
                logits = torch_logits(model, text[None])[0]
                best = np.sort(logits[len(prompt) - 1 : -1])[:, -2:]
                if (best[:, 1] - best[:, 0]).min() > MARGIN:
                    if len(texts) < LOGIT_ROWS:
                        values[f"{name}.logits{len(texts)}"] = logits
                    texts.append(text)
        assert len(texts) == PROMPTS, f"{name}: only {len(texts)} prompts lead to sure texts"
        values[f"{name}.length"] = np.array([len(text) - NEW_TOKENS for text in texts], np.uint8)
        longest = max(map(len, texts))
        values[f"{name}.tokens"] = np.stack([np.r_[t, np.zeros(longest - len(t), int)] for t in texts]).astype(np.uint8)
    return values
