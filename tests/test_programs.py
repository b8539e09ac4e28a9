"""Programs are forgotten before they take all memory maps that a process may have, and made again."""

import dataclasses
import re

import numpy as np
import pytest
import small_model
import twelve_tokens as world

from ppow_jax import programs
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import adaptive_tree, off


def decoded():
    state = world.prefill(world.batches()[0], 0)
    how = {"speculation": off(), "sampling": Sampling()}
    return generate.decode(world.PARAMS, world.CONFIG, None, state, 100, **how).tokens_BxL


@pytest.fixture
def maps(tmp_path, monkeypatch):
    """Sets how many maps there are and may be; None: a system that does not say."""

    def set_to(now: int | None, limit: int) -> None:
        for name, text in (("MAPS", "line\n" * (now or 0)), ("LIMIT", f"{limit}\n")):
            path = tmp_path / name
            path.write_text(text)
            monkeypatch.setattr(programs, name, path if now is not None else tmp_path / "nowhere")

    return set_to


@pytest.mark.parametrize(("now", "forgets"), [(49, False), (51, True), (None, False)])
def test_room_is_made_when_half_of_the_maps_are_taken(maps, now, forgets):
    before = np.asarray(decoded())
    assert generate.decode._cache_size() > 0
    maps(now, 100)
    assert programs.make_room() == forgets
    assert (generate.decode._cache_size() == 0) == forgets
    np.testing.assert_array_equal(decoded(), before)


def test_a_program_more_is_noticed():
    """The files are read as they are here, if they are."""
    if programs.MAPS.exists() and programs.LIMIT.exists():
        assert not programs.make_room()  # far from the limit, where nothing was compiled before


def test_an_adaptive_program_copies_no_cache_and_lowers_a_layer_once_a_width():
    """Its widths are 0 (also of rounds that rest), 2, 4, 7 and 8; the caches are those of two layers."""
    speculation = adaptive_tree(3, 3, 8)
    model = dataclasses.replace(
        small_model.model(), cost_table={(speculation, 1, True): CostTable.of(0.1, 1 + 0.1 * np.arange(9))}
    )
    g = model.begin(model.job("abc", speculation), [0]).generation
    how = {"speculation": g.speculation, "sampling": g.sampling, "cost_table": g.cost_table}
    lowered = generate.decode.lower(g.params, g.config, g.drafter, g.state, 9, **how)
    calls = re.findall(r"call @(decoder_layer\w*)\(", lowered.as_text())
    assert len(set(calls)) <= 6 and len(calls) == 2 * 6
    copied = set(re.findall(r"= f32\[([\d,]+)\]\S* copy\(", lowered.compile().as_text()))
    assert not copied & {",".join(map(str, x.shape)) for x in g.state.target_kv[0]}
