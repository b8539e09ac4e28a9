"""Greedy speculative decoding replayed on recorded answers, without decoding.

At temperature 0 the target's text does not depend on the drafter, so one set of the target's own answers serves to
compare many drafters and speculation modes: the target reads the answers once (`corpus.features` stores the
resulting features), the drafter drafts from every position of them at once (`evaluation.replay_tables`), and the rounds
are then simulated one after the other from these drafts, including the decisions of adaptive windows, answer by answer
as at batch 1.

Counts are those of `inference.decoding.decode`, up to the target's rounding: the same answers, read in one pass or in
many, give logits that differ in their last digits. One difference remains: drafts of an answer's last round that the
target would accept after the end of the answer, which the answer does not show. They count in decode's histogram,
and neither in its tokens nor in its rounds.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.corpus.features import FeatureStore
from ppow_jax.data.batches import Batches
from ppow_jax.errors import UserError
from ppow_jax.evaluation.replay_lookup import (
    Counts,
    LookupTable,
    MixedTable,
    Statistics,
    lookup_round,
    lookup_table,
)
from ppow_jax.evaluation.replay_tables import CandidateTable, ChainTable, Plan, Table, TreeTable, plans_of, read_batch
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation.adaptive import AcceptanceStats, CostTable, continues, kept, update
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.sources import Sources

Array = jax.Array


class Replayed(NamedTuple):
    """Simulated counts of decoding N answers; arrays in the order of `batches.examples`.

    tokens_N: tokens gained by decoding, that is all of an answer but the first, which the prefill makes. rounds_N:
    verifications. drafted_N: drafted tokens that were verified. steps_N: draft steps. cost_N: cost of all rounds, in
    steps of plain decoding; nan without a cost table. accepted_NxK1: numbers of rounds that accepted 0..K drafts.
    """

    tokens_N: np.ndarray
    rounds_N: np.ndarray
    drafted_N: np.ndarray
    steps_N: np.ndarray
    cost_N: np.ndarray
    accepted_NxK1: np.ndarray

    @property
    def tau(self) -> float:
        """Tokens per round, over all answers."""
        return float(self.tokens_N.sum() / self.rounds_N.sum())

    @property
    def speedup(self) -> float:
        """Speedup over plain decoding according to the cost table; nan without a cost table."""
        return float(self.tokens_N.sum() / self.cost_N.sum())


class Tables(NamedTuple):
    """All drafts of one drafter from A anchors: a table per plan (see `replay_tables`), [A, ...].

    start_N, count_N: first anchor and number of anchors of each answer, in the order of `batches.examples`. lookup:
    what an n-gram lookup finds; None without a mode that looks up.
    """

    of: dict[Plan, Table]
    start_N: np.ndarray
    count_N: np.ndarray
    lookup: LookupTable | None = None


def replay(
    drafter: Drafter | None,
    target_params: dict,
    config: ModelConfig,
    batches: Batches,
    speculation: Speculation,
    cost_table: CostTable | None = None,
    features: FeatureStore | None = None,
    store_S: np.ndarray | None = None,
) -> Replayed:
    """Replays one speculation mode; see `replay_all`."""
    return replay_all(drafter, target_params, config, batches, [speculation], cost_table, features, store_S)[0]


def replay_all(
    drafter: Drafter | None,
    target_params: dict,
    config: ModelConfig,
    batches: Batches,
    speculations: Sequence[Speculation],
    cost_table: CostTable | None = None,
    features: FeatureStore | None = None,
    store_S: np.ndarray | None = None,
) -> list[Replayed]:
    """Counts that greedy decoding at batch 1 would give in several speculation modes, on the answers of `batches`.

    Modes share the target's pass and, where they draft in the same way, their drafts: chains of any length, and trees
    of any depth and size with the same branch.

    Args:
      drafter: may be None if no mode needs one.
      config: the target's configuration.
      batches: the target's own greedy answers, one per example. An example that was cut to fit a row is an answer of
        that length.
      cost_table: costs of rounds, for at least as many verified tokens as the widest mode has; required by adaptive
        windows, which decide by it.
      features: features of these batches, where the target has read them before.
      store_S: tokens of earlier answers, which n-gram lookups search as well (`inference.datastore`).

    Raises:
      UserError: for a mode without drafts, a cost table that is missing or too short, features of other batches, or an
        example with more than one answer.
    """
    for speculation in speculations:
        _check_cost_table(speculation, cost_table)
    tables = read_tables(drafter, target_params, config, batches, speculations, features, store_S)
    return [simulate(tables, speculation, cost_table) for speculation in speculations]


def read_tables(
    drafter: Drafter | None,
    target_params: dict,
    config: ModelConfig,
    batches: Batches,
    speculations: Sequence[Speculation],
    features: FeatureStore | None = None,
    store_S: np.ndarray | None = None,
) -> Tables:
    """Drafts that the speculation modes are replayed from, whatever the cost table; see `replay_all`."""
    for speculation in speculations:
        if speculation.window < 1:
            raise UserError("a replay without drafts has nothing to count: its window must be at least 1")
    needed = [speculation.mode for speculation in speculations if speculation.needs_drafter]
    if drafter is None and needed:
        raise UserError(f"a replay of {needed[0]} needs a drafter")
    if features is not None and features.batches is not batches:
        raise UserError("the features were made of other batches than those to replay")
    for example, anchors in zip(batches.examples, batches.anchors, strict=True):
        if np.any(np.diff(anchors) != 1):
            raise UserError(f"{example.source}: holds more than one answer; a replay takes examples of one each")
    plans = plans_of(speculations)
    count_N = np.array([len(anchors) for anchors in batches.anchors])
    start_N = np.cumsum(count_N) - count_N
    tokens = max((speculation.lookup for speculation in speculations), default=0)
    ahead = 1 + max(speculation.window for speculation in speculations)
    lookup = lookup_table(batches, tokens, ahead, store_S) if tokens else None
    if not plans:
        return Tables({}, start_N, count_N, lookup)
    found: list[Table] | None = None
    for step in range(batches.steps_of_epochs(1)):  # epoch 0 holds every example once
        batch = batches.at(step)
        cached = None if features is None else tuple(features.at(step, batch))
        given = sharding.place((batch, cached))
        tables = sharding.fetch(read_batch(drafter, target_params, *given, config=config, plans=plans))
        if found is None:
            found = jax.tree.map(lambda x: np.zeros((count_N.sum(), *x.shape[2:]), x.dtype), list(tables))
        for b, members in enumerate(batches.members(step)):
            m = 0
            for i in members:
                for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(tables), strict=True):
                    whole[start_N[i] : start_N[i] + count_N[i]] = part[b, m : m + count_N[i]]
                m += count_N[i]
    assert found is not None  # batches hold at least one example
    return Tables(dict(zip(plans, jax.device_put(found), strict=True)), start_N, count_N, lookup)


def simulate(tables: Tables, speculation: Speculation, cost_table: CostTable | None = None) -> Replayed:
    """Simulates the rounds of all answers, from tables that hold the drafts of this mode; see `replay_all`."""
    cost_table = _check_cost_table(speculation, cost_table)
    table = _table_of(tables, speculation)
    if table is None:
        raise UserError(f"the tables were not made for {speculation}")
    counts = jnp.asarray(tables.start_N, jnp.int32), jnp.asarray(tables.count_N, jnp.int32)
    found = Replayed(*jax.device_get(_rounds(table, *counts, cost_table, speculation=speculation)))
    return found if cost_table else found._replace(cost_N=np.full(len(tables.count_N), np.nan))


def _table_of(tables: Tables, speculation: Speculation) -> Table | LookupTable | MixedTable | None:
    """The drafts that a mode is replayed from; None if the tables lack them."""
    drafted = next((table for plan, table in tables.of.items() if plan.holds(speculation)), None)
    if not speculation.lookup:
        return drafted
    lookup = tables.lookup
    if lookup is None or lookup.token_AxN.shape[1] < speculation.lookup:
        return None
    if lookup.text_AxK1.shape[1] <= speculation.window or (drafted is None and speculation.needs_drafter):
        return None
    return MixedTable(lookup, drafted) if isinstance(drafted, CandidateTable) else lookup


def _check_cost_table(speculation: Speculation, cost_table: CostTable | None) -> CostTable | None:
    """The cost table for 0..N verified tokens, N the mode's maximum. Raises UserError if it is missing or too short."""
    if cost_table is None:
        if speculation.adaptive:
            raise UserError("adaptive windows decide by a cost table, but none is given")
        return None
    N1 = speculation.verified + 1
    if len(cost_table.verify_N1) < N1:
        held = len(cost_table.verify_N1) - 1
        rule = f"of verifying 0..{held} drafted tokens, but {speculation.verified} may be verified"
        raise UserError(f"the cost table holds costs {rule}")
    return cost_table._replace(verify_N1=cost_table.verify_N1[:N1])


class _Round(NamedTuple):
    """One round of each answer, [N] each: draft steps, verified drafts, accepted ones, the most that could be accepted,
    and the sum of the drafts' path probabilities.
    """

    steps_N: Array
    drafted_N: Array
    accepted_N: Array
    depth_N: Array
    expected_N: Array


@functools.partial(jax.jit, static_argnames=("speculation",))
def _rounds(
    table: Table | LookupTable | MixedTable,
    start_N: Array,
    count_N: Array,
    cost_table: CostTable | None,
    *,
    speculation: Speculation,
) -> tuple[Array, ...]:
    """Simulates all answers, each deciding by itself, until the longest is finished: the fields of `Replayed`."""
    one_round = lookup_round if speculation.lookup else _drafter_round
    N, K1 = len(count_N), speculation.window + 1
    none_N, free_N = jnp.zeros(N, jnp.int32), jnp.zeros(N)

    def body(carry):
        sums, known = carry
        at_N = sums[0]
        live_N = at_N < count_N
        here = jax.tree.map(lambda x: x[start_N + jnp.minimum(at_N, count_N - 1)], table)
        (steps_N, drafted_N, accepted_N), known = one_round(here, speculation, known, cost_table)
        cost_N = cost_table.of_round(steps_N, drafted_N) if cost_table else free_N
        gained_N = jnp.minimum(accepted_N + 1, count_N - at_N)
        accepted_NxK1 = jax.nn.one_hot(accepted_N, K1, dtype=jnp.int32)

        def add(total, x):
            return total + jnp.where(live_N.reshape(-1, *[1] * (total.ndim - 1)), x, 0)

        new = gained_N, none_N + 1, drafted_N, steps_N, cost_N, accepted_NxK1
        return tuple(map(add, sums, new)), known

    nothing = none_N, none_N, none_N, none_N, free_N, jnp.zeros((N, K1), jnp.int32)
    start = Statistics(AcceptanceStats.start(N), Sources.start(N))
    return jax.lax.while_loop(lambda carry: (carry[0][0] < count_N).any(), body, (nothing, start))[0]


def _drafter_round(
    here: Table, speculation: Speculation, known: Statistics, cost_table: CostTable | None
) -> tuple[Counts, Statistics]:
    """As `lookup_round`, of chains and trees."""
    if isinstance(here, ChainTable):
        found = _chain_round(here, speculation, known.stats, cost_table)
    else:
        assert isinstance(here, TreeTable)
        found = _tree_round(here, speculation, known.stats, cost_table)
    if speculation.adaptive:
        cost_N = cost_table.of_round(found.steps_N, found.drafted_N)
        stats = update(known.stats, found.accepted_N, found.steps_N, found.depth_N, found.expected_N, cost_N)
        known = known._replace(stats=stats)
    return (found.steps_N, found.drafted_N, found.accepted_N), known


def _chain_round(
    here: ChainTable, speculation: Speculation, stats: AcceptanceStats, cost_table: CostTable | None
) -> _Round:
    logp_NxK = here.logp_AxK[:, : speculation.window]
    steps_N = _steps(speculation, stats, cost_table, lambda s: logp_NxK[:, s - 1 : s])
    taken_NxK = jnp.arange(speculation.window) < steps_N[:, None]
    expected_N = jnp.where(taken_NxK, jnp.exp(logp_NxK), 0.0).sum(-1)
    return _Round(steps_N, steps_N, jnp.minimum(here.accepted_A, steps_N), steps_N, expected_N)


def _tree_round(
    here: TreeTable, speculation: Speculation, stats: AcceptanceStats, cost_table: CostTable | None
) -> _Round:
    N = speculation.shape.nodes
    steps_N = _steps(speculation, stats, cost_table, lambda s: here.frontier_AxKxX[:, s - 1])

    def drafted(x_NxKxX: Array) -> Array:
        """Values after the levels that were drafted."""
        last_N = jnp.maximum(steps_N - 1, 0)
        return jnp.take_along_axis(x_NxKxX, last_N[:, None, None], 1)[:, 0]

    best_NxN = drafted(here.best_AxKxN)[:, :N]
    nodes_N = jnp.full_like(steps_N, N)
    if speculation.adaptive:
        nodes_N = kept(stats, speculation.adaptive, cost_table.verify_N1, best_NxN)
        nodes_N = jnp.where(steps_N > 0, jnp.minimum(nodes_N, (best_NxN > -jnp.inf).sum(-1)), 0)
    kept_NxN = jnp.arange(N) < nodes_N[:, None]
    depth_N = jnp.where(kept_NxN, drafted(here.level_AxKxN)[:, :N], 0).max(-1)
    expected_N = jnp.where(kept_NxN, jnp.exp(best_NxN), 0.0).sum(-1)
    accepted_N = (drafted(here.rank_AxKxK) < nodes_N[:, None]).sum(-1)  # parents come before their children
    return _Round(steps_N, nodes_N, accepted_N, depth_N, expected_N)


def _steps(speculation: Speculation, stats: AcceptanceStats, cost_table: CostTable | None, logp_NxX) -> Array:
    """[N]: draft steps of a round. logp_NxX: steps made -> log-probabilities of the paths the next one would extend."""
    K = speculation.window
    if not speculation.adaptive:
        return jnp.full(stats.cooldown_B.shape, K, jnp.int32)
    going_N, steps_N = stats.drafts_B, jnp.zeros(stats.cooldown_B.shape, jnp.int32)
    for s in range(K):
        if s:
            price = cost_table.of_step(s, widens=speculation.shape is None)
            going_N &= continues(stats, speculation.adaptive, price, logp_NxX(s))
        steps_N += going_N
    return steps_N
