"""Compares this implementation with transformers and torch (`pip install torch==2.13.0`).

By default: logits and greedy text of the target in float32, and its tokenizer if it comes from a GGUF file.
--speed: plain decoding at batch size 1, both implementations in both precisions, alternating in one run. Torch decodes
in a simple loop with its key/value cache, which is faster than `generate`. Run nothing else on the machine meanwhile.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json

from tabulate import tabulate

from ppow_jax import cli
from ppow_jax.evaluation import torch_parity
from ppow_jax.files import write_atomic
from ppow_jax.flags import check_fields, field, require

VERSIONS = "jax", "torch", "transformers", "gguf", "tokenizers"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of this program."""

    target: str = field("smollm2-135m", "Target: a name, a .gguf file, a directory or a hub name.")
    num_prompts: int = field(20, "Prompts whose greedy text is compared.", low=1)
    max_new_tokens: int = field(64, "Tokens of each greedy text, and of each timed run.", low=2)
    speed: bool = field(False, "Measure the speed of plain decoding instead.")
    repeats: int = field(5, "Timed runs per implementation and precision.", low=1)
    output: str | None = field("parity.json", "Result file.")

    def __post_init__(self):
        check_fields(self)
        found = importlib.util.find_spec("torch") is not None
        require(found, "experiments.parity compares with torch: pip install torch==2.13.0")


def main(settings: Settings) -> int:
    """Runs the chosen comparison; 1 if something differs."""
    s = settings
    if s.speed:
        rows = torch_parity.speed(s.target, s.max_new_tokens, s.repeats)
    else:
        rows = torch_parity.compare(s.target, s.num_prompts, s.max_new_tokens)
    print(tabulate(rows, headers="keys", floatfmt=".6g"))
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    if s.output:
        result = {"settings": dataclasses.asdict(s), "versions": versions, "results": rows}
        write_atomic(s.output, json.dumps(result, indent=2) + "\n")
    return int(not all(row.get("passed", True) for row in rows))


if __name__ == "__main__":
    cli.run(main, Settings)
