"""Model card of an exported drafter: README.md with its purpose, measurements, and instructions for loading it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.weights import targets
from ppow_jax.weights.huggingface import read_json, replace_files

# Heading -> cell of a result row of the evaluation.
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "benchmark": lambda row: _text(row.get("benchmark")),
    "mode": lambda row: _text(row.get("mode")),
    "temperature": lambda row: _text(row.get("temperature")),
    "batch": lambda row: _text(row.get("batch_size")),
    "window": lambda row: _text(row.get("window")),
    "tau": lambda row: _number(row.get("tau"), 2),
    "speedup": lambda row: _number(row.get("speedup"), 2),
    "token/s": lambda row: _number(row.get("tokens_per_second"), 1),
    "plain token/s": lambda row: _number(row.get("baseline_tokens_per_second"), 1),
    "identical / total": lambda row: f"{_text(row.get('identical'))} / {_text(row.get('total'))}",
    "acceptance by position": lambda row: " ".join(
        _number(value, 2) for value in row.get("acceptance_by_position") or []
    ),
}

LICENSE = "apache-2.0"
# Tags by which the hub finds drafters, and servers' pages list them; the format's own come last.
_TAGS = {
    "flat": ("eagle3", "speculative-decoding", "draft-model", "vllm", "sglang"),
    "speculators": ("eagle3", "speculative-decoding", "draft-model", "vllm", "speculators"),
}
_LAYOUT = {
    "flat": "The files have the flat EAGLE-3 layout; without an embedding in them, the target's is used.",
    "speculators": "The files have the speculators layout, vLLM's own (`experiments.convert` makes others).",
}

_LOADING = """\
## How to load it

In this directory, or with its path in place of `.`:

```
DRAFTER=.
```

With this project:

```
ppow-generate --target={target} --drafter="$DRAFTER" --prompt="Hello"
```

{layout} With vLLM:

```
vllm serve {base} --speculative-config \\
  '{{"method": "eagle3", "model": "'"$DRAFTER"'", "num_speculative_tokens": {window}}}'
```
"""

_SGLANG = """\
With SGLang:

```
python -m sglang.launch_server --model-path {base} --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path "$DRAFTER" --speculative-num-steps {window} \\
  --speculative-eagle-topk 1 --speculative-num-draft-tokens {steps}
```
"""


def write_card(
    directory: str | Path,
    *,
    title: str,
    target: str,
    base_model: str | None = None,
    figures: Sequence[Mapping[str, Any]],
    command: str,
    notes: str = "",
    format: str = "flat",
    license: str = LICENSE,
) -> None:
    """Writes README.md, with the front matter that the Hugging Face hub reads.

    Args:
      target: the model that the drafter speeds up, by its name here.
      base_model: its hub name ("owner/model"), for servers and the front matter; by default that of `target`, if known.
      figures: result rows of the evaluation; absent values are shown as a dash.
      command: the command that made the drafter.
      notes: Markdown, put between the figures and the command: data, device, caveats.
      format: of the drafter's files, see `drafters.FORMATS`.
      license: of the drafter, by the hub's identifier.

    Raises:
      UserError: if the directory cannot be written.
    """
    front = [f"license: {license}", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in _TAGS[format])]
    base = base_model or targets.base_model(target)
    if base is not None:
        front.append(f"base_model: {json.dumps(base)}")
    window = max((int(row["window"]) for row in figures if row.get("window")), default=4)
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {title}",
        f"An EAGLE-3 drafter for speculative decoding with `{target}`. It does not change what the target"
        " says, only how fast: every drafted token is verified by the target.",
        "## Figures",
        _table(figures) if figures else "Not measured yet.",
        "tau is the mean number of tokens gained per verification, with the bonus token (plain decoding: 1)."
        " The speedup is over plain decoding in the same program and run. Acceptance is conditional: of the"
        " tokens drafted at a position whose predecessors were all accepted.",
        notes.strip(),
        f"## How it was made\n\n```\n{command.strip()}\n```",
        _LOADING.format(target=target, base=base or target, window=window, layout=_LAYOUT[format]),
        _SGLANG.format(base=base or target, window=window, steps=window + 1) if format == "flat" else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    replace_files(directory, {"README.md": lambda path: path.write_text(text, encoding="utf-8")})


def carry_over(source: Path, directory: Path, format: str) -> None:
    """Copies the card of a drafter that was rewritten in another format, with the format's description updated.

    A drafter without a card gets none.

    Raises:
      UserError: if the card cannot be read, or written.
    """
    path = source / "README.md"
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({type(error).__name__})") from None
    text = re.sub(r"The files have the \w+ (EAGLE-3 )?layout.*? With vLLM:", f"{_LAYOUT[format]} With vLLM:", text)
    if format != "flat":
        text = re.sub(r"\n*With SGLang:\n+```.*?```\n", "\n", text, flags=re.DOTALL)
    note = f"Converted to the {format} format with `python -m experiments.convert convert`."
    text = f"{text.rstrip()}\n\n{note}\n"
    replace_files(directory, {"README.md": lambda path: path.write_text(text, encoding="utf-8")})


def read_figures(path: str | Path) -> list[dict[str, Any]]:
    """The result rows of a file by `experiments.evaluate --output`. Raises UserError for other files."""
    rows = read_json(Path(path).expanduser()).get("results")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "tau" in row for row in rows):
        raise UserError(f"--figures={path}: must be a result file of experiments.evaluate, with a list `results`")
    return rows


def complete(directory: Path, *, format: str, base_model: str | None, license: str | None) -> None:
    """Adds to the card's front matter what the hub wants: tags, base model, licence; what is there already stays.

    base_model, license: replace those of the card if they are given.

    Raises:
      UserError: for a card that cannot be read, a front matter that is not YAML, or without a licence.
    """
    from huggingface_hub import ModelCard

    path = directory / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
        data: Any = card.data
        data.tags = list(dict.fromkeys([*(data.tags or []), *_TAGS[format]]))
    except Exception as error:  # errors of YAML, of the system and of the library share no class
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{path}: its front matter cannot be read ({type(error).__name__}: {reason})") from None
    data.base_model = base_model or data.base_model
    data.license = license or data.license
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    if not data.license:
        raise UserError(f"{path}: names no licence: give one, --license=apache-2.0 or another of the hub's identifiers")
    text = str(card)
    replace_files(directory, {"README.md": lambda place: place.write_text(text, encoding="utf-8")})


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    lines += [[cell(row) for cell in _COLUMNS.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _text(value: Any) -> str:
    """Escapes bars and line breaks, which would end a table cell."""
    return "–" if value is None else " ".join(str(value).replace("|", "\\|").split())
