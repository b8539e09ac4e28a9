"""The notebooks: their cells run as they stand; what is stored in them is whole, and small."""

import ast
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import small_model

import ppow_jax

FOLDER = Path(__file__).parent.parent / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells_of(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run(name: str, monkeypatch) -> dict:
    """The names that a notebook defines; what it loads is a small model, and its figures stay open."""
    monkeypatch.setattr(ppow_jax, "load", lambda name: small_model.model(), raising=False)
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict = {}
    for n, cell in enumerate(cells_of(FOLDER / f"{name}.ipynb")):
        exec(compile("".join(cell["source"]), f"{name}, cell {n}", "exec"), names)
    return names


@pytest.mark.full
def test_quickstart(monkeypatch, capsys):
    names = run("quickstart", monkeypatch)
    assert names["stream"].result.text in capsys.readouterr().out
    assert "<iframe" in names["trace"]._repr_html_() and len(names["trace"].steps) > 0
    assert len(names["figure"].axes) == 2
    plt.close("all")


@pytest.mark.slow
def test_inside_a_ppow_step(monkeypatch, capsys):
    names = run("inside_a_ppow_step", monkeypatch)
    sampled, settings = names["sampled"], names["settings"]
    B, X = sampled.accepted_BxX.shape
    assert X == settings.windows * settings.group and "accepted_histogram" in capsys.readouterr().out
    reward = np.asarray(names["measured"].speedup_BxX) + np.asarray(names["measured"].proximity_BxX)
    np.testing.assert_allclose(names["groups"].reshape(B, X), reward, rtol=1e-6)
    np.testing.assert_allclose(names["advantage"].mean(-1), 0, atol=1e-4)
    curves = {A: np.asarray(curve) for A, curve in names["curves"].items()}
    assert curves[1.0].max() == pytest.approx(1.2) and curves[-1.0].max() == pytest.approx(-0.8)
    figures = [names[name] for name in ("figure", "windows_figure", "rewards_figure", "objective_figure")]
    assert [len(figure.axes) for figure in figures] == [2, 1, 4, 1]
    plt.close("all")


@pytest.mark.slow
def test_specialise_a_drafter(monkeypatch, capsys):
    names = run("specialise_a_drafter", monkeypatch)
    said = capsys.readouterr().out
    assert said.count("exit code 0") == 2 and said.count("tokens per verification\n") >= 2
    assert [arm["name"] for arm in names["report"]["arms"]] == ["start", "ppow", "cst"]
    assert all(len(line.get_xdata()) == 5 for line in names["axes"].get_lines())
    written = {path.name for path in (names["folder"] / "special" / "drafter").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= written
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_what_is_public_is_used(path):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells_of(path)))
    used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used += [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
    ]
    assert used and not [name for name in used if name.startswith("_")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run_from_top_to_bottom_or_absent(path):
    cells = cells_of(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    if path.stem != "quickstart" and not outputs:
        assert {cell["execution_count"] for cell in cells} == {None}
        return
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "execute_result", "display_data"} and kinds >= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = path.read_text()
    assert len(text) < 300_000 and not re.search(r"/home/|/root/|/tmp/|/Users/", text)


def test_the_documentation_names_them_all():
    assert [path.stem for path in NOTEBOOKS] == ["inside_a_ppow_step", "quickstart", "specialise_a_drafter"]
    pages = "".join(page.read_text() for page in (FOLDER.parents[1] / "docs").glob("*.md"))
    assert all(f"notebooks/{path.name}" in pages for path in NOTEBOOKS)
