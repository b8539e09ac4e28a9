"""The fused head and its losses against their plain definitions, with what the backward pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives.head_loss import SAMPLED, DraftRule, Wanted, Weights, head_loss, overlap_loss


def head_case(seed=0, B=2, M=6, E=8, W=11):
    rng = np.random.default_rng(seed)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(B, M, W)) * 2, jnp.float32))
    label = np.array(p.argmax(-1), np.int32)
    label[0, :2] = -1
    mass = rng.uniform(0.3, 1.0, (B, M)).astype(np.float32)
    soft, hard = (rng.random((B, M)).astype(np.float32) * (rng.random((B, M)) < 0.7) for _ in range(2))
    hard[label < 0] = 0  # what cannot be drafted has no weight
    h, w = rng.normal(size=(B, M, E)).astype(np.float32), rng.normal(size=(W, E)).astype(np.float32)
    return h, w, Wanted(p, jnp.asarray(mass), jnp.asarray(label)), jnp.asarray(soft), jnp.asarray(hard)


def plain_head_loss(h, w, wanted, soft, hard, rule):
    p, mass, label = wanted
    z = jnp.einsum("bme,we->bmw", h, w, precision="highest")
    log_q = jax.nn.log_softmax(z, axis=-1)
    loss = -(p * log_q).sum(-1)
    match = (log_q.argmax(-1) == label) & (label >= 0)
    label_z = jnp.take_along_axis(z, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    if rule.rivals:
        others = jnp.where(jnp.arange(z.shape[-1]) == label[..., None], -jnp.inf, z)
        rival_z = jnp.sort(others, -1)[..., -rule.rivals]
        log_a = jax.nn.log_sigmoid((label_z - rival_z) / rule.temperature)
    else:
        log_a = label_z / rule.temperature - jax.nn.logsumexp(z / rule.temperature, -1)
    total = (soft * loss).sum() - (hard * jnp.where(label >= 0, log_a, 0.0)).sum()
    overlap = jnp.minimum(mass[..., None] * p, jnp.exp(log_q)).sum(-1)
    log_q_label = jnp.take_along_axis(log_q, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    return total, (loss, match, overlap, *(jnp.where(label >= 0, x, -jnp.inf) for x in (log_a, log_q_label)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
@pytest.mark.parametrize("rule", [SAMPLED, DraftRule(0.3), DraftRule(0.5, 1), DraftRule(0.5, 3)], ids=str)
def test_head_loss_is_its_plain_definition(rule, dtype, tolerance):
    h, w, wanted, soft, hard = head_case()

    @jax.jit
    def ours(h, w):
        total, scores = head_loss(h, w, wanted, Weights(soft, hard), rule, dtype)
        return 3.0 * total, (total, scores)

    @jax.jit
    def plain(h, w):
        total, parts = plain_head_loss(h, w, wanted, soft, hard, rule)
        return 3.0 * total, (total, parts)

    (_, (total, scores)), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(h, w)
    (_, (expected_total, expected)), expected_gradients = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(h, w)
    scale = 3 if rule.temperature < 1 else 1  # logits are divided by the temperature, and so are their errors
    np.testing.assert_allclose(total, expected_total, rtol=scale * tolerance, atol=scale * tolerance)
    for name, a, b in zip(scores._fields, scores, expected, strict=True):
        if name != "match_BxM":
            np.testing.assert_allclose(a, b, rtol=scale * tolerance, atol=scale * tolerance, err_msg=name)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=scale * tolerance, atol=scale * tolerance * np.abs(b).max())
    if dtype == jnp.float32:
        np.testing.assert_array_equal(scores.match_BxM, expected[1])
    assert not scores.match_BxM[0, :2].any()  # an unknown label never matches
    # without a derivative the same numbers come out
    for a, b in zip(jax.tree.leaves(ours(h, w)[1]), [total, *scores], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_soft_loss_alone_is_that_without_hard_weights():
    h, w, wanted, soft, hard = head_case(2)

    def total(h, w, hard):
        return head_loss(h, w, wanted, Weights(soft, hard), SAMPLED, jnp.float32)[0]

    a = jax.value_and_grad(total, (0, 1))(h, w, None)
    b = jax.value_and_grad(total, (0, 1))(h, w, jnp.zeros_like(hard))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_losses_of_the_acceptance_rate_are_their_plain_definitions(hybrid):
    """Value against numpy, gradient against automatic differentiation, beside the other losses."""
    h, w, wanted, soft, hard = head_case(4)
    weight = jnp.asarray(np.random.default_rng(5).random(soft.shape), jnp.float32)
    p, mass, _ = wanted

    def plain(h, w):
        log_q = jax.nn.log_softmax(jnp.einsum("bme,we->bmw", h, w, precision="highest"), -1)
        alpha = jnp.minimum(mass[..., None] * p, jnp.exp(log_q)).sum(-1)
        loss = -jnp.log(alpha)
        if hybrid:
            share = jnp.exp(-3.0 * jax.lax.stop_gradient(alpha))
            loss = -share * (p * log_q).sum(-1) + (1 - share) * (1 - alpha)
        return plain_head_loss(h, w, wanted, soft, hard, SAMPLED)[0] + (weight * loss).sum()

    def ours(h, w):
        return head_loss(h, w, wanted, Weights(soft, hard, weight), SAMPLED, jnp.float32, hybrid)[0]

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(h, w)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(h, w)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(ours)(h, w), expected, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    z = np.einsum("bme,we->bmw", h.astype(float), w.astype(float))
    q = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    alpha = np.minimum(np.asarray(mass)[..., None] * np.asarray(p), q).sum(-1)
    cross_entropy = -(np.asarray(p) * np.log(q)).sum(-1)
    share = np.exp(-3 * alpha)
    reference = share * cross_entropy + (1 - share) * (1 - alpha) if hybrid else -np.log(alpha)
    np.testing.assert_allclose(overlap_loss(jnp.asarray(alpha), cross_entropy, hybrid), reference, rtol=1e-5)
    slope = jax.grad(lambda alpha: overlap_loss(alpha, cross_entropy, hybrid).sum())(jnp.asarray(alpha))
    np.testing.assert_allclose(slope, share - 1 if hybrid else -1 / alpha, rtol=1e-5)
    alone, _ = head_loss(h, w, wanted, Weights(overlap_BxM=weight), SAMPLED, jnp.float32, hybrid)
    np.testing.assert_allclose(alone, (np.asarray(weight) * reference).sum(), rtol=1e-5)


def test_the_acceptance_loss_of_a_certain_target_is_its_cross_entropy():
    """And where nothing can be accepted, or a weight is 0, the gradient stays finite."""
    h, w, wanted, _, _ = head_case(6)
    one, zero = jnp.ones(wanted.mass_BxM.shape), jnp.zeros(wanted.mass_BxM.shape)
    certain = Wanted(jax.nn.one_hot(wanted.p_BxMxW.argmax(-1), 11), one, wanted.label_BxM)

    def gradient(wanted, soft, overlap):
        weights = Weights(soft, overlap_BxM=overlap)
        return jax.grad(lambda h: head_loss(h, w, wanted, weights, SAMPLED, jnp.float32)[0])(h)

    np.testing.assert_allclose(gradient(certain, zero, one), gradient(certain, one, None), rtol=1e-4, atol=1e-5)
    assert not gradient(wanted._replace(mass_BxM=zero), zero, one).any()
    h[0, 3] = 1e30  # past the mask
    assert not gradient(wanted, zero, zero).any()


def test_as_the_temperature_falls_the_drafted_token_is_the_most_probable_one():
    h, w, wanted, soft, hard = head_case(3)
    _, scores = head_loss(h, w, wanted, Weights(soft, hard), DraftRule(1e-3), jnp.float32)
    known = wanted.label_BxM >= 0
    np.testing.assert_allclose(np.exp(scores.log_a_BxM)[known], scores.match_BxM[known] * 1.0, atol=1e-6)


@pytest.mark.parametrize("weights", [Weights(), Weights(*[jnp.zeros((2, 6))] * 3)], ids=["none", "zeros"])
def test_head_loss_without_any_weight(weights):
    h, w, wanted, _, _ = head_case(1)
    h[0, 3] = 1e30  # what lies past the mask may be anything finite

    def total(h, w):
        return head_loss(h, w, wanted, weights, SAMPLED, jnp.float32)[0]

    value, gradients = jax.value_and_grad(total, (0, 1))(h, w)
    assert value == 0 and not any(g.any() for g in gradients)
