"""Runs what the default suite leaves out, file by file, for some minutes: `make test-rest`.

    python tests/support/run_rest.py --minutes=24

Every day begins with another file, so that all of them have their turn on a machine that cannot run them all. What was
not finished in time is named, and is no failure.
"""

import argparse
import concurrent.futures
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
LEFT_OUT = re.compile(r"mark\.(full|slow)\b|\bsuites\.keep\(")
MARKS = "full or slow"
NOTHING_SELECTED = 5  # pytest's exit code


def files() -> list[str]:
    """Test files that have tests beyond the default suite."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if LEFT_OUT.search(path.read_text())]


def in_order_of(day: datetime.date, names: list[str]) -> list[str]:
    """The files, beginning with another one every day."""
    first = day.toordinal() % len(names)
    return names[first:] + names[:first]


def run(name: str, seconds: float) -> tuple[str, int | None, str]:
    """(file, exit code or None if the time was up, output)."""
    if seconds <= 0:
        return name, None, ""
    command = [sys.executable, "-m", "pytest", "-q", "-m", MARKS, name]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return name, None, ""
    return name, 0 if process.returncode == NOTHING_SELECTED else process.returncode, output


def main(names: list[str], minutes: float, processes: int = 2) -> int:
    """Runs the files, `processes` at a time -> exit code: 1 if a test failed."""
    end = time.monotonic() + 60 * minutes
    print(f"beyond the default suite: {len(names)} files, {minutes:g} minutes, first {names[0]}", flush=True)
    failed, unfinished = [], []
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for name, code, output in pool.map(lambda name: run(name, end - time.monotonic()), names):
            if code is None:
                unfinished.append(name)
            elif code:
                failed.append(name)
                print(output, flush=True)
            else:
                print(f"{name}: {output.strip().splitlines()[-1]}", flush=True)
    if unfinished:
        print(f"no time was left for: {' '.join(unfinished)}")
    print(f"failed: {' '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=24)
    sys.exit(main(in_order_of(datetime.date.today(), files()), parser.parse_args().minutes))
