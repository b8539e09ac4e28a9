"""The engine: prompts become arrays, arrays the state of a generation, and the state is decoded round by round.

Decoding for measurements, for `Model`, for traces and for training answers all run through a `Generation`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.models import platforms
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.speculation import generate
from ppow_jax.speculation.generate import Prompts, State, Verification
from ppow_jax.speculation.propose import Draft
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, off
from ppow_jax.speculation.sources import Drafts
from ppow_jax.speculation.tree import Tree

TO_THE_END = 1 << 30  # rounds: no limit
FEWEST = 512  # shortest length bucket on accelerators
SHORTEST = 256  # minimum prompt length, in slots, that caches are sized for: each length compiles a program


def bucket(length: int) -> int:
    """Length bucket that holds `length`, to compile few shapes: the least of 64, 128, 192, 256, 384, 512, 768, ...

    On accelerators, where padding costs little and a program of a large target takes minutes to compile, it is the
    least of 512, 1024, 2048, ...: one program reads all prompts of up to 512 tokens, three all of up to 2048.
    """
    if few_lengths():
        return max(FEWEST, 1 << (length - 1).bit_length())
    step = max(64, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step


def few_lengths() -> bool:
    """True on accelerators: programs are compiled for few lengths, with more padding."""
    return not platforms.on_cpu()


def padded(length: int) -> int:
    """The least multiple of 64 that holds `length`: finer than `bucket`, for many prompts that are sorted by length."""
    return -(-length // 64) * 64


def cache_length(prompt_length: int, max_new_tokens: int, K: int) -> int:
    """L, the slots of both caches for prompts of this length. One per length bucket: each is compiled once."""
    return generate.cache_length(max(bucket(prompt_length), SHORTEST), max_new_tokens, K)


def cache_length_within(limit: int, P: int, positions: int, K: int) -> int:
    """L for rows of at most `limit` tokens (prompts are padded to P) of a target that has that many positions."""
    return generate.cache_length(max(P, min(bucket(limit), positions + 1)), 0, K)


def pack(ids: Sequence[np.ndarray], limits: Sequence[int], key_B: jax.Array, P: int) -> Prompts:
    """Prompts, token ids [T] each, as rows of P tokens; rows without a prompt are done from the start.

    limits: per prompt, the total length at which it stops. key_B: one key per row, which gives the number of rows.
    """
    B = len(key_B)
    prompt_BxP = np.zeros((B, P), np.int32)
    prompt_B, limit_B = np.ones(B, np.int32), np.ones(B, np.int32)
    for b, (prompt, limit) in enumerate(zip(ids, limits, strict=True)):
        prompt_BxP[b, : len(prompt)] = prompt
        prompt_B[b], limit_B[b] = len(prompt), limit
    return sharding.place(Prompts(jnp.asarray(prompt_BxP), jnp.asarray(prompt_B), jnp.asarray(limit_B), key_B))


def keys_of(key: jax.Array, numbers: Sequence[int], B: int) -> jax.Array:
    """key_B: `key` folded with each row's number, 0 for rows without one."""
    number_B = np.zeros(B, np.int32)
    number_B[: len(numbers)] = numbers
    return jax.vmap(jax.random.fold_in, (None, 0))(key, number_B)


@dataclasses.dataclass
class Generation:
    """Prompts that are decoded together: models, settings, and the state so far.

    drafter: None decodes plainly, or by n-gram lookup. cost_table: cost table of an adaptive window, see
    `costs.measure_cost_table`. store_S: earlier texts for lookups, see `datastore`.
    """

    params: dict
    config: ModelConfig
    drafter: Drafter | None
    speculation: Speculation
    sampling: Sampling
    cost_table: Any
    state: State
    store_S: jax.Array | None = None

    @classmethod
    def begin(
        cls,
        params: dict,
        config: ModelConfig,
        drafter: Drafter | None,
        prompts: Prompts,
        speculation: Speculation,
        sampling: Sampling,
        L: int,
        cost_table: Any = None,
        store_S: jax.Array | None = None,
    ) -> Self:
        """Prefills the prompts, with caches of L slots; the first new token of each is committed."""
        speculation = speculation if drafter or not speculation.needs_drafter else off()
        drafter = drafter if speculation.needs_drafter else None
        state = generate.prefill(params, config, drafter, *prompts, K=speculation.window, sampling=sampling, L=L)
        cost_table = cost_table if speculation.adaptive else None
        store_S = store_S if speculation.lookup else None
        return cls(params, config, drafter, speculation, sampling, cost_table, state, store_S)

    def decode(self, rounds: int = TO_THE_END) -> None:
        """Decodes until every row is done, or for at most `rounds` rounds, as one program."""
        settings = {"speculation": self.speculation, "sampling": self.sampling, "cost_table": self.cost_table}
        given = self.params, self.config, self.drafter, self.state, rounds
        self.state = generate.decode(*given, **settings, store_S=self.store_S)

    def draft(self) -> Draft | Tree | Drafts | None:
        """Runs the first half of a round as a program of its own: drafts, unless decoding is plain."""
        if not self.speculation.window:
            return None
        settings = {"speculation": self.speculation, "sampling": self.sampling, "cost_table": self.cost_table}
        kv, small = self.state.drafter_kv, self.state.replace(target_kv=(), drafter_kv=None)
        kv, small, draft = draft_round(self.params, self.drafter, kv, small, **settings, store_S=self.store_S)
        self.state = small.replace(target_kv=self.state.target_kv, drafter_kv=kv)
        return draft

    def verify(self, draft: Draft | Tree | Drafts | None, width: int | None = None) -> Verification:
        """Runs the second half: verifies, and commits tokens. width: see `generate.verify_window`."""
        settings = {
            "speculation": self.speculation,
            "sampling": self.sampling,
            "cost_table": self.cost_table,
            "width": width,
        }
        kv, small = self.state.target_kv, self.state.replace(target_kv=(), drafter_kv=None)
        kv, small, result = verify_round(self.params, self.config, self.drafter, kv, small, draft, **settings)
        self.state = small.replace(target_kv=kv, drafter_kv=self.state.drafter_kv)
        return result


@functools.partial(jax.jit, static_argnames=("speculation",), donate_argnames=("kv",))
def draft_round(
    params: dict,
    drafter: Drafter | None,
    kv: tuple[KV, ...] | None,
    state: State,
    *,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: Any = None,
    store_S: jax.Array | None = None,
) -> tuple[tuple[KV, ...] | None, State, Draft | Tree | Drafts]:
    """Drafts the windows of a round -> (the drafter's cache, the state without caches, the draft).

    kv: the drafter's cache, kept apart from the state: it is donated, and updated in place.
    """
    whole = state.replace(drafter_kv=kv)
    out, draft = generate.draft_window(params, drafter, whole, speculation, sampling, cost_table, store_S)
    return sharding.constrain(out.drafter_kv), out.replace(drafter_kv=None), draft


@functools.partial(jax.jit, static_argnames=("config", "speculation", "width"), donate_argnames=("kv",))
def verify_round(
    params: dict,
    config: ModelConfig,
    drafter: Drafter | None,
    kv: tuple[KV | StackedKV, ...],
    state: State,
    draft: Draft | Tree | Drafts | None,
    *,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: Any = None,
    width: int | None = None,
) -> tuple[tuple[KV | StackedKV, ...], State, Verification]:
    """Verifies the windows of a round -> (the target's cache, the state without caches, the result without them).

    kv: the target's cache, kept apart from the state: it is donated, and updated in place.
    """
    state = state.replace(target_kv=kv)
    out, result = generate.verify_window(
        params, config, drafter, state, draft, speculation, sampling, cost_table, width
    )
    result = result._replace(kv=(), features_BxK1xF=None)  # the state holds what is needed of them
    return sharding.constrain(out.target_kv), out.replace(target_kv=()), result
