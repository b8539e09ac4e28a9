"""Room on the disk, before a run begins."""

import dataclasses
import logging
import os
import shutil

import jax
import numpy as np
import pytest
import small_run

from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.training.run import space
from ppow_jax.training.run.checkpoint import KEEP
from ppow_jax.training.start import new_config
from ppow_jax.training.texts import collect_questions
from ppow_jax.weights import targets


@pytest.fixture
def asked(tmp_path):
    """(settings, target, configuration of the drafter, prompts) of the small run."""
    settings = small_run.settings(tmp_path)
    target = targets.load("tiny", "float32")
    return settings, target, new_config(settings, target), collect_questions(settings, target)


def test_the_estimate_holds_what_a_run_writes(asked):
    settings, target, config, jobs = asked
    surely, at_most = space.needed_bytes(settings, config, target, jobs)
    written = sum(path.stat().st_size for path in small_run.whole().rglob("*") if path.is_file())
    drafter = sum(path.stat().st_size for path in (small_run.whole() / "drafter").iterdir())
    assert written < at_most
    # one checkpoint per folder more than stays, of each stage, and the slack: not much else is too much
    assert surely < 2 * written + space._SLACK and drafter < surely < at_most


def test_a_disk_without_room_is_refused_before_anything_is_written(asked, tmp_path, monkeypatch, caplog):
    settings, target, config, jobs = asked
    surely, at_most = space.needed_bytes(settings, config, target, jobs)

    def check(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)
        space.check_space(settings, tmp_path, config, target, jobs)

    with pytest.raises(UserError, match=rf"--workdir={tmp_path}: \d+ MB are free, but the run writes \d+ MB at least"):
        check(surely - 1)
    with caplog.at_level(logging.WARNING):
        check(at_most)
        assert not caplog.text
        check(at_most - 1)
    assert "are free, but the run writes up to" in caplog.text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1").write_bytes(os.urandom(1000))
    check(surely - 1000)  # what is there need not be written again


def test_a_run_in_a_bucket_needs_room_for_its_features_only(asked, tmp_path, monkeypatch):
    settings, target, config, jobs = asked
    features = sum(len(job.prompt) for job in jobs) * 4 * target.config.hidden_size * 4  # float32
    usage = shutil.disk_usage(tmp_path)
    asked_for = []

    def check(free, settings):
        there = usage._replace(free=free)
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: asked_for.append(path) or there)
        space.check_space(settings, "gs://bucket/run", config, target, jobs, tmp_path)

    check(features, settings)
    with pytest.raises(UserError, match=rf"--scratch={tmp_path}: \d+ MB are free, but the run writes \d+ MB at least"):
        check(features - 1, settings)
    check(0, dataclasses.replace(settings, cache_features=False))
    assert set(asked_for) == {tmp_path}


def test_features_and_answers_are_in_the_estimate(asked):
    settings, target, config, jobs = asked
    without = small_run.settings("x", cache_features="false")
    (s0, m0), (s1, m1) = (space.needed_bytes(s, config, target, jobs) for s in (without, settings))
    width = 4 * target.config.hidden_size * np.dtype(np.float32).itemsize
    prompts = sum(len(job.prompt) for job in jobs)
    assert s1 - s0 == prompts * width
    assert m1 - m0 == (prompts + len(jobs) * settings.answer_tokens) * width
    assert m0 - s0 == len(jobs) * settings.answer_tokens * 6


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"stages": "data,ppow", "estimator": "sampled"}, False),  # which needs the target's keys
        ({"stages": "data,ppow", "estimator": "sampled", "baselines": "cst"}, True),
        ({"stages": "data,ppow", "estimator": "exact", "group": 8, "windows": 6}, True),
        ({"stages": "data"}, False),
    ],
)
def test_the_estimate_has_features_where_a_stage_reads_them(asked, changes, reads):
    _, target, config, jobs = asked
    kept, without = (small_run.settings("x", cache_features=cache, **changes) for cache in ("true", "false"))
    surely = [space.needed_bytes(s, config, target, jobs)[0] for s in (kept, without)]
    width = 4 * target.config.hidden_size * np.dtype(np.float32).itemsize
    assert surely[0] - surely[1] == (sum(len(job.prompt) for job in jobs) * width if reads else 0)


def test_the_average_of_the_parameters_is_in_the_estimate(asked):
    settings, target, config, jobs = asked
    params = jax.tree.leaves(jax.eval_shape(lambda key: drafting.init(key, config), jax.random.key(0)))
    more = small_run.settings("x", average_decay=0.9, baselines="cst"), small_run.settings("x", baselines="cst")
    (with_it, _), (without, _) = (space.needed_bytes(s, config, target, jobs) for s in more)
    assert with_it - without == 2 * (KEEP + 1) * 4 * sum(leaf.size for leaf in params)  # of two stages, not of stage 1
