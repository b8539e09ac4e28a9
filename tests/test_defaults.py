"""All programs start from the same mode and sizes."""

import dataclasses

import pytest
from small_model import model

from experiments import evaluate, generate, serve
from ppow_jax import cli, defaults
from ppow_jax.errors import UserError
from ppow_jax.inference.model import SPECULATIONS
from ppow_jax.speculation.settings import adaptive_tree, chain, of_mode, tree
from ppow_jax.training.settings import TrainSettings


def test_every_program_has_the_same_defaults():
    adaptive = adaptive_tree(branch=3, depth=4, nodes=15)
    assert SPECULATIONS["adaptive"] == adaptive and SPECULATIONS["chain"] == chain(4)
    assert SPECULATIONS["tree"] == tree(branch=3, depth=4, nodes=15)
    train = TrainSettings(workdir="x")
    assert [of_mode(mode, 4) for mode in train.modes] == [adaptive]  # all drafts are the drafter's
    assert evaluate.Settings().speculations() == [SPECULATIONS["mixture"]] == [SPECULATIONS[defaults.MODE]]
    assert evaluate.Settings(modes=evaluate.MODES).speculations() == [SPECULATIONS[mode] for mode in evaluate.MODES]
    assert (defaults.mode(drafter=True), defaults.mode(drafter=False)) == ("mixture", "ngram")
    assert model().resolve(None) == SPECULATIONS["mixture"]
    assert dataclasses.replace(model(), drafter=None).resolve(None) == SPECULATIONS["ngram"]
    for mode, speculation in SPECULATIONS.items():
        settings = generate.Settings(prompt="a", speculation=mode)
        assert settings.sized(mode) == speculation


def test_a_window_means_the_same_in_all_modes():
    modes = ("chain", "adaptive", "tree")
    asked = evaluate.Settings(modes=modes, window=(2,)).speculations()
    assert asked == [chain(2), adaptive_tree(3, 2, 12), tree(3, 2, 12)]  # 12: all nodes of two levels
    for mode, expected in zip(modes, asked, strict=True):
        settings = generate.Settings(prompt="a", speculation=mode, window=2)
        assert settings.sized(mode) == expected
    sizes = {"tree_depth": (3,), "tree_nodes": (5, 8), "window": (2,)}
    deeper = evaluate.Settings(modes=("tree", "chain"), **sizes).speculations()
    assert deeper == [tree(3, 3, 5), tree(3, 3, 8), chain(2)]


@pytest.mark.parametrize(
    "several", [{"temperature": (0.0, 0.5)}, {"batch_size": (1, 2)}, {"temperature": (0.5,), "seeds": (0, 1)}], ids=str
)
def test_a_datastore_is_for_prompts_that_are_measured_once(several):
    with pytest.raises(UserError, match="--datastore=x: needs a single --temperature, --batch_size and --seeds"):
        evaluate.Settings(datastore="x", **several)
    assert evaluate.Settings(datastore="x", seeds=(0, 1)).datastore == "x"  # greedy: decoded once


def test_help_shows_them():
    for module in (evaluate, generate, serve):
        text = " ".join(cli.usage(module.main, module.Settings).split())
        sizes = f"By default {defaults.WINDOW}." in text and f"By default {defaults.NODES}." in text
        assert sizes or module is serve  # has the sizes of each mode by name
        assert f"By default {defaults.MODE} if there is a drafter, else ngram." in text or module is evaluate
