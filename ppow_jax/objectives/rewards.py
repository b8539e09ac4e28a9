"""Rewards of a speculative window (PPOW, 2605.14978): a cost-aware speedup reward and a proximity reward."""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Costs in units of one plain step of the target. Hashable.

    The paper's reward charges drafting for accepted tokens only, k / (k gamma + 1). With `general`, the window is
    charged for all its work: (k + bonus) / (gamma K + verify + rollback (K - k)).

    gamma: one draft step. verify: one verification of the whole window. rollback: each rejected token.
    bonus: tokens that the verification adds (1 counts the target's own).
    """

    gamma: float
    general: bool = False
    verify: float = 1.0
    rollback: float = 0.0
    bonus: float = 0.0


def speedup_reward(accepted: Array, K: int, costs: CostModel) -> Array:
    """R_speedup of windows of K drafted tokens of which `accepted` (any shape, 0..K) were kept; float32."""
    k = accepted.astype(jnp.float32)
    if not costs.general:
        return k / (k * costs.gamma + 1.0)
    return (k + costs.bonus) / (costs.gamma * K + costs.verify + costs.rollback * (K - k))


def proximity_reward(accepted: Array, reference_logp: Array, draft_logp: Array, eta: float, eps: float) -> Array:
    """R_dist = eta * 1[Delta < eps] where nothing was accepted, else 0.

    Delta = reference_logp - draft_logp: the target's log-probability (summed over the window, nats) of its own greedy
    continuation minus that of the drafted window, each conditioned on its own prefix.
    """
    near = reference_logp - draft_logp < eps
    return jnp.where((accepted == 0) & near, eta, 0.0)
