"""The shipped drafter on SmolLM2 drafts what the public EAGLE-3 definition in torch drafts, to the token."""

import json
from pathlib import Path

import pytest

from experiments.drafter_parity import our_rounds
from ppow_jax import load

GOLDEN = Path(__file__).parent / "golden" / "drafts.json"


@pytest.mark.full
@pytest.mark.smollm2
def test_the_shipped_drafter_drafts_as_its_files_say():
    """Text, draft tokens and rounds (and so tau), read from the files by torch alone and recomputed without a cache."""
    golden = json.loads(GOLDEN.read_text())
    model = load("smollm2-135m", dtype="float32")
    for answer in golden["answers"]:
        made = our_rounds(model, answer["question"], golden["window"], golden["max_new_tokens"])
        assert made == {key: answer[key] for key in ("prompt", "answer", "rounds")}
