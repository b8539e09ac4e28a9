"""Measures the throughput of the endpoint beside that of `Model.generate`, on the same prompts.

    python -m experiments.serve_bench --target=smollm2-135m --benchmarks=human_eval --num_prompts=24
    python -m experiments.serve_bench --target=DIR --drafter=DIR --prompts=prompts.jsonl --clients=16 --slots=16

The endpoint of `experiments.serve` runs in this process, and answers --clients clients over HTTP, each of which asks
again when it has its answer; `generate` answers the same prompts in batches of --clients. Both do it in turns,
--repetitions times, after a pass that compiles. See docs/endpoint.md.
"""

import dataclasses

from experiments import serve
from experiments.common import ModelFlags, StoppingFlags
from ppow_jax import cli, defaults, flags
from ppow_jax.flags import field, require


@dataclasses.dataclass(frozen=True)
class Settings(StoppingFlags, ModelFlags):
    """The flags of this program."""

    prompts: str | None = field(None, "JSON Lines file with prompts or chats (first turns).", group="Prompts")
    benchmarks: tuple[str, ...] = field(
        (), "Benchmarks, as for experiments.evaluate; human_eval unless --prompts is given.", group="Prompts"
    )
    benchmark_dir: str | None = field(None, "Directory to search first for BENCHMARK*.jsonl.", group="Prompts")
    num_prompts: int | None = field(16, "Prompts per benchmark; none: all.", low=1, group="Prompts")

    clients: int = field(8, "Clients that ask at once, and prompts per batch of generate.", low=1, group="Measuring")
    repetitions: int = field(3, "Timed passes of each side, of which the median counts.", low=1, group="Measuring")
    max_new_tokens: int = field(128, "Maximum number of tokens of an answer.", low=1, group="Measuring")
    temperature: float = field(0.0, "Sampling temperature; 0 is greedy.", low=0, high=100, group="Measuring")

    slots: int = field(8, "Requests that the endpoint decodes at once.", low=1, high=512, group="Server")
    context: int | None = field(None, serve.CONTEXT_HELP, low=64, group="Server")
    rounds: int = field(serve.ROUNDS, serve.ROUNDS_HELP, low=1, group="Server")
    speculation: str | None = field(None, defaults.MODE_HELP, choices=serve.SPECULATIONS, group="Speculation")
    output: str | None = field(None, "JSON file for the result.", group="Output")

    def __post_init__(self):
        super().__post_init__()
        serve.check_speculation(self)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The benchmarks, and files, whose prompts are answered."""
        return self.benchmarks + ((self.prompts,) if self.prompts else ()) or ("human_eval",)


def main(settings: Settings) -> None:
    """Measures and prints."""
    serve.check_packages()
    cli.check_output("--output", settings.output)
    cli.keep_compiled(settings.compilation_cache)
    with settings.in_use() as mesh:  # imports JAX: after the settings' checks
        _measure(settings, mesh)


def _measure(settings: Settings, mesh) -> None:
    from ppow_jax.bench import serving
    from ppow_jax.evaluation import measure, report
    from ppow_jax.evaluation.benchmarks import load_benchmark
    from ppow_jax.serving.engine import Engine
    from ppow_jax.serving.machine import Machine
    from ppow_jax.serving.metrics import Metrics

    s = settings
    benchmarks = [load_benchmark(name, s.num_prompts, 0, s.benchmark_dir) for name in s.chosen]
    model, speculation, context = serve.load_models(s)
    turns = [(prompt.source, prompt.turns[0]) for benchmark in benchmarks for prompt in benchmark.prompts]
    prompts = [model.chat_prompt(text) for _, text in turns]
    for (source, _), prompt in zip(turns, prompts, strict=True):
        rule = f"its {len(prompt)} tokens and --max_new_tokens={s.max_new_tokens} exceed the context, {context}"
        require(len(prompt) + s.max_new_tokens <= context, f"{source}: {rule}")
    work = serving.Workload(prompts, s.clients, s.max_new_tokens, s.temperature)
    machine = Machine(model, speculation, s.slots, context, s.rounds)
    machine.warm_up()
    engine = Engine(machine, Metrics(s.target, speculation.window), s.clients, mesh)
    found = serving.compare(engine, work, s.repetitions)
    print(f"{s.target}, {speculation.mode}, {s.clients} clients, {s.slots} slots, {len(prompts)} prompts")
    print(serving.table(found))
    if s.output:
        about = {"command": flags.command("experiments.serve_bench", s), "mode": speculation.mode}
        report.write_json(s.output, measure.environment(s.dtype) | about | found)
        print(f"result: {s.output}")


if __name__ == "__main__":
    cli.run(main, Settings)
