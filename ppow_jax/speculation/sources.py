"""Sources of drafted tokens: the drafter, an n-gram lookup, or both; and the counts of each in a generation."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.speculation.ngram import Counts, Match
from ppow_jax.speculation.tree import Tree

Array = jax.Array

DRAFTER, NGRAM = 1, 2  # bits of a node's source; both where both drafted the same token on the same path
NAMES = ("drafter", "ngram", "both")  # of sources 1, 2, 3
ORIGINS = ("target", *NAMES)  # of the tokens of an answer; 0: the target added it itself
MEMORY = 0.9  # decay of the running sums per round


class Drafts(NamedTuple):
    """A tree whose nodes come from the drafter, from an n-gram lookup, or from both.

    tree: its logp_BxN holds the estimated log-probabilities of the paths. match: the n-gram's continuation, verified or
    not. source_BxN: 0 in empty slots. drafter_logp_BxN: the drafter's own log-probability of the path, -inf for nodes
    that it did not draft. alone_B: nodes that would be verified if the drafter had not drafted.
    """

    tree: Tree
    match: Match
    source_BxN: Array
    drafter_logp_BxN: Array
    alone_B: Array

    @property
    def count_B(self) -> Array:
        """Number of nodes in each row."""
        return self.tree.count_B


class Sources(flax.struct.PyTreeNode):
    """Statistics by source, and the speed of the rounds so far. All by row.

    counts: of the n-gram lookup. tokens_B, cost_B: decayed sums over all rounds of committed tokens, and of cost in
    steps of plain decoding. idle_B: rounds since the drafter last drafted. drafted_BxS, accepted_BxS: tokens of NAMES.
    """

    counts: Counts
    tokens_B: Array
    cost_B: Array
    idle_B: Array
    drafted_BxS: Array
    accepted_BxS: Array

    @classmethod
    def start(cls, B: int) -> "Sources":
        """Nothing drafted; as fast as plain decoding."""
        one_B, none_BxS = jnp.ones(B), jnp.zeros((B, len(NAMES)), jnp.int32)
        return cls(Counts.start(B), one_B, one_B, jnp.zeros(B, jnp.int32), none_BxS, none_BxS)


def on_path(source_BxN: Array, index_BxK1: Array, accepted_B: Array) -> Array:
    """[B, K]: sources of the accepted tokens, then 0. index_BxK1: window indices of root and path."""
    source_BxN1 = jnp.pad(source_BxN, ((0, 0), (1, 0)))
    path_BxK = jnp.take_along_axis(source_BxN1, index_BxK1[:, 1:], 1)
    return jnp.where(jnp.arange(path_BxK.shape[1]) < accepted_B[:, None], path_BxK, 0)


def tally(source_BxN: Array) -> Array:
    """[B, 3]: tokens of each of NAMES."""
    return jnp.stack([(source_BxN == source + 1).sum(1) for source in range(len(NAMES))], -1)
