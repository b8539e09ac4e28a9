"""The replay counts what decoding counts, round by round, in every mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
import suites
import twelve_tokens as world
from twelve_tokens import CHEAP, DEAR, FREE, GREEDY, LAYERED

from ppow_jax.corpus.features import FeatureStore
from ppow_jax.data.batches import Batches
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.evaluation.replay import Replayed, read_tables, replay, replay_all, simulate
from ppow_jax.evaluation.replay_tables import plans_of
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable, Stopping
from ppow_jax.speculation.settings import adaptive, adaptive_tree, chain, mixture, ngram, off, tree

N, LONGEST, ROW = 24, 90, 256  # answers that are long enough for drafting to rest and to try again
CONFIG = dataclasses.replace(world.CONFIG, eos_token_ids=(2,))  # a token that ends some answers, not most
PARAMS = world.PARAMS
WAYS = [chain(4), tree(3, 3, 10), tree(3, 2, 5), tree(2, 4, 14)]  # two of them from the same drafts
ADAPTIVE = [adaptive(4), adaptive_tree(3, 3, 10)]
LOOKUP = [mixture(3, 3, 10, 5), ngram(4)]
PRICES = [(FREE, FREE), (CHEAP, 0.02), (0.1, CHEAP), (DEAR, DEAR)]


def cost_table_of(step: float, token: float, N: int = 14) -> CostTable:
    """token: of verifying one more of up to N drafts."""
    return CostTable.of(step, 1 + token * np.arange(N + 1))


@functools.cache
def examples() -> list[Example]:
    """The target's greedy answers of at most LONGEST tokens."""
    prompt_NxP, prompt_N, _ = (x[:N] for x in world.prompts())
    L = generate.cache_length(world.P, LONGEST, 0)
    keys = jax.random.split(jax.random.key(0), N)
    begin = (jnp.asarray(x) for x in (prompt_NxP, prompt_N, prompt_N + LONGEST))
    state = generate.prefill(PARAMS, CONFIG, None, *begin, keys, K=0, sampling=GREEDY, L=L)
    state = generate.decode(PARAMS, CONFIG, None, state, LONGEST, speculation=off(), sampling=GREEDY)
    ends = zip(np.asarray(state.tokens_BxL), prompt_N, np.asarray(state.length_B), strict=True)
    found = [Example(tokens[:end], np.arange(end) >= start, f"answer {start}") for tokens, start, end in ends]
    return [example for example in found if example.answer_mask.sum() > 1]


@functools.cache
def batches() -> Batches:
    return Batches(examples(), seed=3, batch_size=2, row_length=ROW, max_anchors=ROW - 8)


def decoded(
    params, config, drafter, examples, speculation, cost_table=None, longest=LONGEST, store_S=None
) -> Replayed:
    """Counts of decoding at batch 1; the drafts that it accepts behind an answer's end are left out."""
    K = speculation.window
    P = max(int((~example.answer_mask).sum()) for example in examples)
    if cost_table is not None:
        cost_table = cost_table._replace(verify_N1=cost_table.verify_N1[: speculation.verified + 1])
    found = []
    for example in examples:
        start, end = int((~example.answer_mask).sum()), len(example.tokens)
        prompt_1xP = np.zeros((1, P), np.int32)
        prompt_1xP[0, :start] = example.tokens[:start]
        begin = prompt_1xP, np.array([start]), np.array([start + longest]), jax.random.split(jax.random.key(0), 1)

        def run(rounds, begin=begin):
            L = generate.cache_length(P, longest, K)
            state = generate.prefill(params, config, drafter, *map(jnp.asarray, begin), K=K, sampling=GREEDY, L=L)
            how = {"speculation": speculation, "sampling": GREEDY, "cost_table": cost_table}
            state = generate.decode(params, config, drafter, state, rounds, **how, store_S=store_S)
            read = state.tokens_BxL, state.length_B, state.histogram_BxK1, state.drafted_B
            return [np.array(x)[0] for x in read]

        tokens, length, histogram_K1, drafted = run(10_000)
        np.testing.assert_array_equal(tokens[:length], example.tokens)
        rounds = histogram_K1.sum()
        _, before, earlier_K1, _ = run(rounds - 1)
        assert earlier_K1.sum() == rounds - 1
        last = min(int((histogram_K1 - earlier_K1).argmax()), end - before)
        earlier_K1[last] += 1
        found.append((length - start - 1, rounds, drafted, 0, 0.0, earlier_K1))
    return Replayed(*(np.array(x) for x in zip(*found, strict=True)))


def assert_equal(found: Replayed, wanted: Replayed) -> None:
    for name in ("tokens_N", "rounds_N", "drafted_N", "accepted_NxK1"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)


def test_the_answers_are_what_they_are_meant_to_be():
    lengths = np.array([example.answer_mask.sum() for example in batches().examples])
    ended = np.array([example.tokens[-1] == 2 for example in batches().examples])
    assert 3 < ended.sum() < len(ended) - 3 and (lengths[~ended] == LONGEST).all() and lengths[ended].min() < 40
    assert batches().steps_of_epochs(1) > 1 and max(map(len, batches().members(0))) > 2  # rows of several answers


@pytest.mark.parametrize("made", suites.keep([(True, 2)], [(True, 1), (True, 2)]), ids=str)
def test_windows_of_one_size_are_those_of_decoding(made):
    drafter = world.drafter(*made)
    ways = WAYS if made == (True, 1) else WAYS[:2]
    for way, found in zip(ways, replay_all(drafter, PARAMS, CONFIG, batches(), ways), strict=True):
        wanted = decoded(PARAMS, CONFIG, drafter, batches().examples, way)
        assert_equal(found, wanted)
        assert (wanted.accepted_NxK1.sum(0)[:2] > 10).all()  # a fair sample
        np.testing.assert_array_equal(found.steps_N, way.window * found.rounds_N)
        assert np.isnan(found.cost_N).all() and found.tau == wanted.tokens_N.sum() / wanted.rounds_N.sum()


@pytest.mark.parametrize("made", suites.keep([(True, 2)], [(True, 1), (True, 2), (False, LAYERED)]), ids=str)
def test_adaptive_windows_are_those_of_decoding(made):
    drafter = world.drafter(*made)
    table = PRICES if made == (True, 1) else PRICES[2:3]
    tables = read_tables(drafter, PARAMS, CONFIG, batches(), ADAPTIVE)
    drafted = {}
    for way in ADAPTIVE:
        for price in table:
            found = simulate(tables, way, cost_table_of(*price))
            assert_equal(found, decoded(PARAMS, CONFIG, drafter, batches().examples, way, cost_table_of(*price)))
            drafted[way, price] = found.drafted_N.sum() / found.rounds_N.sum()
            assert (found.steps_N > 0).all()  # the first is always tried
    if len(table) > 1:  # dearer drafts are fewer
        for way in ADAPTIVE:
            free, cheap, dear, dearest = (drafted[way, price] for price in PRICES)
            assert free > cheap > dear > dearest


@pytest.mark.parametrize("made", suites.keep([(True, 2)], [(True, 1), (True, 2), (False, LAYERED)]), ids=str)
def test_lookups_and_mixtures_are_those_of_decoding(made):
    drafter, ways = world.drafter(*made), LOOKUP if made == (True, 1) else LOOKUP[:1]
    table = PRICES if made == (True, 1) else PRICES[1:2]
    tables = read_tables(drafter, PARAMS, CONFIG, batches(), ways)
    compared = slice(6 if made == (True, 2) else None)
    for way in ways:
        drafted = []
        for price in table:
            found = simulate(tables, way, cost_table_of(*price))
            used = drafter if way.needs_drafter else None
            some = batches().examples[compared]
            wanted = decoded(PARAMS, CONFIG, used, some, way, cost_table_of(*price))
            assert_equal(Replayed(*(x[compared] for x in found)), wanted)
            drafted.append(found.drafted_N.sum() / found.rounds_N.sum())
            assert (found.steps_N.sum() > 0) == way.needs_drafter
            assert (found.accepted_NxK1[:, 2:].sum() > 10) or price[1] == DEAR
        assert drafted == sorted(drafted, reverse=True) and len(set(drafted)) == len(table)  # dearer drafts are fewer


@pytest.mark.full
@pytest.mark.parametrize("way", LOOKUP, ids=["mixture", "ngram"])
def test_lookups_in_earlier_answers_are_those_of_decoding(way):
    drafter, cost_table = world.drafter(True, 1), cost_table_of(*PRICES[1])
    given = drafter, PARAMS, CONFIG
    store_S = np.concatenate([np.full(9, -1, np.int32), *(example.tokens for example in examples()[:3])])
    found = replay(*given, batches(), way, cost_table, store_S=store_S)
    assert_equal(found, decoded(PARAMS, CONFIG, drafter, batches().examples, way, cost_table, store_S=store_S))
    without = replay(*given, batches(), way, cost_table)
    # texts that the store holds; of others most matches are chance, since there are 12 kinds of tokens
    assert found.rounds_N[:3].sum() < without.rounds_N[:3].sum()


@pytest.mark.parametrize(
    ("held", "rounds"),
    [(range(60), 10), (range(40), 25), (range(59, -1, -1), 49), ((), 49)],
    ids=["all", "the first 40 tokens", "another text", "nothing"],
)
def test_a_store_gives_what_it_holds_of_a_text(held, rounds):
    """All tokens of the text differ, so it has no match of its own: each accepted draft is the store's, 4 a round."""
    example = Example(np.arange(60, dtype=np.int32), np.arange(60) >= 10, "a text")
    text = Batches([example], seed=0, batch_size=1, row_length=64, max_anchors=60)
    store_S = np.full(70, -1, np.int32)
    store_S[70 - len(held) :] = held
    found = replay(None, PARAMS, CONFIG, text, ngram(4), cost_table_of(FREE, FREE), store_S=store_S)
    assert (found.tokens_N.item(), found.rounds_N.item()) == (49, rounds)
    right = -(-(49 - rounds) // 4)  # rounds whose drafts are accepted, the last one beyond the end
    np.testing.assert_array_equal(found.accepted_NxK1, [[rounds - right, 0, 0, 0, right]])


@pytest.mark.full
def test_mixtures_of_several_sizes_share_their_drafts():
    drafter, cost_table = world.drafter(True, 1), cost_table_of(0.1, 0.02)
    tables = read_tables(drafter, PARAMS, CONFIG, batches(), [LOOKUP[0], mixture(3, 4, 12, 7)])
    assert len(tables.of) == 1
    alone = replay(drafter, PARAMS, CONFIG, batches(), LOOKUP[0], cost_table)
    assert_equal(simulate(tables, LOOKUP[0], cost_table), alone)


def test_a_replayed_lookup_needs_no_drafter():
    given = PARAMS, CONFIG, batches()
    cost_table = cost_table_of(0.1, 0.02)
    alone = replay(None, *given, ngram(4), cost_table)
    for one, other in zip(alone, replay(world.drafter(True, 1), *given, ngram(4), cost_table), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="a replay of mixture needs a drafter"):
        replay(None, *given, LOOKUP[0], cost_table)
    tables = read_tables(None, *given, [ngram(4)])
    for way in (ngram(5), LOOKUP[0]):
        with pytest.raises(UserError, match="were not made for"):
            simulate(tables, way, cost_table)


@pytest.mark.full
def test_windows_that_a_threshold_ends_are_those_of_decoding():
    stopping = Stopping("threshold", 0.3)
    ways = [adaptive(3, stopping=stopping), adaptive_tree(3, 3, 10, stopping), mixture(3, 3, 10, 5, stopping)]
    drafter, cost_table = world.drafter(True, 1), cost_table_of(0.01, 0.01)
    for way, one in zip(ways, replay_all(drafter, PARAMS, CONFIG, batches(), ways, cost_table), strict=True):
        assert_equal(one, decoded(PARAMS, CONFIG, drafter, batches().examples, way, cost_table))


@pytest.mark.full
def test_a_trained_drafter_of_another_target():
    drafter, params, config = small_world.trained(), small_world.target_params(), small_world.CONFIG
    ways, cost_table = [chain(3), adaptive_tree(3, 4, 12)], cost_table_of(0.05, 0.03)
    found = replay_all(drafter, params, config, small_world.batches(), ways, cost_table)
    for way, one in zip(ways, found, strict=True):
        given = params, config, drafter, small_world.batches().examples, way, cost_table, small_world.ANSWER
        assert_equal(one, decoded(*given))
    assert found[0].tau > 1.3


def test_what_rounds_cost_by_hand():
    cost_table = cost_table_of(0.25, 0.5)
    fixed, ways = chain(4), [chain(4), adaptive(4)]
    found, adapted = replay_all(world.drafter(True, 1), PARAMS, CONFIG, batches(), ways, cost_table)
    np.testing.assert_allclose(found.cost_N, found.rounds_N * (4 * 0.25 + 1 + 4 * 0.5))
    assert found.speedup == pytest.approx(found.tau / 4)
    every_N = adapted.rounds_N + 0.25 * adapted.steps_N + 0.5 * adapted.drafted_N
    np.testing.assert_allclose(adapted.cost_N, every_N, rtol=1e-6)
    assert adapted.speedup > found.speedup and fixed.verified == 4


@pytest.mark.full
def test_how_answers_are_packed_and_who_reads_them_changes_nothing(tmp_path):
    drafter, ways = world.drafter(True, 1), [chain(4), adaptive_tree(3, 3, 10)]
    cost_table = cost_table_of(0.1, 0.05)
    alone = Batches(examples(), seed=5, batch_size=1, row_length=128, max_anchors=100)
    whole = replay_all(drafter, PARAMS, CONFIG, batches(), ways, cost_table)
    for one, other in zip(replay_all(drafter, PARAMS, CONFIG, alone, ways, cost_table), whole, strict=True):
        assert_equal(one, other)
    store = FeatureStore(tmp_path, alone, PARAMS, CONFIG, drafter.config.feature_layers)
    for one, other in zip(replay_all(drafter, PARAMS, CONFIG, alone, ways, cost_table, store), whole, strict=True):
        assert_equal(one, other)
    with pytest.raises(UserError, match="other batches"):
        replay(drafter, PARAMS, CONFIG, batches(), chain(4), features=store)


def test_ways_that_draft_alike_share_their_drafts():
    plans = plans_of([chain(2), adaptive(5), tree(3, 2, 9), adaptive_tree(3, 4, 7), tree(2, 1, 2)])
    assert [(p.depth, p.shape and (p.shape.branch, p.shape.depth, p.shape.nodes)) for p in plans] == [
        (5, None), (4, (3, 4, 9)), (1, (2, 1, 2)),
    ]  # fmt: skip
    assert not any(plan.holds(tree(3, 5, 9)) or plan.holds(chain(6)) for plan in plans)
    mixed = plans_of([tree(3, 2, 9), mixture(3, 2, 9, 7), mixture(3, 4, 5, 2), ngram(4)])
    assert [(p.depth, p.whole) for p in mixed] == [(2, False), (4, True)]  # whose trees are kept whole


def test_what_cannot_be_replayed_is_refused():
    drafter = world.drafter(True, 1)
    refused = functools.partial(replay, drafter, PARAMS, CONFIG)
    with pytest.raises(UserError, match="adaptive windows decide by a cost table"):
        refused(batches(), adaptive(3))
    with pytest.raises(UserError, match=r"verifying 0\.\.2 drafted tokens, but 4 may be verified"):
        refused(batches(), chain(4), cost_table_of(0.1, 0.1, N=2))
    with pytest.raises(UserError, match="window must be at least 1"):
        refused(batches(), off())
    turns = Example(np.arange(8, dtype=np.int32), np.array([0, 1, 1, 0, 0, 1, 1, 1], bool), "dialogue:3")
    with pytest.raises(UserError, match="dialogue:3: holds more than one answer"):
        refused(Batches([turns], seed=0, batch_size=1, row_length=8, max_anchors=8), chain(2))
    with pytest.raises(UserError, match="were not made for"):
        simulate(read_tables(drafter, PARAMS, CONFIG, batches(), [chain(2)]), chain(3))
