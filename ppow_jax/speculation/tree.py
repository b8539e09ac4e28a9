"""Draft trees: many continuations of one prefix, verified in one pass (EAGLE-2, 2406.16858; EAGLE-3, 2503.01840).

A tree is a deterministic function of its prefix. That makes lossless acceptance simple at any temperature: the target
draws one token at each node, and the path goes on for as long as the token drawn at a node is one of its children. Only
where it is none of them does the token itself have to be drawn, so a round draws from the whole vocabulary once.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.config import require
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.layers import KV

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Sizes of a tree. Hashable: static in every program.

    branch: nodes of a level that are expanded, and children drafted for each (EAGLE's top_k). depth: levels, that is
    draft steps and the most tokens that one round can accept. nodes: nodes verified beside the root, the best of all
    that were drafted by the drafter's probability of their path (EAGLE's total_tokens - 1).
    Raises UserError where depth, branch or nodes do not fit each other.
    """

    branch: int
    depth: int
    nodes: int

    def __post_init__(self):
        require(self.branch >= 1, f"tree branch {self.branch}: must be at least 1")
        require(self.depth >= 1, f"tree depth {self.depth}: must be at least 1")
        most = self.candidates
        require(1 <= self.nodes <= most, f"tree nodes {self.nodes}: must be 1 to {most}, all that are drafted")

    @property
    def candidates(self) -> int:
        """Nodes that are drafted."""
        return self.branch + (self.depth - 1) * self.branch**2


class Tree(NamedTuple):
    """N nodes below the root of each row, parents first. Window index 0 is the root, index n + 1 is node n.

    token_BxN: target ids. parent_BxN: window index. depth_BxN1: 0 for the root. seen_BxN1xN1: each index's ancestors
    and itself. logp_BxN: the drafter's log-probability of the path to the node.
    """

    token_BxN: Array
    parent_BxN: Array
    depth_BxN1: Array
    seen_BxN1xN1: Array
    logp_BxN: Array


class Path(NamedTuple):
    """accepted_B: nodes on the accepted path. index_BxD1: window indices of root and path, the last one repeated."""

    accepted_B: Array
    index_BxD1: Array


def propose_tree(
    drafter: Drafter,
    embed_VxD: Array,
    g_Bx1xE: Array,
    root_Bx1: Array,
    position_Bx1: Array,
    prefix: Sequence[Prefix],
    shape: TreeShape,
) -> Tree:
    """Drafts a tree below `root`: each level expands the best `branch` nodes of the one before.

    g_Bx1xE: the anchor's fused target features; position_Bx1: the anchor's index; prefix: see `propose`.
    A child is never more probable than its parent, so the best nodes hang together.
    """
    B, X = root_Bx1.shape[0], shape.branch
    logp_BxC, token_BxC, parent_BxC = [], [], []  # of the candidates, level by level
    g, token_BxM = g_Bx1xE, root_Bx1
    chain: tuple = ()
    path_BxM, index_BxM = jnp.zeros((B, 1)), jnp.zeros((B, 1), jnp.int32)  # of what is expanded
    for s in range(shape.depth):
        embed_BxMxE = drafter.embed(embed_VxD, token_BxM)
        out, chain = drafting.step(drafter, g, embed_BxMxE, position_Bx1 + s, prefix, chain, first=s == 0)
        logits_BxMxW = sharding.pin(drafting.logits(drafter, out), "batch")
        top_BxMxX, id_BxMxX = jax.lax.top_k(jax.nn.log_softmax(logits_BxMxW), X)
        level = (path_BxM[..., None] + top_BxMxX).reshape(B, -1)
        logp_BxC.append(level)
        token_BxC.append(drafter.target_ids_W[id_BxMxX].reshape(B, -1))
        parent_BxC.append(jnp.repeat(index_BxM, X, axis=1))
        if s + 1 == shape.depth:
            break
        path_BxM, chosen_BxM = jax.lax.top_k(level, X)
        first = 1 + sum(x.shape[1] for x in logp_BxC[:-1])
        index_BxM = first + chosen_BxM
        token_BxM = jnp.take_along_axis(token_BxC[-1], chosen_BxM, 1)
        beam_BxM = chosen_BxM // X
        g = _beams(drafting.feed(drafter, out), beam_BxM)
        chain = jax.tree.map(lambda x_BxMxX, beam_BxM=beam_BxM: _beams(x_BxMxX, beam_BxM), chain)
    logp, token, parent = (jnp.concatenate(x, 1) for x in (logp_BxC, token_BxC, parent_BxC))
    return _best(logp, token, parent, shape)


def _beams(x_BxMxX: Array, beam_BxM: Array) -> Array:
    index = beam_BxM.reshape(*beam_BxM.shape, *[1] * (x_BxMxX.ndim - 2))
    return jnp.take_along_axis(x_BxMxX, index, 1)


def _best(logp_BxC: Array, token_BxC: Array, parent_BxC: Array, shape: TreeShape) -> Tree:
    """The best of all candidates, in the order they were drafted in: parents first."""
    B, C = logp_BxC.shape
    _, chosen_BxN = jax.lax.top_k(logp_BxC, shape.nodes)  # of equals the first: a parent before its child
    chosen_BxN = jnp.sort(chosen_BxN, axis=1)
    row_Bx1 = jnp.arange(B)[:, None]
    window_BxC1 = jnp.zeros((B, C + 1), jnp.int32)  # candidate index, root first -> window index
    window_BxC1 = window_BxC1.at[row_Bx1, chosen_BxN + 1].set(1 + jnp.arange(shape.nodes))
    parent_BxN = jnp.take_along_axis(window_BxC1, jnp.take_along_axis(parent_BxC, chosen_BxN, 1), 1)
    seen = ancestors(parent_BxN, shape.depth)
    return Tree(
        jnp.take_along_axis(token_BxC, chosen_BxN, 1),
        parent_BxN,
        seen.sum(-1) - 1,
        seen,
        jnp.take_along_axis(logp_BxC, chosen_BxN, 1),
    )


def ancestors(parent_BxN: Array, depth: int) -> Array:
    """[B, N1, N1], True at (i, j) where window index j is i itself or above it."""
    N1 = parent_BxN.shape[1] + 1
    up = jnp.pad(jax.nn.one_hot(parent_BxN, N1), ((0, 0), (1, 0), (0, 0)))
    reach = jnp.eye(N1) + up
    for _ in range((depth - 1).bit_length()):  # each product doubles how far it reaches
        reach = jnp.minimum(reach @ reach, 1.0)
    return reach > 0


def children_drawn(tree: Tree, p_BxN: Array, u_BxN1: Array) -> Array:
    """Which nodes the target draws at their parents, [B, N], at most one below each.

    p_BxN: the target's probability of each node's token after its parent. u_BxN1: one uniform number per window index:
    the children of an index share out its first part, each as much as its probability; the rest is `remainder`.
    """
    siblings = tree.parent_BxN[:, :, None] == tree.parent_BxN[:, None]
    earlier = jnp.tril(jnp.ones(siblings.shape[1:], bool), -1)
    begin_BxN = jnp.sum(jnp.where(siblings & earlier, p_BxN[:, None], 0.0), -1)
    u_BxN = jnp.take_along_axis(u_BxN1, tree.parent_BxN, 1)
    return (begin_BxN <= u_BxN) & (u_BxN < begin_BxN + p_BxN)


def remainder(tree: Tree, index_B: Array, p_BxV: Array) -> Array:
    """Law of the token drawn at window index index_B, given that it is none of its children, [B, V].

    Rounding can leave nothing; p is then what is returned.
    """
    is_child_BxN = tree.parent_BxN == index_B[:, None]
    gone_BxN = jnp.where(is_child_BxN, tree.token_BxN, p_BxV.shape[1])  # past the end: dropped
    rest_BxV = p_BxV.at[jnp.arange(len(index_B))[:, None], gone_BxN].set(0.0, mode="drop")
    total_Bx1 = rest_BxV.sum(-1, keepdims=True)
    return jnp.where(total_Bx1 > 0, rest_BxV / jnp.where(total_Bx1 > 0, total_Bx1, 1.0), p_BxV)


def follow(tree: Tree, drawn_BxN: Array, depth: int) -> Path:
    """The path of drawn nodes from the root. drawn_BxN: nodes that the target draws at their parents."""
    missed_BxN1 = jnp.pad(~drawn_BxN, ((0, 0), (1, 0)))
    kept_BxN1 = ~(tree.seen_BxN1xN1 & missed_BxN1[:, None]).any(-1)
    accepted_B = jnp.max(jnp.where(kept_BxN1, tree.depth_BxN1, 0), axis=1)
    level_BxD1 = jnp.minimum(jnp.arange(depth + 1), accepted_B[:, None])
    on_path = kept_BxN1[:, None] & (tree.depth_BxN1[:, None] == level_BxD1[..., None])  # one index per level
    return Path(accepted_B, jnp.sum(jnp.where(on_path, jnp.arange(on_path.shape[-1]), 0), -1))


def compact(kv: KV, index_BxD1: Array) -> KV:
    """Keys and values of the accepted path alone, in its order: what a cache takes."""
    return KV(
        jnp.take_along_axis(kv.k_BxKvxdxL, index_BxD1[:, None, None], 3),
        jnp.take_along_axis(kv.v_BxKvxLxd, index_BxD1[:, None, :, None], 2),
    )
