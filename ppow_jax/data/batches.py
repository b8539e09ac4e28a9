"""Packing of examples into rows of fixed shape, by index.

The batch of a step is a function of (examples, seed, step) and nothing else, so the data state of a run is
one integer. Every epoch holds each example once; its last batch is padded with empty rows, because dropping
rows would drop examples, and losses are (sum, denominator), which empty rows do not change.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

POOL = 2048  # examples that are packed together: large enough for a good fill, small enough to stay shuffled


Array = TypeVar("Array")


class PackedBatch(NamedTuple, Generic[Array]):
    """Rows of examples, each a segment 1.. (0 is padding) whose positions begin at 0.

    Anchors index into T, ascending, valid ones first; see `find_anchors`. int32, the mask bool. NumPy arrays when
    created here, JAX arrays within a program.
    """

    tokens_BxT: Array
    segment_BxT: Array
    position_BxT: Array
    anchor_BxM: Array
    anchor_mask_BxM: Array


class EpochPlan(NamedTuple):
    """Row r of the epoch packs examples order[row_start[r]:row_start[r + 1]]."""

    order: np.ndarray
    row_start: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of rows in the epoch."""
        return len(self.row_start) - 1


def find_anchors(answer_mask: np.ndarray) -> np.ndarray:
    """Every i such that tokens i+1 and i+2 are answer tokens: bool [T] -> int32 [n], ascending."""
    return np.flatnonzero(answer_mask[1:-1] & answer_mask[2:]).astype(np.int32)


def cut_to_fit(example: Example, row_length: int, max_anchors: int) -> Example:
    """The leading part of the example that fits a row; the example itself if it fits."""
    length = min(len(example.tokens), row_length)
    anchors = find_anchors(example.answer_mask[:length])
    if len(anchors) > max_anchors:
        length = int(anchors[max_anchors - 1]) + 3
    if length == len(example.tokens):
        return example
    return Example(example.tokens[:length], example.answer_mask[:length], example.source)


def plan_epoch(
    lengths: np.ndarray,
    anchor_counts: np.ndarray,
    *,
    seed: int,
    epoch: int,
    row_length: int,
    max_anchors: int,
) -> EpochPlan:
    """Packs n examples, int [n] lengths (<= row_length) and anchor counts (<= max_anchors), into rows.

    Shuffles, packs pools of POOL examples first-fit-decreasing under both bounds, then shuffles the rows.
    """
    rng = np.random.default_rng([seed, epoch])
    cost = np.maximum(lengths / row_length, anchor_counts / max_anchors)
    shuffled, rows = rng.permutation(len(lengths)), []
    for begin in range(0, len(shuffled), POOL):
        pool = shuffled[begin : begin + POOL]
        pool = pool[np.argsort(-cost[pool], kind="stable")]
        rows += _first_fit(pool, lengths[pool], anchor_counts[pool], row_length, max_anchors)
    rows = [rows[r] for r in rng.permutation(len(rows))]
    row_start = np.cumsum([0, *map(len, rows)])
    return EpochPlan(np.concatenate([rng.permutation(row) for row in rows]), row_start)


class Batches:
    """Packed batches of `examples`, addressed by step.

    Examples too long for a row are cut; those without an anchor (answers of fewer than two tokens) carry no
    training signal and are left out, with a log line. Raises UserError when none is left or a size is below 1.
    """

    def __init__(
        self, examples: Sequence[Example], *, seed: int, batch_size: int, row_length: int, max_anchors: int
    ) -> None:
        for value, name in (
            (batch_size, "batch_size"),
            (row_length, "row_length"),
            (max_anchors, "max_anchors"),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}, but must be at least 1")
        cut = [cut_to_fit(e, row_length, max_anchors) for e in examples]
        anchors = [find_anchors(e.answer_mask) for e in cut]
        kept = [i for i, a in enumerate(anchors) if len(a)]
        if not kept:
            raise UserError(
                f"none of the {len(examples)} examples has two answer tokens in its first {row_length} "
                "tokens: raise the row length, or check the data"
            )
        if len(kept) < len(examples):
            log.warning(
                "%d of %d examples left out: fewer than two answer tokens",
                len(examples) - len(kept),
                len(examples),
            )
        self.examples = [cut[i] for i in kept]
        self.anchors = [anchors[i] for i in kept]
        self.batch_size, self.row_length, self.max_anchors = batch_size, row_length, max_anchors
        lengths = np.array([len(e.tokens) for e in self.examples])
        counts = np.array([len(a) for a in self.anchors])
        self._plan = lru_cache(2)(
            lambda epoch: plan_epoch(
                lengths, counts, seed=seed, epoch=epoch, row_length=row_length, max_anchors=max_anchors
            )
        )
        self._first_step = [0]  # of each epoch planned so far

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch in the epoch) of a step."""
        while self._first_step[-1] <= step:
            rows = self._plan(len(self._first_step) - 1).num_rows
            self._first_step.append(self._first_step[-1] - (-rows // self.batch_size))
        epoch = int(np.searchsorted(self._first_step, step, "right")) - 1
        return epoch, step - self._first_step[epoch]

    def steps_of_epochs(self, epochs: int) -> int:
        """Number of steps that the first `epochs` epochs take."""
        while len(self._first_step) <= epochs:
            self.locate(self._first_step[-1])
        return self._first_step[epochs]

    def at(self, step: int) -> PackedBatch[np.ndarray]:
        """The batch of a step."""
        batch = empty_batch(self.batch_size, self.row_length, self.max_anchors)
        for b, members in enumerate(self.members(step)):
            self._fill_row(batch, b, members)
        return batch

    def members(self, step: int) -> list[np.ndarray]:
        """The examples in each row of the batch of a step, as indices into `examples`, in their order."""
        epoch, index = self.locate(step)
        plan, first = self._plan(epoch), index * self.batch_size
        rows = range(first, min(first + self.batch_size, plan.num_rows))
        return [plan.order[plan.row_start[row] : plan.row_start[row + 1]] for row in rows]

    def _fill_row(self, batch: PackedBatch[np.ndarray], b: int, row: np.ndarray) -> None:
        t = m = 0
        for segment, i in enumerate(row, 1):
            tokens, anchors = self.examples[i].tokens, self.anchors[i]
            here = slice(t, t + len(tokens))
            batch.tokens_BxT[b, here] = tokens
            batch.segment_BxT[b, here] = segment
            batch.position_BxT[b, here] = np.arange(len(tokens))
            batch.anchor_BxM[b, m : m + len(anchors)] = anchors + t
            batch.anchor_mask_BxM[b, m : m + len(anchors)] = True
            t, m = t + len(tokens), m + len(anchors)


def empty_batch(batch_size: int, row_length: int, max_anchors: int) -> PackedBatch[np.ndarray]:
    """A batch of padding."""
    tokens, anchors = (batch_size, row_length), (batch_size, max_anchors)
    return PackedBatch(
        np.zeros(tokens, np.int32),
        np.zeros(tokens, np.int32),
        np.zeros(tokens, np.int32),
        np.zeros(anchors, np.int32),
        np.zeros(anchors, bool),
    )


def _first_fit(
    pool: np.ndarray, lengths: np.ndarray, counts: np.ndarray, row_length: int, max_anchors: int
) -> list[list[int]]:
    """Puts each example, in order, into the first row with room for its tokens and its anchors."""
    rows: list[list[int]] = []
    free_tokens, free_anchors = np.full(len(pool), row_length), np.full(len(pool), max_anchors)
    for example, length, count in zip(pool.tolist(), lengths.tolist(), counts.tolist(), strict=True):
        fits = (free_tokens[: len(rows) + 1] >= length) & (free_anchors[: len(rows) + 1] >= count)
        row = int(fits.argmax())  # the row after the last open one is empty and always fits
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        free_tokens[row] -= length
        free_anchors[row] -= count
    return rows
