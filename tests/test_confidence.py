"""The confidence head: what it learns and leaves alone, how it is kept, and that windows which it ends are lossless."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_world as world
import twelve_tokens as decoding
from scipy.special import rel_entr

from ppow_jax.errors import UserError
from ppow_jax.models import confidence
from ppow_jax.objectives import supervised as objectives
from ppow_jax.objectives.confidence import confidence_loss
from ppow_jax.speculation.adaptive import Stopping
from ppow_jax.speculation.settings import adaptive, adaptive_tree
from ppow_jax.weights.confidence_head import FILE, load_head, save_head, without_head

E = world.CONFIG.hidden_size


@functools.cache
def drafter():
    """The small world's, with a random head."""
    weight, bias = jax.random.normal(jax.random.key(3), (E,)), jnp.array(0.2)
    head = dict(zip(confidence.NAMES, (weight, bias), strict=True))
    return world.drafter().replace(params=world.drafter().params | head)


def test_the_loss_is_the_divergence_from_the_overlap():
    out = jax.random.normal(jax.random.key(0), (5, E))
    overlap = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    chance = np.exp(confidence.log_confidence(drafter().params, out))
    wanted = rel_entr(overlap, chance) + rel_entr(1 - overlap, 1 - chance)
    loss = confidence_loss(drafter().params, out, jnp.asarray(overlap))
    np.testing.assert_allclose(loss, wanted, rtol=1e-4, atol=1e-6)
    assert np.ptp(chance) > 0.1


@functools.cache
def scored():
    ids_W = world.drafter().target_ids_W
    windows = world.scored_batch(ids_W, world.batch()).windows
    embed = world.target_params()["embed"]

    def scores(params):
        return objectives.training_time_test(drafter().replace(params=params), embed, windows, 2, 0.8)

    def both(params):
        of_loss = jax.grad(lambda p: scores(p).total.sum())(params)
        return scores(params), of_loss, jax.grad(lambda p: objectives.mean_confidence_loss(scores(p)))(params)

    return jax.jit(both)(drafter().params)


def test_only_the_head_learns_from_its_loss_and_from_nothing_else():
    scores, of_loss, of_head = scored()
    for name, gradient in of_head.items():
        assert np.any(gradient) == (name in confidence.NAMES), name
    for name, gradient in of_loss.items():
        assert np.any(gradient) == (name not in confidence.NAMES), name
    assert scores.confidence.shape == scores.overlap.shape


def test_a_head_that_learns_alone_learns_the_overlap():
    """By the optimiser of --confidence_only: the drafter stays as it is."""
    still = {name: "head" if name in confidence.NAMES else "still" for name in drafter().params}
    optimizer = optax.partition({"head": optax.adam(0.05), "still": optax.set_to_zero()}, still)
    begin = world.drafter().params | confidence.init(E)
    state = TrainState.create(begin, optimizer)
    shell, losses = drafter().replace(params={}), []
    step = functools.partial(world.train_step, optimizer=optimizer, confidence_weight=1.0)
    for _ in range(120):
        state, metrics = step(state, shell, world.target_params(), world.batch())
        losses.append(float(metrics["confidence_loss"]))
    for name, value in without_head(begin).items():
        np.testing.assert_array_equal(state.params[name], value)
    scores = scored()[0]
    overlap_N = np.asarray(scores.overlap)[np.asarray(scores.valid)]
    mean = overlap_N.mean()
    assert losses[-1] < np.mean(rel_entr(overlap_N, mean) + rel_entr(1 - overlap_N, 1 - mean))  # any constant


def test_kept_beside_the_drafter(tmp_path):
    save_head(tmp_path, drafter().params)
    for name, value in load_head(tmp_path, E).items():
        np.testing.assert_array_equal(value, drafter().params[name])
    save_head(tmp_path, world.drafter().params)
    assert load_head(tmp_path, E) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a confidence head"),
        ("[1]", "not a confidence head"),
        ('{"confidence_weight": [1, 2]}', "not a confidence head .*confidence_bias"),
        ('{"confidence_weight": [1, 2], "confidence_bias": 0}', r"confidence_weight has the shape \(2,\)"),
        ('{"confidence_weight": [1, 2, NaN], "confidence_bias": 0}', "confidence_weight is not finite"),
        ('{"confidence_weight": [1, 2, "x"], "confidence_bias": 0}', "not a confidence head"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        load_head(tmp_path, 3)


PRICE = 0.01  # at which this drafter's windows go on: it is seldom right, and would rest at once at a higher one


@functools.cache
def confident(fc_norm: bool, seed: int):
    """The drafter of the decoding tests, with a head that doubts often enough."""
    plain = decoding.drafter(fc_norm, seed)
    weight = jax.random.normal(jax.random.key(4), (plain.config.hidden_size,))
    head = dict(zip(confidence.NAMES, (weight, jnp.zeros(())), strict=True))
    return plain.replace(params=plain.params | head)


@pytest.mark.parametrize("rule", ["throughput", "threshold"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_windows_that_the_head_ends_are_lossless(rule, shape):
    stopping = Stopping(rule, 0.3, head=True)
    way = adaptive(3, stopping=stopping) if shape == "chain" else adaptive_tree(3, 3, 10, stopping)
    found, histogram_NxK1, drafted_N = decoding.with_mode(way, PRICE, confident)
    assert found == decoding.expected()
    by_drafter = dataclasses.replace(way, adaptive=dataclasses.replace(stopping, head=False))
    assert (drafted_N != decoding.with_mode(by_drafter, PRICE, confident)[2]).any()  # the head had its say
    assert (histogram_NxK1.sum(0)[:2] > 0).all()


def test_the_chance_of_a_draft_is_the_heads():
    out = jax.random.normal(jax.random.key(1), (2, 3, E))
    z = np.asarray(out) @ np.asarray(drafter().params[confidence.WEIGHT]) + 0.2
    chance = np.exp(confidence.log_confidence(drafter().params, out))
    np.testing.assert_allclose(chance, 1 / (1 + np.exp(-z)), rtol=1e-5)
