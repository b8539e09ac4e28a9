"""Acceptance length of held-out answers while training: what is logged, and the checkpoint that it selects."""

import numpy as np
import pytest
import small_run

from ppow_jax import flags
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.inference import decoding
from ppow_jax.speculation.settings import of_mode
from ppow_jax.training import pipeline
from ppow_jax.training.run.checkpoint import Best
from ppow_jax.training.run.metrics import read_metrics
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import targets
from ppow_jax.weights.loading import load_drafter

MODE = "chain"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of stage 1 whose best checkpoint is that of the decoded acceptance length."""
    directory = tmp_path_factory.mktemp("run") / "w"
    changes = {"stages": "data,supervised", "select": "tau_decoded", "decoded_mode": MODE, "decoded_answers": 3}
    assert pipeline.run(small_run.settings(directory, **changes)) == 0
    return directory


def measured(workdir) -> list[dict]:
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["stage"] == "supervised_held_out"]


def test_the_decoded_acceptance_length_is_logged_with_its_interval(workdir):
    for row in measured(workdir):
        low, tau, high = (row[f"held_out_tau_decoded{end}"] for end in ("_low", "", "_high"))
        assert 1 <= low <= tau <= high
        assert "held_out_tau_sim" in row


def test_it_selects_the_checkpoint(workdir):
    rows = measured(workdir)
    best = max(rows, key=lambda row: row["held_out_tau_decoded"])
    with Best(workdir / "supervised" / "best") as kept:
        assert kept.step == best["step"]


def test_it_equals_decoding(workdir):
    """The last drafter's logged tau is that of decoding the same prompts with it, token by token."""
    target = targets.load("tiny", "float32")
    with np.load(workdir / "answers.npz") as pack:
        assert len(pack["lengths"]) == small_run.FLAGS["num_answers"]
    examples = held_out(workdir, target)[:3]
    drafter = load_drafter(workdir / "drafter_supervised", target, "float32")
    rounds = tokens = 0
    for example in examples:
        first = int(example.answer_mask.argmax())
        length = len(example.tokens) - first
        how = decoding.Decoding(of_mode(MODE, small_run.FLAGS["window"]), max_new_tokens=length)
        answer = decoding.decode(target, drafter, [example.tokens[:first]], how)
        assert answer.answers[0].tolist() == example.tokens[first:].tolist()
        rounds, tokens = rounds + answer.verifications, tokens + answer.decode_tokens
    best = max(row["held_out_tau_decoded"] for row in measured(workdir))
    assert best == pytest.approx(tokens / rounds, rel=1e-6)


def held_out(workdir, target) -> list[Example]:
    """The held-out answers of the run, in the order in which it takes them."""
    from ppow_jax.training import texts

    s = small_run.settings(workdir, stages="data,supervised")
    jobs = texts.collect_questions(s, target)
    corpus = texts.load_corpus(s, workdir, target, jobs, [], type("Never", (), {"requested": False})())
    return corpus.held_out.examples


@pytest.mark.parametrize("change", ["--decoded_mode=off", "--answer_temperature=0.7"])
def test_a_selection_without_its_measurement_is_refused(change, tmp_path):
    with pytest.raises(UserError, match="--select=tau_decoded: needs --decoded_mode and answers at"):
        flags.parse(TrainSettings, [f"--workdir={tmp_path}", "--select=tau_decoded", change])
