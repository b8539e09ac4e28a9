"""Tokens that a lookup gets right in packed texts: only those of the window's own text before it, up to its end."""

import jax
import numpy as np

from ppow_jax.data.batches import Batches
from ppow_jax.data.encoding import Example
from ppow_jax.training.steps.looked_up import looked_up

K = 4


def batches(texts: list[tuple[list[int], int]], row_length: int = 24) -> Batches:
    """All texts, each with its number of prompt tokens, in one row."""
    examples = [Example(np.array(t, np.int32), np.arange(len(t)) >= prompt, f"text {t[0]}") for t, prompt in texts]
    return Batches(examples, seed=0, batch_size=1, row_length=row_length, max_anchors=row_length)


def found_by_text(made: Batches) -> dict[str, list[int]]:
    """Numbers of found tokens at the anchors of each text."""
    found_M, m = np.asarray(jax.jit(looked_up, static_argnums=1)(made.at(0), K))[0], 0
    texts = {}
    (members,) = made.members(0)
    for i in members:
        count = len(made.anchors[i])
        texts[made.examples[i].source] = found_M[m : m + count].tolist()
        m += count
    assert not found_M[m:].any()  # unused anchors
    return texts


def test_a_copied_phrase_is_found_to_its_end():
    # the prompt is 1 2 3 4 5, the answer 9 2 3 4 5 1: after its 2 the lookup goes on 3 4 5, then is wrong
    made = batches([([1, 2, 3, 4, 5, 9, 2, 3, 4, 5, 1], 5)])
    # roots: 9, 2, 3, 4, 5; a window begins with the token after its root
    assert found_by_text(made) == {"text 1": [0, 3, 2, 1, 0]}


def test_a_text_does_not_look_into_its_neighbours():
    copied = [1, 2, 3, 4, 5, 6]
    alone = found_by_text(batches([([7, 2, 3, 4, 5, 6], 1)]))
    beside = found_by_text(batches([(copied, 1), ([7, 2, 3, 4, 5, 6], 1)]))
    assert alone["text 7"] == beside["text 7"] == [0] * 4


def test_repetition_is_found_and_ends_with_the_text():
    made = batches([([8, 5, 5, 5, 5, 5], 1), ([5, 5, 5], 1)])
    found = found_by_text(made)
    # roots: the first 5 (nothing to look up), then with 3, 2, 1 tokens left
    assert found["text 8"] == [0, 3, 2, 1]
    assert found["text 5"] == [1]  # the next text of the row begins with the same token, which does not count
    assert found_by_text(batches([([5] * 16, 1)], row_length=16))["text 5"] == [K] * 10 + [4, 3, 2, 1]
