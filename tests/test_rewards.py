"""The paper's own figures, and the general cost model by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives.rewards import CostModel, proximity_reward, speedup_reward


def test_the_papers_table():
    """gamma = 0.12, k = 0..10, as the paper prints it: whole windows of ten."""
    reward = speedup_reward(jnp.arange(11), 10, CostModel(0.12))
    assert reward.dtype == jnp.float32
    printed = [0, 0.893, 1.61, 2.21, 2.70, 3.13, 3.49, 3.80, 4.08, 4.33, 4.55]
    np.testing.assert_allclose(reward, printed, atol=6e-3)
    np.testing.assert_allclose(reward[np.array([0, 1, 10])], [0, 1 / 1.12, 10 / 2.2], rtol=1e-6)
    assert (np.diff(reward) > 0).all() and (np.diff(reward, 2) < 0).all()  # rising, concave


@pytest.mark.parametrize(
    ("costs", "expected"),
    [  # K = 4, k = 0, 2, 4: (k + bonus) / (gamma 4 + verify + rollback (4 - k))
        (CostModel(0.25, general=True), [0 / 2, 2 / 2, 4 / 2]),
        (CostModel(0.25, general=True, bonus=1.0), [1 / 2, 3 / 2, 5 / 2]),
        (CostModel(0.5, general=True, verify=1.5, rollback=0.25, bonus=1.0), [1 / 4.5, 3 / 4, 5 / 3.5]),
        (CostModel(0.0, general=True, verify=2.0), [0, 1, 2]),
        (CostModel(0.0), [0, 2, 4]),
        (CostModel(0.25, verify=9.0, rollback=9.0, bonus=9.0), [0, 2 / 1.5, 4 / 2]),  # the paper's knows no others
    ],
)
def test_cost_models_by_hand(costs, expected):
    accepted = jnp.array([[0], [2], [4]])
    np.testing.assert_allclose(speedup_reward(accepted, 4, costs), np.array(expected)[:, None], rtol=1e-6)


def test_the_window_is_charged_for_what_it_drafts_only_in_the_general_model():
    k = jnp.array(2)
    assert speedup_reward(k, 3, CostModel(0.3)) == speedup_reward(k, 9, CostModel(0.3))
    general = CostModel(0.3, general=True)
    assert speedup_reward(k, 3, general) > speedup_reward(k, 9, general)


def test_proximity_only_where_nothing_was_accepted_and_delta_is_below_eps():
    accepted = jnp.array([0, 0, 0, 1, 4, 0])
    reference = jnp.array([-2.0, -2.0, -2.0, -2.0, -2.0, -5.0])
    draft = jnp.array([-4.9, -5.0, -9.0, -2.0, -2.0, -2.0])  # Delta 2.9, 3, 7, 0, 0, -3
    reward = proximity_reward(accepted, reference, draft, eta=0.25, eps=3.0)
    np.testing.assert_array_equal(reward, [0.25, 0, 0, 0, 0, 0.25])
    assert not proximity_reward(accepted, reference, draft, eta=0.0, eps=3.0).any()
