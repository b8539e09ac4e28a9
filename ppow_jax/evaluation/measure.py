"""The measurement: the same prompts decoded plainly and speculatively, in one run.

`evaluate` returns one row per benchmark; `docs/results_schema.md` documents its keys and the way results are counted.
"""

import dataclasses
import functools
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
from ppow_jax.evaluation import dialogues, intervals, report
from ppow_jax.evaluation.benchmarks import Benchmark
from ppow_jax.evaluation.dialogues import Request
from ppow_jax.flags import require
from ppow_jax.inference.batch import TO_THE_END, bucket
from ppow_jax.inference.costs import Costs, measure_costs, measure_prices
from ppow_jax.inference.decoding import Decoded, Decoding, decode, top2_margin
from ppow_jax.models.drafter import Drafter
from ppow_jax.programs import make_room
from ppow_jax.speculation.adaptive import Prices
from ppow_jax.speculation.settings import Speculation, off
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)

TYPICAL_PROMPT = 128  # tokens: the cache length at which the costs of an adaptive window are measured

__all__ = ["Costs", "Output", "acceptance", "environment", "evaluate", "measure_costs"]


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

    def add(self, batch: Sequence[Request], decoded: Decoded) -> None:
        together = tuple(sorted({request.dialogue.number for request in batch}))
        self.by_prompts.setdefault(together, _Tally()).add(_Tally.of(decoded))

    @property
    def total(self) -> _Tally:
        total = _Tally()
        for tally in self.by_prompts.values():
            total.add(tally)
        return total


def evaluate(
    target: Target,
    drafter: Drafter,
    benchmarks: Sequence[Benchmark],
    *,
    speculations: Sequence[Speculation],
    temperature: float = 0.0,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    seeds: Sequence[int] = (0,),
    skip_long_prompts: bool = False,
    on_output: Callable[[Output], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Decodes every prompt plainly and with `drafter` -> one row per benchmark and speculation mode, see the module.

    The arms, including plain decoding, alternate batch by batch, and rotate their order, so that a slow phase of the
    machine affects all. Every program runs once before it is timed. Costs are measured once, at the median prompt's
    cache length; the cost tables of adaptive windows before that.

    Args:
      speculations: speculation modes; each is an arm.
      temperature: 0 is greedy.
      batch_size: prompts decoded at once.
      max_new_tokens: maximum length of an answer, at least 2 (the first token is the prefill's).
      seeds: seeds of sampling at temperature > 0; the prompts are decoded once for each.
      skip_long_prompts: leave out prompts that do not fit the target's positions.
      on_output: called with every answer pair, mode by mode in the order of the prompts, at the end of a benchmark.
      stop: checked before every batch; once it returns True, no rows are returned.

    Raises:
      UserError: before anything is compiled: for impossible settings, and for a prompt that has, with its
        answers, more tokens than the target has positions (unless such are skipped), naming its source.
    """
    rule = "must be at least 2, since the prefill makes the first"
    require(max_new_tokens >= 2, f"--max_new_tokens={max_new_tokens}: {rule}")
    ways = [Decoding(way, float(temperature), max_new_tokens, batch_size) for way in speculations]
    require(bool(ways), "--modes: name one at least")
    widest = max(ways, key=lambda how: how.window)
    seeds = seeds if temperature else seeds[:1]
    chosen = [(b.name, dialogues.fitting(target, b, widest, skip_long_prompts)) for b in benchmarks]
    prices_of = functools.cache(
        lambda way, L: measure_prices(target, drafter, way, L, batch_size, sampling=widest.sampling)
    )
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    warm: set[tuple[Speculation, int, int]] = set()
    total = len(seeds) * sum(len(prompt.turns) for _, prompts in chosen for prompt in prompts)
    with progress.bar(total, f"evaluation, T={temperature:g}, batch {batch_size}", "answer") as bar:
        for name, prompts in chosen:
            plain, fast = _Arm(), [_Arm() for _ in ways]
            answered: list[list[tuple[int, Output]]] = [[] for _ in ways]
            for seed in seeds:
                for i, batch in enumerate(dialogues.batches(target, prompts, widest, bar.update)):
                    if stop():
                        return []
                    arms = [dataclasses.replace(how, seed=seed) for how in ways]
                    with progress.off_the_clock(bar):
                        _warm_up(target, drafter, batch, arms, warm, prices_of)
                    decoded = _all_arms(target, drafter, batch, arms, i, prices_of)
                    plain.add(batch, decoded[0])
                    for arm, numbered, how, found in zip(fast, answered, arms, decoded[1:], strict=True):
                        arm.add(batch, found)
                        for request, *pair in zip(batch, decoded[0].answers, found.answers, strict=True):
                            numbered.append((request.id, _output(name, request, how, *pair)))
                    for request, ids in zip(batch, decoded[0].answers, strict=True):
                        request.answer(target, ids)
                    bar.set_postfix(tau=round(fast[0].total.tau, 2), refresh=False)
                    bar.update(len(batch))
            for how, arm, numbered in zip(ways, fast, answered, strict=True):
                outputs = [output for _, output in sorted(numbered, key=lambda pair: pair[0])]
                rows.append(_row(name, len(prompts), outputs, how, plain, arm) | _differences(target, outputs, how))
                for output in outputs if on_output else ():
                    on_output(output)
            lengths += [len(output.prompt_ids) for output in outputs]
    L = widest.cache_length(statistics.median_low(lengths))
    columns = [
        _cost_columns(measure_costs(target, drafter, how.speculation, L, batch_size, sampling=how.sampling))
        for how in ways
    ]
    return [row | columns[i % len(ways)] for i, row in enumerate(rows)]


def _output(benchmark: str, request: Request, how: Decoding, plain: np.ndarray, fast: np.ndarray) -> Output:
    source, mode = request.dialogue.prompt.source, how.speculation.mode
    about = benchmark, source, request.turn, mode, how.window, how.temperature, how.seed
    return Output(*about, request.tokens, plain, fast)


def acceptance(accepted_K1: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """(conditional, marginal) acceptance of the K positions, from a histogram of accepted lengths.

    Conditional: P(j-th accepted | all before it accepted). Marginal: P(j-th accepted), which implies that all
    before it were. None where there is no verification to estimate it from.
    """
    at_least_K1 = np.cumsum(np.asarray(accepted_K1)[::-1])[::-1].tolist()
    total = at_least_K1[0]
    conditional = [b / a if a else None for a, b in zip(at_least_K1, at_least_K1[1:], strict=False)]
    return conditional, [b / total if total else None for b in at_least_K1[1:]]


def environment(precision: str) -> dict[str, Any]:
    """Header of a result file: schema, device, precision of the matrices, versions."""
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


PricesOf = Callable[[Speculation, int], Prices]


def _warm_up(
    target: Target,
    drafter: Drafter,
    batch: Sequence[Request],
    ways: Sequence[Decoding],
    warm: set[tuple[Speculation, int, int]],
    prices_of: PricesOf,
) -> None:
    """Runs every program that the batch needs once, unless it is in `warm`, which holds those that ran before."""
    longest = max(len(request.tokens) for request in batch)
    arms = [(speaker, how, how.speculation if speaker else off()) for speaker, how in _arms(drafter, ways)]
    programs = [(speculation, how.cache_length(longest), bucket(longest)) for _, how, speculation in arms]
    if not warm.issuperset(programs) and make_room():
        warm.clear()
    for (speaker, how, _), program in zip(arms, programs, strict=True):
        if program not in warm:
            log.info("compiling %s for prompts of %d and caches of %d tokens", program[0].mode, program[2], program[1])
            _run(target, speaker, batch, how, prices_of, rounds=1)
            warm.add(program)


def _all_arms(
    target: Target,
    drafter: Drafter,
    batch: Sequence[Request],
    ways: Sequence[Decoding],
    first: int,
    prices_of: PricesOf,
) -> list[Decoded]:
    """The batch decoded plainly and in all modes, in rotated order beginning with arm `first`."""
    arms = _arms(drafter, ways)
    order = [(first + i) % len(arms) for i in range(len(arms))]
    decoded = {arm: _run(target, arms[arm][0], batch, arms[arm][1], prices_of) for arm in order}
    return [decoded[arm] for arm in range(len(arms))]


def _arms(drafter: Drafter, ways: Sequence[Decoding]) -> list[tuple[Drafter | None, Decoding]]:
    """Plain decoding, then all speculation modes."""
    return [(None, ways[0]), *((drafter, how) for how in ways)]


def _run(
    target: Target,
    speaker: Drafter | None,
    batch: Sequence[Request],
    how: Decoding,
    prices_of: PricesOf,
    rounds: int = TO_THE_END,
) -> Decoded:
    prompts, ids = [request.tokens for request in batch], [request.id for request in batch]
    adapts = speaker is not None and how.speculation.adaptive
    prices = prices_of(how.speculation, how.cache_length(bucket(TYPICAL_PROMPT))) if adapts else None
    return decode(target, speaker, prompts, how, ids, rounds, prices)


def _row(
    benchmark: str, num_prompts: int, outputs: Sequence[Output], how: Decoding, plain_arm: _Arm, fast_arm: _Arm
) -> dict[str, Any]:
    plain, fast = plain_arm.total, fast_arm.total
    shape, stopping = how.speculation.shape, how.speculation.adaptive
    conditional, marginal = acceptance(fast.accepted_K1)
    accepted = int(np.dot(fast.accepted_K1, np.arange(how.window + 1)))
    return {
        "benchmark": benchmark,
        "mode": how.speculation.mode,
        "temperature": how.temperature,
        "batch_size": how.batch_size,
        "window": how.window,
        "tree": dataclasses.asdict(shape) if shape else None,
        "stopping": dataclasses.asdict(stopping) if stopping else None,
        "block_verification": how.speculation.block,
        "max_new_tokens": how.max_new_tokens,
        "num_prompts": num_prompts,
        "num_seeds": len({output.seed for output in outputs}),
        "tau": fast.tau,
        "speedup": _ratio(fast.tokens_per_second, plain.tokens_per_second),
        **_intervals(plain_arm, fast_arm),
        "tokens_per_second": fast.tokens_per_second,
        "baseline_tokens_per_second": plain.tokens_per_second,
        "identical": sum(o.identical for o in outputs) if how.sampling.greedy or shape else None,
        "total": len(outputs),
        "new_tokens": fast.new_tokens,
        "num_verifications": fast.verifications,
        "num_draft_tokens": fast.drafted,
        "draft_acceptance_rate": _ratio(accepted, fast.drafted) if fast.drafted else None,
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


def _differences(target: Target, outputs: Sequence[Output], how: Decoding) -> dict[str, Any]:
    """The target's top-2 margins, in logits, at which greedy answers first differ from plain decoding's."""
    if not how.sampling.greedy:
        return {"first_difference_margins": None}
    margins = []
    for o in outputs:
        if not o.identical:
            length = min(len(o.autoregressive_ids), len(o.speculative_ids))
            differ = np.flatnonzero(o.autoregressive_ids[:length] != o.speculative_ids[:length])
            first = int(differ[0]) if len(differ) else length
            margins.append(top2_margin(target, np.concatenate([o.prompt_ids, o.autoregressive_ids[:first]])))
    return {"first_difference_margins": margins}


def _cost_columns(costs: Costs) -> dict[str, float]:
    return {
        "draft_seconds": costs.draft,
        "verify_seconds": costs.verify,
        "plain_seconds": costs.plain_step,
        "gamma": costs.gamma,
        "verify_cost_ratio": costs.verify_ratio,
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
