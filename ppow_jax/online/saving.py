"""Saved state of an adaptation: checkpoints to resume from, and the adapted drafter for other programs."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax import files, sharding
from ppow_jax.flags import require
from ppow_jax.models.drafter import Drafter
from ppow_jax.online.settings import OnlineSettings
from ppow_jax.online.steps import OnlineState
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.weights.drafters import export_drafter
from ppow_jax.weights.targets import Target

KEEP = 2  # checkpoints
DECISIVE = ("objective", "optimizer", "draft_steps")  # settings that a saved state belongs to


class Saved:
    """A directory with `state/`, checkpoints of an `OnlineState`, and `drafter/`, the drafter that serves.

    frozen: the drafter that adaptation began with. Raises UserError where the directory belongs to another one, to
    another target, or to other settings.
    """

    def __init__(self, directory: str | Path, settings: OnlineSettings, target: Target, frozen: Drafter):
        self.directory, self.target = files.writable_directory(directory), target
        about = {name: dataclasses.asdict(settings)[name] for name in DECISIVE}
        about |= {"target": target.name, "drafter": _checksum(frozen)}
        self._check(about)
        self._checkpoints = Checkpoints(self.directory / "state", keep=KEEP)
        self.number = max(self._checkpoints.steps, default=0)

    def _check(self, about: dict[str, Any]) -> None:
        path = self.directory / "about.json"
        if not path.exists():
            files.write_atomic(path, json.dumps(about))
        kept = json.loads(path.read_text())
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
        """Waits for the last save."""
        self._checkpoints.close()


def _checksum(drafter: Drafter) -> int:
    checksum = 0
    for name, value in sorted(sharding.fetch(drafter.params).items()):
        array = np.ascontiguousarray(value)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8), zlib.crc32(name.encode(), checksum))
    return checksum
