"""Several processes that run one program: connection, the leader that writes files, agreement, and shutdown.

Every process runs the same Python code on its own devices of one mesh (`jax.distributed`); computations on the mesh
have to be called by all of them, in the same order. Files are written by one, the leader. With a single process the
functions here do nothing.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ppow_jax import progress
from ppow_jax.errors import UserError

log = logging.getLogger(__name__)

EXIT_FAILURE, EXIT_USER_ERROR = 1, 2
HEARTBEAT_SECONDS = 60  # a process without a heartbeat for this long counts as dead
START_SECONDS = 300  # longest time between the starts of two processes
_FAILED = "ppow_jax/failed"
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    multihost: bool = False,
) -> Iterator[None]:
    """Joins the other processes for the duration of the `with`; must come before any other use of JAX.

    multihost: take the configuration from the environment, as on TPU pods, under Slurm, Open MPI or Kubernetes.
    Otherwise the three arguments define it; without them there is one process, and nothing happens.

    An exception that leaves the `with` ends every process: its reason is written to each one's log.
    """
    if coordinator is None and not multihost:
        yield
        return
    if "cpu" in (os.environ.get("JAX_PLATFORMS") or "cpu").split(","):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is None:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    else:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    # Gloo times out if first messages are more than 30 seconds apart: synchronise before.
    _client().wait_at_barrier("ppow_jax/start", timeout_in_ms=1000 * START_SECONDS)
    wait("start")
    if not leader():  # other processes log warnings and errors only
        logging.getLogger("ppow_jax").setLevel(logging.WARNING)
        progress.SILENT = True
    log.info("process %d of %d, %d devices in all", jax.process_index(), jax.process_count(), jax.device_count())
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    try:
        yield
        wait("end")
    except BaseException as error:  # a KeyboardInterrupt too: otherwise the others would wait forever
        over.set()
        _fail(error)
    over.set()
    jax.distributed.shutdown()


def leader() -> bool:
    """True in the process that writes files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Blocks until every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def by_leader(action: Callable[[], object]) -> None:
    """Runs an action, such as writing a file, on the leader, while the others wait until it is done."""
    if leader():
        action()
    wait("by the leader")


def from_leader(value: float) -> float:
    """The leader's value of a number, on every process."""
    if jax.process_count() == 1:
        return value
    words = np.array([value], np.float64).view(np.uint32)
    return float(multihost_utils.broadcast_one_to_all(words).view(np.float64)[0])


def least(value: int) -> int:
    """The least of the numbers that all processes have."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.array(value, np.int32)).min())


class Agreement:
    """True once any process has answered yes; the same on all of them, which have to ask equally often.

    A result includes the answers up to the previous question: it is computed in the background, without waiting.
    """

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        self._agreed = False

    def ask(self, mine: bool) -> bool:
        """Combines this process's own answer so far with those of all processes."""
        if jax.process_count() == 1:
            return mine
        if self._asked is not None:
            self._agreed |= bool(self._asked)
        self._asked = _any(mine)
        return self._agreed


def _any(mine: bool) -> jax.Array:
    mesh = jax.make_mesh((jax.device_count(),), ("all",), (jax.sharding.AxisType.Auto,))
    said = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.array([mine]))
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))(said)


def _client():
    from orbax.checkpoint import multihost  # JAX's own key-value store, without touching its private modules

    return multihost.get_jax_distributed_client()


def _fail(error: BaseException) -> None:
    """Writes the reason to every log, and ends this process at once: an orderly shutdown would wait for the others."""
    lines = str(error).strip().splitlines()
    reason = f"process {jax.process_index()} failed: {type(error).__name__}: {lines[0] if lines else ''}"
    if mistake := isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exc()
    if first := _failure():  # this failure may only be a connection closed by the first one
        log.error("before that, %s", first)
    else:
        with contextlib.suppress(Exception):
            _client().key_value_set(_FAILED, reason)
    if leader():  # the store is in this process: the others must have time to read it
        time.sleep(3 * _POLL_SECONDS)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(EXIT_USER_ERROR if mistake else EXIT_FAILURE)


def _failure() -> str | None:
    """The failure reason of the first process that failed; None if none did."""
    try:
        return _client().key_value_try_get(_FAILED)
    except Exception:  # no such key: no failure; or the store is gone, which its client reports by itself
        return None


def _watch(over: threading.Event) -> None:
    """Ends this process when another one has failed: it may be waiting for it, deep inside a collective."""
    while not over.wait(_POLL_SECONDS):
        if reason := _failure():
            log.error("%s; ending this process too", reason)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(EXIT_FAILURE)
