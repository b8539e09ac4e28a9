"""Drafting a chain of K tokens from anchors."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import Keys
from ppow_jax.speculation.sampling import Sampling, draw

Array = jax.Array


class Draft(NamedTuple):
    """K drafted tokens of M windows per row.

    token_BxMxK: target ids. id_BxMxK: draft ids of the same tokens. logits_BxMxKxW: what they were drawn from.
    """

    token_BxMxK: Array
    id_BxMxK: Array
    logits_BxMxKxW: Array


def propose(
    drafter: Drafter,
    embed_VxD: Array,
    g_BxMxE: Array,
    root_BxM: Array,
    position_BxM: Array,
    prefix: Sequence[Keys],
    K: int,
    sampling: Sampling,
    key_B: Array,
) -> Draft:
    """Drafts K >= 1 tokens that follow `root`, the token after each anchor.

    g_BxMxE: the anchor's fused target features; position_BxM: the anchor's index; prefix: the drafter's keys of all
    indices up to the anchor (mask_BxMxL). Greedy drafts take the argmax; sampled ones are drawn with `sampling`'s
    temperature from exactly the distribution that `logits` gives, with one key per row, so that a row's drafts do not
    depend on its neighbours.
    """
    chain, token_BxM = (), root_BxM
    tokens, ids, all_logits = [], [], []
    for s in range(K):
        embed_BxMxE = embed_VxD[token_BxM].astype(jnp.float32)
        out, chain = drafting.step(
            drafter, g_BxMxE, embed_BxMxE, position_BxM + s, prefix, chain, first=s == 0
        )
        logits_BxMxW = drafting.logits(drafter, out)
        id_BxM = jax.vmap(lambda key, x: draw(key, x, sampling))(_at_step(key_B, s), logits_BxMxW)
        token_BxM, g_BxMxE = drafter.target_ids_W[id_BxM], drafting.feed(drafter, out)
        tokens.append(token_BxM), ids.append(id_BxM), all_logits.append(logits_BxMxW)
    return Draft(jnp.stack(tokens, -1), jnp.stack(ids, -1), jnp.stack(all_logits, -2))


def _at_step(key_B: Array, s: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, s))(key_B)
