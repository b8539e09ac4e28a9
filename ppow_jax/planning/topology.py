"""Devices to compile for: a slice of a TPU pod that need not exist, or the machine's own."""

import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.errors import UserError
from ppow_jax.planning.chips import CHIPS, Chip

LOCAL = "local"
AGREE = 0.15  # share by which measurements of one speed may differ

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
    """This machine's device as a chip: its memory, and the measured speed of large matrix products and large copies.

    Virtual devices of one CPU share these. Messages between devices of one machine are assumed to be copies. The source
    of the figures says so where the measurements differ too much to be peaks, as on a busy machine.
    """
    share = len(devices) if devices[0].platform == "cpu" else 1
    stats = devices[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    N = 1024 if devices[0].platform == "cpu" else 8192  # an accelerator reaches its peak only with large matrices
    product = jax.jit(lambda a: jnp.einsum("mi,oi->mo", a, a, preferred_element_type=jnp.float32))
    products = [times(product, jnp.ones((N, N), dtype)) for dtype in (jnp.bfloat16, jnp.float32)]
    y = jnp.ones(1 << 24 if devices[0].platform == "cpu" else 1 << 28)
    copies = times(jax.jit(lambda a: a + 1), y)
    flops, bandwidth = 2 * N**3 / min(map(min, products)), 2 * y.nbytes / min(copies)
    source = "measured on this machine"
    if spread := max(uncertainty(min(products, key=min)), uncertainty(copies)):
        source += f", but not to be believed: repeated measurements differ by {spread:.0%} (is the machine busy?)"
    name = f"{devices[0].platform} ({devices[0].device_kind})"
    return Chip(name, memory, flops, bandwidth, bandwidth / 2, 2, source).share(share)


def times(run: Callable[[jax.Array], jax.Array], x: jax.Array, at_least: int = 5, seconds: float = 1.0) -> list[float]:
    """Seconds of repeated runs, after one that compiles: `at_least` of them, and more as long as `seconds` last."""
    jax.block_until_ready(run(x))
    found: list[float] = []
    while len(found) < at_least or sum(found) < seconds:
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        found.append(time.perf_counter() - begin)
    return found


def uncertainty(seconds: Sequence[float]) -> float:
    """Share by which the fastest quarter of some runs differs; 0 where they agree, so that the fastest is a peak."""
    fastest = sorted(seconds)[: max(2, len(seconds) // 4)]
    spread = fastest[-1] / fastest[0] - 1
    return spread if spread > AGREE else 0.0
