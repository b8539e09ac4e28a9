"""Throughput of the endpoint with several clients, beside that of `Model.generate` on the same prompts."""

import contextlib
import dataclasses
import http.client
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tabulate import tabulate

from ppow_jax.errors import UserError
from ppow_jax.inference.model import Model
from ppow_jax.inference.requests import Result
from ppow_jax.serving import server
from ppow_jax.serving.app import Endpoint
from ppow_jax.serving.engine import Engine
from ppow_jax.speculation.settings import Speculation

PATIENCE = 3600.0  # seconds, for a request
START = 60.0  # seconds, for the server to start


@dataclasses.dataclass(frozen=True)
class Workload:
    """A workload for both sides: prompts, token ids int32 [T], each with seed number i. clients: requests at once."""

    prompts: Sequence[np.ndarray]
    clients: int
    max_new_tokens: int
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over a workload. texts: by prompt. tokens: new tokens of all answers. cpu_seconds: of this process."""

    texts: list[str]
    tokens: int
    seconds: float
    cpu_seconds: float


def timed(answer: Callable[[], list[tuple[str, int]]]) -> Run:
    """Runs `answer`, which returns the text and the number of tokens of every answer."""
    begin, cpu = time.perf_counter(), time.process_time()
    found = answer()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    return Run([text for text, _ in found], sum(tokens for _, tokens in found), seconds, cpu_seconds)


def by_generate(model: Model, speculation: Speculation, work: Workload) -> list[tuple[str, int]]:
    """Answers the workload by `Model.generate`, in batches of as many prompts as there are clients."""
    results: list[Result] = model.generate(
        work.prompts,
        max_new_tokens=work.max_new_tokens,
        temperature=work.temperature,
        seed=list(range(len(work.prompts))),
        speculation=speculation,
        batch_size=work.clients,
    )
    return [(result.text, len(result.token_ids)) for result in results]


def by_clients(address: str, work: Workload) -> list[tuple[str, int]]:
    """Answers the workload by the endpoint: each client sends its next request when it has its answer.

    Raises UserError for an answer that is an error.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(work.prompts)):
        waiting.put(number)
    found: dict[int, tuple[str, int]] = {}

    def client() -> None:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=PATIENCE)
        with contextlib.closing(connection), contextlib.suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                found[number] = _ask(connection, work, number)

    with ThreadPoolExecutor(work.clients) as pool:
        for done in [pool.submit(client) for _ in range(work.clients)]:
            done.result()
    return [found[number] for number in range(len(work.prompts))]


def _ask(connection: http.client.HTTPConnection, work: Workload, number: int) -> tuple[str, int]:
    body = {"prompt": work.prompts[number].tolist(), "max_tokens": work.max_new_tokens, "seed": number}
    content = json.dumps(body | {"temperature": work.temperature})
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    reply = json.loads(connection.getresponse().read())
    if "error" in reply:
        raise UserError(f"prompt {number}: the endpoint answers: {reply['error']['message']}")
    return reply["choices"][0]["text"], reply["usage"]["completion_tokens"]


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[str]:
    """The address of an endpoint of this engine, in threads of this process, on a free port of the loopback address."""
    with server.bind("127.0.0.1", 0) as bound:
        found = server.Server(Endpoint(engine.machine.model, engine, "bench", PATIENCE), drain=0)
        thread = threading.Thread(target=found.run, args=([bound],), name="server")
        thread.start()
        try:
            end = time.monotonic() + START
            while not found.started:
                if not thread.is_alive() or time.monotonic() > end:
                    raise UserError("the endpoint does not start; its log tells why")
                time.sleep(0.01)
            yield server.address(bound)
        finally:
            found.should_exit = True
            thread.join()


def compare(engine: Engine, work: Workload, repetitions: int) -> dict[str, Any]:
    """Measures both sides in turns, `repetitions` times, after a pass of each that is not timed.

    Returns one entry for each side, with the medians over its passes; `ratio` and `cpu_ratio`: the endpoint's tokens
    per second, or per second of processor time, divided by those of `generate`, as medians over neighbouring passes;
    `identical`: answers with the same text on both sides, of the first timed passes.
    """
    model, speculation = engine.machine.model, engine.machine.speculation
    runs: dict[str, list[Run]] = {"generate": [], "endpoint": []}
    with running(engine) as address:
        sides = {
            "generate": lambda: by_generate(model, speculation, work),
            "endpoint": lambda: by_clients(address, work),
        }
        for repetition in range(repetitions + 1):
            for name, answer in sides.items():
                run = timed(answer)
                if repetition:
                    runs[name].append(run)
    rates = {name: [run.tokens / run.seconds for run in of] for name, of in runs.items()}
    cpu_rates = {name: [run.tokens / run.cpu_seconds for run in of] for name, of in runs.items()}
    first = [runs[name][0].texts for name in ("generate", "endpoint")]
    return {
        "results": [
            {
                "side": name,
                "tokens": runs[name][0].tokens,
                "seconds": statistics.median(run.seconds for run in runs[name]),
                "tokens_per_second": statistics.median(rates[name]),
                "tokens_per_cpu_second": statistics.median(cpu_rates[name]),
                "passes": rates[name],
            }
            for name in runs
        ],
        "ratio": _ratio(rates),
        "cpu_ratio": _ratio(cpu_rates),
        "identical": sum(a == b for a, b in zip(*first, strict=True)),
        "answers": len(work.prompts),
    }


def _ratio(rates: dict[str, list[float]]) -> float:
    return statistics.median(b / a for a, b in zip(rates["generate"], rates["endpoint"], strict=True))


def table(found: dict[str, Any]) -> str:
    """The result for a console."""
    rows = [
        {
            "": row["side"],
            "tokens": row["tokens"],
            "seconds": row["seconds"],
            "token/s": row["tokens_per_second"],
            "token per CPU second": row["tokens_per_cpu_second"],
        }
        for row in found["results"]
    ]
    lines = tabulate(rows, headers="keys", floatfmt=".1f")
    ratios = f"endpoint / generate: {found['ratio']:.3f} by time, {found['cpu_ratio']:.3f} by processor time"
    return f"{lines}\n\n{ratios}; {found['identical']} of {found['answers']} answers identical"
