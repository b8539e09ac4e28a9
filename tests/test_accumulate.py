"""Microbatches: what is cut and put together again, sums, and both stages against the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world

from ppow_jax.data.batches import Batches
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.training.steps import supervised
from ppow_jax.training.steps.accumulate import each, join, split, summed
from ppow_jax.training.steps.state import TrainState


def test_split_and_join_are_inverse():
    tree = {"a_BxT": jnp.arange(24).reshape(6, 4), "b_B": jnp.arange(6)}
    pieces = split(tree, 3)
    assert pieces["a_BxT"].shape == (3, 2, 4)
    assert sorted(pieces["b_B"].reshape(-1).tolist()) == list(range(6))
    np.testing.assert_array_equal(pieces["a_BxT"][..., 0], 4 * pieces["b_B"])
    jax.tree.map(np.testing.assert_array_equal, join(pieces), tree)


def test_each_keeps_the_order_of_rows_and_summed_adds_all():
    x = jnp.arange(12.0).reshape(6, 2)
    for number in (1, 2, 3, 6):
        np.testing.assert_array_equal(each(lambda x: x * 2, x, number), x * 2)
        total, count = summed(lambda x: (x.sum(0), jnp.int32(len(x))), x, number)
        np.testing.assert_array_equal(total, [30, 36])
        assert count == 6 and count.dtype == jnp.int32


@pytest.mark.full
@pytest.mark.parametrize("loss", [SupervisedLoss(), SupervisedLoss("hybrid", "acceptance")], ids=str)
def test_four_microbatches_are_the_whole_batch(loss):
    """Rows of very different numbers of anchors: a mean of means would be another number."""
    batches = Batches(world.examples(), seed=0, batch_size=4, row_length=world.ROW, max_anchors=world.ANCHORS)
    batch = batches.at(0)
    batch.anchor_mask_BxM[1, 3:] = False
    batch.anchor_mask_BxM[2] = False
    start, results = world.drafter(), []
    for number in (1, 4):
        step = functools.partial(
            supervised.train_step, config=world.CONFIG, optimizer=world.OPTIMIZER, steps=2, loss=loss,
            answers_are_greedy=False, accumulate=number,
        )  # fmt: skip
        state = TrainState.create(start.params, world.OPTIMIZER)
        state, metrics = step(state, start.spec, world.target_params(), batch)
        results.append(jax.device_get((metrics, state.params)))
    whole, parts = results
    assert whole[0]["answer_tokens"] == batch.anchor_mask_BxM.sum()
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
