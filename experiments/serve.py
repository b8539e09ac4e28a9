"""Serves a target and its drafter with the OpenAI API, over HTTP.

    python -m experiments.serve --target=smollm2-135m --port=8000
    python -m experiments.serve --target=DIR --drafter=DIR --slots=16 --context=4096 --port=8000

Then http://localhost:8000/ is a page to chat, and http://localhost:8000/v1 the address for clients of the API:
docs/endpoint.md. It needs the packages of the extra `serve`: pip install 'ppow_jax[serve]'.
"""

import dataclasses
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from experiments.common import DatastoreFlags, ModelFlags, OnlineFlags, StoppingFlags
from ppow_jax import cli, defaults
from ppow_jax.flags import field, require

if TYPE_CHECKING:
    from ppow_jax.inference.model import Model
    from ppow_jax.speculation.settings import Speculation

PACKAGES = ("anyio", "prometheus_client", "starlette", "uvicorn")
CONTEXT, ROUNDS = 2048, 4
SPECULATIONS = ("off", "chain", "tree", "adaptive", "ngram", "mixture")
CONTEXT_HELP = f"Most tokens of a prompt and its answer; by default {CONTEXT}, or fewer if the target has fewer."
ROUNDS_HELP = "Decoding rounds between two looks at the answers; fewer stream in smaller pieces."

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings(OnlineFlags, DatastoreFlags, StoppingFlags, ModelFlags):
    """The flags of this program."""

    host: str = field("127.0.0.1", "Address to listen at; 0.0.0.0: all addresses.", group="Server")
    port: int = field(8000, "Port to listen at; 0: any free one.", low=0, high=65535, group="Server")
    model_name: str | None = field(None, "Name of the model in the API; by default --target.", group="Server")
    slots: int = field(8, "Requests that are decoded at once.", low=1, high=512, group="Server")
    context: int | None = field(None, CONTEXT_HELP, low=64, group="Server")
    queue: int = field(64, "Requests that may wait for a slot; more get status 429.", low=0, group="Server")
    time_limit: float = field(600.0, "Seconds that a request may take, waiting included.", low=1, group="Server")
    drain: float = field(30.0, "Seconds for accepted requests to finish after SIGTERM.", low=0, group="Server")
    rounds: int = field(ROUNDS, ROUNDS_HELP, low=1, group="Server")
    speculation: str | None = field(None, defaults.MODE_HELP, choices=SPECULATIONS, group="Speculation")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.host), "--host: must not be empty")
        require(self.model_name != "", "--model_name: must not be empty")
        check_speculation(self)
        self.check_online(self.speculation, self.drafter)
        looks_up = self.datastore is None or self.speculation in (None, "ngram", "mixture")
        require(looks_up, f"--datastore={self.datastore}: --speculation={self.speculation} looks nothing up")


def check_speculation(settings: Any) -> None:
    """Raises UserError for a mode that needs a drafter where --drafter=none."""
    without = settings.speculation in (None, "off", "ngram") or settings.drafter is not None
    require(without, f"--speculation={settings.speculation}: needs a drafter, but --drafter=none")


def check_packages() -> None:
    """Raises UserError if a package of the extra `serve` is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    require(not missing, f"not installed: {', '.join(missing)}; install them: pip install 'ppow_jax[serve]'")


def main(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    check_packages()
    cli.keep_compiled(settings.compilation_cache)

    with settings.in_use() as mesh:  # imports JAX: after the settings' checks
        _serve(settings, mesh)


def _serve(settings: Settings, mesh) -> None:
    from ppow_jax.serving import server
    from ppow_jax.serving.app import Endpoint
    from ppow_jax.serving.engine import Engine
    from ppow_jax.serving.machine import Machine
    from ppow_jax.serving.metrics import Metrics
    from ppow_jax.weights import loading

    with server.bind(settings.host, settings.port) as bound:
        if settings.online:
            directory = loading.find_drafter(settings.drafter, settings.target)
            rule = f"--online: needs a drafter, but --target={settings.target} has none; name one: --drafter=DIR"
            require(directory is not None, rule)
        model, speculation, context = load_models(settings)
        model.datastore = settings.open_datastore(model.target.config.vocab_size)
        machine = Machine(model, speculation, settings.slots, context, settings.rounds)
        if settings.online:
            log.info("compiling what adapts the drafter")
            settings.adapt(model)
        machine.warm_up()
        name = settings.model_name or settings.target
        engine = Engine(machine, Metrics(name, speculation.window), settings.queue, mesh)
        endpoint = Endpoint(model, engine, name, settings.time_limit)
        url, mode = server.address(bound), speculation.mode
        print(f"serving {name} ({mode}, {settings.slots} slots) at {url}/v1, chat at {url}/", flush=True)
        server.Server(endpoint, settings.drain).run([bound])
    log.info("ended")


def load_models(settings: Any) -> "tuple[Model, Speculation, int]":
    """(model, speculation mode, context in tokens) that the flags name; nothing is compiled or measured yet.

    Raises:
      UserError: no drafter where the mode needs one, more context than the target has positions, wrong files.
    """
    from ppow_jax.inference.model import SPECULATIONS, load
    from ppow_jax.weights import loading

    directory = loading.find_drafter(settings.drafter, settings.target)
    mode = settings.speculation or defaults.mode(directory is not None)
    missing = f"--speculation={mode}: needs a drafter, but --target={settings.target} has none"
    speculation = SPECULATIONS[mode]
    require(not speculation.needs_drafter or directory is not None, f"{missing}; name one: --drafter=DIR")
    if speculation.adaptive:
        speculation = dataclasses.replace(speculation, adaptive=settings.stopping())
    model = load(settings.target, str(directory) if directory else None, settings.dtype)
    positions = model.target.config.max_position_embeddings
    context = min(CONTEXT, positions) if settings.context is None else settings.context
    require(context <= positions, f"--context={context}: {settings.target} has {positions} positions")
    return model, speculation, context


if __name__ == "__main__":
    cli.run(main, Settings)
