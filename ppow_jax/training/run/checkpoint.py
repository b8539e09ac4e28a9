"""Checkpoints that survive kills and detect damage, on top of Orbax.

Orbax writes to a temporary folder and renames it when it is complete, so a kill leaves the last good checkpoint.
It does not notice changed bytes within an array: a checksum per array is stored and compared on restore.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ppow_jax import distributed
from ppow_jax.errors import UserError
from ppow_jax.files import open_directory, reaching

logger = logging.getLogger(__name__)


KEEP = 3  # number of newest checkpoints that a stage keeps
KEEP_BEST = 2  # number of best checkpoints that it keeps


class _Damaged(Exception):
    """A checkpoint that cannot be read, or differs from the saved state."""


class Checkpoints:
    """The last `keep` checkpoints in one directory, one folder per step."""

    def __init__(self, directory: str | os.PathLike, keep: int = KEEP):
        """Opens or creates the directory, and removes what a kill left half-written.

        Raises:
          UserError: the directory cannot be written to.
        """
        self.directory = open_directory(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def steps(self) -> list[int]:
        """The saved steps, ascending."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Starts saving, and returns once `state` may be donated.

        Args:
          step: greater than every saved step (saving the same step again does nothing).
          state: pytree of arrays.
          extra: anything that JSON can represent (position in the data, scores, ...).

        Raises:
          UserError: this checkpoint or the one before could not be written; earlier good ones are unaffected.
        """
        steps = self.steps
        if steps and step == steps[-1]:
            return
        payload = json.dumps({"extra": extra or {}, "leaves": _describe(state, with_checksums=True)})
        seal = {"payload": payload, "checksum": zlib.crc32(payload.encode())}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(seal))
        if steps and step < steps[-1]:
            raise ValueError(f"step {step} does not come after the saved steps {steps}")
        with self._saving():
            self._manager.save(step, args=items)

    def read_extra(self, step: int) -> dict[str, Any]:
        """The `extra` of a saved step, without its arrays; raises UserError if it is damaged."""
        try:
            return self._payload(step)["extra"]
        except _Damaged as error:
            raise UserError(f"{self.directory / str(step)}: checkpoint is damaged ({error})") from None

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest intact checkpoint as (step, state, extra); None if none was ever saved.

        A damaged one is reported in a warning and renamed to `STEP.damaged`, and the one before is restored.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`) or arrays; shardings
            that it carries are honoured, and the first device is used otherwise.

        Raises:
          UserError: every checkpoint is damaged, or the newest holds a state of another shape.
        """
        damaged: list[str] = []
        for step in reversed(self.steps):
            try:
                state, extra = self._restore(step, abstract_state)
            except _Damaged as error:
                damaged.append(f"{self.directory / str(step)} ({error})")
                continue
            for place in damaged:
                logger.warning("checkpoint %s is damaged; resuming from step %d", place, step)
            self._set_aside(after=step)
            return step, state, extra
        if damaged:
            raise UserError(
                f"{self.directory}: every checkpoint is damaged: {'; '.join(damaged)}. "
                "Put a copy back, or remove the folder to start again"
            )
        return None

    def _payload(self, step: int) -> dict[str, Any]:
        try:
            seal = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
            if zlib.crc32(seal["payload"].encode()) != seal["checksum"]:
                raise _Damaged("its description was changed")
            return json.loads(seal["payload"])
        except (MemoryError, _Damaged):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds of errors
            raise _Damaged(_first_line(error)) from error

    def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        payload = self._payload(step)
        leaves = [leaf[:3] for leaf in payload["leaves"]]
        if leaves != (wanted := _describe(abstract_state)):
            there = next((leaf for leaf in leaves if leaf not in wanted), "nothing more")
            here = next((leaf for leaf in wanted if leaf not in leaves), "nothing more")
            raise UserError(
                f"{self.directory / str(step)}: holds another state: {there} there, {here} here; "
                "repeat the run with its own settings, or use another --workdir"
            )
        target = jax.tree.map(_with_sharding, abstract_state)
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._manager.restore(step, args=items).state
        except MemoryError:
            raise
        except Exception as error:
            raise _Damaged(_first_line(error)) from error
        for saved, read in zip(payload["leaves"], _describe(state, with_checksums=True), strict=True):
            if None not in (saved[3], read[3]) and saved != read:
                raise _Damaged(f"{saved[0]} was changed")
        return state, payload["extra"]

    def _set_aside(self, after: int) -> None:
        """Renames the folders of later steps, found to be damaged, so that Orbax ignores them."""
        for step in [step for step in self.steps if step > after]:
            folder = self.directory / str(step)
            number = len(list(self.directory.glob(f"{step}.damaged*")))
            if distributed.leader():
                folder.rename(folder.with_name(f"{step}.damaged" + (f"{number}" if number else "")))
        distributed.wait("set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until the last `save` is on disk; raises UserError if it could not be written."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns any failure to write into a UserError that names the last good checkpoint."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds of errors
            with reaching(self.directory):
                good = complete(self.directory)
            kept = f"{self.directory / str(good[-1])} is whole" if good else "there is none before"
            kept += "; free space or mend the disk, and run the same command again"
            raise UserError(f"{self.directory}: a checkpoint cannot be saved ({_reason(error)}); {kept}") from error

    def close(self) -> None:
        """Waits for the last save, and frees the threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it repeats the error that `wait` raised
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():  # the first error takes precedence
            self.close()


class Best:
    """The state with the highest score so far (and the one before it, in case it is damaged)."""

    def __init__(self, directory: str | os.PathLike):
        """Opens or creates the directory; raises UserError if it cannot be written to."""
        self._checkpoints = Checkpoints(directory, keep=KEEP_BEST)
        self.step: int | None = None
        self.score = -float("inf")
        for number in reversed(steps := self._checkpoints.steps):
            try:
                kept = self._checkpoints.read_extra(number)
            except UserError as error:
                if number == steps[0]:
                    raise
                logger.warning("%s; using the one before it", error)
            else:
                self.step, self.score = kept["step"], kept["score"]
                break

    def offer(self, step: int, score: float, state: Any, extra: dict[str, Any] | None = None) -> bool:
        """Saves `state` if `score` is above all before; returns whether it did.

        Blocks until it is on disk: after a kill, a later checkpoint of the run must never lack the best one before it.
        """
        if not score > self.score:
            return False
        # Folders are numbered by rank, not by step: after a resume, steps may occur a second time.
        number = max(self._checkpoints.steps, default=0) + 1
        self._checkpoints.save(number, state, {"step": step, "score": float(score), "extra": extra or {}})
        self._checkpoints.wait()
        self.step, self.score = step, float(score)
        return True

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The best as (step, state, extra), or None; raises as `Checkpoints.restore_latest`."""
        found = self._checkpoints.restore_latest(abstract_state)
        if found is None:
            return None
        _, state, kept = found
        self.step, self.score = kept["step"], kept["score"]
        return kept["step"], state, kept["extra"]

    def close(self) -> None:
        """Waits for the last save, and frees the threads."""
        self._checkpoints.close()

    def __enter__(self) -> "Best":
        return self

    def __exit__(self, *error: object) -> None:
        self._checkpoints.__exit__(*error)  # type: ignore[arg-type]


def complete(directory: pathlib.Path) -> list[int]:
    """The numbers of the complete checkpoints in a directory, ascending."""
    folders = (path for path in directory.glob("*") if path.name.isdigit())
    return sorted(int(path.name) for path in folders if ocp.utils.is_checkpoint_finalized(path))


def _describe(state: Any, with_checksums: bool = False) -> list[list[Any]]:
    """[path, dtype, shape] of every leaf, and its CRC-32 (None if other processes hold a part of it)."""
    described = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        description = [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
        described.append([*description, _checksum(leaf)] if with_checksums else description)
    return described


def _checksum(leaf: jax.Array | np.ndarray) -> int | None:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return None
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def _reason(error: BaseException) -> str:
    """The operating system's message, if known (TensorStore includes it in its own); else the first line."""
    said = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    return os.strerror(number) if number else _first_line(error)
