"""Operations shared by the target and the drafter.

Matrices are stored `[out, in]`. A product runs in the precision of its weights and accumulates float32. `linear`
returns float32, `project` the dtype of its input: activations keep the dtype with which they enter a model, see
`models.precision`. That is float32 on a CPU, the fast path there (bfloat16 outputs and one-row bfloat16 products are
slower by a factor of ten).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from ppow_jax import sharding
from ppow_jax.cpu import attention as cpu_attention
from ppow_jax.cpu import library, norm, product
from ppow_jax.models import attention_backends, platforms, precision
from ppow_jax.models.attention_backends import Packed
from ppow_jax.models.rope import Scaling

Array = jax.Array
Product = Callable[[Array, Array], Array]
QUERY_BLOCK = 128
precision.context()  # before any program is compiled
NEGATIVE = -1e30  # mask value of scores; finite, so that a row without any key gives no NaN


class KV(NamedTuple):
    """Keys (already rotated) and values of one layer.

    Keys are stored transposed, so that scores are a plain matrix product (2.6 times faster on XLA:CPU).
    """

    k_BxKvxdxL: Array
    v_BxKvxLxd: Array

    @classmethod
    def of(cls, k_BxLxKvxd: Array, v_BxLxKvxd: Array) -> "KV":
        """Builds the cache layout from keys and values as projections return them."""
        return cls(k_BxLxKvxd.transpose(0, 2, 3, 1), v_BxLxKvxd.transpose(0, 2, 1, 3))


class Keys(NamedTuple):
    """One block of keys that queries may attend to: a `KV` and mask_BxSxL (True = visible), or a `Packed` in its place
    where a backend of `attention_backends` takes the queries' own keys and nothing else.
    """

    kv: KV
    mask_BxSxL: Any


def inner(a: Array, b: Array) -> Array:
    """Inner products over the last axis, [..., I] and [..., I] -> [...], in full precision.

    Written as a contraction, because XLA:CPU can take fifty times as long for the sum of a product.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("...i,...i->...", a, b, precision=highest, preferred_element_type=jnp.float32)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation over the last axis, computed in float32, in the dtype of x.

    scale: [D], or more axes that broadcast with x.
    """
    dtype, x = x.dtype, x.astype(jnp.float32)
    factor = norm.factor(x, eps) if _ours() else jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * factor * scale.astype(jnp.float32)).astype(dtype)


def rows_of(table_VxD: Array, index: Array) -> Array:
    """table[index] as float32 [..., D].

    XLA:CPU has no bfloat16 gather: it would make a float32 copy of the whole table first. Bits are gathered instead.
    """
    if table_VxD.dtype != jnp.bfloat16 or not platforms.on_cpu():
        return table_VxD[index].astype(jnp.float32)
    rows = jax.lax.bitcast_convert_type(table_VxD, jnp.uint16)[index]
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16).astype(jnp.float32)


def linear(x: Array, w_OxI: Array) -> Array:
    """x_...xI times w_OxI -> float32 ...xO, multiplied in the dtype of the weights."""
    return _product(x.reshape(-1, x.shape[-1]), w_OxI).reshape(*x.shape[:-1], w_OxI.shape[0])


def project(x: Array, w_OxI: Array) -> Array:
    """`linear` in the dtype of x: devices that each hold a part of the sum exchange it in that dtype."""
    return _product(x.reshape(-1, x.shape[-1]), w_OxI, x.dtype).reshape(*x.shape[:-1], w_OxI.shape[0])


def _product(x_MxI: Array, w_OxI: Array, out: Any = jnp.float32) -> Array:
    def plain(x_MxI: Array, sums: Any = jnp.float32) -> Array:
        return jnp.einsum("mi,oi->mo", x_MxI.astype(w_OxI.dtype), w_OxI, preferred_element_type=sums)

    if w_OxI.dtype != jnp.bfloat16:
        return plain(x_MxI).astype(out)
    if not platforms.on_cpu():
        return plain(x_MxI, out)
    if _ours():
        return product.product(x_MxI, w_OxI).astype(out)
    if x_MxI.shape[0] == 1:  # XLA:CPU leaves its fast path for a single bfloat16 row
        return plain(jnp.concatenate([x_MxI, x_MxI]))[:1].astype(out)
    return plain(x_MxI).astype(out)


def _ours() -> bool:
    """True if CPU programs use our own kernels: custom calls cannot be partitioned, and other backends need none."""
    return platforms.on_cpu() and not sharding.in_use() and library.available()


def input_gradient(g_MxO: Array, w_OxI: Array, out: DTypeLike = jnp.float32) -> Array:
    """g w -> [M, I] in the dtype `out`: the gradient of `linear`'s x, multiplied in the dtype of the weights."""
    if w_OxI.dtype == jnp.bfloat16 and _ours():
        return product.product_transposed(g_MxO, w_OxI).astype(out)
    return jnp.einsum("mo,oi->mi", g_MxO.astype(w_OxI.dtype), w_OxI, preferred_element_type=out)


def linear_bf16(x: Array, w_OxI: Array) -> Array:
    """Like `linear` for float32 master weights, with every product of both passes in bfloat16.

    Plain differentiation of a bfloat16 product multiplies a float32 cotangent, which leaves the fast path; here the
    cotangent is rounded to bfloat16 too, and laid out for the weight gradient.
    """
    y_MxO = _product_bf16(x.reshape(-1, x.shape[-1]), w_OxI, jnp.float32, x.dtype)
    return y_MxO.reshape(*x.shape[:-1], w_OxI.shape[0])


def project_bf16(x: Array, w_OxI: Array) -> Array:
    """`linear_bf16` in the dtype of x."""
    y_MxO = _product_bf16(x.reshape(-1, x.shape[-1]), w_OxI, x.dtype, x.dtype)
    return y_MxO.reshape(*x.shape[:-1], w_OxI.shape[0])


def weight_gradient(g_PxMxO: Array, x_PxMxI: Array) -> Array:
    """g^T x of each part -> float32 [P, O, I].

    On a CPU in bfloat16 the cotangent is first transposed in memory, which is twice as fast.
    """
    one = g_PxMxO.dtype == jnp.bfloat16 and g_PxMxO.shape[0] == 1
    if one and platforms.on_cpu() and not sharding.in_use():
        g_OxM = with_layout_constraint(jax.lax.optimization_barrier(g_PxMxO[0].T), Layout((0, 1)))
        return jnp.einsum("om,mi->oi", g_OxM, x_PxMxI[0], preferred_element_type=jnp.float32)[None]
    return jnp.einsum("pmo,pmi->poi", g_PxMxO, x_PxMxI, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product_bf16(x_MxI: Array, w_OxI: Array, out: DTypeLike, back: DTypeLike) -> Array:
    return _product(x_MxI, w_OxI.astype(jnp.bfloat16), out)


def _product_bf16_fwd(x_MxI: Array, w_OxI: Array, out: DTypeLike, _: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    x_MxI, w_OxI = x_MxI.astype(jnp.bfloat16), w_OxI.astype(jnp.bfloat16)
    return _product(x_MxI, w_OxI, out), (x_MxI, w_OxI)


def _product_bf16_bwd(_: DTypeLike, back: DTypeLike, saved: tuple[Array, Array], g_MxO: Array) -> tuple[Array, Array]:
    x_MxI, w_OxI = saved
    g_MxO = g_MxO.astype(jnp.bfloat16)
    return input_gradient(g_MxO, w_OxI, back), weight_gradient(g_MxO[None], x_MxI[None])[0]


_product_bf16.defvjp(_product_bf16_fwd, _product_bf16_bwd)


def rotation(
    position_BxS: Array, head_dim: int, theta: float, scaling: Scaling | None = None
) -> tuple[Array, Array]:
    """Cosine and sine of rotary position embedding (RoFormer, 2104.09864): [B, S, 1, d/2] each."""
    half = head_dim // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency_h = scaling.scale(frequency_h, theta)
    angle_BxSx1xh = (position_BxS[..., None].astype(jnp.float32) * frequency_h)[:, :, None]
    # kept behind a barrier: XLA:CPU would recompute them for each head of each layer, inside the fusions that use them
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle_BxSx1xh), jnp.sin(angle_BxSx1xh)))
    return (cos, sin) if scaling is None else (cos * scaling.attention_factor, sin * scaling.attention_factor)


def rope(x_BxSxHxd: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates queries or keys, in float32 and Hugging Face's half-split form; the result has their dtype."""
    (cos, sin), half = rotation, x_BxSxHxd.shape[-1] // 2
    a, b = x_BxSxHxd[..., :half], x_BxSxHxd[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxSxHxd.dtype)


def heads(x_BxSxF: Array, head_dim: int) -> Array:
    """[B, S, H*d] -> [B, S, H, d]."""
    return x_BxSxF.reshape(*x_BxSxF.shape[:-1], -1, head_dim)


def scores(q_BxSxHxd: Array, block: Keys) -> Array:
    """Masked, scaled scores of grouped queries against one block: [B, Kv, H/Kv, S, L] float32."""
    k, mask_BxSxL = block.kv.k_BxKvxdxL, block.mask_BxSxL
    B, S, H, d = q_BxSxHxd.shape
    Kv = k.shape[1]
    q_BxKvxXxd = q_BxSxHxd.reshape(B, S, Kv, H // Kv, d).transpose(0, 2, 3, 1, 4).reshape(B, Kv, -1, d)
    s = jnp.einsum("bkxd,bkdl->bkxl", q_BxKvxXxd.astype(k.dtype), k, preferred_element_type=jnp.float32)
    s = s.reshape(B, Kv, H // Kv, S, -1) * d**-0.5
    return jnp.where(mask_BxSxL[:, None, None], s, NEGATIVE)


def weighted_values(p_BxKvxgxSxL: Array, v_BxKvxLxd: Array) -> Array:
    """Attention weights times values: [B, S, H, d] float32."""
    B, Kv, g, S, L = p_BxKvxgxSxL.shape
    p = p_BxKvxgxSxL.reshape(B, Kv, g * S, L).astype(v_BxKvxLxd.dtype)
    o = jnp.einsum("bkxl,bkld->bkxd", p, v_BxKvxLxd, preferred_element_type=jnp.float32)
    return o.reshape(B, Kv, g, S, -1).transpose(0, 3, 1, 2, 4).reshape(B, S, Kv * g, -1)


def query_blocks(S: int) -> list[slice]:
    """Splits S queries into blocks whose scores stay in a processor's cache (3.4 times faster at S = 512 on CPU)."""
    return [slice(start, min(start + QUERY_BLOCK, S)) for start in range(0, S, QUERY_BLOCK)]


def attention(q_BxSxHxd: Array, contexts: Sequence[Keys], own: Keys) -> Array:
    """Softmax attention over several blocks of keys as if they were one: [B, S, H, d] in the dtype of the queries.

    own: the keys of the S queries themselves; a query never attends to a later one. A cache and the window being
    verified are separate blocks: nothing has to be written to a cache before acceptance is known.
    """
    if isinstance(own.mask_BxSxL, Packed):
        return attention_backends.attend(q_BxSxHxd, *own.kv, own.mask_BxSxL)
    keys = [block.kv.k_BxKvxdxL for block in (*contexts, own)]
    if not _ours() or any(x.dtype != jnp.float32 for x in (q_BxSxHxd, *keys)):
        return _in_query_blocks(q_BxSxHxd, contexts, own).astype(q_BxSxHxd.dtype)
    return _fused(q_BxSxHxd, contexts, own)


def _in_query_blocks(q_BxSxHxd: Array, contexts: Sequence[Keys], own: Keys) -> Array:
    outs = []
    for rows in query_blocks(q_BxSxHxd.shape[1]):
        seen = KV(own.kv.k_BxKvxdxL[..., : rows.stop], own.kv.v_BxKvxLxd[:, :, : rows.stop])
        blocks = [Keys(kv, mask_BxSxL[:, rows]) for kv, mask_BxSxL in contexts]
        blocks.append(Keys(seen, own.mask_BxSxL[:, rows, : rows.stop]))
        outs.append((_joined if q_BxSxHxd.dtype == jnp.bfloat16 else _attention)(q_BxSxHxd[:, rows], blocks))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


@jax.custom_vjp
def _fused(q_BxSxHxd: Array, contexts: Sequence[Keys], own: Keys) -> Array:
    return cpu_attention.attend(q_BxSxHxd, [(*kv, mask_BxSxL) for kv, mask_BxSxL in (*contexts, own)])


def _fused_fwd(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _fused(*arguments), arguments


def _fused_bwd(arguments: tuple[Any, ...], g_BxSxHxd: Array) -> tuple[Any, ...]:
    return jax.vjp(_in_query_blocks, *arguments)[1](g_BxSxHxd)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _attention(q_BxSxHxd: Array, blocks: Sequence[Keys]) -> Array:
    parts = [scores(q_BxSxHxd, block) for block in blocks]
    p = jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1)
    out, start = jnp.zeros(()), 0
    for block, part in zip(blocks, parts, strict=True):
        out += weighted_values(p[..., start : start + part.shape[-1]], block.kv.v_BxKvxLxd)
        start += part.shape[-1]
    return out


def _joined(q_BxSxHxd: Array, blocks: Sequence[Keys]) -> Array:
    """`_attention` for an accelerator: each block keeps its own scores, and heads stay grouped with their queries.

    A TPU would copy scores to join them, and to part H/Kv from S where S is no multiple of its tiles. The barrier
    keeps it from computing the exponentials twice, once for their sum.
    """
    B, S, H, d = q_BxSxHxd.shape
    Kv = blocks[0].kv.k_BxKvxdxL.shape[1]
    q_BxKvxXxd = q_BxSxHxd.reshape(B, S, Kv, H // Kv, d).transpose(0, 2, 3, 1, 4).reshape(B, Kv, -1, d)
    parts = []
    for (k, _), mask_BxSxL in blocks:
        s = jnp.einsum("bkxd,bkdl->bkxl", q_BxKvxXxd.astype(k.dtype), k, preferred_element_type=jnp.float32)
        parts.append(jnp.where(jnp.tile(mask_BxSxL, (1, H // Kv, 1))[:, None], s * d**-0.5, NEGATIVE))
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in parts])
    out, total = jnp.zeros(()), jnp.zeros(())
    for part, block in zip(parts, blocks, strict=True):
        p, v = jnp.exp(part - top), block.kv.v_BxKvxLxd
        weights, part_sum = jax.lax.optimization_barrier((p.astype(v.dtype), p.sum(-1, keepdims=True)))
        out += jnp.einsum("bkxl,bkld->bkxd", weights, v, preferred_element_type=jnp.float32)
        total += part_sum
    out = (out / total).astype(q_BxSxHxd.dtype)
    return out.reshape(B, Kv, -1, S, d).transpose(0, 3, 1, 2, 4).reshape(B, S, H, d)


def biased(x: Array, params: dict[str, Any], name: str) -> Array:
    """x times the matrix `name`_proj of `params`, plus `name`_bias if present."""
    y, bias_O = project(x, params[f"{name}_proj"]), params.get(f"{name}_bias")
    return y if bias_O is None else (y + bias_O.astype(jnp.float32)).astype(y.dtype)


def swiglu(x: Array, gate_IxD: Array, up_IxD: Array, down_DxI: Array, product: Product = linear) -> Array:
    """down(silu(gate x) * up x)."""
    return product(jax.nn.silu(product(x, gate_IxD)) * product(x, up_IxD), down_DxI)
