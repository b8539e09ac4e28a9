"""Pieces of an answer's text by who proposed them: the drafter, or the target itself."""

from collections.abc import Sequence

from ppow_jax.inference.requests import Answer

Piece = tuple[str, bool]  # text, and True if the drafter proposed it


class Pieces:
    """Divides the text of one growing answer. The pieces of all calls together are its settled text, see `Answer`."""

    def __init__(self) -> None:
        self.tokens = self.characters = 0

    def more(self, answer: Answer, own_T: Sequence[bool]) -> list[Piece]:
        """The pieces since the last call. own_T: for each new token of the answer, True if the target added it."""
        settled, pieces = answer.settled, []

        def add(end: int) -> None:
            if text := settled[self.characters : end]:
                pieces.append((text, not own_T[min(self.tokens, len(own_T) - 1)]))
                self.characters += len(text)

        while self.tokens < len(answer.ids):
            end = len(answer.decode(self.tokens + 1).rstrip("\ufffd"))
            if end > len(settled) and not answer.result:
                break  # a part of this token's text is held back
            add(end)
            self.tokens += 1
        add(len(settled))
        return pieces
