"""Drafting a chain of K tokens from anchors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Drafter, Layers, Prefix
from ppow_jax.speculation.sampling import Sampling, draw

Array = jax.Array
NONE = -1  # no token


class Draft(NamedTuple):
    """K drafted tokens for each of M windows per row.

    token_BxMxK: target ids; NONE after the end of a shorter window. id_BxMxK: draft ids of the same tokens.
    log_q_BxMxKxW: log-probabilities of the distributions they were drawn from, -inf where nothing was drawn; None for
    greedy drafts. logp_BxMxK: the drafter's log-probability of each token at temperature 1, 0 where there is none.
    """

    token_BxMxK: Array
    id_BxMxK: Array
    log_q_BxMxKxW: Array | None
    logp_BxMxK: Array

    @property
    def count_B(self) -> Array:
        """Number of tokens in each row's first window."""
        return (self.token_BxMxK[:, 0] != NONE).sum(-1)

    def cut(self, width: int) -> "Draft":
        """Keeps only the first `width` tokens."""
        return jax.tree.map(lambda x: x[:, :, :width], self)


def propose(
    drafter: Drafter,
    embed_VxD: Array,
    g_BxMxE: Array,
    root_BxM: Array,
    position_BxM: Array,
    prefix: Sequence[Prefix],
    K: int,
    sampling: Sampling,
    key_B: Array,
    go_on: Callable[[int, Array], Array] | None = None,
) -> Draft:
    """Drafts K >= 1 tokens that follow `root`, the token after each anchor.

    g_BxMxE: the anchor's fused target features; position_BxM: the anchor's index; prefix: the drafter's keys of all
    indices up to the anchor (mask_BxMxL). Drafts are drawn with `sampling`, over the draft vocabulary, with one key per
    row, so that a row's drafts do not depend on its neighbours.

    go_on: (tokens drafted so far 0..K-1, their summed logp_BxM) -> mask of windows that draft one more; a window that
    stopped never continues. Steps that no window takes are skipped. By default all windows take all steps.
    """
    B, M = root_BxM.shape

    def steps(
        s: int, g_BxMxE: Array, token_BxM: Array, chain: tuple[Layers, ...], going_BxM: Array, sum_BxM: Array
    ) -> list[tuple[Any, ...]]:
        """Drafts of steps s, s+1, .. K-1, one tuple each; going_BxM: windows that take step s."""
        embed_BxMxE = drafter.embed(embed_VxD, token_BxM)
        out, chain = drafting.step(drafter, g_BxMxE, embed_BxMxE, position_BxM + s, prefix, chain, first=s == 0)
        logits_BxMxW = sharding.whole_logits(drafting.logits(drafter, out))
        id_BxM, log_q_BxMxW = draw(_at_step(key_B, s), logits_BxMxW, sampling)
        token_BxM, g_BxMxE = drafter.target_ids_W[id_BxM], drafting.feed(drafter, out)
        z_BxM = jnp.take_along_axis(logits_BxMxW, id_BxM[..., None], -1)[..., 0]
        logp_BxM = z_BxM - jax.nn.logsumexp(logits_BxMxW, -1)
        if go_on is None:
            mine = token_BxM, id_BxM, log_q_BxMxW, logp_BxM
        else:
            mine_q = None if log_q_BxMxW is None else jnp.where(going_BxM[..., None], log_q_BxMxW, -jnp.inf)
            mine = jnp.where(going_BxM, token_BxM, NONE), id_BxM, mine_q, jnp.where(going_BxM, logp_BxM, 0.0)
        sum_BxM += logp_BxM
        return [mine, *further(s + 1, g_BxMxE, token_BxM, chain, going_BxM, sum_BxM)]

    def further(
        s: int, g_BxMxE: Array, token_BxM: Array, chain: tuple[Layers, ...], going_BxM: Array, sum_BxM: Array
    ) -> list[tuple[Any, ...]]:
        if s == K:
            return []
        if go_on is None:
            return steps(s, g_BxMxE, token_BxM, chain, going_BxM, sum_BxM)
        going_BxM &= go_on(s, sum_BxM)
        return jax.lax.cond(
            going_BxM.any(),
            lambda: steps(s, g_BxMxE, token_BxM, chain, going_BxM, sum_BxM),
            lambda: [nothing] * (K - s),
        )

    blank_BxM = jnp.zeros((B, M), jnp.int32)
    no_q = None if sampling.greedy else jnp.full((B, M, len(drafter.target_ids_W)), -jnp.inf)
    nothing = jnp.full((B, M), NONE, drafter.target_ids_W.dtype), blank_BxM, no_q, jnp.zeros((B, M))
    drafts = further(0, g_BxMxE, root_BxM, (), jnp.ones((B, M), bool), jnp.zeros((B, M)))
    token, ids, laws, logp = zip(*drafts, strict=True)
    log_q_BxMxKxW = None if sampling.greedy else jnp.stack(laws, -2)
    return Draft(jnp.stack(token, -1), jnp.stack(ids, -1), log_q_BxMxKxW, jnp.stack(logp, -1))


def _at_step(key_B: Array, s: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, s))(key_B)
