"""Drafting without weights: the tokens that followed an earlier occurrence of the last tokens (n-gram lookup).

The drafted tokens are a function of the text so far, and are verified as a tree of one branch (`speculation.tree`): a
token is kept if the target draws it at its position, so that the output is that of plain decoding, at any temperature.

The probability that a drafted token is accepted is estimated from the number of tokens that match before it, which
includes the drafted tokens before it. Each row counts how often such tokens were right. A continuation can be compared
with the tokens that a round commits whether or not it was verified, so the counts need no trials.

Source: prompt lookup decoding (Saxena, 2023) and LLMA (Yang et al., 2304.04487) copy from the prompt in the same way.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Acceptance rates of tokens that follow a match of 1, 2, ..., 12 or more tokens: the rates that a row starts with.
# Measured on 700 greedy answers of SmolLM2-135M.
START_RATES = (0.23, 0.55, 0.67, 0.73, 0.75, 0.8, 0.82, 0.85, 0.87, 0.88, 0.9, 0.96)
LONGEST = len(START_RATES)  # tokens: longer matches are not told apart
WEIGHT = 4.0  # tokens: weight of a start rate against counted tokens
MEMORY = 0.95  # decay of a count per counted token


class Match(NamedTuple):
    """The continuation [N tokens] of the last tokens' most recent longest earlier occurrence in each row.

    matched_B: tokens that match, 0 (nothing is drafted) to LONGEST. token_BxN: target ids.
    """

    matched_B: Array
    token_BxN: Array


def find(tokens_BxL: Array, length_B: Array, N: int, store_S: Array | None = None) -> Match:
    """Looks the last tokens of each row up in the row itself: the longest match, of these the most recent.

    Only the first length_B (at least 1) tokens are read. A continuation that reaches their end goes on from its own
    start, as the text would if it repeated itself.

    store_S: tokens of earlier texts, searched as if they stood before each row; -1 where there are none, before all
    others. So of matches as long as each other, the row's own ones come first.
    """
    if store_S is not None:
        before_BxS = jnp.broadcast_to(store_S, (len(tokens_BxL), len(store_S))).astype(tokens_BxL.dtype)
        tokens_BxL, length_B = jnp.concatenate([before_BxS, tokens_BxL], 1), length_B + len(store_S)
    L = tokens_BxL.shape[1]
    end_B = length_B - 1  # index of the last token
    earlier_BxL = jnp.arange(L) < end_B[:, None]
    run_BxL, matched_BxL = earlier_BxL, jnp.zeros(tokens_BxL.shape, jnp.int32)
    for back in range(min(LONGEST, L)):
        token_Bx1 = jnp.take_along_axis(tokens_BxL, jnp.maximum(end_B - back, 0)[:, None], 1)
        same_BxL = jnp.pad(tokens_BxL[:, : L - back] == token_Bx1, ((0, 0), (back, 0)))
        run_BxL &= same_BxL
        matched_BxL += run_BxL
    best_B = jnp.max(matched_BxL * L + jnp.where(earlier_BxL, jnp.arange(L), 0), axis=1)
    matched_B, last_B = best_B // L, best_B % L
    period_B = jnp.maximum(end_B - last_B, 1)
    index_BxN = last_B[:, None] + 1 + jnp.arange(N) % period_B[:, None]
    token_BxN = jnp.take_along_axis(tokens_BxL, jnp.minimum(index_BxN, end_B[:, None]), 1)
    return Match(matched_B, token_BxN)


class Counts(flax.struct.PyTreeNode):
    """Counts of tokens after a match of 1..LONGEST tokens, and of those that were right: decayed sums per row.

    right_BxM: tokens that the target drew. judged_BxM: tokens that were compared.
    """

    right_BxM: Array
    judged_BxM: Array

    @classmethod
    def start(cls, B: int) -> "Counts":
        """WEIGHT tokens at the start rates."""
        judged_BxM = jnp.full((B, LONGEST), WEIGHT)
        return cls(judged_BxM * jnp.array(START_RATES), judged_BxM)

    @property
    def rate_BxM(self) -> Array:
        """Acceptance rate after a match of 1..LONGEST tokens, given that all tokens before were accepted."""
        return self.right_BxM / self.judged_BxM


def _class_of(match: Match) -> Array:
    """[B, N]: matching tokens before each drafted token, minus one: the index of its count."""
    before_BxN = match.matched_B[:, None] + jnp.arange(match.token_BxN.shape[1])
    return jnp.clip(before_BxN, 1, LONGEST) - 1


def log_chances(counts: Counts, match: Match) -> Array:
    """[B, N]: log-probabilities that at least the first 1..N drafted tokens are accepted; -inf without a match."""
    rate_BxN = jnp.take_along_axis(counts.rate_BxM, _class_of(match), 1)
    return jnp.where(match.matched_B[:, None] > 0, jnp.cumsum(jnp.log(rate_BxN), 1), -jnp.inf)


def right(match: Match, token_BxK1: Array, accepted_B: Array) -> Array:
    """[B]: drafted tokens that a round would have accepted, as far as the tokens that it committed tell.

    token_BxK1: accepted tokens, then the target's own, then padding; 0 tokens are right where nothing matched.
    """
    return _right(match, token_BxK1, accepted_B).sum(1)


def _right(match: Match, token_BxK1: Array, accepted_B: Array) -> Array:
    """[B, N]: drafted tokens that are right, as are all before them."""
    N, K1 = match.token_BxN.shape[1], token_BxK1.shape[1]
    committed_BxN = jnp.pad(token_BxK1, ((0, 0), (0, max(N - K1, 0))))[:, :N]
    same_BxN = (match.token_BxN == committed_BxN) & (jnp.arange(N) <= accepted_B[:, None])
    return jnp.cumprod(same_BxN & (match.matched_B > 0)[:, None], 1, dtype=jnp.int32)


def count(counts: Counts, match: Match, token_BxK1: Array, accepted_B: Array, live_B: Array) -> Counts:
    """Compares the drafted tokens with those that a round committed, whether or not they were verified.

    live_B: rows that count; the other arguments are those of `right`.
    """
    N = match.token_BxN.shape[1]
    right_BxN = _right(match, token_BxK1, accepted_B)
    judged_BxN = jnp.pad(right_BxN[:, : N - 1], ((0, 0), (1, 0)), constant_values=1)
    judged_BxN *= (jnp.arange(N) <= accepted_B[:, None]) & (live_B & (match.matched_B > 0))[:, None]
    of_class_BxNxM = jax.nn.one_hot(_class_of(match), LONGEST)
    judged_BxM = (judged_BxN[..., None] * of_class_BxNxM).sum(1)
    right_BxM = ((judged_BxN * right_BxN)[..., None] * of_class_BxNxM).sum(1)
    decay_BxM = jnp.power(np.float32(MEMORY), judged_BxM)
    return Counts(decay_BxM * counts.right_BxM + right_BxM, decay_BxM * counts.judged_BxM + judged_BxM)
