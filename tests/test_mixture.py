"""N-gram lookup and its mixture with a drafter: lossless, and as much of each source as is worth its cost."""

import functools

import jax
import numpy as np
import pytest
from twelve_tokens import (
    CHEAP,
    CONFIG,
    DEAR,
    FREE,
    GREEDY,
    PARAMS,
    answers,
    batches,
    cost_table_of,
    drafted_after,
    drafter,
    expected,
    prefill,
    prompts,
    with_mode,
)

from ppow_jax.errors import UserError
from ppow_jax.speculation import generate
from ppow_jax.speculation.settings import adaptive_tree, chain, mixture, ngram, of_mode, off

NGRAM, MIXTURE = ngram(4), mixture(3, 3, 10, 5)


@pytest.mark.parametrize("price", [FREE, CHEAP, DEAR], ids=["free", "cheap", "dear"])
@pytest.mark.parametrize("way", [NGRAM, MIXTURE], ids=["ngram", "mixture"])
def test_both_are_lossless(way, price):
    assert with_mode(way, price=price)[0] == expected()


@pytest.mark.parametrize("way", [NGRAM, MIXTURE], ids=["ngram", "mixture"])
def test_both_weigh_costs(way):
    free, cheap, dear = (with_mode(way, price=price) for price in (FREE, CHEAP, DEAR))
    assert dear[2].sum() < cheap[2].sum() < free[2].sum()
    assert dear[1].sum() >= cheap[1].sum() >= free[1].sum()  # more rounds, smaller ones


def looked_up(text: list[int]) -> list[int]:
    """The lookup's 4 tokens, written as loops; none without a match."""
    best, found = 0, 0
    for last in range(len(text) - 1):
        run = 0
        while run < min(12, last + 1) and text[last - run] == text[len(text) - 1 - run]:
            run += 1
        if run and run >= best:
            best, found = run, last
    longer = list(text)
    for i in range(4 if best else 0):
        longer.append(longer[found + 1 + i])
    return longer[len(text) :]


def test_a_free_lookup_accepts_what_the_text_repeats():
    """Rounds of every prompt, replayed by hand on the known answers."""
    (_, histogram_NxK1, drafted_N), (prompt_NxP, length_N, _) = with_mode(NGRAM, price=FREE), prompts()
    for n, answer in enumerate(expected()):
        text, at, histogram, drafted = [*prompt_NxP[n, : length_N[n]].tolist(), *answer], length_N[n] + 1, [0] * 5, 0
        while at < len(text):
            draft = looked_up(text[:at])
            ahead = text[at : at + 4]
            right = next((i for i, pair in enumerate(zip(draft, ahead, strict=False)) if pair[0] != pair[1]), None)
            accepted = min(len(draft), len(ahead)) if right is None else right
            if at + accepted < len(text):  # what is accepted after the end is not in the text
                histogram[accepted] += 1
            at, drafted = at + accepted + 1, drafted + len(draft)
        whole = histogram_NxK1[n].tolist()
        extra = [a - b for a, b in zip(whole, histogram, strict=True)]
        assert min(extra) >= 0 and sum(extra) <= 1 and drafted == drafted_N[n]


@functools.cache
def decoded(way, price: float = CHEAP):
    made = drafter(True, 1)
    state = prefill(batches()[0], way.window, made if way.needs_drafter else None)
    how = {"speculation": way, "sampling": GREEDY, "cost_table": cost_table_of(price, way)}
    return generate.decode(PARAMS, CONFIG, made, state, 10_000, **how)


@pytest.mark.parametrize("way", [NGRAM, MIXTURE], ids=["ngram", "mixture"])
def test_sources_account_for_every_token(way):
    state = decoded(way, FREE)
    histogram_BxK1 = np.asarray(state.histogram_BxK1)
    drafted_BxS, accepted_BxS = np.asarray(state.sources.drafted_BxS), np.asarray(state.sources.accepted_BxS)
    np.testing.assert_array_equal(drafted_BxS.sum(1), state.drafted_B)
    np.testing.assert_array_equal(accepted_BxS.sum(1), (histogram_BxK1 * np.arange(way.window + 1)).sum(1))
    used = accepted_BxS.sum(0) > 0
    assert used.tolist() == ([False, True, False] if way is NGRAM else [True] * 3)


def test_a_mixture_gains_more_than_either_of_its_parts():
    def tau(way) -> float:
        histogram = with_mode(way, price=FREE)[1].sum(0)
        return 1 + np.dot(histogram, np.arange(len(histogram))) / histogram.sum()

    assert tau(mixture(3, 3, 21, 5)) > max(tau(adaptive_tree(3, 3, 21)), tau(ngram(5))) + 0.1


def test_rounds_without_the_drafter_leave_no_gap_in_its_cache():
    """After rounds of which some were left to the lookup, the drafter's keys are those of a pass over the text."""
    rows, made = batches()[0], drafter(True, 1)
    state = prefill(rows, MIXTURE.window, made)
    how = {"speculation": MIXTURE, "sampling": GREEDY, "cost_table": cost_table_of(CHEAP, MIXTURE)}
    state = state.replace(stats=state.stats.replace(cooldown_B=state.stats.cooldown_B + 3))
    state = generate.decode(PARAMS, CONFIG, made, state, 5, **how)
    going = ~np.asarray(state.done_B)
    assert going.any() and np.asarray(state.sources.drafted_BxS)[going].sum(0).min() > 0
    found, fresh = drafted_after(state, made)
    np.testing.assert_allclose(found[going], fresh[going], rtol=2e-4, atol=2e-4)


def test_a_free_row_without_statistics_disturbs_no_other():
    """Rows of a server that no request has used yet hold zeros."""
    rows, made = batches()[0], drafter(True, 1)
    state = prefill(rows, MIXTURE.window, made)
    blank = jax.tree.map(lambda x: x.at[0].set(0), state.sources)
    state = state.replace(sources=blank, done_B=state.done_B.at[0].set(True))
    how = {"speculation": MIXTURE, "sampling": GREEDY, "cost_table": cost_table_of(CHEAP, MIXTURE)}
    found = answers(generate.decode(PARAMS, CONFIG, made, state, 10_000, **how))
    assert found[1:] == expected()[1 : len(rows)]


def test_lookup_needs_no_drafter_and_no_features():
    state = decoded(NGRAM)
    assert state.drafter_kv is None and state.features_BxK1xF is None
    assert answers(state) == expected()[: len(batches()[0])]


def test_names_sizes_and_needs():
    ways = {"ngram": of_mode("ngram", 3), "mixture": of_mode("mixture", 3), "chain": chain(3), "off": off()}
    assert {name: way.mode for name, way in ways.items()} == {name: name for name in ways}
    assert [way.needs_drafter for way in ways.values()] == [False, True, True, False]
    assert ways["ngram"].window == ways["ngram"].verified == ways["ngram"].widths[-1]
    assert ways["mixture"].window == max(3, ways["mixture"].lookup) and ways["mixture"].verified == 15
    for make in (lambda: ngram(0), lambda: mixture(3, 3, 10, 0)):
        with pytest.raises(UserError, match="--ngram_tokens=0: must be at least 1"):
            make()
