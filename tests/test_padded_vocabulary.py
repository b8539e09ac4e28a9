"""Drafters and targets whose vocabularies differ by padding alone, or by more."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from golden import models
from small_configs import NARROW_TINY as TARGET

from ppow_jax.data.encoding import tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.training import initialise
from ppow_jax.weights.drafters import export_drafter
from ppow_jax.weights.loading import load_drafter
from ppow_jax.weights.targets import Target


def target(vocab_size: int, tokenizer=None) -> Target:
    config = dataclasses.replace(TARGET, vocab_size=vocab_size)
    return Target("small", config, transformer.init(jax.random.key(0), config), tokenizer or tiny_tokenizer())


def write(directory, vocab_size: int, ids, embed=None):
    """A drafter for a vocabulary of that size."""
    config = initialise.drafter_config(dataclasses.replace(TARGET, vocab_size=vocab_size), len(ids))
    config = dataclasses.replace(config, own_embed=embed is not None)
    export_drafter(directory, config, models.drafter_params(config), ids, dtype="float32", embed_VxE=embed)
    return directory


@pytest.mark.parametrize(("drafters", "targets"), [(259, 264), (264, 259), (320, 264)])
@pytest.mark.parametrize("own", [False, True])
def test_padding_is_no_difference(tmp_path, drafters, targets, own, caplog):
    caplog.set_level(logging.INFO)
    ids = np.r_[0:30, 250:259]
    embed = np.random.default_rng(0).normal(size=(drafters, 16)).astype(np.float32) if own else None
    drafter = load_drafter(write(tmp_path, drafters, ids, embed), target(targets), "float32")
    assert drafter.config.vocab_size == targets and np.array_equal(drafter.target_ids_W, ids)
    assert f"a vocabulary of {drafters} tokens, of which the target has {targets}: only padding differs" in caplog.text
    if own:
        assert drafter.embed_VxE.shape == (targets, 16)
        np.testing.assert_array_equal(drafter.embed_VxE[:259], embed[:259])
        assert not np.asarray(drafter.embed_VxE[drafters:]).any()


def test_a_padded_copy_of_the_targets_embedding_is_left_out(tmp_path):
    model = target(264)
    embed = np.asarray(model.params["embed"])[:259]
    drafter = load_drafter(write(tmp_path, 259, np.arange(40), embed), model, "float32")
    assert drafter.embed_VxE is None and not drafter.config.own_embed


def test_ids_of_padding_that_the_target_lacks(tmp_path):
    directory = write(tmp_path, 264, np.r_[0:30, 263])
    said = "only padding differs .* of 264 tokens and the target's 259 .* but it drafts ids up to 263"
    with pytest.raises(UserError, match=said):
        load_drafter(directory, target(259), "float32")


def test_other_vocabularies_are_refused(tmp_path):
    directory = write(tmp_path, 258, np.arange(30))
    for tokenizer in (tiny_tokenizer(), None):  # one token is lost, or nobody knows
        model = dataclasses.replace(target(264), tokenizer=tokenizer)
        with pytest.raises(UserError, match="for a vocabulary of 258 tokens, the target has 264"):
            load_drafter(directory, model, "float32")


def test_a_head_of_the_padded_target(tmp_path):
    """A drafter of the whole unpadded vocabulary without a head takes the rows that it has of the target's."""
    from safetensors.numpy import load_file, save_file

    model, directory = target(264), write(tmp_path, 259, np.arange(259))
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, directory / "model.safetensors")
    drafter = load_drafter(directory, model, "float32")
    np.testing.assert_array_equal(drafter.params["lm_head"], np.asarray(model.params["embed"])[:259])
    assert drafter.config.vocab_size == 264 and len(drafter.target_ids_W) == 259
