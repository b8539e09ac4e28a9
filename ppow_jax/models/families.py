"""Supported families of targets and their differences, read from their config files.

Each family is one function from a Hugging Face config to the fields of `ModelConfig` that not all families have. A new
family gets its function and its line in `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models.reading import boolean, indices, positive_int, refuse_options

MAX_EXPERTS = 1 << 17  # of all layers together; far above any real model
Reader = Callable[[Mapping[str, Any], int, str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts: the layers that have one, and the routing of tokens (2101.03961, 2505.09388).

    A router computes a softmax over all experts in float32; the best `per_token` experts are weighted by it. normalize:
    their weights are scaled to sum to 1. intermediate_size: width of one expert.
    """

    number: int
    per_token: int
    intermediate_size: int
    normalize: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """model_type: Hugging Face's name. read: (config, number of layers, place for errors) -> fields of ModelConfig.

    head_dim: the default where the config has none; None for hidden_size / num_attention_heads.
    """

    model_type: str
    read: Reader
    head_dim: int | None = None


def _llama(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    kinds = config.get("layer_types")  # transformers' class has no windows, but servers read them from here
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UserError(f"{where}: layer_types = {kinds!r} is not supported, only 'full_attention' in every layer")
    bias = boolean(config, "attention_bias", where, default=False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": boolean(config, "mlp_bias", where, default=False)}


def _qwen2(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    return {"qkv_bias": True, **_sliding(config, num_layers, where)}


def _qwen3(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    return {**_qwen3_attention(config, where), **_sliding(config, num_layers, where)}


def _qwen3_moe(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    refuse_options(config, where, {"shared_expert_intermediate_size": (0,), "n_shared_experts": (0,)})
    window = _window(config, where)  # for every layer: this family has neither max_window_layers nor layer_types
    sliding = {} if window is None else {"sliding_window": window, "sliding_layers": tuple(range(num_layers))}
    return {**_qwen3_attention(config, where), **sliding, "experts": _experts(config, num_layers, where)}


def _qwen3_attention(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    bias = boolean(config, "attention_bias", where, default=False)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


def _window(config: Mapping[str, Any], where: str) -> int | None:
    used = boolean(config, "use_sliding_window", where, default=False)
    return positive_int(config, "sliding_window", where) if used else None


def _sliding(config: Mapping[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    """Layers with a sliding window: from `layer_types` of transformers 5, or those from `max_window_layers` on."""
    window = _window(config, where)
    kinds = config.get("layer_types")
    if kinds is None:
        first = num_layers
        if window is not None:
            first = config.get("max_window_layers", 28)
            if type(first) is not int or first < 0:
                raise UserError(f"{where}: max_window_layers = {first!r} must be an integer of 0 or more")
        layers = tuple(range(first, num_layers))
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
            rule = f"must name one of {known} for each of {num_layers} layers"
            raise UserError(f"{where}: layer_types = {kinds!r} {rule}")
        layers = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
        if layers and window is None:
            raise UserError(f"{where}: layer_types names sliding layers, but use_sliding_window is not true")
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def _experts(config: Mapping[str, Any], num_layers: int, where: str) -> Experts | None:
    dense = indices(config, "mlp_only_layers", where, num_layers)
    step = positive_int(config, "decoder_sparse_step", where, default=1)
    layers = tuple(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0)
    count = "num_experts" if config.get("num_experts") is not None else "num_local_experts"  # both spellings are in use
    if config.get(count) == 0 or not layers:
        return None
    number = positive_int(config, count, where)
    if len(layers) * number > MAX_EXPERTS:
        raise UserError(f"{where}: {count} = {number} in {len(layers)} layers are more than {MAX_EXPERTS} experts")
    per_token = positive_int(config, "num_experts_per_tok", where)
    if per_token > number:
        raise UserError(f"{where}: num_experts_per_tok = {per_token} must not exceed {count} = {number}")
    return Experts(
        number=number,
        per_token=per_token,
        intermediate_size=positive_int(config, "moe_intermediate_size", where),
        normalize=boolean(config, "norm_topk_prob", where, default=False),
        layers=layers,
    )


def experts_to_hf(experts: Experts | None, num_layers: int) -> dict[str, Any]:
    """Config keys from which `FAMILIES` rebuilds the experts."""
    if experts is None:
        return {"num_experts": 0}
    return {
        "num_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in range(num_layers) if n not in experts.layers],
    }


FAMILIES = {
    "LlamaForCausalLM": Family("llama", _llama),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, head_dim=128),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", _qwen3_moe),
}
