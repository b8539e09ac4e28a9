"""Pieces of an answer's text by who proposed them: the drafter, an n-gram lookup, or the target itself."""

from collections.abc import Sequence

from ppow_jax.inference.requests import Answer
from ppow_jax.speculation.sources import ORIGINS

Piece = tuple[str, str]  # text, and who proposed it: one of `ORIGINS`


class Pieces:
    """Divides the text of one growing answer. The pieces of all calls together are its settled text, see `Answer`."""

    def __init__(self) -> None:
        self.tokens = self.characters = 0

    def more(self, answer: Answer, source_T: Sequence[int]) -> list[Piece]:
        """The pieces since the last call. source_T: of each new token of the answer, see `State.source_BxL`."""
        settled, pieces = answer.settled, []

        def add(end: int) -> None:
            if text := settled[self.characters : end]:
                pieces.append((text, ORIGINS[source_T[min(self.tokens, len(source_T) - 1)]]))
                self.characters += len(text)

        while self.tokens < len(answer.ids):
            end = len(answer.decode(self.tokens + 1).rstrip("\ufffd"))
            if end > len(settled) and not answer.result:
                break  # a part of this token's text is held back
            add(end)
            self.tokens += 1
        add(len(settled))
        return pieces
