"""Bootstrap intervals: known answers, and how often they hold what they should."""

import numpy as np
import pytest

from ppow_jax.evaluation.intervals import (
    Counts,
    micro_average,
    paired_difference,
    paired_ratio,
    percentiles,
    resampled_sums,
)


def arm(rng, S: int, N: int, gain: float = 0.0) -> Counts:
    """Answers of 50 to 150 tokens at 2 to 3 tokens a round, and `gain` more."""
    tokens_N = rng.integers(50, 151, N)
    pace_SxN = rng.uniform(2, 3, N) + np.zeros((S, 1)) + gain
    return Counts(np.broadcast_to(tokens_N, (S, N)), tokens_N / pace_SxN)


def test_a_micro_average_weighs_answers_by_their_rounds():
    found = micro_average(Counts(np.array([30, 10]), np.array([10, 10])))
    assert found.value == 2 and (found.low, found.high) == (1, 3)  # both answers the first, or the second
    assert not found.clear_of(2.9) and found.clear_of(3.1)
    assert micro_average(Counts(np.array([[30, 10]]), np.array([[10, 10]]))) == found


def test_an_answer_alone_and_equal_answers_have_no_width():
    assert micro_average(Counts(np.array([30]), np.array([10]))) == (3, 3, 3)
    assert micro_average(Counts(np.full((3, 20), 30), np.full((3, 20), 10))) == (3, 3, 3)


def test_an_arm_does_not_differ_from_itself():
    one = arm(np.random.default_rng(0), 3, 40)
    assert paired_difference(one, one) == (0, 0, 0)
    assert paired_ratio(one, one) == (1, 1, 1)


def test_a_constant_gain_shows_where_the_arms_alone_overlap():
    rng = np.random.default_rng(1)
    worse = arm(rng, 2, 60)
    better = Counts(worse.tokens, worse.tokens / (worse.tokens / worse.rounds + 0.05))
    difference, ratio = paired_difference(better, worse), paired_ratio(better, worse)
    assert difference.value == pytest.approx(0.05, rel=0.1) and difference.clear_of(0) and ratio.clear_of(1)
    assert 0.04 < difference.low < difference.value < difference.high < 0.06
    assert ratio.value == pytest.approx(micro_average(better).value / micro_average(worse).value)
    assert micro_average(better).low < micro_average(worse).high
    swapped = paired_difference(worse, better)
    np.testing.assert_allclose(swapped, [-difference.value, -difference.high, -difference.low])


def test_all_rounds_of_an_arm_in_proportion():
    one = arm(np.random.default_rng(2), 1, 30)
    np.testing.assert_allclose(paired_ratio(Counts(one.tokens, one.rounds / 1.25), one), [1.25] * 3)


def test_seeds_count_as_much_as_they_differ():
    """Two seeds at 2 and 4 tokens a round on every answer: one of the two is drawn each time."""
    two = Counts(np.full((2, 10), 100.0), np.repeat([[50.0], [25.0]], 10, 1))
    found = micro_average(two)
    assert found.value == pytest.approx(8 / 3) and (found.low, found.high) == (2, 4)
    alike = Counts(two.tokens, two.rounds / 2)
    np.testing.assert_allclose(paired_ratio(alike, two), [2, 2, 2])  # the same seed of both
    apart = paired_ratio(alike, two, paired_seeds=False)
    assert (apart.low, apart.high) == (1, 4)


def test_the_same_numbers_give_the_same_interval():
    one, other = (arm(np.random.default_rng(3), 2, 30, gain) for gain in (0.0, 0.1))
    assert paired_difference(one, other) == paired_difference(one, other)
    assert paired_difference(one, other, seed=1) != paired_difference(one, other)
    narrow, wide = (paired_difference(one, other, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("seeds", [1, 6])
def test_intervals_hold_the_true_difference_as_often_as_they_say(seeds):
    """300 studies of answers, and seeds, that differ by chance: the true difference of tau is 1/2."""
    rng, held, studies, N = np.random.default_rng(4), 0, 300, 60
    for _ in range(studies):
        tokens_N = rng.integers(80, 121, N)
        drafters_Sx1 = rng.normal(0, 0.05 * (seeds > 1), (seeds, 1))  # their own skill, in both arms apart
        others_Sx1 = rng.normal(0, 0.05 * (seeds > 1), (seeds, 1))
        answer_N = rng.normal(0, 0.3, N)
        rounds = [
            tokens_N / (tau + skill_Sx1 + answer_N + rng.normal(0, 0.2, (seeds, N)))
            for tau, skill_Sx1 in ((3.0, drafters_Sx1), (2.5, others_Sx1))
        ]
        a, b = (Counts(np.broadcast_to(tokens_N, r.shape), r) for r in rounds)
        found = paired_difference(a, b, resamples=400)
        held += found.low <= TRUE[seeds] <= found.high
    assert 0.88 <= held / studies <= 0.98


def _true_difference(seeds: int) -> float:
    """The difference of the micro-averages above, from many answers."""
    rng, N = np.random.default_rng(5), 400_000
    spread = np.hypot(np.hypot(0.3, 0.2), 0.05 * (seeds > 1))
    noise_N = rng.normal(0, spread, N)
    return float(1 / np.mean(1 / (3.0 + noise_N)) - 1 / np.mean(1 / (2.5 + noise_N)))


TRUE = {seeds: _true_difference(seeds) for seeds in (1, 6)}


def test_arms_of_other_answers_are_refused():
    one = arm(np.random.default_rng(6), 2, 10)
    with pytest.raises(ValueError, match="of the same N answers"):
        paired_difference(one, arm(np.random.default_rng(6), 2, 11))
    with pytest.raises(ValueError, match="arms of 2 and 3 seeds"):
        paired_ratio(one, arm(np.random.default_rng(6), 3, 10))
    with pytest.raises(ValueError, match=r"\(2, 10\), \(2, 9\)"):
        micro_average(Counts(one.tokens, one.rounds[:, :9]))


def test_resampling_draws_whole_rows():
    sums_RxX = resampled_sums(np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), 500, seed=0)
    assert sums_RxX.shape == (500, 2) and sums_RxX.min() == 3 and sums_RxX.max() == 120
    np.testing.assert_array_equal(sums_RxX[:, 1], 10 * sums_RxX[:, 0])
    assert percentiles(np.array([*range(101), np.nan]), level=0.5) == (25, 75)
