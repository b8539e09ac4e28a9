"""v = C(P) KL(P || Q) by hand, and the draw of windows: distinct, allowed, in proportion."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.objectives.criticality import choose_windows, criticality, divergence, window_means


def test_divergence_by_hand():
    p = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    q = np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    logits = jnp.log(q) + jnp.array([[3.0], [-4.0], [0.0]])  # logits count up to a constant
    np.testing.assert_allclose(divergence(p, logits), [math.log(2), math.log(2), 0.0], atol=1e-6)


def test_divergence_and_its_gradient_stay_finite_at_the_extremes():
    p = jnp.array([1.0, 0.0, 0.0])
    for logits in (jnp.array([-1e4, 0.0, 1e4]), jnp.array([1e4, 0.0, 0.0])):
        value, gradient = jax.value_and_grad(lambda z: divergence(p, z))(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    # the gradient is q - p
    z = jnp.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(jax.grad(lambda z: divergence(p, z))(z), jax.nn.softmax(z) - p, atol=1e-6)


def test_criticality_by_hand():
    """|V| = 16: entropy 0 is full confidence, log 16 none, log 4 a half."""
    entropy = jnp.array([0.0, math.log(16), math.log(4), math.log(4)])
    kl = jnp.array([0.7, 5.0, 2.0, 0.0])
    np.testing.assert_allclose(criticality(entropy, kl, 16), [0.7, 0.0, 1.0, 0.0], atol=1e-6)
    # entropies that rounding pushed past the ends do not turn the sign
    assert (criticality(jnp.array([-1e-3, math.log(16) + 1e-3]), jnp.ones(2), 16) == jnp.array([1.0, 0.0])).all()


def test_window_means_by_hand():
    v = jnp.array([[1.0, 2.0, 6.0, 0.0], [4.0, 0.0, 0.0, 8.0]])
    np.testing.assert_allclose(window_means(v, 1), v)
    np.testing.assert_allclose(window_means(v, 2), [[1.5, 4, 3, 0], [2, 0, 4, 4]])
    np.testing.assert_allclose(window_means(v, 6), np.array([[9, 8, 6, 0], [12, 8, 8, 8]]) / 6)


def test_windows_are_distinct_allowed_and_few_where_there_are_few():
    rng = np.random.default_rng(0)
    allowed = rng.random((6, 9)) < 0.6
    allowed[0], allowed[1], allowed[2] = False, np.arange(9) == 4, True
    weight = jnp.asarray(rng.random((6, 9)) * (rng.random((6, 9)) < 0.7))  # some weights are zero
    draw = jax.jit(jax.vmap(lambda key: choose_windows(jax.random.split(key, 6), weight, jnp.asarray(allowed), 4)))
    index_NxBxA, valid_NxBxA = map(np.asarray, draw(jax.random.split(jax.random.key(0), 50)))
    for index, valid in zip(index_NxBxA, valid_NxBxA, strict=True):
        for b in range(6):
            chosen = index[b][valid[b]]
            assert len(chosen) == min(4, allowed[b].sum())
            assert len(set(chosen)) == len(chosen) and allowed[b][chosen].all()
            assert ((index[b] >= 0) & (index[b] < 9)).all()


def test_windows_are_drawn_in_proportion_without_replacement():
    """Two of four, against the exact law of drawing one after the other, in proportion to what is left."""
    weight = np.array([1.0, 2.0, 4.0, 3.0])
    allowed = jnp.array([[True, True, True, True, False]])
    weights = jnp.asarray(np.append(weight, 50.0))[None]  # the heaviest is not allowed
    n = 20_000
    draw = jax.jit(jax.vmap(lambda key: choose_windows(key[None], weights, allowed, 2)[0][0]))
    index_Nx2 = np.asarray(draw(jax.random.split(jax.random.key(1), n)))
    for first, second in itertools.permutations(range(4), 2):
        p = weight[first] / 10 * weight[second] / (10 - weight[first])
        count = (index_Nx2 == (first, second)).all(1).sum()
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), (first, second)


def test_equal_weights_are_uniform():
    n = 20_000
    draw = jax.jit(jax.vmap(lambda k: choose_windows(k[None], jnp.ones((1, 8)), jnp.ones((1, 8), bool), 1)[0][0, 0]))
    count = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(2), n))), minlength=8)
    assert (abs(count - n / 8) < 4.5 * math.sqrt(n / 8)).all()
