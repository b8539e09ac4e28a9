"""Number of devices along each axis of the mesh, in the syntax of `--mesh`. Importing this does not import JAX."""

import dataclasses
import math

from ppow_jax.flags import require

AXES = ("data", "fsdp", "tensor", "expert")
HELP = "Devices per axis, as data:4,fsdp:1,tensor:2 (axes: data, fsdp, tensor, expert); none: all devices on data."


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """data: replicas, each with its own rows. fsdp: also splits rows, and matrices along their hidden axis.
    tensor: splits heads, the width of MLPs, and the vocabulary. expert: experts of a mixture, otherwise rows.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, text: str | None, where: str = "--mesh") -> "MeshShape | None":
        """Parses `data:4,tensor:2`; axes that are not named are 1. None stays None: all devices on data.

        Raises UserError for malformed text.
        """
        if text is None:
            return None
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, number = (word.strip() for word in part.partition(":"))
            given, form = f"{where}={text}", "must be AXIS:NUMBER,... such as data:4,tensor:2"
            require(axis in AXES, f"{given}: {form}; the axes are {', '.join(AXES)}, not {axis!r}")
            require(axis not in sizes, f"{given}: names {axis} twice")
            require(number.isdecimal() and int(number) > 0, f"{given}: {form}; {axis} is {number!r}")
            sizes[axis] = int(number)
        return cls(**sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the axes, in the order of AXES."""
        return dataclasses.astuple(self)

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.sizes)

    @property
    def rows(self) -> int:
        """Number of parts into which the rows of a batch are split."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        return ",".join(f"{axis}:{size}" for axis, size in zip(AXES, self.sizes, strict=True))


def check_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises UserError unless the three flags are all given, and consistent, or none is."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    rule = "--coordinator, --num_processes and --process_id go together"
    require(not missing, f"--{(missing or [''])[0]}: is missing; {rule}")
    host, _, port = coordinator.rpartition(":")
    require(bool(host) and port.isdecimal(), f"--coordinator={coordinator}: must be HOST:PORT of process 0")
    rule = f"must be less than --num_processes={num_processes}"
    require(process_id < num_processes, f"--process_id={process_id}: {rule}")
