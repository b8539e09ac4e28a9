"""Compiled programs as a resource that a process can run out of."""

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)

MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # of the memory maps that a process may have


def make_room() -> bool:
    """Forgets all compiled programs where they take too many memory maps; says whether it did.

    XLA:CPU maps the code of each kernel by itself, up to 1,600 maps a program, and Linux allows a process 65,530:
    beyond that LLVM aborts it. Programs that are needed again are compiled again. Does nothing on other systems.
    """
    try:
        limit = int(LIMIT.read_text())
        with MAPS.open("rb") as lines:
            crowded = sum(1 for _ in lines) > SHARE * limit
    except (OSError, ValueError):
        return False
    if crowded:
        log.info("compiled programs take many memory maps: forgetting them")
        jax.clear_caches()
    return crowded
