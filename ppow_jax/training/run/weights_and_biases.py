"""The metrics as a run of Weights & Biases, beside metrics.jsonl."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.files import open_directory, write_atomic

PROJECT = "ppow_jax"


def require_wandb() -> Any:
    """The module `wandb`; raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: needs the package wandb: pip install 'ppow_jax[wandb]'") from None
    return wandb


class WeightsAndBiases:
    """One run of the service per workdir; a resumed workdir continues it, because WORKDIR/wandb.json holds its id.

    A metric `loss` of stage `ppow` becomes `ppow/loss` over `ppow/step`. The environment variables of wandb apply:
    WANDB_PROJECT (ppow_jax if not set), WANDB_ENTITY, WANDB_MODE=offline, ...
    """

    def __init__(self, workdir: str | os.PathLike, settings: Any, scratch: str | os.PathLike | None = None):
        """Starts or continues the run. settings: dataclass that is stored as the run's configuration. scratch: for
        wandb's own files, instead of the workdir.

        Raises:
          UserError: wandb is not installed, or refuses the run (no key, no network).
        """
        wandb, workdir = require_wandb(), open_directory(workdir)
        record = workdir / "wandb.json"
        self._continued = record.exists()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=workdir.resolve().name,
                dir=str(scratch or workdir),
                id=json.loads(record.read_text())["id"] if self._continued else None,
                resume="allow",
                config=dataclasses.asdict(settings),
            )
        except wandb.Error as error:
            raise UserError(f"--wandb: {' '.join(str(error).split())}; WANDB_MODE=offline needs no account") from None
        write_atomic(record, json.dumps({"id": self._run.id}) + "\n")
        self._sent: dict[str, int] = {}  # the last step of each stage that the service has

    def resume(self, stage: str, step: int, written: int) -> None:
        """Continues the stage; steps that the service has from before are equal, and are not sent again."""
        self._sent[stage] = written if self._continued else step
        self._run.define_metric(f"{stage}/step", hidden=True)
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
        """Sends numbers as they are, lists as one number per element (`name/1`, ...); None and texts are left out."""
        if stage not in self._sent:
            self.resume(stage, step - 1, step - 1)
        if step <= self._sent[stage]:
            return
        row: dict[str, Any] = {f"{stage}/step": step}
        for name, value in metrics.items():
            if value is None or isinstance(value, str):
                continue
            values = np.asarray(value, np.float64)
            if values.ndim == 0:
                row[f"{stage}/{name}"] = float(values)
            else:
                row |= {f"{stage}/{name}/{i}": part for i, part in enumerate(values.reshape(-1).tolist(), 1)}
        self._run.log(row)
        self._sent[stage] = step

    def flush(self) -> None:
        """Does nothing: wandb writes in a process of its own."""

    def close(self) -> None:
        """Ends the run; everything is sent before this returns."""
        self._run.finish()
