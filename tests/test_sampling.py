"""The one distribution, and decoding in batches whose rows each have their own."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import models
from scipy import stats

from ppow_jax.errors import UserError
from ppow_jax.inference.decoding import Decoding
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling, draw, inverse, log_distribution
from ppow_jax.speculation.settings import chain
from ppow_jax.training import initialise

SETTINGS = [  # temperature, top-k, top-p
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (0.25, 0, 1.0),
    (4.0, 0, 1.0),
    (0.5, 1, 1.0),
    (0.5, 5, 1.0),
    (2.0, 10_000, 1.0),
    (1.0, 0, 0.5),
    (2.0, 0, 0.984375),
    (1.0, 0, 1e-9),
    (1.5, 8, 0.75),
    (0.75, 3, 0.25),
    (0.0, 4, 0.5),
]
MIXED = Sampling.of(*zip(*SETTINGS, strict=True))
distribution = jax.jit(log_distribution)


def reference(logits, temperature, top_k, top_p) -> np.ndarray:
    """Law of one row [V], by sorting, in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    weight = np.exp((logits[order] - logits.max()) / (temperature or 1.0))
    weight[1 if temperature == 0 else top_k or len(weight) :] = 0.0
    if top_p < 1:
        reached = np.cumsum(weight) >= np.float32(top_p) * weight.sum()
        weight[np.argmax(reached) + 1 :] = 0.0
    law = np.zeros(len(weight))
    law[order] = weight / weight.sum()
    return law


def references(logits: np.ndarray) -> np.ndarray:
    """The distribution of logits [B, ..., V], each row under its own setting."""
    rows = [np.apply_along_axis(reference, -1, x, *setting) for x, setting in zip(logits, SETTINGS, strict=True)]
    return np.stack(rows)


def random_logits(V: int, seed: int = 0) -> np.ndarray:
    """[B, 2, V], with a token in four impossible, but not the first one."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(SETTINGS), 2, V)) * 3
    return np.where((rng.random(logits.shape) < 0.25) & (np.arange(V) > 0), -np.inf, logits)


@pytest.mark.parametrize("V", [1, 2, 37, 1000])
def test_law_of_each_row_is_its_own(V):
    logits = random_logits(V)
    with jax.enable_x64(True):
        exact = np.exp(distribution(logits, MIXED))
    np.testing.assert_allclose(exact, references(logits), rtol=1e-9, atol=1e-12)
    single = np.float32(logits)
    np.testing.assert_allclose(np.exp(distribution(single, MIXED)), references(single), rtol=1e-4, atol=1e-6)


def test_a_number_for_all_rows_is_that_number_for_each():
    logits = random_logits(37)[:, 0].astype(np.float32)
    for setting in SETTINGS[::5]:
        one, each = Sampling.of(*setting), Sampling.of(*(np.full(len(logits), x) for x in setting))
        laws = distribution(logits, one)
        np.testing.assert_array_equal(laws, distribution(logits, each))
        np.testing.assert_array_equal(distribution(logits[0], one), laws[0])


def test_what_is_off_changes_nothing():
    logits = random_logits(300)[:, 0].astype(np.float32)
    plain = distribution(logits, Sampling(0.7))
    np.testing.assert_array_equal(distribution(logits, Sampling(0.7, 0, 1.0)), plain)
    np.testing.assert_array_equal(distribution(logits, Sampling(0.7, 300, 1.0)), plain)


def test_bfloat16_is_computed_in_float32():
    logits = jnp.asarray(random_logits(37)[:, 0], jnp.bfloat16)
    law = distribution(logits, MIXED)
    assert law.dtype == jnp.float32
    np.testing.assert_array_equal(law, distribution(logits.astype(jnp.float32), MIXED))


TIES = [2.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ((0.0, 0, 1.0), [1]),
        ((1.0, 1, 1.0), [1]),
        ((1.0, 2, 1.0), [1, 3]),
        ((1.0, 4, 1.0), [0, 1, 3, 5]),
        ((1.0, 5, 1.0), [0, 1, 2, 3, 5]),
        ((1.0, 0, 0.26), [1]),  # 3.0 has 0.265 each, 2.0 has 0.097, 1.0 has 0.036 each
        ((1.0, 0, 0.28), [1, 3]),
        ((1.0, 0, 0.79), [1, 3, 5]),
        ((1.0, 0, 0.89), [0, 1, 3, 5]),
        ((1.0, 0, 0.92), [0, 1, 2, 3, 5]),
        ((1.0, 3, 0.33), [1]),  # of three equals each has a third
        ((1.0, 3, 0.34), [1, 3]),
    ],
    ids=str,
)
def test_of_equals_the_lowest_ids_stay(setting, kept):
    law = np.exp(log_distribution(jnp.array(TIES), Sampling.of(*setting)))
    assert np.flatnonzero(law).tolist() == kept
    weight = np.exp(TIES) * (law > 0)
    np.testing.assert_allclose(law, weight / weight.sum(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-3, 1e30, 3e38])
def test_extreme_temperatures(temperature):
    logits = jnp.array([-3e4, 2.0, 5.0, 4.999, -jnp.inf])
    law = np.exp(log_distribution(logits, Sampling(jnp.float32(temperature), 3, 1.0)))
    assert np.isfinite(law).all() and law[4] == 0
    wanted = [0, 0, 1, 0, 0] if temperature < 1 else [0, 1 / 3, 1 / 3, 1 / 3, 0]
    np.testing.assert_allclose(law, wanted, atol=0.3 if temperature == 1e-3 else 1e-6)


@pytest.mark.parametrize("V", [1, 5, 256, 700])
def test_numbers_stand_for_tokens_as_often_as_the_law_has_it(V):
    """By enumeration: the numbers of each token are counted on a fine grid of the square."""
    rng, N = np.random.default_rng(V), 2000
    p_V = rng.dirichlet(np.ones(V)) * (rng.random(V) < 0.7)
    p_V = (p_V + (V == 1)) / (p_V.sum() + (V == 1))
    group_G = np.add.reduceat(p_V, np.arange(0, V, 256))
    middles = (np.arange(N) + 0.5) / N
    first_NxG = jax.jit(inverse)(np.stack([middles, 0 * middles], -1), np.tile(p_V, (N, 1))) // 256
    np.testing.assert_allclose(np.bincount(first_NxG, minlength=len(group_G)) / N, group_G, atol=2 / N)
    for g, start in enumerate(np.cumsum([0, *group_G[:-1]]) + group_G / 2):
        found_N = np.asarray(jax.jit(inverse)(np.stack([0 * middles + start, middles], -1), np.tile(p_V, (N, 1))))
        within = p_V[256 * g :][:256] / group_G[g]
        np.testing.assert_allclose(np.bincount(found_N - 256 * g, minlength=len(within)) / N, within, atol=2 / N)


def test_what_has_no_chance_is_never_drawn():
    law = np.zeros((4, 600), np.float32)
    law[0, 599], law[1, 0], law[2, [255, 256]], law[3, 1::2] = 1, 1, 0.5, 1 / 300
    last = np.nextafter(np.float32(1), np.float32(0))
    for u in itertools.product((0.0, 0.5, last), repeat=2):
        found = np.asarray(inverse(jnp.broadcast_to(jnp.array(u), (4, 2)), law))
        assert (law[np.arange(4), found] > 0).all()
    assert 0 <= int(inverse(jnp.array([0.5, 0.5]), jnp.full(600, jnp.nan))) < 600


@functools.cache
def drawn(N: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """(N draws of each row, the laws that came with them)."""
    logits = random_logits(20, seed=1)[:, 0].astype(np.float32)
    keys = jax.random.split(jax.random.key(2), (N, len(SETTINGS)))
    token, log_law = jax.jit(jax.vmap(draw, (0, None, None)))(keys, logits, MIXED)
    np.testing.assert_allclose(np.exp(log_law[0]), references(logits), atol=1e-6)
    return np.asarray(token), references(logits)


def test_draws_follow_the_law_of_their_row():
    token_NxB, law_BxV = drawn()
    for token_N, law_V in zip(token_NxB.T, law_BxV, strict=True):
        counts, expected = np.bincount(token_N, minlength=len(law_V)), law_V * len(token_N)
        assert (counts[expected == 0] == 0).all()
        often = expected >= 5
        if often.sum() > 1:
            rest = counts[~often].sum(), expected[~often].sum()
            pooled = [
                np.r_[x[often], r] if rest[1] else x[often] for x, r in zip((counts, expected), rest, strict=True)
            ]
            assert stats.chisquare(*pooled).pvalue > 1e-4


def test_greedy_draws_are_the_argmax_and_have_no_law():
    logits = random_logits(20, seed=1)[:, 0].astype(np.float32)
    token, law = draw(jax.random.split(jax.random.key(0), len(logits)), jnp.asarray(logits), Sampling())
    assert law is None
    np.testing.assert_array_equal(token, logits.argmax(-1))
    assert (
        drawn()[0][:, [0, 4, 9, 12]] == logits.argmax(-1)[[0, 4, 9, 12]]
    ).all()  # greedy among other rows, or nearly


def test_only_what_some_row_uses_is_in_the_program():
    assert Sampling.of() == Sampling.of(0.0, 5, 0.5) == Sampling() and Sampling().greedy
    assert Sampling.of([0.0, 0.0]).greedy and not MIXED.greedy
    shapes = jax.tree.structure
    assert shapes(Sampling.of([0, 1], 0, 1)) == shapes(Sampling(1.0)) != shapes(Sampling.of(1.0, 0, 0.5))
    assert shapes(Sampling.of(1, [0, 7])) == shapes(Sampling.of(0.5, [1, 2], 1.0)) == shapes(Sampling(1.0, 1))
    assert Sampling.of(1.0, 10**12).top_k == 2**31 - 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ((-1.0,), r"--temperature=-1.0: must be 0 or more"),
        ((float("nan"),), r"--temperature=nan: must be 0 or more"),
        (([0.5, float("inf")],), r"--temperature=inf \(row 1\): must be 0 or more"),
        ((1.0, -1), r"--top_k=-1: must be a whole number, 0 or more"),
        ((1.0, [3, 4, 2.5]), r"--top_k=2.5 \(row 2\): must be a whole number"),
        ((1.0, 0, 0.0), r"--top_p=0.0: must be above 0 and at most 1"),
        ((1.0, 0, [1.0, 1.5]), r"--top_p=1.5 \(row 1\): must be above 0 and at most 1"),
        (([1.0, 0.5], 0, [0.5] * 3), r"of shapes \(2,\), \(\), \(3,\): each must be one number, or one for each row"),
    ],
    ids=str,
)
def test_bad_numbers(setting, message):
    with pytest.raises(UserError, match=message):
        Sampling.of(*setting)


def test_decoding_takes_the_same_numbers():
    how = Decoding(chain(3), temperature=0.5, top_k=4, top_p=0.5)
    assert how.sampling == Sampling.of(0.5, 4, 0.5)
    with pytest.raises(UserError, match="--top_p=2: must be above 0 and at most 1"):
        Decoding(chain(3), top_p=2)


# ---------------------------------------------------------------- decoding rows that differ

V, K, PROMPT, TOKENS, ROWS = 8, 2, (3, 7), 3, 4000
TARGET = dataclasses.replace(models.TARGETS["untied"], vocab_size=V, num_layers=2, eos_token_ids=())
PARAMS = jax.tree.map(jnp.asarray, models.target_params(TARGET, seed=5))
ASKED = [(0.0, 0, 1.0), (0.75, 0, 1.0), (1.5, 3, 1.0), (1.0, 0, 0.75), (2.0, 6, 0.875)]


@functools.cache
def drafter() -> Drafter:
    config = initialise.drafter_config(TARGET, 5, (0, 1, 2))
    weights = jax.tree.map(jnp.asarray, models.drafter_params(config, 0))
    return Drafter(config, weights, jnp.array([0, 1, 3, 4, 7]))


def started(key_B, sampling: Sampling) -> generate.State:
    """Rows with the same prompt, after their first token."""
    B = len(key_B)
    length_B, L = np.full(B, len(PROMPT)), generate.cache_length(len(PROMPT), TOKENS, K)
    begin = np.tile(PROMPT, (B, 1)), length_B, length_B + TOKENS, key_B
    return generate.prefill(PARAMS, TARGET, drafter(), *begin, K=K, sampling=sampling, L=L)


def generated(key_B, sampling: Sampling) -> np.ndarray:
    """TOKENS new tokens for each row, [B, TOKENS], block-verified."""
    B, state = len(key_B), started(key_B, sampling)
    how = {"speculation": chain(K, block=True), "sampling": sampling}
    state = generate.decode(PARAMS, TARGET, drafter(), state, 10_000, **how)
    assert np.asarray(state.done_B).all() and (B < 100 or (state.histogram_BxK1.sum(0) > B / 20).all())
    return np.asarray(state.tokens_BxL)[:, len(PROMPT) : len(PROMPT) + TOKENS]


def asked(row_B: np.ndarray) -> tuple:
    return tuple(np.array(x) for x in zip(*(ASKED[row % len(ASKED)] for row in row_B), strict=True))


KEYS = jax.random.split(jax.random.key(1), ROWS)


@functools.cache
def together() -> np.ndarray:
    """Row i under ASKED[i % 5], with key i."""
    return generated(KEYS, Sampling.of(*asked(np.arange(ROWS))))


def test_each_row_follows_the_target_under_its_own_settings():
    prefixes = np.stack(np.meshgrid(*[np.arange(V)] * (TOKENS - 1), indexing="ij"), -1).reshape(-1, TOKENS - 1)
    texts = np.concatenate([np.tile(PROMPT, (len(prefixes), 1)), prefixes], 1)
    position = jnp.broadcast_to(jnp.arange(texts.shape[1]), texts.shape)
    out = transformer.forward(PARAMS, TARGET, texts, position, transformer.causal_mask(*texts.shape))
    logits = np.asarray(transformer.logits(PARAMS, out.hidden_BxSxD[:, len(PROMPT) - 1 :]))
    logits = logits.reshape(V, V, TOKENS, V)
    for setting, found in zip(ASKED, together().reshape(-1, len(ASKED), TOKENS).swapaxes(0, 1), strict=True):
        law = np.apply_along_axis(reference, -1, logits, *setting)
        joint = law[0, 0, 0][:, None, None] * law[:, 0, 1][:, :, None] * law[:, :, 2]
        counts, expected = np.zeros_like(joint), joint * len(found)
        np.add.at(counts, tuple(found.T), 1)
        assert (counts[expected == 0] == 0).all()
        often = expected >= 5
        rest = [x[~often].sum() for x in (counts, expected)]
        pooled = [np.r_[x[often], r if rest[1] else []] for x, r in zip((counts, expected), rest, strict=True)]
        assert len(pooled[0]) == 1 if setting[0] == 0 else len(pooled[0]) > 10
        assert setting[0] == 0 or stats.chisquare(*pooled).pvalue > 1e-3


def test_a_row_gives_the_same_whatever_its_neighbours_ask_for_in_one_compilation():
    wanted = together()
    compiled = generate.decode._cache_size(), generate.prefill._cache_size()
    place = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_array_equal(generated(KEYS[place], Sampling.of(*asked(place))), wanted[place])
    half = place % 2 == 0  # the others ask for something else now
    others = np.where(half, place, place + 3)
    found = generated(KEYS[place], Sampling.of(*asked(others)))
    np.testing.assert_array_equal(found[half], wanted[place][half])
    assert (found[~half] != wanted[place][~half]).any()
    assert (generate.decode._cache_size(), generate.prefill._cache_size()) == compiled


def test_a_row_alone_gives_the_same():
    for row in (0, 1):  # the argmax alone, and nothing cut off: other programs than the whole batch has
        alone = [generated(KEYS[i : i + 1], Sampling.of(*ASKED[row])) for i in range(row, 60, 2 * len(ASKED))]
        np.testing.assert_array_equal(np.concatenate(alone), together()[row : 60 : 2 * len(ASKED)])


def test_drafts_are_drawn_from_the_drafters_law_under_the_settings_of_their_row():
    sampling = Sampling.of(*asked(np.arange(ROWS)))
    plain = jax.tree.map(np.full_like, sampling, Sampling(1.0, 0, 1.0))
    draft = jax.jit(lambda state, how: generate.draft_window(PARAMS, drafter(), state, chain(K), how)[1])
    state = started(KEYS, sampling)
    found, whole = draft(state, sampling), draft(state, plain)
    law, logits = (x.log_q_BxMxKxW[:, 0, 0] for x in (found, whole))  # a law is as good as the logits it came from
    np.testing.assert_allclose(np.exp(law), np.exp(log_distribution(logits, sampling)), atol=1e-6)
    for which in range(len(ASKED)):
        for k in range(K):
            id_B, law_BxW = (np.asarray(x[which :: len(ASKED), 0, k]) for x in (found.id_BxMxK, found.log_q_BxMxKxW))
            assert (np.take_along_axis(law_BxW, id_B[:, None], 1) > -np.inf).all()
            counts, expected = np.bincount(id_B, minlength=5), np.exp(law_BxW).sum(0)
            variance = (np.exp(law_BxW) * (1 - np.exp(law_BxW))).sum(0)
            assert (np.abs(counts - expected) < 4.5 * np.sqrt(variance) + 1e-3).all()
