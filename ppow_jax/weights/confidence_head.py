"""The confidence head of a drafter on disk: `confidence_head.json`, beside the drafter's own files.

Loaders elsewhere refuse tensors that they do not know, so it is no part of the weights; nobody else reads this file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.files import write_atomic
from ppow_jax.models import confidence

FILE = "confidence_head.json"


def save_head(directory: str | Path, params: Mapping[str, Any]) -> None:
    """Writes the head that a drafter's parameters hold, if they hold one; a former one goes."""
    path = Path(directory) / FILE
    if not confidence.has_head(params):
        path.unlink(missing_ok=True)
        return
    head = {name: np.asarray(params[name], np.float32).tolist() for name in confidence.NAMES}
    write_atomic(path, json.dumps(head) + "\n")


def load_head(directory: str | Path, width: int) -> dict[str, np.ndarray]:
    """The head of a drafter whose outputs have `width` numbers, {} where there is none.

    Raises UserError for a broken file, naming what is wrong with it.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
        head = {name: np.asarray(stored[name], np.float32) for name in confidence.NAMES}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a confidence head ({type(error).__name__}: {error})") from None
    for name, value in head.items():
        shape = confidence.shapes(width)[name]
        if value.shape != shape:
            raise UserError(f"{path}: {name} has the shape {value.shape}, but the drafter wants {shape}")
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} is not finite")
    return head


def without_head(params: Mapping[str, Any]) -> dict[str, Any]:
    """A drafter's parameters but its head's."""
    return {name: value for name, value in params.items() if name not in confidence.NAMES}
