"""Trees of two sources: merged as if written by hand, lossless by enumeration, and worth their cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated_trees import V, emitted_law

from ppow_jax.speculation import mixture
from ppow_jax.speculation.adaptive import AcceptanceStats, CostTable, Stopping
from ppow_jax.speculation.ngram import LONGEST, Counts, Match, log_chances
from ppow_jax.speculation.sources import NAMES, Sources
from ppow_jax.speculation.tree import ABSENT, Candidates, TreeShape

SHAPE, N, RULE = TreeShape(2, 3, 6), 4, Stopping()
DEPTH = max(SHAPE.depth, N)


def drafted(rng) -> Candidates:
    """Random candidates of one row, as `draft_candidates` makes them: two children of the best two of each level."""
    logp, token, parent, beams = [], [], [], [(0, 0.0)]
    for _ in range(SHAPE.depth):
        level = []
        for place, above in beams:
            for t in rng.choice(V, SHAPE.branch, replace=False):
                logp.append(above + np.log(rng.uniform(0.1, 0.6)))
                token.append(t), parent.append(place)
                level.append((len(logp), logp[-1]))
        beams = sorted(level, key=lambda node: -node[1])[: SHAPE.branch]
    return Candidates(*(jnp.asarray([x]) for x in (logp, token, parent)), jnp.array([SHAPE.depth]))


def paths_of(tokens, parents) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*found[parent], int(token)) if parent != ABSENT else ())
    return found[1:]


@jax.jit
def _merged(candidates: Candidates, match: Match, calibration_B, nodes_B):
    log_q_BxN = log_chances(Counts.start(1), match)
    return mixture.merge(candidates, match, log_q_BxN, calibration_B, SHAPE, DEPTH, lambda _: nodes_B, 0 * nodes_B)


def merged(candidates: Candidates, match: Match, trust: float = 1.0, nodes: int = SHAPE.nodes):
    """The merged tree of one row."""
    match = Match(match.matched_B.astype(jnp.int32), match.token_BxN.astype(jnp.int32))
    return _merged(candidates, match, jnp.array([trust]), jnp.array([nodes]))


def plainly(candidates: Candidates, match: Match, trust: float) -> dict[tuple[int, ...], tuple[float, str]]:
    """Probability and source of each path."""
    logp, token, parent = (np.asarray(x[0]) for x in candidates[:3])
    mine = {path: min(trust * np.exp(p), 1.0) for path, p in zip(paths_of(token, parent), logp, strict=True)}
    found = {path: (p, "drafter") for path, p in mine.items()}
    log_q_N = np.asarray(log_chances(Counts.start(1), match)[0])
    above = own = 1.0
    for i in range(N if int(match.matched_B[0]) else 0):
        path = tuple(match.token_BxN[0, : i + 1].tolist())
        rate, source = np.exp(log_q_N[i] - (log_q_N[i - 1] if i else 0.0)), "ngram"
        if path in mine:
            rate, own, source = 1 - (1 - mine[path] / own) * (1 - rate), mine[path], "both"
        above *= rate
        found[path] = above, source
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_merged_tree_holds_the_likeliest_paths_of_both(seed):
    rng = np.random.default_rng(seed)
    candidates, trust = drafted(rng), float(rng.uniform(0.5, 1.5))
    match = Match(jnp.array([seed % 4 and int(rng.integers(1, LONGEST))]), jnp.asarray(rng.integers(0, V, (1, N))))
    every = plainly(candidates, match, trust)
    best = sorted(every, key=lambda path: -every[path][0])[: SHAPE.nodes]
    draft = merged(candidates, match, trust)
    parent_N = draft.tree.parent_BxN[0].tolist()
    assert all(p <= n for n, p in enumerate(parent_N)) and ABSENT not in parent_N
    found = paths_of(draft.tree.token_BxN[0].tolist(), parent_N)
    assert sorted(found) == sorted(best)  # each path once
    for n, path in enumerate(found):
        p, source = every[path]
        assert float(draft.tree.logp_BxN[0, n]) == pytest.approx(np.log(p), abs=1e-5)
        assert NAMES[int(draft.source_BxN[0, n]) - 1] == source
        assert (float(draft.drafter_logp_BxN[0, n]) > -np.inf) == (source != "ngram")
        assert int(draft.tree.depth_BxN1[0, n + 1]) == len(path)


def test_agreement_and_each_source_occur():
    """Otherwise the test above would show little."""
    seen = {name: 0 for name in NAMES}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        match = Match(jnp.array([3]), jnp.asarray(rng.integers(0, V, (1, N))))
        for source in merged(drafted(rng), match).source_BxN[0].tolist():
            seen[NAMES[source - 1]] += 1
    assert min(seen.values()) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_the_text_of_a_merged_tree_has_the_targets_distribution(seed):
    rng = np.random.default_rng(seed)
    table = {}

    def p_of(prefix):
        return table.setdefault(prefix, rng.dirichlet(np.ones(V) * 0.7))

    candidates = drafted(rng)
    follow = int(jnp.argmax(candidates.logp_BxC[0, :2]))  # begins as one of the drafter's paths
    tokens_N = rng.integers(0, V, N)
    tokens_N[0] = int(candidates.token_BxC[0, follow])
    draft = merged(candidates, Match(jnp.array([2]), jnp.asarray(tokens_N[None])), nodes=5)
    assert {2, 3} & set(draft.source_BxN[0].tolist())
    want = np.zeros((V,) * 3)
    for text in np.ndindex(*want.shape):
        want[text] = np.prod([p_of(text[:i])[text[i]] for i in range(3)])
    with jax.enable_x64(True):
        law = emitted_law(draft.tree.token_BxN[0].tolist(), draft.tree.parent_BxN[0].tolist(), p_of)
    assert np.abs(law - want).max() < 1e-9


def cost_table(step: float, verify: float) -> CostTable:
    return CostTable.of(step, 1 + verify * np.arange(SHAPE.nodes + 1))


def runs(
    match: Match, found: Sources | None = None, price: CostTable | None = None, stats: AcceptanceStats | None = None
) -> bool:
    """True if the drafter drafts."""
    found, price, stats = found or Sources.start(1), price or cost_table(0.1, 0.02), stats or AcceptanceStats.start(1)
    log_q_BxN, live_B = log_chances(found.counts, match), jnp.array([True])
    alone_B = mixture.worth(stats, found, RULE, price, log_q_BxN, live_B)
    go_on = mixture.decisions(stats, found, RULE, price, SHAPE, log_q_BxN, alone_B, ~live_B)
    return bool(go_on(0, jnp.zeros((1, 1)))[0])


def match_of(*matched: int) -> Match:
    return Match(jnp.array(matched), jnp.ones((len(matched), N), jnp.int32))


def test_the_drafter_runs_where_it_knows_more_than_the_lookup():
    certain = Sources.start(1).replace(counts=Counts(jnp.full((1, LONGEST), 99.0), jnp.full((1, LONGEST), 100.0)))
    assert runs(match_of(0)) and runs(match_of(1)) and not runs(match_of(LONGEST), certain)
    assert runs(match_of(LONGEST), certain, cost_table(0.0, 0.0))  # costs nothing
    assert not runs(match_of(3), price=cost_table(0.6, 0.02))
    assert runs(match_of(LONGEST), certain.replace(idle_B=jnp.array([mixture.LONGEST_IDLE])))  # to be judged anew
    assert not runs(match_of(0), stats=AcceptanceStats.start(1).replace(cooldown_B=jnp.array([3])))


def test_the_lookup_verifies_what_is_worth_its_cost():
    def count(match: Match, verify: float, rule: Stopping = RULE) -> list[int]:
        B = len(match.matched_B)
        log_q_BxN = log_chances(Counts.start(B), match)
        price, live_B = cost_table(0.1, verify), jnp.ones(B, bool)
        return mixture.worth(AcceptanceStats.start(B), Sources.start(B), rule, price, log_q_BxN, live_B).tolist()

    assert count(match_of(LONGEST), 0.1) == [N] and count(match_of(LONGEST), 1.0) == [0]
    assert count(match_of(0), 0.0) == [0]
    assert count(match_of(1), 0.15) == [1]  # 0.23 and 0.13
    assert count(match_of(LONGEST, 0), 0.1) == [N, 0]  # decided together, by the mean of both
    assert count(match_of(LONGEST, 0, 0, 0), 0.3) == [0] * 4
    assert count(match_of(3), 0.0, Stopping("threshold", 0.4)) == [2]  # 0.67, 0.49; 0.37 is below


def test_the_drafter_is_credited_with_what_the_lookup_misses():
    """Both sources drafted 5; the drafter alone drafted 6 after it, the lookup 7. The target draws 5, 6, 9."""
    candidates = Candidates(
        jnp.log(jnp.array([[0.5, 0.3, *[0.4] * 4, *[0.1] * 4]])),
        jnp.array([[5, 4, 6, 8, 1, 2, 0, 1, 2, 3]]),
        jnp.array([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]),
        jnp.array([2]),
    )
    candidates = candidates._replace(logp_BxC=candidates.logp_BxC.at[0, 6:].set(-jnp.inf))
    match = Match(jnp.array([2]), jnp.array([[5, 7, 7, 7]]))
    draft = merged(candidates, match)._replace(alone_B=jnp.array([2]))
    tokens, sources = draft.tree.token_BxN[0].tolist(), draft.source_BxN[0].tolist()
    assert (tokens[0], sources[0]) == (5, 3) and 6 in tokens and (7, 2) in zip(tokens, sources, strict=True)
    index_BxK1 = jnp.array([[0, 1, 1 + tokens.index(6), 1 + tokens.index(6), 1 + tokens.index(6)]])
    price, live_B = cost_table(0.1, 0.05), jnp.array([True])
    settled = jnp.array([[5, 6, 9, 9, 9]]), index_BxK1, jnp.array([2])
    stats, found = mixture.settle(AcceptanceStats.start(1), Sources.start(1), draft, *settled, price, live_B)
    assert found.accepted_BxS.tolist() == [[1, 0, 1]]
    assert found.drafted_BxS.tolist() == [[sources.count(1), sources.count(2), 1]]
    round_cost = 0.2 + 1 + 0.05 * SHAPE.nodes
    assert float(found.tokens_B[0]) == pytest.approx(0.9 + 3)
    assert float(found.cost_B[0]) == pytest.approx(0.9 + round_cost)
    assert float(stats.tokens_B[0]) == pytest.approx(0.9 + 2)  # the lookup alone: 5, then the target's 6
    assert float(stats.cost_B[0]) == pytest.approx(0.9 + 1 + round_cost - 1.1)
    assert float(stats.accepted_B[0]) == pytest.approx(0.9 + 2)
    mine = [draft.drafter_logp_BxN[0, n] for n, source in enumerate(sources) if source & 1]
    assert float(stats.expected_B[0]) == pytest.approx(0.9 + float(jnp.exp(jnp.array(mine)).sum()))
    _, done = mixture.settle(AcceptanceStats.start(1), Sources.start(1), draft, *settled, price, ~live_B)
    assert done.accepted_BxS.sum() == 0 and float(done.tokens_B[0]) == 1
