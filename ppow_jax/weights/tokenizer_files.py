"""Tokenizer of a target's directory; every error in its files is reported in one line."""

import logging
from pathlib import Path
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.files import mistaken
from ppow_jax.weights.huggingface import read_json

log = logging.getLogger(__name__)
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them must exist
OTHERS = ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja")


def load_tokenizer(directory: Path, vocab_size: int) -> Any:
    """Reads the tokenizer that transformers finds in `directory`; no code from the directory is ever run.

    vocab_size: rows of the target's embedding; warns of tokens beyond them.

    Raises:
      UserError: for files that are missing, damaged, or not what their name says.
    """
    for name in JSON_FILES:
        if (directory / name).exists():
            check_json(directory / name)
    for name in OTHERS:
        other = mistaken(directory / name)
        if other:
            raise UserError(f"{directory / name}: {other}")
    if not any((directory / name).exists() for name in VOCABULARIES):
        raise UserError(f"{directory}: has no tokenizer: none of {', '.join(VOCABULARIES)}")
    tokenizer = _load(directory)
    if len(tokenizer) > vocab_size:
        first = tokenizer.convert_ids_to_tokens(range(vocab_size, min(vocab_size + 3, len(tokenizer))))
        log.warning(
            "%s: the tokenizer has %d tokens, the embedding %d rows: texts with other tokens, such as %s, are refused",
            directory, len(tokenizer), vocab_size, ", ".join(map(repr, first)),
        )  # fmt: skip
    return tokenizer


def check_json(path: Path) -> None:
    """Raises UserError unless a tokenizer file holds a JSON object without duplicate ids."""
    value = read_json(path)
    if path.name != "tokenizer.json":
        return
    model = value.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}: model = {model!r} must be an object")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values()):
        seen: dict[int, str] = {}
        for token, i in vocabulary.items():
            if i in seen:
                raise UserError(f"{path}: the tokens {seen[i]!r} and {token!r} have the same id {i}")
            seen[i] = token


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer("A text.")["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception, and its errors share no class
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {reason})") from None
    return tokenizer
