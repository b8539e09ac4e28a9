"""Time spent compiling programs, and whether one is being compiled at the moment, from JAX's own events.

Importing this does not import JAX.
"""

import functools
import time

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # comes just before XLA begins
_COMPILED = "/jax/core/compile/backend_compile_duration"

_total = 0.0
_since: float | None = None


@functools.cache
def _listen() -> None:
    import jax

    def on_event(event: str, duration_secs: float, **_: str | int) -> None:
        global _since, _total
        if event == _LOWERED:
            _since = time.perf_counter()
        elif event == _COMPILED:
            _since = None
            _total += duration_secs

    jax.monitoring.register_event_duration_secs_listener(on_event)


def seconds() -> float:
    """Seconds this process spent compiling with XLA, or loading compiled programs, since the first call."""
    _listen()
    return _total


def running() -> float:
    """Seconds for which the current program has been compiling; 0 if none is being compiled."""
    since = _since
    return 0.0 if since is None else time.perf_counter() - since


def not_running() -> None:
    """Records that no program is being compiled: one that was lowered was not compiled afterwards."""
    global _since
    _since = None
