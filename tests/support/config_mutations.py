"""Seeded damage to JSON files, of the kinds that files of models have met: edited, copied, cut, and replaced."""

import json
import random
from collections.abc import Callable
from typing import Any

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 7, 40, 2**31, 10**400, 0.5, 1e-9, 1e308, float("nan"), float("inf")),
    *("", "x", "8", "silu", "default", "linear", "yarn", "llama3", "sliding_attention"),
    *([], [0], [1, 2, 3], [2, 3, 4], [1, 2, 3, 4], ["sliding_attention"], ["full_attention"], [None], [[]]),
    *({}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}, {"type": "yarn", "factor": 2.0}, {"factor": 4.0}),
    *({"rope_type": "default", "rope_theta": 5000.0}, {"rope_type": "default", "type": "linear", "factor": 2}),
)
KEYS = (  # that a file may have got from elsewhere
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias", "bias"),
    *("rope_scaling", "rope_parameters", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"),
    *("quantization_config", "head_dim", "num_hidden_layers", "target_hidden_size", "draft_vocab_size", "vocab_size"),
    *("eagle_config", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states", "norm_output", "fc_norm"),
    *("tie_word_embeddings", "eos_token_id", "architectures", "model_type", "hidden_act", "attention_chunk_size"),
    *("type", "rope_type", "factor", "mrope_section", "norm_before_residual", "num_experts", "_name_or_path"),
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON value, big tables (a vocabulary) by few of their entries."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found = [(value, key) for key in list(value)[:40]]
    elif isinstance(value, list):
        found = [(value, i) for i in range(min(len(value), 4))]
    return found + [place for container, key in list(found) for place in places(container[key])]


def edited(rng: random.Random, value: Any) -> Any:
    """The value with one to three edits."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(places(value) or [({}, None)])
        if key is None:
            break
        match rng.randrange(6):
            case 0:
                container[key] = rng.choice(VALUES)
            case 1:
                del container[key]
            case 2:
                container[key] = rng.choice((None, [container[key]], str(container[key])))
            case 3 if isinstance(container, dict):
                container[str(key) + "_"] = container.pop(key)
            case 4 if isinstance(container, dict):
                container[rng.choice(KEYS)] = rng.choice(VALUES)
            case _:
                if isinstance(value, dict):
                    value[rng.choice(KEYS)] = rng.choice(VALUES)
    return value


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes that a copy, an editor or git have spoilt."""
    at = rng.randrange(max(1, len(data)))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[max(0, at - 9) :]
        case 3:
            return b"\xef\xbb\xbf" + data
        case 4:
            return rng.choice((POINTER, b"<!DOCTYPE html><html></html>", b"\0" * len(data), b"[" * 100_000))
        case 5:
            return data.decode().encode("utf-16")
        case _:
            return data.replace(b"\n", b"\r\n") + rng.choice((b"", b"\0", b"}", b"\n\n"))


def mutate(rng: random.Random, data: bytes, edit: Callable[[random.Random, Any], Any] = edited) -> bytes:
    """A file's new bytes."""
    if rng.random() < 0.25:
        return damaged(rng, data)
    return json.dumps(edit(rng, json.loads(data))).encode()
