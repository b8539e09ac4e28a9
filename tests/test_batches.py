"""Packing: nothing lost, nothing twice, nothing across a border, and the step alone says it all."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ppow_jax.data.batches import Batches, cut_to_fit, find_anchors, plan_epoch
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError

SHAPE = {"batch_size": 3, "row_length": 256, "max_anchors": 160}


def make_examples(n, longest=200):
    """Examples whose first token is their own number, with one to three answers each."""
    rng, examples = np.random.default_rng(0), []
    for i in range(n):
        length = int(rng.integers(20, longest))
        mask = np.zeros(length, bool)
        for begin in rng.integers(1, length - 8, rng.integers(1, 4)):
            mask[begin : begin + rng.integers(3, 60)] = True
        examples.append(Example(np.r_[i, rng.integers(0, 1000, length - 1)].astype(np.int32), mask, f"x:{i}"))
    return examples


def segments(batch):
    """(row, slice) of every segment of a batch."""
    for b, row in enumerate(batch.segment_BxT):
        for s in range(1, row.max() + 1):
            here = np.flatnonzero(row == s)
            assert (np.diff(here) == 1).all()
            yield b, slice(here[0], here[-1] + 1)


def digest(batch):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in batch)).hexdigest()


def test_anchor_definition():
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
    # the answer 2..4 gives 1 and 2, the lone 6 nothing, 8..9 gives 7
    np.testing.assert_array_equal(find_anchors(mask), [1, 2, 7])
    assert find_anchors(mask).dtype == np.int32
    assert len(find_anchors(np.ones(2, bool))) == len(find_anchors(np.ones(1, bool))) == 0


def test_every_example_once_per_epoch():
    examples = make_examples(200)
    batches = Batches(examples, seed=5, **SHAPE)
    for epoch in range(2):
        seen = []
        for step in range(batches.steps_of_epochs(epoch), batches.steps_of_epochs(epoch + 1)):
            assert batches.locate(step)[0] == epoch
            batch = batches.at(step)
            for b, here in segments(batch):
                tokens = batch.tokens_BxT[b, here]
                seen.append(int(tokens[0]))
                np.testing.assert_array_equal(tokens, examples[seen[-1]].tokens)
                np.testing.assert_array_equal(batch.position_BxT[b, here], np.arange(len(tokens)))
        assert sorted(seen) == list(range(200))


def test_anchors_of_a_batch():
    examples = make_examples(100)
    batches = Batches(examples, seed=1, **SHAPE)
    for step in range(batches.steps_of_epochs(1)):
        batch = batches.at(step)
        expected = [set() for _ in range(SHAPE["batch_size"])]
        for b, here in segments(batch):
            mask = examples[int(batch.tokens_BxT[b, here.start])].answer_mask
            anchors = [i for i in range(len(mask) - 2) if mask[i + 1] and mask[i + 2]]
            expected[b] |= {here.start + i for i in anchors}
        for b, anchors in enumerate(expected):
            found = batch.anchor_BxM[b, batch.anchor_mask_BxM[b]]
            assert set(found.tolist()) == anchors and (np.diff(found) > 0).all()
            segment = batch.segment_BxT[b]
            assert (segment[found] == segment[found + 2]).all() and (segment[found] > 0).all()
        assert (batch.anchor_BxM[~batch.anchor_mask_BxM] == 0).all()


def test_shapes_and_types_never_change():
    batches = Batches(make_examples(50), seed=0, **SHAPE)
    kinds = {
        tuple((a.shape, a.dtype.name) for a in batches.at(s)) for s in range(2 * batches.steps_of_epochs(1))
    }
    tokens, anchors = (3, 256), (3, 160)
    assert kinds == {((tokens, "int32"),) * 3 + ((anchors, "int32"), (anchors, "bool"))}


def test_last_batch_is_filled_with_padding():
    batches = Batches(make_examples(3, longest=30), seed=0, **SHAPE)
    assert batches.steps_of_epochs(1) == 1
    batch = batches.at(0)
    assert (batch.segment_BxT[0] > 0).any() and not batch.segment_BxT[1:].any()
    assert not batch.anchor_mask_BxM[1:].any()


def test_step_alone_determines_the_batch_in_any_process_and_order():
    steps = [17, 0, 5]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_batches as t;"
        f"b = t.Batches(t.make_examples(60), seed=3, **t.SHAPE); print(*(t.digest(b.at(s)) for s in {steps}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={"PYTHONPATH": ".", "PYTHONHASHSEED": "7"},
    )
    batches = Batches(make_examples(60), seed=3, **SHAPE)
    here = {s: digest(batches.at(s)) for s in range(18)}
    assert other.stdout.split() == [here[s] for s in steps]
    assert len(set(here.values())) == 18


def test_shuffles_differ_between_epochs_and_seeds():
    lengths, counts = np.full(300, 20), np.full(300, 5)
    orders = {
        tuple(plan_epoch(lengths, counts, seed=s, epoch=e, row_length=64, max_anchors=40).order)
        for s in range(3)
        for e in range(3)
    }
    assert len(orders) == 9


def test_order_stays_random():
    """Long examples do not come first, though packing takes them first."""
    lengths = np.random.default_rng(0).integers(10, 1000, 5000)
    plan = plan_epoch(lengths, lengths // 2, seed=0, epoch=0, row_length=1024, max_anchors=512)
    rank = np.corrcoef(np.arange(len(plan.order)), lengths[plan.order])[0, 1]
    assert abs(rank) < 0.05


@pytest.mark.parametrize(("row_length", "max_anchors"), [(2048, 1400), (1024, 700), (512, 360)])
def test_fill_on_realistic_lengths(row_length, max_anchors):
    lengths = np.random.default_rng(1).lognormal(5.5, 0.9, 20_000).astype(int) + 20
    lengths = np.minimum(lengths, row_length)
    counts = np.minimum((lengths * 0.6).astype(int), max_anchors)
    plan = plan_epoch(lengths, counts, seed=0, epoch=0, row_length=row_length, max_anchors=max_anchors)
    rows = [plan.order[a:b] for a, b in zip(plan.row_start[:-1], plan.row_start[1:], strict=True)]
    assert max(lengths[r].sum() for r in rows) <= row_length
    assert max(counts[r].sum() for r in rows) <= max_anchors
    assert sorted(plan.order.tolist()) == list(range(20_000))
    assert lengths.sum() / (plan.num_rows * row_length) > 0.9


def test_cutting():
    example = Example(np.arange(100, dtype=np.int32), np.arange(100) >= 10, "x")
    assert cut_to_fit(example, 100, 89) is example
    assert len(cut_to_fit(example, 50, 89).tokens) == 50
    cut = cut_to_fit(example, 100, 20)  # the answer starts at 10, so the anchors are 9, 10, ...
    np.testing.assert_array_equal(find_anchors(cut.answer_mask), np.arange(9, 29))


def test_examples_without_anchor_are_left_out(caplog):
    useless = Example(np.arange(10, dtype=np.int32), np.arange(10) == 4, "x")
    batches = Batches([*make_examples(5), useless], seed=0, **SHAPE)
    assert len(batches.examples) == 5 and "1 of 6 examples left out" in caplog.text
    with pytest.raises(UserError, match="none of the 1 examples"):
        Batches([useless], seed=0, **SHAPE)
    with pytest.raises(UserError, match="none of the 0 examples"):
        Batches([], seed=0, **SHAPE)
    with pytest.raises(UserError, match="row_length is 0"):
        Batches(make_examples(5), seed=0, batch_size=1, row_length=0, max_anchors=1)
