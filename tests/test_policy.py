"""Group-relative advantages, the clipped surrogate and its mask: by hand, and where policy gradients break."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives.policy import clipped_surrogate, decision_logp, decisive_tokens, flat_groups, group_advantage


def test_advantages_by_hand():
    reward = jnp.array([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])
    np.testing.assert_allclose(group_advantage(reward, delta=0.0)[0], [-1, 1])
    reward = jnp.array([1.0, 2.0, 3.0, 6.0])  # mean 3, deviations -2 -1 0 3, std sqrt(14 / 4)
    np.testing.assert_allclose(
        group_advantage(reward, delta=0.5), np.array([-2, -1, 0, 3]) / (np.sqrt(3.5) + 0.5), rtol=1e-6
    )
    np.testing.assert_allclose(group_advantage(reward + 100) - group_advantage(reward), 0, atol=1e-4)


def test_groups_without_variance_get_zeros_and_are_counted():
    reward = jnp.array([[0.0] * 4, [2.7] * 4, [0.0, 0.0, 0.0, 0.2]])
    advantage = group_advantage(reward)
    assert not advantage[:2].any() and advantage[2].any()
    np.testing.assert_array_equal(flat_groups(reward), [True, True, False])
    gradient = jax.grad(lambda r: (group_advantage(r) ** 2).sum())(reward[2:])
    assert np.isfinite(gradient).all()


def decisive(accepted_G, K):
    """The decisive tokens of one group in which R_dist is the same everywhere."""
    accepted_G = jnp.asarray(accepted_G)
    return decisive_tokens(accepted_G, jnp.zeros(accepted_G.shape), K)


def test_decisive_tokens():
    """Up to and with the first rejected token; all of them where R_dist tells such windows of the group apart."""
    accepted = jnp.array([[0, 0, 1], [0, 3, 4]])
    own = np.array([[[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]], bool)
    none, alike = jnp.zeros((2, 3)), jnp.array([[0.2, 0.2, 0.0], [0.2, 0.0, 0.0]])
    for r_dist in (none, alike):
        np.testing.assert_array_equal(decisive_tokens(accepted, r_dist, 4), own)
    differs = jnp.array([[0.2, 0.0, 0.0], [0.2, 0.0, 0.0]])
    whole = own.copy()
    whole[0, :2] = True
    np.testing.assert_array_equal(decisive_tokens(accepted, differs, 4), whole)


def test_the_decisions_of_rejection_belong_to_the_policy():
    """The score-function gradient of the expected reward under p/q rejection, over all outcomes, by hand."""
    rng = np.random.default_rng(0)
    V, K, reward_K1 = 3, 2, np.array([0.0, 1.0, 1.7])
    p_KxV = jax.nn.softmax(jnp.asarray(rng.normal(size=(K, V)), jnp.float32))
    z_KxV = jnp.asarray(rng.normal(size=(K, V)), jnp.float32)

    def expected(z_KxV):
        reach_K = jnp.minimum(p_KxV, jax.nn.softmax(z_KxV)).sum(-1)  # a position is accepted so often
        return reward_K1[0] + jnp.sum(jnp.diff(reward_K1) * jnp.cumprod(reach_K))

    def surrogate_of_all(z_KxV):
        log_q, total = jax.nn.log_softmax(z_KxV), 0.0
        for tokens in itertools.product(range(V), repeat=K):
            logp_K = jnp.stack([log_q[k, t] for k, t in enumerate(tokens)])
            target_K = jnp.stack([jnp.log(p_KxV[k, t]) for k, t in enumerate(tokens)])
            for k in range(K + 1):
                decided_K = decision_logp(logp_K, target_K, jnp.array(k))
                counted_K = jnp.where(jnp.arange(K) <= k, decided_K, logp_K)  # later tokens sum to 1
                if k == K or logp_K[k] > target_K[k]:  # else it is never rejected
                    probability = jax.lax.stop_gradient(jnp.exp(counted_K.sum()))
                    total += reward_K1[k] * probability * jnp.where(jnp.arange(K) <= k, decided_K, 0.0).sum()
        return total

    np.testing.assert_allclose(jax.grad(surrogate_of_all)(z_KxV), jax.grad(expected)(z_KxV), atol=2e-5)


def surrogate(logp, old, advantage, clip=0.2, decisive=None, valid=None):
    logp, old = jnp.asarray(logp, jnp.float32), jnp.asarray(old, jnp.float32)
    decisive = jnp.ones(logp.shape, bool) if decisive is None else jnp.asarray(decisive)
    valid = jnp.ones(len(logp), bool) if valid is None else jnp.asarray(valid)
    return clipped_surrogate(logp, old, decisive, jnp.asarray(advantage, jnp.float32), valid, clip)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "learns"),
    [  # PPO's pessimistic bound: a window stops pulling once it has moved far enough the good way, never the bad
        (1.1, 2.0, 2.2, True),
        (1.5, 2.0, 2.4, False),
        (0.5, 2.0, 1.0, True),
        (1.5, -2.0, -3.0, True),
        (0.5, -2.0, -1.6, False),
        (0.9, -2.0, -1.8, True),
    ],
)
def test_clip_by_hand(ratio, advantage, gain, learns):
    old = np.array([[-1.0, -2.0]])
    logp = old + np.log(ratio) / 2
    result = surrogate(logp, old, [advantage])
    np.testing.assert_allclose([result.objective, result.ratio], [gain, ratio], rtol=1e-5)
    assert result.clipped == (0.0 if learns else 1.0)
    gradient = jax.grad(lambda x: surrogate(x, old, [advantage]).objective)(jnp.asarray(logp))
    np.testing.assert_allclose(gradient, np.full((1, 2), ratio * advantage * learns), rtol=1e-5)


def test_the_first_pass_is_the_plain_policy_gradient():
    """At ratio 1 the gradient is A / N per decisive token of a valid window: REINFORCE with a group baseline."""
    old = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)) - 3)
    advantage, valid = jnp.array([1.5, -0.5, 0.25, 9.0]), jnp.array([True, True, True, False])
    mask = decisive([0, 2, 1, 3], 3)
    gradient = jax.grad(lambda x: surrogate(x, old, advantage, decisive=mask, valid=valid).objective)(old)
    expected = np.where(mask, np.array([1.5, -0.5, 0.25, 0.0])[:, None] / 3, 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_masked_tokens_and_windows_change_nothing():
    old = np.full((3, 4), -2.0)
    logp = old + 0.05
    mask = decisive([1, 0, 4], 4)
    valid, advantage = [True, True, False], [1.0, -1.0, 5.0]
    before = surrogate(logp, old, advantage, decisive=mask, valid=valid)
    logp[0, 2:], logp[1, 1:], logp[2] = -1e6, 0.0, 3.0
    after = surrogate(logp, old, [1.0, -1.0, -7.0], decisive=mask, valid=valid)
    assert all(a == b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("accepted", [0, 4])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_all_rejected_and_all_accepted_windows_are_finite(accepted, reward):
    """Equal rewards, impossible tokens and far-off ratios: finite values, finite gradients."""
    G, K = 3, 4
    advantage = group_advantage(jnp.full((1, G), reward)).reshape(-1)
    mask = decisive_tokens(jnp.full(G, accepted), jnp.arange(G) * 0.1, K)
    logits = jnp.array([[0.0, -1e9, 5.0]] * (G * K)).reshape(G, K, 3)

    def objective(logits, advantage):
        logp = jax.nn.log_softmax(logits, axis=-1)[..., 1]  # the impossible one
        return surrogate(logp, jnp.full((G, K), -1.0), advantage, decisive=mask).objective

    for a in (advantage, jnp.array([-1.0, 0.0, 1.0])):
        value, gradient = jax.value_and_grad(objective)(logits, a)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_no_valid_window_at_all():
    value, gradient = jax.value_and_grad(
        lambda x: surrogate(x, np.zeros((2, 3)), [1.0, -1.0], valid=[False, False]).objective
    )(jnp.zeros((2, 3)))
    assert value == 0 and not gradient.any()


def test_a_group_of_equal_rewards_has_no_advantage_whatever_the_rounding_of_its_mean():
    reward_NxG = jnp.broadcast_to(jnp.linspace(0.05, 3.0, 400)[:, None], (400, 7))
    assert (np.asarray(reward_NxG - reward_NxG.mean(-1, keepdims=True)) != 0).any()  # means are rounded
    np.testing.assert_array_equal(group_advantage(reward_NxG), 0)
