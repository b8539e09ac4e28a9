"""Flags that several programs share."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ppow_jax import mesh_shape
from ppow_jax.flags import check_fields, field, require
from ppow_jax.models import precision
from ppow_jax.online.settings import OBJECTIVES, OnlineSettings

if TYPE_CHECKING:
    from ppow_jax.inference.datastore import Datastore
    from ppow_jax.inference.model import Model
    from ppow_jax.online.session import Online
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
    """Stop decisions of adaptive windows."""

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


@dataclasses.dataclass(frozen=True)
class AdaptationFlags:
    """Settings of online adaptation, and where it is saved."""

    online_budget: float = field(
        OnlineSettings.budget,
        "Most of the time that online adaptation may take while requests are decoded, as a share; idle time is free.",
        high=1,
        group="Online adaptation",
    )
    online_objective: str = field(
        OnlineSettings.objective,
        "recipe: PPOW's expected reward in closed form, and the supervised loss; supervised: training-time test.",
        choices=OBJECTIVES,
        group="Online adaptation",
    )
    online_learning_rate: float = field(
        OnlineSettings.learning_rate, "Learning rate of every step.", high=1, group="Online adaptation"
    )
    online_save: str | None = field(
        None, "Directory to resume adaptation from and to save it to, with the drafter.", group="Online adaptation"
    )
    online_save_every: int = field(
        16, "Training steps between two saves; a kill loses those since the last.", low=1, group="Online adaptation"
    )

    def adaptation(self) -> OnlineSettings:
        """The settings that the flags name. Raises UserError for impossible ones."""
        return OnlineSettings(
            budget=self.online_budget, objective=self.online_objective, learning_rate=self.online_learning_rate
        )

    def adapt(self, model: "Model", save: Path | None = None) -> "Online":
        """Begins to adapt a model's drafter, or resumes. save: directory in place of --online_save."""
        from ppow_jax.online.session import Online

        return Online(model, self.adaptation(), save=save or self.online_save, save_every=self.online_save_every)


@dataclasses.dataclass(frozen=True)
class OnlineFlags(AdaptationFlags):
    """Online adaptation, switched by a flag."""

    online: bool = field(
        False, "Adapt the drafter to what is decoded, within --online_budget.", group="Online adaptation"
    )

    def check_online(self, speculation: str | None, drafter: str | None) -> None:
        """Raises UserError where nothing can be adapted, or flags need --online."""
        self.adaptation()
        require(self.online or self.online_save is None, f"--online_save={self.online_save}: needs --online")
        require(not self.online or drafter is not None, "--online: needs a drafter to adapt, but --drafter=none")
        without = speculation in ("off", "ngram")
        require(not (self.online and without), f"--online: --speculation={speculation} uses no drafter")
