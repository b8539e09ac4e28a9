"""Replay buffer: finished requests as training rows of fixed shape."""

import collections
import dataclasses
from typing import Any

import numpy as np

from ppow_jax.data.batches import Batches, PackedBatch, cut_to_fit, find_anchors
from ppow_jax.data.encoding import Example


@dataclasses.dataclass(eq=False)
class Row:
    """One training row, 1 x T. counts: anchors of each answer in it, in their order.

    cached: features_BxTxF and hidden_BxMxD of the target's pass once it was made, see `target_pass.score`. replayed:
    all drafters were replayed on it, so that it may be trained on. uses: training steps made on it.
    """

    batch: PackedBatch
    counts: list[int]
    cached: tuple[Any, Any] | None = None
    replayed: bool = False
    uses: int = 0


class Buffer:
    """Packs finished requests into rows; the oldest row is dropped where there are more than `rows`.

    A request joins the open row; where it does not fit, the row is closed and another begins. skipped: requests without
    two answer tokens in the first `row_length` tokens, which carry no training signal.
    """

    def __init__(self, row_length: int, max_anchors: int, rows: int):
        self.row_length, self.max_anchors = row_length, max_anchors
        self.rows: collections.deque[Row] = collections.deque(maxlen=rows)
        self.skipped = 0
        self._open: list[Example] = []

    def add(self, prompt_ids: np.ndarray, answer_ids: np.ndarray) -> None:
        """Keeps a finished request, token ids [T] each."""
        tokens = np.concatenate([prompt_ids, answer_ids]).astype(np.int32)
        mask = np.arange(len(tokens)) >= len(prompt_ids)
        example = cut_to_fit(Example(tokens, mask, "online"), self.row_length, self.max_anchors)
        if not len(find_anchors(example.answer_mask)):
            self.skipped += 1
            return
        if not self._fits(example):
            self.close_row()
        self._open.append(example)

    def _fits(self, example: Example) -> bool:
        examples = [*self._open, example]
        anchors = sum(len(find_anchors(e.answer_mask)) for e in examples)
        return sum(len(e.tokens) for e in examples) <= self.row_length and anchors <= self.max_anchors

    def close_row(self) -> None:
        """Makes a row of the requests that wait for one, full or not."""
        if self._open:
            shape = {"batch_size": 1, "row_length": self.row_length, "max_anchors": self.max_anchors}
            packed = Batches(self._open, seed=0, **shape)
            counts = [len(packed.anchors[i]) for i in packed.members(0)[0]]
            self.rows.append(Row(packed.at(0), counts))
            self._open = []

    def next(self) -> Row | None:
        """The row to work on: one that was begun, else the newest; None where there is none."""
        begun = (row for row in self.rows if row.cached is not None)
        return next(begun, self.rows[-1] if self.rows else None)
