"""Reads `.bin` files of torch: only tensors, never any other pickled object."""

import importlib.util
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.files import mistaken
from ppow_jax.weights.huggingface import StoredTensor

_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.bool": "BOOL",
}


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file written by `torch.save`, memory-mapped if the file permits it.

    Raises:
      UserError: without torch, for a broken file, or one that holds anything but named tensors.
    """
    other = mistaken(path)
    if other:
        raise UserError(f"{path}: {other}")
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"{path}: reading it requires torch (pip install 'ppow_jax[torch]');"
            " or save the tensors as model.safetensors, which needs no further package"
        )
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # errors of torch, pickle and zipfile share no class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: torch cannot read it as plain tensors ({reason})") from None
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise UserError(f"{path}: must contain a dictionary of tensors and nothing else")
    return {name: _stored(path, name, tensor) for name, tensor in value.items()}


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    import torch

    dtype = _DTYPES.get(str(tensor.dtype), str(tensor.dtype).removeprefix("torch."))

    def read() -> np.ndarray:
        try:
            if tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.contiguous().numpy()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None

    return StoredTensor(tuple(tensor.shape), dtype if tensor.layout == torch.strided else "sparse", read)
