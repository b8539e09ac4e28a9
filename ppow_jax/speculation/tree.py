"""Draft trees: many continuations of one prefix, verified in one pass (EAGLE-2, 2406.16858; EAGLE-3, 2503.01840).

A tree is a deterministic function of its prefix. That makes lossless acceptance simple at any temperature: the target
draws one token at each node, and the path continues as long as the token drawn at a node is one of its children. A
token is drawn with the random numbers of its position in the text, so the result does not depend on the tree.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.flags import require
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter, Layers, Prefix
from ppow_jax.models.layers import KV
from ppow_jax.models.vocabulary import top_k

Array = jax.Array
ABSENT = -1  # parent of an empty slot


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Sizes of a tree. Hashable: static in every program.

    branch: nodes of a level that are expanded, and children drafted for each (EAGLE's top_k). depth: levels, that is
    draft steps and the most tokens that one round can accept. nodes: nodes verified beside the root, the drafted nodes
    with the highest path probability under the drafter (EAGLE's total_tokens - 1).
    Raises UserError where depth, branch and nodes are inconsistent.
    """

    branch: int
    depth: int
    nodes: int

    def __post_init__(self) -> None:
        require(self.branch >= 1, f"--tree_branch={self.branch}: must be at least 1")
        require(self.depth >= 1, f"--tree_depth={self.depth}: must be at least 1")
        most = self.candidates
        require(1 <= self.nodes <= most, f"--tree_nodes={self.nodes}: must be 1 to {most}, all that are drafted")

    @property
    def candidates(self) -> int:
        """Number of drafted nodes."""
        return self.candidates_of(self.depth)

    def candidates_of(self, levels: int) -> int:
        """Number of nodes drafted in the first `levels` levels."""
        return self.branch + (levels - 1) * self.branch**2 if levels else 0


def most_nodes(branch: int, depth: int, nodes: int) -> int:
    """`nodes`, or as many as a tree of these sizes drafts, if these are fewer."""
    return min(nodes, TreeShape(branch, depth, 1).candidates)


class Tree(NamedTuple):
    """N nodes below the root of each row, parents first. Window index 0 is the root, index n + 1 is node n.

    A row may have fewer nodes: the slots behind them are empty, attend to no node, and are never accepted.

    token_BxN: target ids. parent_BxN: window index, ABSENT in empty slots. depth_BxN1: 0 for the root.
    seen_BxN1xN1: each index's ancestors and itself. logp_BxN: the drafter's log-probability of the path to the node.
    steps_B: number of drafted levels.
    """

    token_BxN: Array
    parent_BxN: Array
    depth_BxN1: Array
    seen_BxN1xN1: Array
    logp_BxN: Array
    steps_B: Array

    @property
    def count_B(self) -> Array:
        """Number of nodes in each row."""
        return (self.parent_BxN != ABSENT).sum(-1)

    def cut(self, nodes: int) -> "Tree":
        """Keeps only the first `nodes` slots."""
        return Tree(
            self.token_BxN[:, :nodes],
            self.parent_BxN[:, :nodes],
            self.depth_BxN1[:, : nodes + 1],
            self.seen_BxN1xN1[:, : nodes + 1, : nodes + 1],
            self.logp_BxN[:, :nodes],
            self.steps_B,
        )


class Path(NamedTuple):
    """accepted_B: nodes on the accepted path. index_BxD1: window indices of root and path, the last one repeated."""

    accepted_B: Array
    index_BxD1: Array


class Candidates(NamedTuple):
    """All C drafted nodes of each of B trees, level by level, see `TreeShape.candidates_of`.

    logp_BxC: the drafter's log-probability of the path to the node; -inf where its level was not drafted.
    token_BxC: target ids. parent_BxC: index among the candidates, from 1; 0 is the root. steps_B: number of drafted
    levels.
    """

    logp_BxC: Array
    token_BxC: Array
    parent_BxC: Array
    steps_B: Array


def propose_tree(
    drafter: Drafter,
    embed_VxD: Array,
    g_Bx1xE: Array,
    root_Bx1: Array,
    position_Bx1: Array,
    prefix: Sequence[Prefix],
    shape: TreeShape,
    go_on: Callable[[int, Array], Array] | None = None,
    keep: Callable[[Array], Array] | None = None,
) -> Tree:
    """Drafts a tree below `root`: each level expands the best `branch` nodes of the one before.

    g_Bx1xE: the anchor's fused target features; position_Bx1: the anchor's index; prefix: see `propose`.
    A child is never more probable than its parent, so the best nodes form a connected tree.

    go_on: (levels drafted 0..depth-1, logp_BxX of the nodes that the next level would expand) -> mask of rows that
    draft one more; a row that stopped never continues. Levels that no row drafts are skipped. keep: logp_BxN of the
    best nodes, descending, -inf in empty slots -> number of nodes that each row keeps. By default all are kept.
    """
    anchored = g_Bx1xE, root_Bx1, position_Bx1, prefix
    drafted = draft_candidates(drafter, embed_VxD, *anchored, shape, go_on)
    chosen_BxN = choose(drafted.logp_BxC, shape.nodes, keep)
    return assemble(chosen_BxN, drafted.logp_BxC, drafted.token_BxC, drafted.parent_BxC, drafted.steps_B, shape.depth)


def draft_candidates(
    drafter: Drafter,
    embed_VxD: Array,
    g_BxRxE: Array,
    root_BxR: Array,
    position_BxR: Array,
    prefix: Sequence[Prefix],
    shape: TreeShape,
    go_on: Callable[[int, Array], Array] | None = None,
) -> Candidates:
    """Drafts the candidate nodes of the trees below R roots per row: B * R trees, row by row.

    The arguments are those of `propose_tree`, with R anchors per row (mask_BxRxL in the prefix).
    """
    (B, R), X = root_BxR.shape, shape.branch
    beams = position_BxR, prefix  # shared by all nodes of a root
    if R > 1:
        beams = jnp.repeat(position_BxR, X, 1), [Prefix(kv, jnp.repeat(mask, X, 1)) for kv, mask in prefix]

    def by_tree(x: Array) -> Array:  # [B, R M, ...] -> [B R, M, ...]
        return x.reshape(B * R, -1, *x.shape[2:])

    def by_row(x: Array) -> Array:  # inverse of `by_tree`
        return x.reshape(B, -1, *x.shape[2:])

    def levels(
        s: int, g_BxMxE: Array, token_BxM: Array, chain: tuple[Layers, ...], logp_TxM: Array, index_TxM: Array,
        going_T: Array,
    ) -> list[tuple[Array, ...]]:
        """(logp, token, parent, going) of levels s, s+1, .., depth-1: [T, M X] for its candidates, and [T, 1].

        M counts the expanded nodes: those of all trees of a row, or those of each of the T = B R trees. logp_TxM,
        index_TxM: log-probabilities and indices of these nodes; the index counts all candidates, from 1.
        """
        position_BxM, keys = beams if s else (position_BxR, prefix)
        embed_BxMxE = drafter.embed(embed_VxD, token_BxM)
        out, chain = drafting.step(drafter, g_BxMxE, embed_BxMxE, position_BxM + s, keys, chain, first=s == 0)
        logits_BxMxW = sharding.whole_logits(drafting.logits(drafter, out))
        top_BxMxX, id_BxMxX = top_k(logits_BxMxW, X)
        top_BxMxX -= jax.nn.logsumexp(logits_BxMxW, -1, keepdims=True)
        logp_TxC = (logp_TxM[..., None] + by_tree(top_BxMxX)).reshape(B * R, -1)
        if go_on is not None:
            logp_TxC = jnp.where(going_T[:, None], logp_TxC, -jnp.inf)
        token_TxC = drafter.target_ids_W[id_BxMxX].reshape(B * R, -1)
        mine = logp_TxC, token_TxC, jnp.repeat(index_TxM, X, axis=1), going_T[:, None]
        if s + 1 == shape.depth:
            return [mine]
        logp_TxM, chosen_TxM = jax.lax.top_k(logp_TxC, X)
        index_TxM = 1 + shape.candidates_of(s) + chosen_TxM
        beam_TxM = chosen_TxM // X
        g_BxMxE = by_row(_beams(by_tree(drafting.feed(drafter, out)), beam_TxM))
        chain = jax.tree.map(lambda x: by_row(_beams(by_tree(x), beam_TxM)), chain)
        token_BxM = by_row(jnp.take_along_axis(token_TxC, chosen_TxM, 1))
        return [mine, *further(s + 1, g_BxMxE, token_BxM, chain, logp_TxM, index_TxM, going_T)]

    def further(
        s: int, g_BxMxE: Array, token_BxM: Array, chain: tuple[Layers, ...], logp_TxM: Array, index_TxM: Array,
        going_T: Array,
    ) -> list[tuple[Array, ...]]:
        nodes = s, g_BxMxE, token_BxM, chain, logp_TxM, index_TxM
        if go_on is None:
            return levels(*nodes, going_T)
        going_T &= go_on(s, logp_TxM)
        return jax.lax.cond(going_T.any(), lambda: levels(*nodes, going_T), lambda: nothing[s:])

    def blank(C: int) -> tuple[Array, ...]:
        token_TxC, parent_TxC = jnp.zeros((B * R, C), drafter.target_ids_W.dtype), jnp.zeros((B * R, C), jnp.int32)
        return jnp.full((B * R, C), -jnp.inf), token_TxC, parent_TxC, jnp.zeros((B * R, 1), bool)

    nothing = [blank(C) for C in (X, *[X**2] * (shape.depth - 1))]
    roots = jnp.zeros((B * R, 1)), jnp.zeros((B * R, 1), jnp.int32)
    drafted = further(0, g_BxRxE, root_BxR, (), *roots, jnp.ones(B * R, bool))
    logp, token, parent, going = (jnp.concatenate(x, 1) for x in zip(*drafted, strict=True))
    return Candidates(logp, token, parent, going.sum(-1))


def _beams(x_BxMxX: Array, beam_BxM: Array) -> Array:
    index = beam_BxM.reshape(*beam_BxM.shape, *[1] * (x_BxMxX.ndim - 2))
    return jnp.take_along_axis(x_BxMxX, index, 1)


def choose(logp_BxC: Array, nodes: int, keep: Callable[[Array], Array] | None) -> Array:
    """Indices [B, nodes] of the best candidates, as they were drafted (parents first), then C in empty slots.

    keep: see `propose_tree`.
    """
    C = logp_BxC.shape[1]
    best_BxN, chosen_BxN = jax.lax.top_k(logp_BxC, nodes)  # ties go to the first: a parent before its child
    if keep is not None:
        kept_BxN = (jnp.arange(nodes) < keep(best_BxN)[:, None]) & (best_BxN > -jnp.inf)
        chosen_BxN = jnp.where(kept_BxN, chosen_BxN, C)
    return jnp.sort(chosen_BxN, axis=1)


def assemble(
    chosen_BxN: Array, logp_BxC: Array, token_BxC: Array, parent_BxC: Array, steps_B: Array, depth: int
) -> Tree:
    """The tree of chosen candidates, of at most `depth` levels; chosen_BxN: see `choose`, the others: `Candidates`."""
    (B, C), nodes = logp_BxC.shape, chosen_BxN.shape[1]
    absent_BxN = chosen_BxN == C
    row_Bx1 = jnp.arange(B)[:, None]
    window_BxC1 = jnp.zeros((B, C + 1), jnp.int32)  # candidate index, root first -> window index
    window_BxC1 = window_BxC1.at[row_Bx1, chosen_BxN + 1].set(1 + jnp.arange(nodes), mode="drop")
    chosen_BxN = jnp.minimum(chosen_BxN, C - 1)
    parent_BxN = jnp.take_along_axis(window_BxC1, jnp.take_along_axis(parent_BxC, chosen_BxN, 1), 1)
    parent_BxN = jnp.where(absent_BxN, ABSENT, parent_BxN)
    seen = ancestors(parent_BxN, depth)
    return Tree(
        jnp.take_along_axis(token_BxC, chosen_BxN, 1),
        parent_BxN,
        seen.sum(-1) - 1,
        seen,
        jnp.where(absent_BxN, -jnp.inf, jnp.take_along_axis(logp_BxC, chosen_BxN, 1)),
        steps_B,
    )


def depths_of(tree: Tree) -> Array:
    """[B, N]: levels of the nodes, from 1; 0 in empty slots."""
    return tree.depth_BxN1[:, 1:]


def ancestors(parent_BxN: Array, depth: int) -> Array:
    """[B, N1, N1], True at (i, j) where window index j is i itself or an ancestor of i."""
    N1 = parent_BxN.shape[1] + 1
    up = jnp.pad(jax.nn.one_hot(parent_BxN, N1), ((0, 0), (1, 0), (0, 0)))
    reach = jnp.eye(N1) + up
    for _ in range((depth - 1).bit_length()):  # each product doubles the reach
        reach = jnp.minimum(reach @ reach, 1.0)
    return reach > 0


def follow(tree: Tree, drawn_BxN: Array, depth: int) -> Path:
    """The path of drawn nodes from the root. drawn_BxN: True for nodes that the target draws at their parents."""
    missed_BxN1 = jnp.pad(~drawn_BxN | (tree.parent_BxN == ABSENT), ((0, 0), (1, 0)))
    kept_BxN1 = ~(tree.seen_BxN1xN1 & missed_BxN1[:, None]).any(-1)
    accepted_B = jnp.max(jnp.where(kept_BxN1, tree.depth_BxN1, 0), axis=1)
    level_BxD1 = jnp.minimum(jnp.arange(depth + 1), accepted_B[:, None])
    on_path = kept_BxN1[:, None] & (tree.depth_BxN1[:, None] == level_BxD1[..., None])  # one index per level
    return Path(accepted_B, jnp.sum(jnp.where(on_path, jnp.arange(on_path.shape[-1]), 0), -1))


def compact(kv: KV, index_BxD1: Array) -> KV:
    """Keys and values of the accepted path only, in its order, ready to be written to a cache."""
    taken = functools.partial(jnp.take_along_axis, mode="promise_in_bounds")  # half the operations, in every layer
    return KV(
        taken(kv.k_BxKvxdxL, index_BxD1[:, None, None], 3), taken(kv.v_BxKvxLxd, index_BxD1[:, None, :, None], 2)
    )
