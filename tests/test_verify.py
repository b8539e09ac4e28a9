"""The acceptance rules: exact laws by enumeration, hand-made cases, and the draws themselves.

The enumeration runs `accept_sampled` as it is, with its two sources of chance in the test's hands: the uniforms are
chosen (so the measure of each outcome is found by bisection), and the law of the added token is read off instead
of being sampled.
"""

import itertools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppow_jax.speculation import verify
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.verify import accept_greedy, accept_sampled

V, K = 5, 3


class Case(NamedTuple):
    """A target and a drafter as tables of logits per prefix: level l has shape [V] * l + [V or W]."""

    target_ids: tuple[int, ...]
    p_logits: list[np.ndarray]
    q_logits: list[np.ndarray]


def random_case(seed: int, target_ids: tuple[int, ...] = (0, 2, 3), spread: float = 1.5) -> Case:
    rng, W = np.random.default_rng(seed), len(target_ids)
    p = [rng.normal(size=(V,) * (level + 1)) * spread for level in range(K + 1)]
    q = [rng.normal(size=(V,) * level + (W,)) * spread for level in range(K)]
    return Case(target_ids, [x.astype(np.float32) for x in p], [x.astype(np.float32) for x in q])


def equal_case() -> Case:
    """The drafter is the target: everything is kept."""
    case = random_case(7, tuple(range(V)))
    return case._replace(q_logits=case.p_logits[:K])


def extreme_case() -> Case:
    """Tokens that the target never writes, and some that the drafter never drafts (but one of each is left)."""
    case, rng = random_case(8), np.random.default_rng(9)
    for tables in (case.p_logits, case.q_logits):
        for table in tables:
            never = rng.random(table.shape) < 0.4
            never[..., 0] = False
            table[never] = -np.inf
    return case


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def controlled(sampling: Sampling):
    """(u_xK, arguments) -> accepted, law_xV of the added token, emitted tokens if that token is 4; batched."""

    def one(u_xK, draft_xK, id_xK, q_xKxW, target_ids_W, p_xK1xV):
        laws = []

        def categorical(_key, logits, axis=-1):
            laws.append(jax.nn.softmax(logits, axis))
            return jnp.int32(4)

        with (
            mock.patch.object(jax.random, "uniform", lambda _key, _shape: u_xK),
            mock.patch.object(jax.random, "categorical", categorical),
        ):
            key = jax.random.key(0)
            verdict = accept_sampled(key, draft_xK, id_xK, q_xKxW, target_ids_W, p_xK1xV, sampling)
        return verdict.accepted, laws[0], verdict.token

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None, 0)))


def joint_law(case: Case, sampling: Sampling) -> np.ndarray:
    """Law of the first K + 1 tokens: a window of speculation, then (if it was shorter) the target itself."""
    ids_NxK = np.array(list(itertools.product(range(len(case.target_ids)), repeat=K)))
    draft_NxK = np.array(case.target_ids)[ids_NxK]
    N = len(ids_NxK)

    def along_draft(tables):
        rows = [np.broadcast_to(t[tuple(draft_NxK[:, :n].T)], (N, t.shape[-1])) for n, t in enumerate(tables)]
        return np.stack(rows, 1)

    p, q = along_draft(case.p_logits), along_draft(case.q_logits)
    call = controlled(sampling)

    def run(u_NxK):
        out = call(u_NxK.astype(np.float32), draft_NxK, ids_NxK, q, np.array(case.target_ids), p)
        return [np.asarray(x) for x in out]

    keep_NxK = np.zeros((N, K))  # measure of the uniforms that keep token i once those before it are kept
    for i in range(K):
        low, high = np.zeros(N, np.float32), np.ones(N, np.float32)
        for _ in range(26):
            u = np.ones((N, K), np.float32)
            u[:, :i], u[:, i] = 0.0, (low + high) / 2
            kept = run(u)[0] > i
            low, high = np.where(kept, u[:, i], low), np.where(kept, high, u[:, i])
        keep_NxK[:, i] = low

    law = np.zeros((V,) * (K + 1))
    q_NxK = np.take_along_axis(probabilities(q, sampling.temperature), ids_NxK[..., None], -1)[..., 0]
    p_tables = [probabilities(table, sampling.temperature) for table in case.p_logits]
    for k in range(K + 1):
        weight_N = q_NxK.prod(1) * keep_NxK[:, :k].prod(1) * (1 - keep_NxK[:, k] if k < K else 1)
        u = np.ones((N, K))
        u[:, :k] = 0.0
        accepted_N, law_NxV, token_NxK1 = run(u)
        for n in np.flatnonzero(weight_N > 1e-9):
            assert accepted_N[n] == k
            assert token_NxK1[n].tolist() == [*draft_NxK[n, :k], *[4] * (K + 1 - k)]
            for bonus in range(V):
                prefix = (*draft_NxK[n, :k], bonus)
                rest = np.ones(())
                for level in range(k + 1, K + 1):  # the target's own law of what would follow
                    rest = rest[..., None] * p_tables[level][prefix]
                law[prefix] += weight_N[n] * law_NxV[n, bonus] * rest
    return law


def target_law(case: Case, sampling: Sampling) -> np.ndarray:
    law = np.ones(())
    for table in case.p_logits:
        law = law[..., None] * probabilities(table, sampling.temperature)
    return law


CASES = {
    "part of the vocabulary": lambda: random_case(0),
    "one draft token": lambda: random_case(1, (3,)),
    "the whole vocabulary": lambda: random_case(2, tuple(range(V))),
    "unordered ids": lambda: random_case(3, (4, 0, 2)),
    "far apart": lambda: random_case(4, spread=6.0),
    "equal": equal_case,
    "impossible tokens": extreme_case,
}


@pytest.mark.parametrize(
    "case, temperature", list(zip(CASES.values(), itertools.cycle([0.5, 1.0]), strict=False)), ids=CASES
)
def test_joint_law_of_the_emitted_tokens_is_the_targets(case, temperature):
    sampling = Sampling(temperature=temperature)
    law = joint_law(case(), sampling)
    np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(law, target_law(case(), sampling), rtol=0, atol=1e-6)


BIASED = {
    "q ignored when keeping": ("acceptance_probability", lambda p, q: p),
    "everything likely kept": ("acceptance_probability", lambda p, q: jnp.minimum(2 * p / q, 1)),
    "p instead of the residual": ("residual", lambda p, q: p),
    "q instead of the residual": ("residual", lambda p, q: q),
}


@pytest.mark.parametrize("name, rule", BIASED.values(), ids=BIASED)
def test_enumeration_finds_biased_rules(monkeypatch, name, rule):
    monkeypatch.setattr(verify, name, rule)
    sampling = Sampling(temperature=1.0)
    case = random_case(2, tuple(range(V)))
    assert np.abs(joint_law(case, sampling) - target_law(case, sampling)).max() > 1e-3


def draws(case: Case, sampling: Sampling, N: int, seed: int) -> np.ndarray:
    """N sampled windows: drafts drawn from q, then `accept_sampled`, with the target's tokens as a tail. [N, K1]"""
    tables_p, tables_q = ([jnp.asarray(t) for t in tables] for tables in (case.p_logits, case.q_logits))
    target_ids = jnp.array(case.target_ids)

    def one(key):
        keys = jax.random.split(key, 2 * K + 2)
        ids, draft, q = [], [], []
        for i in range(K):
            q.append(tables_q[i][tuple(draft)])
            ids.append(jax.random.categorical(keys[i], q[-1] / sampling.temperature))
            draft.append(target_ids[ids[-1]])
        p = jnp.stack([tables_p[i][tuple(draft[:i])] for i in range(K + 1)])
        verdict = accept_sampled(
            keys[K], jnp.stack(draft), jnp.stack(ids), jnp.stack(q), target_ids, p, sampling
        )
        tokens = list(verdict.token)
        for i in range(1, K + 1):
            own = jax.random.categorical(keys[K + i], tables_p[i][tuple(tokens[:i])] / sampling.temperature)
            tokens[i] = jnp.where(i <= verdict.accepted, tokens[i], own)
        return jnp.stack(tokens)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), N)))


def p_value(case: Case, sampling: Sampling, seed: int, N: int = 30_000) -> float:
    tokens_NxK1 = draws(case, sampling, N, seed)
    counts = np.zeros((V,) * (K + 1))
    np.add.at(counts, tuple(tokens_NxK1.T), 1)
    expected = target_law(case, sampling).ravel() * N
    rare = expected < 5  # pooled, as the test asks for
    counts = counts.ravel()
    pooled = [np.r_[x[~rare], x[rare].sum()] for x in (counts, expected)]
    return stats.chisquare(*pooled).pvalue


def test_sampled_windows_follow_the_target():
    assert p_value(random_case(0, spread=1.0), Sampling(temperature=0.7), seed=0) > 1e-3


def test_chi_square_finds_a_biased_rule(monkeypatch):
    monkeypatch.setattr(verify, "residual", lambda p, q: p)
    assert p_value(random_case(0, spread=1.0), Sampling(temperature=0.7), seed=0) < 1e-9


def test_acceptance_probability_at_its_corners():
    p = jnp.array([0.0, 0.0, 0.2, 0.4, 0.4, 0.1])
    q = jnp.array([0.0, 0.3, 0.4, 0.4, 0.2, 0.0])
    np.testing.assert_allclose(verify.acceptance_probability(p, q), [0, 0, 0.5, 1, 1, 1])


def test_residual_at_its_corners():
    p = jnp.array([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = jnp.array([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(verify.residual(p, q), [[1, 0, 0], [0.5, 0.5, 0], [1, 0, 0]])


GREEDY = {  # draft, argmax -> accepted, emitted
    "none kept": ([1, 2, 3], [9, 2, 3, 4], 0, [9, 9, 9, 9]),
    "all kept": ([1, 2, 3], [1, 2, 3, 4], 3, [1, 2, 3, 4]),
    "first only": ([1, 2, 3], [1, 9, 3, 4], 1, [1, 9, 9, 9]),
    "the last misses": ([1, 2, 3], [1, 2, 9, 4], 2, [1, 2, 9, 9]),
    "a later match does not count": ([1, 2, 3], [8, 2, 3, 4], 0, [8, 8, 8, 8]),
}


def test_accept_greedy_on_hand_made_cases():
    draft, argmax, accepted, tokens = (np.array(x) for x in zip(*GREEDY.values(), strict=True))
    for verdict in (accept_greedy(draft, argmax), jax.jit(accept_greedy)(draft, argmax)):
        np.testing.assert_array_equal(verdict.accepted, accepted)
        np.testing.assert_array_equal(verdict.token, tokens)
    one = accept_greedy(jnp.asarray(draft[1]), jnp.asarray(argmax[1]))
    assert one.accepted == 3 and one.token.tolist() == [1, 2, 3, 4]


def test_accept_greedy_of_one_drafted_token():
    verdict = accept_greedy(jnp.array([[5], [6]]), jnp.array([[5, 7], [5, 7]]))
    assert verdict.accepted.tolist() == [1, 0] and verdict.token.tolist() == [[5, 7], [5, 5]]
