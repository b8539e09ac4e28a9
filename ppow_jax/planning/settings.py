"""Every setting of a plan; the flags of `experiments.plan` are generated from it."""

import dataclasses

from ppow_jax.flags import field
from ppow_jax.training.settings import TrainSettings

PROGRAMS = ("supervised", "ppow", "decode", "prefill")
DEFAULTS = {
    "target": "llama-3.1-8b",
    "batch_size": 16,
    "row_length": 2048,
    "max_anchors": 1024,
    "draft_vocab_size": 32000,
    "gamma": 0.12,
    "scan_layers": True,
}


@dataclasses.dataclass(frozen=True)
class PlanSettings(TrainSettings):
    """Settings of a training run, and what to plan of it. Raises UserError for impossible values."""

    topology: str = field("local", "local, or CHIP:GRID such as v5e:4x4, v5p:2x2x2.", group="Plan")
    program: str = field("supervised", "The program to compile.", choices=PROGRAMS, group="Plan")
    search: bool = field(False, "Find the largest batch by compiling, in at most three trials.", group="Plan")
    output: str | None = field(None, "JSON file for the plan.", group="Plan")
    compare: tuple[str, ...] = field(
        (), "Instead of planning, print a table of these plans (JSON files).", group="Plan"
    )
    plot: str | None = field(
        None, "With --compare: PNG file, bytes sent per device over the number of devices.", group="Plan"
    )
    prompt_tokens: int = field(512, "Tokens per prompt.", low=1, group="Plan, decoding")
    new_tokens: int = field(
        512, "Tokens per answer; caches have room for prompt and answer.", low=1, group="Plan, decoding"
    )
    tree_depth: int = field(6, "Levels of the tree; 0: a chain of --window tokens.", low=0, group="Plan, decoding")
    tree_branch: int = field(10, "Nodes expanded per level, and children per node.", low=1, group="Plan, decoding")
    tree_nodes: int = field(59, "Verified nodes of the tree.", low=1, group="Plan, decoding")
    cache_dtype: str = field(
        "bfloat16", "Dtype of the target's cache.", choices=("bfloat16", "float32"), group="Plan, decoding"
    )
    tau: float = field(3.0, "Assumed tokens gained per round, for token/s of decoding.", low=1, group="Plan, decoding")
