"""The expected reward of a window in closed form: against enumeration, automatic differentiation, and sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world

from ppow_jax.objectives import supervised
from ppow_jax.objectives.criticality import divergence
from ppow_jax.objectives.expected import expected_reward, window_loss
from ppow_jax.objectives.policy import group_advantage
from ppow_jax.objectives.rewards import CostModel, speedup_reward

K, N = 4, 7


def rewards(general=False):
    costs = CostModel(0.12, general=general, verify=1.2, rollback=0.05, bonus=1.0)
    return np.asarray(speedup_reward(jnp.arange(K + 1), K, costs))


def likelihoods():
    q_KxN = np.random.default_rng(0).uniform(0.05, 0.95, (K, N))
    q_KxN[:, 0], q_KxN[2, 1], q_KxN[:, 2] = 0.0, 0.0, 1.0  # never accepted; two tokens at most; always accepted
    return q_KxN


@pytest.mark.parametrize("general", [False, True])
def test_moments_are_those_of_all_outcomes(general):
    q_KxN, reward_K1 = likelihoods(), rewards(general)
    mean_N, square_N = np.zeros(N), np.zeros(N)
    for hits in itertools.product((False, True), repeat=K):
        chance_N = np.prod([q if hit else 1 - q for hit, q in zip(hits, q_KxN, strict=True)], axis=0)
        k = (list(hits) + [False]).index(False)
        mean_N += chance_N * reward_K1[k]
        square_N += chance_N * reward_K1[k] ** 2
    expected = expected_reward(jnp.log(q_KxN), jnp.asarray(reward_K1))
    np.testing.assert_allclose(expected.mean_x, mean_N, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(expected.std_x**2, square_N - mean_N**2, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(expected.chance_Kx, np.cumprod(q_KxN, 0), rtol=1e-5)
    np.testing.assert_allclose(expected.reach_Kx[1:], expected.chance_Kx[:-1])


def test_weights_are_the_gradient_of_the_mean_over_the_deviation():
    q_KxN, reward_K1 = likelihoods()[:, 3:], jnp.asarray(rewards())
    log_q_KxN = jnp.log(q_KxN)
    gradient_KxN = jax.grad(lambda log_q: expected_reward(log_q, reward_K1).mean_x.sum())(log_q_KxN)
    expected = expected_reward(log_q_KxN, reward_K1)
    np.testing.assert_allclose(expected.weight_Kx, gradient_KxN / (expected.std_x + 1e-4), rtol=1e-4)
    certain = expected_reward(jnp.log(likelihoods()), reward_K1)
    assert np.isfinite(certain.weight_Kx).all() and not certain.weight_Kx[:, 0].any()


def test_it_is_what_a_large_group_of_sampled_windows_estimates():
    """The score-function estimate with group-relative advantages, by the drafter's own tokens."""
    q_K, reward_K1, G = np.array([0.8, 0.6, 0.7, 0.3]), rewards(), 400_000
    hit_GxK = np.random.default_rng(1).random((G, K)) < q_K
    accepted_G = np.cumprod(hit_GxK, 1).sum(1)
    advantage_G = np.asarray(group_advantage(jnp.asarray(reward_K1[accepted_G])))
    # d log pi / d logit of a two-token law is hit - q; tokens after the first miss do not count
    score_GxK = np.where(np.arange(K) <= accepted_G[:, None], hit_GxK - q_K, 0.0)
    sampled_K = (advantage_G[:, None] * score_GxK).mean(0)
    weight_K = expected_reward(jnp.log(q_K), jnp.asarray(reward_K1)).weight_Kx
    np.testing.assert_allclose(weight_K * (1 - q_K), sampled_K, atol=4 / np.sqrt(G))


def plain_loss(drafter, windows, reward_K1, beta, priority_BxM):
    """The same objective, differentiated by JAX from logits that are all kept."""
    steps = supervised.unroll(drafter, world.target_params()["embed"], windows, K)
    logits = [step.hidden_BxMxE @ drafter.params["lm_head"].T for step in steps]
    log_q, valid, kl = [], [], []
    for step, z in zip(steps, logits, strict=True):
        known = step.valid_BxM & (step.label_BxM >= 0)
        label = jnp.maximum(step.label_BxM, 0)[..., None]
        mine = jnp.take_along_axis(jax.nn.log_softmax(z), label, -1)[..., 0]
        log_q.append(jnp.where(known, mine, -1e9))
        valid.append(step.valid_BxM)
        kl.append(divergence(step.probability_BxMxW, z))
    log_q, valid, kl = map(jnp.stack, (log_q, valid, kl))
    expected = jax.lax.stop_gradient(expected_reward(log_q, reward_K1))
    mean_BxM = expected_reward(log_q, reward_K1).mean_x
    a_BxM = jnp.where(valid[0], priority_BxM, 0.0)
    reached = jnp.where(valid, expected.reach_Kx * a_BxM, 0.0)
    policy = jnp.sum(a_BxM * mean_BxM / (expected.std_x + 1e-4)) / a_BxM.sum()
    return beta * jnp.sum(reached * kl) / reached.sum() - policy


def test_loss_has_the_gradient_of_its_definition():
    drafter = world.trained()
    scored = world.scored_batch(drafter.target_ids_W, world.batch())
    windows, reward_K1 = scored.windows, jnp.asarray(rewards())
    assert (windows.label_BxM < 0)[windows.anchor_mask_BxM].any()
    rng = np.random.default_rng(0)
    priority_BxM = jnp.asarray(rng.random(windows.anchor_BxM.shape) + 0.5, jnp.float32)

    def ours(params):
        d = drafter.replace(params=params)
        steps = supervised.unroll(d, world.target_params()["embed"], windows, K)
        return window_loss(d, steps, reward_K1, 0.5, priority_BxM)

    def plain(params):
        return plain_loss(drafter.replace(params=params), windows, reward_K1, 0.5, priority_BxM)

    (_, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(drafter.params)
    value, wanted = jax.jit(jax.value_and_grad(plain))(drafter.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-3, atol=2e-5 * scale, err_msg=name)
