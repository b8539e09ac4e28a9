"""Answer packs: answers as compressed token ids in one file, to be reused by other runs.

A pack stores answers under a hash of the prompt's token ids, without the prompts themselves. It serves every run with
the same target, precision and answer length whose prompts are among them, whatever data they came from. Answers at
temperature 0 only: they are a function of the prompt.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.files import read_arrays, shipped, write_atomic

Answers = Mapping[bytes, np.ndarray]
HASH = 16  # bytes


def prompt_key(prompt: np.ndarray) -> bytes:
    """Hash of a prompt, int32 [T]: its key in a pack."""
    return hashlib.blake2b(np.ascontiguousarray(prompt, np.int32).tobytes(), digest_size=HASH).digest()


def write_pack(path: str | Path, examples: Iterable[Example], about: Mapping[str, Any]) -> int:
    """Writes the answers of `examples` (prompt, then answer), each prompt once -> the number of answers.

    about: everything besides the prompt that answers depend on, see `read_packs`.
    """
    found: dict[bytes, np.ndarray] = {}
    for example in examples:
        first = int(example.answer_mask.argmax())
        found[prompt_key(example.tokens[:first])] = example.tokens[first:]
    largest = max((int(answer.max()) for answer in found.values() if len(answer)), default=0)
    ids = np.uint16 if largest < 1 << 16 else np.uint32
    arrays: dict[str, Any] = {
        "keys": np.frombuffer(b"".join(found), np.uint8).reshape(-1, HASH),
        "lengths": np.array([len(answer) for answer in found.values()], np.int32),
        "tokens": np.concatenate([np.zeros(0, ids), *(answer.astype(ids) for answer in found.values())]),
        "about": np.frombuffer(json.dumps(dict(about), sort_keys=True).encode(), np.uint8),
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomic(path, packed.getvalue())
    return len(found)


def read_packs(paths: Sequence[str], about: Mapping[str, Any]) -> Answers:
    """The answers of all packs by `prompt_key`.

    Raises UserError for a file that is no pack, and for answers that were made under conditions other than `about`.
    """
    found: dict[bytes, np.ndarray] = {}
    for path in paths:
        given = f"--answers_from={path}"
        arrays = read_arrays(shipped(path), ("keys", "lengths", "tokens", "about"), f"{given}:", "answer pack")
        keys, lengths, tokens, theirs_json = arrays
        try:
            theirs, tokens = dict(json.loads(theirs_json.tobytes())), tokens.astype(np.int32)
        except (ValueError, TypeError) as error:
            raise UserError(f"{given}: is no answer pack ({error})") from None
        differ = (name for name, mine in about.items() if theirs.get(name) != mine)
        different = [f"{name} {theirs.get(name)!r} (now {about[name]!r})" for name in differ]
        if different:
            raise UserError(f"{given}: its answers were made with {', '.join(different)}")
        if lengths.sum() != len(tokens) or len(keys) != len(lengths):
            raise UserError(f"{given}: is damaged: {len(tokens)} tokens of {lengths.sum()}")
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        found |= {bytes(key): part for key, part in zip(keys, parts, strict=True)}
    return found
