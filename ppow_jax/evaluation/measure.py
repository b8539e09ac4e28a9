"""The measurement: the same prompts decoded plainly and speculatively, in one run.

`evaluate` gives one row per benchmark; `docs/results_schema.md` says what its keys mean, and how is counted.
"""

import dataclasses
import logging
import math
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppow_jax import progress
from ppow_jax.config import require
from ppow_jax.evaluation import dialogues, report
from ppow_jax.evaluation.benchmarks import Benchmark
from ppow_jax.evaluation.costs import Costs, measure_costs
from ppow_jax.evaluation.decoding import Decoded, Decoding, decode
from ppow_jax.evaluation.dialogues import Request
from ppow_jax.models.drafter import Drafter
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)

__all__ = ["Costs", "Output", "acceptance", "environment", "evaluate", "measure_costs"]


@dataclasses.dataclass(frozen=True)
class Output:
    """A prompt, token ids [T], and the new token ids that the two arms made of it, with the end token."""

    benchmark: str
    source: str
    turn: int
    prompt_ids: np.ndarray
    autoregressive_ids: np.ndarray
    speculative_ids: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """A JSON object, the ids as lists."""
        values = dataclasses.asdict(self)
        return {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in values.items()}


@dataclasses.dataclass
class _Tally:
    """Sums over the batches of one arm."""

    new_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    accepted_K1: Any = 0

    def add(self, decoded: Decoded) -> None:
        self.new_tokens += decoded.decode_tokens
        self.decode_seconds += decoded.decode_seconds
        self.prefill_seconds += decoded.prefill_seconds
        self.accepted_K1 = self.accepted_K1 + decoded.accepted_BxK1.sum(0)

    @property
    def tokens_per_second(self) -> float:
        return _ratio(self.new_tokens, self.decode_seconds)

    @property
    def verifications(self) -> int:
        return int(np.sum(self.accepted_K1))

    @property
    def tau(self) -> float:
        return _ratio(self.new_tokens, self.verifications)


def evaluate(
    target: Target,
    drafter: Drafter,
    benchmarks: Sequence[Benchmark],
    *,
    window: int,
    temperature: float = 0.0,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    skip_long_prompts: bool = False,
    on_output: Callable[[Output], None] | None = None,
) -> list[dict[str, Any]]:
    """Decodes every prompt plainly and with `drafter` -> one row per benchmark, see the module.

    The arms take turns batch by batch, and in who goes first, so that a slow phase of the machine meets both.
    Every program runs once before it is timed. Costs are measured once, at the median prompt's cache length.

    Args:
      window: drafted tokens per round, K.
      temperature: 0 is greedy.
      batch_size: prompts decoded at once.
      max_new_tokens: longest answer, at least 2 (the first token is the prefill's).
      seed: of the sampling at temperature > 0.
      skip_long_prompts: leave out what does not fit the target's positions.
      on_output: called with every answer pair, in the order of the prompts, when a benchmark is through.

    Raises:
      UserError: before anything is compiled: for impossible settings, and for a prompt that has, with its
        answers, more tokens than the target has positions (unless such are skipped), naming its source.
    """
    how = Decoding(window, float(temperature), max_new_tokens, batch_size, seed)
    rule = "must be at least 2, since the prefill makes the first"
    require(max_new_tokens >= 2, f"--max_new_tokens={max_new_tokens}: {rule}")
    chosen = [(b.name, dialogues.fitting(target, b, how, skip_long_prompts)) for b in benchmarks]
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    warm: set[int] = set()
    total = sum(len(prompt.turns) for _, prompts in chosen for prompt in prompts)
    with progress.bar(total, "evaluation", "answer") as bar:
        for name, prompts in chosen:
            plain, fast = _Tally(), _Tally()
            answered: list[tuple[Request, Output]] = []
            for i, batch in enumerate(dialogues.batches(target, prompts, how, bar.update)):
                pair = _both_arms(target, drafter, batch, how, i % 2, warm)
                plain.add(pair[0])
                fast.add(pair[1])
                for request, *ids in zip(batch, pair[0].answers, pair[1].answers, strict=True):
                    request.answer(target, ids[0])
                    source = request.dialogue.prompt.source
                    answered.append((request, Output(name, source, request.turn, request.tokens, *ids)))
                bar.set_postfix(tau=round(fast.tau, 2), refresh=False)
                bar.update(len(batch))
            outputs = [output for _, output in sorted(answered, key=lambda pair: pair[0].id)]
            rows.append(_row(name, len(prompts), outputs, how, plain, fast))
            lengths += [len(output.prompt_ids) for output in outputs]
            for output in outputs if on_output else ():
                on_output(output)
    L = how.cache_length(statistics.median_low(lengths))
    costs = measure_costs(target, drafter, window, L, batch_size, sampling=how.sampling)
    return [row | _cost_columns(costs, window) for row in rows]


def acceptance(accepted_K1: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """(conditional, marginal) acceptance of the K positions, from a histogram of accepted lengths.

    Conditional: P(j-th accepted | all before it accepted). Marginal: P(j-th accepted), which takes that all
    before it were. None where there is no verification to judge by.
    """
    at_least_K1 = np.cumsum(np.asarray(accepted_K1)[::-1])[::-1].tolist()
    total = at_least_K1[0]
    conditional = [b / a if a else None for a, b in zip(at_least_K1, at_least_K1[1:], strict=False)]
    return conditional, [b / total if total else None for b in at_least_K1[1:]]


def environment(precision: str) -> dict[str, Any]:
    """What a result file begins with: schema, device, precision of the matrices, versions."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{_cpu_name()}, {os.cpu_count()} threads"
    return {
        "schema": 1,
        "device": f"{device.platform} ({kind})",
        "precision": precision,
        "versions": report.versions(),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _both_arms(
    target: Target, drafter: Drafter, batch: Sequence[Request], how: Decoding, first: int, warm: set[int]
) -> tuple[Decoded, Decoded]:
    """The batch decoded (plainly, speculatively), arm `first` first. warm: cache lengths that ran before."""
    prompts, ids = [request.tokens for request in batch], [request.id for request in batch]
    arms, L = (None, drafter), how.cache_length(max(map(len, prompts)))
    if L not in warm:
        log.info("compiling for caches of %d tokens", L)
        for arm in arms:
            decode(target, arm, prompts, how, ids, rounds=1)
        warm.add(L)
    decoded = {i: decode(target, arms[i], prompts, how, ids) for i in (first, 1 - first)}
    return decoded[0], decoded[1]


def _row(
    benchmark: str, num_prompts: int, outputs: Sequence[Output], how: Decoding, plain: _Tally, fast: _Tally
) -> dict[str, Any]:
    same = sum(np.array_equal(output.autoregressive_ids, output.speculative_ids) for output in outputs)
    conditional, marginal = acceptance(fast.accepted_K1)
    return {
        "benchmark": benchmark,
        "mode": "chain",
        "temperature": how.temperature,
        "batch_size": how.batch_size,
        "window": how.window,
        "max_new_tokens": how.max_new_tokens,
        "num_prompts": num_prompts,
        "tau": fast.tau,
        "speedup": _ratio(fast.tokens_per_second, plain.tokens_per_second),
        "tokens_per_second": fast.tokens_per_second,
        "baseline_tokens_per_second": plain.tokens_per_second,
        "identical": same if how.sampling.greedy else None,
        "total": len(outputs),
        "new_tokens": fast.new_tokens,
        "num_verifications": fast.verifications,
        "decode_seconds": fast.decode_seconds,
        "prefill_seconds": fast.prefill_seconds,
        "baseline_new_tokens": plain.new_tokens,
        "baseline_decode_seconds": plain.decode_seconds,
        "baseline_prefill_seconds": plain.prefill_seconds,
        "accepted_histogram": fast.accepted_K1.tolist(),
        "acceptance_by_position": conditional,
        "marginal_acceptance_by_position": marginal,
    }


def _cost_columns(costs: Costs, K: int) -> dict[str, float]:
    return {
        "draft_seconds": costs.draft_step * K,
        "verify_seconds": costs.verify,
        "plain_seconds": costs.plain_step,
        "gamma": costs.gamma,
        "verify_cost_ratio": costs.verify_ratio,
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
