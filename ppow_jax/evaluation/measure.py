"""The measurement: the same prompts decoded plainly and speculatively, in one run.

`evaluate` returns one row per benchmark; `docs/results_schema.md` documents its keys and the way results are counted.
"""

import dataclasses
import itertools
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
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.evaluation.dialogues import Turn
from ppow_jax.flags import require
from ppow_jax.inference.batch import TO_THE_END, bucket
from ppow_jax.inference.costs import Costs, measure_cost_table, measure_costs
from ppow_jax.inference.datastore import Datastore
from ppow_jax.inference.decoding import Decoded, Decoding, decode, top2_margin
from ppow_jax.models.drafter import Drafter
from ppow_jax.programs import make_room
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import Speculation, chain, off
from ppow_jax.speculation.sources import NAMES
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


def evaluate(
    target: Target,
    drafter: Drafter | None,
    benchmarks: Sequence[Benchmark],
    *,
    speculations: Sequence[Speculation],
    temperature: float = 0.0,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    seeds: Sequence[int] = (0,),
    skip_long_prompts: bool = False,
    on_output: Callable[[Output], None] | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    datastore: Datastore | None = None,
) -> list[dict[str, Any]]:
    """Decodes every prompt plainly and with `drafter` -> one row per benchmark and speculation mode, see the module.

    The arms, including plain decoding, alternate batch by batch, and rotate their order, so that a slow phase of the
    machine affects all. Every program runs once before it is timed. Costs are measured once, at the median prompt's
    cache length; the cost tables of adaptive windows before that.

    Args:
      drafter: may be None if no mode needs one.
      speculations: speculation modes; each is an arm.
      temperature: 0 is greedy.
      batch_size: prompts decoded at once.
      max_new_tokens: maximum length of an answer, at least 2 (the first token is the prefill's).
      seeds: seeds of sampling at temperature > 0; the prompts are decoded once for each.
      skip_long_prompts: leave out prompts that do not fit the target's positions.
      on_output: called with every answer pair, mode by mode in the order of the prompts, at the end of a benchmark.
      on_rows: called with the rows so far, still without costs, at the end of a benchmark.
      stop: checked before every batch; once it returns True, no rows are returned.
      datastore: earlier answers for lookups. Plain decoding's answers are added, after all modes have decoded a batch.

    Raises:
      UserError: before anything is compiled: for impossible settings, and for a prompt that has, with its
        answers, more tokens than the target has positions (unless such are skipped), naming its source.
    """
    rule = "must be at least 2, since the prefill makes the first"
    require(max_new_tokens >= 2, f"--max_new_tokens={max_new_tokens}: {rule}")
    modes = [Decoding(speculation, float(temperature), max_new_tokens, batch_size) for speculation in speculations]
    require(bool(modes), "--modes: name one at least")
    comparison = _Comparison(target, drafter, modes, datastore)
    seeds = seeds if temperature else seeds[:1]
    chosen = [(b.name, dialogues.fitting(target, b, comparison.widest, skip_long_prompts)) for b in benchmarks]
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    total = len(seeds) * sum(len(prompt.turns) for _, prompts in chosen for prompt in prompts)
    with progress.bar(total, f"evaluation, T={temperature:g}, batch {batch_size}", "answer") as bar:
        for name, prompts in chosen:
            measured = _measure(comparison, name, prompts, seeds, bar, stop)
            if measured is None:
                return []
            rows += measured.rows(target, len(prompts))
            for output in itertools.chain(*measured.outputs) if on_output else ():
                on_output(output)
            if on_rows:
                on_rows(rows)
            lengths += [len(output.prompt_ids) for output in measured.outputs[-1]]
    columns = comparison.costs(statistics.median_low(lengths))
    return [row | columns[i % len(modes)] for i, row in enumerate(rows)]


def _measure(
    comparison: "_Comparison",
    name: str,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    bar: Any,
    stop: Callable[[], bool],
) -> "_Measured | None":
    """Decodes the prompts of one benchmark with every seed, batch by batch; None if stopped."""
    measured = _Measured(name, comparison.modes)
    for seed in seeds:
        for i, batch in enumerate(dialogues.batches(comparison.target, prompts, comparison.widest, bar.update)):
            if stop():
                return None
            with progress.off_the_clock(bar):
                comparison.warm_up(batch, seed)
            decoded = comparison.decode(batch, seed, first=i)
            measured.add(batch, seed, decoded)
            for turn, ids in zip(batch, decoded[0].answers, strict=True):
                if comparison.datastore is not None:
                    comparison.datastore.add(turn.tokens, ids)
                turn.answer(comparison.target, ids)
            bar.set_postfix(tau=round(measured.fast[0].total.tau, 2), refresh=False)
            bar.update(len(batch))
    return measured


class _Measured:
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


class _Comparison:
    """Decodes batches plainly and in all modes. Holds which programs have run, and the measured cost tables."""

    def __init__(
        self, target: Target, drafter: Drafter | None, modes: Sequence[Decoding], datastore: Datastore | None = None
    ):
        self.target, self.drafter, self.modes, self.datastore = target, drafter, modes, datastore
        self.widest = max(modes, key=lambda mode: mode.window)
        self.warm: set[tuple[Speculation, int, int]] = set()
        self.cost_table: dict[tuple[Speculation, int], CostTable] = {}

    def warm_up(self, batch: Sequence[Turn], seed: int) -> None:
        """Runs every program that the batch needs once, unless it ran before."""
        longest = max(len(turn.tokens) for turn in batch)
        arms = self._arms(seed)
        programs = [
            (mode.speculation if arm else off(), mode.cache_length(longest), bucket(longest))
            for arm, (_, mode) in enumerate(arms)
        ]
        if not self.warm.issuperset(programs) and make_room():
            self.warm.clear()
        for arm, program in zip(arms, programs, strict=True):
            if program not in self.warm:
                speculation, _, P = program
                mode = "plain" if speculation.mode == "off" else speculation.mode
                log.info("compiling %s decoding for prompts of up to %d tokens", mode, P)
                self._run(*arm, batch, rounds=1)
                self.warm.add(program)

    def decode(self, batch: Sequence[Turn], seed: int, first: int) -> list[Decoded]:
        """The batch decoded plainly and in all modes, in rotated order beginning with arm `first`."""
        arms = self._arms(seed)
        order = [(first + i) % len(arms) for i in range(len(arms))]
        decoded = {arm: self._run(*arms[arm], batch) for arm in order}
        return [decoded[arm] for arm in range(len(arms))]

    def costs(self, prompt_length: int) -> list[dict[str, float]]:
        """Costs of each mode, measured at the cache length of such a prompt, as columns of its rows."""
        L = self.widest.cache_length(prompt_length)
        return [
            _cost_columns(
                measure_costs(
                    self.target, self.drafter, mode.speculation, L, mode.batch_size, sampling=mode.sampling
                )
            )
            for mode in self.modes
        ]

    def _arms(self, seed: int) -> list[tuple[Drafter | None, Decoding]]:
        """Plain decoding (a chain whose drafter is missing), then all speculation modes."""
        seeded = [dataclasses.replace(mode, seed=seed) for mode in self.modes]
        plain = dataclasses.replace(seeded[0], speculation=chain(seeded[0].window))
        return [(None, plain), *((self.drafter, mode) for mode in seeded)]

    def _run(
        self, drafter: Drafter | None, mode: Decoding, batch: Sequence[Turn], rounds: int = TO_THE_END
    ) -> Decoded:
        prompts, ids = [turn.tokens for turn in batch], [turn.id for turn in batch]
        cost_table = self._prices_of(mode) if mode.speculation.adaptive else None
        store_S = self.datastore.array if self.datastore is not None and mode.speculation.lookup else None
        return decode(self.target, drafter, prompts, mode, ids, rounds, cost_table, store_S)

    def _prices_of(self, mode: Decoding) -> CostTable:
        """Cost table of an adaptive mode, measured once."""
        key = mode.speculation, mode.cache_length(bucket(TYPICAL_PROMPT))
        if key not in self.cost_table:
            self.cost_table[key] = measure_cost_table(
                self.target, self.drafter, *key, mode.batch_size, sampling=self.widest.sampling
            )
        return self.cost_table[key]


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
