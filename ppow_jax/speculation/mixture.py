"""Trees of two sources: an n-gram lookup, which costs nothing, and the drafter where it is worth its time.

A round looks up the continuation of the last tokens first. The drafter then drafts its adaptive tree, level by level,
as far as what it is expected to gain beyond the lookup exceeds the cost of its steps; where the lookup is expected to
be right anyway, the drafter is not run at all. Equal paths of both sources are merged. Of all nodes the most probable
ones are verified, as many as are worth their cost (`adaptive.kept`).

Probabilities: the drafter's are those of its softmax, calibrated as in `adaptive`; those of the lookup are the
acceptance rates that `ngram.Counts` tracks. Where both draft the same token after the same path, it is rejected only if
both are wrong, which are taken to be independent.

Lossless: the tree is a function of the tokens so far and of statistics of earlier rounds, and the target draws its own
token at each node, see `speculation.tree`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppow_jax.speculation import ngram, sources
from ppow_jax.speculation.adaptive import (
    MARGIN,
    AcceptanceStats,
    CostTable,
    Stopping,
    continues,
    kept,
    together,
    update,
)
from ppow_jax.speculation.ngram import Match
from ppow_jax.speculation.settings import THROUGHPUT, Speculation
from ppow_jax.speculation.sources import DRAFTER, NGRAM, Drafts, Sources
from ppow_jax.speculation.tree import ABSENT, Candidates, TreeShape, assemble, choose, depths_of

Array = jax.Array
LONGEST_IDLE = 32  # rounds without the drafter, after which it drafts again: its statistics would be out of date
LEVEL_NODES = 2  # verified nodes that a level of the drafter's tree is expected to add


def timed(stats: AcceptanceStats, found: Sources) -> AcceptanceStats:
    """The drafter's statistics with the speed of all rounds in place of those that it drafted in."""
    return stats.replace(tokens_B=found.tokens_B, cost_B=found.cost_B)


def _certain(stats: AcceptanceStats) -> AcceptanceStats:
    """Statistics for probabilities that are calibrated already."""
    return stats.replace(accepted_B=jnp.ones_like(stats.accepted_B), expected_B=jnp.ones_like(stats.expected_B))


def worth(
    stats: AcceptanceStats,
    found: Sources,
    stopping: Stopping,
    cost_table: CostTable | None,
    log_q_BxN: Array,
    live_B: Array | None,
) -> Array:
    """Number [B] of the lookup's tokens worth verifying by themselves. log_q_BxN: see `ngram.log_chances`.

    Without cost_table, all of them.
    """
    B, N = log_q_BxN.shape
    if cost_table is None:
        count_B = jnp.full(B, N, jnp.int32)
    else:
        verify_N1 = cost_table.verify_N1[: N + 1]
        most = len(verify_N1) - 1
        count_B = kept(_certain(timed(stats, found)), stopping, verify_N1, log_q_BxN[:, :most], live_B)
    return jnp.where(log_q_BxN[:, 0] > -jnp.inf, count_B, 0)


def lookup(
    stats: AcceptanceStats,
    found: Sources,
    stopping: Stopping,
    cost_table: CostTable | None,
    match: Match,
    live_B: Array | None,
) -> Drafts:
    """The lookup's continuation alone, as far as it is worth verifying."""
    B, N = match.token_BxN.shape
    log_q_BxN = ngram.log_chances(found.counts, match)
    alone_B = worth(stats, found, stopping, cost_table, log_q_BxN, live_B)
    kept_BxN = jnp.arange(N) < alone_B[:, None]
    chosen_BxN = jnp.where(kept_BxN, jnp.arange(N), N)
    parent_BxN, none_B = jnp.broadcast_to(jnp.arange(N), (B, N)), jnp.zeros(B, jnp.int32)
    tree = assemble(chosen_BxN, log_q_BxN, match.token_BxN, parent_BxN, none_B, N)
    unknown_BxN = jnp.full((B, N), -jnp.inf)
    return Drafts(tree, match, jnp.where(kept_BxN, NGRAM, 0), unknown_BxN, alone_B)


def mixed(
    draft: Callable[[Callable[[int, Array], Array] | None], Candidates],
    stats: AcceptanceStats,
    found: Sources,
    speculation: Speculation,
    cost_table: CostTable | None,
    match: Match,
    live_B: Array,
) -> Drafts:
    """A tree of both sources; without cost_table, of its full size. draft: see `draft_candidates`, given its go_on."""
    shape, stopping = speculation.shape, speculation.adaptive or THROUGHPUT
    assert shape is not None  # a mixture's
    log_q_BxN = ngram.log_chances(found.counts, match)
    alone_B = worth(stats, found, stopping, cost_table, log_q_BxN, live_B)
    go_on, keep = None, None
    if cost_table is not None:
        go_on = decisions(stats, found, stopping, cost_table, shape, log_q_BxN, alone_B, ~live_B)
        keep = keeping(stats, found, stopping, cost_table, live_B)
    return merge(draft(go_on), match, log_q_BxN, stats.calibration_B, shape, speculation.window, keep, alone_B)


def decisions(
    stats: AcceptanceStats,
    found: Sources,
    stopping: Stopping,
    cost_table: CostTable,
    shape: TreeShape,
    log_q_BxN: Array,
    alone_B: Array,
    done_B: Array,
) -> Callable[[int, Array], Array]:
    """The rule by which the drafter goes on, for `draft_candidates`; the rows of a batch decide together.

    A level gains what the drafter gets right there and the lookup does not. log_q_BxN, alone_B: see `worth`.
    """
    live_B, stats = ~done_B, timed(stats, found)
    q_BxN = jnp.exp(log_q_BxN)
    missed_BxD = 1 - jnp.pad(q_BxN, ((0, 0), (0, shape.depth)))[:, : shape.depth]
    runs_B = jnp.ones_like(done_B)
    if stopping.rule == "throughput":
        levels_D = 1 + jnp.arange(shape.depth)
        gained_BxD = together(jnp.cumsum(stats.acceptance_rate_B[:, None] ** levels_D * missed_BxD, 1), live_B)
        verified_BxD = jnp.minimum(alone_B[:, None] + LEVEL_NODES * levels_D, shape.nodes)
        verify_BxD = together(cost_table.verify_N1[verified_BxD] - cost_table.verify_N1[alone_B][:, None], live_B)
        price_BxD = MARGIN * together(stats.rate_B, live_B)[:, None] * (cost_table.step * levels_D + verify_BxD)
        unmatched_B = together(q_BxN[:, 0], live_B) == 0
        runs_B = ((gained_BxD > price_BxD).any(1)) | unmatched_B | (found.idle_B >= LONGEST_IDLE)

    def go_on(steps: int, logp_BxX: Array) -> Array:
        if steps == 0:
            return stats.drafts_B & runs_B & live_B
        if stopping.rule == "throughput":
            logp_BxX += jnp.log(missed_BxD[:, steps, None])
        return continues(stats, stopping, cost_table.of_step(steps, widens=False), logp_BxX, live_B)

    return go_on


def merge(
    drafted: Candidates,
    match: Match,
    log_q_BxN: Array,
    calibration_B: Array,
    shape: TreeShape,
    depth: int,
    keep: Callable[[Array], Array] | None,
    alone_B: Array,
) -> Drafts:
    """One tree of both sources' most probable nodes; depth: its most levels.

    calibration_B: factor for the drafter's probabilities. keep: see `propose_tree`. log_q_BxN, alone_B: see `worth`.
    """
    B, N = match.token_BxN.shape
    C, row_Bx1 = drafted.logp_BxC.shape[1], jnp.arange(B)[:, None]
    logp_BxC = jnp.minimum(jnp.log(calibration_B)[:, None] + drafted.logp_BxC, 0.0)
    log_r_BxN = jnp.where(log_q_BxN > -jnp.inf, jnp.diff(log_q_BxN, prepend=0.0), -jnp.inf)
    place_B, joined_B = jnp.zeros(B, jnp.int32), match.matched_B > 0  # of the node before; on a path of the drafter's
    above_B = log_own_B = jnp.zeros(B)  # log-probability of the path so far: estimated, and the drafter's
    places: list[Array] = []
    joins: list[Array] = []
    chances: list[Array] = []
    for i in range(N):
        log_cond_B = log_r_BxN[:, i]
        same_B, shared_B = jnp.zeros(B, bool), place_B
        if i < shape.depth:
            level = slice(shape.candidates_of(i), shape.candidates_of(i + 1))
            same_BxX = (drafted.parent_BxC[:, level] == place_B[:, None]) & (logp_BxC[:, level] > -jnp.inf)
            same_BxX &= (drafted.token_BxC[:, level] == match.token_BxN[:, i : i + 1]) & joined_B[:, None]
            same_B, nth_B = same_BxX.any(1), jnp.argmax(same_BxX, 1)
            shared_B = 1 + level.start + nth_B
            own_B = jnp.take_along_axis(logp_BxC[:, level], nth_B[:, None], 1)[:, 0]
            both_B = jnp.log1p(-(1 - jnp.exp(own_B - log_own_B)) * (1 - jnp.exp(log_cond_B)))
            log_cond_B = jnp.where(same_B, both_B, log_cond_B)
            log_own_B = jnp.where(same_B, own_B, log_own_B)
        joined_B &= same_B
        place_B, above_B = jnp.where(same_B, shared_B, C + 1 + i), above_B + log_cond_B
        for found, value_B in ((places, place_B), (joins, same_B), (chances, above_B)):
            found.append(value_B)
    place_BxN, joined_BxN, log_u_BxN = (jnp.stack(x, 1) for x in (places, joins, chances))
    shared_BxN = jnp.where(joined_BxN, place_BxN - 1, C)
    logp_BxC = logp_BxC.at[row_Bx1, shared_BxN].set(log_u_BxN, mode="drop")
    source_BxC = jnp.where(drafted.logp_BxC > -jnp.inf, DRAFTER, 0).at[row_Bx1, shared_BxN].add(NGRAM, mode="drop")
    unknown_BxN = jnp.full((B, N), -jnp.inf)
    logp_BxA = jnp.concatenate([logp_BxC, jnp.where(joined_BxN, -jnp.inf, log_u_BxN)], 1)
    token_BxA = jnp.concatenate([drafted.token_BxC, match.token_BxN.astype(drafted.token_BxC.dtype)], 1)
    parent_BxA = jnp.concatenate([drafted.parent_BxC, jnp.pad(place_BxN[:, :-1], ((0, 0), (1, 0)))], 1)
    source_BxA = jnp.concatenate([source_BxC, jnp.full((B, N), NGRAM)], 1)
    drafter_BxA = jnp.concatenate([drafted.logp_BxC, unknown_BxN], 1)
    chosen_BxN = choose(logp_BxA, shape.nodes, keep)
    tree = assemble(chosen_BxN, logp_BxA, token_BxA, parent_BxA, drafted.steps_B, depth)
    absent_BxN = tree.parent_BxN == ABSENT
    chosen_BxN = jnp.minimum(chosen_BxN, C + N - 1)
    source_BxN = jnp.where(absent_BxN, 0, jnp.take_along_axis(source_BxA, chosen_BxN, 1))
    drafter_BxN = jnp.where(absent_BxN, -jnp.inf, jnp.take_along_axis(drafter_BxA, chosen_BxN, 1))
    return Drafts(tree, match, source_BxN, drafter_BxN, alone_B)


def keeping(
    stats: AcceptanceStats, found: Sources, stopping: Stopping, cost_table: CostTable, live_B: Array | None
) -> Callable[[Array], Array]:
    """The rule by which a tree of both sources is cut: `adaptive.kept`, with probabilities that are calibrated."""

    def keep(logp_BxN: Array) -> Array:
        return kept(_certain(timed(stats, found)), stopping, cost_table.verify_N1, logp_BxN, live_B)

    return keep


def settle(
    stats: AcceptanceStats,
    found: Sources,
    draft: Drafts,
    token_BxK1: Array,
    index_BxK1: Array,
    accepted_B: Array,
    cost_table: CostTable,
    live_B: Array,
) -> tuple[AcceptanceStats, Sources]:
    """Statistics after a round. token_BxK1, index_BxK1, accepted_B: see `Verification`. live_B: unfinished rows.

    The drafter is counted as gaining what the lookup alone would not have gained, for what it cost beyond the lookup.
    """
    tree, source_BxN = draft.tree, draft.source_BxN
    path_BxK = sources.on_path(source_BxN, index_BxK1, accepted_B)
    own_B = ((path_BxK & DRAFTER) > 0).sum(1)  # a prefix of the path: the drafter's nodes have no others above them
    mine_BxN = (source_BxN & DRAFTER) > 0
    depth_B = jnp.where(mine_BxN, depths_of(tree), 0).max(1)
    expected_B = jnp.exp(draft.drafter_logp_BxN).sum(1)
    steps, count, alone = (jnp.where(live_B, x, 0).max() for x in (tree.steps_B, draft.count_B, draft.alone_B))
    cost = cost_table.of_round(steps, count)
    lookup_B = jnp.minimum(ngram.right(draft.match, token_BxK1, accepted_B), draft.alone_B)
    extra_B = jnp.broadcast_to(jnp.maximum(1 + cost - cost_table.verify_N1[alone], 0.0), accepted_B.shape)
    more_B = 1 + accepted_B - lookup_B
    stats = update(stats, own_B, tree.steps_B, depth_B, expected_B, extra_B, live_B, gained_B=more_B)

    def fade(sum_B: Array, new_B: Array) -> Array:
        return jnp.where(live_B, sources.MEMORY * sum_B + new_B, sum_B)

    live_Bx1 = live_B[:, None]
    return stats, Sources(
        ngram.count(found.counts, draft.match, token_BxK1, accepted_B, live_B),
        fade(found.tokens_B, 1 + accepted_B),
        fade(found.cost_B, cost),
        jnp.where(steps > 0, 0, found.idle_B + 1),
        found.drafted_BxS + live_Bx1 * sources.tally(source_BxN),
        found.accepted_BxS + live_Bx1 * sources.tally(path_BxK),
    )
