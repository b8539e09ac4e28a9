"""The directory of a run: new, or with results of an earlier command of the same settings."""

import contextlib
import dataclasses
import datetime
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

from ppow_jax import distributed, files, flags
from ppow_jax.errors import UserError
from ppow_jax.training.run.checkpoint import complete
from ppow_jax.training.settings import TrainSettings

log = logging.getLogger(__name__)
S = TypeVar("S", bound=TrainSettings)
TRAINED = ("supervised", "ppow")  # the stages that train a drafter


def open_workdir(settings: TrainSettings) -> Path:
    """Creates the workdir, or checks that it holds a run of the same settings, except for those that may change."""
    flags.require(bool(settings.workdir), "--workdir: must name the directory for everything that the run writes")
    workdir = files.open_directory(settings.workdir)
    flagfile = workdir / "flags.txt"
    if flagfile.exists():
        before = _kept_settings(type(settings), flagfile)
        changed = flags.differences(before, settings)
        if changed:
            raise UserError(
                f"--workdir={settings.workdir}: holds a run with {', '.join(changed)}; take another directory"
            )
    elif workdir.exists() and any(not path.name.startswith(".") for path in workdir.iterdir()):
        raise UserError(
            f"--workdir={settings.workdir}: is not empty and holds no run (no flags.txt); take another directory"
        )
    stages, trained = set(settings.stages), [s for s in TRAINED if has_best(workdir, s)]
    if stages & {"evaluate", "export"} and not stages & set(TRAINED) and not trained:
        rule = f"--workdir={settings.workdir} holds no checkpoint of {' or '.join(TRAINED)}; name a stage that trains"
        raise UserError(f"--stages={','.join(settings.stages)}: {rule}")
    return workdir


def scratch_of(settings: TrainSettings) -> Path | None:
    """This process's own directory for what can be computed again; None where the workdir is on this machine itself."""
    if not files.is_remote(settings.workdir):
        return None
    parent = settings.scratch or Path(tempfile.gettempdir()) / f"ppow_jax-{os.getuid()}"
    name = settings.workdir.removeprefix("gs://")
    return files.writable_directory(Path(parent) / name / f"process-{jax.process_index()}")


@contextlib.contextmanager
def hold_workdir(settings: TrainSettings) -> Iterator[Path]:
    """Opens the workdir (see `open_workdir`) for this run alone: until it ends, a second command raises UserError.

    A bucket has no locks: there, a lock on the scratch directory refuses a second command on this machine only.
    """
    workdir = open_workdir(settings)
    with contextlib.ExitStack() as stack:
        given = f"--workdir={settings.workdir}"
        distributed.by_leader(lambda: hold_directory(stack, scratch_of(settings) or workdir, given))
        yield workdir


def hold_directory(stack: contextlib.ExitStack, directory: Path, given: str) -> None:
    """Locks a directory, where its file system can, until `stack` is closed or the process ends, however that ends.

    given: the flag that names it, in messages. Raises UserError if another command holds it.
    """
    opened = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, opened)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        rule = "another command is running there, or has not finished stopping; wait until it ends"
        raise UserError(f"{given}: {rule}") from None
    except OSError as error:
        log.warning("%s: cannot be locked (%s); run one command at a time there", given, error.strerror)


def _kept_settings(kind: type[S], flagfile: Path) -> S:
    try:
        return flags.read_flagfile(kind, flagfile)
    except UserError as error:
        rule = "take another directory, or remove what this version does not know from the file"
        raise UserError(f"--workdir={flagfile.parent}: holds a run of another version ({error}); {rule}") from None


def fix_date(settings: S) -> S:
    """The settings with the date that chat templates are given: --date, that of the workdir's run, or today.

    A run from before the date was recorded resumes without one.
    """
    if settings.date is not None or settings.workdir is None:
        return settings
    flagfile = files.at(os.path.expanduser(settings.workdir)) / "flags.txt"
    today = datetime.date.fromordinal(int(distributed.from_leader(datetime.date.today().toordinal())))
    with files.reaching(settings.workdir):
        date = _kept_settings(type(settings), flagfile).date if flagfile.exists() else today.isoformat()
    return dataclasses.replace(settings, date=date)


def has_best(workdir: Path, stage: str) -> bool:
    """True if a stage has left a best checkpoint."""
    return bool(complete(workdir / stage / "best"))
