"""Mixture of experts against every token and expert on its own, in parts, and how many experts are touched."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.evaluation import measure
from ppow_jax.evaluation.benchmarks import Benchmark, Prompt
from ppow_jax.inference.costs import Costs
from ppow_jax.mesh_shape import AXES
from ppow_jax.models import experts as module
from ppow_jax.models import transformer
from ppow_jax.models.experts import Routes, mixture, route
from ppow_jax.models.families import Experts
from ppow_jax.speculation.settings import chain
from ppow_jax.speculation.touched import unique_experts
from ppow_jax.training import initialise
from ppow_jax.weights import tiny
from ppow_jax.weights.targets import Target

D, I = 12, 7


def layer(E: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(E)
    shapes = {"router": (E, D), "gate_proj": (E, I, D), "up_proj": (E, I, D), "down_proj": (E, D, I)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def one_by_one(params: dict, x_MxD: np.ndarray, routes: Routes) -> np.ndarray:
    out_MxD = np.zeros(x_MxD.shape)
    for (m, i), e in np.ndenumerate(np.asarray(routes.expert_MxX)):
        gate, up = params["gate_proj"][e].astype(np.float64) @ x_MxD[m], params["up_proj"][e] @ x_MxD[m]
        out_MxD[m] += float(routes.weight_MxX[m, i]) * (params["down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out_MxD


@pytest.mark.parametrize(("M", "E", "X"), [(5, 6, 2), (200, 8, 3), (1, 4, 1), (40, 64, 8), (3, 2, 2)])
def test_every_token_gets_all_of_its_experts(monkeypatch, M, E, X):
    monkeypatch.setattr(module, "BLOCK", 32)  # so that one expert has several blocks
    params, x_MxD = layer(E), np.random.default_rng(M).normal(size=(M, D)).astype(np.float32)
    routes = route(jnp.asarray(x_MxD), params["router"], Experts(E, X, I, True, (0,)))
    expected = one_by_one(params, x_MxD, routes)
    mix = jax.jit(mixture)
    np.testing.assert_allclose(mix(params, x_MxD, routes), expected, rtol=1e-4, atol=1e-4)
    parts = [(0, E // 2), (E // 2, E)]  # as devices that hold a part of the experts would: their sum is all
    sums = [mix({name: w[a:b] for name, w in params.items()}, x_MxD, routes, a) for a, b in parts]
    np.testing.assert_allclose(sums[0] + sums[1], expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_may_choose_one_expert():
    params, x_MxD = layer(4), np.random.default_rng(0).normal(size=(300, D)).astype(np.float32)
    routes = Routes(jnp.full((300, 1), 2), jnp.ones((300, 1)))
    np.testing.assert_allclose(jax.jit(mixture)(params, x_MxD, routes), one_by_one(params, x_MxD, routes), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_devices_send_their_share_of_a_mixture_in_the_dtype_of_the_activations(dtype):
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    params = {name: jnp.zeros(w.shape, dtype) for name, w in layer(4).items()}
    routes = Routes(jnp.zeros((6, 2), jnp.int32), jnp.ones((6, 2)))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(lambda x: module.spread_mixture(params, x, routes))(jnp.zeros((6, D), dtype))
    sums = re.findall(r"(\w+)\[6,12\] = psum", str(traced))
    assert sums == [{"float32": "f32", "bfloat16": "bf16"}[dtype]]


def test_routes_are_the_best_of_a_softmax_over_all():
    x_MxD, router_ExD = np.random.default_rng(0).normal(size=(9, D)), np.random.default_rng(1).normal(size=(6, D))
    z_MxE = x_MxD @ router_ExD.T
    share_MxE = np.exp(z_MxE) / np.exp(z_MxE).sum(-1, keepdims=True)
    best_Mx2 = np.argsort(-share_MxE)[:, :2]
    weight_Mx2 = np.take_along_axis(share_MxE, best_Mx2, 1)
    x, router = jnp.asarray(x_MxD, jnp.float32), jnp.asarray(router_ExD, jnp.float32)
    for normalize in (False, True):
        expert, weight = route(x, router, Experts(6, 2, I, normalize, (0,)))
        np.testing.assert_array_equal(expert, best_Mx2)
        expected = weight_Mx2 / weight_Mx2.sum(-1, keepdims=True) if normalize else weight_Mx2
        np.testing.assert_allclose(weight, expected, rtol=1e-4)
    half = route(x.astype(jnp.bfloat16), router.astype(jnp.bfloat16), Experts(6, 2, I, True, (0,)))
    assert half.weight_MxX.dtype == jnp.float32


def test_a_token_does_not_depend_on_its_neighbours():
    params, x_MxD = layer(6), np.random.default_rng(3).normal(size=(10, D)).astype(np.float32)
    routes = route(jnp.asarray(x_MxD), params["router"], Experts(6, 2, I, True, (0,)))
    mix = jax.jit(mixture)
    others = x_MxD.copy()
    others[1:] *= -3
    moved = Routes(routes.expert_MxX.at[1:].set(0), routes.weight_MxX)
    np.testing.assert_array_equal(mix(params, x_MxD, routes)[0], mix(params, others, moved)[0])


def test_unique_experts_by_hand():
    one = jnp.array([[[0, 1], [1, 2]], [[3, 3], [3, 3]]])  # row 0: {0, 1, 2}; row 1: {3}
    other = jnp.array([[[5, 4], [5, 4]], [[0, 1], [2, 3]]])  # {4, 5}; {0, 1, 2, 3}
    np.testing.assert_array_equal(unique_experts([one, other], 6), [2.5, 2.5])
    np.testing.assert_array_equal(unique_experts([one], 6), [3, 1])


@pytest.mark.full
def test_the_evaluation_reports_unique_experts(monkeypatch):
    monkeypatch.setattr(measure, "measure_costs", lambda *_, **__: Costs(1.0, 1.0, 1.0, 2))  # not what is tested
    experts = Experts(6, 2, 16, True, (1,))
    config = dataclasses.replace(tiny.CONFIG, architecture="Qwen3MoeForCausalLM", num_layers=2, experts=experts)
    target = Target("experts", config, transformer.init(jax.random.key(0), config, scale=0.2), tiny.tokenizer())
    drafter = initialise.from_target(
        jax.random.key(1), initialise.drafter_config(config, 64, (0, 1, 2), False), target.params, np.arange(64)
    )
    prompts = Benchmark("mine", (Prompt(("Hi",), "a:1"), Prompt(("Why?",), "a:2")))
    (row,) = measure.evaluate(target, drafter, [prompts], speculations=[chain(2)], max_new_tokens=8)
    assert row["identical"] == 2 and 2 < row["unique_experts"] <= 6
