"""The expected reward of a window in closed form: against enumeration, automatic differentiation, and sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world

from ppow_jax.objectives import supervised
from ppow_jax.objectives.criticality import divergence
from ppow_jax.objectives.expected import ExactSettings, expected_reward, priority, remaining_rounds, visits, window_loss
from ppow_jax.objectives.head_loss import DraftRule
from ppow_jax.objectives.policy import group_advantage
from ppow_jax.objectives.rewards import CostModel, speedup_reward
from ppow_jax.objectives.supervised import SupervisedLoss

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


def test_weights_are_the_gradient_of_the_mean():
    q_KxN, reward_K1 = likelihoods()[:, 3:], jnp.asarray(rewards())
    log_q_KxN = jnp.log(q_KxN)
    gradient_KxN = jax.grad(lambda log_q: expected_reward(log_q, reward_K1).mean_x.sum())(log_q_KxN)
    expected = expected_reward(log_q_KxN, reward_K1)
    np.testing.assert_allclose(expected.weight_Kx, gradient_KxN, rtol=1e-4)
    certain = expected_reward(jnp.log(likelihoods()), reward_K1)
    assert np.isfinite(certain.weight_Kx).all() and not certain.weight_Kx[:, 0].any()


def test_tokens_that_a_lookup_gets_as_well_are_worth_nothing():
    """Against the reward of the longer of both, over all outcomes: a lookup that gets 0, 2, or all tokens."""
    q_K, reward_K1 = np.array([0.8, 0.6, 0.7, 0.3]), rewards()
    for found in (0, 2, K):
        free_K = jnp.asarray(np.arange(K) < found, jnp.float32)

        def outcomes(log_q_K, found=found):
            q_K, total = jnp.exp(log_q_K), 0.0
            for hits in itertools.product((False, True), repeat=K):
                k = max((list(hits) + [False]).index(False), found)
                total += jnp.prod(jnp.where(jnp.array(hits), q_K, 1 - q_K)) * reward_K1[k]
            return total

        mean, gradient_K = jax.value_and_grad(outcomes)(jnp.log(q_K))
        expected = expected_reward(jnp.log(q_K), jnp.asarray(reward_K1), free_K)
        np.testing.assert_allclose(expected.mean_x, mean, rtol=1e-5)
        np.testing.assert_allclose(expected.weight_Kx, gradient_K, rtol=1e-4, atol=1e-6)
        assert (expected.weight_Kx[0] == 0) == (found == K)
        np.testing.assert_allclose(expected.kept_Kx[:found], 1.0)
        half = expected_reward(jnp.log(q_K), jnp.asarray(reward_K1), 0.5 * free_K)
        none = expected_reward(jnp.log(q_K), jnp.asarray(reward_K1))
        np.testing.assert_allclose(half.weight_Kx, (expected.weight_Kx + none.weight_Kx) / 2, rtol=1e-5)


def test_it_is_what_a_large_group_of_sampled_windows_estimates():
    """The score-function estimate with group-relative advantages, by the drafter's own tokens."""
    q_K, reward_K1, G = np.array([0.8, 0.6, 0.7, 0.3]), rewards(), 400_000
    hit_GxK = np.random.default_rng(1).random((G, K)) < q_K
    accepted_G = np.cumprod(hit_GxK, 1).sum(1)
    advantage_G = np.asarray(group_advantage(jnp.asarray(reward_K1[accepted_G])))
    # d log pi / d logit of a distribution over two tokens is hit - q; tokens after the first miss do not count
    score_GxK = np.where(np.arange(K) <= accepted_G[:, None], hit_GxK - q_K, 0.0)
    sampled_K = (advantage_G[:, None] * score_GxK).mean(0)
    expected = expected_reward(jnp.log(q_K), jnp.asarray(reward_K1))
    np.testing.assert_allclose(expected.weight_Kx / expected.std_x * (1 - q_K), sampled_K, atol=4 / np.sqrt(G))


def loop_priority(steps, kl, vocab_size):
    """ADAW's weights, position by position."""
    total, length, reachable = 0.0, 0.0, True
    for step, kl_BxM in zip(steps, kl, strict=True):
        reachable = reachable & step.valid_BxM & (step.label_BxM >= 0)
        certain = 1 - step.entropy_BxM / np.log(vocab_size)
        total += np.where(reachable, np.maximum(certain, 0) * step.mass_BxM * np.maximum(kl_BxM, 0), 0)
        length = length + np.asarray(step.valid_BxM, float)
    weight = np.where(steps[0].valid_BxM, total / np.maximum(length, 1), 0)
    return weight * np.sum(steps[0].valid_BxM) / weight.sum()


def pieces(drafter, windows, rule):
    """(steps, log a, valid, KL) of every window, from logits that are all kept."""
    steps = supervised.unroll(drafter, world.target_params()["embed"], windows, K)
    log_a, kl = [], []
    for step in steps:
        z = step.hidden_BxMxE @ drafter.params["lm_head"].T
        label = jnp.maximum(step.label_BxM, 0)[..., None]
        if rule.rivals:
            others = jnp.where(jnp.arange(z.shape[-1]) == label, -jnp.inf, z)
            rival = jnp.sort(others, -1)[..., -rule.rivals]
            mine = jax.nn.log_sigmoid((jnp.take_along_axis(z, label, -1)[..., 0] - rival) / rule.temperature)
        else:
            mine = jnp.take_along_axis(jax.nn.log_softmax(z / rule.temperature), label, -1)[..., 0]
        log_a.append(jnp.where(step.valid_BxM & (step.label_BxM >= 0), mine, -1e9))
        kl.append(divergence(step.probability_BxMxW, z))
    return steps, jnp.stack(log_a), jnp.stack([step.valid_BxM for step in steps]), jnp.stack(kl)


def plain_step(drafter, step):
    """(acceptance rate of a sampled draft, log-probability of the label) at temperature 1."""
    log_q = jax.nn.log_softmax(step.hidden_BxMxE @ drafter.params["lm_head"].T, -1)
    alpha = jnp.minimum(step.mass_BxM[..., None] * step.probability_BxMxW, jnp.exp(log_q)).sum(-1)
    mine = jnp.take_along_axis(log_q, jnp.maximum(step.label_BxM, 0)[..., None], -1)[..., 0]
    return alpha, jnp.where(step.label_BxM >= 0, mine, -jnp.inf)


def free(valid, settings):
    """[K, B, M]: what a lookup gets of windows of which it gets the first FOUND(m) tokens right."""
    within = np.arange(K)[:, None, None] < found(valid.shape[1:])
    return settings.lookup_discount * (valid & within)


def found(shape):
    """Numbers of tokens that a lookup gets, some of every kind."""
    return np.arange(shape[0] * shape[1]).reshape(shape) % (K + 1)


def plain_loss(drafter, windows, reward_K1, settings, adaw):
    """The same objective over windows, differentiated by JAX."""
    steps, log_a, valid, kl = pieces(drafter, windows, settings.rule)
    expected = jax.lax.stop_gradient(expected_reward(log_a, reward_K1, free(valid, settings)))
    mean_BxM = expected_reward(log_a, reward_K1, free(valid, settings)).mean_x
    scale = jnp.maximum(expected.std_x, 0.05) if settings.divide_by_std else 1.0
    weight_BxM = jax.lax.stop_gradient(priority(steps, kl, world.CONFIG.vocab_size)) if adaw else 1.0
    a_BxM = jnp.where(valid[0], weight_BxM, 0.0)
    reached = jnp.where(valid, expected.reach_Kx * a_BxM, 0.0)
    policy = jnp.sum(a_BxM * mean_BxM / scale) / a_BxM.sum()
    known = valid & jnp.stack([step.label_BxM >= 0 for step in steps])
    counts_K = jnp.maximum(known.sum((1, 2)), 1)
    dense, weight = kl, settings.supervised.decay ** jnp.arange(K)[:, None, None]
    if settings.supervised == SupervisedLoss("acceptance", "acceptance"):
        scores = [plain_step(drafter, step) for step in steps]
        alpha, log_q = (jnp.stack(x) for x in zip(*scores, strict=True))
        dense = -jnp.log(jnp.where(known, alpha, 1.0))
        weight = supervised.acceptance_weights(jax.lax.stop_gradient(log_q), valid)
    supervised_loss = jnp.sum(jnp.where(known, weight * dense, 0.0) / counts_K[:, None, None])
    anchored = settings.kl_weight * jnp.sum(reached * kl) / reached.sum()
    return anchored + settings.supervised_weight * supervised_loss - policy


def differentiated(settings, adaw, plain):
    """(gradient by `window_loss`, by the plain definition) at a drafter that is right now and then."""
    drafter = world.trained()
    windows = world.scored_batch(drafter.target_ids_W, world.batch()).windows
    assert (windows.label_BxM < 0)[windows.anchor_mask_BxM].any()
    reward_K1, last_BxM = jnp.asarray(rewards()), supervised.last_anchors(windows)

    def ours(params):
        d = drafter.replace(params=params)
        steps = supervised.unroll(d, world.target_params()["embed"], windows, K)
        given = d, steps, last_BxM, reward_K1, settings, jnp.asarray(adaw), world.CONFIG.vocab_size
        return window_loss(*given, jnp.asarray(found(last_BxM.shape)) if settings.lookup_discount else None)

    def theirs(params):
        return plain(drafter.replace(params=params), windows, reward_K1, settings, adaw)

    gradient, metrics = jax.jit(jax.grad(ours, has_aux=True))(drafter.params)
    return gradient, jax.jit(jax.grad(theirs))(drafter.params), metrics


def assert_equal(gradient, wanted):
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-3, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "adaw"),
    [
        pytest.param(ExactSettings(kl_weight=0.5, divide_by_std=True), False, marks=pytest.mark.full),
        pytest.param(ExactSettings(kl_weight=0.5), True, marks=pytest.mark.full),
        pytest.param(ExactSettings(DraftRule(0.3), supervised_weight=1.0), True, marks=pytest.mark.full),
        (ExactSettings(DraftRule(0.5, 2), supervised_weight=0.3, lookup_discount=0.7), False),
        (ExactSettings(DraftRule(0.5), "window", False, 0.5, 0.3, SupervisedLoss("acceptance", "acceptance")), False),
    ],
    ids=str,
)
def test_loss_has_the_gradient_of_its_definition(settings, adaw):
    gradient, wanted, metrics = differentiated(settings, adaw, plain_loss)
    assert_equal(gradient, wanted)
    assert metrics["accepted_length"] > 0.1


def plain_answer_loss(drafter, windows, reward_K1, settings, adaw):
    """log of the expected rounds of all answers, by a recursion that JAX differentiates."""
    _, log_a, valid, _ = pieces(drafter, windows, settings.rule)
    chance = jnp.exp(jnp.cumsum(log_a, 0))
    chance = free(valid, settings) + (1 - free(valid, settings)) * chance
    exact = -jnp.diff(chance, axis=0, prepend=1.0, append=0.0)
    mask = np.asarray(world.batch().anchor_mask_BxM)  # known before tracing: it decides the recursion
    last = mask & ~np.pad(mask[:, 1:] & (np.diff(world.batch().anchor_BxM) == 1), ((0, 0), (0, 1)))
    B, M = mask.shape
    total = 0.0
    for b in range(B):
        ahead: list = []  # C(m + 1), C(m + 2), .. inside the answer
        for m in range(M - 1, -1, -1):
            if not mask[b, m]:
                continue
            if last[b, m]:
                total, ahead = total + (ahead[0] if ahead else 0.0), []
            rounds = 1.0 + sum(exact[k, b, m] * ahead[k] for k in range(min(K + 1, len(ahead))))
            ahead = [rounds, *ahead]
        total += ahead[0]
    return jnp.log(total)


@pytest.mark.full
@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_answer_horizon_minimises_the_expected_rounds_of_whole_answers(discount):
    settings = ExactSettings(DraftRule(0.7), horizon="answer", lookup_discount=discount)
    gradient, wanted, _ = differentiated(settings, False, plain_answer_loss)
    assert_equal(gradient, wanted)


def test_visits_and_rounds_count_the_same():
    """The sum of the visits of an answer is the expected number of its rounds."""
    rng = np.random.default_rng(3)
    valid = np.arange(12)[None] < np.array([[12], [9]])
    last = np.zeros((2, 12), bool)
    last[0, [4, 11]] = last[1, [0, 8]] = True
    a = rng.uniform(0, 1, (K, 2, 12)) * valid
    for b, m in zip(*np.nonzero(last), strict=True):
        for k in range(K):  # no window reaches beyond its answer: anchor m - k' has k' + 1 tokens left
            a[k, b, max(0, m - k + 1) if k else m + 1 : m + 1] = 0
    chance = jnp.asarray(np.cumprod(a, 0), jnp.float32)
    rounds, visit = remaining_rounds(chance, jnp.asarray(valid), jnp.asarray(last)), visits(chance, valid, last)
    first = valid & np.pad(last | ~valid, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    np.testing.assert_allclose((rounds * first).sum(), visit.sum(), rtol=1e-5)
    np.testing.assert_allclose(visit[first], 1.0)
    assert not visit[~valid].any()


def test_priority_counts_what_can_be_won_inside_the_answer():
    drafter = world.trained()
    windows = world.scored_batch(drafter.target_ids_W, world.batch()).windows
    steps, _, _, kl = pieces(drafter, windows, DraftRule())
    weight = np.asarray(priority(steps, kl, world.CONFIG.vocab_size))
    np.testing.assert_allclose(weight, loop_priority(jax.device_get(steps), np.asarray(kl), 61), rtol=1e-4, atol=1e-6)
    mask = np.asarray(windows.anchor_mask_BxM)
    assert weight[mask].mean() == pytest.approx(1.0, rel=1e-4)
    lost = mask & (np.asarray(windows.label_BxM) < 0)
    assert lost.any() and not weight[lost].any()  # its first token is not in the draft vocabulary
