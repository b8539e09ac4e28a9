"""Text of an answer's tokens, as a continuation of its prompt, and the texts and tokens that stop an answer."""

import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppow_jax.flags import require

_TAIL = 16  # minimum number of the prompt's tokens that are decoded with the answer
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of a vocabulary with byte fallback


class AnswerText:
    """Decodes answers to one prompt: the prompt's text and the answer's are the text of all tokens together.

    An answer decoded alone would lose the blank it begins with, if the tokenizer writes blanks into its tokens and
    drops the first (SentencePiece), and the end of a character that began in the prompt. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] | np.ndarray):
        self._tokenizer = tokenizer
        self._special = set(_special(tokenizer).values())
        prompt, start = np.asarray(prompt_ids).tolist(), 0
        for count in itertools.count():  # a tail of the prompt that has text, so that no blank is the first character
            start = max(0, len(prompt) - _TAIL * 2**count)
            while start and self._is_open(prompt[start]):
                start -= 1
            self._before = prompt[start:]
            self._head = self._decode(self._before)
            if not start or self._head.strip("\ufffd"):
                break

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the answer's tokens so far."""
        whole = self._decode([*self._before, *ids])
        return whole[len(os.path.commonprefix([self._head, whole])) :]

    def settled(self, ids: Sequence[int]) -> str:
        """The text that no later token can change: without incomplete characters.

        If bytes are tokens, an invalid byte changes the decoding of all bytes beside it, so they are held back until
        the next token.
        """
        count = len(ids)
        while count and self._is_open(ids[count - 1]):
            count -= 1
        return self.decode(ids[:count]).rstrip("\ufffd")

    def _is_open(self, i: int) -> bool:
        token = None if i in self._special else self._tokenizer.convert_ids_to_tokens(i)
        return token is None or _BYTE.fullmatch(token) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def split_stops(tokenizer: Any, stops: Sequence[str], name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Divides stop texts into (texts to search for, ids of special tokens, which have no text).

    name: of the prompt, for errors. Raises UserError for a stop text that contains a special token beside other text.
    """
    special = _special(tokenizer)
    for stop in stops:
        inside = max((text for text in special if text in stop and text != stop), key=len, default=None)
        rule = "contains a special token, which ends an answer but is not in its text; give that alone"
        require(stop in special or inside is None, f"{name}: stop={stop!r}: {rule}: {inside!r}")
    texts = tuple(stop for stop in stops if stop not in special)
    return texts, tuple(special[stop] for stop in stops if stop in special)


def _special(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that decoding skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content: i for i, token in added.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
