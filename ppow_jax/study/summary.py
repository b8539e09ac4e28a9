"""Summaries for `experiments.convert inspect`: of a drafter, a target in any form, or the folder of a run or study."""

from pathlib import Path

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.flags import require
from ppow_jax.study.settings import StudySettings
from ppow_jax.training.run.metrics import read_metrics
from ppow_jax.training.settings import TrainSettings
from ppow_jax.weights import gguf_file, summary, targets
from ppow_jax.weights.huggingface import CONFIG, read_json

FLAGS, REPORT, METRICS = "flags.txt", "report.json", "metrics.jsonl"


def text(name: str) -> str:
    """Summary of a directory, a GGUF file, or a target that has a name here.

    Raises UserError for other names, and for damaged files.
    """
    path = Path(name).expanduser()
    if (path / FLAGS).is_file():
        lines = run_lines(path)
    elif path.is_dir():
        lines = (summary.drafter_lines if summary.is_drafter(read_json(path / CONFIG)) else summary.target_lines)(path)
    elif path.exists():
        require(gguf_file.is_gguf(path), f"{name}: is a file, and no GGUF file")
        lines = summary.gguf_lines(path)
    else:
        rule = f"there is no such directory or file, and no target of that name (known: {', '.join(targets.EMBEDDED)})"
        require(name in targets.EMBEDDED, f"{name}: {rule}")
        lines = summary.gguf_lines(targets.embedded_file(name))
    return summary.table(lines)


def run_lines(directory: Path) -> list[tuple[str, str]]:
    """(label, value) of a training run: its settings, how far it came, what was measured, its drafters."""
    try:
        settings: TrainSettings = flags.read_flagfile(TrainSettings, directory / FLAGS)
        kind = "training run"
    except UserError:  # a study's flags are those of a run, and more
        settings = flags.read_flagfile(StudySettings, directory / FLAGS)
        kind = "study"
    lines = [("kind", f"{kind}, target {settings.target}")]
    lines += [("settings" if not n else "", flag) for n, flag in enumerate(flags.changed(settings))]
    totals = {"supervised": settings.supervised_steps, "ppow": settings.ppow_steps, "cst": settings.ppow_steps}
    rows = read_metrics(directory / METRICS) if (directory / METRICS).is_file() else []
    for stage, row in {row["stage"]: row for row in rows}.items():  # the last row of each stage
        if stage in totals:
            loss = f", loss {row['loss']:.3f}" if isinstance(row.get("loss"), float) else ""
            lines.append(("stage", f"{stage}: step {row['step']} of {totals[stage]}{loss}"))
    if (directory / REPORT).is_file():
        lines.append(("result", read_json(directory / REPORT).get("headline") or "see report.md"))
    for path in sorted(directory.glob("*/config.json")):
        lines.append(("drafter", f"{path.parent} (inspect it with its own name)"))
    return lines
