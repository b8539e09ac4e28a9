"""On a CPU a token gets the same bits in bfloat16 however it is decoded: alone, in a window, on a path of a tree.

So speculative decoding gives the tokens of plain decoding in bfloat16 too, where otherwise rounding decides between
close logits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world
import suites
from golden import models
from twelve_tokens import FREE, cost_table_of

from ppow_jax.cpu import library
from ppow_jax.models import cache, stack, transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import adaptive_tree, chain, off, tree
from ppow_jax.training import initialise

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")

CONFIG = dataclasses.replace(
    world.CONFIG, vocab_size=300, hidden_size=72, intermediate_size=200, head_dim=24, num_heads=6, eos_token_ids=(299,)
)
B, T, L = 3, 9, 160  # T tokens after a cache of LENGTHS tokens
LENGTHS = np.array([5, 130, 64])


def _bfloat16(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 2 else x, params)


PARAMS = _bfloat16(transformer.init(jax.random.key(3), CONFIG, scale=0.4))
TOKENS = np.random.default_rng(0).integers(0, 299, (B, L))


def _forward(tokens_BxS, position_BxS, mask, kv, length_B):
    seen = cache.visible(L, length_B, tokens_BxS.shape[1])
    context = transformer.Context(kv, seen)
    out = transformer.forward(PARAMS, CONFIG, tokens_BxS, position_BxS, mask, [context], (0, 1, 3))
    return out, transformer.logits(PARAMS, out.hidden_BxSxD)


@jax.jit
def _window(tokens_BxS, position_BxS, mask, kv, length_B):
    out, logits = _forward(tokens_BxS, position_BxS, mask, kv, length_B)
    return out.features_BxSxF, logits


@jax.jit
def _prefilled():
    """Caches with the tokens before each row's window."""
    kv = stack.like(PARAMS["layers"], cache.empty(B, CONFIG.num_kv_heads, L, CONFIG.head_dim))
    position_BxS = jnp.broadcast_to(jnp.arange(L), (B, L))
    out, _ = _forward(TOKENS, position_BxS, transformer.causal_mask(B, L), kv, jnp.zeros(B, int))
    return out.kv


@jax.jit
def _one_by_one(tokens_BxT, kv):
    """Features and logits [B, T, .] of the tokens, each decoded alone and then written to the cache."""

    def step(carry, token_B):
        kv, length_B = carry
        out, logits = _forward(token_B[:, None], length_B[:, None], jnp.ones((B, 1, 1), bool), kv, length_B)
        kv = tuple(cache.write(old, new, length_B) for old, new in zip(kv, out.kv, strict=True))
        return (kv, length_B + 1), (out.features_BxSxF[:, 0], logits[:, 0])

    _, (features, logits) = jax.lax.scan(step, (kv, jnp.asarray(LENGTHS)), tokens_BxT.T)
    return features.swapaxes(0, 1), logits.swapaxes(0, 1)


def test_a_window_has_the_bits_of_its_tokens_one_by_one():
    tokens_BxT = np.random.default_rng(1).integers(0, 299, (B, T))
    alone = _one_by_one(jnp.asarray(tokens_BxT), _prefilled())
    position = LENGTHS[:, None] + np.arange(T)
    window = _window(tokens_BxT, position, transformer.causal_mask(B, T), _prefilled(), LENGTHS)
    for mine, theirs in zip(window, alone, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_path_of_a_tree_has_the_bits_of_its_tokens_one_by_one():
    """Every second index lies on the path; the others are siblings that it does not see."""
    rng = np.random.default_rng(2)
    path = np.arange(0, 2 * T, 2)
    tokens = rng.integers(0, 299, (B, 2 * T))
    depth = np.repeat(np.arange(T), 2)
    parent_on_path = 2 * (depth - 1)
    seen = np.zeros((2 * T, 2 * T), bool)
    for i in range(2 * T):
        seen[i, i] = True
        if depth[i]:
            seen[i] |= seen[parent_on_path[i]]
    alone = _one_by_one(jnp.asarray(tokens[:, path]), _prefilled())
    mask = np.broadcast_to(seen, (B, *seen.shape))
    window = _window(tokens, LENGTHS[:, None] + depth, mask, _prefilled(), LENGTHS)
    for mine, theirs in zip(window, alone, strict=True):
        np.testing.assert_array_equal(mine[:, path], theirs)


def _answers(drafter: Drafter | None, speculation):
    rng = np.random.default_rng(4)
    n, P, new = 24, 12, 60
    length = rng.integers(1, P + 1, n)
    prompt = rng.integers(0, 299, (n, P)) * (np.arange(P) < length[:, None])
    K = speculation.window
    state = generate.prefill(
        PARAMS, CONFIG, drafter, prompt, length, length + new, jax.random.split(jax.random.key(0), n),
        K=K, sampling=Sampling.of(0.0), L=generate.cache_length(P, new, K),
    )  # fmt: skip
    cost_table = cost_table_of(FREE, speculation) if speculation.adaptive else None
    state = generate.decode(
        PARAMS,
        CONFIG,
        drafter,
        state,
        10_000,
        speculation=speculation,
        sampling=Sampling.of(0.0),
        cost_table=cost_table,
    )
    rows = zip(np.asarray(state.tokens_BxL), length, np.asarray(state.length_B), strict=True)
    return [tokens[start:stop].tolist() for tokens, start, stop in rows], np.asarray(state.histogram_BxK1).sum(0)


WAYS = [chain(4), tree(3, 4, 12), adaptive_tree(3, 4, 12)]


@pytest.mark.parametrize("way", suites.keep(WAYS[1:2], WAYS), ids=["chain", "tree", "adaptive"])
def test_bfloat16_answers_are_those_of_plain_decoding(way):
    config = initialise.drafter_config(CONFIG, 60, (0, 1, 3))
    params = jax.tree.map(jnp.asarray, models.drafter_params(config, 1))
    made = Drafter(config, _bfloat16(params), jnp.arange(60) * 5)
    found, histogram = _answers(made, way)
    assert found == _answers(None, off())[0]
    assert histogram[1:].sum() > 0  # drafts were accepted
