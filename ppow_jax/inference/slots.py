"""Slots: a running generation of fixed shape, in which the rows of finished requests are given to new ones.

    state = blank(params, config, drafter, B, L, K=K)
    fresh = read(params, config, drafter, prompt_ids, prompt_length + max_new_tokens, seed, sampling, K=K, P=P, L=L)
    state = insert(state, fresh, row)  # the other rows are in the middle of their answers
    state = generate.decode(params, config, drafter, state, rounds, speculation=speculation, sampling=sampling)
    state = release(state, finished_B)

All functions are pure; `insert`, `release` and `clear` donate the state that they are given. A free row is done from
the start, and holds one token, so that it costs little. A row's tokens depend on its own prompt, settings and seed only
(see `State.key_B`), not on the rows beside it, nor on when it was inserted.

The shapes, and so the programs, are few: prompts are padded to `prompt_buckets`, and the caches have one of
`cache_tokens` lengths, between which `resize` moves a running state.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.inference import batch
from ppow_jax.models import cache, stack
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV
from ppow_jax.speculation import generate
from ppow_jax.speculation.prefill import WHOLE
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.state import State, map_leaves

Array = jax.Array
FIRST, FACTOR = 512, 4  # tokens of the shortest caches, and the ratio of one length to the next


def cache_tokens(context: int) -> tuple[int, ...]:
    """Numbers of tokens that caches are made for, ascending; the last is `context`, the most of any request."""
    lengths: list[int] = []
    while FIRST * FACTOR ** len(lengths) < context:
        lengths.append(FIRST * FACTOR ** len(lengths))
    return (*lengths, context)


def prompt_buckets(context: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to, ascending. Those beyond `WHOLE` are read in pieces, as many as they have."""
    lengths = range(1, min(context, WHOLE) + 1)
    short = {min(batch.bucket(length), context) for length in lengths}
    return (*sorted(short), *(tokens for tokens in cache_tokens(context) if tokens > WHOLE))


def least(sizes: Sequence[int], needed: int) -> int:
    """The least of ascending sizes that holds `needed`; the last where none does."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def read(
    params: dict,
    config: ModelConfig,
    drafter: Drafter | None,
    prompt_ids: np.ndarray,
    limit: int,
    seed: int,
    sampling: Sampling,
    *,
    K: int,
    P: int,
    L: int,
) -> State:
    """Reads one prompt, token ids [T], into a state of one row, whose first new token is drawn.

    limit: number of tokens, of prompt and answer, at which the row stops. sampling: of this row, all three settings
    given as [1]. P: length that the prompt is padded to. L: cache slots, at least P + 1.
    """
    rows = batch.pack([prompt_ids], [limit], jax.vmap(jax.random.key)(jnp.asarray([seed], jnp.int32)), P)
    return generate.prefill(params, config, drafter, *rows, K=K, sampling=sampling, L=L)


def blank(params: dict, config: ModelConfig, drafter: Drafter | None, B: int, L: int, *, K: int) -> State:
    """A state of B free rows with L cache slots, for windows of K drafted tokens."""

    def one_row(key_1) -> State:
        row_1, prompt_1x1 = jnp.ones(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)
        sampling = Sampling()
        return generate.prefill(
            params, config, drafter, prompt_1x1, row_1, row_1, key_1, K=K, sampling=sampling, L=L
        ).replace(key_B=None)

    row = jax.eval_shape(one_row, jax.random.split(jax.random.key(0), 1))
    return free(row.replace(source_BxL=jax.ShapeDtypeStruct((1, L), jnp.int8)), B)


def free(rows: State, B: int) -> State:
    """A state of B free rows, like `rows`, whose shapes alone are used."""

    def as_many(x: Array) -> Array:
        return jnp.zeros((B, *x.shape[1:]), x.dtype)

    shapes = jax.eval_shape(functools.partial(map_leaves, as_many), rows.replace(key_B=None))

    def make(key) -> State:
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return _emptied(state.replace(key_B=jax.random.split(key, B)), jnp.ones(B, bool))

    return sharding.born(make, jax.random.key(0))


def _emptied(state: State, free_B: Array) -> State:
    """Makes rows free: done, with a prompt of one token and no answer."""
    one_B = jnp.ones_like(state.length_B)
    names = "prompt_B", "length_B", "limit_B", "pending_B"
    counts = {name: jnp.where(free_B, one_B, getattr(state, name)) for name in names}
    return state.replace(done_B=state.done_B | free_B, healthy_B=state.healthy_B | free_B, **counts)


@functools.partial(jax.jit, donate_argnames=("state",))
def release(state: State, free_B: Array) -> State:
    """Frees rows, finished or not. free_B: True for these rows."""
    return sharding.constrain(_emptied(state, free_B))


@functools.partial(jax.jit, donate_argnames=("state",))
def clear(state: State, free_B: Array) -> State:
    """Like `release`, for rows whose values may be NaN: an attention weight of 0 would not hide these in a cache."""

    def zeros(x: Array) -> Array:
        return jnp.where(free_B.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x)

    emptied = map_leaves(zeros, state.replace(key_B=None)).replace(key_B=state.key_B)
    return sharding.constrain(_emptied(emptied, free_B))


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(state: State, fresh: State, rows: Array | int) -> State:
    """Writes rows that `read` or a prefill made into a running state, which has as many cache slots, or more.

    rows: where, one index or [R]; fresh rows whose index is past the end are left out.
    """
    rows_R = jnp.atleast_1d(rows)

    def written(old: Array, new: Array) -> Array:
        return old.at[(rows_R, *map(slice, new.shape[1:]))].set(new.astype(old.dtype), mode="drop")

    if state.source_BxL is not None:
        fresh = fresh.replace(source_BxL=jnp.zeros(fresh.tokens_BxL.shape, jnp.int8))
    return sharding.constrain(map_leaves(written, state, fresh))


@functools.partial(jax.jit, static_argnames=("L",))
def resize(state: State, L: int) -> State:
    """The same state with L cache slots, which must hold every row: all its tokens and a window after them."""

    def fitted(kv: KV) -> KV:
        return cache.grow(KV(kv.k_BxKvxdxL[..., :L], kv.v_BxKvxLxd[:, :, :L]), L, kv.v_BxKvxLxd.dtype)

    def tokens(x_BxL: Array) -> Array:
        return jnp.pad(x_BxL[:, :L], ((0, 0), (0, max(0, L - x_BxL.shape[1]))))

    drafter_kv = state.drafter_kv if state.drafter_kv is None else tuple(map(fitted, state.drafter_kv))
    resized = state.replace(
        tokens_BxL=tokens(state.tokens_BxL),
        source_BxL=tokens(state.source_BxL),
        target_kv=stack.each_layer(fitted, state.target_kv),
        drafter_kv=drafter_kv,
    )
    return sharding.constrain(resized)
