"""Rotary embedding, attention over blocks, and the matrix products of both precisions, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.models import cache, layers
from ppow_jax.models.layers import (
    KV,
    Keys,
    attention,
    linear,
    linear_bf16,
    project_bf16,
    rms_norm,
    rope,
    rotation,
    swiglu,
)

B, S, L, H, KV_HEADS, D = 2, 5, 7, 6, 2, 8


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_keys(seed: int, length: int, mask_BxSxL: np.ndarray) -> Keys:
    k, v = normal(seed, B, length, KV_HEADS, D), normal(seed + 1, B, length, KV_HEADS, D)
    return Keys(KV.of(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(mask_BxSxL))


def random_mask(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).random((B, S, length)) < 0.6


def own_keys(seed: int) -> Keys:
    return random_keys(seed, S, np.broadcast_to(np.tril(np.ones((S, S), bool)), (B, S, S)))


def plain_attention(q_BxSxHxd: np.ndarray, blocks: list[Keys]) -> np.ndarray:
    """Every head of every query on its own, in float64."""
    k_BxLxKvxd = np.concatenate([np.asarray(b.kv.k_BxKvxdxL).transpose(0, 3, 1, 2) for b in blocks], 1)
    v_BxLxKvxd = np.concatenate([np.asarray(b.kv.v_BxKvxLxd).transpose(0, 2, 1, 3) for b in blocks], 1)
    mask_BxSxL = np.concatenate([np.asarray(b.mask_BxSxL) for b in blocks], 2)
    out = np.zeros_like(q_BxSxHxd, np.float64)
    for b, s, h in np.ndindex(out.shape[:3]):
        seen, kv_head = mask_BxSxL[b, s], h // (H // KV_HEADS)
        k, v = (x[b, seen, kv_head].astype(np.float64) for x in (k_BxLxKvxd, v_BxLxKvxd))
        score = k @ q_BxSxHxd[b, s, h] / np.sqrt(D)
        weight = np.exp(score - score.max())
        out[b, s, h] = weight @ v / weight.sum()
    return out


@pytest.mark.parametrize("query_block", [2, 128])
def test_attention_over_blocks_is_attention_over_their_concatenation(monkeypatch, query_block):
    monkeypatch.setattr(layers, "QUERY_BLOCK", query_block)
    q = normal(0, B, S, H, D)
    contexts = [random_keys(1, L, random_mask(2, L)), random_keys(3, 3, random_mask(4, 3))]
    own = own_keys(5)
    for some in ([], contexts[:1], contexts) if query_block == 128 else (contexts,):
        out = jax.jit(lambda *x: attention(*x))(jnp.asarray(q), some, own)
        np.testing.assert_allclose(out, plain_attention(q, [*some, own]), atol=1e-5)


def test_attention_in_bfloat16_is_that_of_float32_up_to_rounding():
    """The accelerators' form: several blocks, one of them without any visible key for some queries."""
    q, nowhere = jnp.asarray(normal(0, B, S, H, D), jnp.bfloat16), random_mask(2, L)
    nowhere[:, 1] = False
    keys = [random_keys(1, L, nowhere), random_keys(3, 3, random_mask(4, 3)), own_keys(5)]
    rounded = [Keys(KV(*(x.astype(jnp.bfloat16) for x in kv)), mask) for kv, mask in keys]
    out = jax.jit(attention)(q, rounded[:-1], rounded[-1])
    assert out.dtype == jnp.bfloat16
    exact = [Keys(KV(*(x.astype(jnp.float32) for x in kv)), mask) for kv, mask in rounded]
    np.testing.assert_allclose(out.astype(np.float32), plain_attention(np.asarray(q, np.float32), exact), atol=0.02)


def test_attention_does_not_see_masked_keys():
    q, mask = jnp.asarray(normal(0, B, S, H, D)), random_mask(1, L)
    mask[..., 3] = False
    context, own = random_keys(2, L, mask), own_keys(4)
    garbage = KV(context.kv.k_BxKvxdxL.at[..., 3].set(1e4), context.kv.v_BxKvxLxd.at[:, :, 3].set(-1e4))
    attend = jax.jit(attention)
    np.testing.assert_array_equal(
        attend(q, [context], own), attend(q, [Keys(garbage, context.mask_BxSxL)], own)
    )


def test_attention_without_any_visible_key_is_finite():
    own = random_keys(1, S, np.zeros((B, S, S), bool))
    out = jax.jit(attention)(jnp.asarray(normal(0, B, S, H, D)), [], own)
    assert np.isfinite(out).all()


def test_rope_turns_each_pair_by_its_angle():
    x, position = normal(0, B, S, H, D), np.array([[0, 1, 2, 3, 4], [7, 0, 100, 5, 1999]])
    out = np.asarray(rope(jnp.asarray(x), rotation(jnp.asarray(position), D, 500.0)), np.float64)
    angle = position[..., None] * 500.0 ** (-np.arange(D // 2) * 2 / D)
    z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)[:, :, None]
    np.testing.assert_allclose(out, np.concatenate([z.real, z.imag], -1), atol=1e-3)
    np.testing.assert_array_equal(out[0, 0], x[0, 0])


def test_rope_products_depend_on_the_distance_alone():
    q, k = jnp.asarray(normal(0, 1, 1, 1, D)), jnp.asarray(normal(1, 1, 1, 1, D))

    @jax.jit
    @jax.vmap
    def product(i, j):
        at_i, at_j = (rope(x, rotation(n[None, None], D, 100.0)) for x, n in ((q, i), (k, j)))
        return jnp.sum(at_i * at_j)

    near, same, other = product(jnp.array([3, 90, 3]), jnp.array([1, 88, 2]))
    np.testing.assert_allclose(near, same, atol=1e-4)
    assert abs(near - other) > 1e-2


def test_rms_norm_and_swiglu_by_their_formulas():
    x, scale = normal(0, 3, D), normal(1, D)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-3), expected, rtol=1e-5)
    gate, up, down = normal(2, 12, D), normal(3, 12, D), normal(4, D, 12)
    a = x @ gate.T
    expected = (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(swiglu(*map(jnp.asarray, (x, gate, up, down))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 16), (1, 1, 16), (2, 16), (3, 4, 16), (16,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_multiplies_in_the_precision_of_its_weights(shape, dtype):
    x, w = jnp.asarray(normal(0, *shape)), jnp.asarray(normal(1, 24, 16), dtype)
    y = linear(x, w)
    assert y.dtype == jnp.float32 and y.shape == (*shape[:-1], 24)
    rounded = np.asarray(x.astype(dtype).astype(jnp.float32), np.float64)
    np.testing.assert_allclose(y, rounded @ np.asarray(w.astype(jnp.float32), np.float64).T, rtol=1e-4, atol=1e-4)


def test_one_row_equals_the_same_row_among_many():
    x, w = jnp.asarray(normal(0, 4, 64)), jnp.asarray(normal(1, 40, 64), jnp.bfloat16)
    many = np.asarray(linear(x, w))
    for i, row in enumerate(np.asarray(x)):
        np.testing.assert_allclose(linear(jnp.asarray(row)[None], w)[0], many[i], rtol=1e-5, atol=1e-5)


def test_bfloat16_products_have_the_gradients_of_float32():
    x, w, target = jnp.asarray(normal(0, 3, 32, 64)), jnp.asarray(normal(1, 48, 64) / 8), normal(2, 3, 32, 48)

    def loss(product):
        return lambda x, w: jnp.mean((product(x, w) - target) ** 2)

    value, (dx, dw) = jax.jit(jax.value_and_grad(loss(linear_bf16), (0, 1)))(x, w)
    value32, (dx32, dw32) = jax.jit(jax.value_and_grad(loss(linear), (0, 1)))(x, w)
    assert dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_allclose(value, value32, rtol=1e-2)
    for g, g32 in ((dx, dx32), (dw, dw32)):
        assert np.linalg.norm(g - g32) < 0.01 * np.linalg.norm(g32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("product", [linear_bf16, project_bf16])
def test_the_gradient_of_a_products_input_is_summed_in_the_dtype_of_the_input(monkeypatch, product, dtype):
    """It is a sum over the devices that share the matrix: they send that dtype."""
    monkeypatch.setattr(layers, "_ours", lambda: False)
    x, w = jnp.ones((3, 64), dtype), jnp.ones((48, 64))
    back = jax.vjp(lambda x: product(x, w), x)[1]
    y = jax.eval_shape(product, x, w)
    equations = jax.make_jaxpr(back)(jnp.ones(y.shape, y.dtype)).eqns
    products = [e.outvars[0].aval for e in equations if e.primitive.name == "dot_general"]
    gradients = [((3, 64), dtype), ((48, 64), "float32")]  # of x, and of the weights
    assert [(aval.shape, aval.dtype) for aval in products] == gradients


def test_cache_keeps_rows_apart_and_writes_where_it_is_told():
    for rows in (1, 2):
        old = cache.empty(rows, KV_HEADS, L, D)
        k, v = normal(0, rows, 2, KV_HEADS, D), normal(1, rows, 2, KV_HEADS, D)
        start = np.array([3, 0])[:rows]
        new = jax.jit(cache.write)(old, KV.of(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(start))
        new = KV(*map(np.asarray, new))
        for b in range(rows):
            at = slice(start[b], start[b] + 2)
            np.testing.assert_array_equal(new.v_BxKvxLxd[b, :, at], v[b].transpose(1, 0, 2))
            np.testing.assert_array_equal(new.k_BxKvxdxL[b, :, :, at], k[b].transpose(1, 2, 0))
            assert np.count_nonzero(new.v_BxKvxLxd[b].any((0, 2))) == 2
    grown = KV(*map(np.asarray, cache.grow(KV(*map(jnp.asarray, new)), L + 4)))
    np.testing.assert_array_equal(grown.k_BxKvxdxL[..., :L], new.k_BxKvxdxL)
    assert grown.v_BxKvxLxd.shape == (2, KV_HEADS, L + 4, D) and not grown.v_BxKvxLxd[:, :, L:].any()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_start_below_0_counts_as_0(rows):
    written = cache.write_rows(jnp.zeros((rows, 4)), jnp.ones((rows, 2)), jnp.full(rows, -1))
    assert written.tolist() == [[1, 1, 0, 0]] * rows


def test_visible_slots():
    mask = cache.visible(4, jnp.array([0, 3]), 2)
    np.testing.assert_array_equal(mask, [[[0, 0, 0, 0]] * 2, [[1, 1, 1, 0]] * 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_table_are_exact(dtype):
    table_VxD = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), dtype)
    index = jnp.array([[6, 0], [3, 3]])
    found = jax.jit(layers.rows_of)(table_VxD, index)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(table_VxD, np.float32)[np.asarray(index)])
