"""Rounds of n-gram lookup and of its mixtures with a drafter, replayed on recorded greedy answers.

What the lookup finds is a function of the text before it, so it is looked up once at every anchor of the answers, by
the program that decoding uses. A round is then drafted from these matches, and from the drafter's candidates, by the
very functions of `speculation.mixture`, each answer as a batch of one row.

Shapes: A anchors, C candidates, N looked-up tokens or nodes, K1 tokens ahead.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.data.batches import Batches
from ppow_jax.evaluation.replay_tables import CandidateTable
from ppow_jax.speculation import mixture, ngram
from ppow_jax.speculation.adaptive import AcceptanceStats, CostTable
from ppow_jax.speculation.ngram import Match
from ppow_jax.speculation.propose import NONE
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.sources import Sources
from ppow_jax.speculation.tree import Candidates, TreeShape, depths_of, follow

Array = jax.Array
BLOCK = 64  # lookups that are computed at once


class LookupTable(NamedTuple):
    """Lookups from each anchor. matched_A, token_AxN: see `ngram.Match`. text_AxK1: the text's own tokens after the
    root, NONE after the end of the answer.
    """

    matched_A: Array
    token_AxN: Array
    text_AxK1: Array


class MixedTable(NamedTuple):
    """Both sources' drafts from each anchor."""

    lookup: LookupTable
    drafted: CandidateTable


def lookup_table(batches: Batches, N: int, ahead: int, store_S: np.ndarray | None = None) -> LookupTable:
    """Looks up to N tokens up at every anchor, answer by answer.

    ahead: tokens of the text to keep, K1. store_S: tokens of earlier texts, see `ngram.find`.
    """
    L, most = max(len(e.tokens) for e in batches.examples), max(map(len, batches.anchors))
    parts = []
    for example, anchors in zip(batches.examples, batches.anchors, strict=True):
        tokens_L, end = np.zeros(L, np.int32), len(example.tokens)
        tokens_L[:end] = example.tokens
        length_M = np.minimum(anchors[0] + 2 + np.arange(most), end)  # of the text up to the root
        match = jax.device_get(_find(tokens_L, length_M, store_S, N=N))
        index_MxK1 = length_M[:, None] + np.arange(ahead)
        text_MxK1 = np.where(index_MxK1 < end, tokens_L[np.minimum(index_MxK1, L - 1)], NONE)
        parts.append([x[: len(anchors)] for x in (*match, text_MxK1)])
    return LookupTable(*(jnp.asarray(np.concatenate(x)) for x in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames="N")
def _find(tokens_L: Array, length_M: Array, store_S: Array | None, *, N: int) -> Match:
    def alone(length: Array) -> Match:
        match = ngram.find(tokens_L[None], length[None], N, store_S)
        return jax.tree.map(lambda x: x[0], match)

    return jax.lax.map(alone, length_M, batch_size=BLOCK)


class Statistics(NamedTuple):
    """Statistics that decide what a round drafts, [N] each; see `speculation.state`."""

    stats: AcceptanceStats
    found: Sources


Counts = tuple[Array, Array, Array]  # of a round of each answer, [N] each: draft steps, verified drafts, accepted ones


def lookup_round(
    here: LookupTable | MixedTable, speculation: Speculation, known: Statistics, cost_table: CostTable
) -> tuple[Counts, Statistics]:
    """One round of every answer, each by itself -> its counts, and the statistics after it.

    here: the tables' rows of the answers' present anchors.
    """

    def alone(*row: Any) -> Any:
        here, known = jax.tree.map(lambda x: x[None], row)
        return jax.tree.map(lambda x: x[0], _round(here, speculation, known, cost_table))

    return jax.vmap(alone)(here, known)


def _round(
    here: LookupTable | MixedTable, speculation: Speculation, known: Statistics, cost_table: CostTable
) -> tuple[Counts, Statistics]:
    """One round of a batch whose rows are all unfinished."""
    stats, found = known
    lookup = here.lookup if isinstance(here, MixedTable) else here
    match = Match(lookup.matched_A, lookup.token_AxN[:, : speculation.lookup])
    text_BxK1, live_B = lookup.text_AxK1[:, : speculation.window + 1], jnp.ones(lookup.matched_A.shape, bool)
    if isinstance(here, MixedTable):
        draft = functools.partial(_levels, here.drafted, speculation.shape)
        drafts = mixture.mixed(draft, stats, found, speculation, cost_table, match, live_B)
    else:
        drafts = mixture.lookup(stats, found, speculation.adaptive, cost_table, match, live_B)
    own_BxN = jnp.take_along_axis(text_BxK1, jnp.maximum(depths_of(drafts.tree) - 1, 0), 1)
    path = follow(drafts.tree, drafts.tree.token_BxN == own_BxN, speculation.window)
    verified = text_BxK1, path.index_BxD1, path.accepted_B
    stats, found = mixture.settle(stats, found, drafts, *verified, cost_table, live_B)
    return (drafts.tree.steps_B, drafts.count_B, path.accepted_B), Statistics(stats, found)


def _levels(drafted: CandidateTable, shape: TreeShape, go_on: Callable[[int, Array], Array] | None) -> Candidates:
    """The candidates that `draft_candidates` would have drafted with go_on, of those of all levels."""
    going_B = jnp.ones(len(drafted.logp_AxC), bool)
    steps_B, best_BxX, logp = going_B.astype(jnp.int32) * 0, jnp.zeros((len(going_B), 1)), []
    for s in range(shape.depth):
        going_B &= go_on(s, best_BxX) if go_on else True
        steps_B += going_B
        level_BxC = drafted.logp_AxC[:, shape.candidates_of(s) : shape.candidates_of(s + 1)]
        logp.append(jnp.where(going_B[:, None], level_BxC, -jnp.inf))
        best_BxX = jax.lax.top_k(level_BxC, shape.branch)[0]
    C = shape.candidates
    return Candidates(jnp.concatenate(logp, 1), drafted.token_AxC[:, :C], drafted.parent_AxC[:, :C], steps_B)
