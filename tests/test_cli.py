import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import pytest

from ppow_jax import cli, progress
from ppow_jax.errors import UserError
from ppow_jax.flags import check_fields, field
from ppow_jax.training.run.preemption import EXIT_SIGINT, EXIT_SIGTERM, StopSignal

ROOT = pathlib.Path(__file__).parent.parent

PROGRAM = '''
"""Does nothing, slowly."""

import dataclasses
import logging
import sys

from ppow_jax import cli
from ppow_jax.flags import check_fields, field


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = field(3, "How often nothing is done. " * 5, low=1, group="Work")
    dry: bool = field(False, "Do not even do that.", group="Work")
    mode: str = field("slow", "AcceptanceStats.", choices=("slow", "fast"), group="Look")
    layers: tuple[int, ...] = field((1, 2), "Layers.", group="Look")

    def __post_init__(self):
        check_fields(self)


def main(settings):
    logging.getLogger(__name__).info("steps %d", settings.steps)
    logging.getLogger("other").info("not shown")
    assert not {"jax", "matplotlib", "numpy"} & set(sys.modules), "slow imports"


if __name__ == "__main__":
    cli.run(main, Settings)
'''


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = field(3, "Steps.", low=1)

    def __post_init__(self):
        check_fields(self)


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def exit_code(main, *argv: str) -> int | None:
    with pytest.raises(SystemExit) as caught:
        cli.run(main, Settings, argv=argv)
    return caught.value.code


def test_program_in_a_process_of_its_own(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*argv):
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "COLUMNS": "80"}
        command = [sys.executable, "-m", "program", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    good = run("--steps=5")
    assert good.returncode == 0 and "steps 5" in good.stderr and "not shown" not in good.stderr
    bad = run("--stpes=5")
    assert bad.returncode == 2
    assert bad.stderr == "error: --stpes: unknown flag; did you mean --steps?\n"
    shown = run("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert shown.stdout.startswith("Does nothing, slowly.\n\nusage: python -m program [--name=value ...]")
    forms = ("--[no]dry", "--mode=slow|fast", "--layers=N,...")
    for part in ("\nWork:\n  --steps=N  ", "(default: 3)", "(default: 1,2)", *forms):
        assert part in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_exit_codes(capsys):
    seen = []
    assert exit_code(seen.append, "--steps=4") is None and seen == [Settings(4)]
    assert exit_code(lambda settings: 143) == 143

    def mistake(settings):
        raise UserError("data.jsonl:7: must be an object")

    assert exit_code(mistake) == 2
    assert capsys.readouterr().err == "error: data.jsonl:7: must be an object\n"
    assert exit_code(mistake, "--steps=0") == 2
    assert capsys.readouterr().err == "error: --steps=0: must be at least 1\n"

    def interrupt(settings):
        raise KeyboardInterrupt

    assert exit_code(interrupt) == 130
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda settings: 1 // 0, Settings, argv=[])


def test_places_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    cli.check_output("--output", None)
    cli.check_output("--output", str(tmp_path / "new" / "result.json"))
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match=r"--output=.*: must be a file, but is a directory"):
        cli.check_output("--output", str(tmp_path))
    with pytest.raises(UserError, match=r"--output=.*/file/x.json: .*must be a directory that can be written to"):
        cli.check_output("--output", str(tmp_path / "file" / "x.json"))


def test_compiled_programs_are_kept_where_asked(tmp_path, monkeypatch):
    import jax

    given = {}
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    cli.keep_compiled(None)
    assert not given
    cli.keep_compiled(str(tmp_path / "cache"))
    assert given["jax_compilation_cache_dir"] == str(tmp_path / "cache") and (tmp_path / "cache").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--compilation_cache=.*file: .*must be a directory that can be written to"):
        cli.keep_compiled(str(tmp_path / "file"))


def test_plain_progress_logs_a_line_every_few_seconds_and_at_the_end(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="ppow_jax.progress")
    now = [1000.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with progress.bar(100, "training", initial=20, every=10) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(30):
            now[0] += 2.0
            bar.update()
            bar.set_postfix(loss=1.5)
        bar.update(50)
    lines = [record.message for record in caplog.records]
    assert [line.partition(" (")[0] for line in lines] == [f"training: {n}/100" for n in (25, 30, 35, 40, 45, 50, 100)]
    assert lines[1] == "training: 30/100 (30%),  2.00s/ step, 02:20 left, loss=1.5"
    assert lines[-1] == "training: 100/100 (100%),  1.33 step/s, 00:00 left, loss=1.5"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_off_the_clock_does_not_slow_the_estimate(terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.bar(30, "evaluation") as bar:
        now = [1000.0]
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(5):
            with progress.off_the_clock(bar):
                now[0] += 100  # compiling
            now[0] += 2
            bar.update(2)
        assert bar.format_dict["elapsed"] == 10
        assert "00:20 left" in str(bar) if not terminal else "00:10<00:20" in str(bar)


def test_progress_cut_short_says_where_it_stopped(caplog):
    caplog.set_level(logging.INFO, logger="ppow_jax.progress")
    with contextlib.suppress(KeyError), progress.bar(10, "data") as bar:
        bar.update(3)
        raise KeyError
    assert [record.message[:17] for record in caplog.records] == ["data: 3/10 (30%),"]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar(2, "data", "row") as bar:
        bar.update(2)
    shown = terminal.getvalue()
    assert "\r" in shown and "data: 100%" in shown and "2/2" in shown


def test_a_signal_asks_and_a_second_one_interrupts():
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested and stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.exit_code == EXIT_SIGTERM == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == EXIT_SIGINT == 130


def test_stop_signal_outside_the_main_thread_does_nothing():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
