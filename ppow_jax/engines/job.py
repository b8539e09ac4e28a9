"""Runs an engine in its own environment, as a program that reads a job and writes answers, both as JSON.

Job: target and drafter (directories), plain (decode without the drafter), window, dtype, prompts (lists of token ids),
max_new_tokens, max_length (positions that the longest text needs), temperatures, seeds, stop_ids, and code (a directory
with the engine's code, or None). Answers: engine, version, and runs, one for each temperature and seed:
{temperature, seed, answers: [{tokens, seconds, rounds, accepted}]}. rounds: verifications; accepted: numbers of
rounds that accepted at least 1, 2, .. K drafted tokens, or None where the engine does not tell.
"""

import dataclasses
import json
import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.flags import require

log = logging.getLogger(__name__)
DRIVERS = Path(__file__).parent / "drivers"
REQUIREMENTS = Path(__file__).parent / "requirements"  # of the environments that `make engines` builds
ENVIRONMENTS = Path(".engines")
NOT_INSTALLED = 3  # exit code of a driver


@dataclasses.dataclass(frozen=True)
class Engine:
    """A serving engine.

    formats: of drafters that it reads, see `weights.drafters.FORMATS`. greedy_drafts: above temperature 0 its drafter
    proposes its most probable token; otherwise it samples. makes: the Makefile builds its environment.
    needs_code: it is run from a directory with its code. note: one line about what runs it needs.
    """

    name: str
    driver: str
    formats: tuple[str, ...]
    greedy_drafts: bool
    makes: bool = False
    needs_code: bool = False
    note: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of its environment, where none is named."""
        return ENVIRONMENTS / self.name / "bin" / "python"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vllm_driver.py", ("flat", "speculators"), greedy_drafts=True, makes=True),
        Engine(
            "eagle",
            "eagle_driver.py",
            ("flat",),
            greedy_drafts=True,
            needs_code=True,
            note="pip install torch transformers==4.53.3 safetensors, in an environment of its own",
        ),
        Engine("sglang", "sglang_driver.py", ("flat",), greedy_drafts=True, note="pip install sglang, and a GPU"),
        Engine("sglang-jax", "sglang_jax_driver.py", ("flat",), greedy_drafts=True, note="its repository, and a TPU"),
    )
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of an engine; see the module."""

    target: str
    drafter: str
    plain: bool
    window: int
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    max_length: int
    stop_ids: Sequence[int]
    temperatures: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0,)
    dtype: str = "float32"
    code: str | None = None


def find_python(engine: Engine, named: str | None) -> Path:
    """The engine's interpreter. Raises UserError, with the way to get it, if there is none."""
    path = engine.python if named is None else Path(named).expanduser()
    if path.is_file() and os.access(path, os.X_OK):
        return path.absolute()  # not resolved: a link's own place decides which packages it sees
    raise UserError(f"--engine_python={path}: there is no such program; {how_to_get(engine)}, or name another Python")


def how_to_get(engine: Engine) -> str:
    """The way to an environment of the engine."""
    return "`make engines` builds it (a few minutes)" if engine.makes else f"it takes {engine.note}"


def check_code(engine: Engine, code: str | None) -> str | None:
    """The directory of the engine's code, absolute; None for engines that are installed. Raises UserError."""
    if not engine.needs_code:
        require(code is None, f"--engine_code={code}: only for --engine=eagle; {engine.name} is an installed package")
        return None
    rule = "name a directory of the official EAGLE code (github.com/SafeAILab/EAGLE), the one that holds eagle/model"
    require(code is not None, f"--engine_code: {rule}")
    path = Path(code).expanduser()
    require((path / "eagle" / "model" / "ea_model.py").is_file(), f"--engine_code={code}: {rule}")
    return str(path.absolute())


def run(engine: Engine, python: Path, job: Job, directory: Path, what: str, timeout: float) -> dict[str, Any]:
    """Runs a job -> its answers; the files, and the engine's log, stay in `directory` as WHAT.*.

    Raises:
      UserError: the engine is not in that environment, fails, takes more than `timeout` seconds, or answers nonsense.
    """
    paths = {kind: directory / f"{what}.{kind}" for kind in ("job.json", "answers.json", "log")}
    paths["job.json"].write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    paths["answers.json"].unlink(missing_ok=True)
    command = [str(python), str(DRIVERS / engine.driver), str(paths["job.json"]), str(paths["answers.json"])]
    log.info("%s: %d prompts, %s", engine.name, len(job.prompts), what)
    with open(paths["log"], "wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(), cwd=directory,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"--engine_python={python}: cannot be started ({error.strerror})") from None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--engine={engine.name}: took more than {timeout:g} s ({what}); allow more with --timeout, or fewer"
                " prompts with --num_prompts"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
                process.wait()
    last = last_line(paths["log"])
    if code == NOT_INSTALLED:
        raise UserError(f"--engine_python={python}: has no {engine.name} ({last}); {how_to_get(engine)}")
    if code:
        raise UserError(f"--engine={engine.name}: failed with exit code {code} ({what}): {last} [{paths['log']}]")
    return read_answers(engine, paths["answers.json"], job)


def environment() -> dict[str, str]:
    """Environment variables for another interpreter: those of this one, without what selects our own packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV", "XLA_FLAGS", "JAX_PLATFORMS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def last_line(path: Path) -> str:
    """The last line of a log that is not blank, shortened."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def read_answers(engine: Engine, path: Path, job: Job) -> dict[str, Any]:
    """The answers of a run, checked against the job. Raises UserError for a file that does not hold them."""
    wrong = f"--engine={engine.name}: {path.name} must hold an answer to each prompt at each temperature"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs = found["runs"]
        wanted = [(t, seed) for t in job.temperatures for seed in (job.seeds if t else job.seeds[:1])]
        right = [(run["temperature"], run["seed"]) for run in runs] == wanted
        for run in runs:
            right &= len(run["answers"]) == len(job.prompts)
            for answer in run["answers"]:
                right &= bool(answer["tokens"]) and all(type(token) is int for token in answer["tokens"])
                accepted = answer["accepted"]
                right &= accepted is None or (len(accepted) == job.window and type(answer["rounds"]) is int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{wrong} ({type(error).__name__}: {error})") from None
    require(right, wrong)
    return found
