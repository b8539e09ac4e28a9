"""Earlier answers for lookups: kept within bounds and across runs, searched after the request's own text, lossless."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from ppow_jax.errors import UserError
from ppow_jax.inference.datastore import EMPTY, LEAD, NAME, Datastore
from ppow_jax.speculation.ngram import LONGEST, find


def looked_up(text: list[int], store: list[int], N: int = 3) -> tuple[int, list[int]]:
    row = jnp.array([text + [7] * (24 - len(text))])
    padded = jnp.array([EMPTY] * (32 - len(store)) + store)
    matched_B, token_BxN = find(row, jnp.array([len(text)]), N, padded)
    return int(matched_B[0]), token_BxN[0].tolist()


@pytest.mark.parametrize(
    ("text", "store", "matched", "tokens"),
    [
        ([9, 8, 1, 2], [1, 2, 3, 4, 5, 6], 2, [3, 4, 5]),  # only in the store
        ([1, 2, 5, 1, 2], [1, 2, 3, 4, 5, 6], 2, [5, 1, 2]),  # as long in both: the row's own
        ([2, 5, 1, 2], [1, 2, 3, 4, 5, 6], 2, [3, 4, 5]),  # longer in the store
        ([1, 2, 3, 9, 1, 2, 3], [2, 3, 4, 5, 6], 3, [9, 1, 2]),  # longer in the row
        ([1, 2, 5, 1, 2], [], 2, [5, 1, 2]),  # nothing stored
        ([4], [4, 5, 6, 8, 4, 9, 9, 9], 1, [9, 9, 9]),  # the latest
    ],
    ids=str,
)
def test_the_longest_match_counts_and_the_rows_own_comes_first(text, store, matched, tokens):
    assert looked_up(text, store) == (matched, tokens)


def test_nothing_matches_an_empty_place():
    assert looked_up([3], [])[0] == looked_up([3, 4], [5, 6])[0] == 0
    long = list(range(1, 20))
    assert looked_up(long, long)[0] == LONGEST


def test_a_store_is_bounded_and_kept(tmp_path):
    store = Datastore(tmp_path / "new", vocab_size=50, size=12)
    assert (np.asarray(store.array) == EMPTY).all()
    store.add(list(range(10)), [20, 21, 22])
    assert store.tokens.tolist() == [*range(10 - LEAD, 10), 20, 21, 22]
    store.add(list(range(10)), [20, 21, 22])  # the same again
    assert np.asarray(store.array).tolist() == [EMPTY] * 5 + store.tokens.tolist() and len(store.tokens) == 7
    store.add([1], [30, 31, 32, 33, 34, 35])
    assert store.tokens.tolist() == [8, 9, 20, 21, 22, 1, 30, 31, 32, 33, 34, 35] == np.asarray(store.array).tolist()
    store.save()
    again = Datastore(tmp_path / "new", vocab_size=50, size=4)
    assert again.tokens.tolist() == [32, 33, 34, 35]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]


def test_files_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--datastore=.*a_file: must be a directory"):
        (tmp_path / "a_file").write_text("")
        Datastore(tmp_path / "a_file", 50)
    store = Datastore(tmp_path, 50)
    store.add([], [3, 49])
    store.save()
    with pytest.raises(UserError, match="must hold tokens of this target, 0 to 48"):
        Datastore(tmp_path, 49)
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:40])
    with pytest.raises(UserError, match=f"{NAME} is no store of tokens"):
        Datastore(tmp_path, 50)
    store.save()
    whole = (tmp_path / NAME).read_bytes()
    refused = 0
    for i in range(0, len(whole), 5):
        (tmp_path / NAME).write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        try:
            assert Datastore(tmp_path, 50).tokens.tolist() == [3, 49]  # a byte that does not matter, such as the time
        except UserError as error:
            refused += str(error).startswith(f"--datastore={tmp_path}: {NAME} ")
    assert refused > len(whole) // 10
    with open(tmp_path / NAME, "wb") as file:
        np.save(file, np.zeros(3, np.int32))  # an array, but no archive
    with pytest.raises(UserError, match=f"{NAME} is no store of tokens"):
        Datastore(tmp_path, 50)
    np.savez(tmp_path / NAME, tokens=np.zeros((2, 2)))
    with pytest.raises(UserError, match="must hold tokens"):
        Datastore(tmp_path, 50)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_stay_the_same_and_are_found_when_asked_again(tmp_path, temperature):
    """The second answer is in the store as a whole: nearly all of its tokens are looked up."""
    plain, speculation = small_model.model(), small_model.MODES["ngram"]
    model = dataclasses.replace(plain, datastore=Datastore(tmp_path, plain.target.config.vocab_size, 512))
    how = {"max_new_tokens": small_model.NEW, "temperature": temperature, "seed": 3}
    (wanted,) = plain.generate("Once upon", speculation="off", **how)
    first, second = (model.generate("Once upon", speculation=speculation, **how)[0] for _ in range(2))
    assert first.token_ids == second.token_ids == wanted.token_ids
    lead = first.prompt_ids[-LEAD:]
    assert model.datastore.tokens.tolist() == [*lead, *first.token_ids]
    assert second.stats.num_spec_steps < first.stats.num_spec_steps
    "".join(model.stream("A", speculation=speculation, **how))
    assert len(model.datastore.tokens) > len(lead) + len(first.token_ids)  # streamed answers are kept as well
