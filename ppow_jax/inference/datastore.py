"""Earlier answers, kept for n-gram lookups: what one answer says, a later one may say again.

A store is a buffer of tokens of bounded size, the latest last. Lookups search it as if it stood before the text of each
request (`speculation.ngram.find`): a longer match is preferred, and of those as long as each other one in the request's
own text. Output does not depend on it.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import files, sharding
from ppow_jax.errors import UserError
from ppow_jax.flags import require

TOKENS = 1 << 16  # size of a buffer
LEAD = 4  # tokens of the prompt that are kept before an answer, so that its beginning can be found
NAME = "tokens.npz"
EMPTY = -1  # equals no token


class Datastore:
    """The last `size` tokens of answers, in DIRECTORY/tokens.npz.

    vocab_size: of the target; a file with other tokens is refused. Raises UserError for a file that cannot be used, and
    for a directory that cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike, vocab_size: int, size: int = TOKENS):
        self._given, self.size = f"--datastore={directory}", size
        try:
            self.path = files.writable_directory(directory) / NAME
        except UserError as error:
            raise UserError(f"{self._given}: {error}") from None
        self.tokens = _read(self.path, self._given, vocab_size)[-size:]
        self._placed: jax.Array | None = None

    @property
    def array(self) -> jax.Array:
        """The buffer on the device [size]: EMPTY, then the tokens. Of the same shape whatever it holds."""
        if self._placed is None:
            padded_S = np.pad(self.tokens, (self.size - len(self.tokens), 0), constant_values=EMPTY)
            self._placed = sharding.place({"store_S": jnp.asarray(padded_S)})["store_S"]
        return self._placed

    def add(self, prompt_ids: Sequence[int] | np.ndarray, answer_ids: Sequence[int] | np.ndarray) -> None:
        """Appends an answer after the last LEAD tokens of its prompt; the oldest tokens are dropped.

        The same answer as the last one is not added again.
        """
        new = np.concatenate([np.asarray(ids, np.int32) for ids in (prompt_ids[-LEAD:], answer_ids)])
        if not np.array_equal(self.tokens[len(self.tokens) - len(new) :], new):
            self.tokens, self._placed = np.concatenate([self.tokens, new])[-self.size :], None

    def save(self) -> None:
        """Writes the file, as a whole."""
        packed = io.BytesIO()
        np.savez_compressed(packed, tokens=self.tokens)
        try:
            files.write_atomic(self.path, packed.getvalue())
        except OSError as error:
            raise UserError(f"{self._given}: cannot be written ({error.strerror})") from None


def _read(path: Path, given: str, vocab_size: int) -> np.ndarray:
    if not path.exists():
        return np.zeros(0, np.int32)
    (tokens,) = files.read_arrays(path, ["tokens"], f"{given}: {NAME}", "store of tokens")
    fits = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
    fits = fits and (not len(tokens) or (0 <= tokens.min() and tokens.max() < vocab_size))
    require(bool(fits), f"{given}: {NAME} must hold tokens of this target, 0 to {vocab_size - 1}")
    return tokens.astype(np.int32)
