"""The target against golden values of transformers and torch, its cache, and what masks must keep out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import models

from ppow_jax.models import layers, transformer
from ppow_jax.models.layers import rms_norm
from ppow_jax.models.transformer import Context, causal_mask
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import off

GOLDEN = np.load(Path(__file__).parent / "golden" / "llama.npz")
NAMES = sorted(models.TARGETS)


@functools.cache
def target(name: str):
    config = models.TARGETS[name]
    return config, jax.tree.map(jnp.asarray, models.target_params(config))


def run(name, tokens_BxS, features=(), contexts=(), start=0, mask=None):
    config, params = target(name)
    B, S = tokens_BxS.shape
    position_BxS = np.broadcast_to(start + np.arange(S), (B, S))
    mask = causal_mask(B, S) if mask is None else mask
    forward = jax.jit(functools.partial(transformer.forward, feature_layers=features), static_argnums=1)
    return forward(params, config, tokens_BxS, position_BxS, mask, contexts)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_equal_transformers(name):
    layer_ids = models.FEATURE_LAYERS[name]
    out = run(name, GOLDEN[f"{name}.tokens"], layer_ids)
    logits = transformer.logits(target(name)[1], out.hidden_BxSxD)
    np.testing.assert_allclose(logits, GOLDEN[f"{name}.logits"], rtol=0, atol=1e-4)
    for i, feature in zip(layer_ids, np.split(np.asarray(out.features_BxSxF), len(layer_ids), -1), strict=True):
        np.testing.assert_allclose(feature, GOLDEN[f"{name}.hidden{i}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_last_feature_is_the_output_before_the_norm(name):
    config, params = target(name)
    out = run(name, GOLDEN[f"{name}.tokens"], (config.num_layers,))
    normed = rms_norm(out.features_BxSxF, params["norm"], config.rms_norm_eps)
    np.testing.assert_allclose(normed, out.hidden_BxSxD, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_transformers(name):
    config, params = target(name)
    prompts, n = models.prompts(config), models.NEW_TOKENS
    P, length_B = max(map(len, prompts)), np.array([len(p) for p in prompts], np.int32)
    prompt_BxP = np.array([np.r_[p, np.zeros(P - len(p), int)] for p in prompts], np.int32)
    keys, L = jax.random.split(jax.random.key(0), len(prompts)), generate.cache_length(P, n, 0)
    state = generate.prefill(
        params, config, None, prompt_BxP, length_B, length_B + n, keys, K=0, sampling=Sampling(), L=L
    )
    state = generate.decode(params, config, None, state, n, speculation=off(), sampling=Sampling())
    for b, tokens in enumerate(np.asarray(state.tokens_BxL)):
        answer = tokens[length_B[b] : state.length_B[b]]
        assert answer.tolist() == GOLDEN[f"{name}.answer{b}"].tolist()
    assert any(len(GOLDEN[f"{name}.answer{b}"]) < n for b in range(len(prompts)))  # an end token was met


@pytest.mark.parametrize("query_block", [5, 128])
def test_continuing_from_a_cache_equals_one_pass(monkeypatch, query_block):
    monkeypatch.setattr(layers, "QUERY_BLOCK", query_block)
    jax.clear_caches()  # layers that were traced with other blocks
    tokens = GOLDEN["untied.tokens"]
    B, T = tokens.shape
    whole = run("untied", tokens, (1, 3))
    for cut in (1, T - 7) if query_block == 128 else (9,):
        first = run("untied", tokens[:, :cut])
        rest = T - cut
        context = Context(first.kv, jnp.ones((B, rest, cut), bool))
        second = run("untied", tokens[:, cut:], (1, 3), [context], start=cut)
        np.testing.assert_allclose(second.hidden_BxSxD, whole.hidden_BxSxD[:, cut:], rtol=0, atol=3e-5)
        np.testing.assert_allclose(second.features_BxSxF, whole.features_BxSxF[:, cut:], atol=1e-4)


def test_masked_positions_change_nothing():
    tokens = GOLDEN["untied.tokens"]
    B, T = tokens.shape
    mask = np.array(causal_mask(B, T))
    hidden = np.array([3, 4, 11])
    mask[:, :, hidden] = False
    mask[:, hidden, hidden] = True
    others = np.delete(np.arange(T), hidden)
    changed = tokens.copy()
    changed[:, hidden] = (changed[:, hidden] + 17) % 61
    outs = [run("untied", x, (1, 2), mask=jnp.asarray(mask)) for x in (tokens, changed)]
    for name in ("hidden_BxSxD", "features_BxSxF"):
        a, b = (getattr(out, name)[:, others] for out in outs)
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(outs[0].hidden_BxSxD, outs[1].hidden_BxSxD)


def test_context_slots_behind_the_length_change_nothing():
    tokens = GOLDEN["tied.tokens"]
    B = len(tokens)
    kv = run("tied", tokens[:, :10]).kv
    garbage = tuple(type(x)(x.k_BxKvxdxL.at[..., 6:].set(1e4), x.v_BxKvxLxd.at[:, :, 6:].set(-1e4)) for x in kv)
    mask = jnp.broadcast_to(jnp.arange(10) < 6, (B, 3, 10))
    a, b = (run("tied", tokens[:, 6:9], contexts=[Context(x, mask)], start=6) for x in (kv, garbage))
    np.testing.assert_array_equal(a.hidden_BxSxD, b.hidden_BxSxD)


def test_no_position_depends_on_a_later_one():
    """Gradients of the output at one position with respect to every token's embedding row."""
    config, params = target("untied")
    T, at = 12, 5
    tokens_1xT = jnp.arange(T)[None]  # every position its own token, so its own embedding row

    def output(embed):
        position = jnp.arange(T)[None]
        out = transformer.forward(params | {"embed": embed}, config, tokens_1xT, position, causal_mask(1, T))
        return jnp.sum(out.hidden_BxSxD[0, at] ** 3)

    reach_T = np.abs(jax.jit(jax.grad(output))(params["embed"])[:T]).max(-1)
    assert (reach_T[: at + 1] > 0).all() and (reach_T[at + 1 :] == 0).all()


def test_bfloat16_weights_come_close():
    config, params = target("untied")
    tokens = GOLDEN["untied.tokens"]
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def rounded_logits(params):
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        out = transformer.forward(rounded, config, tokens, position, causal_mask(*tokens.shape))
        return transformer.logits(rounded, out.hidden_BxSxD)

    logits = rounded_logits(params)
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - GOLDEN["untied.logits"]) / np.linalg.norm(GOLDEN["untied.logits"])
    assert 1e-4 < error < 0.05


def test_random_parameters_have_the_shapes_of_the_golden_ones():
    for config in models.TARGETS.values():
        shapes = jax.eval_shape(lambda config=config: transformer.init(jax.random.key(0), config))
        assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(np.shape, models.target_params(config))
