"""End tokens of an answer, for every kind of target; decoding, training answers and evaluation all use them.

Those of a directory are the union of config.json, generation_config.json and the tokenizer. Those of a GGUF file are
its ids of `eos`, `eot` and `eom`; if one of these keys is missing, tokens that are known by name for that use.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.weights import huggingface
from ppow_jax.weights.gguf_file import GgufFile

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
REMEDY_DIRECTORY = f"eos_token_id of {GENERATION_CONFIG}"
REMEDY_GGUF = "tokenizer.ggml.eot_token_id of the file"
_KNOWN = {  # texts of tokens, by the key of a GGUF file that holds such a token's id
    "eos": (
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|return|>", "[EOS]"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "eot": (
        *("<|eot_id|>", "<|eot|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<turn|>", "<EOT>"),
        *("<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<|endofturn|>", "[|endofturn|]", "[EOT]"),
    ),
    "eom": ("<|eom_id|>", "<|eom|>", "<|call|>"),
}
_CONTROL = 3  # token type of GGUF
_HARMONY = {"<|return|>", "<|call|>"}  # if these exist, <|end|> ends only a part of an answer
_SAID = "Zqxw"  # placeholder for an answer in a chat template


def of_gguf(file: GgufFile) -> tuple[int, ...]:
    """Ids of the tokens that end an answer. Raises UserError for ids outside the file's tokens."""
    tokens = file.array("tokenizer.ggml.tokens", str) or []
    types = file.array("tokenizer.ggml.token_type", int) or []
    ids = {use: file.token_id(use) for use in _KNOWN}
    part = {"<|end|>"} if set(tokens) >= _HARMONY else set()
    ends: list[int] = []
    for use, names in _KNOWN.items():
        known = set(names) - part
        if ids[use] is not None:
            known = {tokens[ids[use]]} if tokens else set()
            ends.append(ids[use])
        elif use == "eos":  # texts such as </s> may be ordinary tokens
            known = {text for text, kind in zip(tokens, types, strict=False) if text in known and kind == _CONTROL}
        ends += [i for i, text in enumerate(tokens) if text in known]
    return tuple(dict.fromkeys(ends))


def of_directory(directory: Path, vocab_size: int, config_ids: Iterable[int], tokenizer: Any = None) -> tuple[int, ...]:
    """Union of the ids in config.json (config_ids), generation_config.json and the tokenizer, each once.

    Ids beyond the vocabulary are left out, with a warning: the target cannot generate them.
    Raises UserError for a generation_config.json that is broken.
    """
    ends = dict.fromkeys(config_ids)
    named = {f"{directory / GENERATION_CONFIG}": generation_ids(directory)}
    if tokenizer is not None:
        named[f"the tokenizer of {directory}"] = tokenizer_ids(tokenizer)
    for place, ids in named.items():
        for i in ids:
            if i < vocab_size:
                ends[i] = None
            else:
                log.warning("%s: end token %d is outside the vocabulary of %d, and is ignored", place, i, vocab_size)
    return tuple(ends)


def generation_ids(directory: Path) -> list[int]:
    """The end tokens in generation_config.json; none without the file. Raises UserError if it is broken."""
    path = directory / GENERATION_CONFIG
    value = huggingface.read_json(path).get("eos_token_id") if path.exists() else None
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{path}: eos_token_id = {value!r} must be a token id, or a list of token ids")
    return ids


def tokenizer_ids(tokenizer: Any) -> list[int]:
    """The tokenizer's end tokens: of a text and, if defined, of a turn and of a message."""
    names = [getattr(tokenizer, f"{use}_token", None) for use in _KNOWN]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names if isinstance(name, str)]
    return [int(i) for i in ids if i is not None]


def warn_of_template(name: str, tokenizer: Any, ends: Iterable[int], remedy: str) -> None:
    """Warns if there is no end token, or if the chat template ends turns with none of them.

    remedy: where else an end token can be set, for the message.
    """
    ends = set(ends)
    if not ends:
        log.warning("%s defines no end token: its answers continue to max_new_tokens", name)
        return
    closing = _closing(tokenizer).strip()
    if closing and ends.isdisjoint(tokenizer(closing, add_special_tokens=False)["input_ids"]):
        known = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ends))
        log.warning(
            "the chat template of %s ends a turn with %r, which is not an end token (end tokens: %s);"
            " add its token to %s",
            name,
            closing,
            known,
            remedy,
        )


def _closing(tokenizer: Any) -> str:
    """Text that the chat template writes after an answer; empty without a template, or if it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SAID}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # template errors are reported where the template is used
        return ""
    return text.rpartition(_SAID)[2] if _SAID in text else ""
