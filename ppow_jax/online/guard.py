"""Guard: decides by exact replays of answers that no drafter was trained on which drafter serves.

Each new row is replayed, before it is trained on, with three drafters: the frozen one, the one that serves, and the
candidate that is being trained. Teacher forcing is exact: the rounds of greedy chains on a text are a function of
text and drafter, and the text does not depend on the drafter. Answers are compared in pairs.
"""

import collections
from typing import NamedTuple

import numpy as np

from ppow_jax.evaluation.intervals import Counts, paired_ratio

WAIT, SWAP, SERVING, FROZEN = "wait", "swap", "fall back to the serving drafter", "fall back to the frozen drafter"
RESAMPLES = 1000


class Replayed(NamedTuple):
    """Rounds of one answer with each drafter; tokens: that its rounds gained."""

    tokens: int
    frozen: int
    serving: int
    candidate: int


def rounds_of(accepted_A: np.ndarray) -> int:
    """Rounds of greedy chains over an answer. accepted_A: leading drafts that equal the text, from each anchor."""
    at, rounds = 0, 0
    while at < len(accepted_A):
        at += int(accepted_A[at]) + 1
        rounds += 1
    return rounds


class Guard:
    """Verdicts on the candidate. window: answers that are compared with the frozen drafter. least: answers between two
    verdicts.
    """

    def __init__(self, window: int, least: int):
        self.least = least
        self.window: collections.deque[Replayed] = collections.deque(maxlen=window)
        self.fresh: list[Replayed] = []

    def add(self, answers: list[Replayed]) -> str:
        """Takes a row's answers -> the verdict. SWAP: the candidate may serve. WAIT: too few answers since the last.

        The candidate is refused where it is worse than the serving drafter on the answers since the last verdict, or
        worse than the frozen one on the window, by more than noise: the 95 % interval of the ratio lies below 1. What
        remains then is the better of the other two on the window.
        """
        self.window.extend(answers)
        self.fresh += answers
        if len(self.fresh) < self.least:
            return WAIT
        fresh, self.fresh = self.fresh, []
        if not (_worse(fresh, "serving") or _worse(list(self.window), "frozen")):
            return SWAP
        serving, frozen = self.length("serving"), self.length("frozen")
        self.window.clear()
        return SERVING if serving > frozen else FROZEN

    def length(self, name: str) -> float:
        """Acceptance length of a drafter on the window: frozen, serving or candidate; nan before the first answer."""
        rounds = sum(getattr(answer, name) for answer in self.window)
        return sum(answer.tokens for answer in self.window) / rounds if rounds else float("nan")


def _worse(answers: list[Replayed], than: str) -> bool:
    """True if the candidate gains fewer tokens per round, and the interval of the ratio excludes 1."""
    tokens = np.array([answer.tokens for answer in answers])
    arms = (Counts(tokens, np.array([getattr(answer, name) for answer in answers])) for name in ("candidate", than))
    return paired_ratio(*arms, resamples=RESAMPLES).high < 1
