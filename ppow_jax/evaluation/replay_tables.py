"""Drafts from every position of recorded greedy answers, and their agreement with the text.

At temperature 0 a round of speculative decoding is a function of the text before it. All rounds that decoding could
make are therefore drafted here at once, from every anchor of packed answers: chains with `propose`, trees with
`draft_candidates`, by the same programs as decoding. The tables that are kept are small, and sufficient to replay any
speculation mode (`evaluation.replay`).

Shapes: A anchors, K steps or levels, X branches, N nodes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.corpus.target_pass import score
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Anchors, Drafter
from ppow_jax.objectives import supervised
from ppow_jax.objectives.supervised import AnchorRows
from ppow_jax.speculation.propose import NONE, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.tree import Candidates, TreeShape, draft_candidates
from ppow_jax.speculation.verify import leading

Array = jax.Array
WINDOWS = 1024  # windows of one draft step that are computed at once
FAR = jnp.iinfo(jnp.int32).max  # rank of a node that was not drafted


@dataclasses.dataclass(frozen=True)
class Plan:
    """Drafting plan for each anchor: the widest of all modes that share it. Hashable: static in every program.

    depth: K. shape: of the tree; None for chains. whole: all candidates are kept, for mixtures with n-gram lookup.
    """

    depth: int
    shape: TreeShape | None = None
    whole: bool = False

    def holds(self, speculation: Speculation) -> bool:
        """True if `speculation` can be replayed from the drafts of this plan."""
        shape = speculation.shape
        if (self.shape is None) != (shape is None) or self.whole != (speculation.lookup > 0):
            return False
        if shape is None:
            return self.depth >= speculation.window
        if self.depth < shape.depth or self.shape.branch != shape.branch:
            return False
        return self.whole or self.shape.nodes >= shape.nodes


def plans_of(speculations: Sequence[Speculation]) -> tuple[Plan, ...]:
    """The fewest plans that cover the speculation modes: one for all chains, one for all trees of a branch, one for all
    mixtures of a branch; none for n-gram lookup, which needs no drafter.
    """
    found: dict[tuple[int, bool], Plan] = {}
    for speculation in speculations:
        shape, whole = speculation.shape, speculation.lookup > 0
        if not speculation.needs_drafter:
            continue
        key = shape.branch if shape else 0, whole
        depth, nodes = (shape.depth, shape.nodes) if shape else (speculation.window, 0)
        if key in found:
            depth, old = max(depth, found[key].depth), found[key].shape
            nodes = max(nodes, old.nodes if old else 0)
        found[key] = Plan(depth, TreeShape(shape.branch, depth, nodes) if shape else None, whole)
    return tuple(found.values())


class ChainTable(NamedTuple):
    """Chains from each anchor. accepted_A: leading drafts that equal the text. logp_AxK: log-probability of the chain
    up to each draft.
    """

    accepted_A: Array
    logp_AxK: Array


class TreeTable(NamedTuple):
    """Trees from each anchor, for each number of drafted levels 1..K.

    frontier_AxKxX: log-probabilities of the nodes that the next level would expand. best_AxKxN, level_AxKxN:
    log-probabilities of the best nodes, descending, -inf where there are fewer, and their levels from 1. rank_AxKxK:
    the rank among the best, from 0, of the text's own node at level 1..K (the last axis); FAR where it was not drafted.
    """

    frontier_AxKxX: Array
    best_AxKxN: Array
    level_AxKxN: Array
    rank_AxKxK: Array


class CandidateTable(NamedTuple):
    """All candidates of the trees from each anchor, see `speculation.tree.Candidates`."""

    logp_AxC: Array
    token_AxC: Array
    parent_AxC: Array


Table = ChainTable | TreeTable | CandidateTable


def text_ahead(windows: AnchorRows, K: int) -> Array:
    """[B, M, K]: the tokens that an anchor's window should draft; NONE after the end of the answer."""
    T = windows.tokens_BxT.shape[1]
    wanted = []
    for s in range(K):
        token_BxM = jnp.take_along_axis(windows.tokens_BxT, jnp.minimum(windows.anchor_BxM + 2 + s, T - 1), 1)
        wanted.append(jnp.where(supervised.in_answer(windows, s), token_BxM, NONE))
    return jnp.stack(wanted, -1)


def tree_table(candidates: Candidates, wanted_AxK: Array, shape: TreeShape) -> TreeTable:
    """Builds a `TreeTable`. wanted_AxK: the text's tokens, NONE after its end."""
    logp_AxC, token_AxC, parent_AxC, _ = candidates
    ends = [shape.candidates_of(level) for level in range(shape.depth + 1)]
    levels = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]

    parent_A, alive_A = jnp.zeros(wanted_AxK.shape[0], jnp.int32), jnp.ones(wanted_AxK.shape[0], bool)
    ranks = []
    for j, here in enumerate(levels):  # down the text's own path
        own_AxC = (token_AxC[:, here] == wanted_AxK[:, j, None]) & (parent_AxC[:, here] == parent_A[:, None])
        alive_A &= own_AxC.any(-1)
        index_A = here.start + jnp.argmax(own_AxC, -1)
        own_A = jnp.take_along_axis(logp_AxC, index_A[:, None], 1)
        before_AxC = jnp.arange(ends[-1]) < index_A[:, None]
        better_AxC = (logp_AxC > own_A) | ((logp_AxC == own_A) & before_AxC)  # ties go to the first, as in `top_k`
        rank_AxK = jnp.cumsum(jnp.stack([better_AxC[:, level].sum(-1) for level in levels], -1), -1)
        drafted_AxK = alive_A[:, None] & (jnp.arange(shape.depth) >= j)
        ranks.append(jnp.where(drafted_AxK, rank_AxK, FAR))
        parent_A = 1 + index_A

    level_C = jnp.concatenate([jnp.full(here.stop - here.start, n + 1) for n, here in enumerate(levels)])
    best, level, frontier = [], [], []
    for here in levels:
        most = min(shape.nodes, here.stop)
        best_AxN, chosen_AxN = jax.lax.top_k(logp_AxC[:, : here.stop], most)
        room = (0, 0), (0, shape.nodes - most)
        best.append(jnp.pad(best_AxN, room, constant_values=-jnp.inf))
        level.append(jnp.pad(level_C[chosen_AxN], room))
        frontier.append(jax.lax.top_k(logp_AxC[:, here], shape.branch)[0])
    return TreeTable(jnp.stack(frontier, 1), jnp.stack(best, 1), jnp.stack(level, 1), jnp.stack(ranks, -1))


def _table(drafter: Drafter, embed_VxD: Array, plan: Plan, anchors: Anchors, root_BxM: Array, wanted: Array) -> Table:
    """Table of one block of anchors, A = B M."""
    B, M, K = wanted.shape
    anchored = drafter, embed_VxD, anchors.g_BxMxE, root_BxM, anchors.position_BxM, anchors.keys
    wanted_AxK = wanted.reshape(B * M, K)
    if plan.shape and plan.whole:
        return CandidateTable(*draft_candidates(*anchored, plan.shape)[:3])
    if plan.shape:
        return tree_table(draft_candidates(*anchored, plan.shape), wanted_AxK, plan.shape)
    unused_B = jax.random.split(jax.random.key(0), B)  # nothing is drawn at temperature 0
    draft = propose(*anchored, K, Sampling(), unused_B)
    match_AxK = draft.token_BxMxK.reshape(B * M, K) == wanted_AxK
    return ChainTable(leading(match_AxK), jnp.cumsum(draft.logp_BxMxK, -1).reshape(B * M, K))


@functools.partial(jax.jit, static_argnames=("config", "plans"))
def read_batch(
    drafter: Drafter,
    target_params: dict,
    batch: PackedBatch,
    cached: tuple[Array, Array] | None = None,
    *,
    config: ModelConfig,
    plans: tuple[Plan, ...],
) -> tuple[Table, ...]:
    """One table per plan, its anchors those of the batch [B, M, ...]; see `score` for `cached`.

    Drafts from anchors in blocks of about WINDOWS windows, so that memory does not grow with their number.
    """
    layers, embed_VxD = drafter.config.feature_layers, target_params["embed"]
    windows = score(target_params, config, layers, drafter.target_ids_W, batch, True, cached).windows
    g_BxTxE, kv = supervised.prefix(drafter, embed_VxD, windows)
    return tuple(_read_plan(drafter, embed_VxD, windows, g_BxTxE, kv, plan) for plan in plans)


def _read_plan(drafter: Drafter, embed_VxD: Array, windows: AnchorRows, g_BxTxE: Array, kv, plan: Plan) -> Table:
    B, M = windows.anchor_BxM.shape
    blocks = -(-B * M * (plan.shape.branch if plan.shape else 1) // WINDOWS)
    size = -(-M // min(blocks, M))
    blocks = -(-M // size)  # number of blocks that hold all anchors

    def in_blocks(x_BxM: Array) -> Array:
        """[blocks, B, size, ...]."""
        room = ((0, 0), (0, blocks * size - M)) + ((0, 0),) * (x_BxM.ndim - 2)
        return jnp.moveaxis(jnp.pad(x_BxM, room).reshape(B, blocks, size, *x_BxM.shape[2:]), 1, 0)

    def read(block) -> Table:
        anchor_BxM, _, wanted_BxMxK = block
        anchors = supervised.anchors_at(windows, g_BxTxE, kv, anchor_BxM)
        root_BxM = jnp.take_along_axis(windows.tokens_BxT, anchor_BxM + 1, 1)
        return _table(drafter, embed_VxD, plan, anchors, root_BxM, wanted_BxMxK)

    def read_used(block) -> Table:
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read, block))
        return jax.lax.cond(block[1].any(), read, lambda _: blank, block)

    given = windows.anchor_BxM, windows.anchor_mask_BxM, text_ahead(windows, plan.depth)
    table = jax.lax.map(read_used, tuple(map(in_blocks, given)))

    def by_anchor(x: Array) -> Array:
        """[blocks, B size, ...] -> [B, M, ...]."""
        x = jnp.moveaxis(x.reshape(blocks, B, size, *x.shape[2:]), 0, 1)
        return x.reshape(B, blocks * size, *x.shape[3:])[:, :M]

    return jax.tree.map(by_anchor, table)
