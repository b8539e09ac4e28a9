"""Progress without the time of compiling, and lines while something takes long."""

import io
import logging
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from ppow_jax import compiling, progress


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="ppow_jax.progress")
    return lambda: [record.message for record in caplog.records]


def test_compiling_is_counted_and_noticed():
    before = compiling.seconds()
    noticed = []
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x.T)).lower(jnp.ones((8, 8)))
    noticed.append(compiling.running())
    compiling.not_running()
    noticed.append(compiling.running())
    jax.jit(lambda x: jnp.cos(x) @ jnp.sin(x.T))(jnp.ones((8, 8)))
    assert noticed[0] > 0 and noticed[1] == 0 == compiling.running()
    assert compiling.seconds() > before


@pytest.mark.parametrize("terminal", [False, True])
def test_compiling_does_not_slow_the_estimate(terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    total = [0.0]
    monkeypatch.setattr(compiling, "seconds", lambda: total[0])
    with progress.bar(30, "training") as bar:
        now = [1000.0]
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for compiled in (100, 0, 0, 40, 0):
            total[0] += compiled
            now[0] += compiled + 2
            bar.update(2)
        assert bar.format_dict["elapsed"] == 10 and bar.apart == 140
        assert "00:20 left" in str(bar) if not terminal else "00:10<00:20" in str(bar)


def test_lines_tell_that_a_program_is_compiled(logged, monkeypatch):
    monkeypatch.setattr(compiling, "running", lambda: 14.2)
    with progress.bar(3, "training", every=0.01) as bar:
        bar._shown_at -= 1
        bar._tick()
        bar.apart = 14.2
        bar.update(3)
    lines = logged()
    assert lines[0] == "training: compiling... 14 s"
    assert lines[-1].startswith("training: 3/3 (100%)") and lines[-1].endswith(" left (and 14 s of compiling)")


def test_a_bar_tells_that_a_program_is_compiled(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(compiling, "running", lambda: 3.0)
    with progress.bar(2, "training") as bar:
        bar._tick()
        assert "training, compiling... 3 s" in terminal.getvalue()
        bar.update(2)
    assert terminal.getvalue().split("\r")[-1].startswith("training: 100%")


def test_an_activity_is_renewed_until_it_ends(logged):
    with progress.activity("loading", every=0.05):
        time.sleep(0.2)
    lines = logged()
    assert lines[:2] == ["loading", "loading... 0 s"] and 2 <= len(lines) <= 5
    time.sleep(0.1)
    assert logged() == lines


def test_an_activity_leaves_nothing_in_a_terminal(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.activity("loading"):
        pass
    assert "loading" in terminal.getvalue() and terminal.getvalue().split("\r")[-1].strip() == ""
