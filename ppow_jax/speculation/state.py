"""State that a generation carries from round to round.

Invariants of a row with n = length committed tokens x_0..x_{n-1}: the target's cache holds positions < n-1; the last
token is the *root* of the next window. The drafter's cache holds indices < n-1-pending; `features` hold the target's
features of the last `pending` indices (those the last verification accepted and, after rounds that drafted nothing,
those of the rounds before), which the next round that drafts writes first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.models import attention_backends, cache
from ppow_jax.models.attention_backends import BLOCK
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.speculation.adaptive import AcceptanceStats
from ppow_jax.speculation.sources import Sources

Array = jax.Array


class Prompts(NamedTuple):
    """Right-padded prompts of one token or more, their lengths, total lengths at which rows stop, PRNG keys of rows."""

    prompt_BxP: Array
    prompt_B: Array
    limit_B: Array
    key_B: Array


class State(flax.struct.PyTreeNode):
    """Complete state of a generation, in fixed shapes; every leaf starts with the batch axis, except stacked caches.

    tokens_BxL: prompt and output. prompt_B, length_B, limit_B: prompt length, committed tokens, and the length at
    which the row must stop. done_B: finished rows. key_B: one PRNG key per row, so that a row's output does not depend
    on its neighbours. healthy_B: True while the target's logits have been usable, see `usable`; a row stops where they
    are not. target_kv: per run of layers (`models.stack`). drafter_kv: per layer. features_BxK1xF, pending_B: see the
    module. histogram_BxK1: numbers of verifications that accepted k tokens. drafted_B: number of drafted tokens. stats:
    acceptance statistics, see `speculation.adaptive`. sources: those of n-gram lookup and mixtures. experts_B: distinct
    experts touched, summed over verifications; None for targets without experts. source_BxL: int8, who
    proposed each token, as in `sources.ORIGINS`; 0 for those that the target added itself, and for the prompt; None
    where nobody asks.
    """

    tokens_BxL: Array
    prompt_B: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    key_B: Array
    healthy_B: Array
    target_kv: tuple[KV | StackedKV, ...]
    drafter_kv: tuple[KV, ...] | None
    features_BxK1xF: Array | None
    pending_B: Array
    histogram_BxK1: Array
    drafted_B: Array
    stats: AcceptanceStats
    sources: Sources
    experts_B: Array | None = None
    source_BxL: Array | None = None

    @classmethod
    def begin(
        cls,
        tokens_BxL: Array,
        *,
        prompt_B: Array,
        limit_B: Array,
        key_B: Array,
        healthy_B: Array,
        target_kv: tuple[KV | StackedKV, ...],
        K: int,
        experts: bool,
    ) -> "State":
        """The state after prompts were read, before any new token: no drafter's cache, no features, zero counts.

        K: the most drafted tokens that a round can accept. experts: count the experts that are touched.
        """
        B = len(prompt_B)
        return cls(
            tokens_BxL=tokens_BxL,
            prompt_B=prompt_B,
            length_B=prompt_B,
            limit_B=limit_B,
            done_B=(prompt_B >= limit_B) | ~healthy_B,
            key_B=key_B,
            healthy_B=healthy_B,
            target_kv=target_kv,
            drafter_kv=None,
            features_BxK1xF=None,
            pending_B=jnp.ones(B, jnp.int32),
            histogram_BxK1=jnp.zeros((B, K + 1), jnp.int32),
            drafted_B=jnp.zeros(B, jnp.int32),
            stats=AcceptanceStats.start(B),
            sources=Sources.start(B),
            experts_B=jnp.zeros(B) if experts else None,
        )


def map_leaves(function: Callable[..., Array], *states: State) -> State:
    """Maps function(leaf, ...) over leaves of states of equal structure, batch axis first, stacked caches by layer."""

    def of(leaf: Array | StackedKV, *others: Any) -> Array | StackedKV:
        if not isinstance(leaf, StackedKV):
            return function(leaf, *others)
        return StackedKV(*(jax.vmap(function)(*arrays) for arrays in zip(leaf, *others, strict=True)))

    return jax.tree.map(of, *states, is_leaf=lambda x: isinstance(x, StackedKV))


def cache_length(longest_prompt: int, max_new_tokens: int, K: int) -> int:
    """Cache slots that a generation needs: prompt, output, and room for one window past the last token.

    With kernels of accelerators a multiple of their tiles: a TPU copies a cache of any other length in every call.
    """
    L = longest_prompt + max_new_tokens + K + 1
    return L if attention_backends.current() == attention_backends.PLAIN else -(-L // BLOCK) * BLOCK


def usable(logits: Array) -> Array:
    """True where logits [..., V] define a distribution: no NaN, and a finite maximum, which the argmax needs anyway."""
    return jnp.isfinite(logits.max(-1))


def row_keys(state: State, use: int, ahead: Array | int = 0) -> Array:
    """One key per row, for one use and the position `ahead` tokens after the row's next one."""
    place_B = state.length_B + ahead
    return jax.vmap(lambda k, n: jax.random.fold_in(jax.random.fold_in(k, n), use))(state.key_B, place_B)


def commit_tokens(state: State, token_BxS: Array, count_B: Array, config: ModelConfig) -> State:
    """Appends count_B tokens per row, cut at the first end token and at the row's limit; done rows stay unchanged."""
    S = token_BxS.shape[1]
    is_end_BxS = jnp.isin(token_BxS, jnp.asarray(config.eos_token_ids, jnp.int32))
    first_end_B = jnp.where(is_end_BxS.any(1), jnp.argmax(is_end_BxS, 1), S)
    count_B = jnp.minimum(jnp.minimum(count_B, first_end_B + 1), state.limit_B - state.length_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    length_B = state.length_B + count_B
    ended_B = (first_end_B < count_B) | (length_B >= state.limit_B)
    tokens_BxL = cache.write_rows(state.tokens_BxL, token_BxS, state.length_B)
    return state.replace(tokens_BxL=tokens_BxL, length_B=length_B, done_B=state.done_B | ended_B)
