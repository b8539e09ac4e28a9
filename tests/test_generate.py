"""Decoding: speculative output is the target's own, whatever the drafter proposes, and stops where it should."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suites
from scipy import stats
from twelve_tokens import (
    ARMS,
    CONFIG,
    DRAFTER,
    GREEDY,
    NEW,
    PARAMS,
    B,
    N,
    P,
    V,
    answers,
    batches,
    cost_table_of,
    decode,
    drafter,
    endless,
    expected,
    expected_histogram,
    prefill,
    prompts,
    speculative,
)

from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Prefix
from ppow_jax.speculation import generate
from ppow_jax.speculation.propose import Draft, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation, adaptive, adaptive_tree, chain, mixture, ngram, off, tree

KEPT = suites.keep([ARMS[1], ARMS[-1]], ARMS)  # one head, two layers


def test_the_cases_are_what_they_are_meant_to_be():
    lengths = np.array([len(answer) for answer in expected()])
    budgets = prompts()[2] - prompts()[1]
    assert (lengths == 0).any() and (lengths == NEW).any()  # nothing to do; the whole budget
    assert ((lengths < budgets) & (lengths > 0)).sum() > 50  # ended early
    assert len({tuple(answer) for answer in expected()}) > 100


def test_plain_decoding_equals_whole_forward_passes():
    assert [a for rows in batches() for a in answers(decode(rows, 0))] == expected()


@pytest.mark.parametrize("arm", KEPT, ids=str)
def test_speculative_decoding_is_lossless(arm):
    assert speculative(*arm)[0] == expected()


@pytest.mark.parametrize("arm", KEPT, ids=str)
def test_histogram_accounts_for_every_token(arm):
    found, histogram_NxK1 = speculative(*arm)
    K = arm[0]
    gained_N = (histogram_NxK1 * np.arange(1, K + 2)).sum(1)
    owed_N = np.array([max(len(answer) - 1, 0) for answer in found])  # the prefill gave the first one
    cut_N = gained_N - owed_N  # accepted past the end of the answer
    assert (cut_N >= 0).all() and (cut_N <= K).all()
    assert (histogram_NxK1.sum(1)[owed_N == 0] == 0).all()
    assert (histogram_NxK1.sum(0)[: min(K, 3) + 1] > 0).all()  # random drafters are right now and then


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


@pytest.mark.parametrize("arm", KEPT, ids=str)
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
    K = speculation.window
    made, L = drafter(False, 0) if K else None, generate.cache_length(len(PROMPT), TOKENS, K)
    begin = (np.tile(PROMPT, (ROWS, 1)), length_B, limit_B, keys)
    state = generate.prefill(PARAMS, config, made, *begin, L=L, K=K, sampling=how)
    found = answers(
        generate.decode(
            PARAMS,
            config,
            made,
            state,
            10_000,
            speculation=speculation,
            sampling=how,
            cost_table=cost_table_of(0.1, speculation),
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
    "ngram": ngram(3),
    "mixture": mixture(2, 2, 4, 3),
}


@pytest.mark.parametrize("mode", suites.keep(["mixture"], ["tree", "adaptive tree", "ngram", "mixture"]))
def test_a_sampled_tree_gives_the_text_of_plain_decoding(mode):
    keys = jax.random.split(jax.random.key(1), ROWS)
    same = (sampled(keys, 0, SAMPLED[mode]) == sampled(keys, 0, off())).all(1)
    assert same.mean() > 0.998  # float32's last bits may decide between two tokens


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
