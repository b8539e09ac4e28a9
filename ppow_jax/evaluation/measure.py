"""The measurement: the same prompts decoded plainly and speculatively, in one run.

`evaluate` returns one row per benchmark; `docs/results_schema.md` documents its keys and the way results are counted.
"""

import dataclasses
import itertools
import logging
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ppow_jax import progress
from ppow_jax.evaluation import dialogues, report
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.evaluation.dialogues import Turn
from ppow_jax.evaluation.measured import Measured, Output
from ppow_jax.flags import require
from ppow_jax.inference.batch import TO_THE_END, bucket
from ppow_jax.inference.costs import Costs, measure_cost_table, measure_costs
from ppow_jax.inference.datastore import Datastore
from ppow_jax.inference.decoding import Decoded, Decoding, decode
from ppow_jax.models.drafter import Drafter
from ppow_jax.programs import make_room
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.settings import Speculation, chain, off
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)

TYPICAL_PROMPT = 128  # tokens: the cache length at which the costs of an adaptive window are measured


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
) -> Measured | None:
    """Decodes the prompts of one benchmark with every seed, batch by batch; None if stopped."""
    measured = Measured(name, comparison.modes)
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
        cost_table = self._cost_table_of(mode) if mode.speculation.adaptive else None
        store_S = self.datastore.array if self.datastore is not None and mode.speculation.lookup else None
        return decode(self.target, drafter, prompts, mode, ids, rounds, cost_table, store_S)

    def _cost_table_of(self, mode: Decoding) -> CostTable:
        """Cost table of an adaptive mode, measured once."""
        key = mode.speculation, mode.cache_length(bucket(TYPICAL_PROMPT))
        if key not in self.cost_table:
            self.cost_table[key] = measure_cost_table(
                self.target, self.drafter, *key, mode.batch_size, sampling=self.widest.sampling
            )
        return self.cost_table[key]


def _cost_columns(costs: Costs) -> dict[str, float]:
    return {
        "draft_seconds": costs.draft,
        "verify_seconds": costs.verify,
        "plain_seconds": costs.plain_step,
        "gamma": costs.gamma,
        "verify_cost_ratio": costs.verify_ratio,
    }
