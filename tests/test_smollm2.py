"""SmolLM2 writes the text that transformers writes, with its drafter and without."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from twelve_tokens import GREEDY, answers

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.speculation import generate
from ppow_jax.speculation.settings import chain
from ppow_jax.weights import targets
from ppow_jax.weights.loading import find_drafter, load_drafter


@pytest.mark.full
@pytest.mark.smollm2
def test_smollm2_writes_the_text_of_transformers_with_and_without_a_drafter():
    golden = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())["greedy"]
    target = targets.load("smollm2-135m", "float32")
    questions = [f"What is {i} + {i * 7}? {'Explain. ' * (i % 3)}" for i in range(20 - len(golden))]
    texts = [np.array(entry["prompt"]) for entry in golden]
    texts += [encode_prompt(target.tokenizer, [Message("user", question)]) for question in questions]
    length_B, new = np.array([len(x) for x in texts], np.int32), 32
    prompt_BxP = np.zeros((len(texts), length_B.max()), np.int32)
    for row, text in zip(prompt_BxP, texts, strict=True):
        row[: len(text)] = text
    keys = jax.random.split(jax.random.key(0), len(texts))

    def run(K, drafter_):
        L = generate.cache_length(prompt_BxP.shape[1], new, K)
        begin = (prompt_BxP, length_B, length_B + new, keys)
        state = generate.prefill(target.params, target.config, drafter_, *begin, K=K, sampling=GREEDY, L=L)
        how = {"speculation": chain(K), "sampling": GREEDY}
        return generate.decode(target.params, target.config, drafter_, state, 10_000, **how)

    drafter = load_drafter(find_drafter("auto", "smollm2-135m"), target, "float32")
    plain = answers(run(0, None))
    assert plain[: len(golden)] == [entry["answer"] for entry in golden]
    assert answers(run(5, drafter)) == plain
