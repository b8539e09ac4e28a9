"""From messages to token ids and the mask of what the assistant wrote.

The mask needs no `{% generation %}` marks in the chat template. The template renders the conversation up to
each assistant turn, with the generation prompt, and up to that turn's end; both texts must be prefixes of the
whole, and the tokens between them are the turn.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ppow_jax.data.conversations import Conversation, Message
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = (  # for base models: texts and blank lines, an end-of-text token after each answer
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
)


@dataclass(frozen=True, eq=False)
class Example:
    """tokens int32 [T]; answer_mask bool [T], True where the assistant wrote it, its end of turn included."""

    tokens: np.ndarray
    answer_mask: np.ndarray
    source: str


def require_chat_template(tokenizer: Any) -> None:
    """Raises UserError unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"tokenizer {_name(tokenizer)} has no chat template: take the instruction-tuned model, or add "
            "chat_template.jinja to its directory"
        )


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> np.ndarray:
    """Token ids int32 [T] of `messages` and the generation prompt: what the target is given to answer.

    A tokenizer without chat template gets plain text (and a warning, once).
    Raises UserError when the template refuses the messages.
    """
    text = _render(tokenizer, messages, True, "prompt")
    return np.asarray(tokenizer(text, add_special_tokens=not _template(tokenizer)[1])["input_ids"], np.int32)


def encode_conversation(
    tokenizer: Any, conversation: Conversation, max_length: int, strict: bool = False
) -> Example | None:
    """The conversation up to its last answer, at most its first `max_length` tokens.

    Returns None, or with `strict` raises UserError naming the source, when no answer token is left. Earlier
    answers that the template rewrites (some drop the reasoning) stay as context without mask.
    Raises UserError when the last answer does not continue its own generation prompt.
    """
    messages = conversation.messages
    answers = [k for k, m in enumerate(messages) if m.role == "assistant"]
    if not answers:
        return _no_answer(conversation, "it has no assistant turn", strict)
    whole = _render(tokenizer, messages[: answers[-1] + 1], False, conversation.source)
    spans = []
    for k in answers:
        prompt = _render(tokenizer, messages[:k], True, conversation.source)
        turn = (
            _render(tokenizer, messages[: k + 1], False, conversation.source) if k != answers[-1] else whole
        )
        if whole.startswith(prompt) and whole.startswith(turn) and len(turn) > len(prompt):
            spans.append((len(prompt), len(turn)))
        elif k == answers[-1]:
            raise UserError(
                f"{conversation.source}: the chat template of {_name(tokenizer)} does not render an answer "
                "as its generation prompt followed by more text, so the answer cannot be found"
            )
        else:
            _warn_rewritten(_name(tokenizer))
    tokens, starts, ends = _tokenise(tokenizer, whole)
    mask = np.zeros(len(tokens), bool)
    for first, last in spans:
        begin = int(np.searchsorted(ends, first, "right"))
        begin += int(
            begin < len(starts) and starts[begin] < first
        )  # a token across the border is not the answer's
        end = int(np.searchsorted(starts, last, "left"))
        mask[begin : _end_of_turn(tokenizer, tokens, begin, end)] = True
    if not mask[:max_length].any():
        return _no_answer(
            conversation, f"its first {max_length} of {len(tokens)} tokens hold no answer", strict
        )
    return Example(tokens[:max_length], mask[:max_length], conversation.source)


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


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool, source: str) -> str:
    template, plain = _template(tokenizer)
    if plain:
        _warn_plain(_name(tokenizer))
    chat = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, ValueError) as error:
        raise UserError(f"{source}: the chat template of {_name(tokenizer)} refuses it: {error}") from None


def _template(tokenizer: Any) -> tuple[str | None, bool]:
    """(template to force, None for the tokenizer's own; whether it is the plain one)."""
    return (None, False) if getattr(tokenizer, "chat_template", None) else (PLAIN_TEMPLATE, True)


def _tokenise(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int32 [T] and the first and last character, int [T], of each."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {_name(tokenizer)} reports no offsets: a fast tokenizer (tokenizer.json) is needed"
        )
    encoded = tokenizer(
        text, add_special_tokens=_template(tokenizer)[1], return_offsets_mapping=True, verbose=False
    )
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], np.int32), offsets[:, 0], offsets[:, 1]


def _end_of_turn(tokenizer: Any, tokens: np.ndarray, begin: int, end: int) -> int:
    """Leaves out the white space that templates write after the end-of-turn token."""
    special = np.flatnonzero(np.isin(tokens[begin:end], tokenizer.all_special_ids))
    if not len(special):
        return end
    last = begin + int(special[-1]) + 1
    return last if not tokenizer.decode(tokens[last:end].tolist()).strip() else end


def _no_answer(conversation: Conversation, why: str, strict: bool) -> Example | None:
    if strict:
        raise UserError(f"{conversation.source}: no trainable answer token: {why}")
    return None


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


@functools.cache
def _warn_plain(name: str) -> None:
    log.warning("tokenizer %s has no chat template: conversations are written as plain text", name)


@functools.cache
def _warn_rewritten(name: str) -> None:
    log.warning(
        "the chat template of %s rewrites earlier answers: only the last answer of a chat is trained", name
    )
