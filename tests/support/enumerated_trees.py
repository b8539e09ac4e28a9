"""Draft trees written as lists, and the exact distribution of the text that a round over one emits."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.speculation import verification
from ppow_jax.speculation.sampling import Sampling, inverse
from ppow_jax.speculation.settings import chain
from ppow_jax.speculation.tree import ABSENT, Tree, ancestors

V, ROUND = 3, 3


def tree_of(tokens, parents) -> Tree:
    """A tree from per-node tokens and window indices of the parents; one row."""
    parent_BxN = jnp.asarray([parents])
    seen = ancestors(parent_BxN, len(parents))
    logp_BxN, steps_B = jnp.zeros((1, len(tokens))), jnp.array([len(tokens)])
    return Tree(jnp.asarray([tokens]), parent_BxN, seen.sum(-1) - 1, seen, logp_BxN, steps_B)


def emitted_law(tokens, parents, p_of, biased: str = "") -> np.ndarray:
    """Law of the first ROUND tokens of a round that the target completes, by enumeration of what each depth draws.

    p_of: prefix (tuple) -> law of the next token. `_accept_tree` as it is, with its only source of chance in the test's
    hands: one number for each depth. The middles of all intervals in which every index of the depth draws the same
    stand for them.
    """
    N = len(tokens)
    prefix = [()]
    for token, parent in zip(tokens, parents, strict=True):
        prefix.append((*prefix[parent], token) if parent != ABSENT else ())
    tree = tree_of(tokens, parents)
    depth_N1 = np.asarray(tree.depth_BxN1[0])
    p_N1xV = np.array([p_of(p) for p in prefix])
    parts = []  # per depth: (middle, width) of each part
    for d in range(depth_N1.max() + 1):
        cuts = np.unique([0.0, 1.0, *np.cumsum(p_N1xV[depth_N1 == d], 1)[:, :-1].ravel()])
        parts.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(cuts)])
    combos = list(itertools.product(*parts))
    B, u_BxD = len(combos), jnp.asarray([[middle for middle, _ in combo] for combo in combos])

    def number(_state, use, depth_B):
        assert use == verification.OWN
        return u_BxD[jnp.arange(B), 0 * depth_B if biased == "the same number for all depths" else depth_B]

    def chosen(u, weight_xV):
        return inverse(jnp.stack([jnp.zeros_like(u), u]), weight_xV)

    repeated = jax.tree.map(lambda x: jnp.repeat(x, B, 0), tree)
    logits_BxN1xV = jnp.broadcast_to(jnp.log(p_N1xV), (B, N + 1, V))
    with mock.patch.object(verification, "row_keys", number), mock.patch.object(verification, "sample", chosen):
        accepted_B, _, token_BxK1 = verification._accept_tree(None, repeated, logits_BxN1xV, Sampling(1.0), chain(N))
    law = np.zeros((V,) * ROUND)
    for combo, accepted, token_K1 in zip(combos, np.asarray(accepted_B), np.asarray(token_BxK1), strict=True):
        weight = np.prod([width for _, width in combo])
        kept = tuple(token_K1[:accepted])
        redrawn = biased == "drawn again after a miss"
        for last, share in enumerate(p_of(kept) if redrawn else np.eye(V)[token_K1[accepted]]):
            text = (*kept, last)[:ROUND]
            for rest in itertools.product(range(V), repeat=ROUND - len(text)):
                chance, whole = weight * share, text
                for t in rest:
                    chance, whole = chance * p_of(whole)[t], (*whole, t)
                law[whole] += chance
    return law
