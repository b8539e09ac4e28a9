"""Devices to compile for: a slice of a TPU pod that need not exist, or the machine's own."""

import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.errors import UserError
from ppow_jax.planning.chips import CHIPS, Chip

LOCAL = "local"

# Environment that stops libtpu from looking for a machine with TPUs.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def find(topology: str) -> tuple[list[Any], Chip]:
    """The devices of a topology, and their chip. topology: `local`, or a chip and its grid as `v5e:4x4`, `v5p:2x2x4`.

    Call it before anything else starts JAX's backends. If a chip is presented as two devices (v4), the chip returned is
    one device's half.

    Raises:
      UserError: no such topology, or libtpu is missing.
    """
    if topology == LOCAL:
        devices = jax.devices()
        return devices, measured(devices)
    name, _, grid = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", grid):
        raise UserError(
            f"--topology={topology}: must be `{LOCAL}` or CHIP:GRID such as v5e:4x4 or v5p:2x2x2, CHIP one of "
            f"{', '.join(CHIPS)}"
        )
    for key, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(key, value)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"--topology={topology}: compiling for a TPU requires libtpu (pip install 'ppow_jax[plan]');"
            f" --topology={LOCAL} does not"
        ) from None
    jax.config.update("jax_platforms", "cpu")  # for this process's arrays; no TPU is present
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu's own, of several types
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={topology}: libtpu does not support this slice ({reason})") from None
    return devices, CHIPS[name].share(len(devices) / _product(grid))


def _product(grid: str) -> int:
    result = 1
    for size in grid.split("x"):
        result *= int(size)
    return result


def measured(devices: list[Any]) -> Chip:
    """This machine's device as a chip: its memory, and the measured speed of a large matrix product and a large copy.

    Virtual devices of one CPU share these. Messages between devices of one machine are assumed to be copies.
    """
    share = len(devices) if devices[0].platform == "cpu" else 1
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    N = 1024
    x = jnp.ones((N, N), jnp.bfloat16)
    product = jax.jit(lambda a: jnp.einsum("mi,oi->mo", a, a, preferred_element_type=jnp.float32))
    flops = 2 * N**3 / _seconds(product, x)
    y = jnp.ones(1 << 24)
    bandwidth = 2 * y.nbytes / _seconds(jax.jit(lambda a: a + 1), y)
    name = f"{devices[0].platform} ({devices[0].device_kind})"
    return Chip(name, memory, flops, bandwidth, bandwidth / 2, 2, "measured on this machine").share(share)


def _seconds(run, x, repetitions: int = 5) -> float:
    jax.block_until_ready(run(x))
    best = float("inf")
    for _ in range(repetitions):
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        best = min(best, time.perf_counter() - begin)
    return best
