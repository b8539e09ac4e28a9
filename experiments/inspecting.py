"""Summaries for `experiments.convert inspect`: of a drafter, a target in any form, or the folder of a training run."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.flags import require

FLAGS, REPORT, METRICS = "flags.txt", "report.json", "metrics.jsonl"


def text(name: str) -> str:
    """Summary of a directory, a GGUF file, or a target that has a name here.

    Raises UserError for other names, and for damaged files.
    """
    from ppow_jax.weights import gguf_file, huggingface, summary, targets

    path = Path(name).expanduser()
    if path.is_dir():
        if (path / FLAGS).is_file():
            return summary.table(run_lines(path))
        is_drafter = summary.is_drafter(huggingface.read_json(path / huggingface.CONFIG))
        return summary.table((summary.drafter_lines if is_drafter else summary.target_lines)(path))
    if path.exists():
        require(gguf_file.is_gguf(path), f"{name}: is a file, and no GGUF file")
        return summary.table(gguf_lines(path))
    if name in targets.EMBEDDED:
        return summary.table(gguf_lines(targets.embedded_file(name)))
    known = ", ".join(targets.EMBEDDED)
    raise UserError(f"{name}: there is no such directory or file, and no target of that name (known: {known})")


def gguf_lines(path: Path) -> list[tuple[str, str]]:
    """(label, value) of a GGUF file; its header is checked, its weights are not read."""
    from ppow_jax.weights import gguf, gguf_file, summary

    file = gguf_file.open_model(path)
    config = gguf.read_config(file)
    count = sum(math.prod(map(int, tensor.shape)) for tensor in file.tensors)
    kinds = Counter(tensor.tensor_type.name for tensor in file.tensors)
    stored = ", ".join(f"{number} tensors {kind}" for kind, number in kinds.most_common())
    size = f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)"
    return summary.config_lines(config, f"GGUF, {size}, {stored}", count, "", config.eos_token_ids)


def run_lines(directory: Path) -> list[tuple[str, str]]:
    """(label, value) of a training run: its settings, how far it came, what was measured, its drafters."""
    from ppow_jax.study.settings import StudySettings
    from ppow_jax.training.settings import TrainSettings

    try:
        settings: TrainSettings = flags.read_flagfile(TrainSettings, directory / FLAGS)
        kind = "training run"
    except UserError:  # a study's flags are those of a run, and more
        settings = flags.read_flagfile(StudySettings, directory / FLAGS)
        kind = "study"
    lines = [("kind", f"{kind}, target {settings.target}")]
    lines += [("settings" if not n else "", flag) for n, flag in enumerate(flags.changed(settings))]
    totals = {"supervised": settings.supervised_steps, "ppow": settings.ppow_steps, "cst": settings.ppow_steps}
    for stage, row in _last_rows(directory / METRICS).items():
        if stage in totals:
            loss = f", loss {row['loss']:.3f}" if isinstance(row.get("loss"), float) else ""
            lines.append(("stage", f"{stage}: step {row['step']} of {totals[stage]}{loss}"))
    if (directory / REPORT).is_file():
        lines.append(("result", _json(directory / REPORT).get("headline") or "see report.md"))
    for path in sorted(directory.glob("*/config.json")):
        lines.append(("drafter", f"{path.parent} (inspect it with its own name)"))
    return lines


def _last_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of metrics of every stage."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that is being written, or was killed
            continue
        found[row["stage"]] = row
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
