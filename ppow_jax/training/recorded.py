"""Recorded conversations as examples, and checks of a run's texts that are possible before any answer is generated."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ppow_jax.corpus.answers import Question
from ppow_jax.data.batches import find_anchors
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import Example, encode_conversation
from ppow_jax.errors import UserError
from ppow_jax.training.settings import TrainSettings

log = logging.getLogger(__name__)


def read_recorded(settings: TrainSettings, tokenizer: Any) -> list[Example]:
    """The conversations of --recorded, cut to fit a row.

    Those without an answer in that part, and those that the chat template refuses, are left out and counted in the log.
    Raises UserError if none remains.
    """
    conversations = load_conversations(settings.recorded, settings.num_recorded or None)
    examples: list[Example] = []
    refused: list[str] = []
    for conversation in conversations:
        try:
            examples.append(encode_conversation(tokenizer, conversation, settings.row_length, strict=True))
        except UserError as error:
            refused.append(str(error))
    if not examples:
        given = f"--recorded={settings.recorded}"
        raise UserError(f"{given}: none of {len(refused)} conversations can be trained; the first: {refused[0]}")
    if refused:
        log.warning("--recorded: %d conversations left out, the first: %s", len(refused), refused[0])
    return examples


def check_parts(settings: TrainSettings, parts: Mapping[str, Sequence[Question | Example]], found: str) -> None:
    """Raises UserError where a part of the texts, by name, is empty, or has no room for two tokens of an answer.

    found: number of texts, in words.
    """
    if missing := [name for name, texts in parts.items() if not texts]:
        rule = f"{found}, of which each goes to one part as a whole"
        raise UserError(f"--data={settings.data}: leaves nothing for {' and '.join(missing)}; {rule}")
    for name, texts in parts.items():
        if not any(_room(text, settings.row_length) for text in texts):
            shortest = min(len(text.prompt if isinstance(text, Question) else text.tokens) for text in texts)
            raise UserError(
                f"--row_length={settings.row_length}: none of the {len(texts)} texts of {name} leaves room for an"
                f" answer; the shortest has {shortest} tokens"
            )


def _room(text: Question | Example, row_length: int) -> bool:
    if isinstance(text, Question):
        return len(text.prompt) + 2 <= row_length
    return len(find_anchors(text.answer_mask[:row_length])) > 0
