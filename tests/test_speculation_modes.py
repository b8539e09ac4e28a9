"""Trees and adaptive windows: lossless whatever things cost, and drafting as much as that asks for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from twelve_tokens import (
    CHEAP,
    CONFIG,
    DEAR,
    FREE,
    GREEDY,
    PARAMS,
    B,
    answers,
    batches,
    cost_table_of,
    drafted_after,
    drafter,
    expected,
    prefill,
    speculative,
    with_mode,
)

from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import TRIAL, AcceptanceStats, CostTable, Stopping, continues, kept, update
from ppow_jax.speculation.settings import adaptive, adaptive_tree, off, tree


@pytest.mark.parametrize("shape", suites.keep([(3, 3, 10)], [(1, 3, 3), (3, 3, 10), (2, 4, 14), (4, 1, 3)]), ids=str)
def test_trees_are_lossless(shape):
    found, histogram_NxK1, drafted_N = with_mode(tree(*shape))
    assert found == expected()
    assert (histogram_NxK1.sum(0)[:3] > 0).all() or shape[1] == 1
    np.testing.assert_array_equal(drafted_N, shape[2] * histogram_NxK1.sum(1))


def test_a_tree_of_one_branch_is_the_chain():
    np.testing.assert_array_equal(with_mode(tree(1, 3, 3))[1], speculative(3, True, 1)[1])


def test_a_tree_that_holds_the_chain_accepts_no_less():
    """All that the chain drafts and more: what a round gains can only grow."""
    chained = np.asarray(speculative(3, True, 1)[1]).sum(0)
    branched = with_mode(tree(9, 3, 9 + 81 + 81))[1].sum(0)  # everything that it drafts, the argmax path among it
    mean = [np.dot(h, np.arange(4)) / h.sum() for h in (chained, branched)]
    assert mean[1] > mean[0] + 0.2


@pytest.mark.parametrize("price", [FREE, CHEAP, DEAR], ids=["free", "cheap", "dear"])
def test_adaptive_windows_are_lossless(price):
    assert with_mode(adaptive(3), price=price)[0] == expected()


def test_an_adaptive_window_weighs_costs():
    free, cheap, dear = (with_mode(adaptive(3), price=price) for price in (FREE, CHEAP, DEAR))
    np.testing.assert_array_equal(free[1], speculative(3, True, 1)[1])  # always the whole window
    rounds_N, asked_N = free[1].sum(1), np.minimum(free[1].sum(1), 1)
    np.testing.assert_array_equal(free[2], 3 * rounds_N)
    assert (dear[2].sum() < cheap[2].sum() < 3 * cheap[1].sum()) and (dear[2] >= asked_N).all()
    long_N = dear[1].sum(1) >= 10
    assert long_N.any() and (dear[2][long_N] < dear[1].sum(1)[long_N]).all()  # some rounds drafted nothing


ADAPTIVE_TREE = adaptive_tree(3, 3, 10)


@pytest.mark.parametrize("price", [FREE, CHEAP, DEAR], ids=["free", "cheap", "dear"])
def test_adaptive_trees_are_lossless(price):
    assert with_mode(ADAPTIVE_TREE, price=price)[0] == expected()


def test_an_adaptive_tree_weighs_costs():
    fixed = with_mode(tree(3, 3, 10))
    free, cheap, dear = (with_mode(ADAPTIVE_TREE, price=price) for price in (FREE, CHEAP, DEAR))
    np.testing.assert_array_equal(free[1], fixed[1])  # always the whole tree
    np.testing.assert_array_equal(free[2], fixed[2])
    assert dear[2].sum() < cheap[2].sum() < free[2].sum()
    assert cheap[1].sum() > free[1].sum()  # more rounds, smaller ones


@pytest.mark.parametrize("way", suites.keep([ADAPTIVE_TREE], [adaptive(3), ADAPTIVE_TREE]), ids=["chain", "tree"])
def test_rounds_without_drafts_leave_no_gap_in_the_drafters_cache(way):
    """After any number of resting rounds, keys and features are those of a row that never rested."""
    rows, made = batches()[0], drafter(True, 1)
    how = {"speculation": way, "sampling": GREEDY, "cost_table": cost_table_of(CHEAP, way)}
    state = prefill(rows, 3, made)
    resting = state.replace(stats=state.stats.replace(cooldown_B=jnp.full(B, 7)))
    resting = generate.decode(PARAMS, CONFIG, made, resting, 7, **how)
    plain = prefill(rows, 0)
    plain = generate.decode(PARAMS, CONFIG, None, plain, 7, speculation=off(), sampling=GREEDY)
    np.testing.assert_array_equal(resting.tokens_BxL[:, : plain.tokens_BxL.shape[1]], plain.tokens_BxL)
    going = ~np.asarray(resting.done_B)
    assert going.any() and (np.asarray(resting.drafted_B) == 0).all()
    assert (np.asarray(resting.pending_B) == 1).all()  # the others were written, or made way for
    found, fresh = drafted_after(resting, made)
    np.testing.assert_allclose(found[going], fresh[going], rtol=2e-4, atol=2e-4)
    assert answers(generate.decode(PARAMS, CONFIG, made, resting, 10_000, **how)) == expected()[:B]


@pytest.mark.full
@pytest.mark.parametrize("widest", [adaptive(3), ADAPTIVE_TREE], ids=["chain", "tree"])
def test_a_threshold_on_the_chance_is_lossless_and_shortens(widest):
    ways = [dataclasses.replace(widest, adaptive=Stopping("threshold", t)) for t in (1e-6, 0.3, 0.9)]
    made = [with_mode(way, price=FREE) for way in ways]
    assert all(found == expected() for found, _, _ in made)
    low, middle, high = ((drafted_N / histogram_NxK1.sum(1).clip(1)).mean() for _, histogram_NxK1, drafted_N in made)
    assert high < middle < low


def test_a_batch_weighs_the_gains_of_all_its_rows_against_what_all_pay():
    stats, rule = AcceptanceStats.start(4), Stopping()
    logp_Bx1 = jnp.log(jnp.array([[0.9], [0.01], [0.01], [0.9]]))
    verify_N1 = jnp.array([1.0, 1.3])
    alone, first_three = None, jnp.array([True, True, True, False])
    assert continues(stats, rule, 0.2, logp_Bx1, alone).tolist() == [True, False, False, True]
    assert not continues(stats, rule, 0.2, logp_Bx1, first_three).any()  # the last row is done: it gains nothing
    assert continues(stats, rule, 0.2, logp_Bx1, ~first_three).all()
    assert kept(stats, rule, verify_N1, logp_Bx1, alone).tolist() == [1, 0, 0, 1]
    assert kept(stats, rule, verify_N1, logp_Bx1, first_three).tolist() == [0] * 4
    assert kept(stats, rule, verify_N1, logp_Bx1, ~first_three).tolist() == [1] * 4


@pytest.mark.parametrize("accepted_B", [(1, 0, 0, 0), (3, 3, 0, 0)], ids=["lose", "win"])
def test_a_batch_rests_together(accepted_B):
    """One row that gains does not hold up three that do not."""
    stats, live_B = AcceptanceStats.start(4), jnp.array([True, True, True, True])
    steps_B, cost_B = jnp.ones(4, jnp.int32), jnp.full(4, 1.6)
    for _ in range(TRIAL):
        stats = update(stats, jnp.array(accepted_B), steps_B, steps_B, steps_B * 0.5, cost_B, live_B)
    assert stats.drafts_B.tolist() == [sum(accepted_B) / 4 + 1 > 1.6] * 4


@pytest.mark.parametrize("rounds", [100, 400])
def test_a_hopeless_drafter_costs_a_batch_little(rounds):
    """The cost of rounds by the price list, with verification as dear as in a batch, against plain decoding."""
    rows, way = batches()[0], ADAPTIVE_TREE
    cost_table = CostTable.of(0.1, 1 + 0.3 * np.arange(way.verified + 1))
    stats, live_B, plain, cost = AcceptanceStats.start(len(rows)), jnp.ones(len(rows), bool), 0, 0.0
    doubtful_BxN = jnp.log(jnp.tile(0.9 * 0.8 ** jnp.arange(way.verified), (len(rows), 1)))  # promises much
    step = jax.jit(functools.partial(update, live_B=live_B))
    for _ in range(rounds):
        draws_B = stats.drafts_B
        count_B = jnp.where(draws_B, kept(stats, way.adaptive, cost_table.verify_N1, doubtful_BxN, live_B), 0)
        steps_B, nothing_B = draws_B.astype(int), 0 * count_B
        paid_B = cost_table.of_round(steps_B.max(), count_B.max()) + jnp.zeros(len(rows))
        stats = step(stats, nothing_B, steps_B, steps_B, 0.9 * draws_B, paid_B)
        plain, cost = plain + 1, cost + float(paid_B[0])
    assert cost / plain < 1.02


def test_rows_that_decide_alone_count_what_all_pay():
    cost_table, rounds = CostTable.of(0.1, np.array([1.0, 1.5])), 100

    def cost(counted: CostTable) -> float:
        stats, cost = AcceptanceStats.start(8), 0.0
        step = jax.jit(update)
        for _ in range(rounds):
            draws_B = stats.drafts_B.astype(int)
            cost += float(cost_table.of_round(draws_B.max(), draws_B.max()))
            stats = step(stats, 0 * draws_B, draws_B, draws_B, 0.5 * draws_B, counted.of_round(draws_B, draws_B))
        return cost / rounds

    assert cost(cost_table.alone(8)) < 1.02 < cost(cost_table)
