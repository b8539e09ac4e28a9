"""Larger draft vocabularies for trained drafters: which tokens are added, their rows, and the command."""

import jax
import numpy as np
import pytest

from experiments import convert
from ppow_jax import cli
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.training import initialise
from ppow_jax.weights import draft_vocabulary, targets
from ppow_jax.weights.drafters import export_drafter, import_drafter
from tests.golden import models

IDS_W = np.array([2, 5, 6, 11], np.int32)


@pytest.fixture(scope="module")
def tiny():
    return targets.load("tiny", "float32")


@pytest.fixture(scope="module")
def drafter(tiny):
    config = initialise.drafter_config(tiny.config, len(IDS_W))
    return config, models.drafter_params(config)


def test_the_most_frequent_missing_tokens_are_added_with_the_targets_rows(tiny, drafter):
    config, params = drafter
    head_VxD = np.asarray(transformer.head(tiny.params))
    params = params | {"lm_head": 3.0 * head_VxD[IDS_W]}
    count_V = np.zeros(config.vocab_size, np.int64)
    count_V[[11, 7, 0, 9]] = 90, 8, 3, 2
    new, made, ids_W = draft_vocabulary.enlarge(config, params, IDS_W, head_VxD, count_V, 7)
    assert ids_W.tolist() == [0, 2, 5, 6, 7, 9, 11]
    assert new.draft_vocab_size == 7
    np.testing.assert_allclose(made["lm_head"], 3.0 * head_VxD[ids_W], rtol=1e-5)  # at the scale of the trained rows
    np.testing.assert_array_equal(made["lm_head"][[1, 2, 3, 6]], params["lm_head"])  # which stay as they are
    assert all(made[name] is params[name] for name in params if name != "lm_head")


def test_uncounted_tokens_are_added_by_lowest_id(tiny, drafter):
    config, params = drafter
    count_V = np.zeros(config.vocab_size, np.int64)
    head_VxD = np.asarray(transformer.head(tiny.params))
    assert draft_vocabulary.enlarge(config, params, IDS_W, head_VxD, count_V, 6)[2].tolist() == [0, 1, 2, 5, 6, 11]


def test_coverage():
    count_V = np.arange(12)
    assert draft_vocabulary.coverage(IDS_W, count_V) == pytest.approx(24 / 66)
    assert np.isnan(draft_vocabulary.coverage(IDS_W, 0 * count_V))


@pytest.mark.parametrize("size", [3, 4, 10**6])
def test_sizes_out_of_range_are_refused(tiny, drafter, size):
    config, params = drafter
    head_VxD = np.asarray(transformer.head(tiny.params))
    with pytest.raises(UserError, match=rf"--size={size}: must be larger than the current size, 4, and at most"):
        draft_vocabulary.enlarge(config, params, IDS_W, head_VxD, np.ones(config.vocab_size), size)


def test_the_command_writes_a_drafter_that_holds_more_of_the_texts(tiny, drafter, tmp_path, capsys):
    config, params = drafter
    export_drafter(tmp_path / "old", config, params, IDS_W, dtype="float32", target_name="tiny")
    (tmp_path / "chats.txt").write_text("zzz zz\nzebra\n")
    argv = ["vocabulary", "--target=tiny", "--size=8", f"--data={tmp_path}/chats.txt", f"--output={tmp_path}/new"]
    with pytest.raises(SystemExit) as left:
        cli.run_command(convert.COMMANDS, [*argv, str(tmp_path / "old")])
    assert not left.value.code
    assert "8 draft tokens in place of 4" in capsys.readouterr().out
    made = import_drafter(tmp_path / "new", num_target_layers=tiny.config.num_layers)
    assert set(IDS_W) < set(made.target_ids_W.tolist())
    z = int(tiny.tokenizer("z", add_special_tokens=False)["input_ids"][-1])
    assert z in made.target_ids_W
    np.testing.assert_array_equal(made.params["fc"], jax.device_get(params["fc"]))
