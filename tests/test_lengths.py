"""Length buckets, and the number of programs that an evaluation compiles."""

import numpy as np
import pytest
import small_model

from ppow_jax.inference import batch, decoding
from ppow_jax.models import attention_backends
from ppow_jax.speculation import generate
from ppow_jax.speculation.settings import off


@pytest.mark.parametrize(
    ("few", "lengths", "buckets"),
    [
        (False, (1, 64, 65, 300, 513), (64, 64, 128, 384, 768)),
        (True, (1, 64, 512, 513, 1024, 1025, 2048), (512, 512, 512, 1024, 1024, 2048, 2048)),
    ],
)
def test_buckets(monkeypatch, few, lengths, buckets):
    monkeypatch.setattr(batch, "few_lengths", lambda: few)
    assert tuple(map(batch.bucket, lengths)) == buckets


def test_three_cache_lengths_serve_prompts_of_up_to_2048_tokens(monkeypatch):
    monkeypatch.setattr(batch, "few_lengths", lambda: True)
    how = decoding.Decoding(small_model.MODES["chain"], max_new_tokens=100)
    assert {how.cache_length(length) for length in range(1, 2049)} == {512 + 103, 1024 + 103, 2048 + 103}


def test_caches_end_with_a_tile_where_an_accelerators_kernels_are_used():
    wanted = ((512, 512, 6), (1000, 20, 3))
    assert [generate.cache_length(*sizes) for sizes in wanted] == [1031, 1024]
    with attention_backends.use(attention_backends.SPLASH):
        assert [generate.cache_length(*sizes) for sizes in wanted] == [1152, 1024]


def test_a_mode_compiles_two_programs_for_prompts_of_many_lengths(monkeypatch):
    """One that reads prompts, one that decodes: counted over the prompts of four imagined benchmarks."""
    monkeypatch.setattr(batch, "few_lengths", lambda: True)
    model = small_model.model()
    rng = np.random.default_rng(0)
    benchmarks = [[rng.integers(97, 101, n).astype(np.int32) for n in (low, low + 40)] for low in (5, 70, 150, 300)]
    for mode in (off(), small_model.MODES["chain"]):
        before = generate.prefill._cache_size(), generate.decode._cache_size()
        how = decoding.Decoding(mode if mode.window else small_model.MODES["chain"], max_new_tokens=3, batch_size=2)
        for prompts in benchmarks:
            decoding.decode(model.target, model.drafter if mode.window else None, prompts, how, ids=(0, 1))
        after = generate.prefill._cache_size(), generate.decode._cache_size()
        assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
