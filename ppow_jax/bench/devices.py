"""Peak performance of the device at hand: published for known chips, measured for all others."""

import collections
import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

from ppow_jax.planning import topology
from ppow_jax.planning.chips import CHIPS, GIB, Chip

log = logging.getLogger(__name__)

_NVIDIA = "nvidia.com/en-us/data-center, dense bfloat16"


def _gpu(name: str, gib: float, tflops: float, gbytes: float, link: float = 0.0, source: str = _NVIDIA) -> Chip:
    """memory in GiB, bfloat16 TFLOP/s without sparsity, GB/s of memory, GB/s to all other GPUs in each direction."""
    return Chip(name, gib * GIB, tflops * 1e12, gbytes * 1e9, link * 1e9, 1, source)


# Pattern of JAX's `device_kind` -> the chip; the first that matches counts.
KNOWN: tuple[tuple[str, Chip], ...] = (
    (r"TPU v4", CHIPS["v4"]),
    (r"TPU v5( lite|e)", CHIPS["v5e"]),
    (r"TPU v5p?$", CHIPS["v5p"]),
    (r"TPU v6( lite|e)", CHIPS["v6e"]),
    (r"\bGH200\b.*144GB", _gpu("GH200 144GB", 144, 990, 4900, 450)),
    (r"\bGH200\b", _gpu("GH200", 96, 990, 4000, 450)),
    (r"\bB200\b", _gpu("B200", 180, 2250, 8000, 900)),
    (r"\bH200\b", _gpu("H200", 141, 989, 4800, 450)),
    (r"\bH100\b.*PCIe", _gpu("H100 PCIe", 80, 756, 2000, 300)),
    (r"\bH100\b.*NVL", _gpu("H100 NVL", 94, 835, 3900, 300)),
    (r"\bH100\b", _gpu("H100", 80, 989, 3350, 450)),
    (r"\bA100\b.*PCI.*80GB|\bA100 80GB PCIe", _gpu("A100 80GB PCIe", 80, 312, 1935, 300)),
    (r"\bA100\b.*80GB", _gpu("A100 80GB", 80, 312, 2039, 300)),
    (r"\bA100\b", _gpu("A100 40GB", 40, 312, 1555, 300)),
    (r"\bL40S\b", _gpu("L40S", 48, 362, 864)),
    (r"\bL4\b", _gpu("L4", 24, 121, 300)),
    (r"\bA10G\b", _gpu("A10G", 24, 70, 600)),
    (r"RTX 4090", _gpu("RTX 4090", 24, 165, 1008, source="NVIDIA Ada GPU architecture whitepaper")),
    (r"RTX 3090", _gpu("RTX 3090", 24, 71, 936, source="NVIDIA Ampere GA102 GPU architecture whitepaper")),
)


def known(kind: str) -> Chip | None:
    """The chip of a `device_kind`, or None if its peaks are not in the table."""
    return next((chip for pattern, chip in KNOWN if re.search(pattern, kind)), None)


def limits(devices: Sequence[Any]) -> Chip:
    """Peaks of one of these equal devices: of the table, or else of a large matrix product and a large copy."""
    chip = None if devices[0].platform == "cpu" else known(devices[0].device_kind)
    if chip is None:
        if devices[0].platform != "cpu":
            log.warning("%s: not in the table of known chips; its peaks are measured", devices[0].device_kind)
        return topology.measured(list(devices))
    places = collections.Counter(device.coords for device in devices if hasattr(device, "coords"))
    chip = chip.share(max(places.values(), default=1))  # a chip that JAX presents as two devices
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(chip, memory=memory) if memory else chip
