"""Layers stacked into one array per parameter, so that a program holds the code of one layer, whatever the depth.

Compilation takes minutes for eighty unrolled layers, on any device, and seconds for a scan over one. On a CPU the
layers stay separate: there `lax.scan` copies the bfloat16 weights of each layer before it uses them,
which makes a pass five times slower.

A model's `layers` are a list of *runs*: a layer's parameters, or {"stacked": the parameters of N equal layers, stacked
along their first axis}. Keys and values have the same form, one `KV` or `StackedKV` per run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.layers import KV

Array = jax.Array
STACKED = "stacked"


class StackedKV(NamedTuple):
    """Keys and values of N layers; see `KV`."""

    k_NxBxKvxdxL: Array
    v_NxBxKvxLxd: Array


class Run(NamedTuple):
    """begin: index of its first layer. number: of layers. params: of the layer, or stacked where `stacked`."""

    begin: int
    number: int
    params: dict[str, Any]
    stacked: bool


def runs(layers: Sequence[dict[str, Any]]) -> Iterator[Run]:
    """Iterates over a model's runs of layers, in order."""
    begin = 0
    for params in layers:
        stacked = STACKED in params
        number = params[STACKED]["input_norm"].shape[0] if stacked else 1
        yield Run(begin, number, params[STACKED] if stacked else params, stacked)
        begin += number


def layer(layers: Sequence[dict[str, Any]], index: int) -> dict[str, Any]:
    """The parameters of one layer; negative indices count from the end."""
    apart = [(run, n) for run in runs(layers) for n in range(run.number)]
    run, n = apart[index]
    return {name: x[n] for name, x in run.params.items()} if run.stacked else run.params


def stack(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Stacks the layers of a parameter tree, one run per sequence of adjacent layers of the same kind.

    Works on arrays and, under `jax.eval_shape`, on shapes.
    """
    kinds: list[list[dict[str, Any]]] = []
    before: Any = None
    for n, one in enumerate(params["layers"]):
        kind = {name: x.shape for name, x in one.items()}, config.window(n)
        if kind != before:
            kinds.append([])
        kinds[-1].append(one)
        before = kind
    stacked = [
        {STACKED: jax.tree.map(lambda *x: jnp.stack(x), *kind)} if len(kind) > 1 else kind[0] for kind in kinds
    ]
    return params | {"layers": stacked}


def each_layer(function: Callable[..., KV], *kv: Sequence[KV | StackedKV]) -> tuple[KV | StackedKV, ...]:
    """Applies function(KV, ...) to every layer; several sequences of runs are mapped in parallel."""

    def of_run(*run: KV | StackedKV) -> KV | StackedKV:
        if isinstance(run[0], KV):
            return function(*run)
        return StackedKV(*jax.vmap(function)(*(KV(*stacked) for stacked in run)))

    return tuple(of_run(*run) for run in zip(*kv, strict=True))


def like(layers: Sequence[dict[str, Any]], kv: KV) -> tuple[KV | StackedKV, ...]:
    """A copy of `kv` for every layer."""
    return tuple(
        StackedKV(*(jnp.broadcast_to(x, (run.number, *x.shape)) for x in kv))
        if run.stacked
        else KV(*map(jnp.copy, kv))  # separate buffers, because they are donated
        for run in runs(layers)
    )


class Scanned(NamedTuple):
    """x_BxSxD after the last layer of a run; features: inputs of the requested layers; rest: the other outputs of the
    layers, stacked.
    """

    x_BxSxD: Array
    features: dict[int, Array]
    rest: Any


def scan(
    one: Callable[[dict[str, Any], Array, Sequence[KV]], tuple[Any, ...]],
    run: Run,
    x_BxSxD: Array,
    contexts: Iterable[KV | StackedKV],
    feature_layers: Sequence[int],
) -> Scanned:
    """Applies the layers of a stacked run, one(parameters, x_BxSxD, KVs of the contexts) -> (x_BxSxD, *rest) each.

    The input of a requested layer is stored as the loop passes it: slot f of a buffer for the f-th, a last slot for all
    others, so that the buffer is written in place and never read. Experts are not scanned over: a layer gets those of
    all layers, and its `number` in the stack, and slices the few that it needs (`models.experts`); a scan would first
    copy all of a layer's.
    """
    experts = {name: x for name, x in run.params.items() if x.ndim > 3}
    scanned = {name: x for name, x in run.params.items() if name not in experts}
    wanted = [n for n in feature_layers if run.begin <= n < run.begin + run.number]
    inside = range(run.begin, run.begin + run.number)
    slot_N = jnp.array([wanted.index(n) if n in wanted else len(wanted) for n in inside])

    def body(carry: Any, layer_slot: Any) -> tuple[Any, list[Any]]:
        x_BxSxD, kept = carry
        params, kv, slot, number = layer_slot
        params |= experts | ({"number": number} if experts else {})
        if wanted:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x_BxSxD, slot, 0)
        x_BxSxD, *rest = one(params, x_BxSxD, [KV(*layer_kv) for layer_kv in kv])
        return (x_BxSxD, kept), rest

    kept = jnp.zeros((len(wanted) + 1, *x_BxSxD.shape), x_BxSxD.dtype) if wanted else None
    layers = scanned, list(contexts), slot_N, jnp.arange(run.number)
    with jax.named_scope(f"layers_{run.begin}_to_{run.begin + run.number - 1}"):
        (x_BxSxD, kept), rest = jax.lax.scan(body, (x_BxSxD, kept), layers)
    return Scanned(x_BxSxD, {n: kept[f] for f, n in enumerate(wanted)}, rest)
