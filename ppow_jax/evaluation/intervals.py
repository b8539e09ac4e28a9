"""Bootstrap intervals of ratios over answers, such as tau, and of comparisons of two arms on the same answers.

An arm is S drafters, trained identically up to their seeds, on the same N answers: arrays [S, N], or [N] for one.
Two levels are resampled: answers, jointly for all seeds and both arms, and seeds. Of S > 1 seeds, S - 1 are drawn with
replacement: drawing S would give a mean over seeds (S - 1) / S of its variance (Rao & Wu 1988), which matters for
small S. Even so, two or three seeds hardly determine the shape of a distribution: their intervals are too narrow.
"""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value over all answers and seeds, and the bounds of its interval."""

    value: float
    low: float
    high: float

    def clear_of(self, number: float) -> bool:
        """True for a number outside of the interval."""
        return not self.low <= number <= self.high


class Counts(NamedTuple):
    """Counts of one arm, [S, N] or [N] each: tokens gained, and the rounds, or costs, spent on them."""

    tokens: np.ndarray
    rounds: np.ndarray


def resampled_sums(columns_NxX: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[R, X]: sums over N rows drawn with replacement, R times."""
    N = len(columns_NxX)
    chosen = np.random.default_rng(seed).integers(0, N, (resamples, N))
    return columns_NxX[chosen].sum(1)


def percentiles(values_R: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Bounds that hold `level` of the values, with equal tails on both sides; NaNs are ignored."""
    low, high = np.nanpercentile(values_R, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def micro_average(arm: Counts, *, resamples: int = 4000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Sum of tokens divided by sum of rounds over all answers and seeds: tau, or the speedup if rounds are costs."""
    (arm,) = _arms(arm)
    answers_RxN, (seeds_RxS,) = _weights([arm], resamples, seed, paired_seeds=False)
    return Estimate(_whole(arm), *percentiles(_resampled(arm, answers_RxN, seeds_RxS), level))


def paired_difference(
    a: Counts, b: Counts, *, resamples: int = 4000, level: float = 0.95, seed: int = 0, paired_seeds: bool = True
) -> Estimate:
    """Micro-average of `a` minus that of `b`, on the same answers.

    paired_seeds: drafter s of both arms shares something, such as the start of its training, so that the same seeds
    are drawn for both; otherwise the seeds of each arm are drawn independently, and their numbers may differ.
    Raises ValueError where shapes are inconsistent.
    """
    return _compared(np.subtract, a, b, resamples, level, seed, paired_seeds)


def paired_ratio(
    a: Counts, b: Counts, *, resamples: int = 4000, level: float = 0.95, seed: int = 0, paired_seeds: bool = True
) -> Estimate:
    """Micro-average of `a` divided by that of `b`, on the same answers; see `paired_difference`."""
    return _compared(np.divide, a, b, resamples, level, seed, paired_seeds)


def _compared(compare, a: Counts, b: Counts, resamples: int, level: float, seed: int, paired_seeds: bool) -> Estimate:
    a, b = _arms(a, b)
    if paired_seeds and a.tokens.shape != b.tokens.shape:
        raise ValueError(f"arms of {len(a.tokens)} and {len(b.tokens)} seeds cannot be paired seed by seed")
    answers_RxN, seeds = _weights([a, b], resamples, seed, paired_seeds)
    values = [_resampled(arm, answers_RxN, seeds_RxS) for arm, seeds_RxS in zip((a, b), seeds, strict=True)]
    return Estimate(float(compare(_whole(a), _whole(b))), *percentiles(compare(*values), level))


def _arms(*arms: Counts) -> list[Counts]:
    found = [Counts(*(np.atleast_2d(np.asarray(x, float)) for x in arm)) for arm in arms]
    shapes = [x.shape for arm in found for x in arm]
    if any(tokens.shape != rounds.shape for tokens, rounds in found) or len({N for _, N in shapes}) > 1:
        raise ValueError(f"tokens and rounds of shapes {shapes}: needed are [S, N] each, of the same N answers")
    return found


def _weights(arms: list[Counts], resamples: int, seed: int, paired_seeds: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Resampling weights: draws of each answer, and of each seed of each arm, [R, N], and [R, S] per arm."""
    rng = np.random.default_rng(seed)

    def drawn(items: int, draws: int) -> np.ndarray:
        return rng.multinomial(draws, np.full(items, 1 / items), resamples).astype(float)

    N = arms[0].tokens.shape[1]
    answers_RxN = drawn(N, N)
    numbers = [len(arm.tokens) for arm in arms]
    seeds = [drawn(S, max(S - 1, 1)) for S in numbers[: 1 if paired_seeds else None]]
    return answers_RxN, seeds * len(arms) if paired_seeds else seeds


def _resampled(arm: Counts, answers_RxN: np.ndarray, seeds_RxS: np.ndarray) -> np.ndarray:
    tokens_R, rounds_R = ((answers_RxN @ x_SxN.T * seeds_RxS).sum(1) for x_SxN in arm)
    with np.errstate(divide="ignore", invalid="ignore"):
        return tokens_R / rounds_R


def _whole(arm: Counts) -> float:
    return float(arm.tokens.sum() / arm.rounds.sum())
