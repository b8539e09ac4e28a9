"""The documentation site: figures, generated tables, and a strict build."""

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from docs.tools.entry_points import entry_points

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_figures_are_drawn_and_shown(tmp_path):
    from docs.tools import figures

    figures.main(tmp_path)
    concepts = (ROOT / "docs" / "concepts.md").read_text()
    for name in figures.FIGURES:
        made = xml.etree.ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        stored = xml.etree.ElementTree.parse(ROOT / "docs" / "figures" / f"{name}.svg").getroot()
        assert texts(made) == texts(stored) and len(texts(made)) > 5
        assert f"(figures/{name}.svg)" in concepts


def texts(root) -> list[str]:
    """The words of a figure."""
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_every_program_is_an_entry_point():
    found = entry_points()
    assert {"train", "evaluate", "generate", "reproduce", "plan", "serve", "convert inspect"} <= set(found)
    assert found["plan"].defaults["target"] == "llama-3.1-8b"
    assert "window" in {field.name for field in dataclasses.fields(found["train"].settings)}
    assert found["train"].help.startswith("Trains a drafter")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="an extra: pip install 'ppow_jax[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = (tmp_path / "flags" / "index.html").read_text(encoding="utf-8")
    assert "<code>--[no]adaw</code>" in shown and "Optimizer steps of stage 1. Must be at least 1." in shown
    assert "the flags of all programs" not in shown
    reference = (tmp_path / "python" / "objectives" / "index.html").read_text(encoding="utf-8")
    assert 'id="ppow_jax.objectives.rewards.speedup_reward"' in reference
    concepts = (tmp_path / "concepts" / "index.html").read_text(encoding="utf-8")
    assert concepts.count("<img") >= 5 and (tmp_path / "figures" / "tree.svg").exists()
    assert "inside_a_ppow_step.ipynb</code>" in concepts and not (tmp_path / "tools").exists()
