"""Flags that several programs share."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppow_jax import mesh_shape
from ppow_jax.flags import check_fields, field
from ppow_jax.models import precision

if TYPE_CHECKING:
    from ppow_jax.inference.datastore import Datastore
    from ppow_jax.sharding import Mesh
    from ppow_jax.speculation.adaptive import Stopping


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Target and drafter, and where they run."""

    target: str = field(
        "smollm2-135m", "Target: smollm2-135m, tiny, a .gguf file, a directory or a hub name.", group="Models"
    )
    drafter: str | None = field(
        "auto", "Directory of the drafter, or none. auto: drafters/TARGET if it exists.", group="Models"
    )
    dtype: str = field("bfloat16", "Dtype of all matrices.", choices=("bfloat16", "float32"), group="Models")
    precision: str = field("auto", precision.HELP, choices=precision.CHOICES, group="Models")
    compilation_cache: str | None = field(
        None, "Directory for compiled programs, so that later runs start faster.", group="Models"
    )
    mesh: str | None = field(None, mesh_shape.HELP, group="Models")

    def __post_init__(self):
        check_fields(self)
        mesh_shape.MeshShape.parse(self.mesh)
        precision.of_flag(self.precision, self.dtype)


    @contextlib.contextmanager
    def in_use(self) -> "Iterator[Mesh]":
        """Runs programs inside the `with` on the mesh and in the precision that the flags name."""
        from ppow_jax import sharding

        mesh = sharding.make_mesh(mesh_shape.MeshShape.parse(self.mesh))
        with precision.use(precision.of_flag(self.precision, self.dtype)), sharding.use(mesh):
            yield mesh


@dataclasses.dataclass(frozen=True)
class LookupFlags:
    """Size of an n-gram lookup."""

    ngram_tokens: int = field(
        15, "Most tokens that an n-gram lookup drafts per round, in the modes ngram and mixture.", low=1, high=64,
        group="N-gram lookup",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DatastoreFlags:
    """Earlier answers for n-gram lookups."""

    datastore: str | None = field(
        None,
        "Directory with tokens of earlier answers, which n-gram lookups search as well; new answers are added to it.",
        group="N-gram lookup",
    )
    datastore_tokens: int = field(
        1 << 16, "Most tokens of a datastore; the oldest are dropped.", low=64, high=1 << 24, group="N-gram lookup"
    )

    def open_datastore(self, vocab_size: int) -> "Datastore | None":
        """The store that the flags name; None without one."""
        from ppow_jax.inference.datastore import Datastore

        return None if self.datastore is None else Datastore(self.datastore, vocab_size, self.datastore_tokens)


@dataclasses.dataclass(frozen=True)
class StoppingFlags:
    """How adaptive windows end."""

    stop_rule: str = field(
        "throughput",
        "When adaptive drafting stops. throughput: expected gain below the measured cost; threshold: --stop_threshold.",
        choices=("throughput", "threshold"),
        group="Adaptive windows",
    )
    stop_threshold: float = field(
        0.1,
        "Minimum path probability for further drafting, with --stop_rule=threshold.",
        high=1,
        group="Adaptive windows",
    )

    def stopping(self) -> "Stopping":
        """The rule that the flags name."""
        from ppow_jax.speculation.adaptive import Stopping

        return Stopping(self.stop_rule, self.stop_threshold)
