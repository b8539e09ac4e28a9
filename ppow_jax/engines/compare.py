"""Compares an engine's answers with ours: tokens, acceptance by position, and what its drafter gained in speed."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppow_jax.evaluation import intervals

TOLERANCE = 0.03  # of the acceptance length, relative; of the acceptance at a position, absolute
TIE = 1e-3  # difference of two logits within which two float32 programs may order them differently


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer: new token ids, seconds, verifications, and how many of them accepted at least 1, 2, .. K tokens.

    rounds and accepted are None for plain decoding, and where an engine does not tell. cpu_seconds: of all threads,
    which other programs on the machine do not lengthen; None for engines that work in other processes or on a device.
    """

    tokens: Sequence[int]
    seconds: float
    rounds: int | None = None
    accepted: Sequence[int] | None = None
    cpu_seconds: float | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Answer":
        """An answer of `job.run`."""
        return cls(found["tokens"], found["seconds"], found["rounds"], found["accepted"], found.get("cpu_seconds"))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; the shorter length if one only continues the other."""
    if list(a) == list(b):
        return None
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def differences(
    theirs: Sequence[Answer], ours: Sequence[Answer], margin: Callable[[int, int], float]
) -> list[dict[str, Any]]:
    """One entry for each answer that differs: prompt, position, and the target's margin there in logits.

    margin: (prompt, position) -> the target's two largest logits after that many tokens of our answer, subtracted.
    """
    found = []
    for n, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        at = first_difference(a.tokens, b.tokens)
        if at is not None:
            gap = margin(n, at)
            found.append({"prompt": n, "position": at, "margin": gap, "tie": bool(gap <= TIE)})
    return found


def acceptance(answers: Sequence[Answer]) -> dict[str, Any]:
    """tau (tokens per verification), verifications, and the share of them that accepted each position, of K."""
    rounds = sum(answer.rounds for answer in answers)
    accepted_K = np.sum([answer.accepted for answer in answers], axis=0)
    by_position = [float(count / rounds) if rounds else math.nan for count in accepted_K]
    return {"tau": 1 + sum(by_position), "rounds": rounds, "by_position": by_position}


def compare_greedy(
    theirs: Sequence[Answer], ours: Sequence[Answer], margin: Callable[[int, int], float]
) -> dict[str, Any]:
    """The comparison at temperature 0: tokens of all answers, and the acceptance in those that are identical.

    `tokens_agree`: no answer differs but at a tie. `acceptance_agrees`: tau within TOLERANCE of ours, and the
    acceptance at each position, too; None where the engine does not tell.
    """
    differ = differences(theirs, ours, margin)
    changed = {entry["prompt"] for entry in differ}
    same = [n for n in range(len(ours)) if n not in changed]
    result: dict[str, Any] = {
        "answers": len(ours),
        "identical": len(same),
        "ties": sum(entry["tie"] for entry in differ),
        "differences": differ,
        "tokens_agree": all(entry["tie"] for entry in differ),
    }
    return result | _acceptances([theirs[n] for n in same], [ours[n] for n in same])


def compare_sampled(theirs: Sequence[Answer], ours: Sequence[Answer], prompts: int) -> dict[str, Any]:
    """The comparison above temperature 0, where the texts are two samples of one distribution.

    Answers are in the order of their seeds, then of their prompts; there are `prompts` of these. `acceptance_agrees`:
    tau within TOLERANCE of ours, or the difference is noise: its 95 % bootstrap interval over the prompts holds 0. The
    acceptance by position is shown, but not judged.
    """
    result: dict[str, Any] = {"answers": len(ours), "identical": None, "ties": None, "differences": []}
    result |= {"tokens_agree": None} | _acceptances(theirs, ours)
    if result["acceptance_agrees"] is None or prompts < 2:
        return result
    difference = intervals.paired_difference(_counts(theirs, prompts), _counts(ours, prompts))
    result["difference_interval"] = [difference.low, difference.high]
    near = abs(result["engine"]["tau"] / result["ours"]["tau"] - 1) <= TOLERANCE
    result["acceptance_agrees"] = bool(near or not difference.clear_of(0))
    return result


def _acceptances(theirs: Sequence[Answer], ours: Sequence[Answer]) -> dict[str, Any]:
    if not ours or any(answer.accepted is None for answer in theirs):
        found = {"engine": None, "ours": acceptance(ours) if ours else None}
        return found | {"acceptance_agrees": None, "difference_interval": None}
    a, b = acceptance(theirs), acceptance(ours)
    near = abs(a["tau"] / b["tau"] - 1) <= TOLERANCE
    gaps = [abs(x - y) for x, y in zip(a["by_position"], b["by_position"], strict=True)]
    agrees = bool(near and max(gaps) <= TOLERANCE)
    return {"engine": a, "ours": b, "acceptance_agrees": agrees, "difference_interval": None}


def _counts(answers: Sequence[Answer], prompts: int) -> intervals.Counts:
    """Tokens and rounds of each prompt, over all its seeds."""
    rounds_SxN = np.array([answer.rounds for answer in answers], float).reshape(-1, prompts)
    accepted_SxN = np.array([sum(answer.accepted) for answer in answers], float).reshape(-1, prompts)
    return intervals.Counts((rounds_SxN + accepted_SxN).sum(0), rounds_SxN.sum(0))


def speed(answers: Sequence[Answer]) -> float:
    """Tokens per second over all answers, prefill included."""
    return sum(len(answer.tokens) for answer in answers) / sum(answer.seconds for answer in answers)


def cpu_speed(answers: Sequence[Answer]) -> float | None:
    """Tokens per second of processor time; None where it is not known."""
    spent = [answer.cpu_seconds for answer in answers]
    return None if None in spent else sum(len(answer.tokens) for answer in answers) / max(sum(spent), 1e-9)


def passed(row: Mapping[str, Any]) -> bool:
    """True if neither the tokens nor the acceptance of a row disagree, and at least one of them was compared."""
    verdicts = row["tokens_agree"], row["acceptance_agrees"]
    return False not in verdicts and True in verdicts
