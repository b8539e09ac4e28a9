"""Cached target features: the same training as without them, resumable, and only for the data they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world

from ppow_jax.corpus import features
from ppow_jax.corpus.features import FeatureStore
from ppow_jax.data.batches import Batches
from ppow_jax.errors import UserError
from ppow_jax.training.steps.state import TrainState


def store(directory, batches=None, layers=world.FEATURE_LAYERS, stop=lambda: False, params=None, own=False):
    return FeatureStore(
        directory, batches or world.batches(), params or world.target_params(), world.CONFIG, layers, stop, own
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("features")
    return directory, store(directory)


def test_features_are_those_of_the_target(whole):
    """The features of every token and anchor of any batch of any epoch, whatever rows it was computed in."""
    step = world.batches().steps_of_epochs(1) + 1  # another epoch packs other rows
    batch = world.batches().at(step)
    cached = whole[1].at(step, batch)
    scored = world.scored_batch(world.drafter().target_ids_W, batch)
    real = batch.segment_BxT > 0
    np.testing.assert_allclose(cached.features_BxTxF[real], scored.windows.features_BxTxF[real], atol=1e-4)
    assert not cached.features_BxTxF[~real].any()
    anchors = batch.anchor_mask_BxM
    np.testing.assert_allclose(cached.hidden_BxMxD[anchors], scored.hidden_BxMxD[anchors], atol=1e-4)


def test_training_is_the_same_with_and_without(whole):
    drafter = world.drafter()
    shell = drafter.spec

    def train(with_cache):
        state, losses = TrainState.create(drafter.params, world.OPTIMIZER), []
        for index in range(4, 8):
            batch = world.batches().at(index)
            cached = whole[1].at(index, batch) if with_cache else None
            state, metrics = world.train_step(state, shell, world.target_params(), batch, cached)
            losses.append(float(metrics["loss"]))
        return losses

    np.testing.assert_allclose(train(True), train(False), rtol=1e-5)


def test_an_interrupted_pass_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SAVE_EVERY", 1)
    total = world.batches().steps_of_epochs(1)
    read, asked = [], iter([False, False, True])
    counted = features._read
    monkeypatch.setattr(features, "_read", lambda *a, **k: read.append(1) or counted(*a, **k))
    part = store(tmp_path, stop=lambda: next(asked))
    assert not part.complete and len(read) == 2
    # a kill without notice in the next batch: what was noted counts, what was not is made again
    with pytest.raises(ZeroDivisionError):
        store(tmp_path, stop=lambda: 1 / 0)
    rest = store(tmp_path)
    assert rest.complete and len(read) == total
    assert (tmp_path / "features.bin").read_bytes() == (whole[0] / "features.bin").read_bytes()
    again = store(tmp_path)
    assert again.complete and len(read) == total  # nothing left to do
    batch = world.batches().at(0)
    for ours, theirs in zip(again.at(0, batch), whole[1].at(0, batch), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_kill_at_the_very_start_leaves_nothing_in_the_way(whole, tmp_path):
    (tmp_path / "features.new").write_bytes(b"")  # killed before the file had its name
    (tmp_path / "batches_done").write_text("5 1")  # a note without its file counts for nothing
    assert store(tmp_path).complete
    assert (tmp_path / "features.bin").read_bytes() == (whole[0] / "features.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["batches_done", "features.bin"]


def test_features_of_other_data_are_refused(whole):
    kept = (whole[0] / "features.bin").read_bytes()
    examples = world.examples()
    shape = {"seed": 0, "batch_size": world.ROWS, "row_length": world.ROW, "max_anchors": world.ANCHORS}
    fewer = Batches(examples[:-1], **shape)
    swapped = Batches((*examples[2:], *examples[:2]), **shape)  # as many tokens, in another order
    for other in ({"batches": fewer}, {"batches": swapped}, {"layers": (0, 2, 3)}):
        with pytest.raises(UserError, match="features.bin: holds features of other data"):
            store(whole[0], **other)
    assert (whole[0] / "features.bin").read_bytes() == kept


def test_features_of_other_data_are_replaced_in_a_directory_of_a_process(whole, tmp_path):
    """It is a cache, which may have been left by a run of the same name that was removed from its bucket."""
    store(tmp_path, layers=(0, 2, 3), own=True)
    assert (tmp_path / "features.bin").read_bytes() != (whole[0] / "features.bin").read_bytes()
    assert store(tmp_path, own=True).complete
    assert (tmp_path / "features.bin").read_bytes() == (whole[0] / "features.bin").read_bytes()
    (tmp_path / "batches_done").unlink()
    (tmp_path / "features.bin").write_bytes(b"of other data, killed before the first note")
    assert store(tmp_path, own=True).complete
    assert (tmp_path / "features.bin").read_bytes() == (whole[0] / "features.bin").read_bytes()


def test_values_are_kept_in_the_precision_of_the_target(whole, tmp_path):
    """bfloat16 targets: half the size, rounded once."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), world.target_params())
    small = store(tmp_path, params=params)
    batch = world.batches().at(0)
    cached = small.at(0, batch)
    assert cached.features_BxTxF.dtype == jnp.bfloat16
    assert (tmp_path / "features.bin").stat().st_size * 2 == (whole[0] / "features.bin").stat().st_size
    exact = whole[1].at(0, batch).features_BxTxF
    assert np.abs(cached.features_BxTxF.astype(np.float32) - exact).max() < 0.1 * np.abs(exact).max()
