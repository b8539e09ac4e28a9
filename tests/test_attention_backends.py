"""Attention by libraries' kernels gives what the plain code gives, in float32, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.models import attention_backends as backends
from ppow_jax.models import layers, transformer
from ppow_jax.models.attention_backends import Packed
from ppow_jax.models.config import ModelConfig

B, S, H, KV, D = 2, 128, 4, 2, 32
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=50, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=True, eos_token_ids=(49,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_code(monkeypatch):
    """Compared with XLA's code, not with the kernels that a CPU has of its own."""
    monkeypatch.setattr(layers, "_ours", lambda: False)


def segments(B=B, S=S):
    """Three texts in the first row, two and padding in the second."""
    segment_BxS = np.zeros((B, S), np.int32)
    segment_BxS[0] = np.repeat([1, 2, 3], [50, 1, S - 51])
    segment_BxS[1, :100] = np.repeat([1, 2], [37, 63])
    return jnp.array(segment_BxS)


def inputs():
    q, k, v = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, S, n, D)) for key, n in ((q, H), (k, KV), (v, KV)))


def plain(q, k, v, packed):
    return layers.attention(q, [], layers.Keys(layers.KV.of(k, v), packed.dense(B, S)))


KERNELS = {
    "xla": functools.partial(backends.library_attention, kernel="xla"),
    "splash": functools.partial(backends.splash_attention, interpret=True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients_are_those_of_the_plain_code(name):
    weight = jax.random.normal(jax.random.key(1), (B, S, H, D))
    packed = Packed(segments())

    def loss(attend, q, k, v):
        out = attend(q, k, v, packed)
        return (out * weight).sum(), out

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))(*inputs())
        for attend in (plain, KERNELS[name])
    ]
    for found, wanted in zip(jax.tree.leaves(both[1]), jax.tree.leaves(both[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5 * max(1.0, float(jnp.abs(wanted).max())))


def test_a_row_of_one_segment_is_causal():
    found = KERNELS["xla"](*inputs(), Packed())
    np.testing.assert_allclose(found, plain(*inputs(), Packed()), rtol=0, atol=1e-5)
    ones = Packed(jnp.ones((B, S), jnp.int32))
    np.testing.assert_array_equal(ones.dense(B, S), Packed().dense(B, S))


def test_the_mask_is_that_of_packed_rows():
    """Written out: a token sees itself and what came before in its own segment."""
    segment = np.array(segments())
    wanted = [[[j <= i and row[i] == row[j] for j in range(S)] for i in range(S)] for row in segment]
    np.testing.assert_array_equal(Packed(jnp.array(segment)).dense(B, S), wanted)


def forward(backend, packed, S=S):
    """Hidden states and new keys of a small target, whose program is traced for this backend."""
    params = transformer.init(jax.random.key(2), CONFIG, scale=0.2)
    tokens = jax.random.randint(jax.random.key(3), (B, S), 0, 50)
    position = jnp.broadcast_to(jnp.arange(S), (B, S))
    with backends.use(backend):
        run = jax.jit(lambda params: transformer.forward(params, CONFIG, tokens, position, packed))
        out = run(params)
        return out, str(jax.make_jaxpr(run)(params))


def test_a_target_reads_packed_rows_with_splash_attention():
    found, program = forward(backends.INTERPRETED, Packed(segments()))
    wanted, reference = forward(backends.PLAIN, Packed(segments()))
    assert "splash" in program and "splash" not in reference
    assert f"f32[{B},{CONFIG.num_kv_heads},2,{S},{S}]" not in program  # no scores of whole rows
    np.testing.assert_allclose(found.hidden_BxSxD, wanted.hidden_BxSxD, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.kv[0].k_BxKvxdxL, wanted.kv[0].k_BxKvxdxL, rtol=0, atol=1e-4)


def test_rows_that_no_kernel_takes_are_read_by_the_plain_code():
    """Rows whose length is no multiple of a tile."""
    _, program = forward(backends.INTERPRETED, Packed(), S=96)
    assert "splash" not in program


@pytest.mark.parametrize(
    ("backend", "size", "head_dim", "dtype", "wanted"),
    [
        (backends.PLAIN, 128, 128, "bfloat16", False),
        (backends.SPLASH, 2048, 128, "bfloat16", True),
        (backends.SPLASH, 2000, 128, "bfloat16", False),
        (backends.CUDNN, 2048, 128, "bfloat16", True),
        (backends.CUDNN, 2000, 128, "bfloat16", False),
        (backends.CUDNN, 2048, 128, "float32", False),
        (backends.CUDNN, 2048, 256, "bfloat16", False),
        (backends.CUDNN, 2048, 60, "bfloat16", False),
    ],
)
def test_which_kernel_takes_what(backend, size, head_dim, dtype, wanted):
    with backends.use(backend):
        assert backends.eligible(size, head_dim, jnp.dtype(dtype)) == wanted
    assert backends.current() == backends.PLAIN  # on a CPU
