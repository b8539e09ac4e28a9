"""Tokenizer and chat template of a GGUF file, without torch (which transformers' own reader needs)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ppow_jax.errors import UserError
from ppow_jax.weights import ends, gguf_sentencepiece
from ppow_jax.weights.gguf_file import GgufFile, open_model
from ppow_jax.weights.gguf_pretokenizers import rule_of

log = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_TEXT_BYTES = (9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))  # bytes of most texts in UTF-8
_KEY = "tokenizer.ggml."
_MARK = "\U0010fffd"  # suffix, with the id, of a token's name if another token has the same text; removed by decoding
_CLEAN = decoders.Replace(Regex(_MARK + "[0-9]+"), "")
_BEGIN = ("<s>", "<|begin_of_text|>", "<bos>")  # BOS if bos_token_id is missing


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Builds a transformers tokenizer, chat template included, from a GGUF file. See `read_tokenizer`."""
    return read_tokenizer(open_model(path))


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Builds a transformers tokenizer from the metadata of a GGUF file: byte-level BPE or SentencePiece.

    Control tokens, and those that end an answer, are special tokens; user-defined ones are matched as a whole in a
      text.
    Two tokens may have the same text: it is encoded as the first of them, or as the special one, and both decode to it.

    Raises UserError for another kind of tokenizer, for an unknown pre-tokenizer, and for broken metadata.
    """
    model = file.text(f"{_KEY}model")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path}: tokenizer.ggml.model = {model!r} is not supported (supported: 'gpt2', which is byte-level "
            "BPE, and 'llama', which is SentencePiece); take the original model's directory as the target"
        )
    tokens, types = _tokens(file)
    special = [i for i, kind in enumerate(types) if kind == _CONTROL]
    special = sorted({*special, *ends.of_gguf(file)})
    whole = {i for i, kind in enumerate(types) if kind == _USER_DEFINED}.union(special)
    names = _different(file, tokens, whole)
    clean = [_CLEAN] if names != tokens else []
    begin, unknown = _begin(file, tokens, types), file.token_id("unknown")
    try:
        if model == "llama":
            adds_begin, tokenizer = True, gguf_sentencepiece.build(file, names, types, unknown, clean)
        else:
            adds_begin, tokenizer = _byte_level(file, names, clean)
    except UserError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"{file.path}: its tokens and merges do not fit ({str(error).splitlines()[0]})") from None
    added = [AddedToken(names[i], special=i in special, normalized=False) for i in sorted(whole)]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    _add_begin(file, tokenizer, adds_begin, begin, names)
    end = file.token_id("eos")
    end = next(iter(ends.of_gguf(file)), None) if end is None else end
    ids = {"bos": begin, "eos": end, "unk": unknown, "pad": file.token_id("padding")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{use}_token": None if i is None else names[i] for use, i in ids.items()},
        chat_template=file.text("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """(texts, types)."""
    tokens, types = file.array(f"{_KEY}tokens", str), file.array(f"{_KEY}token_type", int)
    for key, value in {"tokens": tokens, "token_type": types}.items():
        if not value:
            raise UserError(f"{file.path}: tokenizer.ggml.{key} is missing or empty")
    if len(types) != len(tokens):
        raise UserError(f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    return tokens, types


def _byte_level(file: GgufFile, names: list[str], clean: list) -> tuple[bool, Tokenizer]:
    """(True if texts get a BOS token by default, the tokenizer without added tokens)."""
    merges = file.array(f"{_KEY}merges", str)
    if merges is None:
        raise UserError(f"{file.path}: tokenizer.ggml.merges is missing")
    rule = rule_of(file, names)
    vocabulary = {name: i for i, name in enumerate(names)}
    letters = bytes_to_unicode()
    missing = [f"0x{byte:02X}" for byte in _TEXT_BYTES if letters[byte] not in vocabulary]
    if missing:
        some = ", ".join(missing[:5])
        told = "%s: %d bytes have no token, characters that contain them are lost: %s"
        log.warning(told, file.path, len(missing), some)
    pairs = [_pair(file, merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.build()
    tokenizer.decoder = decoders.Sequence([*clean, decoders.ByteLevel()]) if clean else decoders.ByteLevel()
    return rule.begin, tokenizer


def _pair(file: GgufFile, merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a part may begin with a blank
    if cut < 0:
        raise UserError(f"{file.path}: tokenizer.ggml.merges: {merge!r} must be two tokens with a blank between them")
    return merge[:cut], merge[cut + 1 :]


def _different(file: GgufFile, tokens: Sequence[str], first: set[int]) -> list[str]:
    """Unique names of tokens: the text, with a mark if an earlier token or one in `first` has the same text."""
    names, seen = list(tokens), set()
    for i in sorted(range(len(tokens)), key=lambda i: (i not in first, i)):
        if not tokens[i] or tokens[i] in seen:
            names[i] = f"{tokens[i]}{_MARK}{i}"
        seen.add(tokens[i])
    again = [repr(tokens[i]) for i in range(len(tokens)) if names[i] != tokens[i]]
    if again:
        some = ", ".join(again[:5])
        log.warning("%s: %d tokens have the same text as another, or no text: %s", file.path, len(again), some)
    return names


def _begin(file: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> int | None:
    """The id of the BOS token."""
    begin = file.token_id("bos")
    known = (i for i, text in enumerate(tokens) if text in _BEGIN and types[i] == _CONTROL)
    return begin if begin is not None or f"{_KEY}bos_token_id" in file else next(known, None)


def _add_begin(file: GgufFile, tokenizer: Any, default: bool, begin: int | None, names: Sequence[str]) -> None:
    """Makes texts begin with the BOS token, if the file or the default of its kind of tokenizer says so."""
    key = f"{_KEY}add_bos_token"
    if file.flag(f"{_KEY}add_eos_token", False):
        log.warning("%s: tokenizer.ggml.add_eos_token is ignored: no answer could follow it", file.path)
    if not file.flag(key, default):
        return
    if begin is None:
        if key in file:
            log.warning("%s: %s is true, but no BOS token is defined: none is added", file.path, key)
        return
    token = {"id": "BOS", "ids": [begin], "tokens": [names[begin]]}
    tokenizer.post_processor = processors.TemplateProcessing(single="BOS $A", pair="BOS $A $B", special_tokens=[token])
