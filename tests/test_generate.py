"""Decoding: speculative output is the target's own, whatever the drafter proposes, and stops where it should."""

import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import models
from scipy import stats

from ppow_jax.data.conversations import Message
from ppow_jax.data.encoding import encode_prompt
from ppow_jax.evaluation.loading import load_drafter
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import Prices, Stopping
from ppow_jax.speculation.propose import Draft, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, adaptive, adaptive_tree, chain, off, tree
from ppow_jax.weights import targets

V, N, B, P, NEW = 12, 200, 50, 9, 24  # few tokens, so that random drafters are right now and then
ENDS = (4, 9)  # written often, so that many answers end early
CONFIG = dataclasses.replace(
    models.TARGETS["untied"], vocab_size=V, num_layers=2, max_position_embeddings=256, eos_token_ids=ENDS
)
DRAFTER = DrafterConfig(
    vocab_size=V,
    draft_vocab_size=9,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    target_hidden_size=32,
    feature_layers=(0, 1, 2),
    fc_norm=False,
)
LAYERED = 6  # the seed of a drafter of two layers, narrower than the target, with an embedding of its own
ARMS = [(1, False, 0), (3, True, 1), (3, True, 2), (5, False, 3), (3, False, LAYERED)]  # K, EAGLE-3.1, seed
GREEDY = Sampling()
PARAMS = jax.tree.map(jnp.asarray, models.target_params(CONFIG, seed=5))


@functools.cache
def drafter(fc_norm: bool, seed: int) -> Drafter:
    config = dataclasses.replace(DRAFTER, fc_norm=fc_norm, norm_output=fc_norm, norm_before_residual=fc_norm)
    embed_VxE = None
    if seed == LAYERED:
        config = dataclasses.replace(config, num_layers=2, qk_norm=True, hidden_size=24, own_embed=True)
        embed_VxE = jnp.asarray(models.matrix(np.random.RandomState(seed), V, 24))
    weights = jax.tree.map(jnp.asarray, models.drafter_params(config, seed))
    return Drafter(config, weights, jnp.array([0, 1, 3, 4, 5, 7, 8, 9, 11]), embed_VxE=embed_VxE)


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded prompts [N, P], their lengths, and the total lengths at which they must stop."""
    rng = np.random.default_rng(0)
    length_N = rng.integers(1, P + 1, N)
    prompt_NxP = rng.integers(0, V, (N, P)) * (np.arange(P) < length_N[:, None])
    budget_N = np.where(rng.random(N) < 0.5, NEW, rng.integers(0, NEW, N))
    return prompt_NxP.astype(np.int32), length_N.astype(np.int32), (length_N + budget_N).astype(np.int32)


def prefill(rows, K, drafter_=None, prompt_BxP=None):
    prompt_NxP, length_N, limit_N = prompts()
    prompt_BxP = prompt_NxP[rows] if prompt_BxP is None else prompt_BxP
    begin = (prompt_BxP, length_N[rows], limit_N[rows], jax.random.split(jax.random.key(0), len(rows)))
    L = generate.cache_length(P, NEW, K)
    return generate.prefill(PARAMS, CONFIG, drafter_, *begin, K=K, sampling=GREEDY, L=L)


def decode(rows, K, drafter_=None, prompt_BxP=None):
    state = prefill(rows, K, drafter_, prompt_BxP)
    return generate.decode(PARAMS, CONFIG, drafter_, state, 10_000, speculation=chain(K), sampling=GREEDY)


def answers(state) -> list[list[int]]:
    assert np.asarray(state.done_B).all()
    ends = zip(np.asarray(state.tokens_BxL), np.asarray(state.prompt_B), np.asarray(state.length_B), strict=True)
    return [tokens[start:stop].tolist() for tokens, start, stop in ends]


def batches() -> list[np.ndarray]:
    return np.split(np.arange(N), N // B)


@functools.cache
def endless() -> np.ndarray:
    """Prompts and greedy continuations [N, P + NEW + 8], by a whole forward pass per token; no end tokens."""
    prompt_NxP, length_N, _ = prompts()
    tokens_NxT = jnp.pad(prompt_NxP, ((0, 0), (0, NEW + 8)))
    mask, rows = transformer.causal_mask(N, tokens_NxT.shape[1]), jnp.arange(N)
    position_NxT = jnp.broadcast_to(jnp.arange(tokens_NxT.shape[1]), tokens_NxT.shape)

    def next_token(i, tokens_NxT):
        out = transformer.forward(PARAMS, CONFIG, tokens_NxT, position_NxT, mask)
        last_NxD = out.hidden_BxSxD[rows, length_N - 1 + i]
        return tokens_NxT.at[rows, length_N + i].set(jnp.argmax(transformer.logits(PARAMS, last_NxD), -1))

    return np.asarray(jax.jit(lambda x: jax.lax.fori_loop(0, NEW + 8, next_token, x))(tokens_NxT))


@functools.cache
def expected() -> list[list[int]]:
    """What every row must give: the greedy continuation up to its budget or its first end token."""
    found = []
    for tokens, start, limit in zip(endless().tolist(), *(x.tolist() for x in prompts()[1:]), strict=True):
        answer = tokens[start:limit]
        end = next((i + 1 for i, token in enumerate(answer) if token in ENDS), len(answer))
        found.append(answer[:end])
    return found


def expected_histogram(correct_NxT: np.ndarray, K: int, rows=slice(None)) -> np.ndarray:
    """Accepted lengths per row [., K1] when token t is drafted right in a window from n where correct(n, t)."""
    histograms = []
    for n in np.arange(N)[rows]:
        histogram, start = np.zeros(K + 1, int), prompts()[1][n]
        stop, at = start + len(expected()[n]), start + 1
        while at < stop:
            right = correct_NxT[n, at]
            k = int(np.cumprod(right[:K]).sum())
            histogram[k] += 1
            at += k + 1
        histograms.append(histogram)
    return np.array(histograms)


def test_the_cases_are_what_they_are_meant_to_be():
    lengths = np.array([len(answer) for answer in expected()])
    budgets = prompts()[2] - prompts()[1]
    assert (lengths == 0).any() and (lengths == NEW).any()  # nothing to do; the whole budget
    assert ((lengths < budgets) & (lengths > 0)).sum() > 50  # ended early
    assert len({tuple(answer) for answer in expected()}) > 100


def test_plain_decoding_equals_whole_forward_passes():
    assert [a for rows in batches() for a in answers(decode(rows, 0))] == expected()


@functools.cache
def speculative(K: int, fc_norm: bool, seed: int) -> tuple[list[list[int]], np.ndarray]:
    states = [decode(rows, K, drafter(fc_norm, seed)) for rows in batches()]
    histogram_NxK1 = np.concatenate([np.asarray(state.histogram_BxK1) for state in states])
    return [a for state in states for a in answers(state)], histogram_NxK1


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_speculative_decoding_is_lossless(arm):
    assert speculative(*arm)[0] == expected()


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_histogram_accounts_for_every_token(arm):
    found, histogram_NxK1 = speculative(*arm)
    K = arm[0]
    gained_N = (histogram_NxK1 * np.arange(1, K + 2)).sum(1)
    owed_N = np.array([max(len(answer) - 1, 0) for answer in found])  # the prefill gave the first one
    cut_N = gained_N - owed_N  # accepted past the end of the answer
    assert (cut_N >= 0).all() and (cut_N <= K).all()
    assert (histogram_NxK1.sum(1)[owed_N == 0] == 0).all()
    assert (histogram_NxK1.sum(0)[: min(K, 3) + 1] > 0).all()  # random drafters are right now and then


# ---------------------------------------------------------------- trees and adaptive windows


def prices_of(price: float, speculation: Speculation) -> Prices:
    """price: of a draft step, and of verifying one more token."""
    return Prices.of(price, 1 + price * np.arange(speculation.verified + 1))


@functools.cache
def with_mode(speculation: Speculation, seed: int = 1, price: float | None = None):
    """(answers, histogram_NxK1, drafted_N) of all prompts. price: see `prices_of`."""
    found, histogram, drafted = [], [], []
    made = drafter(True, seed)
    for rows in batches():
        state = prefill(rows, speculation.window, made)
        prices = None if price is None else prices_of(price, speculation)
        state = generate.decode(
            PARAMS, CONFIG, made, state, 10_000, speculation=speculation, sampling=GREEDY, prices=prices
        )
        found += answers(state)
        histogram.append(np.asarray(state.histogram_BxK1)), drafted.append(np.asarray(state.drafted_B))
    return found, np.concatenate(histogram), np.concatenate(drafted)


FREE, CHEAP, DEAR = 0.0, 0.05, 1.0


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 3, 10), (2, 4, 14), (4, 1, 3)], ids=str)
def test_trees_are_lossless(shape):
    found, histogram_NxK1, drafted_N = with_mode(tree(*shape))
    assert found == expected()
    assert (histogram_NxK1.sum(0)[:3] > 0).all() or shape[1] == 1
    np.testing.assert_array_equal(drafted_N, shape[2] * histogram_NxK1.sum(1))


def test_a_tree_of_one_branch_is_the_chain():
    np.testing.assert_array_equal(with_mode(tree(1, 3, 3))[1], speculative(3, True, 1)[1])


def test_a_tree_that_holds_the_chain_accepts_no_less():
    """All that the chain drafts and more: what a round gains can only grow."""
    chained = np.asarray(speculative(3, True, 1)[1]).sum(0)
    branched = with_mode(tree(9, 3, 9 + 81 + 81))[1].sum(0)  # everything that it drafts, the argmax path among it
    mean = [np.dot(h, np.arange(4)) / h.sum() for h in (chained, branched)]
    assert mean[1] > mean[0] + 0.2


@pytest.mark.parametrize("price", [FREE, CHEAP, DEAR], ids=["free", "cheap", "dear"])
def test_adaptive_windows_are_lossless(price):
    assert with_mode(adaptive(3), price=price)[0] == expected()


def test_an_adaptive_window_weighs_costs():
    free, cheap, dear = (with_mode(adaptive(3), price=price) for price in (FREE, CHEAP, DEAR))
    np.testing.assert_array_equal(free[1], speculative(3, True, 1)[1])  # always the whole window
    rounds_N, asked_N = free[1].sum(1), np.minimum(free[1].sum(1), 1)
    np.testing.assert_array_equal(free[2], 3 * rounds_N)
    assert (dear[2].sum() < cheap[2].sum() < 3 * cheap[1].sum()) and (dear[2] >= asked_N).all()
    long_N = dear[1].sum(1) >= 10
    assert long_N.any() and (dear[2][long_N] < dear[1].sum(1)[long_N]).all()  # some rounds drafted nothing


ADAPTIVE_TREE = adaptive_tree(3, 3, 10)


@pytest.mark.parametrize("price", [FREE, CHEAP, DEAR], ids=["free", "cheap", "dear"])
def test_adaptive_trees_are_lossless(price):
    assert with_mode(ADAPTIVE_TREE, price=price)[0] == expected()


def test_an_adaptive_tree_weighs_costs():
    fixed = with_mode(tree(3, 3, 10))
    free, cheap, dear = (with_mode(ADAPTIVE_TREE, price=price) for price in (FREE, CHEAP, DEAR))
    np.testing.assert_array_equal(free[1], fixed[1])  # always the whole tree
    np.testing.assert_array_equal(free[2], fixed[2])
    assert dear[2].sum() < cheap[2].sum() < free[2].sum()
    assert cheap[1].sum() > free[1].sum()  # more rounds, smaller ones


@pytest.mark.parametrize("way", [adaptive(3), ADAPTIVE_TREE], ids=["chain", "tree"])
def test_rounds_without_drafts_leave_no_gap_in_the_drafters_cache(way):
    """After any number of resting rounds, keys and features are those of a row that never rested."""
    rows, made = batches()[0], drafter(True, 1)
    how = {"speculation": way, "sampling": GREEDY, "prices": prices_of(CHEAP, way)}
    state = prefill(rows, 3, made)
    resting = state.replace(pace=state.pace.replace(rest_B=jnp.full(B, 7)))
    resting = generate.decode(PARAMS, CONFIG, made, resting, 7, **how)
    plain = prefill(rows, 0)
    plain = generate.decode(PARAMS, CONFIG, None, plain, 7, speculation=off(), sampling=GREEDY)
    np.testing.assert_array_equal(resting.tokens_BxL[:, : plain.tokens_BxL.shape[1]], plain.tokens_BxL)
    going = ~np.asarray(resting.done_B)
    assert going.any() and (np.asarray(resting.drafted_B) == 0).all()
    assert (np.asarray(resting.pending_B)[going] > 1).all()  # gathered, then written together
    found, fresh = drafted_after(resting, made)
    np.testing.assert_allclose(found[going], fresh[going], rtol=2e-4, atol=2e-4)
    assert answers(generate.decode(PARAMS, CONFIG, made, resting, 10_000, **how)) == expected()[:B]


def drafted_after(state, made):
    """The drafter's keys of all indices that the next round sees, from the state and from a pass over its tokens."""
    chain_state, _ = generate.draft_window(PARAMS, made, state, chain(3), GREEDY)
    tokens_BxL, L = state.tokens_BxL, state.tokens_BxL.shape[1]
    position_BxL = jnp.broadcast_to(jnp.arange(L), tokens_BxL.shape)
    mask, layers = transformer.causal_mask(*tokens_BxL.shape), DRAFTER.feature_layers
    out = transformer.forward(PARAMS, CONFIG, tokens_BxL, position_BxL, mask, feature_layers=layers)
    g_BxLxE, next_BxL = drafting.fuse(made, out.features_BxSxF), jnp.roll(tokens_BxL, -1, 1)
    (kv,) = drafting.prefix_keys(made, g_BxLxE, made.embed(PARAMS["embed"], next_BxL), position_BxL, mask)
    seen_BxL = np.arange(L) < np.asarray(state.length_B)[:, None] - 1
    keys = (np.asarray(x.k_BxKvxdxL) for x in (*chain_state.drafter_kv, kv))
    return [np.where(seen_BxL[:, None, None], x, 0.0) for x in keys]


@pytest.mark.parametrize("widest", [adaptive(3), ADAPTIVE_TREE], ids=["chain", "tree"])
def test_a_threshold_on_the_chance_is_lossless_and_shortens(widest):
    ways = [dataclasses.replace(widest, adaptive=Stopping("threshold", t)) for t in (1e-6, 0.3, 0.9)]
    made = [with_mode(way, price=FREE) for way in ways]
    assert all(found == expected() for found, _, _ in made)
    low, middle, high = ((drafted_N / histogram_NxK1.sum(1).clip(1)).mean() for _, histogram_NxK1, drafted_N in made)
    assert high < middle < low


@functools.cache
def draft_everywhere(K: int):
    """(drafter, tokens_NxT) -> [N, T, K]: drafts after every prefix, from one pass over the finished text."""

    def run(drafter_, tokens_NxT):
        T = tokens_NxT.shape[1]
        position_NxT = jnp.broadcast_to(jnp.arange(T), (N, T))
        mask = transformer.causal_mask(N, T)
        layers = DRAFTER.feature_layers
        out = transformer.forward(PARAMS, CONFIG, tokens_NxT, position_NxT, mask, feature_layers=layers)
        g_NxTxE = drafting.fuse(drafter_, out.features_BxSxF)
        next_NxT = jnp.roll(tokens_NxT, -1, 1)
        embed_NxTxE = drafter_.embed(PARAMS["embed"], next_NxT)
        kv = drafting.prefix_keys(drafter_, g_NxTxE, embed_NxTxE, position_NxT, mask)
        keys, prefix = jax.random.split(jax.random.key(0), N), [Prefix(kv, mask)]
        draft = propose(drafter_, PARAMS["embed"], g_NxTxE, next_NxT, position_NxT, prefix, K, GREEDY, keys)
        return draft.token_BxMxK

    return jax.jit(run)


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_drafts_from_the_cache_are_those_of_a_fresh_start(arm):
    """Otherwise the output would still be right, and only the acceptance lower."""
    K, tokens_NxT = arm[0], endless()
    T = tokens_NxT.shape[1]
    draft_NxTxK = np.asarray(draft_everywhere(K)(drafter(*arm[1:]), tokens_NxT))
    correct_NxTxK = np.zeros((N, T, K), bool)
    for at in range(2, T - K):  # the window whose first token is x_at has its anchor at - 2
        correct_NxTxK[:, at] = draft_NxTxK[:, at - 2] == tokens_NxT[:, at : at + K]
    np.testing.assert_array_equal(speculative(*arm)[1], expected_histogram(correct_NxTxK, K))


def test_every_accepted_length_commits_the_right_tokens():
    """Drafts copied from the answer, with mistakes at a rate that differs from row to row, from none to always."""
    rows, K = batches()[0], 4
    truth_BxT = endless()[rows]
    rng = np.random.default_rng(1)
    wrong_BxT = rng.random(truth_BxT.shape) < np.linspace(0, 1, B)[:, None]
    offered_BxT = jnp.asarray(np.where(wrong_BxT, (truth_BxT + 1) % V, truth_BxT))

    def copied(drafter, embed, g, root, position_BxM, prefix, K, sampling, key_B):
        token_BxK = jnp.take_along_axis(offered_BxT, position_BxM + 2 + jnp.arange(K), 1)
        return Draft(token_BxK[:, None], None, None, None)

    made, plain = drafter(False, 0), generate.decode.__wrapped__
    with mock.patch.object(generate, "propose", copied):
        run = jax.jit(lambda state: plain(PARAMS, CONFIG, made, state, 10_000, speculation=chain(K), sampling=GREEDY))
        state = run(prefill(rows, K, made))
    assert answers(state) == expected()[:B]
    correct_BxTxK = np.stack([~np.roll(wrong_BxT, -j, 1) for j in range(K)], -1)
    histogram = expected_histogram(correct_BxTxK, K, slice(0, B))
    np.testing.assert_array_equal(state.histogram_BxK1, histogram)
    assert (histogram.sum(0) > 0).all()


def test_a_row_depends_neither_on_its_neighbours_nor_on_its_place():
    made = drafter(True, 1)
    rng = np.random.default_rng(2)
    rows, others = np.arange(B), np.arange(N - B, N)
    alone = dict(zip(rows, answers(decode(rows, 3, made)), strict=True))
    for _ in range(2):
        mixed = np.where(rng.random(B) < 0.5, rows, others)
        rng.shuffle(mixed)
        for row, answer in zip(mixed, answers(decode(mixed, 3, made)), strict=True):
            if row in alone:
                assert answer == alone[row]


def test_what_pads_a_prompt_changes_nothing():
    prompt_NxP, length_N, _ = prompts()
    rows = batches()[1]
    padding = np.random.default_rng(3).integers(0, V, (B, P))
    garbage = np.where(np.arange(P) < length_N[rows][:, None], prompt_NxP[rows], padding).astype(np.int32)
    state = decode(rows, 3, drafter(True, 1), prompt_BxP=garbage)
    assert answers(state) == expected()[B : 2 * B]
    np.testing.assert_array_equal(state.histogram_BxK1, speculative(3, True, 1)[1][rows])


def test_rounds_may_be_spread_over_calls():
    rows, made = batches()[2], drafter(True, 2)
    state, calls = prefill(rows, 3, made), 0
    while not np.asarray(state.done_B).all():
        before = np.asarray(state.length_B)
        state = generate.decode(PARAMS, CONFIG, made, state, 2, speculation=chain(3), sampling=GREEDY)
        assert (np.asarray(state.length_B) - before <= 8).all()
        calls += 1
    assert calls > 2 and answers(state) == expected()[2 * B : 3 * B]


def test_one_compilation_serves_all_prompts():
    compiled = []

    def listen(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    made = drafter(True, 1)
    decode(batches()[0], 3, made)  # whatever there is to compile
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3 + 5)(jnp.arange(3))
        assert compiled  # the listener hears
        compiled.clear()
        for rows in batches()[1:]:
            for other in (made, drafter(True, 2)):
                answers(decode(rows, 3, other))
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


ROWS, PROMPT, TOKENS, TEMPERATURE = 4000, (3, 7), 4, 0.6


def sampled(keys, done_row: int, speculation: Speculation) -> np.ndarray:
    """New tokens [ROWS - 1, TOKENS] of rows that share a prompt, all but one, which is done at once."""
    length_B = np.full(ROWS, len(PROMPT))
    limit_B = length_B + TOKENS * (np.arange(ROWS) != done_row)
    config, how = dataclasses.replace(CONFIG, eos_token_ids=()), Sampling.of(TEMPERATURE)
    made, L = drafter(False, 0), generate.cache_length(len(PROMPT), TOKENS, 2)
    begin = (np.tile(PROMPT, (ROWS, 1)), length_B, limit_B, keys)
    state = generate.prefill(PARAMS, config, made, *begin, L=L, K=2, sampling=how)
    found = answers(
        generate.decode(
            PARAMS,
            config,
            made,
            state,
            10_000,
            speculation=speculation,
            sampling=how,
            prices=prices_of(0.1, speculation),
        )
    )
    assert found.pop(done_row) == []
    return np.array(found)


SAMPLED = {
    "chain": chain(2, block=False),
    "block": chain(2),
    "adaptive": adaptive(2, block=False),
    "adaptive block": adaptive(2),
    "tree": tree(2, 2, 4),
    "adaptive tree": adaptive_tree(2, 2, 4),
}


@pytest.mark.parametrize("mode", SAMPLED)
def test_sampled_decoding_follows_the_target_and_only_the_rows_own_key(mode):
    keys = jax.random.split(jax.random.key(1), ROWS)
    found = sampled(keys, 0, SAMPLED[mode])
    np.testing.assert_array_equal(sampled(keys[::-1], ROWS - 1, SAMPLED[mode]), found[::-1])

    prefixes = np.stack(np.meshgrid(*[np.arange(V)] * (TOKENS - 1), indexing="ij"), -1).reshape(-1, TOKENS - 1)
    texts = np.concatenate([np.tile(PROMPT, (len(prefixes), 1)), prefixes], 1)

    @jax.jit
    def laws(texts):
        position = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
        out = transformer.forward(PARAMS, CONFIG, texts, position, transformer.causal_mask(*texts.shape))
        return jax.nn.softmax(transformer.logits(PARAMS, out.hidden_BxSxD[:, len(PROMPT) - 1 :]) / TEMPERATURE)

    law = np.asarray(laws(texts), np.float64).reshape(V, V, V, TOKENS, V)
    joint = law[0, 0, 0, 0][:, None, None, None] * law[:, 0, 0, 1][:, :, None, None]
    joint = joint * law[:, :, 0, 2][:, :, :, None] * law[:, :, :, 3]
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(found.T), 1)
    wanted = joint * len(found) / joint.sum()
    rare = wanted < 5  # pooled, as the test asks for
    assert (~rare).sum() > 30
    pooled = [np.r_[x[~rare], x[rare].sum()] for x in (counts, wanted)]
    assert stats.chisquare(*pooled).pvalue > 1e-3


# ---------------------------------------------------------------- SmolLM2

DRAFTERS = Path(__file__).parents[1] / "drafters" / "smollm2-135m"


def smollm2_drafter(target: targets.Target) -> Drafter:
    """The shipped drafter, or a random one as long as there is none."""
    if (DRAFTERS / "config.json").is_file():
        return load_drafter(DRAFTERS, target, "float32")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    shared += ("rms_norm_eps", "rope_theta", "max_position_embeddings")
    config = DrafterConfig(
        **{name: getattr(target.config, name) for name in shared},
        draft_vocab_size=1024,
        target_hidden_size=target.config.hidden_size,
        feature_layers=(2, 15, 27),
        fc_norm=False,
    )
    return Drafter(config, drafting.init(jax.random.key(0), config), jnp.arange(1024) * 7)


@pytest.mark.smollm2
def test_smollm2_writes_the_text_of_transformers_with_and_without_a_drafter():
    golden = json.loads((Path(__file__).parent / "golden" / "smollm2.json").read_text())["greedy"]
    target = targets.load("smollm2-135m", "float32")
    questions = [f"What is {i} + {i * 7}? {'Explain. ' * (i % 3)}" for i in range(20 - len(golden))]
    texts = [np.array(entry["prompt"]) for entry in golden]
    texts += [encode_prompt(target.tokenizer, [Message("user", question)]) for question in questions]
    length_B, new = np.array([len(x) for x in texts], np.int32), 32
    prompt_BxP = np.zeros((len(texts), length_B.max()), np.int32)
    for row, text in zip(prompt_BxP, texts, strict=True):
        row[: len(text)] = text
    keys = jax.random.split(jax.random.key(0), len(texts))

    def run(K, drafter_):
        L = generate.cache_length(prompt_BxP.shape[1], new, K)
        begin = (prompt_BxP, length_B, length_B + new, keys)
        state = generate.prefill(target.params, target.config, drafter_, *begin, K=K, sampling=GREEDY, L=L)
        how = {"speculation": chain(K), "sampling": GREEDY}
        return generate.decode(target.params, target.config, drafter_, state, 10_000, **how)

    plain = answers(run(0, None))
    assert plain[: len(golden)] == [entry["answer"] for entry in golden]
    assert answers(run(5, smollm2_drafter(target))) == plain
