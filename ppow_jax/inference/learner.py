"""Interface of online adaptation to the decoding engine; `ppow_jax.online.session.Online` implements it."""

import dataclasses
from typing import Protocol

import numpy as np

from ppow_jax.inference.requests import Result


@dataclasses.dataclass(frozen=True)
class OnlineStats:
    """Counts of a session, and of those that it resumed.

    requests: kept ones; skipped: those without two answer tokens in a training row. steps: training steps. swaps:
    drafters that began to serve. fallbacks: drafters that the guard refused. share: of the time that adaptation took,
    without idle time. busy_seconds: of decoding; spent_seconds, idle_seconds: of adaptation, while requests waited or
    ran, and while none did; these four of this process. acceptance_length: tokens per verification of the newest
    requests; replayed: those of the drafters frozen, serving and candidate, as replayed on the newest answers before
    anything was trained on them. nan before the first.
    """

    requests: int
    skipped: int
    steps: int
    swaps: int
    fallbacks: int
    share: float
    busy_seconds: float
    spent_seconds: float
    idle_seconds: float
    acceptance_length: float
    replayed: dict[str, float]


class Learner(Protocol):
    """Adapts the drafter of a `Model` to what is decoded. It replaces `Model.drafter` between two programs."""

    def finished(self, result: Result) -> None:
        """Keeps a finished request."""

    def decoded(self, seconds: float) -> None:
        """Counts time in which requests were decoded."""

    def work(self, idle: bool = False, units: int | None = None) -> int:
        """Does at most `units` units of work, as far as the budget allows, without limit where idle -> how many."""

    def pending(self) -> bool:
        """True if work is left."""

    def keep(self, prompt_ids: np.ndarray, answer_ids: np.ndarray) -> None:
        """Keeps an answer, token ids [T] each, that was not decoded here."""

    def learn(self) -> OnlineStats:
        """Does all work that is left, whatever it takes -> statistics."""

    def stats(self) -> OnlineStats:
        """Counts and acceptance lengths so far."""

    def close(self) -> None:
        """Saves what is not saved, and detaches itself from the model."""
