"""Saved state of an adaptation: checkpoints to resume from, and the adapted drafter for other programs."""

import contextlib
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax import files, sharding
from ppow_jax.errors import UserError
from ppow_jax.flags import require
from ppow_jax.models.drafter import Drafter
from ppow_jax.online.settings import OnlineSettings
from ppow_jax.online.steps import OnlineState
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.training.workdir import hold_directory
from ppow_jax.weights.drafters import export_drafter
from ppow_jax.weights.targets import Target

KEEP = 2  # checkpoints
DECISIVE = ("objective", "optimizer", "draft_steps")  # settings that a saved state belongs to


class Saved:
    """A directory with `state/`, checkpoints of an `OnlineState`, and `drafter/`, the drafter that serves.

    frozen: the drafter that adaptation began with. Raises UserError where the directory belongs to another one, to
    another target, or to other settings, and while another session uses it.
    """

    def __init__(self, directory: str | Path, settings: OnlineSettings, target: Target, frozen: Drafter):
        self.directory, self.target = files.writable_directory(directory), target
        about = {name: dataclasses.asdict(settings)[name] for name in DECISIVE}
        about |= {"target": target.name, "drafter": _checksum(frozen)}
        self._check(about)
        self._lock = contextlib.ExitStack()
        hold_directory(self._lock, self.directory, f"--online_save={directory}")
        self._checkpoints = Checkpoints(self.directory / "state", keep=KEEP)
        self.number = max(self._checkpoints.steps, default=0)

    def _check(self, about: dict[str, Any]) -> None:
        path = self.directory / "about.json"
        if not path.exists():
            files.write_atomic(path, json.dumps(about))
        try:
            kept = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--online_save={self.directory}: {path.name} is damaged ({error})") from None
        told = [f"{name} {kept.get(name)} (now {value})" for name, value in about.items() if kept.get(name) != value]
        rule = f"holds a state of another {', '.join(told)}; name another directory"
        require(not told, f"--online_save={self.directory}: {rule}")

    def restore(self, state: OnlineState) -> tuple[OnlineState, dict[str, Any]] | None:
        """The newest intact state and what was saved with it; None in a new directory."""
        found = self._checkpoints.restore_latest(sharding.like(state))
        return found and found[1:]

    def save(self, state: OnlineState, extra: dict[str, Any]) -> None:
        """Starts to save a state; a kill leaves the one before."""
        self.number += 1
        self._checkpoints.save(self.number, state, extra)

    def export(self, drafter: Drafter, dtype: str) -> None:
        """Replaces `drafter/`."""
        params, ids_W, embed_VxE = sharding.fetch((drafter.params, drafter.target_ids_W, drafter.embed_VxE))
        how = {"dtype": dtype, "target_name": self.target.name, "embed_VxE": embed_VxE}
        export_drafter(self.directory / "drafter", drafter.config, params, ids_W, **how)

    def close(self) -> None:
        """Waits for the last save; another session may use the directory then."""
        try:
            self._checkpoints.close()
        finally:
            self._lock.close()


def _checksum(drafter: Drafter) -> int:
    checksum = 0
    for name, value in sorted(sharding.fetch(drafter.params).items()):
        array = np.ascontiguousarray(value)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8), zlib.crc32(name.encode(), checksum))
    return checksum
