"""The fused head and soft cross-entropy against its plain definition, with what its backward pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives.head_loss import head_loss


def head_case(seed=0, B=2, M=6, E=8, W=11):
    rng = np.random.default_rng(seed)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(B, M, W)) * 2, jnp.float32))
    label = np.array(p.argmax(-1), np.int32)
    label[0, :2] = -1
    weight = rng.random((B, M)).astype(np.float32) * (rng.random((B, M)) < 0.7)
    h, w = rng.normal(size=(B, M, E)).astype(np.float32), rng.normal(size=(W, E)).astype(np.float32)
    return h, w, p, jnp.asarray(label), jnp.asarray(weight)


def plain_head_loss(h, w, p, label, weight):
    log_q = jax.nn.log_softmax(jnp.einsum("bme,we->bmw", h, w, precision="highest"), axis=-1)
    loss = -(p * log_q).sum(-1)
    match = (log_q.argmax(-1) == label) & (label >= 0)
    return (weight * loss).sum(), (loss, match, jnp.minimum(p, jnp.exp(log_q)).sum(-1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_head_loss_is_the_plain_soft_cross_entropy(dtype, tolerance):
    h, w, p, label, weight = head_case()

    @jax.jit
    def ours(h, w):
        judged = head_loss(h, w, p, label, weight, dtype)
        return 3.0 * judged.total, judged

    @jax.jit
    def plain(h, w):
        total, parts = plain_head_loss(h, w, p, label, weight)
        return 3.0 * total, (total, *parts)

    (_, judged), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(h, w)
    (_, expected), expected_gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(h, w)
    for a, b in zip((judged.total, judged.loss_BxM, judged.overlap_BxM), (*expected[:2], expected[3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
    if dtype == jnp.float32:
        np.testing.assert_array_equal(judged.match_BxM, expected[2])
    assert not judged.match_BxM[0, :2].any()  # an unknown label never matches
    # without a derivative the same numbers come out
    for a, b in zip(ours(h, w)[1], judged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_head_loss_without_any_weight():
    h, w, p, label, _ = head_case(1)
    h[0, 3] = 1e30  # what lies past the mask may be anything finite
    zero = jnp.zeros(label.shape)
    value, gradients = jax.value_and_grad(lambda h, w: head_loss(h, w, p, label, zero, jnp.float32).total, (0, 1))(h, w)
    assert value == 0 and not any(g.any() for g in gradients)
