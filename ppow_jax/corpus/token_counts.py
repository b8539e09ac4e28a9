"""How often each token occurs in texts and stored answers: what a draft vocabulary is chosen by."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppow_jax.corpus.answer_pack import read_packs
from ppow_jax.data.conversations import load_conversations
from ppow_jax.data.encoding import encode_text


def count_tokens(tokenizer: Any, vocab_size: int, data: str, answers_from: Sequence[str], target: str) -> np.ndarray:
    """Occurrences [V] of each token in all messages of `data` and in the answers of packs (`corpus.answer_pack`).

    data: as --data of training, may be empty. Raises UserError for data or packs that cannot be read, and for answers
    of another target.
    """
    count_V = np.zeros(vocab_size, np.int64)
    for conversation in load_conversations(data) if data else ():
        for message in conversation.messages:
            if message.content:
                ids = encode_text(tokenizer, message.content, conversation.source)
                count_V += np.bincount(ids, minlength=vocab_size)[:vocab_size]
    for answer in read_packs(answers_from, {"target": target}).values():
        count_V += np.bincount(answer, minlength=vocab_size)[:vocab_size]
    return count_V
