"""Drafters whose vocab_size differs from their target's only by padding rows of an embedding."""

import dataclasses
import logging
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.weights.drafters import StoredDrafter

log = logging.getLogger(__name__)


def fit_vocabulary(stored: StoredDrafter, target_vocab_size: int, tokenizer: Any, where: str) -> StoredDrafter:
    """The drafter with the target's vocab_size, if the two differ by padding only.

    This is the case if each holds all tokens of the tokenizer. Any other drafter is returned unchanged. The drafter's
    own embedding is truncated, or padded with rows of zeros, for tokens that occur in no text.

    Raises:
      UserError: if the draft vocabulary holds padding that the target does not have.
    """
    V, size = stored.config.vocab_size, target_vocab_size
    known = None if tokenizer is None else len(tokenizer)
    if V == size or known is None or known > min(V, size):
        return stored
    highest = int(stored.target_ids_W[-1])
    if highest >= size:
        raise UserError(
            f"{where}: only padding differs between its vocabulary of {V} tokens and the target's {size} (the tokenizer"
            f" has {known}), but it drafts ids up to {highest}; leave those out of its lm_head, d2t and t2d"
        )
    log.info("%s: a vocabulary of %d tokens, of which the target has %d: only padding differs", where, V, size)
    embed = stored.embed_VxE
    if embed is not None:
        rows = np.zeros((max(0, size - V), embed.shape[1]), embed.dtype)
        embed = np.concatenate([embed[:size], rows])
    return stored._replace(config=dataclasses.replace(stored.config, vocab_size=size), embed_VxE=embed)
