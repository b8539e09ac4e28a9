"""The target's distribution at single tokens, streamed over the vocabulary: `log_distribution` without its [..., V].

The reward scores thousands of drafted windows at once, for which whole distributions would not fit into memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import inner, rows_of
from ppow_jax.models.vocabulary import survey

Array = jax.Array


class TokenScores(NamedTuple):
    """The target's argmax in place of each token, and the token's log-probability: at temperature 1, and at the
    temperature of acceptance (that of 1 where this is 0, since greedy acceptance only compares with the argmax).
    """

    argmax: Array
    logp: Array
    logp_at_temperature: Array


def token_logits(hidden: Array, head_VxD: Array, token: Array) -> Array:
    """Logits [...] of one token each. hidden: the states [..., D] that precede them."""
    return inner(hidden.astype(head_VxD.dtype).astype(jnp.float32), rows_of(head_VxD, token))


def score_tokens(hidden: Array, head_VxD: Array, token: Array, temperature: float) -> TokenScores:
    """Scores tokens [...] by the target, whose final states before them are hidden [..., D]."""
    flat, shape = hidden.reshape(-1, hidden.shape[-1]), token.shape
    surveyed = survey(flat, head_VxD)
    z = token_logits(flat, head_VxD, token.reshape(-1))
    logp = (z - surveyed.logsumexp_N).reshape(shape)
    tempered = logp
    if temperature not in (0.0, 1.0):
        tempered = (z / temperature - survey(flat, head_VxD, temperature).logsumexp_N).reshape(shape)
    return TokenScores(surveyed.argmax_N.reshape(shape), logp, tempered)
