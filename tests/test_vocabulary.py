"""The largest entries of a row, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.models.vocabulary import top_k


@pytest.mark.parametrize("V", [128, 8192, 61])  # the last does not divide: XLA's own
@pytest.mark.parametrize("tied", [False, True])
def test_top_k(V, tied):
    z = np.random.default_rng(V).normal(size=(3, 2, V)).astype(np.float32)
    z = np.round(z) if tied else z
    value, index = jax.jit(top_k, static_argnums=1)(z, 7)
    np.testing.assert_array_equal(value, -np.sort(-z, axis=-1)[..., :7])
    np.testing.assert_array_equal(np.take_along_axis(z, np.asarray(index), -1), value)
    assert all(len(set(row)) == 7 for row in np.asarray(index).reshape(-1, 7).tolist())


def test_top_k_of_masked_rows():
    z = jnp.full((1, 8192), -jnp.inf).at[0, 4000].set(1.0)
    value, index = top_k(z, 3)
    assert value.tolist() == [[1.0, -np.inf, -np.inf]] and index[0, 0] == 4000
