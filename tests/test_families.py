"""Differences between families of targets, and scaled rotary embeddings: configs that are read or refused."""

import copy
import json
import random

import pytest
from small_configs import LLAMA, LLAMA3, YARN, read

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.families import Experts

LONGROPE = {"rope_type": "longrope", "short_factor": [1.5] * 32, "long_factor": [1.5] * 32, "attention_factor": 1.0}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, LONGROPE, {"rope_type": "linear", "factor": 2.0}])
def test_scaled_rope_in_both_spellings(scaling):
    old = read(rope_theta=5e5, rope_scaling=scaling)
    new = read(rope_theta=None, rope_parameters=scaling | {"rope_theta": 5e5})
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling is not None
    named = {k: v for k, v in scaling.items() if k != "rope_type"} | {"type": scaling["rope_type"]}
    assert read(rope_theta=5e5, rope_scaling=named) == old
    assert ModelConfig.from_hf(old.to_hf(), "x") == old and hash(old) != hash(read())


def test_defaults_of_scaled_rope():
    assert read(rope_scaling={"rope_type": "dynamic", "factor": 2.0}).rope_scaling is None
    short = read(rope_scaling={"rope_type": "yarn", "factor": 4.0}).rope_scaling
    assert short.original_max_position_embeddings == 8192 and short.attention_factor == pytest.approx(1.138629)
    given = read(rope_scaling=YARN, original_max_position_embeddings=100).rope_scaling
    assert given.original_max_position_embeddings == 100  # the config's own comes first
    equal = read(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}).rope_scaling
    assert equal.attention_factor == 1.0


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": ["yarn"]}, "only one rope_type of"),
        ({"rope_type": "linear"}, "rope_scaling: factor = None must be a positive number"),
        (LLAMA3 | {"factor": -8}, "factor = -8 must be a positive number"),
        (LLAMA3 | {"low_freq_factor": 4}, "low_freq_factor = 4.0 must be below high_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0"),
        (YARN | {"beta_fast": 1}, "beta_slow = 1.0 must be below beta_fast = 1.0"),
        (YARN | {"attention_factor": "x"}, "attention_factor = 'x'"),
        (YARN | {"truncate": 0}, "truncate = 0 must be true or false"),
        (YARN | {"rope_theta": 0.5}, "rope_theta = 0.5 must be above 1"),
        (LONGROPE | {"long_factor": [2.0] * 32}, "only where short_factor equals long_factor"),
        ({"type": "longrope", "attention_factor": 1.0}, "must be a list of head_dim / 2 = 32 numbers"),
    ],
)
def test_refusals_of_scaled_rope(rope, said):
    with pytest.raises(UserError) as caught:
        read(rope_scaling=rope)
    assert str(caught.value).startswith("some/config.json: ") and said in str(caught.value)


def test_biases_and_norms_of_the_families():
    def flags(config, **changes):
        read = ModelConfig.from_hf(config | changes, "x")
        return read.qkv_bias, read.o_bias, read.mlp_bias, read.qk_norm

    assert flags(LLAMA) == (False, False, False, False)
    assert flags(LLAMA, attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert flags(QWEN2) == (True, False, False, False)
    assert flags(QWEN3) == (False, False, False, True)
    assert flags(QWEN3, attention_bias=True) == (True, True, False, True)
    assert flags(MOE) == (False, False, False, True)
    assert ModelConfig.from_hf(QWEN3, "x").head_dim == 128  # not hidden_size / num_attention_heads


def test_which_layers_slide():
    def layers(config=QWEN2, **changes):
        read = ModelConfig.from_hf(config | changes, "x")
        assert ModelConfig.from_hf(read.to_hf(), "x") == read
        return read.sliding_window, read.sliding_layers

    assert layers() == layers(sliding_window=4096) == layers(layer_types=["full_attention"] * 30) == (None, ())
    sliding = {"use_sliding_window": True, "sliding_window": 64}
    assert layers(**sliding) == (64, (28, 29))
    assert layers(**sliding, max_window_layers=30) == (None, ())
    assert layers(**sliding, max_window_layers=0) == (64, tuple(range(30)))
    kinds = ["full_attention", "sliding_attention"] * 15
    assert layers(**sliding, layer_types=kinds, max_window_layers=0) == (64, tuple(range(1, 30, 2)))
    assert layers(MOE, **sliding, max_window_layers=28) == (64, tuple(range(30)))
    config = ModelConfig.from_hf(QWEN2 | sliding, "x")
    assert (config.window(27), config.window(28)) == (None, 64)


def test_which_layers_have_experts():
    def experts(**changes):
        read = ModelConfig.from_hf(MOE | changes, "x")
        assert ModelConfig.from_hf(read.to_hf(), "x") == read
        return read.experts

    assert experts() == Experts(16, 4, 96, True, tuple(range(30)))
    assert experts(decoder_sparse_step=2, mlp_only_layers=[1, 5]).layers == (3, *range(7, 30, 2))
    assert experts(norm_topk_prob=None).normalize is False
    assert experts(num_experts=0) is experts(mlp_only_layers=[*range(30)]) is experts(decoder_sparse_step=31) is None
    assert experts(num_experts=None, num_local_experts=16) == experts()


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LLAMA, {"layer_types": ["sliding_attention"] * 30}, "only 'full_attention' in every layer"),
        (QWEN2, {"use_sliding_window": "no"}, "use_sliding_window = 'no' must be true or false"),
        (QWEN2, {"use_sliding_window": True}, "sliding_window = None must be a positive integer"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window = 0"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": -1}, "max_window_layers = -1"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types = ['full_attention'] must name one of"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 30}, "use_sliding_window is not true"),
        (QWEN3, {"layer_types": [["x"]] * 30}, "layer_types"),
        (QWEN3, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "is not supported"),
        (MOE, {"num_experts": None}, "num_local_experts = None"),
        (MOE, {"num_experts": 10**9}, "num_experts = 1000000000 in 30 layers are more than 131072 experts"),
        (MOE, {"num_experts_per_tok": 17}, "num_experts_per_tok = 17 must not exceed num_experts = 16"),
        (MOE, {"moe_intermediate_size": None}, "moe_intermediate_size = None"),
        (MOE, {"norm_topk_prob": 1}, "norm_topk_prob = 1 must be true or false"),
        (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        (MOE, {"mlp_only_layers": [30]}, "mlp_only_layers = [30] must be a list of integers of 0..29"),
        (MOE, {"mlp_only_layers": "all"}, "mlp_only_layers = 'all'"),
        (MOE, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not supported"),
    ],
)
def test_refusals_of_the_families(config, changes, said):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(config | changes, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ") and said in str(caught.value)


def test_mutated_configs_are_read_or_refused():
    """Any value in any place: a UserError, or a config that survives a round trip."""
    rng, refused = random.Random(0), 0
    values = [None, True, False, 0, 1, -1, 2, 3, 7, 1e300, 0.5, float("nan"), "", "yarn", [], [0], {"a": {}}, 10**400]
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    bases = [LLAMA | {"rope_scaling": LLAMA3}, QWEN2 | {"rope_scaling": YARN} | sliding, QWEN3 | sliding, MOE]
    for _ in range(400):
        config = copy.deepcopy(rng.choice(bases)) | {"mlp_only_layers": [3]}
        place = config["rope_scaling"] if "rope_scaling" in config and rng.random() < 0.3 else config
        place[rng.choice(list(place))] = rng.choice(values)
        try:
            read = ModelConfig.from_hf(config, "x")
        except UserError:
            refused += 1
        else:
            assert ModelConfig.from_hf(json.loads(json.dumps(read.to_hf())), "x") == read
    assert 150 < refused < 390


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3, MOE], ids=lambda config: config["model_type"])
def test_transformers_reads_ours_and_we_read_its(base):
    from transformers import AutoConfig

    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    for scaling in (None, LLAMA3, YARN):
        for more in ({}, sliding, {"mlp_only_layers": [1]}):
            config = ModelConfig.from_hf(base | {"head_dim": 32, "rope_scaling": scaling, **more}, "x")
            theirs = AutoConfig.for_model(**config.to_hf())
            assert (theirs.head_dim, theirs.num_key_value_heads) == (32, 3)
            assert ModelConfig.from_hf(theirs.to_dict() | {"architectures": base["architectures"]}, "x") == config
