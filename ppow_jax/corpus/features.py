"""Target features computed once and stored on disk, for stage 1 over several epochs.

The target's pass is more than half of a supervised step. The part of it that the drafter needs - three features and the
final hidden state per token - is small for a small target: 4 * D numbers a token. Values are stored in the dtype of
the target's matrices, to which the products that read them round anyway.
"""

import functools
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import distributed, files, progress, sharding
from ppow_jax.corpus.target_pass import read_rows
from ppow_jax.data.batches import Batches, PackedBatch
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

SAVE_EVERY = 16  # batches between two records of progress


class Cached(NamedTuple):
    """Precomputed inputs of `scoring.score`: features_BxTxF of every token, hidden_BxMxD for verifying each anchor."""

    features_BxTxF: np.ndarray
    hidden_BxMxD: np.ndarray


class FeatureStore:
    """The features of the examples of `batches`, one row of 4 * D values per token, in one memory-mapped file."""

    def __init__(
        self,
        directory: str | Path,
        batches: Batches,
        params: dict,
        config: ModelConfig,
        layers: tuple[int, ...],
        stop: Callable[[], bool] = lambda: False,
        own: bool = False,
    ):
        """Computes what is missing; a killed pass resumes where it stopped.

        own: each process has a directory and a file of its own, a cache: features of other data in it are replaced.
        Raises UserError when the directory cannot be written to or holds features of other data.
        """
        directory = files.writable_directory(directory)
        lengths = [len(example.tokens) for example in batches.examples]
        self.batches = batches
        self.start = np.concatenate([[0], np.cumsum(lengths)])
        self.width, self.feature_width = 4 * config.hidden_size, 3 * config.hidden_size
        dtype = np.dtype(transformer.head(params).dtype)
        path, self._note = directory / "features.bin", directory / "batches_done"
        size = int(self.start[-1]) * self.width * dtype.itemsize
        self._data = str(_checksum(batches, layers))
        self._writes = own or distributed.leader()
        if own and path.exists() and not self._fits(path, size):
            path.unlink()
        self._by_writers(lambda: self._make_room(path, size))
        if not self._fits(path, size):
            raise UserError(f"{path}: holds features of other data; remove the directory, or name another --workdir")
        self._values = np.memmap(path, dtype, "r+", shape=(int(self.start[-1]), self.width))
        first = distributed.least(int(self._noted()[0]))  # a host may have lost its file
        self.complete = self._fill(first, params, config, layers, stop)

    def _noted(self) -> list[str]:
        """Number of batches that are stored, and the checksum of their inputs."""
        return self._note.read_text().split() if self._note.exists() else ["0"]

    def _fits(self, path: Path, size: int) -> bool:
        return path.stat().st_size == size and self._noted()[1:] in ([], [self._data])

    def _by_writers(self, action: Callable[[], object]) -> None:
        if self._writes:
            action()
        distributed.wait("features")

    def _make_room(self, path: Path, size: int) -> None:
        if path.exists():
            return
        self._note.unlink(missing_ok=True)
        with open(path.with_suffix(".new"), "wb") as file:
            files.reserve(file, size)
        os.replace(file.name, path)  # atomic: the file has its full length or does not exist

    def _fill(self, first: int, params, config: ModelConfig, layers, stop) -> bool:
        total = self.batches.steps_of_epochs(1)  # epoch 0 holds every example once
        if first == total:
            return True
        with progress.bar(total, "features", "batch", initial=first) as bar:
            for step in range(first, total):
                if stop():
                    self._save(step)
                    return False
                batch = self.batches.at(step)
                values_BxTxX = sharding.fetch(_read(params, sharding.place(batch), config=config, layers=layers))
                for b, t, i, n in self._places(step) if self._writes else ():
                    self._values[self.start[i] : self.start[i] + n] = values_BxTxX[b, t : t + n]
                bar.update(1)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
                    self._save(step + 1)
        return True

    def _save(self, done: int) -> None:
        def note():
            self._values.flush()
            files.write_atomic(self._note, f"{done} {self._data}")

        self._by_writers(note)

    def _places(self, step: int):
        """(row, first token in the row, example, its length) of every example of a batch."""
        for b, members in enumerate(self.batches.members(step)):
            t = 0
            for i in members:
                n = int(self.start[i + 1] - self.start[i])
                yield b, t, i, n
                t += n

    def at(self, step: int, batch: PackedBatch) -> Cached:
        """The features of a batch, in the stored dtype."""
        B, T = batch.tokens_BxT.shape
        values_BxTxX = np.zeros((B, T, self.width), self._values.dtype)
        for b, t, i, n in self._places(step):
            values_BxTxX[b, t : t + n] = self._values[self.start[i] : self.start[i] + n]
        verifier_BxM = np.minimum(batch.anchor_BxM + 1, T - 1)
        hidden_BxMxD = np.take_along_axis(values_BxTxX[..., self.feature_width :], verifier_BxM[..., None], 1)
        return Cached(values_BxTxX[..., : self.feature_width], hidden_BxMxD)


def _checksum(batches: Batches, layers: tuple[int, ...]) -> int:
    """Checksum of the inputs of the features: the texts in their order, and the layers."""
    checksum = zlib.crc32(repr(layers).encode())
    for example in batches.examples:
        checksum = zlib.crc32(example.tokens.tobytes(), zlib.crc32(b"|", checksum))
    return checksum


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _read(params: dict, batch: PackedBatch, *, config: ModelConfig, layers: tuple[int, ...]):
    out = read_rows(params, config, batch, layers)
    values = jnp.concatenate([out.features_BxSxF, out.hidden_BxSxD], -1)
    return values.astype(transformer.head(params).dtype)
