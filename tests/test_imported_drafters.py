"""A drafter as unlike a new one as files permit: read, trained with PPOW, written, read again."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import small_world as world
from golden import models

from ppow_jax.models.drafter_config import parameter_shapes
from ppow_jax.training import initialise
from ppow_jax.training.results import cast
from ppow_jax.training.steps import ppow_sampled
from ppow_jax.training.steps.state import TrainState
from ppow_jax.weights.drafters import export_drafter
from ppow_jax.weights.loading import load_drafter
from ppow_jax.weights.targets import Target

CONFIG = dataclasses.replace(
    initialise.drafter_config(world.CONFIG, 20, world.FEATURE_LAYERS),
    hidden_size=24,
    head_dim=6,
    num_layers=2,
    norm_before_fc=True,
    norm_output=True,
    norm_before_residual=True,
    attention_bias=True,
    output_bias=True,
    own_embed=True,
)
ROLLOUTS = dataclasses.replace(world.ROLLOUTS, adaw_start=0)


@pytest.mark.full
def test_it_is_trained_with_ppow_and_written_again(tmp_path):
    params, embed_VxE = models.drafter_params(CONFIG, seed=8), models.matrix(np.random.RandomState(9), 61, 24)
    ids_W = initialise.choose_vocabulary(world.examples(), world.CONFIG.vocab_size, 20)
    how = {"format": "speculators", "dtype": "float32", "embed_VxE": embed_VxE}
    export_drafter(tmp_path / "theirs", CONFIG, params, ids_W, **how)
    target = Target("small", world.CONFIG, world.target_params(), None)
    start = load_drafter(tmp_path / "theirs", target, "float32")
    assert start.config == CONFIG

    optimizer = optax.adamw(1e-3)
    state, metrics = ppow_sampled.train_step(
        TrainState.create(start.params, optimizer),
        start.spec,
        world.target_params(),
        world.batch(),
        jax.random.key(0),
        config=world.CONFIG,
        optimizer=optimizer,
        rollouts=ROLLOUTS,
        policy=ppow_sampled.PolicySettings(0.2, 0.5, 1),
        answers_are_greedy=True,
    )
    assert metrics["windows"] > 0 and metrics["gradient_norm"] > 0
    np.testing.assert_allclose(metrics["ratio"], 1.0, atol=1e-5)  # redrafting is what drafting was, in every layer
    for name, value in state.params.items():
        assert np.isfinite(value).all() and not np.array_equal(value, params[name]), name

    trained = start.replace(params=state.params)
    export_drafter(tmp_path / "ours", CONFIG, trained.params, ids_W, dtype="float32", embed_VxE=trained.embed_VxE)
    again = load_drafter(tmp_path / "ours", target, "float32")
    assert again.config == CONFIG and again.params.keys() == parameter_shapes(CONFIG).keys()
    for name, value in again.params.items():
        np.testing.assert_array_equal(value, state.params[name])
    np.testing.assert_array_equal(again.embed_VxE, embed_VxE)
    half = cast(again, "bfloat16").params
    assert {name for name, value in half.items() if value.dtype == np.float32} == {
        name for name in half if "norm" in name or "bias" in name
    }
