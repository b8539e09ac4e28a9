"""`make test-rest`: every file has its turn, a failure is reported, and time that is up is none."""

import datetime
import sys

import run_rest


def test_every_file_is_first_on_some_day():
    names = run_rest.files()
    assert "tests/test_study.py" in names and "tests/test_output_distribution.py" in names
    assert "tests/test_rewards.py" not in names
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(n) for n in range(len(names))]
    orders = [run_rest.in_order_of(day, names) for day in days]
    assert sorted(order[0] for order in orders) == names and all(sorted(order) == names for order in orders)
    assert run_rest.in_order_of(days[0], names) == orders[0]


def test_failures_are_told_from_files_without_time(monkeypatch, capsys):
    codes = {"passes": 0, "fails": 1, "late": None}
    monkeypatch.setattr(run_rest, "run", lambda name, seconds: (name, codes[name], f"log of {name}\n"))
    assert run_rest.main(["passes", "late"], 1) == 0
    shown = capsys.readouterr().out
    assert "passes: log of passes" in shown and "no time was left for: late" in shown and "nothing failed" in shown
    assert run_rest.main(["passes", "fails", "late"], 1) == 1
    assert "failed: fails" in capsys.readouterr().out


def test_a_file_that_outlasts_the_time_is_ended(monkeypatch):
    monkeypatch.setattr(run_rest.subprocess, "Popen", forever(run_rest.subprocess.Popen))
    assert run_rest.run("tests/test_rewards.py", 0.01) == ("tests/test_rewards.py", None, "")
    assert run_rest.run("tests/test_rewards.py", -1.0) == ("tests/test_rewards.py", None, "")


def forever(popen):
    """Starts a process that never ends by itself, in place of pytest."""
    return lambda _, **how: popen([sys.executable, "-c", "import signal; signal.pause()"], **how)
