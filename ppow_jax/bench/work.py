"""Necessary work of a step: operations of its matrix products, and bytes between main memory and chip.

These are counts of the algorithm, not of a compiled program: divided by time and peak they give model FLOPs utilisation
(PaLM, 2204.02311) and the share of the peak bandwidth that was used well. Recomputation, padding, masked keys and
copies are not counted, so neither share can be raised by doing more. Matrix products count 2 operations per
multiply-add; embeddings, norms and softmax count nothing.
"""

import dataclasses
import math
from typing import Any

import jax

from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Work:
    """flops: operations. bytes: read and written at least; 0 where they are not counted."""

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


def target_forward(config: ModelConfig, tokens: int, context: float, predictions: int) -> float:
    """Operations of the target's pass over `tokens` tokens that attend to `context` keys each on average.

    predictions: tokens whose logits over the whole vocabulary are computed.
    """
    weights = 0.0
    for layer in transformer.shapes(config)["layers"]:
        share = config.experts.per_token / config.experts.number if "router" in layer else 1.0
        for shape in layer.values():
            if len(shape) >= 2:
                weights += math.prod(shape) * (share if len(shape) == 3 else 1.0)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * context
    return 2.0 * tokens * (weights + attention) + 2.0 * predictions * config.vocab_size * config.hidden_size


def target_weights(params: dict, config: ModelConfig, tokens: int) -> float:
    """Bytes of the parameters that a pass over `tokens` tokens reads, each once.

    Of a mixture, the experts that so many tokens touch if each chooses at random; of the embedding, its rows.
    """
    touched = 1.0
    if config.experts:
        touched = 1 - (1 - config.experts.per_token / config.experts.number) ** tokens
    total = 0.0
    for layer in params["layers"]:
        stacked = "stacked" in layer
        for name, x in (layer["stacked"] if stacked else layer).items():
            of_experts = name in ("gate_proj", "up_proj", "down_proj") and x.ndim - stacked == 3
            total += x.nbytes * (touched if of_experts else 1.0)
    embed = params["embed"]
    rows = tokens * embed.nbytes / embed.shape[0]
    return total + params["norm"].nbytes + transformer.head(params).nbytes + rows


def cache_bytes(kv: Any, slots: float) -> float:
    """Bytes of `slots` positions of every cache in a tree of `KV` and `StackedKV`, for all rows."""
    leaves = jax.tree.leaves(kv)
    lengths = {max(x.shape[-2:]) for x in leaves}
    L = max(lengths)
    return sum(x.nbytes for x in leaves) * slots / L


def drafter_step(config: DrafterConfig, windows: int, context: float) -> float:
    """Operations of one draft step of `windows` windows, each attending to `context` keys: layers and head."""
    shapes = parameter_shapes(config)
    weights = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and name not in ("fc", "fc_norm"))
    return 2.0 * windows * (weights + 2 * config.num_layers * config.num_heads * config.head_dim * context)


def drafter_prefix(config: DrafterConfig, tokens: int) -> float:
    """Operations of fusing the features of `tokens` tokens, and of their keys and values in the first layer."""
    shapes = parameter_shapes(config)
    return 2.0 * tokens * sum(math.prod(shapes[name]) for name in ("fc", "k_proj", "v_proj"))


def drafter_weights(params: dict, tokens: int) -> float:
    """Bytes of a drafter's parameters that a draft step reads; with `tokens` > 0 also those that fuse features."""
    return float(sum(x.nbytes for name, x in params.items() if tokens or not name.startswith("fc")))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sizes of a training batch: B rows of T tokens with M anchors each, in one segment."""

    B: int
    T: int
    M: int


def supervised_step(target: ModelConfig, drafter: DrafterConfig, rows: Rows, steps: int) -> float:
    """Operations of a step of stage 1: the target's pass, and `steps` draft steps at every anchor, forwards and back.

    A backward pass counts twice its forward pass, except where features need no gradient: there as much.
    """
    B, T, M = rows.B, rows.T, rows.M
    read = target_forward(target, B * T, T / 2, 0)
    labels = 2.0 * B * M * drafter.draft_vocab_size * target.hidden_size
    return read + labels + 2 * drafter_prefix(drafter, B * T) + 3 * steps * drafter_step(drafter, B * M, T / 2)


def ppow_step(target: ModelConfig, drafter: DrafterConfig, rows: Rows, windows: int, group: int, K: int) -> float:
    """Operations of a step of stage 2 as published: the target's pass with a survey of its vocabulary at every anchor,
    the criticality of every anchor, `windows` times `group` drafted windows of K tokens per row, their verification,
    and the policy's gradient.
    """
    B, T, M, X = rows.B, rows.T, rows.M, windows * group
    read = target_forward(target, B * T, T / 2, B * M)
    labels = 2.0 * B * M * drafter.draft_vocab_size * target.hidden_size
    critical = drafter_step(drafter, B * M, T / 2) + drafter_prefix(drafter, B * T)
    drafted = K * drafter_step(drafter, B * X, T / 2)
    verified = target_forward(target, B * X * (K - 1), T / 2, B * X * K)
    learnt = 2 * drafter_prefix(drafter, B * T) + 3 * drafted
    reference = 2.0 * B * X * K * drafter.draft_vocab_size * target.hidden_size
    return read + labels + critical + drafted + verified + learnt + reference
