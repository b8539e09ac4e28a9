"""Measures decoding and training on the device at hand, against the device's peak performance.

    python -m experiments.bench --target=smollm2-135m --output=bench.json --plot=bench.png
    python -m experiments.bench --target=llama-3.1-8b --random_weights --parts=decode,verify,prefill
    python -m experiments.bench --compare=before.json,after.json

Prints a table with the median time of each part, the time to compile it, and the shares of the peak operations and of
the peak bandwidth that the necessary work amounts to. docs/bench.md explains every column.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.common import ModelFlags
from ppow_jax import cli
from ppow_jax.flags import field, require

if TYPE_CHECKING:
    from ppow_jax.bench.timing import Row

PARTS = ("decode", "verify", "draft", "prefill", "answers", "supervised", "ppow")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings(ModelFlags):
    """The flags of this program."""

    random_weights: bool = field(
        False, "Random weights of the target's published shape, such as --target=llama-3.1-8b.", group="Models"
    )
    draft_vocab_size: int = field(32000, "Vocabulary of a random drafter.", low=1, group="Models")
    scan_layers: bool | None = field(
        None, "Stack the target's layers and scan over them; by default except on a CPU.", group="Models"
    )

    parts: tuple[str, ...] = field(PARTS, "Parts to measure.", choices=PARTS, group="Measuring")
    repetitions: int = field(10, "Timed runs of each part, of which the median counts.", low=1, group="Measuring")
    batches: tuple[int, ...] = field((1, 4, 16, 64), "Batch sizes of decoding.", low=1, group="Measuring")
    widths: tuple[int, ...] = field(
        (2, 4, 8, 16, 32, 64), "Tokens verified at once, the last committed one among them.", low=2, group="Measuring"
    )
    verify_batch: int = field(1, "Batch size of --parts=verify.", low=1, group="Measuring")
    window: int = field(5, "Drafted tokens per round, K; ttt steps of stage 1.", low=1, high=64, group="Measuring")
    context: int = field(1024, "Slots of the caches, half of them filled.", low=96, group="Measuring")
    prompt_tokens: int = field(512, "Tokens per prompt of prefill and answers.", low=1, group="Measuring")
    new_tokens: int = field(128, "Tokens per answer.", low=2, group="Measuring")
    rows: int = field(4, "Rows of a training batch.", low=1, group="Measuring")
    row_length: int = field(512, "Tokens per row.", low=16, group="Measuring")
    max_anchors: int = field(352, "Trained positions per row.", low=1, group="Measuring")
    accumulate: int = field(1, "Microbatches of a training step.", low=1, group="Measuring")

    output: str | None = field(None, "JSON file for the results.", group="Output")
    plot: str | None = field(None, "PNG file for a plot.", group="Output")
    compare: tuple[str, ...] = field(
        (), "Instead of measuring, compare these results (JSON files): the ratios to the first.", group="Output"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("parts", "batches", "widths"):
            require(bool(getattr(self, name)), f"--{name}=: must name one at least")
        require(
            max(self.widths) + 3 <= self.context // 2,
            f"--widths={','.join(map(str, self.widths))}: must be at most half of --context={self.context}, less 3",
        )
        require(
            self.max_anchors + 2 <= self.row_length,
            f"--max_anchors={self.max_anchors}: must be at most --row_length={self.row_length}, less 2",
        )
        require(self.plot is None or self.plot.endswith(".png"), f"--plot={self.plot}: must end in .png")


def main(settings: Settings) -> None:
    """Measures, or compares, and prints."""
    for name in ("output", "plot"):
        cli.check_output(f"--{name}", getattr(settings, name))
    from ppow_jax.bench import tables

    if settings.compare:
        results = [tables.read(path) for path in settings.compare]
        print(tables.comparison(results))
    else:
        cli.keep_compiled(settings.compilation_cache)
        results = [measure(settings)]
        print(f"{results[0]['target']}, {results[0]['dtype']}, {results[0]['device']}; peaks: {_peaks(results[0])}")
        print(tables.table(results[0]["results"]))
        if settings.output:
            print(f"results: {settings.output}")
    if settings.plot:
        tables.plot(settings.plot, results)
        print(f"plot: {settings.plot}")


def _peaks(result: dict[str, Any]) -> str:
    peak, number = result["peak"], result["devices"]
    figures = f"{peak['flops'] / 1e12:.4g} TFLOP/s, {peak['bandwidth'] / 1e9:.4g} GB/s ({peak['source']})"
    return f"{number} times {figures}" if number > 1 else figures


def measure(settings: Settings) -> dict[str, Any]:
    """The result for --output (docs/bench.md); written after each part."""
    import jax

    from ppow_jax import sharding
    from ppow_jax.bench import devices
    from ppow_jax.bench.timing import Bench
    from ppow_jax.evaluation import report
    from ppow_jax.evaluation.measure import environment
    from ppow_jax.models import precision
    from ppow_jax.training.run.clock import memory_bytes

    with settings.in_use() as mesh:
        chip = devices.limits(jax.devices())
        bench = Bench(chip, mesh.size, settings.repetitions)
        result: dict[str, Any] = {"bench": 1, "target": settings.target, "dtype": settings.dtype}
        result |= {"mesh": str(sharding.shape_of(mesh))}
        result |= {"devices": mesh.size, "peak": dataclasses.asdict(chip)} | environment(settings.dtype)
        result |= {"policy": precision.current().name, "settings": dataclasses.asdict(settings), "results": []}
        for row in _rows(settings, bench):
            log.info("%s", row)
            result["results"].append(row)
            result["peak_memory_bytes"] = memory_bytes()
            if settings.output:
                report.write_json(settings.output, result)
    return result


def _rows(settings: Settings, bench) -> "Iterator[Row]":
    from ppow_jax.bench import subjects
    from ppow_jax.bench import training_parts as training
    from ppow_jax.bench.decoding_parts import Decoding
    from ppow_jax.models import platforms

    s = settings
    scan = not platforms.on_cpu() if s.scan_layers is None else s.scan_layers
    subject = subjects.load(s.target, s.drafter, s.dtype, s.random_weights, s.draft_vocab_size, scan)
    decoding = Decoding(bench, subject, s.context, s.window)
    train = training.settings(
        s.dtype, batch_size=s.rows, row_length=s.row_length, max_anchors=s.max_anchors, accumulate=s.accumulate,
        ttt_steps=s.window, window=s.window, windows=min(6, s.max_anchors), mesh=s.mesh,
    )  # fmt: skip
    parts: dict[str, Callable[[int], Iterable[Row]]] = {
        "decode": lambda n: decoding.decode([n]),
        "verify": lambda n: decoding.verify(s.verify_batch, [n]),
        "draft": lambda n: decoding.draft([n]),
        "prefill": lambda n: decoding.prefill([n], s.prompt_tokens),
        "answers": lambda n: decoding.answers([n], s.prompt_tokens, s.new_tokens),
        "supervised": lambda n: [training.supervised_step(bench, subject, train)],
        "ppow": lambda n: [training.ppow_step(bench, subject, train)],
    }
    sizes = {"verify": s.widths, "supervised": (s.rows,), "ppow": (s.rows,)}
    for part in s.parts:
        for size in sizes.get(part, s.batches):
            yield from _unless_too_large(part, size, parts[part])


def _unless_too_large(part: str, size: int, measured: "Callable[[int], Iterable[Row]]") -> "Iterator[Row]":
    """The results; one with `error` in their place where the device's memory is too small."""
    import jax

    try:
        yield from measured(size)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        name = "width" if part == "verify" else "batch"
        yield {"part": part, name: size, "error": "out of memory"}


def command_line() -> NoReturn:
    """`python -m experiments.bench`."""
    cli.run(main, Settings)


if __name__ == "__main__":
    command_line()
