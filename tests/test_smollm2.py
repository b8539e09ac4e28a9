"""SmolLM2 writes the text that transformers writes, with its drafter and without."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twelve_tokens import GREEDY, answers

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.evaluation.loading import load_drafter
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.speculation import generate
from ppow_jax.speculation.settings import chain
from ppow_jax.weights import targets

DRAFTERS = Path(__file__).parents[1] / "drafters" / "smollm2-135m"


def smollm2_drafter(target: targets.Target) -> Drafter:
    """The shipped drafter, or a random one as long as there is none."""
    if (DRAFTERS / "config.json").is_file():
        return load_drafter(DRAFTERS, target, "float32")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    shared += ("rms_norm_eps", "rope_theta", "max_position_embeddings")
    config = DrafterConfig(
        **{name: getattr(target.config, name) for name in shared},
        draft_vocab_size=1024,
        target_hidden_size=target.config.hidden_size,
        feature_layers=(2, 15, 27),
        fc_norm=False,
    )
    return Drafter(config, drafting.init(jax.random.key(0), config), jnp.arange(1024) * 7)


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

    plain = answers(run(0, None))
    assert plain[: len(golden)] == [entry["answer"] for entry in golden]
    assert answers(run(5, smollm2_drafter(target))) == plain
