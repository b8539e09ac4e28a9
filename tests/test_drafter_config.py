"""Drafter descriptions: default layers, and what does not fit a target."""

import dataclasses

import pytest
from small_configs import LLAMA

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig, check_feature_layers, default_feature_layers, validate_fit

DRAFTER = DrafterConfig(
    vocab_size=49152,
    draft_vocab_size=8192,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position_embeddings=8192,
    target_hidden_size=576,
    feature_layers=(2, 15, 27),
    fc_norm=False,
)


def test_default_feature_layers():
    assert default_feature_layers(30) == (2, 15, 27)
    assert default_feature_layers(7) == (2, 3, 4)
    with pytest.raises(UserError, match=r"--feature_layers: a target of 6 layers"):
        default_feature_layers(6)


@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 15, 30)])
def test_feature_layers_of_all_depths(layers):
    assert check_feature_layers(layers, 30, "x") is None  # no UserError


@pytest.mark.parametrize("layers", [(2, 15), (2, 15, 31), (-1, 15, 27), (15, 2, 27), (2, 2, 27), ()])
def test_bad_feature_layers(layers):
    with pytest.raises(UserError, match=r"--f: feature layers .* of 0\.\.30"):
        check_feature_layers(layers, 30, "--f")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"vocab_size": 49153}, "vocabulary of 49153 tokens, the target has 49152"),
        ({"draft_vocab_size": 49153}, "draft vocabulary of 49153 tokens"),
        ({"target_hidden_size": 577}, "features of width 577, the target's are 576"),
        ({"hidden_size": 512}, "the drafter is 512 wide"),
        ({"feature_layers": (2, 16, 31)}, "the target has 30 layers"),
    ],
)
def test_validate_fit(changes, said):
    drafter = dataclasses.replace(DRAFTER, **changes)
    if said is None:
        return validate_fit(drafter, ModelConfig.from_hf(LLAMA, "x"), "--drafter=D")
    with pytest.raises(UserError) as caught:
        validate_fit(drafter, ModelConfig.from_hf(LLAMA, "x"), "--drafter=D")
    assert str(caught.value).startswith("--drafter=D: ") and said in str(caught.value)
