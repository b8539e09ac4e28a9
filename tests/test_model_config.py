"""Model descriptions: what is read, what is refused and how."""

import pytest
from small_configs import LLAMA, read

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig


def test_reads_llama():
    assert read() == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
    )
    assert hash(read()) == hash(read())


def test_optional_keys():
    optional = ("num_key_value_heads", "eos_token_id", "rope_theta")
    config = ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k not in optional}, "x")
    assert (config.num_kv_heads, config.eos_token_ids, config.rope_theta) == (9, (), 10000.0)
    assert read(head_dim=None).head_dim == 64
    assert read(head_dim=32).head_dim == 32
    assert read(hidden_size=577, head_dim=64).head_dim == 64
    assert read(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert read(tie_word_embeddings=None).tie_word_embeddings is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": None},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 500000.0, "partial_rotary_factor": 1.0},
    ],
)
def test_rope_of_transformers_4_and_5(rope):
    assert read(**rope).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": None}, "architectures = None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures = "),
        ({"attention_bias": 1}, "attention_bias = 1 must be true or false"),
        ({"mlp_bias": "yes"}, "mlp_bias = 'yes'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "{'bits': 4} is not supported, only absence"),
        ({"rope_scaling": {"rope_type": "su", "factor": 8.0}}, "only one rope_type of 'default', 'linear', 'dynamic'"),
        ({"rope_scaling": {"full": {"rope_type": "default"}}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' must be an object or null"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_theta": 0}, "rope_theta = 0 must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
        ({"vocab_size": 0}, "vocab_size = 0 must be a positive integer"),
        ({"vocab_size": None}, "vocab_size = None"),
        ({"hidden_size": 576.0}, "hidden_size = 576.0"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"hidden_size": 577}, "must be a multiple of num_attention_heads = 9"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be an integer of 1..4096"),
        ({"intermediate_size": 2**31 + 1}, "intermediate_size"),
        ({"num_key_value_heads": 2}, "must be a multiple of num_key_value_heads = 2"),
        ({"head_dim": 63}, "head_dim = 63 must be even"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
        ({"eos_token_id": 49152}, "eos_token_id = 49152 must be token ids of 0..49151"),
        ({"eos_token_id": ["2"]}, "eos_token_id = ['2']"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1"),
    ],
)
def test_refusals_name_place_key_and_value(changes, said):
    with pytest.raises(UserError) as caught:
        read(**changes)
    assert str(caught.value).startswith("some/config.json: ")
    assert said in str(caught.value)


def test_config_must_be_an_object():
    with pytest.raises(UserError, match="must be a JSON object, not list"):
        ModelConfig.from_hf([], "x")


@pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"eos_token_id": [2, 7]}, {"attention_bias": True}])
def test_to_hf_round_trip(changes):
    config = read(**changes)
    assert ModelConfig.from_hf(config.to_hf(), "x") == config
