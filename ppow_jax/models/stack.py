"""Layers stacked into one array per parameter: a program then holds the code of one layer, however deep the model is.

Compilation takes minutes for eighty layers written out, on any device, and seconds for one that is scanned over. On a
CPU the layers stay apart nonetheless: there `lax.scan` copies the bfloat16 weights of each layer before it uses them,
which makes a pass five times slower.

A model's `layers` are a list of *runs*: a layer's parameters, or {"stacked": the parameters of N alike layers, stacked
along their first axis}. Keys and values come likewise, one `KV` or `StackedKV` per run.
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
    params: dict
    stacked: bool


def runs(layers: Sequence[dict]) -> Iterator[Run]:
    """The runs that a model's layers are made of, in order."""
    begin = 0
    for params in layers:
        stacked = STACKED in params
        number = params[STACKED]["input_norm"].shape[0] if stacked else 1
        yield Run(begin, number, params[STACKED] if stacked else params, stacked)
        begin += number


def layer(layers: Sequence[dict], index: int) -> dict:
    """The parameters of one layer, negative indices from the end."""
    apart = [(run, n) for run in runs(layers) for n in range(run.number)]
    run, n = apart[index]
    return {name: x[n] for name, x in run.params.items()} if run.stacked else run.params


def stack(params: dict, config: ModelConfig) -> dict:
    """The same parameters with their layers stacked, in as few runs as there are kinds of layers next to each other.

    Works on arrays and, under `jax.eval_shape`, on shapes.
    """
    kinds: list[list[dict]] = []
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
    """function(KV, ...) of every layer; several sequences of runs are taken side by side."""

    def of_run(*run: KV | StackedKV) -> KV | StackedKV:
        if isinstance(run[0], KV):
            return function(*run)
        return StackedKV(*jax.vmap(function)(*(KV(*stacked) for stacked in run)))

    return tuple(of_run(*run) for run in zip(*kv, strict=True))


def like(layers: Sequence[dict], kv: KV) -> tuple[KV | StackedKV, ...]:
    """A copy of `kv` for every layer."""
    return tuple(
        StackedKV(*(jnp.broadcast_to(x, (run.number, *x.shape)) for x in kv))
        if run.stacked
        else KV(*map(jnp.copy, kv))  # buffers of their own: they are donated
        for run in runs(layers)
    )


class Scanned(NamedTuple):
    """x_BxSxD after the last layer of a run; features: what entered each of the layers that were asked for; rest: what
    else the layers gave, stacked.
    """

    x_BxSxD: Array
    features: dict[int, Array]
    rest: Any


def scan(
    one: Callable[[dict, Array, Sequence[KV]], tuple],
    run: Run,
    x_BxSxD: Array,
    contexts: Iterable[KV | StackedKV],
    feature_layers: Sequence[int],
) -> Scanned:
    """Applies the layers of a stacked run, one(parameters, x_BxSxD, KVs of the contexts) -> (x_BxSxD, *rest) each.

    What enters a chosen layer is put aside as the loop passes it: slot f of a buffer for the f-th, a last slot for all
    others, so that the buffer is written in place and never read. Experts are not scanned over: a layer gets those of
    all layers, and its `number` in the stack, and takes the few that it needs (`models.experts`); a scan would copy all
    of a layer's first.
    """
    experts = {name: x for name, x in run.params.items() if x.ndim > 3}
    scanned = {name: x for name, x in run.params.items() if name not in experts}
    wanted = [n for n in feature_layers if run.begin <= n < run.begin + run.number]
    inside = range(run.begin, run.begin + run.number)
    slot_N = jnp.array([wanted.index(n) if n in wanted else len(wanted) for n in inside])

    def body(carry, layer_slot):
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
