"""Text of an answer's tokens, as it stands behind its prompt, and the texts and tokens that stop an answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppow_jax.config import require

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_TAIL = 16  # tokens of the prompt that are decoded with the answer, at least


class AnswerText:
    """Decodes answers to one prompt: the prompt's text and the answer's are the text of all tokens together.

    An answer decoded alone would lose the blank it begins with, where the tokenizer writes blanks into its tokens and
    drops the first (SentencePiece), and the end of a character that the prompt begins. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] | np.ndarray):
        self._tokenizer = tokenizer
        prompt, count = np.asarray(prompt_ids).tolist(), _TAIL
        while True:  # a tail of the prompt that has text, so that no blank is the first character
            self._before = prompt[-count:]
            self._head = self._decode(self._before).rstrip(_UNFINISHED)
            if self._head or count >= len(prompt):
                break
            count *= 2

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the answer's tokens so far."""
        text = self._decode([*self._before, *ids])
        return text[len(self._head) :] if text.startswith(self._head) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        def decode(some):
            return self._tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        text = decode(ids)
        if text.endswith(_UNFINISHED):  # byte tokens: an unfinished character can spoil the whole ones before it
            for held in range(1, min(4, len(ids) + 1)):
                shorter = decode(ids[: len(ids) - held])
                if not shorter.endswith(_UNFINISHED):
                    return text if text.startswith(shorter) else shorter + _UNFINISHED
        return text


def split_stops(tokenizer: Any, stops: Sequence[str], name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Divides stop texts into (those looked for in the text, ids of special tokens, which no text shows).

    name: of the prompt, for errors. Raises UserError for a text with a special token and more in it.
    """
    special = _special(tokenizer)
    for stop in stops:
        inside = max((text for text in special if text in stop and text != stop), key=len, default=None)
        rule = "contains a special token, which ends an answer but is not in its text; give that alone"
        require(stop in special or inside is None, f"{name}: stop={stop!r}: {rule}: {inside!r}")
    texts = tuple(stop for stop in stops if stop not in special)
    return texts, tuple(special[stop] for stop in stops if stop in special)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt that is no chat, with a BOS token where the tokenizer puts one, but never with two."""
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = own[:1] == [tokenizer.bos_token_id]
    return own if begins else tokenizer(text)["input_ids"]


def _special(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that decoding skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content: i for i, token in added.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
