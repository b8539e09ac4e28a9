"""Checkpoints of the families: both layouts of experts, parts read alone, and how much memory loading takes."""

import functools
import os
import random
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damaged_files import mutate
from golden import families
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.weights.huggingface import WEIGHTS, load_target, save_target

MOE, PREFIX = "qwen3-moe", "model.layers.1.mlp.experts."


def assert_same(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def edit(directory, change) -> None:
    """Replaces the tensors of a checkpoint by what `change` makes of them."""
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS)


def stacked(tensors: dict) -> dict:
    """The layout in which transformers 5 holds experts: all of a layer in one tensor, gate above up."""
    E = families.MOE["num_experts"]
    gate, up, down = (
        np.stack([tensors.pop(f"{PREFIX}{e}.{name}_proj.weight") for e in range(E)]) for name in ("gate", "up", "down")
    )
    return tensors | {f"{PREFIX}gate_up_proj": np.concatenate([gate, up], 1), f"{PREFIX}down_proj": down}


@pytest.mark.parametrize("name", families.TARGETS)
def test_round_trip_of_every_family(tmp_path, name):
    expected = families.params(name)
    save_target(tmp_path, families.TARGETS[name], expected)
    config, params = load_target(tmp_path)
    assert config == families.TARGETS[name]
    assert_same(params, expected)


def test_both_layouts_of_experts(tmp_path):
    expected = families.params(MOE)
    save_target(tmp_path, families.TARGETS[MOE], expected)
    assert f"{PREFIX}5.down_proj.weight" in load_file(tmp_path / WEIGHTS)
    edit(tmp_path, stacked)
    assert_same(load_target(tmp_path)[1], expected)


def without(name, tensors):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x | {f"{PREFIX}6.up_proj.weight": np.ones((24, 32), np.float32)}, "6.up_proj.weight: unknown"),
        (functools.partial(without, f"{PREFIX}2.up_proj.weight"), "experts.2.up_proj.weight: missing"),
        (lambda x: x | {f"{PREFIX}2.up_proj.weight": np.ones((25, 32), np.float32)}, "has shape [25, 32]"),
        (lambda x: x | {f"{PREFIX}2.up_proj.weight": np.ones((24, 32), np.int32)}, "has type I32"),
        (lambda x: stacked(dict(x)) | x, "experts.0.down_proj.weight: unknown"),
        (lambda x: without(f"{PREFIX}down_proj", stacked(x)), "experts.down_proj: missing"),
        (lambda x: stacked(x) | {f"{PREFIX}gate_up_proj": np.ones((6, 47, 32), np.float32)}, "has shape [6, 47, 32]"),
        (lambda x: x | {"model.layers.0.mlp.gate.weight": np.ones((6, 32), np.float32)}, "0.mlp.gate.weight: unknown"),
        (functools.partial(without, "model.layers.1.mlp.gate.weight"), "layers.1.mlp.gate.weight: missing"),
        (functools.partial(without, "model.layers.1.self_attn.q_norm.weight"), "q_norm.weight: missing"),
    ],
)
def test_what_is_wrong_with_experts_is_named(tmp_path, change, said):
    save_target(tmp_path, families.TARGETS[MOE], families.params(MOE))
    edit(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_target(tmp_path)
    assert said in str(caught.value)


def test_biases_that_a_family_does_not_have_are_unknown(tmp_path):
    save_target(tmp_path, families.TARGETS["qwen2"], families.params("qwen2"))
    more = {"model.norm.bias": np.ones(32, np.float32)}
    edit(tmp_path, lambda x: without("model.layers.0.self_attn.q_proj.bias", x) | more)
    with pytest.raises(UserError, match=r"(?s)norm.bias: unknown.*q_proj.bias: missing"):
        load_target(tmp_path)


@pytest.mark.parametrize("layout", [dict, stacked])
def test_any_part_of_a_parameter_can_be_read_alone(tmp_path, layout):
    """As a mesh asks for its shards; put together they are the parameters."""
    expected = families.params(MOE)
    save_target(tmp_path, families.TARGETS[MOE], expected)
    edit(tmp_path, layout)
    asked: list[tuple] = []

    def put(path, shape, read):
        halves = []
        axis = len(path) % len(shape)  # another one for parameters in layers than for those outside
        half = max(1, shape[axis] // 2)
        for part in (slice(0, half), slice(half, shape[axis])):
            index = tuple(part if a == axis else slice(None) for a in range(len(shape)))
            halves.append(read(index))
            assert halves[-1].dtype == jnp.bfloat16
        asked.append(path)
        return jnp.concatenate([jnp.asarray(half) for half in halves], axis)

    _, params = load_target(tmp_path, jnp.bfloat16, put)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))
    assert ("embed",) in asked and ("layers", 1, "router") in asked and len(set(asked)) == len(asked)


@pytest.mark.parametrize("layout", [dict, stacked])
def test_fuzz(tmp_path, layout):
    """Whatever happens to the files: a UserError, or a load of the promised shapes."""
    original = tmp_path / "original"
    expected = jax.tree.map(np.shape, families.params(MOE))
    save_target(original, families.TARGETS[MOE], families.params(MOE))
    edit(original, layout)
    refused = 0
    for seed in range(50):
        rng, broken = random.Random(seed), tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(original, broken)
        mutate(rng.choice(sorted(broken.iterdir())), rng)
        try:
            found = jax.tree.map(np.shape, load_target(broken)[1])
        except UserError:
            refused += 1
        else:
            assert found == expected
    assert 10 < refused < 50


LOADING = """
    import json, resource, sys
    from pathlib import Path
    import jax, jax.numpy as jnp, ml_dtypes, numpy as np
    from safetensors.numpy import save_file
    from ppow_jax.models.config import ModelConfig
    from ppow_jax.weights import huggingface, layout

    directory, layers, shards = Path(sys.argv[1]), int(sys.argv[2]), 4
    config = ModelConfig.from_hf({
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 4096,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
        "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "mlp_only_layers": [0],
        "eos_token_id": 0,
    }, "test")
    if not (directory / "config.json").exists():
        tensors = layout.expected(layout.sources(config))
        names, weight_map = sorted(tensors), {}
        for i in range(shards):
            part = {name: np.full(tensors[name], i, ml_dtypes.bfloat16) for name in names[i::shards]}
            save_file(part, directory / f"model-{i}.safetensors")
            weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
        (directory / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        (directory / huggingface.CONFIG).write_text(json.dumps(config.to_hf()))
        sys.exit()
    jax.block_until_ready(jnp.ones(8) + 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    params = huggingface.load_target(directory, jnp.bfloat16)[1]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(sum(x.nbytes for x in jax.tree.leaves(params)), after * 1024 - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_the_weights_once(tmp_path):
    """LOAD_BYTES=4e9 makes it a model of that size; the default is large beside what programs themselves take.

    That does not grow with the weights; up to 290 MB were seen.
    """
    wanted = float(os.environ.get("LOAD_BYTES", 2e9))
    layers = round(wanted / 27e6) + 1
    run = functools.partial(subprocess.run, text=True, check=True, capture_output=True)
    arguments = [sys.executable, "-c", textwrap.dedent(LOADING), str(tmp_path), str(layers)]
    run(arguments)  # writes the files
    size, peak = map(int, run(arguments).stdout.split())
    print(f"{size / 1e6:.0f} MB of weights, {peak / 1e6:.0f} MB more at the peak: {peak / size:.3f} times")
    assert 0.8 * wanted < size
    assert 0.9 * size < peak < 1.3 * size  # the lower bound shows that what was measured are the weights
