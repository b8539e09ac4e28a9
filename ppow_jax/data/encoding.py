"""Encoding of messages as token ids, with a mask of the assistant's tokens.

The mask needs no `{% generation %}` marks in the chat template. The template renders the conversation up to
each assistant turn, with the generation prompt, and up to that turn's end; both texts must be prefixes of the
whole, and the tokens between them are the turn.
"""

import functools
import logging
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppow_jax.data.messages import Conversation, Message
from ppow_jax.data.records import whole_text
from ppow_jax.data.templates import CHATML_TEMPLATE, holds, is_plain, name_of, render
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

_PROBE = "\ue000"  # a start of an answer that occurs nowhere else


@dataclass(frozen=True, eq=False)
class Example:
    """tokens int32 [T]; answer_mask bool [T], True for the assistant's tokens, end-of-turn tokens included."""

    tokens: np.ndarray
    answer_mask: np.ndarray
    source: str


def encode_text(tokenizer: Any, text: str, source: str = "prompt") -> np.ndarray:
    """Token ids int32 [T] of a text that is to be continued as it is.

    The beginning-of-sequence token, if the tokenizer adds one, occurs once, even if the text contains it too; the
    tokenizer's end-of-sequence token is removed. Raises UserError, naming `source`, for anything but text.
    """
    tokens = _tokens(tokenizer, text, True, source)["input_ids"]
    return np.asarray(tokens[_doubled(tokenizer, tokens) : len(tokens) - _ended(tokenizer, text, tokens)], np.int32)


def encode_answer(tokenizer: Any, text: str, source: str = "answer") -> np.ndarray:
    """Token ids int32 [T] of a text that follows a prompt: nothing is added at its beginning or end."""
    return np.asarray(_tokens(tokenizer, text, False, source)["input_ids"], np.int32)


def encode_prompt(tokenizer: Any, messages: Sequence[Message], source: str = "prompt") -> np.ndarray:
    """Token ids int32 [T] of `messages` and the generation prompt: the target's input for an answer.

    For a tokenizer without a chat template it is plain text (with a warning, once).
    Raises UserError, naming `source`, when the template refuses the messages, or renders them as empty text.
    """
    text = render(tokenizer, messages, True, source)
    if is_plain(tokenizer):
        return encode_text(tokenizer, text, source)
    return np.asarray(_tokens(tokenizer, text, False, source)["input_ids"], np.int32)


def encode_conversation(
    tokenizer: Any, conversation: Conversation, max_length: int, strict: bool = False
) -> Example | None:
    """The conversation up to its last answer, at most its first `max_length` tokens.

    Returns None, or with `strict` raises UserError naming the source, when no answer token is left. Earlier
    answers that the template rewrites (some drop the reasoning) stay as context without mask. If a generation prompt
    begins the reasoning, as with `<think>`, and finished answers have none, the text after the turn's header is masked.
    Raises UserError when the last answer cannot be found.
    """
    messages = conversation.messages
    answers = [k for k, m in enumerate(messages) if m.role == "assistant"]
    if not answers:
        return _no_answer(conversation, "it has no assistant turn", strict)
    whole = render(tokenizer, messages[: answers[-1] + 1], False, conversation.source)
    spans = []
    for k in answers:
        span = _answer_span(tokenizer, conversation, k, whole)
        if span is not None:
            spans.append(span)
        elif k == answers[-1]:
            raise UserError(
                f"{conversation.source}: the chat template of {name_of(tokenizer)} does not render an answer "
                "as its generation prompt followed by more text, so the answer cannot be found"
            )
        else:
            _warn_rewritten(name_of(tokenizer))
    answer = messages[answers[-1]].content.rpartition("</think>")[2]
    if not holds(whole[slice(*spans[-1])], answer):
        raise UserError(f"{conversation.source}: the chat template of {name_of(tokenizer)} omits the answer")
    tokens, starts, ends = _tokenise(tokenizer, whole, conversation.source)
    mask = np.zeros(len(tokens), bool)
    for first, last in spans:
        begin = int(np.searchsorted(ends, first, "right"))
        begin += int(
            begin < len(starts) and starts[begin] < first
        )  # a token across the border does not belong to the answer
        end = int(np.searchsorted(starts, last, "left"))
        mask[begin : _end_of_turn(tokenizer, tokens, begin, end)] = True
    if not mask[:max_length].any():
        return _no_answer(
            conversation, f"its first {max_length} of {len(tokens)} tokens contain no answer", strict
        )
    return Example(tokens[:max_length], mask[:max_length], conversation.source)


def _answer_span(tokenizer: Any, conversation: Conversation, k: int, whole: str) -> tuple[int, int] | None:
    """The character range of answer k in `whole`; None if it cannot be determined."""
    before, source, thoughts = conversation.messages[:k], conversation.source, conversation.messages[k].reasoning
    prompt = render(tokenizer, before, True, source)
    is_last = all(m.role != "assistant" for m in conversation.messages[k + 1 :])
    turn = whole if is_last else render(tokenizer, conversation.messages[: k + 1], False, source)
    if not whole.startswith(turn):
        return None
    if thoughts and thoughts.strip() not in turn:
        _warn_reasoning(name_of(tokenizer))
    if whole.startswith(prompt):
        return (len(prompt), len(turn)) if len(turn) > len(prompt) else None
    # the generation prompt continues after the header of the assistant's turn, which all answers share
    context = render(tokenizer, before, False, source)
    other = render(tokenizer, (*before, Message("assistant", _PROBE)), False, source)
    header = len(os.path.commonprefix([prompt, other]))
    if not len(context) < header < len(turn) or not whole.startswith(prompt[:header]) or not prompt.startswith(context):
        return None
    if not re.match(rf"(?:\s|</?\w+>)*{_PROBE}", other[header:]):  # the headers differ
        return None
    _warn_header(name_of(tokenizer), prompt[header:].strip())
    return header, len(turn)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 259 ids with ChatML: bytes, <|endoftext|>, <|im_start|>, <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        name_or_path="tiny",
    )


def _tokenise(tokenizer: Any, text: str, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int32 [T] and the first and last character, int [T], of each."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {name_of(tokenizer)} reports no offsets: a fast tokenizer (tokenizer.json) is needed"
        )
    encoded = _tokens(tokenizer, text, is_plain(tokenizer), source, return_offsets_mapping=True)
    tokens = np.asarray(encoded["input_ids"], np.int32)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    first = _doubled(tokenizer, encoded["input_ids"]) if is_plain(tokenizer) else 0
    return tokens[first:], offsets[first:, 0], offsets[first:, 1]


def _tokens(tokenizer: Any, text: str, special: bool, source: str, **how: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False, **how)
    except (TypeError, ValueError) as error:
        reason = "it contains half of a surrogate pair" if whole_text(text) != text else error
        raise UserError(f"{source}: tokenizer {name_of(tokenizer)} cannot encode its text: {reason}") from None


def _doubled(tokenizer: Any, tokens: Sequence[int]) -> int:
    """1 if the text contains the beginning-of-sequence token that the tokenizer adds as well, else 0."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return int(begin is not None and len(tokens) > 1 and tokens[0] == tokens[1] == begin)


def _ended(tokenizer: Any, text: str, tokens: Sequence[int]) -> int:
    """1 if the tokenizer has added an end-of-sequence token, else 0."""
    end = getattr(tokenizer, "eos_token_id", None)
    return int(end is not None and len(tokens) > 0 and tokens[-1] == end and not text.endswith(tokenizer.eos_token))


def _end_of_turn(tokenizer: Any, tokens: np.ndarray, begin: int, end: int) -> int:
    """Index after the turn's last token, without the white space that templates write after the end-of-turn token."""
    special = np.flatnonzero(np.isin(tokens[begin:end], tokenizer.all_special_ids))
    if not len(special):
        return end
    last = begin + int(special[-1]) + 1
    return last if not tokenizer.decode(tokens[last:end].tolist()).strip() else end


def _no_answer(conversation: Conversation, why: str, strict: bool) -> Example | None:
    if strict:
        raise UserError(f"{conversation.source}: no trainable answer token: {why}")
    return None


@functools.cache
def _warn_header(name: str, more: str) -> None:
    log.warning(
        "the chat template of %s ends generation prompts with %r, which finished answers do not "
        "contain: they are trained without it",
        name,
        more,
    )


@functools.cache
def _warn_reasoning(name: str) -> None:
    log.warning("the chat template of %s omits the reasoning of recorded answers: the rest is trained", name)


@functools.cache
def _warn_rewritten(name: str) -> None:
    log.warning(
        "the chat template of %s rewrites earlier answers: only the last answer of a chat is trained", name
    )
