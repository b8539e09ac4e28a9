"""Training runs in processes that end at a chosen moment: before their n-th change of a file.

Killing between two steps of writing a file is what finds mistakes, and no clock hits it. Python reports to audit
hooks every file that it opens for writing, renames or removes, just before it does so: the n-th such report is a moment
that can be chosen. Processes are forked from a server that has imported everything, so that many deaths are cheap.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Sequence

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclasses.dataclass(frozen=True)
class Death:
    """A signal before the n-th change of a file in the workdir (from 1 on) that matches."""

    change: int | None = None
    pattern: str = ""
    signum: int = signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Life:
    """The end of a process: its exit code, its log, and the changes of files that it came to, one `event path` each."""

    code: int
    log: str
    changes: tuple[str, ...]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["ppow_jax.training.pipeline", "ppow_jax.cli", "experiments.train", "transformers"])


def live(argv: Sequence[str], cache: pathlib.Path, place: pathlib.Path, death: Death | None = None) -> Life:
    """Runs `experiments.train` with these arguments until it ends. place: an existing directory for log and changes."""
    process = _context.Process(target=_train, args=(list(argv), str(cache), str(place), death or Death()))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        raise AssertionError("it did not end:\n" + (place / "log").read_text())
    return Life(process.exitcode, (place / "log").read_text(), tuple((place / "changes").read_text().splitlines()))


def _train(argv: list[str], cache: str, place: str, death: Death) -> None:
    log = os.open(f"{place}/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from ppow_jax import cli, flags
    from ppow_jax.training.settings import TrainSettings

    settings = flags.parse(TrainSettings, argv)
    _watch(settings.workdir, place, death)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from experiments import train

    cli.run(train.main, TrainSettings, argv=argv)


def _watch(workdir: str, place: str, death: Death) -> None:
    record = os.open(f"{place}/changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    count, lock = 0, threading.Lock()

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not path.startswith(workdir):
            return
        change = f"{event} {path[len(workdir) + 1 :]}"
        with lock:
            os.write(record, f"{change}\n".encode())
            matches = bool(re.search(death.pattern, change))
            count += matches
            if matches and count == death.change:
                os.kill(os.getpid(), death.signum)

    sys.addaudithook(hook)
