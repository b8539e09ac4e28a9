"""PPOW's objective without sampling noise: the expected reward of a window, in closed form.

On text that the target wrote at temperature 0, greedy acceptance keeps a drafted token exactly while it equals the
text's own, y. With a_j = the probability that y_j is drafted after y_<j (`head_loss.DraftRule`), at least k tokens of a
window are accepted with probability prod_{j<=k} a_j, and

    E[R] = sum_k (R(k) - R(k-1)) prod_{j<=k} a_j.

The group-relative policy gradient of PPOW (2605.14978) estimates the gradient of E[R] / std(R) from G sampled windows;
here it is computed, for every window of the text at once, from the same unrolled draft steps as the supervised loss.
R_dist has no closed form and is left out.

The horizon is a window, or a whole answer (`horizon="answer"`). The end of a round determines where the next one
begins, so the expected number of rounds C(m) from position m to the end of the answer follows from

    C(m) = 1 + sum_k P(exactly k accepted at m) C(m + k + 1),

and a k-th accepted token is worth C(m + k) - C(m + k + 1) rounds in place of R(k) - R(k-1). A window is then weighted
by the probability that a round begins there. Minimising log C maximises the acceptance length of the whole answer,
log(tokens / C).

Where the drafter shares its tree with an n-gram lookup (`speculation.mixture`), a round keeps the longer of what either
gets right. If the lookup gets the first l tokens of a window, at least k <= l of them are kept whatever the drafter
does, so a k-th token of the drafter's is worth nothing there: with `lookup_discount` d = 1 the probability that k
tokens are kept is 1 for k <= l in place of prod a_j; with a smaller d it lies between the two, in proportion.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import inner
from ppow_jax.objectives import supervised
from ppow_jax.objectives.criticality import criticality
from ppow_jax.objectives.head_loss import SAMPLED, DraftRule, Weights
from ppow_jax.objectives.supervised import DraftStep, SupervisedLoss

Array = jax.Array
HORIZONS = ("window", "answer")


@dataclasses.dataclass(frozen=True)
class ExactSettings:
    """Hashable. rule: drafting rule that the reward is computed for. horizon: see the module.
    divide_by_std: divides a window's gradient by the standard deviation of its reward, as group-relative advantages do.
    kl_weight: beta of KL(target || drafter) on the drafter's own path. supervised_weight: weight of stage 1's loss over
    the same draft steps, and supervised: that loss. lookup_discount: share, 0 to 1, of the worth of an accepted token
    that is lost where an n-gram lookup gets it as well.
    """

    rule: DraftRule = SAMPLED
    horizon: str = "window"
    divide_by_std: bool = False
    kl_weight: float = 0.0
    supervised_weight: float = 0.0
    supervised: SupervisedLoss = SupervisedLoss()
    lookup_discount: float = 0.0


class Expected(NamedTuple):
    """Statistics of windows of K drafted tokens. chance_Kx: probability that at least 1..K tokens of the drafter's are
    accepted. kept_Kx: probability that a round keeps at least 1..K tokens, of either source. reach_Kx: probability that
    all tokens of the drafter's before are accepted. mean_x, std_x: of the reward. weight_Kx: gradient of the mean by
    the log-probability of each token.
    """

    chance_Kx: Array
    kept_Kx: Array
    reach_Kx: Array
    mean_x: Array
    std_x: Array
    weight_Kx: Array


def expected_reward(log_a_Kx: Array, reward_K1: Array, free_Kx: Array | float = 0.0) -> Expected:
    """Computes `Expected` from log a_j of the text's K tokens (-inf: cannot be accepted), and R(0), .., R(K).

    free_Kx: probability that an n-gram lookup gets at least 1..K tokens, see the module.
    """
    chance_Kx, reach_Kx = chances(log_a_Kx)
    rest = (1,) * (chance_Kx.ndim - 1)
    above_K1 = reward_K1 - reward_K1[0]
    own_Kx = (1.0 - free_Kx) * chance_Kx
    kept_Kx, step_Kx = free_Kx + own_Kx, jnp.diff(above_K1).reshape(-1, *rest)
    mean_x = (step_Kx * kept_Kx).sum(0)
    square_x = (jnp.diff(above_K1**2).reshape(-1, *rest) * kept_Kx).sum(0)
    std_x = jnp.sqrt(jnp.maximum(square_x - mean_x**2, 0.0))
    weight_Kx = _from_here_on(step_Kx * own_Kx)
    return Expected(chance_Kx, kept_Kx, reach_Kx, reward_K1[0] + mean_x, std_x, weight_Kx)


def chances(log_a_Kx: Array) -> tuple[Array, Array]:
    """(probability that at least 1..K tokens are accepted, that the 0..K-1 before are), [K, ...]."""
    chance_Kx = jnp.exp(jnp.cumsum(log_a_Kx, axis=0))
    return chance_Kx, jnp.concatenate([jnp.ones_like(chance_Kx[:1]), chance_Kx[:-1]])


def _from_here_on(gain_Kx: Array) -> Array:
    return jnp.cumsum(gain_Kx[::-1], axis=0)[::-1]


def remaining_rounds(chance_KxBxM: Array, valid_BxM: Array, last_BxM: Array) -> Array:
    """C_BxM, the expected number of rounds from each anchor to the end of its answer.

    chance_KxBxM: see `Expected`, 0 past the end of the answer. valid_BxM: anchors in use; those of an answer are
    consecutive, and last_BxM marks the last one of each.
    """
    exact_K1xBxM = _exactly(chance_KxBxM)

    def back(ahead_K1xB: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        exact_K1xB, valid_B, last_B = now
        ahead_K1xB = jnp.where(last_B, 0.0, ahead_K1xB)
        rounds_B = jnp.where(valid_B, 1.0 + jnp.sum(exact_K1xB * ahead_K1xB, 0), 0.0)
        return jnp.concatenate([rounds_B[None], ahead_K1xB[:-1]]), rounds_B

    start = jnp.zeros(exact_K1xBxM.shape[:2])
    by_anchor = (jnp.moveaxis(exact_K1xBxM, 2, 0), valid_BxM.T, last_BxM.T)
    return jax.lax.scan(back, start, by_anchor, reverse=True)[1].T


def visits(chance_KxBxM: Array, valid_BxM: Array, last_BxM: Array) -> Array:
    """Probability that a round begins at each anchor, [B, M]; 1 at an answer's first. See `remaining_rounds`."""
    exact_K1xBxM = _exactly(chance_KxBxM)
    first_BxM = valid_BxM & jnp.pad(last_BxM | ~valid_BxM, ((0, 0), (1, 0)), constant_values=True)[:, :-1]

    def forth(coming_K1xB: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        exact_K1xB, valid_B, first_B = now
        visit_B = jnp.where(first_B, 1.0, jnp.where(valid_B, coming_K1xB[0], 0.0))
        later_K1xB = jnp.where(first_B, 0.0, jnp.roll(coming_K1xB, -1, 0).at[-1].set(0.0))
        return later_K1xB + exact_K1xB * visit_B, visit_B

    start = jnp.zeros(exact_K1xBxM.shape[:2])
    by_anchor = (jnp.moveaxis(exact_K1xBxM, 2, 0), valid_BxM.T, first_BxM.T)
    return jax.lax.scan(forth, start, by_anchor)[1].T


def _exactly(chance_KxBxM: Array) -> Array:
    """Probability that exactly 0..K tokens are accepted, [K + 1, ...]."""
    return -jnp.diff(chance_KxBxM, axis=0, prepend=1.0, append=0.0)


def window_loss(
    drafter: Drafter,
    steps: list[DraftStep],
    last_BxM: Array,
    reward_K1: Array,
    settings: ExactSettings,
    adaw: Array,
    vocab_size: int,
    found_BxM: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """(a loss whose gradient is that of the objective, metrics).

    The objective is -(mean over windows of E[R], divided by std if requested) + beta KL + supervised loss.

    steps: `supervised.unroll`, K of them. last_BxM: see `supervised.last_anchors`. reward_K1: reward of a window that
    keeps 0..K tokens. adaw: weight windows by their criticality (a boolean scalar). vocab_size: of the target.
    found_BxM: number of a window's first tokens that an n-gram lookup gets right, for `ExactSettings.lookup_discount`.
    All terms are losses of the same logits, so one pass over the head with their weights gives the gradient of all.
    """
    rule, loss = settings.rule, settings.supervised
    seen = [supervised.seen_step(drafter, step, rule) for step in steps]
    valid_KxBxM = jnp.stack([step.valid_BxM for step in steps])
    log_a_KxBxM = jnp.where(valid_KxBxM, jnp.stack([x.log_a_BxM for x in seen]), -jnp.inf)
    free_KxBxM = jnp.zeros(valid_KxBxM.shape)
    if found_BxM is not None:
        within_Kx = jnp.arange(len(steps))[:, None, None] < found_BxM
        free_KxBxM = settings.lookup_discount * (valid_KxBxM & within_Kx)
    expected = expected_reward(log_a_KxBxM, reward_K1, free_KxBxM)
    kl_KxBxM = jnp.stack([x.loss_BxM - entropy(step.probability_BxMxW) for x, step in zip(seen, steps, strict=True)])

    weight_KxBxM, priority_BxM = expected.weight_Kx, priority(steps, kl_KxBxM, vocab_size)
    if settings.horizon == "answer":
        worth_KxBxM = marginal_rounds(expected.kept_Kx, valid_KxBxM[0], last_BxM)
        weight_KxBxM = _from_here_on(worth_KxBxM * (1.0 - free_KxBxM) * expected.chance_Kx)
        visit_BxM = visits(expected.kept_Kx, valid_KxBxM[0], last_BxM)
    else:
        visit_BxM = jnp.ones(valid_KxBxM.shape[1:])
    if settings.divide_by_std:
        weight_KxBxM /= jnp.maximum(expected.std_x, 0.05)  # the standard deviation tends to 0 near certainty
    counted_BxM = jnp.where(valid_KxBxM[0], visit_BxM * jnp.where(adaw, priority_BxM, 1.0), 0.0)
    whole = jnp.maximum(counted_BxM.sum(), 1e-9)
    reached_KxBxM = jnp.where(valid_KxBxM, expected.reach_Kx * counted_BxM, 0.0)
    known_KxBxM = valid_KxBxM & jnp.stack([step.label_BxM >= 0 for step in steps])
    step_Kx = loss.decay ** jnp.arange(len(steps))[:, None, None]
    if loss.step_weights == "acceptance":
        step_Kx = supervised.acceptance_weights(jnp.stack([x.log_q_BxM for x in seen]), valid_KxBxM)
    kl_weight_KxBxM = settings.kl_weight * reached_KxBxM / jnp.maximum(reached_KxBxM.sum(), 1e-9)
    counts_Kx = jnp.maximum(known_KxBxM.sum((1, 2), keepdims=True), 1)
    loss_weight_KxBxM = settings.supervised_weight * step_Kx * known_KxBxM / counts_Kx
    hard_KxBxM = weight_KxBxM * counted_BxM / whole
    total = jnp.zeros(())
    for k, step in enumerate(steps):
        soft_BxM, _, overlap_BxM = loss.weights(loss_weight_KxBxM[k])
        soft_BxM = kl_weight_KxBxM[k] + (0.0 if soft_BxM is None else soft_BxM)
        weights = Weights(soft_BxM, hard_KxBxM[k], overlap_BxM)
        total += supervised.score_step(drafter, step, weights, rule, loss.hybrid)[0]

    def mean(x_BxM: Array) -> Array:
        return jnp.sum(x_BxM * counted_BxM) / whole

    mean_reward = mean(expected.mean_x)
    looked_up = {} if found_BxM is None else {"looked_up": mean((valid_KxBxM & within_Kx).sum(0))}
    matched_KxBxM = jnp.cumprod(jnp.stack([x.match_BxM for x in seen]) & valid_KxBxM, axis=0)
    return total, looked_up | {
        "loss": total,
        "reward": mean_reward,
        "reward_std": jnp.sqrt(mean((expected.mean_x - mean_reward) ** 2 + expected.std_x**2)),
        "accepted_length": mean(expected.chance_Kx.sum(0)),
        "accepted_length_greedy": mean(matched_KxBxM.sum(0)),
        "kl": jnp.sum(reached_KxBxM * kl_KxBxM) / jnp.maximum(reached_KxBxM.sum(), 1e-9),
        "flat_groups": mean((expected.std_x < 1e-2 * (reward_K1[-1] - reward_K1[0])) * 1.0),
        "criticality": mean(priority_BxM),
        "windows": (counted_BxM > 0).sum(),
    }


def marginal_rounds(chance_KxBxM: Array, valid_BxM: Array, last_BxM: Array) -> Array:
    """C(m + k) - C(m + k + 1) for k = 1..K, [K, B, M]: rounds that a k-th accepted token saves; C is 0 past the end."""
    K = chance_KxBxM.shape[0]
    rounds_BxM = remaining_rounds(chance_KxBxM, valid_BxM, last_BxM)
    answer_BxM = jnp.cumsum(jnp.pad(last_BxM, ((0, 0), (1, 0)))[:, :-1], 1)  # number of the answer in its row

    def ahead(k: int) -> Array:
        same = supervised.ahead(answer_BxM, k) == answer_BxM
        return jnp.where(same & supervised.ahead(valid_BxM, k), supervised.ahead(rounds_BxM, k), 0.0)

    return jnp.stack([ahead(k) - ahead(k + 1) for k in range(1, K + 1)])


def priority(steps: list[DraftStep], kl_KxBxM: Array, vocab_size: int) -> Array:
    """ADAW's weight of the window at each anchor, [B, M], mean 1 over the anchors in use.

    The mean of v_t over the window's own positions, with the drafter's distribution at step t of this very window as Q.
    Of KL(P || Q) only the part that the drafter can reduce is used, mass(P) KL(P restricted || Q). Positions from the
    first label on that the draft vocabulary lacks cannot be accepted, and contribute nothing.
    """
    used_BxM = steps[0].valid_BxM
    total = length = jnp.zeros(used_BxM.shape)
    reachable = jnp.ones(used_BxM.shape, bool)
    for step, kl_BxM in zip(steps, kl_KxBxM, strict=True):
        reachable &= step.valid_BxM & (step.label_BxM >= 0)
        v_BxM = criticality(step.entropy_BxM, step.mass_BxM * jnp.maximum(kl_BxM, 0.0), vocab_size)
        total += jnp.where(reachable, v_BxM, 0.0)
        length += step.valid_BxM
    weight_BxM = total / jnp.maximum(length, 1)
    return weight_BxM * used_BxM.sum() / jnp.maximum(jnp.sum(weight_BxM * used_BxM), 1e-9)


def entropy(p_xW: Array) -> Array:
    """Entropy in nats of distributions over the last axis."""
    return -inner(p_xW, jnp.log(jnp.maximum(p_xW, 1e-20)))
