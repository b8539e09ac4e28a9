"""Stacked layers give what layers apart give: passes, caches, features, decoding, a step of each stage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_world

from ppow_jax.models import platforms, stack, transformer
from ppow_jax.models.families import Experts
from ppow_jax.models.stack import StackedKV
from ppow_jax.models.transformer import Context
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import chain, off, tree
from ppow_jax.speculation.state import map_leaves
from ppow_jax.training import stages
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.steps import ppow_sampled
from ppow_jax.training.steps.state import TrainState
from ppow_jax.weights import targets

CONFIG = small_world.CONFIG


@functools.cache
def stacked_params() -> dict:
    return stack.stack(small_world.target_params(), CONFIG)


def test_alike_layers_next_to_each_other_become_one_run():
    params = small_world.target_params()
    wider = dict(params["layers"][0])
    for name, axis in {"gate_proj": 0, "up_proj": 0, "down_proj": 1}.items():
        wider[name] = jnp.concatenate([wider[name]] * 2, axis)
    mixed = params | {"layers": [params["layers"][0], params["layers"][1], wider, params["layers"][2]]}
    config = dataclasses.replace(CONFIG, num_layers=4)
    stacked = stack.stack(mixed, config)
    assert [(run.begin, run.number, run.stacked) for run in stack.runs(stacked["layers"])] == [
        (0, 2, True),
        (2, 1, False),
        (3, 1, False),
    ]
    for index in (0, 1, 2, -1):
        expected = mixed["layers"][index]
        jax.tree.map(np.testing.assert_array_equal, stack.layer(stacked["layers"], index), expected)
    with pytest.raises(IndexError):
        stack.layer(stacked["layers"], 4)


@pytest.mark.parametrize("features", [(), (0, 1, 3), (1, 2, 3)])
def test_a_pass_with_a_context_is_the_same(features):
    tokens_BxS = np.random.default_rng(0).integers(0, 61, (2, 9))

    @jax.jit
    def run(params):
        read = functools.partial(transformer.forward, params, CONFIG)
        mask, position = transformer.causal_mask(2, 5), jnp.arange(9)
        first = read(tokens_BxS[:, :5], jnp.tile(position[:5], (2, 1)), mask)
        context = Context(first.kv, jnp.ones((2, 4, 5), bool))
        out = read(
            tokens_BxS[:, 5:], jnp.tile(position[5:], (2, 1)), transformer.causal_mask(2, 4), [context], features
        )
        return out

    apart, together = run(small_world.target_params()), run(stacked_params())
    assert isinstance(together.kv[0], StackedKV) and len(together.kv) == 1
    np.testing.assert_allclose(together.hidden_BxSxD, apart.hidden_BxSxD, rtol=2e-5, atol=2e-5)
    for n, kv in enumerate(apart.kv):
        for one, all_layers in zip(kv, together.kv[0], strict=True):
            np.testing.assert_allclose(all_layers[n], one, rtol=2e-5, atol=2e-5)
    if features:
        np.testing.assert_allclose(together.features_BxSxF, apart.features_BxSxF, rtol=2e-5, atol=2e-5)


def test_a_mixture_of_experts_is_read_out_of_the_stack():
    experts = Experts(number=4, per_token=2, intermediate_size=16, normalize=True, layers=(1, 2))
    config = dataclasses.replace(CONFIG, experts=experts)
    params = transformer.init(jax.random.key(3), config, scale=0.3)
    stacked = stack.stack(params, config)
    assert [run.number for run in stack.runs(stacked["layers"])] == [1, 2]
    tokens_BxS = np.random.default_rng(0).integers(0, 61, (2, 9))
    position_BxS, mask = jnp.tile(jnp.arange(9), (2, 1)), transformer.causal_mask(2, 9)
    run = jax.jit(lambda params: transformer.forward(params, config, tokens_BxS, position_BxS, mask))
    apart, together = run(params), run(stacked)
    np.testing.assert_allclose(together.hidden_BxSxD, apart.hidden_BxSxD, rtol=2e-5, atol=2e-5)
    assert len(apart.experts) == 2
    jax.tree.map(np.testing.assert_array_equal, together.experts, apart.experts)
    assert (apart.experts[0] != apart.experts[1]).any()


@pytest.mark.parametrize("speculation", [chain(3), tree(3, 2, 8)], ids=["chain", "tree"])
def test_decoding_writes_the_same_tokens(speculation):
    prompt_BxP, prompt_B = np.array([[5, 6, 7, 8], [9, 3, 0, 0]], np.int32), np.array([4, 2], np.int32)
    K, limit_B = speculation.window, prompt_B + 20
    L = generate.cache_length(4, 20, K)
    keys = jax.random.split(jax.random.key(0), 2)

    def run(params):
        drafter = small_world.drafter()
        state = generate.prefill(
            params, CONFIG, drafter, prompt_BxP, prompt_B, limit_B, keys, K=K, sampling=Sampling(), L=L
        )
        return generate.decode(
            params, CONFIG, drafter, state, 100, speculation=speculation, sampling=Sampling()
        )

    apart, together = run(small_world.target_params()), run(stacked_params())
    assert (apart.length_B > prompt_B + 3).all()
    np.testing.assert_array_equal(together.tokens_BxL, apart.tokens_BxL)
    np.testing.assert_array_equal(together.histogram_BxK1, apart.histogram_BxK1)


@pytest.mark.full
def test_a_ppow_step_has_the_same_metrics():
    """With the target's own greedy reference, which reads caches that earlier passes gave."""
    settings = dataclasses.replace(TrainSettings(), window=3, group=3, windows=2, adaw_start=0)
    rollouts = stages.rollout_settings(settings, CostModel(0.1), answers_are_greedy=False)
    optimizer, start = optax.sgd(1e-2), small_world.drafter()
    shell = start.spec

    def run(params):
        state = TrainState.create(start.params, optimizer)
        return ppow_sampled.train_step(
            state,
            shell,
            params,
            small_world.batch(),
            jax.random.key(1),
            config=CONFIG,
            optimizer=optimizer,
            rollouts=rollouts,
            policy=ppow_sampled.PolicySettings(0.2, 0.5, 1),
            answers_are_greedy=False,
        )

    (_, apart), (_, together) = run(small_world.target_params()), run(stacked_params())
    assert apart["windows"] > 0 and apart["gradient_norm"] > 0
    for name, value in apart.items():
        np.testing.assert_allclose(together[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_answers_are_written_with_stacked_layers():
    """Rows of a batch are replaced as they finish, in caches whose first axis is the layer too."""
    prompts = [np.array([5, 6, 7], np.int32), np.array([9], np.int32), np.array([8, 1], np.int32)]

    def write(params):
        state = fresh = None
        for tokens in prompts:
            rows = np.array([tokens]), np.array([len(tokens)]), np.array([len(tokens) + 4])
            fresh = generate.prefill(
                params, CONFIG, None, *map(jnp.asarray, rows), jax.random.split(jax.random.key(0), 1), K=0,
                sampling=Sampling(), L=16,
            )  # fmt: skip
            state = map_leaves(lambda x: jnp.concatenate([x] * 2), fresh) if state is None else state
            state = map_leaves(lambda old, new: old.at[jnp.array([1])].set(new), state, fresh)
        return generate.decode(params, CONFIG, None, state, 9, speculation=off(), sampling=Sampling())

    apart, together = write(small_world.target_params()), write(stacked_params())
    np.testing.assert_array_equal(together.tokens_BxL, apart.tokens_BxL)
    assert apart.length_B.tolist() == [7, 6]


def test_layers_are_scanned_except_on_a_cpu():
    target = targets.load("tiny", "float32")
    assert targets.scanned(target) is target
    with platforms.use("gpu"):
        runs = stack.runs(targets.scanned(target).params["layers"])
    assert any(run.stacked for run in runs)
    assert targets.scanned(target, scan=False) is target
