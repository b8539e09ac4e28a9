"""Results of a measurement: answers and sums over batches, and the rows of a result file that follow from them.

`docs/results_schema.md` documents the keys of a row, and the way results are counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppow_jax.evaluation import intervals
from ppow_jax.evaluation.dialogues import Turn
from ppow_jax.inference.decoding import Decoded, Decoding, top2_margin
from ppow_jax.speculation.sources import NAMES
from ppow_jax.weights.targets import Target


@dataclasses.dataclass(frozen=True)
class Output:
    """A prompt, token ids [T], and the new token ids of plain decoding and of one speculation mode."""

    benchmark: str
    source: str
    turn: int
    mode: str
    window: int
    temperature: float
    seed: int
    prompt_ids: np.ndarray
    autoregressive_ids: np.ndarray
    speculative_ids: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """A JSON object, the ids as lists."""
        values = dataclasses.asdict(self)
        return {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in values.items()}

    @property
    def identical(self) -> bool:
        """True if both are the same, token for token."""
        return np.array_equal(self.autoregressive_ids, self.speculative_ids)


@dataclasses.dataclass
class _Tally:
    """Sums over batches of one arm."""

    new_tokens: int = 0
    drafted: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    accepted_K1: Any = 0
    drafted_S: Any = 0
    accepted_S: Any = 0
    experts: float = 0.0

    def add(self, other: "_Tally") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @classmethod
    def of(cls, decoded: Decoded) -> "_Tally":
        return cls(
            decoded.decode_tokens,
            decoded.drafted,
            decoded.decode_seconds,
            decoded.prefill_seconds,
            decoded.accepted_BxK1.sum(0),
            decoded.drafted_S,
            decoded.accepted_S,
            decoded.experts,
        )

    @property
    def tokens_per_second(self) -> float:
        return _ratio(self.new_tokens, self.decode_seconds)

    @property
    def verifications(self) -> int:
        return int(np.sum(self.accepted_K1))

    @property
    def tau(self) -> float:
        return _ratio(self.new_tokens, self.verifications)


class _Arm:
    """Result of one decoding mode: grouped by the prompts that were decoded together, for confidence intervals."""

    def __init__(self) -> None:
        self.by_prompts: dict[tuple[int, ...], _Tally] = {}

    def add(self, batch: Sequence[Turn], decoded: Decoded) -> None:
        together = tuple(sorted({turn.dialogue.number for turn in batch}))
        self.by_prompts.setdefault(together, _Tally()).add(_Tally.of(decoded))

    @property
    def total(self) -> _Tally:
        total = _Tally()
        for tally in self.by_prompts.values():
            total.add(tally)
        return total


class Measured:
    """Results of one benchmark: of plain decoding, and of each mode."""

    def __init__(self, name: str, modes: Sequence[Decoding]):
        self.name, self.modes = name, modes
        self.plain, self.fast = _Arm(), [_Arm() for _ in modes]
        self.numbered: list[list[tuple[int, Output]]] = [[] for _ in modes]

    def add(self, batch: Sequence[Turn], seed: int, decoded: Sequence[Decoded]) -> None:
        """Adds a batch, decoded plainly and in every mode."""
        plain, *others = decoded
        self.plain.add(batch, plain)
        for arm, numbered, mode, found in zip(self.fast, self.numbered, self.modes, others, strict=True):
            arm.add(batch, found)
            for turn, *pair in zip(batch, plain.answers, found.answers, strict=True):
                numbered.append((turn.id, _output(self.name, turn, mode, seed, *pair)))

    @property
    def outputs(self) -> list[list[Output]]:
        """Outputs of each mode, in the order of the prompts."""
        return [[output for _, output in sorted(n, key=lambda pair: pair[0])] for n in self.numbered]

    def rows(self, target: Target, num_prompts: int) -> list[dict[str, Any]]:
        """One row per mode, without costs."""
        return [
            _row(self.name, num_prompts, outputs, mode, self.plain, arm) | _differences(target, outputs, mode)
            for mode, arm, outputs in zip(self.modes, self.fast, self.outputs, strict=True)
        ]


def _output(benchmark: str, turn: Turn, mode: Decoding, seed: int, plain: np.ndarray, fast: np.ndarray) -> Output:
    source = turn.dialogue.prompt.source
    about = benchmark, source, turn.index, mode.speculation.mode, mode.window, mode.temperature, seed
    return Output(*about, turn.tokens, plain, fast)


def acceptance(accepted_K1: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """(conditional, marginal) acceptance of the K positions, from a histogram of accepted lengths.

    Conditional: P(j-th accepted | all before it accepted). Marginal: P(j-th accepted), which implies that all
    before it were. None where there is no verification to estimate it from.
    """
    at_least_K1 = np.cumsum(np.asarray(accepted_K1)[::-1])[::-1].tolist()
    total = at_least_K1[0]
    conditional = [b / a if a else None for a, b in zip(at_least_K1, at_least_K1[1:], strict=False)]
    return conditional, [b / total if total else None for b in at_least_K1[1:]]


def _row(
    benchmark: str, num_prompts: int, outputs: Sequence[Output], mode: Decoding, plain_arm: _Arm, fast_arm: _Arm
) -> dict[str, Any]:
    plain, fast = plain_arm.total, fast_arm.total
    shape, stopping = mode.speculation.shape, mode.speculation.adaptive
    conditional, marginal = acceptance(fast.accepted_K1)
    accepted = int(np.dot(fast.accepted_K1, np.arange(mode.window + 1)))
    return {
        "benchmark": benchmark,
        "mode": mode.speculation.mode,
        "temperature": mode.temperature,
        "batch_size": mode.batch_size,
        "window": mode.window,
        "tree": dataclasses.asdict(shape) if shape else None,
        "stopping": dataclasses.asdict(stopping) if stopping else None,
        "block_verification": mode.speculation.block,
        "max_new_tokens": mode.max_new_tokens,
        "num_prompts": num_prompts,
        "num_seeds": len({output.seed for output in outputs}),
        "tau": fast.tau,
        "speedup": _ratio(fast.tokens_per_second, plain.tokens_per_second),
        **_intervals(plain_arm, fast_arm),
        "tokens_per_second": fast.tokens_per_second,
        "baseline_tokens_per_second": plain.tokens_per_second,
        "identical": sum(o.identical for o in outputs) if mode.sampling.greedy or shape else None,
        "total": len(outputs),
        "new_tokens": fast.new_tokens,
        "num_verifications": fast.verifications,
        "num_draft_tokens": fast.drafted,
        "draft_acceptance_rate": _ratio(accepted, fast.drafted) if fast.drafted else None,
        **(_by_source(fast) if shape and mode.speculation.lookup else {}),
        "unique_experts": _ratio(fast.experts, fast.verifications) if fast.experts else None,
        "decode_seconds": fast.decode_seconds,
        "prefill_seconds": fast.prefill_seconds,
        "baseline_new_tokens": plain.new_tokens,
        "baseline_decode_seconds": plain.decode_seconds,
        "baseline_prefill_seconds": plain.prefill_seconds,
        "accepted_histogram": fast.accepted_K1.tolist(),
        "acceptance_by_position": conditional,
        "marginal_acceptance_by_position": marginal,
    }


def _by_source(tally: _Tally) -> dict[str, Any]:
    """Drafted and accepted tokens of a mixture by source. Tokens that both sources drafted count for both rates."""
    drafted, accepted = np.broadcast_to(tally.drafted_S, len(NAMES)), np.broadcast_to(tally.accepted_S, len(NAMES))
    of = {name: {"drafted": int(d), "accepted": int(a)} for name, d, a in zip(NAMES, drafted, accepted, strict=True)}
    by = {name: (accepted[i] + accepted[2], drafted[i] + drafted[2]) for i, name in enumerate(NAMES[:2])}
    rates = {f"{name}_acceptance_rate": _ratio(int(a), int(d)) for name, (a, d) in by.items()}
    shares = {f"{name}_share": _ratio(int(a), int(accepted.sum())) for name, a in zip(NAMES, accepted, strict=True)}
    return {"sources": of, **rates, **shares}


def _intervals(plain_arm: _Arm, fast_arm: _Arm, resamples: int = 1000) -> dict[str, list[float] | None]:
    """95 % bootstrap intervals of tau and speedup over prompts (over batches, where prompts are timed together)."""
    pairs = [(plain_arm.by_prompts[key], tally) for key, tally in fast_arm.by_prompts.items()]
    if len(pairs) < 2:
        return {"tau_interval": None, "speedup_interval": None}
    columns_NxX = np.array(
        [(f.new_tokens, f.verifications, f.decode_seconds, p.new_tokens, p.decode_seconds) for p, f in pairs], float
    )
    sums_RxX = intervals.resampled_sums(columns_NxX, resamples, seed=0)
    tokens, verifications, seconds, plain_tokens, plain_seconds = sums_RxX.T
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "tau_interval": tokens / verifications,
            "speedup_interval": (tokens / seconds) / (plain_tokens / plain_seconds),
        }
    return {name: list(intervals.percentiles(x)) for name, x in found.items()}


def _differences(target: Target, outputs: Sequence[Output], mode: Decoding) -> dict[str, Any]:
    """The target's top-2 margins, in logits, at which greedy answers first differ from plain decoding's."""
    if not mode.sampling.greedy:
        return {"first_difference_margins": None}
    margins = []
    for o in outputs:
        if not o.identical:
            length = min(len(o.autoregressive_ids), len(o.speculative_ids))
            differ = np.flatnonzero(o.autoregressive_ids[:length] != o.speculative_ids[:length])
            first = int(differ[0]) if len(differ) else length
            margins.append(top2_margin(target, np.concatenate([o.prompt_ids, o.autoregressive_ids[:first]])))
    return {"first_difference_margins": margins}


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
