"""The initialisation of a new drafter: its vocabulary, the sizes of the features, and the target's own last layer."""

import dataclasses

import jax
import numpy as np
import pytest
import small_world as world

from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.training.initialise import choose_vocabulary, drafter_config, feature_scale, from_target


def example(answer, prompt=(9, 9, 9, 9)):
    tokens = np.array([*prompt, *answer], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), "x:1")


def test_the_vocabulary_holds_the_most_frequent_answer_tokens():
    examples = [example([5, 5, 5, 2, 2, 7]), example([7, 2, 3], prompt=(1,) * 50)]
    ids = choose_vocabulary(examples, 12, 3)
    np.testing.assert_array_equal(ids, [2, 5, 7])  # prompts (9 and 1) do not count
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(choose_vocabulary(examples, 12, 4), [2, 3, 5, 7])
    np.testing.assert_array_equal(choose_vocabulary(examples, 12, 6), [0, 1, 2, 3, 5, 7])  # unseen: lowest ids
    np.testing.assert_array_equal(choose_vocabulary(examples, 12, 12), np.arange(12))
    np.testing.assert_array_equal(choose_vocabulary([example([4, 6])], 8, 1), [4])  # a tie


def test_drafter_config():
    deep = dataclasses.replace(world.CONFIG, num_layers=30)
    config = drafter_config(deep, 40)
    assert config.feature_layers == (2, 15, 27) and not config.fc_norm and config.draft_vocab_size == 40
    assert (config.hidden_size, config.target_hidden_size, config.vocab_size) == (32, 32, 61)
    assert drafter_config(deep, 61, (0, 7, 30), fc_norm=True).feature_layers == (0, 7, 30)
    for size in (0, 62):
        with pytest.raises(UserError, match=f"--draft_vocab_size={size}: must be between 1 and .* 61"):
            drafter_config(deep, size)
    for layers in ((2, 15, 31), (2, 2, 3), (-1, 2, 3)):
        with pytest.raises(UserError, match="--feature_layers"):
            drafter_config(deep, 40, layers)
    with pytest.raises(UserError):
        drafter_config(world.CONFIG, 40)  # three layers: the default ids do not fit


def test_feature_scale_is_the_typical_size_not_that_of_the_first_token():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(200, 64)) * s for s in (0.5, 4.0, 30.0)], 1)
    features[::50] *= 1000  # the first token of a text
    np.testing.assert_allclose(feature_scale(features), [0.5, 4.0, 30.0], rtol=0.1)


@pytest.mark.parametrize("fc_norm", [False, True])
def test_a_new_drafter_takes_over_the_targets_last_layer_and_head(fc_norm):
    drafter, target = world.drafter(fc_norm), world.target_params()
    shapes = jax.eval_shape(lambda key: drafting.init(key, drafter.config), jax.random.key(0))
    assert {n: x.shape for n, x in drafter.params.items()} == {n: x.shape for n, x in shapes.items()}
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in drafter.params.values())
    last, ids_W = target["layers"][-1], np.asarray(drafter.target_ids_W)
    assert (np.diff(ids_W) > 0).all()
    np.testing.assert_array_equal(drafter.params["lm_head"], target["lm_head"][ids_W])
    np.testing.assert_array_equal(drafter.params["norm"], target["norm"])
    np.testing.assert_array_equal(drafter.params["q_proj"][:, 32:], last["q_proj"])
    np.testing.assert_array_equal(drafter.params["gate_proj"], last["gate_proj"])
    assert ("fc_norm" in drafter.params) == fc_norm


def test_it_starts_better_than_chance():
    """Its first proposal hits the target's choice far more often than one of W tokens at random would."""
    from ppow_jax.training.steps import supervised

    def tau(drafter):
        measured = supervised.evaluate(
            drafter, world.target_params(), [(world.batch(), None)], config=world.CONFIG, K=2, answers_are_greedy=True
        )
        return measured["held_out_tau_sim"]

    random = world.drafter().replace(params=drafting.init(jax.random.key(0), world.drafter().config, 0.2))
    ours, theirs = tau(world.drafter()), tau(random)
    assert ours > theirs and ours > 1.1


def test_drafters_of_other_sizes_keep_random_values_where_shapes_do_not_fit():
    config = dataclasses.replace(world.drafter().config, intermediate_size=40, num_kv_heads=4)
    drafter = from_target(jax.random.key(0), config, world.target_params(), np.arange(20, dtype=np.int32))
    shapes = jax.eval_shape(lambda key: drafting.init(key, config), jax.random.key(0))
    assert {n: x.shape for n, x in drafter.params.items()} == {n: x.shape for n, x in shapes.items()}
    last = world.target_params()["layers"][-1]
    np.testing.assert_array_equal(drafter.params["q_proj"][:, 32:], last["q_proj"])
    assert drafter.params["k_proj"].shape[0] != last["k_proj"].shape[0]
    wide = dataclasses.replace(config, hidden_size=48, head_dim=12)
    assert from_target(jax.random.key(0), wide, world.target_params(), np.arange(20, dtype=np.int32)).params[
        "fc"
    ].shape == (48, 96)


def test_queries_without_norms_are_as_large_as_the_target_s_with_them():
    config = dataclasses.replace(world.CONFIG, qk_norm=True, head_dim=8)
    rng, D = np.random.default_rng(0), config.hidden_size
    layer = {name: np.ones(shape, np.float32) for name, shape in transformer.shapes(config)["layers"][0].items()}
    for name in ("q_proj", "k_proj"):
        size_O = rng.uniform(0.1, 9, len(layer[name]) // 8).repeat(8)  # heads of different sizes
        layer[name] = (rng.normal(size=layer[name].shape) * size_O[:, None]).astype(np.float32)
        layer[name.replace("proj", "norm")] = rng.uniform(0.5, 3, 8).astype(np.float32)
    params = world.target_params() | {"layers": [layer]}
    drafter = from_target(jax.random.key(0), drafter_config(config, 20, world.FEATURE_LAYERS), params, np.arange(20))
    h_NxD = rng.normal(size=(50, D)).astype(np.float32)
    for name in ("q_proj", "k_proj"):
        heads_NxHxd = (h_NxD @ layer[name].T).reshape(50, -1, 8)
        normed = heads_NxHxd / np.sqrt((heads_NxHxd**2).mean(-1, keepdims=True)) * layer[name.replace("proj", "norm")]
        ours = (h_NxD @ np.asarray(drafter.params[name][:, D:]).T).reshape(50, -1, 8)
        np.testing.assert_allclose((ours**2).mean((0, 2)), (normed**2).mean((0, 2)), rtol=0.35)
