"""Check for token ids without an embedding in the target, before anything is computed with them.

JAX clamps an index beyond the end to the last row, so such a token would silently be read as another one.
"""

from typing import Any

import numpy as np

from ppow_jax.errors import UserError


def require_known(ids: Any, vocab_size: int, place: str, tokenizer: Any = None) -> None:
    """Raises UserError, which names `place`, id and size, unless all ids are of 0..vocab_size-1.

    tokenizer: used to show the text of the token, or None.
    """
    ids = np.asarray(ids)
    beyond = ids[(ids < 0) | (ids >= vocab_size)]
    if not len(beyond):
        return
    token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(int(beyond[0]))
    named = "" if token is None else f" ({token!r})"
    raise UserError(
        f"{place}: token id {beyond[0]}{named} is outside the target's embedding of {vocab_size} rows: the tokenizer"
        " has more tokens than the weights; remove this text, or use the tokenizer that belongs to the weights"
    )
