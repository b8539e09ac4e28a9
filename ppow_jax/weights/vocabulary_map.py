"""The draft vocabulary as stored in EAGLE-3 files: `d2t`, offsets of draft ids, and `t2d`, a mask over target ids."""

import logging
from collections.abc import Mapping

import numpy as np

from ppow_jax.weights.huggingface import StoredTensor

log = logging.getLogger(__name__)
_MANY = 16  # least number of draft tokens for which gaps between all of their ids cannot be a coincidence


def to_tensors(target_ids_W: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """d2t int64 [W] and t2d bool [V]; the target id of draft id i is i + d2t[i]."""
    mask_V = np.zeros(vocab_size, np.bool_)
    mask_V[target_ids_W] = True
    return {"d2t": np.asarray(target_ids_W, np.int64) - np.arange(len(target_ids_W)), "t2d": mask_V}


def from_tensors(
    stored: Mapping[str, StoredTensor], V: int, W: int, problems: list[str], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(target ids ascending int32 [W], order of the file's rows that sorts them); adds to `problems`.

    Without d2t the ids follow from the mask; without both, draft ids are target ids. A d2t that is impossible as
    offsets, but possible as the ids themselves, is read as ids, which is logged with `where`.
    """
    mask_V = stored["t2d"].read() if "t2d" in stored else None
    if "d2t" in stored:
        ids_W = _target_ids(stored["d2t"].read().astype(np.int64), mask_V, V, where)
    elif mask_V is not None:
        ids_W = np.flatnonzero(mask_V)
    else:
        ids_W = np.arange(W)
    order_W = np.argsort(ids_W, kind="stable")
    sorted_W = ids_W[order_W]
    if len(ids_W) != W:
        problems.append(f"t2d: marks {len(ids_W)} tokens, draft_vocab_size is {W}")
    elif not ascending(sorted_W, V):
        problems.append(f"d2t: draft id + offset must give different target ids of 0..{V - 1}")
    elif mask_V is not None and not np.array_equal(np.flatnonzero(mask_V), sorted_W):
        problems.append("t2d: marks other tokens than d2t names")
    return sorted_W.astype(np.int32), order_W


def _target_ids(d2t_W: np.ndarray, mask_V: np.ndarray | None, V: int, where: str) -> np.ndarray:
    """Target ids of a d2t that holds offsets, as the formats define it, or the ids themselves.

    The mask decides. Without one, if both are possible, a d2t of at least _MANY entries that ascends throughout is read
    as ids: as offsets, no two ids would then be neighbours, but most ids of a real vocabulary are.
    """

    def possible(ids_W: np.ndarray) -> bool:
        sorted_W = np.sort(ids_W)
        return ascending(sorted_W, V) and (mask_V is None or np.array_equal(np.flatnonzero(mask_V), sorted_W))

    offsets_W = d2t_W + np.arange(len(d2t_W))
    if not possible(d2t_W):
        return offsets_W
    climbs = mask_V is None and len(d2t_W) >= _MANY and bool((np.diff(d2t_W) > 0).all())
    if possible(offsets_W) and not climbs:
        return offsets_W
    log.warning("%s: d2t holds target ids, not offsets from draft ids: read as ids", where)
    return d2t_W


def ascending(ids_W: np.ndarray, V: int) -> bool:
    """True if ids are ascending, different ones of 0..V-1."""
    return bool(ids_W[0] >= 0 and ids_W[-1] < V and (np.diff(ids_W) > 0).all())
