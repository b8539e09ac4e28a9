"""The drafter against golden values of an independent EAGLE-3 in torch, and what masks must keep out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import models

from ppow_jax.models import drafter as drafting
from ppow_jax.models import layers, transformer
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.drafter_config import parameter_shapes

GOLDEN = np.load(Path(__file__).parent / "golden" / "drafter.npz")
VARIANTS = sorted(models.DRAFTERS)


@functools.cache
def make(name: str) -> Drafter:
    config = models.DRAFTERS[name]
    ids_W = jnp.arange(config.draft_vocab_size) * 2
    return Drafter(config, jax.tree.map(jnp.asarray, models.drafter_params(config)), ids_W)


@functools.cache
def inputs(name: str = "00") -> tuple[jax.Array, jax.Array]:
    values = models.drafter_inputs(models.DRAFTERS[name])
    return jnp.asarray(values["features_BxTxF"]), jnp.asarray(values["embed_SxBxTxE"])


def roll(drafter: Drafter, features_BxTxF, embed_SxBxTxE, **how):
    """`windows`, compiled."""
    return jax.jit(lambda *x: windows(*x, **how))(drafter, features_BxTxF, embed_SxBxTxE)


def windows(drafter: Drafter, features_BxTxF, embed_SxBxTxE, anchors=None, mask_BxMxT=None, split=None):
    """Outputs [S, B, M, E] of windows at the anchors (all indices by default), the prefix in one or two blocks."""
    B, T = features_BxTxF.shape[:2]
    anchors = np.arange(T) if anchors is None else np.asarray(anchors)
    g_BxTxE = drafting.fuse(drafter, features_BxTxF)
    position_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask_BxMxT = np.arange(T) <= anchors[:, None] if mask_BxMxT is None else mask_BxMxT
    mask_BxMxT = jnp.broadcast_to(mask_BxMxT, (B, len(anchors), T))
    prefix: list[Prefix] = []
    for block in (slice(0, T),) if split is None else (slice(0, split), slice(split, T)):
        seen = [Prefix(c.kv, jnp.ones((B, T - split, split), bool)) for c in prefix]
        own = transformer.causal_mask(B, len(range(T)[block]))
        g, embed, position = g_BxTxE[:, block], embed_SxBxTxE[0, :, block], position_BxT[:, block]
        kv = drafting.prefix_keys(drafter, g, embed, position, own, seen)
        prefix.append(Prefix(kv, mask_BxMxT[..., block]))
    g, chain, outs = g_BxTxE[:, anchors], (), []
    for s, embed_BxTxE in enumerate(embed_SxBxTxE):
        position = position_BxT[:, anchors] + s
        out, chain = drafting.step(drafter, g, embed_BxTxE[:, anchors], position, prefix, chain, first=s == 0)
        g = drafting.feed(drafter, out)
        outs.append(out)
    return jnp.stack(outs)


@pytest.mark.parametrize(("name", "query_block"), [*((name, 128) for name in VARIANTS), ("00", 3), ("everything", 3)])
def test_every_tensor_of_three_steps_equals_torch(monkeypatch, name, query_block):
    monkeypatch.setattr(layers, "QUERY_BLOCK", query_block)
    drafter, (features, embed) = make(name), inputs(name)
    np.testing.assert_allclose(drafting.fuse(drafter, features), GOLDEN[f"{name}.g"], rtol=0, atol=1e-4)
    out = roll(drafter, features, embed)
    np.testing.assert_allclose(out, GOLDEN[f"{name}.out"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(drafting.logits(drafter, out), GOLDEN[f"{name}.logits"], rtol=0, atol=1e-4)


def test_variants_differ():
    outs = [GOLDEN[f"{name}.out"] for name in VARIANTS]  # the inputs of the first ones are the same
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(outs) for b in outs[:i])


def test_few_anchors_give_what_all_of_them_give():
    drafter, (features, embed) = make("00"), inputs()
    some = roll(drafter, features, embed, anchors=[4, 1])
    np.testing.assert_allclose(some, roll(drafter, features, embed)[:, :, [4, 1]], atol=1e-5)


@pytest.mark.parametrize("name", ["11", "everything"])
def test_a_prefix_in_two_blocks_is_one_prefix(name):
    drafter, (features, embed) = make(name), inputs(name)
    np.testing.assert_allclose(roll(drafter, features, embed, split=3), roll(drafter, features, embed), atol=1e-5)


def test_masked_indices_change_nothing():
    drafter, (features, embed) = make("10"), inputs()
    anchors = np.array([3, 5])
    changed = features.at[:, 4].set(100.0), embed.at[0, :, 4].set(-100.0)  # index 4 is nobody's to see
    mask = (np.arange(7) <= anchors[:, None]) & (np.arange(7) != 4)
    outs = [roll(drafter, *x, anchors=anchors, mask_BxMxT=mask) for x in ((features, embed), changed)]
    np.testing.assert_array_equal(*outs)


def test_a_window_depends_on_its_past_and_its_own_steps_alone():
    drafter, (features, embed) = make("00"), inputs()

    def output(features, embed, s):
        return jnp.sum(windows(drafter, features, embed, [3])[s, 0, 0] ** 3)

    gradient = jax.jit(jax.grad(output, (0, 1)))
    for s in range(models.DRAFT_STEPS):
        by_feature, by_embed = map(np.asarray, gradient(features, embed, s))
        feature_T, embed_SxT = np.abs(by_feature[0]).max(-1), np.abs(by_embed[:, 0]).max(-1)
        assert (feature_T[:4] > 0).all() and (feature_T[4:] == 0).all()
        assert (embed_SxT[0, :4] > 0).all() and (embed_SxT[0, 4:] == 0).all()
        expected = (np.arange(1, models.DRAFT_STEPS)[:, None] <= s) & (np.arange(7) == 3)
        np.testing.assert_array_equal(embed_SxT[1:] > 0, expected)
        assert not by_feature[1].any() and not by_embed[:, 1].any()  # nor on another row


def test_mixed_precision_comes_close_in_values_and_gradients():
    drafter, (features, embed) = make("00"), inputs()

    def loss(params, compute_dtype):
        changed = drafter.replace(params=params, compute_dtype=compute_dtype)
        return jnp.mean(jax.nn.logsumexp(drafting.logits(changed, windows(changed, features, embed)), -1))

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(drafter.params, "bfloat16")
    value32, gradient32 = jax.jit(jax.value_and_grad(loss), static_argnums=1)(drafter.params, None)
    np.testing.assert_allclose(value, value32, rtol=0.02)
    norm, error = (np.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(t))) for t in (
        gradient32, jax.tree.map(jnp.subtract, gradient, gradient32)))  # fmt: skip
    assert error < 0.05 * norm


def test_what_is_computed_again_is_not_kept_and_changes_no_gradient():
    drafter, (features, embed) = make("00"), inputs()

    def loss(params, remat):
        changed = drafter.replace(params=params, remat=remat)
        return jnp.mean(windows(changed, features, embed) ** 2)

    def kept(remat):
        shapes = jax.eval_shape(lambda p: jax.vjp(functools.partial(loss, remat=remat), p)[1], drafter.params)
        return sum(x.size for x in jax.tree.leaves(shapes))

    assert kept("full") < kept("dots") < kept("none")
    gradients = jax.jit(lambda p: [jax.grad(loss)(p, remat) for remat in drafting.REMAT])(drafter.params)
    for gradient in gradients[1:]:
        for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_random_parameters_have_the_described_shapes():
    for config in models.DRAFTERS.values():
        shapes = jax.eval_shape(lambda config=config: drafting.init(jax.random.key(0), config))
        assert {k: v.shape for k, v in shapes.items()} == parameter_shapes(config)


def test_an_embedding_of_the_drafters_own_comes_before_the_targets():
    drafter, tokens = make("narrow"), jnp.array([[3, 0]])
    theirs, own = jnp.ones((30, 24)), jnp.arange(30 * 16.0).reshape(30, 16)
    np.testing.assert_array_equal(drafter.embed(theirs, tokens), theirs[tokens])
    np.testing.assert_array_equal(drafter.replace(embed_VxE=own).embed(theirs, tokens), own[tokens])
