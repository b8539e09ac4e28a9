"""Memory maps of compiled programs, a limited resource of a process."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # share of the memory maps that a process may have


def make_room() -> bool:
    """Clears all compiled programs if they use too many memory maps; returns True if it did.

    XLA:CPU maps the code of each kernel separately, up to 1,600 maps a program, and Linux allows a process 65,530:
    beyond that LLVM aborts it. Programs that are needed again are recompiled. Does nothing on other systems.
    """
    try:
        limit = int(LIMIT.read_text())
        with MAPS.open("rb") as lines:
            crowded = sum(1 for _ in lines) > SHARE * limit
    except (OSError, ValueError):
        return False
    if crowded:
        log.info("clearing the compiled programs, which use too many memory maps; what is needed is compiled again")
        jax.clear_caches()
    return crowded
