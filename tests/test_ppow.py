"""Stage 2: rollouts against brute force (every window run through the target from scratch), and the training step."""

import dataclasses
import functools
import math
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_world as world
import suites

from ppow_jax.corpus.target_pass import restricted
from ppow_jax.data.batches import empty_batch
from ppow_jax.models import transformer
from ppow_jax.objectives.rewards import CostModel, proximity_reward
from ppow_jax.training.steps import ppow_sampled
from ppow_jax.training.steps import rollout as rollout_module
from ppow_jax.training.steps.state import TrainState

SETTINGS = world.ROLLOUTS
K, G, A = SETTINGS.window, SETTINGS.group, SETTINGS.windows


# Rollouts.


class Rolled(NamedTuple):
    """logits: of redrafting the windows. delta: Delta of every window, as `rollout` hands it to the reward."""

    windows: rollout_module.Rollout
    metrics: dict
    logits: np.ndarray
    delta: np.ndarray


@functools.cache
def roller(settings):
    """A jitted (key, step, batch) -> Rolled."""

    @jax.jit
    def roll(key, step, batch, drafter):
        scored = world.score_in(batch, drafter.target_ids_W)
        deltas = []

        def watch(accepted, reference, draft, eta, eps):
            deltas.append(reference - draft)
            return proximity_reward(accepted, reference, draft, eta, eps)

        with mock.patch.object(rollout_module, "proximity_reward", watch):
            key_B = jax.random.split(key, world.ROWS)
            windows, measured = rollout_module.rollout(
                key_B, step, drafter, world.target_params(), world.CONFIG, scored, settings
            )
        metrics = rollout_module.summary(windows, measured, scored.windows.anchor_mask_BxM)
        logits = ppow_sampled.redraft(drafter, world.target_params()["embed"], scored.windows, windows)
        return Rolled(windows, metrics, logits, deltas[0])

    return lambda key, step, batch: jax.device_get(roll(key, step, batch, world.trained()))


@functools.cache
def rolled():
    return roller(SETTINGS)(jax.random.key(5), 0, world.batch())


# Sampled acceptance; and, so that it need not be compiled twice, the reference decoded instead of read off the text.
SAMPLED = dataclasses.replace(SETTINGS, verify_temperature=0.4, rollout_temperature=1.3, greedy_reference=True)


def prefixes(batch, windows):
    """The text up to each window's root, from its own segment alone: {(row, beam): tokens}."""
    found = {}
    for b, x in zip(*np.nonzero(windows.valid_BxX), strict=True):
        i = windows.anchor_BxX[b, x]
        start = i - batch.position_BxT[b, i]
        assert (batch.segment_BxT[b, start : i + 2] == batch.segment_BxT[b, i]).all()
        found[b, x] = batch.tokens_BxT[b, start : i + 2]
    return found


@jax.jit
def forward_logits(tokens_NxL):
    N, L = tokens_NxL.shape
    position_NxL = jnp.broadcast_to(jnp.arange(L), (N, L))
    out = transformer.forward(
        world.target_params(), world.CONFIG, tokens_NxL, position_NxL, transformer.causal_mask(N, L)
    )
    return out.hidden_BxSxD @ world.target_params()["lm_head"].T


def from_scratch(texts, K):
    """Target logits [N, K, V] for the last K tokens of each text, computed from the whole text."""
    padded = np.zeros((64, 48), np.int32)
    for row, text in zip(padded, texts, strict=False):
        row[: len(text)] = text
    logits = np.asarray(forward_logits(padded))
    return np.stack([logits[n, len(t) - K - 1 : len(t) - 1] for n, t in enumerate(texts)]).astype(np.float64)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def brute_force(batch, windows):
    """(beams, logits [N, K, V] that judge each drafted token, drafts [N, K])."""
    before = prefixes(batch, windows)
    beams = list(before)
    drafts = np.stack([windows.token_BxXxK[beam] for beam in beams])
    logits = from_scratch([np.r_[before[beam], d] for beam, d in zip(beams, drafts, strict=True)], drafts.shape[1])
    return beams, logits, drafts


def test_windows_lie_inside_answers_and_beams_share_their_prefix():
    batch, (windows, metrics, *_) = world.batch(), rolled()
    assert windows.valid_BxX.all()  # this batch has enough room
    for b in range(world.ROWS):
        anchors = windows.anchor_BxX[b].reshape(A, G)
        assert (anchors == anchors[:, :1]).all() and len(set(anchors[:, 0])) == A
        for i in anchors[:, 0]:
            m = int(np.flatnonzero(batch.anchor_mask_BxM[b] & (batch.anchor_BxM[b] == i))[0])
            here = batch.anchor_BxM[b, m : m + K]
            assert (here == i + np.arange(K)).all() and batch.anchor_mask_BxM[b, m : m + K].all()
            assert len(set(batch.segment_BxT[b, i : i + K + 2])) == 1
    assert (windows.root_BxX == np.take_along_axis(batch.tokens_BxT, windows.anchor_BxX + 1, 1)).all()
    assert metrics["windows"] == windows.valid_BxX.size
    ids_W = np.asarray(world.trained().target_ids_W)
    np.testing.assert_array_equal(ids_W[windows.id_BxXxK], windows.token_BxXxK)


def test_accepted_lengths_are_those_of_the_target_from_scratch():
    windows, metrics, *_ = rolled()
    beams, logits, drafts = brute_force(world.batch(), windows)
    accepted = np.cumprod(logits.argmax(-1) == drafts, axis=1).sum(1)
    np.testing.assert_array_equal([windows.accepted_BxX[beam] for beam in beams], accepted)
    assert set(accepted) >= {0, 1, 2}  # a fair sample
    np.testing.assert_allclose(metrics["accepted_length"], accepted.mean(), rtol=1e-6)
    np.testing.assert_array_equal(metrics["accepted_histogram"], np.bincount(accepted, minlength=K + 1))
    # the anchor of the KL: the target's distribution over the draft vocabulary at every drafted token
    expected = np.exp(log_softmax(logits[..., np.asarray(world.trained().target_ids_W)]))
    head_WxD = world.target_params()["lm_head"][world.trained().target_ids_W]
    ours = restricted(np.stack([windows.hidden_BxXxKxD[beam] for beam in beams]), head_WxD)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_redrafting_gives_the_same_log_probabilities():
    windows, _, logits, _ = rolled()
    logq = log_softmax(logits.astype(np.float64) / SETTINGS.rollout_temperature)
    again = np.take_along_axis(logq, windows.id_BxXxK[..., None], -1)[..., 0]
    np.testing.assert_allclose(again, windows.logp_BxXxK, atol=1e-5)
    assert len({tuple(w) for w in windows.token_BxXxK.reshape(-1, K)}) > 12  # sampled, not repeated


@pytest.mark.parametrize(
    "settings", suites.keep([SETTINGS], [SETTINGS, SAMPLED]), ids=["reference from the text", "decoded reference"]
)
def test_delta_is_that_of_brute_force(settings):
    """On answers that the target wrote greedily both references are the target's own greedy window."""
    windows, *_, delta = roller(settings)(jax.random.key(3), 0, world.batch())
    beams, logits, drafts = brute_force(world.batch(), windows)
    draft_logp = np.take_along_axis(log_softmax(logits), drafts[..., None], -1)[..., 0].sum(1)
    texts = list(prefixes(world.batch(), windows).values())
    reference_logp = np.zeros(len(texts))
    for _ in range(K):  # decode greedily, each time from scratch
        logp = log_softmax(from_scratch([np.r_[t, 0] for t in texts], 1)[:, 0])
        reference_logp += logp.max(-1)
        texts = [np.r_[t, z.argmax()] for t, z in zip(texts, logp, strict=True)]
    np.testing.assert_allclose([delta[beam] for beam in beams], reference_logp - draft_logp, atol=2e-4)


def test_rewards_and_advantages():
    windows, metrics, _, delta = rolled()
    accepted = windows.accepted_BxX
    assert np.abs(delta - SETTINGS.eps).min() > 1e-3
    near = (accepted == 0) & (delta < SETTINGS.eps)
    assert near.any() and (~near & (accepted == 0)).any()  # both sides of the threshold occur
    speedup = accepted / (0.12 * accepted + 1)
    np.testing.assert_allclose(windows.reward_BxX, speedup + 0.2 * near, rtol=1e-5)
    reward = windows.reward_BxX.reshape(-1, G)
    expected = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(windows.advantage_BxX.reshape(-1, G), expected, atol=1e-4)
    for name, value in (
        ("reward", windows.reward_BxX.mean()),
        ("reward_std", windows.reward_BxX.std()),
        ("reward_speedup", speedup.mean()),
        ("reward_proximity", 0.2 * near.mean()),
        ("flat_groups", (reward.max(1) == reward.min(1)).mean()),
    ):
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_adaw_prefers_critical_windows_from_its_step_on():
    """The same jitted function, before and after the step: uniform first, then drawn by criticality."""
    roll = roller(SETTINGS)
    mean = {}
    for step in (0, 1, 2, 9):
        drawn = [roll(jax.random.key(i), step, world.batch())[1] for i in range(40)]
        mean[step] = np.mean([m["criticality"] for m in drawn])
        # what the anchors hold on average does not depend on what is chosen
        np.testing.assert_allclose([m["criticality_all"] for m in drawn], drawn[0]["criticality_all"], rtol=1e-5)
    assert mean[0] == mean[1] and mean[2] == mean[9]  # the same keys
    assert mean[2] > 1.1 * mean[0]


def test_rows_without_room_give_no_windows_and_no_rewards():
    """A batch of padding, and one whose answers are shorter than the window."""
    empty = empty_batch(world.ROWS, world.ROW, world.ANCHORS)
    windows, metrics, *_ = roller(SETTINGS)(jax.random.key(0), 0, empty)
    assert not windows.valid_BxX.any() and metrics["windows"] == 0 and metrics["reward"] == 0
    assert not metrics["accepted_histogram"].any()
    assert all(np.isfinite(x).all() for x in (*windows, *metrics.values()))
    batch = world.batch()
    two = np.arange(world.ANCHORS) < 2
    windows, *_ = roller(SETTINGS)(jax.random.key(0), 0, batch._replace(anchor_mask_BxM=batch.anchor_mask_BxM & two))
    assert not windows.valid_BxX.any()


def test_sampled_acceptance_accepts_with_p_over_q():
    """Over 40 rollouts: accepted lengths less their expectation given the drafts, sum_j prod_{i<=j} min(1, p_i / q_i).

    The differences have mean zero; a rule that forgot q, or the temperature, is many standard errors off.
    """
    roll, T = roller(SAMPLED), SAMPLED.verify_temperature
    differences, wrong = [], []
    for i in range(40):
        windows, *_ = roll(jax.random.key(i), 0, world.batch())
        beams, logits, drafts = brute_force(world.batch(), windows)
        accepted = np.array([windows.accepted_BxX[beam] for beam in beams])
        q = np.exp(np.stack([windows.logp_BxXxK[beam] for beam in beams]))

        def expected(temperature, q, logits=logits, drafts=drafts):
            p = np.exp(np.take_along_axis(log_softmax(logits / temperature), drafts[..., None], -1)[..., 0])
            return np.cumprod(np.minimum(1, p / q), axis=1).sum(1)

        differences.append(accepted - expected(T, q))
        wrong.append([accepted - expected(1.0, q), accepted - expected(T, 1.0)])
    error = np.std(differences) / math.sqrt(np.size(differences))
    assert abs(np.mean(differences)) < 4 * error
    assert (np.abs(np.mean(wrong, axis=(0, 2))) > 8 * error).all()


# The step.

SGD = optax.adamw(2e-3, b2=0.95)


def train(rollouts, policy, steps, batch_of, start=None, optimizer=SGD):
    """Runs train_step; (final parameters, metrics of each step, compilations)."""
    begin = start or world.trained()
    state, shell = TrainState.create(begin.params, optimizer), begin.spec
    history, before = [], ppow_sampled.train_step._cache_size()
    for index in range(steps):
        key = jax.random.fold_in(jax.random.key(7), index)
        state, metrics = ppow_sampled.train_step(
            state, shell, world.target_params(), batch_of(index), key, config=world.CONFIG, optimizer=optimizer,
            rollouts=rollouts, policy=policy, answers_are_greedy=not rollouts.greedy_reference,
        )  # fmt: skip
        history.append(jax.device_get(metrics))
    assert int(state.step) == steps
    return state.params, history, ppow_sampled.train_step._cache_size() - before


def fixed(index):
    return world.batch()


def mean(history, name):
    return np.mean([m[name] for m in history])


def test_a_run_on_ragged_data_compiles_once():
    """Different texts, numbers of segments and anchors; ADAW begins in mid-run; the last batch is padding."""
    rollouts = dataclasses.replace(SETTINGS, adaw_start=3)
    empty = empty_batch(world.ROWS, world.ROW, world.ANCHORS)
    steps = world.batches().steps_of_epochs(2)
    start = world.trained().params
    policy = ppow_sampled.PolicySettings(0.2, 0.5, 1)
    params, history, compilations = train(
        rollouts, policy, steps + 1, lambda i: world.batches().at(i) if i < steps else empty
    )
    assert compilations == 1
    assert len({m["windows"].item() for m in history}) > 1
    for m in history:
        assert all(np.isfinite(x).all() for x in m.values())
        np.testing.assert_allclose(m["ratio"], 1.0 if m["windows"] else 0.0, atol=1e-5)
        assert m["ratio_clipped"] == 0
        np.testing.assert_allclose(m["loss"], 0.5 * m["kl"] - m["surrogate"], atol=1e-5)
        np.testing.assert_allclose(m["reward"], m["reward_speedup"] + m["reward_proximity"], atol=1e-6)
        assert m["accepted_histogram"].sum() == m["windows"]
    assert history[-1]["gradient_norm"] == 0
    assert history[0]["gradient_norm"] > 0
    assert all(np.isfinite(x).all() and not np.allclose(x, start[n], atol=1e-6) for n, x in params.items())


@pytest.mark.parametrize("bad", ["loss", "gradient", "parameters"])
def test_what_is_not_finite_anywhere_skips_the_update(bad):
    params = {"w": jnp.arange(3.0)}
    state = TrainState.create(params, SGD)
    new = {"w": jnp.array([1.0, jnp.inf, 2.0]) if bad == "parameters" else jnp.ones(3)}
    values = [jnp.float32(jnp.nan if bad == name else 1.0) for name in ("loss", "gradient")]
    after = jax.jit(TrainState.advance)(state, new, state.opt_state, *values)
    np.testing.assert_array_equal(after.params["w"], params["w"])
    assert (after.step, after.skipped) == (1, 1)
    good = after.advance({"w": jnp.ones(3)}, state.opt_state, jnp.float32(0))
    np.testing.assert_array_equal(good.params["w"], 1)
    assert (good.step, good.skipped) == (2, 1)


@pytest.mark.full
def test_the_policy_objective_alone_raises_the_reward():
    """No KL, so nothing but sampled rewards teaches: on one batch, over and over, windows get longer.

    Without R_dist and ADAW; two optimiser passes per rollout, so that the ratio moves and meets the clip. Measured:
    0.7 accepted tokens before, 1.3 after.
    """
    rollouts = dataclasses.replace(SETTINGS, group=16, windows=12, adaw=False, eta=0.0, rollout_temperature=1.0)
    _, history, compilations = train(rollouts, ppow_sampled.PolicySettings(0.2, 0.0, 2), 120, fixed)
    assert compilations == 1
    before, after = history[:5], history[-20:]
    print([mean(h, name) for name in ("accepted_length", "reward") for h in (before, after)])
    assert mean(after, "accepted_length") > mean(before, "accepted_length") + 0.3
    assert mean(after, "reward") > mean(before, "reward") + 0.2
    assert all(m["reward_proximity"] == 0 for m in history)
    assert all(abs(m["ratio"] - 1) > 1e-6 for m in history[1:])  # of the second pass
    assert any(m["ratio_clipped"] > 0 for m in history)


def test_the_kl_alone_falls():
    """Drafting that costs everything makes every reward the same: what is left is KL(target || drafter)."""
    rollouts = dataclasses.replace(SETTINGS, costs=CostModel(1e9), eta=0.0, adaw=False)
    _, history, _ = train(rollouts, ppow_sampled.PolicySettings(0.2, 1.0, 1), 40, fixed)
    assert mean(history, "flat_groups") == 1.0
    assert mean(history[-6:], "kl") < 0.8 * mean(history[:6], "kl")


def test_the_other_side_of_every_switch():
    """Sampled acceptance, the general cost model, the reference decoded, ADAW from the start, a window of one token."""
    costs = CostModel(0.1, general=True, verify=1.1, rollback=0.05, bonus=1.0)
    rollouts = dataclasses.replace(SAMPLED, window=1, adaw_start=0, costs=costs)
    _, history, compilations = train(rollouts, ppow_sampled.PolicySettings(0.2, 0.5, 1), 2, world.batches().at)
    assert compilations == 1
    for m in history:
        assert all(np.isfinite(x).all() for x in m.values())
        assert m["windows"] > 0 and m["gradient_norm"] > 0 and len(m["accepted_histogram"]) == 2
        assert m["reward_speedup"] >= 1 / 1.25 - 1e-6  # the target's own token counts
        np.testing.assert_allclose(m["ratio"], 1.0, atol=1e-5)
