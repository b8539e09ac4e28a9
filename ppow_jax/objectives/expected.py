"""PPOW's objective without sampling noise: the expected reward of a window, in closed form.

On text that the target wrote at temperature 0, greedy acceptance keeps a drafted token exactly while it is the text's
own, y. At least k tokens of a window drawn from the drafter are accepted with probability prod_{j<=k} q_j(y_j), and

    E[R] = sum_k (R(k) - R(k-1)) prod_{j<=k} q_j(y_j).

The group-relative policy gradient of PPOW (2605.14978) estimates the gradient of E[R] / std(R) from G sampled windows;
here it is computed, for every window of the text at once, from the same unrolled draft steps as the supervised loss.
What has no closed form, R_dist, is left out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import inner
from ppow_jax.objectives import supervised
from ppow_jax.objectives.supervised import DraftStep

Array = jax.Array


class Expected(NamedTuple):
    """Of windows drawn from the drafter. chance_Kx: that at least 1..K tokens are accepted. reach_Kx: that the tokens
    before are. mean_x, std_x: of the reward. weight_Kx: gradient of mean / (std + delta) by log q of each token, std
    taken as constant, as in a group-relative advantage.
    """

    chance_Kx: Array
    reach_Kx: Array
    mean_x: Array
    std_x: Array
    weight_Kx: Array


def expected_reward(log_q_Kx: Array, reward_K1: Array, delta: float = 1e-4) -> Expected:
    """From log q_j(y_j) of the K tokens that the target wants (-inf: cannot be accepted), and R(0), .., R(K)."""
    chance_Kx = jnp.exp(jnp.cumsum(log_q_Kx, axis=0))
    reach_Kx = jnp.concatenate([jnp.ones_like(chance_Kx[:1]), chance_Kx[:-1]])
    rest = (1,) * (chance_Kx.ndim - 1)
    above_K1 = reward_K1 - reward_K1[0]
    gain_Kx = jnp.diff(above_K1).reshape(-1, *rest) * chance_Kx
    mean_x = gain_Kx.sum(0)
    square_x = (jnp.diff(above_K1**2).reshape(-1, *rest) * chance_Kx).sum(0)
    std_x = jnp.sqrt(jnp.maximum(square_x - mean_x**2, 0.0))
    weight_Kx = jnp.cumsum(gain_Kx[::-1], axis=0)[::-1] / (std_x + delta)
    return Expected(chance_Kx, reach_Kx, reward_K1[0] + mean_x, std_x, weight_Kx)


def window_loss(
    drafter: Drafter, steps: list[DraftStep], reward_K1: Array, kl_weight: float, priority_BxM: Array
) -> tuple[Array, dict[str, Array]]:
    """(a loss with the gradient of -(mean over windows of E[R] / std) + beta KL(target || drafter), metrics).

    steps: `supervised.unroll`, K of them. kl_weight: beta; KL is a mean over tokens, each as often as drafting reaches
    it. priority_BxM: weight of each window in both means (ADAW); windows without a token in the answer count nothing.

    Both terms are cross-entropies at the same logits, one against the text's token, one against the target's
    distribution, so one pass over the head with their mixture gives the gradient of both.
    """
    frozen = jax.lax.stop_gradient(drafter)
    zero_BxM = jnp.zeros(priority_BxM.shape)
    seen = [supervised.judge(frozen, jax.lax.stop_gradient(step), zero_BxM) for step in steps]
    valid_KxBxM = jnp.stack([step.valid_BxM for step in steps])
    log_q_KxBxM = jnp.where(valid_KxBxM, jnp.stack([judged.log_q_BxM for judged in seen]), -jnp.inf)
    expected = expected_reward(log_q_KxBxM, reward_K1)

    counted_BxM = jnp.where(valid_KxBxM[0], priority_BxM, 0.0)
    whole = jnp.maximum(counted_BxM.sum(), 1e-9)
    reached_KxBxM = jnp.where(valid_KxBxM, expected.reach_Kx * counted_BxM, 0.0)
    policy_KxBxM = expected.weight_Kx * counted_BxM / whole
    anchor_KxBxM = kl_weight * reached_KxBxM / jnp.maximum(reached_KxBxM.sum(), 1e-9)
    total = jnp.zeros(())
    for step, policy_BxM, anchor_BxM in zip(steps, policy_KxBxM, anchor_KxBxM, strict=True):
        weight_BxM = policy_BxM + anchor_BxM
        share_BxMx1 = (policy_BxM / jnp.maximum(weight_BxM, 1e-30))[..., None]
        wanted_BxMxW = jax.nn.one_hot(step.label_BxM, step.probability_BxMxW.shape[-1])
        mixed = share_BxMx1 * wanted_BxMxW + (1 - share_BxMx1) * step.probability_BxMxW
        total += supervised.judge(drafter, step._replace(probability_BxMxW=mixed), weight_BxM).total

    def mean(x_BxM):
        return jnp.sum(x_BxM * counted_BxM) / whole

    loss_KxBxM = jnp.stack([judged.loss_BxM for judged in seen])
    kl_KxBxM = loss_KxBxM - jnp.stack([entropy(step.probability_BxMxW) for step in steps])
    kl = jnp.sum(reached_KxBxM * kl_KxBxM) / jnp.maximum(reached_KxBxM.sum(), 1e-9)
    mean_reward = mean(expected.mean_x)
    matched_KxBxM = jnp.cumprod(jnp.stack([judged.match_BxM for judged in seen]) & valid_KxBxM, axis=0)
    return total, {
        "loss": kl_weight * kl - mean(expected.mean_x / (expected.std_x + 1e-4)),
        "reward": mean_reward,
        "reward_std": jnp.sqrt(mean((expected.mean_x - mean_reward) ** 2 + expected.std_x**2)),
        "accepted_length": mean(expected.chance_Kx.sum(0)),
        "accepted_length_greedy": mean(matched_KxBxM.sum(0)),
        "kl": kl,
        "flat_groups": mean((expected.std_x < 1e-2 * (reward_K1[-1] - reward_K1[0])) * 1.0),
        "windows": (counted_BxM > 0).sum(),
    }


def entropy(p_xW: Array) -> Array:
    """Of distributions over the last axis, in nats."""
    return -inner(p_xW, jnp.log(jnp.maximum(p_xW, 1e-20)))
