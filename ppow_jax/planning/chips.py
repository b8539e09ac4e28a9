"""Peak performance of chips, as published by their makers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip. memory: bytes of main memory (HBM). flops: bfloat16 operations per second. bandwidth:
    bytes per second between main memory and chip. link: bytes per second of one link to a neighbour, in each direction.
    links: number of neighbours. source: origin of the figures.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    links: int
    source: str

    @property
    def intensity(self) -> float:
        """Operations per byte above which compute is the limit, not memory."""
        return self.flops / self.bandwidth

    @property
    def ring(self) -> float:
        """Bytes per second that a device can send around a ring along one axis of the torus: both ways at once."""
        return 2 * self.link

    def share(self, parts: float) -> "Chip":
        """One of the devices that the chip is presented as."""
        if parts == 1:
            return self
        scaled = {name: getattr(self, name) / parts for name in ("memory", "flops", "bandwidth", "link")}
        return dataclasses.replace(self, **scaled)


GIB = 1 << 30

# Links: the published bandwidth of all a chip's links and both directions, divided by 2 and by their number.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 50e9, 6, "docs.cloud.google.com/tpu/docs/v4; links: 2304.01433"),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 50e9, 4, "docs.cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 100e9, 6, "docs.cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 100e9, 4, "docs.cloud.google.com/tpu/docs/v6e"),
    )
}
