"""Writes the reference values of the tests with torch (`pip install torch==2.13.0`), which the tests do not need.

Run it as `python -m tests.golden.make`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.drafter_parity import compare
from experiments.eagle3_torch import eagle3
from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.evaluation.torch_parity import (
    CHATS,
    TEXTS,
    gguf_file,
    questions,
    torch_answer,
    torch_logits,
    torch_model,
    torch_tokenizer,
)
from ppow_jax.files import write_atomic
from ppow_jax.weights import targets
from ppow_jax.weights.loading import find_drafter
from tests.golden import families, models

DRAFTS = {"window": 4, "max_new_tokens": 48}
DRAFTED_ANSWERS = 2


def make_golden(directory: Path) -> int:
    """Writes llama.npz, families.npz, drafter.npz, smollm2.json and drafts.json."""
    values: dict[str, Any] = {}
    for name, config in models.TARGETS.items():
        prompts, eos = models.prompts(config), config.eos_token_ids
        with torch_model(config, models.target_params(config)) as model:
            answers = [torch_answer(model, prompt, models.NEW_TOKENS, eos) for prompt in prompts]
            texts = [np.r_[prompt, answer] for prompt, answer in zip(prompts, answers, strict=True)]
            tokens = np.stack([np.resize(text, models.NEW_TOKENS) for text in texts])
            values |= {f"{name}.tokens": tokens, f"{name}.logits": torch_logits(model, tokens)}
            values |= {f"{name}.hidden{i}": torch_hidden(model, tokens, i) for i in models.FEATURE_LAYERS[name]}
        values |= {f"{name}.answer{i}": answer for i, answer in enumerate(answers)}
    np.savez_compressed(directory / "llama.npz", **values)

    values = families.golden_values(torch_model, torch_logits)
    np.savez_compressed(directory / "families.npz", **values)

    values = {}
    for name, drafter in models.DRAFTERS.items():
        outputs = eagle3(drafter, models.drafter_params(drafter), **models.drafter_inputs(drafter))
        values |= {f"{name}.{key}": value for key, value in outputs.items()}
    np.savez_compressed(directory / "drafter.npz", **values)

    target = targets.load("smollm2-135m", "float32")
    theirs = torch_tokenizer(gguf_file("smollm2-135m"))
    chats = [[vars(m) for m in chat] for chat in CHATS]
    with torch_model(target.config, target.params) as model:
        prompts = [encode_prompt(target.tokenizer, [Message("user", text)]) for text in questions(3)]
        texts = [torch_answer(model, prompt, 32, target.config.eos_token_ids) for prompt in prompts]
    golden = {
        "texts": [{"text": text, "ids": theirs(text)["input_ids"]} for text in TEXTS],
        "chats": [{"messages": c, "ids": theirs.apply_chat_template(c, return_dict=False)} for c in chats],
        "greedy": [{"prompt": p.tolist(), "answer": a.tolist()} for p, a in zip(prompts, texts, strict=True)],
    }
    write_atomic(directory / "smollm2.json", json.dumps(golden) + "\n")
    write_atomic(directory / "drafts.json", json.dumps(drafts()) + "\n")


def drafts() -> dict[str, Any]:
    """Drafts of the shipped drafter, round by round, by its definition in torch."""
    directory = find_drafter("auto", "smollm2-135m")
    answers = [
        {"question": question} | ours | {"rounds": rounds}
        for question, ours, _, rounds in compare("smollm2-135m", directory, *DRAFTS.values(), DRAFTED_ANSWERS)
    ]
    return DRAFTS | {"answers": answers}


def torch_hidden(model: Any, tokens_BxT: np.ndarray, layer: int) -> np.ndarray:
    """transformers' hidden_states[layer]: what enters that layer."""
    import torch

    with torch.inference_mode():
        out = model(torch.as_tensor(tokens_BxT, dtype=torch.long), output_hidden_states=True)
    return out.hidden_states[layer].numpy()


if __name__ == "__main__":
    make_golden(Path(__file__).parent)
