"""The comparison of an engine's answers with ours, on answers made by hand."""

import pytest

from ppow_jax.engines import compare
from ppow_jax.engines.compare import Answer


def answer(tokens, rounds=10, accepted=(5, 2), seconds=1.0, cpu_seconds=None):
    return Answer(tokens, seconds, rounds, accepted, cpu_seconds)


def no_margin(prompt, position):
    pytest.fail("a margin was asked for, but no token differs")


def test_first_difference():
    assert compare.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert compare.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert compare.first_difference([1, 2], [1, 2, 3]) == 2
    assert compare.first_difference([1, 2, 3], [1, 2]) == 2


def test_acceptance_counts_every_round():
    found = compare.acceptance([answer([1], 10, (5, 2)), answer([1], 30, (15, 10))])
    assert found["rounds"] == 40 and found["by_position"] == [0.5, 0.3] and found["tau"] == pytest.approx(1.8)


def test_identical_answers_agree():
    ours = [answer([1, 2, 3]), answer([4, 5])]
    row = compare.compare_greedy(ours, ours, no_margin)
    assert row["identical"] == row["answers"] == 2 and row["differences"] == []
    assert row["tokens_agree"] is True and row["acceptance_agrees"] is True and compare.passed(row)


@pytest.mark.parametrize(("gap", "agrees"), [(0.5 * compare.TIE, True), (2 * compare.TIE, False)])
def test_only_a_tie_may_change_tokens(gap, agrees):
    asked = []
    ours = [answer([1, 2, 3]), answer([4, 5, 6], 10, (8, 8))]
    theirs = [answer([1, 2, 3]), answer([4, 9, 9], 10, (1, 0))]
    row = compare.compare_greedy(theirs, ours, lambda *place: asked.append(place) or gap)
    assert asked == [(1, 1)] and row["identical"] == 1 and row["ties"] == int(agrees)
    assert row["differences"] == [{"prompt": 1, "position": 1, "margin": gap, "tie": agrees}]
    assert row["ours"] == row["engine"] and row["engine"]["rounds"] == 10  # of the identical answer alone
    assert row["tokens_agree"] is agrees and compare.passed(row) is agrees


@pytest.mark.parametrize(
    ("accepted", "agrees"),
    [
        ((500, 200), True),
        ((520, 210), True),  # tau 1.73 is within 3 % of 1.70
        ((540, 220), False),  # tau 1.76 is not
        ((540, 160), False),  # tau 1.70, but the first position has 0.54 instead of 0.50
    ],
)
def test_acceptance_must_be_near_in_all_positions(accepted, agrees):
    row = compare.compare_greedy([answer([1], 1000, accepted)], [answer([1], 1000, (500, 200))], no_margin)
    assert row["acceptance_agrees"] is agrees and compare.passed(row) is agrees


def test_an_engine_that_does_not_tell_its_acceptance():
    row = compare.compare_greedy([Answer([1], 1.0)], [answer([1])], no_margin)
    assert row["tokens_agree"] is True and row["acceptance_agrees"] is None and compare.passed(row)
    row = compare.compare_sampled([Answer([1], 1.0)], [answer([1])], 1)
    assert not compare.passed(row)  # nothing was compared at all


def test_sampled_acceptance_is_compared_within_its_noise():
    ours = [answer([1], 10, (4 + n % 3, 2)) for n in range(40)]
    noisy = [answer([1], 10, (4 + (n * 7 + n // 3) % 4, 2)) for n in range(40)]
    row = compare.compare_sampled(noisy, ours, 20)
    low, high = row["difference_interval"]
    assert row["engine"]["tau"] / row["ours"]["tau"] - 1 > compare.TOLERANCE / 2 and low < high
    clearly = compare.compare_sampled([answer([1], 10, (9, 5)) for _ in range(40)], ours, 20)
    assert clearly["acceptance_agrees"] is False and clearly["difference_interval"][0] > 0
    assert compare.compare_sampled(ours, ours, 20)["acceptance_agrees"] is True


def test_a_few_different_samples_are_noise():
    ours = [answer([1], 10, (9, 2)), answer([1], 10, (1, 1))]
    theirs = [answer([1], 10, (1, 1)), answer([1], 10, (9, 4))]
    row = compare.compare_sampled(theirs, ours, 2)
    low, high = row["difference_interval"]
    assert low < 0 < high and row["engine"]["tau"] / row["ours"]["tau"] > 1.03 and row["acceptance_agrees"] is True


def test_speeds():
    answers = [answer([1, 2], seconds=1.0, cpu_seconds=0.5), answer([3], seconds=2.0, cpu_seconds=1.0)]
    assert compare.speed(answers) == 1.0 and compare.cpu_speed(answers) == 2.0
    assert compare.cpu_speed([answer([1])]) is None
