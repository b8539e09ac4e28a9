"""Attention of whole texts by the kernels of kept libraries: cuDNN on a GPU, Pallas splash attention on a TPU.

They serve passes in which every token sees the earlier ones of its own segment, and nothing else: the target's pass
over packed rows, and prompts that are read at once. Splash attention takes segments as ids and never holds scores, so
that memory grows with the length of a row, not with its square. All else (caches, draft windows, trees, sliding
windows, a CPU) takes the plain code of `models.layers`, which is also what these kernels are tested against.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models import platforms

Array = jax.Array
PLAIN, CUDNN, SPLASH, INTERPRETED = "plain", "cudnn", "splash", "splash-interpreted"
BACKENDS = (PLAIN, CUDNN, SPLASH, INTERPRETED)  # the last runs splash attention's code on any platform, slowly
_BY_PLATFORM = {"gpu": CUDNN, "tpu": SPLASH}
BLOCK = 128  # tokens: splash attention's least tile; the length of a row must be a multiple of it
TILES = (512, 256, BLOCK)  # sizes of its tiles, the first that divides a row is taken
CUDNN_ROW = 64  # tokens: rows are multiples of it, which every version of cuDNN takes
AMPERE = 8.0  # compute capability
CUDNN_HEAD = 128  # widest head of cuDNN's kernels on every GPU since A100

_chosen = jax.make_user_context(default_value=None)  # part of the key under which JAX keeps compiled programs


class Packed(NamedTuple):
    """Mask of rows of packed texts: a token sees itself and the earlier tokens of its segment.

    segment_BxS: the segment of each token, int32; None if a row is one segment.
    """

    segment_BxS: Array | None = None

    def dense(self, B: int, S: int) -> Array:
        """The mask as an array: [B, S, S], True = visible."""
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))
        if self.segment_BxS is None:
            return causal
        return causal & (self.segment_BxS[:, :, None] == self.segment_BxS[:, None])


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Traces this thread's programs with one of BACKENDS; None leaves it to the platform."""
    with _chosen(backend):
        yield


def current() -> str:
    """The backend in use: the one chosen by `use`, or the platform's."""
    return _chosen.value or _BY_PLATFORM.get(platforms.current(), PLAIN)


def eligible(S: int, head_dim: int, dtype: Any) -> bool:
    """True if the backend in use has a kernel for rows of S tokens with heads of this width and keys of this dtype."""
    backend = current()
    if backend in (SPLASH, INTERPRETED):
        return S % BLOCK == 0
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD and S % CUDNN_ROW == 0
    return backend == CUDNN and fits and _since_ampere()


def _since_ampere() -> bool:
    """True unless the GPU is older than cuDNN's attention kernels take."""
    return float(getattr(jax.local_devices()[0], "compute_capability", AMPERE)) >= AMPERE


def attend(q_BxSxHxd: Array, k_BxKvxdxS: Array, v_BxKvxSxd: Array, packed: Packed) -> Array:
    """Softmax attention of S tokens among themselves: [B, S, H, d] in the dtype of the queries.

    The keys are laid out as in `layers.KV`. Call it only where `eligible`.
    """
    k_BxSxKvxd, v_BxSxKvxd = k_BxKvxdxS.transpose(0, 3, 1, 2), v_BxKvxSxd.transpose(0, 2, 1, 3)
    if current() == CUDNN:
        out = library_attention(q_BxSxHxd.astype(k_BxSxKvxd.dtype), k_BxSxKvxd, v_BxSxKvxd, packed, "cudnn")
    else:
        out = splash_attention(q_BxSxHxd, k_BxSxKvxd, v_BxSxKvxd, packed, interpret=current() == INTERPRETED)
    return out.astype(q_BxSxHxd.dtype)


def library_attention(q_BxSxHxd: Array, k_BxSxKvxd: Array, v_BxSxKvxd: Array, packed: Packed, kernel: Any) -> Array:
    """`jax.nn.dot_product_attention`; kernel: `cudnn` or `xla`."""
    B, S = q_BxSxHxd.shape[:2]
    mask = None if packed.segment_BxS is None else packed.dense(B, S)[:, None]
    return jax.nn.dot_product_attention(
        q_BxSxHxd, k_BxSxKvxd, v_BxSxKvxd, mask=mask, is_causal=mask is None, implementation=kernel
    )


def splash_attention(
    q_BxSxHxd: Array, k_BxSxKvxd: Array, v_BxSxKvxd: Array, packed: Packed, interpret: bool = False
) -> Array:
    """Pallas splash attention; on a mesh every device computes its own rows and heads."""
    segment_BxS = packed.segment_BxS
    if segment_BxS is None:
        segment_BxS = jnp.zeros(q_BxSxHxd.shape[:2], jnp.int32)
    run = functools.partial(_splash, interpret=interpret)
    sizes = sharding.axis_sizes()
    if not sizes:
        return run(q_BxSxHxd, k_BxSxKvxd, v_BxSxKvxd, segment_BxS)
    heads = "kv_heads" if k_BxSxKvxd.shape[2] % sizes.get("tensor", 1) == 0 else None  # queries lie with their keys
    places = [sharding.spec(("batch", None, heads, None), x.shape, sizes, {}) for x in (q_BxSxHxd, k_BxSxKvxd)]
    rows = sharding.spec(("batch", None), segment_BxS.shape, sizes, {})
    spread = jax.shard_map(
        run, in_specs=(places[0], places[1], places[1], rows), out_specs=places[0], check_vma=False
    )
    return spread(q_BxSxHxd, k_BxSxKvxd, v_BxSxKvxd, segment_BxS)


def _splash(q_BxSxHxd: Array, k_BxSxKvxd: Array, v_BxSxKvxd: Array, segment_BxS: Array, *, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, S, H, d = q_BxSxHxd.shape
    tile = next(size for size in TILES if S % size == 0)
    tiles = kernels.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
        block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile,
    )  # fmt: skip
    causal = masks.MultiHeadMask([masks.CausalMask((S, S)) for _ in range(H)])
    kernel = kernels.make_splash_mha(causal, block_sizes=tiles, head_shards=1, q_seq_shards=1, interpret=interpret)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BxSxHxd, k_BxSxKvxd, v_BxSxKvxd))
    q = (q.astype(jnp.float32) * d**-0.5).astype(k.dtype)
    out_BxHxSxd = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segment_BxS)
    return out_BxHxSxd.transpose(0, 2, 1, 3)
