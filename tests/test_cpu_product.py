"""Our own products for CPUs against float64, and what decoding relies on: a row's result whatever is beside it."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.cpu import library
from ppow_jax.cpu.product import call, product
from ppow_jax.models.layers import linear

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")

kinds = pytest.mark.parametrize("kind", library.kinds())  # what this processor has: AMX has both
SHAPES = [(1, 16, 16), (1, 1, 1), (3, 17, 33), (6, 40, 255), (7, 192, 576), (13, 50, 1536), (200, 57, 99), (385, 3, 30)]


def _case(M, O, I, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(M, I)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(O, I)), jnp.bfloat16)


def _exact(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_both_products_agree_with_float64(kind, shape):
    x_MxI, w_OxI = _case(*shape)
    want = _exact(x_MxI) @ _exact(w_OxI).T
    got = jax.jit(call, static_argnums=0)(kind, x_MxI, w_OxI)
    transposed = jax.jit(call, static_argnums=(0, 3))(kind, x_MxI, jnp.asarray(w_OxI.T), True)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * shape[2])
    np.testing.assert_array_equal(transposed, got)  # the same sums in the same order


@kinds
@pytest.mark.parametrize("rows", [2, 5, 6, 7, 8, 16, 17, 33, 193, 400])
def test_a_row_is_the_same_whatever_is_beside_it(kind, rows):
    x_MxI, w_OxI = _case(rows, 100, 576)
    together = jax.jit(call, static_argnums=0)(kind, x_MxI, w_OxI)
    for row in {0, 1, rows // 2, rows - 1}:
        np.testing.assert_array_equal(call(kind, x_MxI[row : row + 1], w_OxI)[0], together[row])


@kinds
def test_what_is_not_finite_stays_in_its_row(kind):
    x_MxI, w_OxI = _case(4, 20, 40)
    y = np.asarray(call(kind, x_MxI.at[1, 3].set(jnp.nan).at[2, 0].set(jnp.inf), w_OxI))
    assert np.isnan(y[1]).all() and not np.isfinite(y[2]).any()
    assert np.isfinite(y[[0, 3]]).all()


def test_linear_takes_it_and_can_be_differentiated_and_mapped():
    x_BxMxI, w_OxI = jnp.stack([_case(3, 10, 32, s)[0] for s in range(2)]), _case(3, 10, 32)[1]
    assert "ppow_product" in jax.jit(linear).lower(x_BxMxI, w_OxI).as_text()
    np.testing.assert_array_equal(jax.vmap(linear, (0, None))(x_BxMxI, w_OxI), linear(x_BxMxI, w_OxI))
    gradient = jax.grad(lambda x: linear(x, w_OxI)[0, 0].sum())(x_BxMxI)
    np.testing.assert_allclose(gradient[0, 0], np.asarray(w_OxI, np.float32).sum(0), rtol=1e-5)
    assert not gradient[1].any()


def test_many_products_at_once_on_few_threads():
    x_MxI, w_OxI = _case(8, 256, 512)

    @jax.jit
    def many(x):
        return sum(product(x + i, w_OxI) for i in range(32))  # none waits for another

    want = sum(np.asarray(jax.jit(product)(x_MxI + i, w_OxI), np.float64) for i in range(32))
    for _ in range(20):
        np.testing.assert_allclose(many(x_MxI), want, rtol=1e-5, atol=1e-2)


_WITHOUT = """
import logging, jax.numpy as jnp
logging.basicConfig()
from ppow_jax.models.layers import linear
print(linear(jnp.ones((1, 8)), jnp.ones((4, 8), jnp.bfloat16))[0, 0])
"""


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"PATH": "/nowhere"}, "no C++ compiler found"),
        ({"CXX": "false"}, "Command '["),  # a compiler that fails, and does not say why
        ({"PPOW_JAX_CPU_KERNELS": "0"}, ""),
    ],
)
def test_where_it_cannot_be_compiled_xla_does_it(environment, says, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        env={"HOME": str(tmp_path), "PYTHONPATH": ".", "PATH": "/usr/bin", **environment},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "8.0", done.stderr
    assert says in done.stderr
    assert bool(says) == ("CPU kernels are not available" in done.stderr)
    assert not list(tmp_path.rglob("*.so"))
