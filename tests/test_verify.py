"""The acceptance rules: exact laws by enumeration, hand-made cases, and the draws themselves.

The enumeration runs `accept_sampled` as it is, with its two sources of chance in the test's hands: the uniform is
chosen, and the law of the added token is read off instead of being sampled. Every case is run with all of SETTINGS at
once, as rows of one batch.
"""

import functools
import itertools
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ppow_jax.speculation import verify
from ppow_jax.speculation.sampling import Sampling, log_distribution, sample
from ppow_jax.speculation.verify import accept_greedy, accept_sampled, block_wise, token_wise

V = 4
SETTINGS = {  # temperature, top-k, top-p
    "greedy": (0.0, 0, 1.0),
    "temperature 1": (1.0, 0, 1.0),
    "cold": (0.3, 0, 1.0),
    "top-k": (0.7, 2, 1.0),
    "top-p": (1.5, 0, 0.625),
    "both": (0.875, 3, 0.75),
    "top-k of 1": (1.0, 1, 1.0),
}
S = len(SETTINGS)
MIXED = Sampling.of(*zip(*SETTINGS.values(), strict=True))
RULES = {"token-wise": token_wise, "block-wise": block_wise}
of_both_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


class Case(NamedTuple):
    """A target and a drafter as tables of logits per prefix: level l has shape [V] * l + [V or W]."""

    target_ids: tuple[int, ...]
    p_logits: list[np.ndarray]
    q_logits: list[np.ndarray]

    @property
    def K(self) -> int:
        return len(self.q_logits)


def random_case(seed: int, target_ids: tuple[int, ...] = (0, 2, 3), spread: float = 1.5, K: int = 3) -> Case:
    rng, W = np.random.default_rng(seed), len(target_ids)
    p = [rng.normal(size=(V,) * (level + 1)) * spread for level in range(K + 1)]
    q = [rng.normal(size=(V,) * level + (W,)) * spread for level in range(K)]
    return Case(target_ids, p, q)


def equal_case() -> Case:
    """The drafter is the target: everything is kept."""
    case = random_case(7, tuple(range(V)))
    return case._replace(q_logits=case.p_logits[: case.K])


def extreme_case() -> Case:
    """Tokens that the target never writes, and some that the drafter never drafts (but one of each is left)."""
    case, rng = random_case(8), np.random.default_rng(9)
    for tables in (case.p_logits, case.q_logits):
        for table in tables:
            never = rng.random(table.shape) < 0.4
            never[..., 0] = False
            table[never] = -np.inf
    return case


CASES = {
    "part of the vocabulary": lambda: random_case(0, (3, 0, 2)),
    "one draft token": lambda: random_case(1, (3,)),
    "the whole vocabulary": lambda: random_case(2, tuple(range(V))),
    "far apart": lambda: random_case(4, spread=6.0),
    "equal": equal_case,
    "impossible tokens": extreme_case,
    "window of 1": lambda: random_case(5, K=1),
    "window of 2": lambda: random_case(6, tuple(range(V)), K=2),
}


def reference_law(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution of one row [V], by sorting, in float64."""
    order = np.argsort(-logits, kind="stable")
    z = (logits[order] - logits.max()) / (temperature or 1.0)
    kept = np.exp(z) * (np.arange(len(z)) < ((1 if temperature == 0 else top_k) or len(z)))
    if top_p < 1:
        kept *= np.cumsum(kept) - kept < np.float32(top_p) * kept.sum()
    law = np.zeros(len(z))
    law[order] = kept / kept.sum()
    return law


def target_tables(case: Case) -> list[np.ndarray]:
    """The target's laws under each of SETTINGS: level l has shape [S] + [V] * l + [V]."""
    settings = [(float(np.float32(t)), k, p) for t, k, p in SETTINGS.values()]
    return [
        np.stack([np.apply_along_axis(reference_law, -1, table, *setting) for setting in settings])
        for table in case.p_logits
    ]


def target_laws(case: Case) -> np.ndarray:
    """Law of the first K + 1 tokens under each of SETTINGS: [S, V, ..., V]."""
    law = np.ones(S)
    for table in target_tables(case):
        law = law[..., None] * table
    return law


class Windows(NamedTuple):
    """Every draft of a case under each of SETTINGS (R = S * N rows), and how likely it is."""

    draft_RxK: np.ndarray
    chance_R: np.ndarray
    log_q_RxKxW: jax.Array
    log_p_RxK1xV: jax.Array


def windows(case: Case, length=None) -> Windows:
    """length: (chances of the drafts [R, K], laws q [R, K, W]) -> tokens of each window [R]; by default all K."""
    ids_NxK = np.array(list(itertools.product(range(len(case.target_ids)), repeat=case.K)))
    draft_NxK, N = np.array(case.target_ids)[ids_NxK], len(ids_NxK)

    def along_draft(tables):
        rows = [np.broadcast_to(t[tuple(draft_NxK[:, :n].T)], (N, t.shape[-1])) for n, t in enumerate(tables)]
        return np.tile(np.stack(rows, 1), (S, 1, 1))

    each = jax.tree.map(lambda x: np.repeat(x, N), MIXED)
    laws = jax.jit(lambda tables: [log_distribution(x, each) for x in tables])
    log_p, log_q = laws([along_draft(case.p_logits), along_draft(case.q_logits)])
    q_RxKxW, draft_RxK = np.exp(log_q), np.tile(draft_NxK, (S, 1))
    q_RxK = np.take_along_axis(q_RxKxW, np.tile(ids_NxK, (S, 1))[..., None], -1)[..., 0]
    if length is not None:
        there_RxK = np.arange(case.K) < length(q_RxK, q_RxKxW)[:, None]
        draft_RxK, log_q = np.where(there_RxK, draft_RxK, 0), jnp.where(there_RxK[..., None], log_q, -jnp.inf)
    return Windows(draft_RxK, q_RxK.prod(1), log_q, log_p)


class Outcome(NamedTuple):
    accepted: np.ndarray
    token: np.ndarray  # with V in the place of the added one
    reach: np.ndarray
    law: np.ndarray


def controlled(case: Case, rule, all_: Windows):
    """u_R -> `accept_sampled` of every window, with u_R for its uniform."""

    def one(u, draft_xK, log_q_xKxW, log_p_xK1xV):
        seen = {}

        def watched(*arguments):
            seen["chances"] = rule(*arguments)
            return seen["chances"]

        def read_off(_key, weight_xV):
            seen["law"] = weight_xV / weight_xV.sum(-1, keepdims=True)
            return jnp.int32(V)

        with mock.patch.object(jax.random, "uniform", lambda _: u), mock.patch.object(verify, "sample", read_off):
            ids_W = jnp.array(case.target_ids)
            key = jax.random.key(0)
            verdict = accept_sampled(key, key, draft_xK, log_q_xKxW, ids_W, log_p_xK1xV, watched)
        return Outcome(*verdict, seen["chances"].reach_xK, seen["law"])

    run = jax.jit(lambda u_R: jax.vmap(one)(u_R, all_.draft_RxK, all_.log_q_RxKxW, all_.log_p_RxK1xV))
    return lambda u_R: Outcome(*map(np.asarray, run(u_R)))


class Exact(NamedTuple):
    """law: of the first K + 1 tokens, [S, V, ..., V]: a window, then (if it was shorter) the target itself.

    kept_S: expected number of drafted tokens that are kept.
    """

    law: np.ndarray
    kept_S: np.ndarray


def enumerated(case: Case, rule, length=None) -> Exact:
    with jax.enable_x64(True):
        all_, K = windows(case, length), case.K
        run = controlled(case, rule, all_)
        reach_RxK = run(np.zeros(len(all_.chance_R))).reach
        edges = np.pad(reach_RxK, ((0, 0), (1, 0)), constant_values=1.0)
        edges = np.pad(edges, ((0, 0), (0, 1)))  # [R, K + 2], falling from 1 to 0
        assert (np.diff(edges, axis=1) <= 1e-12).all()
        tables = target_tables(case)
        joint = np.zeros((S,) + (V,) * (K + 1))
        for k in range(K + 1):
            weight_R = all_.chance_R * (edges[:, k] - edges[:, k + 1])
            found = run((edges[:, k] + edges[:, k + 1]) / 2)
            real = weight_R > 1e-12
            setting, draft_RxK = np.repeat(np.arange(S), len(real) // S)[real], all_.draft_RxK[real]
            assert (found.accepted[real] == k).all()
            assert (found.token[real][:, :k] == draft_RxK[:, :k]).all() and (found.token[real][:, k:] == V).all()
            part = np.zeros((S,) + (V,) * (k + 1))
            np.add.at(part, (setting, *draft_RxK[:, :k].T), weight_R[real, None] * found.law[real])
            for level in range(k + 1, K + 1):  # the target's own law of what follows
                part = part[..., None] * tables[level]
            joint += part
    return Exact(joint, (all_.chance_R * reach_RxK.sum(1)).reshape(S, -1).sum(1))


@functools.cache
def exact(name: str, rule) -> Exact:
    return enumerated(CASES[name](), rule)


@of_both_rules
@pytest.mark.parametrize("name", CASES)
def test_joint_law_of_the_emitted_tokens_is_the_targets(name, rule):
    law, wanted = exact(name, rule).law, target_laws(CASES[name]())
    np.testing.assert_allclose(law.reshape(S, -1).sum(1), 1, atol=1e-9)
    for s, setting in enumerate(SETTINGS):
        np.testing.assert_allclose(law[s], wanted[s], rtol=0, atol=1e-9, err_msg=setting)
    assert (wanted[0] == 1).sum() == 1  # greedy


def test_block_verification_keeps_at_least_as_much():
    gains = {name: exact(name, block_wise).kept_S - exact(name, token_wise).kept_S for name in CASES}
    assert min(gain.min() for gain in gains.values()) >= -1e-12
    np.testing.assert_allclose(gains["window of 1"], 0, atol=1e-12)
    assert gains["the whole vocabulary"].max() > 0.01 and gains["part of the vocabulary"].max() > 0.01


def favourites(q_RxK, q_RxKxW):
    """Drops the first token that is not the drafter's favourite, and all that follow."""
    return np.cumprod(q_RxK == q_RxKxW.max(-1), axis=1).sum(1)


def while_sure(q_RxK, q_RxKxW):
    """Drafts no further where the drafter is not sure: what it decides by is drawn already."""
    return np.cumprod(q_RxKxW.max(-1) > 0.7, axis=1).sum(1)


BIASED = {
    "q ignored when keeping": ("likelihood_ratio", lambda p, q: p),
    "p instead of the residual": ("residual", lambda p, q, scale: p),
}
SAMPLED = [s for s, (temperature, top_k, _) in enumerate(SETTINGS.values()) if temperature and top_k != 1]


def bias(case: Case, rule, length=None) -> np.ndarray:
    """The greatest error of any probability, for each of the settings that leave a choice."""
    error = np.abs(enumerated(case, rule, length).law - target_laws(case))
    return error.reshape(S, -1).max(1)[SAMPLED]


@of_both_rules
@pytest.mark.parametrize("name, wrong", BIASED.values(), ids=BIASED)
def test_enumeration_finds_biased_rules(monkeypatch, name, wrong, rule):
    monkeypatch.setattr(verify, name, wrong)
    assert (bias(random_case(2, tuple(range(V))), rule) > 1e-3).all()


@of_both_rules
def test_a_window_may_end_before_a_draw_but_not_because_of_it(rule):
    case = random_case(2, tuple(range(V)))
    assert (bias(case, rule, while_sure) < 1e-9).all()
    assert (bias(case, rule, favourites) > 1e-3).all()


def draws(case: Case, sampling: Sampling, rule, N: int) -> np.ndarray:
    """N sampled windows: drafts drawn from q, then `accept_sampled`, with the target's tokens as a tail. [N, K1]"""
    target_ids, K = jnp.array(case.target_ids), case.K

    def laws(tables):
        rows = log_distribution(jnp.concatenate([t.reshape(-1, t.shape[-1]) for t in tables]), sampling)
        parts = np.split(np.asarray(rows, np.float32), np.cumsum([t[..., 0].size for t in tables])[:-1])
        return [jnp.asarray(part.reshape(t.shape)) for part, t in zip(parts, tables, strict=True)]

    log_p, log_q = laws(case.p_logits), laws(case.q_logits)

    def one(key):
        keys, draft = jax.random.split(key, 2 * K + 2), []
        for i in range(K):
            draft.append(target_ids[sample(keys[i], jnp.exp(log_q[i][tuple(draft)]))])
        q = jnp.stack([log_q[i][tuple(draft[:i])] for i in range(K)])
        p = jnp.stack([log_p[i][tuple(draft[:i])] for i in range(K + 1)])
        verdict = accept_sampled(keys[K], keys[-1], jnp.stack(draft), q, target_ids, p, rule)
        tokens = list(verdict.token)
        for i in range(1, K + 1):
            own = sample(keys[K + i], jnp.exp(log_p[i][tuple(tokens[:i])]))
            tokens[i] = jnp.where(i <= verdict.accepted, tokens[i], own)
        return jnp.stack(tokens)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), N)))


def p_value(rule, setting: str = "both", N: int = 30_000) -> float:
    case = random_case(0, spread=1.0)
    counts, expected = np.zeros((V,) * (case.K + 1)), N * target_laws(case)[list(SETTINGS).index(setting)]
    np.add.at(counts, tuple(draws(case, Sampling.of(*SETTINGS[setting]), rule, N).T), 1)
    assert (counts[expected == 0] == 0).all()
    rare = (expected > 0) & (expected < 5)  # pooled, as the test asks for
    pooled = [np.r_[x[expected >= 5], x[rare].sum() if rare.any() else []] for x in (counts, expected)]
    return stats.chisquare(*pooled).pvalue


@of_both_rules
@pytest.mark.full
def test_sampled_windows_follow_the_target(rule):
    assert p_value(rule) > 1e-3


@pytest.mark.full
def test_chi_square_finds_a_biased_rule(monkeypatch):
    monkeypatch.setattr(verify, "residual", lambda p, q, scale: p)
    assert p_value(block_wise) < 1e-9


def test_likelihood_ratio_at_its_corners():
    p = jnp.array([0.0, 0.0, 0.2, 0.4, 0.4])
    q = jnp.array([0.0, 0.3, 0.4, 0.4, 0.2])
    np.testing.assert_allclose(verify.likelihood_ratio(p, q), [0, 0, 0.5, 1, 2])
    assert verify.likelihood_ratio(jnp.float32(1), jnp.float32(0)) == 0


def test_residual_at_its_corners():
    p = jnp.array([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = jnp.array([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(verify.residual(p, q), [[1, 0, 0], [0.5, 0.5, 0], [1, 0, 0]])
    np.testing.assert_allclose(verify.residual(p[0], q[0], 0.5), [1, 0, 0])
    np.testing.assert_allclose(verify.residual(p[0], q[0], 0.0), p[0])


def test_block_verification_by_hand():
    """One token, P = (1, 2) / 3 and Q = (2, 1) / 3, two drafts (the paper's example, its section 3)."""
    p, q = jnp.array([[1, 2]] * 3) / 3, jnp.array([[2, 1]] * 2) / 3
    rule = jax.jit(block_wise)
    chances = {draft: rule(jnp.array(draft), p, q) for draft in itertools.product((0, 1), repeat=2)}
    wanted = {  # w_1, w_2, h_1; h_2 = w_2
        (0, 0): (1 / 2, 1 / 4, 0),
        (0, 1): (1 / 2, 1, 0),
        (1, 0): (1, 1 / 2, 1),
        (1, 1): (1, 1, 1),
    }
    for draft, (w1, w2, h1) in wanted.items():
        np.testing.assert_allclose(chances[draft].scale_xK1, [1, w1, w2], rtol=1e-6)
        np.testing.assert_allclose(chances[draft].reach_xK, [1 - (1 - h1) * (1 - w2), w2], rtol=1e-6)


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
