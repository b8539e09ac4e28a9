"""Attention and norms of our own on CPUs against plain formulas, and that no row changes another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.cpu import library
from ppow_jax.cpu.attention import attend
from ppow_jax.models.layers import KV, Keys, attention, rms_norm
from ppow_jax.models.transformer import causal_mask

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")

# B, S, H, Kv, d, L
SHAPES = [(1, 1, 1, 1, 1, 1), (1, 1, 9, 3, 64, 300), (2, 8, 9, 3, 64, 517), (3, 40, 4, 2, 16, 130)]
SHAPES += [(2, 5, 16, 1, 8, 33), (1, 200, 6, 6, 80, 0), (1, 3, 100, 1, 24, 257)]


def _block(rng, B, Kv, d, L, mask_BxSxL):
    k, v = rng.normal(size=(B, Kv, d, L)), rng.normal(size=(B, Kv, L, d))
    return Keys(KV(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)), mask_BxSxL)


def _case(B, S, H, Kv, d, L, seed=0):
    """Queries, a cache of L of which each query sees some, and their own keys."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(3 * rng.normal(size=(B, S, H, d)), jnp.float32)
    own = _block(rng, B, Kv, d, S, causal_mask(B, S))
    return q, [_block(rng, B, Kv, d, L, jnp.asarray(rng.random((B, S, L)) < 0.6))] if L else [], own


def _in_float64(q, blocks):
    B, S, H, d = q.shape
    k = np.concatenate([block.kv.k_BxKvxdxL for block in blocks], 3).astype(np.float64)
    v = np.concatenate([block.kv.v_BxKvxLxd for block in blocks], 2).astype(np.float64)
    mask = np.concatenate([block.mask_BxSxL for block in blocks], 2)
    k, v = (np.repeat(x, H // x.shape[1], 1) for x in (k, v))
    s = np.einsum("bshd,bhdl->bhsl", np.asarray(q, np.float64), k) * d**-0.5
    s = np.where(mask[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhsl,bhld->bshd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape):
    q, contexts, own = _case(*shape)
    assert "ppow_attention" in jax.jit(attention).lower(q, contexts, own).as_text()
    np.testing.assert_allclose(jax.jit(attention)(q, contexts, own), _in_float64(q, [*contexts, own]), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_weights_keep_their_precision_from_flat_to_sharp(scale):
    q, contexts, own = _case(1, 4, 2, 2, 32, 400)
    got = attention(q * scale, contexts, own)
    np.testing.assert_allclose(got, _in_float64(q * scale, [*contexts, own]), atol=2e-5)


def test_a_query_is_the_same_whatever_is_beside_it():
    """Its row alone, and its window alone: S of 1 and of 50 are cut into tasks in different ways."""
    q, (cache,), _ = _case(2, 50, 9, 3, 64, 400)
    flat = lambda rows, s: [(*(x[rows] for x in cache.kv), cache.mask_BxSxL[rows, s])]  # noqa: E731
    together = attend(q, flat(slice(None), slice(None)))
    for b, s in ((0, 0), (1, 17), (1, 49)):
        alone = attend(q[b : b + 1, s : s + 1], flat(slice(b, b + 1), slice(s, s + 1)))
        np.testing.assert_array_equal(alone[0, 0], together[b, s])


def test_cutting_the_keys_into_blocks_changes_no_bit():
    """One block, or two with slots between that nobody sees: as a cache that a window continues."""
    q, (cache,), _ = _case(2, 5, 9, 3, 64, 300)
    k, v, mask = *cache.kv, jnp.asarray(np.random.default_rng(1).random((2, 5, 300)) < 0.8)
    whole = attend(q, [(k, v, mask)])
    first = (jnp.pad(k[..., :77], [(0, 0)] * 3 + [(0, 200)]), jnp.pad(v[:, :, :77], [(0, 0)] * 2 + [(0, 200), (0, 0)]))
    first = (*first, jnp.pad(mask[..., :77], [(0, 0)] * 2 + [(0, 200)]))
    np.testing.assert_array_equal(attend(q, [first, (k[..., 77:], v[:, :, 77:], mask[..., 77:])]), whole)


def test_norms_are_exact_and_the_same_whatever_is_beside_a_row():
    x, scale = (np.random.default_rng(0).normal(size=n).astype(np.float32) for n in ((3, 70, 83), 83))
    want = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-5) * scale
    got = jax.jit(lambda x: rms_norm(x, scale, 1e-5))(x)
    assert "ppow_norm_factor" in jax.jit(lambda x: rms_norm(x, scale, 1e-5)).lower(x).as_text()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rms_norm(x[1, 5], scale, 1e-5), got[1, 5])


def test_gradients_of_norms(monkeypatch):
    x, scale = (np.random.default_rng(0).normal(size=n).astype(np.float32) for n in ((6, 40), 40))

    def loss(x, scale):
        return jnp.sum(jnp.sin(rms_norm(x, scale, 1e-5)))

    got = jax.grad(loss, (0, 1))(x, scale)
    monkeypatch.setattr("ppow_jax.models.layers._ours", lambda: False)
    for mine, plain in zip(got, jax.grad(loss, (0, 1))(x, scale), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5)


def test_what_no_query_sees_is_not_read_and_changes_nothing():
    q, (cache,), own = _case(2, 3, 4, 2, 16, 300)
    seen = jnp.broadcast_to(jnp.arange(300) < 100, (2, 3, 300))
    spoilt = KV(*(x.at[:, :, :, 128:].set(jnp.nan) for x in cache.kv[:1]), cache.kv[1].at[:, :, 128:].set(jnp.nan))
    got = attention(q, [Keys(spoilt, seen)], own)
    np.testing.assert_array_equal(got, attention(q, [Keys(cache.kv, seen)], own))
    nothing = attend(q, [(*cache.kv, jnp.zeros((2, 3, 300), bool))])
    assert not np.asarray(nothing).any()


def test_nan_is_not_hidden_and_stays_with_its_query():
    q, contexts, own = _case(1, 4, 2, 2, 8, 40)
    out = np.asarray(attention(q.at[0, 2, 1, 3].set(jnp.nan), contexts, own))
    assert np.isnan(out[0, 2, 1]).all()
    assert np.isfinite(np.delete(out[0], 2, 0)).all()


def test_gradients_are_those_of_the_plain_formula(monkeypatch):
    q, contexts, own = _case(2, 6, 4, 2, 8, 20)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, [Keys(KV(k, v), contexts[0].mask_BxSxL)], own)))

    got = jax.grad(loss, (0, 1, 2))(q, *contexts[0].kv)
    monkeypatch.setattr("ppow_jax.models.layers._ours", lambda: False)
    for mine, plain in zip(got, jax.grad(loss, (0, 1, 2))(q, *contexts[0].kv), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-5)
