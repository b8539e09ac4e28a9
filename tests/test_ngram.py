"""The n-gram lookup: which continuation it finds, and how often it says that such continuations are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.speculation.ngram import (
    LONGEST,
    MEMORY,
    START_RATES,
    WEIGHT,
    Counts,
    Match,
    count,
    find,
    log_chances,
    right,
)

BEYOND = 7  # fills the row behind its text: a token that texts end with, so that a look behind the text would be seen


def looked_up(text: list[int], N: int = 4, L: int = 32) -> tuple[int, list[int]]:
    row = jnp.array([text + [BEYOND] * (L - len(text))])
    matched_B, token_BxN = find(row, jnp.array([len(text)]), N)
    return int(matched_B[0]), token_BxN[0].tolist()


@pytest.mark.parametrize(
    ("text", "matched", "tokens"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], 2, [3, 4, 5, 6]),
        ([9, 2, 8, 1, 2, 3, 0, 9, 2, 4, 1, 2], 2, [3, 0, 9, 2]),  # the longest match, not the most recent
        ([1, 2, 3, 4, 1, 2, 5, 6, 1, 2], 2, [5, 6, 1, 2]),  # of two as long the most recent
        ([7, 1, 2, 7], 1, [1, 2, 7, 1]),  # at the very start; then on from the start of the repetition
        ([5, 7, 7], 1, [7, 7, 7, 7]),  # not itself, and nothing behind the text
        ([3, 1, 2, 1, 2], 2, [1, 2, 1, 2]),  # a match may overlap the last tokens
        ([7, 7], 1, [7, 7, 7, 7]),
    ],
    ids=str,
)
def test_the_continuation_of_the_longest_most_recent_match(text, matched, tokens):
    assert looked_up(text) == (matched, tokens)


@pytest.mark.parametrize("text", [[7], [1, 2, 3], [1, 2, 3, 7]], ids=str)
def test_nothing_matches(text):
    assert looked_up(text)[0] == 0


def test_long_matches_count_up_to_the_longest():
    text = [*range(10, 10 + LONGEST + 5), 99, *range(10, 10 + LONGEST + 5)]
    assert looked_up(text, N=2, L=48) == (LONGEST, [99, 10])


def plainly(text: list[int], N: int) -> tuple[int, list[int]]:
    """The same search, written as loops."""
    best, found = 0, 0
    for last in range(len(text) - 1):
        run = 0
        while run < LONGEST and last - run >= 0 and text[last - run] == text[len(text) - 1 - run]:
            run += 1
        if run >= best and run:
            best, found = run, last
    longer = list(text)
    for i in range(N if best else 0):
        longer.append(longer[found + 1 + i])
    return best, longer[len(text) :]


def test_rows_of_a_batch_are_searched_each_by_itself():
    rng = np.random.default_rng(0)
    length_B = rng.integers(1, 25, 200)
    tokens_BxL = rng.integers(0, 4, (200, 24))
    matched_B, token_BxN = jax.jit(find, static_argnums=2)(jnp.asarray(tokens_BxL), jnp.asarray(length_B), 5)
    lengths = set()
    for tokens, length, matched, found in zip(tokens_BxL, length_B, matched_B, token_BxN, strict=True):
        expected = plainly(tokens[:length].tolist(), 5)
        assert int(matched) == expected[0]
        assert not matched or found.tolist() == expected[1]
        lengths.add(int(matched))
    assert {0, 1, 2, 3, 4, 5} <= lengths


def test_chances_are_products_of_rates_after_growing_matches():
    match = Match(jnp.array([2, LONGEST - 1, 0]), jnp.zeros((3, 3), jnp.int32))
    found = np.exp(log_chances(Counts.start(3), match))
    rate = START_RATES
    np.testing.assert_allclose(found[0], np.cumprod(rate[1:4]), rtol=1e-5)
    np.testing.assert_allclose(found[1], np.cumprod([rate[-2], rate[-1], rate[-1]]), rtol=1e-5)
    assert (found[2] == 0).all()


def test_right_tokens_are_counted_whether_verified_or_not():
    match = Match(jnp.array([2, 2, 2, 0]), jnp.array([[5, 6, 8]] * 4))
    token_BxK1 = jnp.array([[5, 6, 1, 1], [5, 5, 5, 5], [4, 6, 8, 8], [5, 6, 8, 8]])
    accepted_B = jnp.array([2, 0, 2, 2])  # row 1 commits one token only: the second drafted one stays unjudged
    assert right(match, token_BxK1, accepted_B).tolist() == [2, 1, 0, 0]
    live_B = jnp.ones(4, bool)
    start, found = Counts.start(4), count(Counts.start(4), match, token_BxK1, accepted_B, live_B)
    judged = np.full((4, LONGEST), WEIGHT, np.float32)
    hits = judged * np.array(START_RATES, np.float32)
    for row, places, rights in ((0, [1, 2, 3], [1, 1, 0]), (1, [1], [1]), (2, [1], [0])):
        judged[row, places] = MEMORY * judged[row, places] + 1
        hits[row, places] = MEMORY * hits[row, places] + rights
    np.testing.assert_allclose(found.judged_BxM, judged, rtol=1e-6)
    np.testing.assert_allclose(found.right_BxM, hits, rtol=1e-6)
    done = count(start, match, token_BxK1, accepted_B, ~live_B)
    np.testing.assert_array_equal(done.judged_BxM, start.judged_BxM)


def test_several_tokens_after_a_long_match_count_together():
    match = Match(jnp.array([LONGEST]), jnp.array([[5, 6, 8, 9]]))
    found = count(Counts.start(1), match, jnp.array([[5, 6, 1]]), jnp.array([2]), jnp.array([True]))
    assert float(found.judged_BxM[0, -1]) == pytest.approx(MEMORY**3 * WEIGHT + 3)
    assert float(found.right_BxM[0, -1]) == pytest.approx(MEMORY**3 * WEIGHT * START_RATES[-1] + 2)
