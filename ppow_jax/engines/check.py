"""The check of an engine: exports what it reads, runs it and us on the same prompts, and compares."""

import dataclasses
import itertools
import json
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.data.known_ids import require_known
from ppow_jax.engines import compare, job, ours
from ppow_jax.engines.compare import Answer
from ppow_jax.evaluation import report
from ppow_jax.evaluation.benchmarks import Benchmark
from ppow_jax.files import write_atomic
from ppow_jax.flags import require
from ppow_jax.inference.decoding import Decoding, require_room
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.settings import chain
from ppow_jax.weights import drafters, flat, huggingface, targets
from ppow_jax.weights.targets import Target

log = logging.getLogger(__name__)
Report = dict[str, Any]
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a check: the engine, where it runs, and how; see the flags of `experiments.serve_check`."""

    engine: job.Engine
    python: Path
    code: str | None
    workdir: Path
    timeout: float
    formats: tuple[str, ...]
    window: int
    max_new_tokens: int
    temperature: tuple[float, ...]
    seeds: tuple[int, ...]
    num_prompts: int | None

    def decoding(self, temperature: float, seed: int) -> Decoding:
        """Our settings for one temperature and seed."""
        way = ours.speculation(self.window, temperature, self.engine.greedy_drafts)
        return Decoding(way, temperature, self.max_new_tokens, seed=seed)

    @property
    def samples(self) -> list[tuple[float, int]]:
        """Every temperature with its seeds; greedy decoding needs only one."""
        return [(t, seed) for t in self.temperature for seed in (self.seeds if t else self.seeds[:1])]


def run(plan: Plan, target: Target, drafter: Drafter, directory: Path, benchmarks: Sequence[Benchmark]) -> Report:
    """Runs the check -> what `experiments.serve_check --output` writes (docs/engines.md).

    Raises:
      UserError: for prompts that do not fit, a drafter that no format of the engine can represent, and the errors of
        `job.run`.
    """
    prompts = encode(target, benchmarks, plan)
    where = target_directory(target, plan.workdir / "target")
    exported, left_out = export(target, directory, plan)
    reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    require(bool(exported), f"--drafter={directory}: cannot be written for {plan.engine.name} ({reasons})")
    task = job.Job(
        target=str(where),
        drafter=str(next(iter(exported.values()))),
        plain=True,
        window=plan.window,
        prompts=[prompt.tolist() for _, prompt in prompts],
        max_new_tokens=plan.max_new_tokens,
        max_length=_max_length(target, [prompt for _, prompt in prompts], plan),
        stop_ids=list(target.config.eos_token_ids),
        temperatures=plan.temperature,
        seeds=plan.seeds,
        code=plan.code,
    )
    plain = job.run(plan.engine, plan.python, task, plan.workdir, "plain", plan.timeout)
    fast = {}
    for name, path in exported.items():
        with_drafter = dataclasses.replace(task, drafter=str(path), plain=False)
        fast[name] = job.run(plan.engine, plan.python, with_drafter, plan.workdir, name, plan.timeout)
    log.info("%s is done; decoding the same prompts here", plan.engine.name)
    rows = []
    for n, (temperature, runs) in enumerate(itertools.groupby(range(len(plan.samples)), lambda i: plan.samples[i][0])):
        chosen = list(runs)
        mine = [
            ours.decode(target, drafter, [p for _, p in prompts], plan.decoding(temperature, plan.samples[i][1]))
            for i in chosen
        ]
        for name, found in fast.items():
            theirs, theirs_plain = ([_answers(x["runs"][i]) for i in chosen] for x in (found, plain))
            rows += _rows(target, prompts, name, temperature, theirs, theirs_plain, mine)
        log.info("temperature %g compared (%d of %d)", temperature, n + 1, len(plan.temperature))
    return {
        "schema": 1,
        "engine": {"name": plan.engine.name, "version": fast[next(iter(fast))]["version"], "device": _device()},
        "versions": report.versions(),
        "settings": {
            "target": target.name if not Path(target.name).is_absolute() else Path(target.name).name,
            "drafter": directory.name,
            "precision": "float32",
            "window": plan.window,
            "max_new_tokens": plan.max_new_tokens,
            "seeds": list(plan.seeds),
            "benchmarks": [benchmark.name for benchmark in benchmarks],
            "tie": compare.TIE,
            "tolerance": compare.TOLERANCE,
        },
        "left_out": left_out,
        "results": rows,
    }


def encode(target: Target, benchmarks: Sequence[Benchmark], plan: Plan) -> list[tuple[str, np.ndarray]]:
    """(benchmark, token ids int32 [T]) of every first turn. Raises UserError for prompts that do not fit."""
    how = Decoding(chain(plan.window), max_new_tokens=plan.max_new_tokens)
    found = []
    for benchmark in benchmarks:
        for prompt in benchmark.prompts:
            tokens = encode_prompt(target.tokenizer, [Message("user", prompt.turns[0])], prompt.source)
            require_known(tokens, target.config.vocab_size, prompt.source, target.tokenizer)
            require_room(target, len(tokens), how, prompt.source)
            found.append((benchmark.name, tokens))
    return found


def target_directory(target: Target, directory: Path) -> Path:
    """The directory of a target in the Hugging Face format, written if it comes from elsewhere."""
    if targets.in_directory(target.name):
        return huggingface.find_directory(target.name).absolute()
    log.info("writing the target to %s", directory)
    huggingface.save_target(directory, target.config, target.params)
    return directory


def export(target: Target, source: Path, plan: Plan) -> tuple[dict[str, Path], dict[str, str]]:
    """Writes the drafter in each format of the plan -> (their directories, why the others cannot be written)."""
    stored = drafters.import_drafter(
        source,
        num_target_layers=target.config.num_layers,
        target_embed_VxD=target.params["embed"],
        target_head=lambda: target.params.get("lm_head", target.params["embed"]),
    )
    written, left_out = {}, {}
    for name in plan.formats:
        reason = flat.reason_against(stored.config) if name == "flat" else None
        if reason is not None:
            left_out[name] = reason
            continue
        drafters.export_drafter(
            plan.workdir / name,
            stored.config,
            stored.params,
            stored.target_ids_W,
            dtype=None,
            target_name=target.name,
            target_architecture=target.config.architecture,
            embed_VxE=stored.embed_VxE,
            format=name,
        )
        written[name] = plan.workdir / name
    return written, left_out


def _max_length(target: Target, prompts: Sequence[np.ndarray], plan: Plan) -> int:
    """Positions that the longest text needs, with a window and a token to spare, as far as the target has them."""
    longest = max(map(len, prompts)) + plan.max_new_tokens + plan.window + 1
    return min(longest, target.config.max_position_embeddings)


def _answers(found: dict[str, Any]) -> list[Answer]:
    return [Answer.of(answer) for answer in found["answers"]]


def _rows(
    target: Target,
    prompts: Sequence[tuple[str, np.ndarray]],
    name: str,
    temperature: float,
    theirs: Sequence[Sequence[Answer]],
    theirs_plain: Sequence[Sequence[Answer]],
    mine: Sequence[Sequence[Answer]],
) -> list[dict[str, Any]]:
    """Rows of one format and temperature, for each benchmark and all; answers are given by seed, then by prompt."""
    names = list(dict.fromkeys(benchmark for benchmark, _ in prompts))
    rows = []
    for benchmark in [*names, *([ALL] if len(names) > 1 else [])]:
        chosen = [n for n, (of, _) in enumerate(prompts) if benchmark in (of, ALL)]
        fast, plain, us = ([answers[n] for answers in x for n in chosen] for x in (theirs, theirs_plain, mine))
        if temperature:
            row = compare.compare_sampled(fast, us, len(chosen))
        else:

            def margin(n: int, position: int, chosen=chosen, us=us) -> float:
                return ours.margin(target, prompts[chosen[n]][1], us[n].tokens, position)

            row = compare.compare_greedy(fast, us, margin)
            row["as_plain"] = sum(list(a.tokens) == list(b.tokens) for a, b in zip(fast, plain, strict=True))
        speeds = compare.speed(fast), compare.speed(plain)
        row |= {"tokens_per_second": speeds[0], "plain_tokens_per_second": speeds[1], "speedup": speeds[0] / speeds[1]}
        cpu = compare.cpu_speed(fast), compare.cpu_speed(plain)
        row["cpu_speedup"] = None if None in cpu else cpu[0] / cpu[1]
        about = {"format": name, "temperature": temperature, "benchmark": benchmark, "prompts": len(chosen)}
        rows.append(about | row | {"agrees": compare.passed(row)})
    return rows


def agrees(result: Report) -> bool:
    """True if every row over all prompts of a format and temperature agrees, and so do all tokens."""
    return all(row["agrees"] for row in judged(result))


def judged(result: Report) -> list[dict[str, Any]]:
    """The rows that decide: those over all prompts. Single benchmarks have too few to judge their acceptance by."""
    several = any(row["benchmark"] == ALL for row in result["results"])
    return [row for row in result["results"] if row["benchmark"] == ALL or not several]


def table(result: Report) -> str:
    """The result as a console table."""
    rows = []
    for row in result["results"]:
        theirs, us = row["engine"], row["ours"]
        tau = [x["tau"] if x else None for x in (theirs, us)]
        rows.append(
            {
                "format": row["format"],
                "temp.": row["temperature"],
                "benchmark": row["benchmark"],
                "identical": "-" if row["identical"] is None else f"{row['identical']}/{row['answers']}",
                "ties": row["ties"],
                "tau": tau[0],
                "ours": tau[1],
                "accepted by position": _positions(theirs),
                "ours ": _positions(us),
                "plain token/s": row["plain_tokens_per_second"],
                "token/s": row["tokens_per_second"],
                "speedup": row["speedup"],
                "by CPU time": row["cpu_speedup"],
                "agrees": "yes" if row["agrees"] else "no",
            }
        )
    formats = {
        "tau": ".3f",
        "ours": ".3f",
        "plain token/s": ".1f",
        "token/s": ".1f",
        "speedup": ".2f",
        "by CPU time": ".2f",
    }
    floats = [formats.get(name, "g") for name in rows[0]]
    engine = result["engine"]
    return f"{engine['name']} {engine['version']}\n" + tabulate(rows, headers="keys", floatfmt=floats, missingval="-")


def remarks(result: Report) -> list[str]:
    """A line for every difference of tokens, every format that was left out, and every row that disagrees."""
    engine = result["engine"]["name"]
    lines = [f"{name}: not written, {why}" for name, why in result["left_out"].items()]
    for row in judged(result):
        where = f"{row['format']}, temperature {row['temperature']:g}"
        for entry in row["differences"]:
            what = "a tie within rounding" if entry["tie"] else "no tie: the programs differ"
            lines.append(
                f"{where}, prompt {entry['prompt']}: token {entry['position']} differs; the target's two best logits"
                f" are {entry['margin']:.2g} apart there: {what}"
            )
        if row["acceptance_agrees"] is False:
            off = row["engine"]["tau"] / row["ours"]["tau"] - 1
            lines.append(f"{where}: the acceptance of {engine} is not ours (tau {off:+.1%})")
        if row["acceptance_agrees"] is None:
            lines.append(f"{where}: {engine} does not tell its acceptance, or no answer is identical: not compared")
    return lines


def write(path: str | os.PathLike, result: Report) -> None:
    """Writes the result as JSON."""
    write_atomic(path, json.dumps(result, indent=1) + "\n")


def _positions(found: dict[str, Any] | None) -> str:
    return "-" if found is None else " ".join(f"{share:.2f}" for share in found["by_position"])


def _device() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} threads"
