"""Products with bfloat16 weights on a CPU, faster than XLA's; the result of a row does not depend on the other rows.

XLA:CPU's time grows with every few rows: on a processor without bfloat16 instructions SmolLM2 verifies eight tokens in
2.0 plain steps, with these products in 1.4 (docs/experiments.md, 2026-11-25).
"""

import jax
import jax.numpy as jnp

from ppow_jax.cpu import library

Array = jax.Array


@jax.custom_jvp
def product(x_MxI: Array, w_OxI: Array) -> Array:
    """x w^T -> float32 [M, O], with x rounded to bfloat16 and sums in float32. w_OxI: bfloat16.

    A row's result is bit for bit independent of the other rows. Call it only in programs for CPUs, and only if
    `library.available()`.
    """
    return call(library.kinds()[-1], x_MxI, w_OxI)


@product.defjvp
def _product_jvp(primals, tangents):
    (x_MxI, w_OxI), (dx_MxI, dw_OxI) = primals, tangents
    dy_MxO = _plain(dx_MxI, w_OxI.astype(jnp.float32)) + _plain(x_MxI, dw_OxI.astype(jnp.float32))
    return product(x_MxI, w_OxI), dy_MxO


def _plain(x_MxI: Array, w_OxI: Array) -> Array:
    return jnp.einsum("mi,oi->mo", x_MxI.astype(jnp.float32), w_OxI, preferred_element_type=jnp.float32)


def product_transposed(g_MxO: Array, w_OxI: Array) -> Array:
    """g w -> float32 [M, I], as `product`; the gradient of its x."""
    return call(library.kinds()[-1], g_MxO, w_OxI, transposed=True)


def call(kind: str, x_MxK: Array, w: Array, transposed: bool = False) -> Array:
    """Product with one of `library.kinds()`: `vectors` take x as float32, the others as bfloat16."""
    if kind != "vectors":
        x_MxK = x_MxK.astype(jnp.bfloat16)
    else:  # rounded, but not by a cast to bfloat16 and back, which XLA may remove
        x_MxK = jax.lax.reduce_precision(x_MxK.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    shape = jax.ShapeDtypeStruct((x_MxK.shape[0], w.shape[1 if transposed else 0]), jnp.float32)
    return jax.ffi.ffi_call(library.target(kind, transposed), shape, vmap_method="sequential")(x_MxK, w)
