"""Pieces of a growing answer: together they are its text, and each belongs to the token that completes it."""

import numpy as np
from small_model import model, tokenizer

from ppow_jax.inference.requests import Answer
from ppow_jax.serving.pieces import Pieces

T, D, N, BOTH = "target", "drafter", "ngram", "both"


def grown(text: str, signs: str, steps: list[int], stop=(), cut: int = 0) -> tuple[list, str]:
    """Pieces of an answer of one byte per token, read after these numbers of tokens, and its text.

    signs: who proposed each token: the target, the drafter, the lookup (n), or both (b).
    """
    (request,) = model().job(["a"], "off", max_new_tokens=99, stop=[list(stop)]).requests
    answer, pieces, found = Answer(model().target, request, 0.0), Pieces(), []
    ids = tokenizer()(text)["input_ids"]
    ids = ids[: len(ids) - cut]
    tokens = np.array([*request.prompt_ids, *ids])
    source_T = ["tdnb".index(sign) for sign in signs]
    source_L = np.array([0] * len(request.prompt_ids) + source_T)
    for count in steps:
        length = len(request.prompt_ids) + count
        answer.read(tokens, length, count == len(ids), True, np.array([count]), 0, source_L, seconds=0.0)
        found += pieces.more(answer, source_T[: len(answer.ids)])
    return found, answer.text


def test_each_token_has_its_piece():
    found, text = grown("abcd", "tdnt", [1, 3, 4])
    assert found == [("a", T), ("b", D), ("c", N), ("d", T)] and text == "abcd"


def test_a_character_belongs_to_the_token_that_completes_it():
    found, text = grown("a€b", "tddtb", [1, 2, 3, 4, 5])
    assert found == [("a", T), ("€", T), ("b", BOTH)] and text == "a€b"


def test_held_back_text_comes_with_the_stop_that_it_was_not():
    found, text = grown("xaby", "tdtn", [1, 2, 3, 4], stop=["abc"])
    assert "".join(piece for piece, _ in found) == text == "xaby"
    assert found == [("x", T), ("a", D), ("b", T), ("y", N)]


def test_a_stop_text_has_no_piece():
    found, text = grown("xyab", "tdtd", [2, 4], stop=["ab"])
    assert found == [("x", T), ("y", D)] and text == "xy"


def test_an_unfinished_character_at_the_end_belongs_to_the_last_token():
    found, text = grown("a€", "ttd", [1, 3], cut=1)
    assert found == [("a", T), ("\ufffd", D)] and text == "a\ufffd"
