"""An interpreter for `--engine_python` that runs no engine: it answers a driver's call with recorded JSON."""

import json
import os
import stat
import sys
from pathlib import Path

SCRIPT = """#!{python}
import json, sys, time
driver, job_path, answers_path = sys.argv[1:]
recorded = json.load(open({recorded!r}))
job = json.load(open(job_path))
print("a line of its log")
if recorded.get("exit"):
    print(recorded["said"])
    sys.exit(recorded["exit"])
time.sleep(recorded.get("seconds", 0))
name = "plain" if job["plain"] else job["drafter"].rpartition("/")[2]
json.dump(recorded["answers"][name], open(answers_path, "w"))
"""


def write(directory: Path, recorded: dict) -> str:
    """Writes the interpreter -> its path. recorded: {answers: {plain, flat, speculators}}, or {exit, said}."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "recorded.json"
    path.write_text(json.dumps(recorded))
    program = directory / "python"
    program.write_text(SCRIPT.format(python=sys.executable, recorded=str(path)))
    os.chmod(program, stat.S_IRWXU)
    return str(program)
