"""A larger draft vocabulary for a trained drafter.

A token outside the draft vocabulary can never be drafted. A drafter that was trained on English chat may lack a quarter
of the tokens of German text. Adding tokens keeps everything that the drafter knows: the rows of its head stay, new ones
are taken from the target's head, and training continues from there.
"""

import dataclasses

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import DrafterConfig

Parameters = dict[str, np.ndarray]


def coverage(ids_W: np.ndarray, count_V: np.ndarray) -> float:
    """Share of the counted tokens that a draft vocabulary (target ids [W]) holds; nan if nothing was counted."""
    return float(count_V[ids_W].sum() / count_V.sum()) if count_V.sum() else float("nan")


def enlarge(
    config: DrafterConfig, params: Parameters, ids_W: np.ndarray, head_VxD: np.ndarray, count_V: np.ndarray, size: int
) -> tuple[DrafterConfig, Parameters, np.ndarray]:
    """Adds the most frequent missing tokens to a draft vocabulary.

    New rows of the head are the target's, times the factor that brings the target's rows of the old tokens nearest to
    the trained ones (least squares). Ties, and tokens that were not counted, are taken in the order of their ids.

    Args:
      params: the drafter's parameters, with its own lm_head [W, E].
      ids_W: target ids of its draft vocabulary, ascending.
      head_VxD: the target's head, with D = E.
      count_V: how often each token of the target's vocabulary occurred.
      size: the new W.

    Returns:
      The config, parameters and ascending target ids [size] of the drafter with the larger vocabulary.

    Raises:
      UserError: if `size` is not above W or exceeds V, or if the heads differ in width.
    """
    V, W = config.vocab_size, config.draft_vocab_size
    if not W < size <= V:
        rule = f"must be larger than the current size, {W}, and at most the target's vocabulary, {V}"
        raise UserError(f"--size={size}: {rule}")
    old_WxE = np.asarray(params["lm_head"], np.float32)
    if old_WxE.shape[1] != head_VxD.shape[1]:
        widths = f"{old_WxE.shape[1]} and {head_VxD.shape[1]}"
        raise UserError(f"--size={size}: new tokens take the target's head, but the heads have widths {widths}")
    missing_V = np.ones(V, bool)
    missing_V[ids_W] = False
    added = np.argsort(-np.where(missing_V, count_V, -1), kind="stable")[: size - W]
    same_WxD = np.asarray(head_VxD[ids_W], np.float32)
    factor = float((old_WxE * same_WxD).sum() / np.maximum((same_WxD**2).sum(), 1e-30))
    ids = np.concatenate([ids_W, added])
    rows = np.concatenate([old_WxE, factor * np.asarray(head_VxD[added], np.float32)])
    order = np.argsort(ids)
    head = rows[order].astype(params["lm_head"].dtype)
    return dataclasses.replace(config, draft_vocab_size=size), params | {"lm_head": head}, ids[order].astype(np.int32)
