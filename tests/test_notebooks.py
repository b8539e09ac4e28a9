"""The notebook: its cells run as they stand, on a small model; what is stored in it is whole, and small."""

import ast
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import small_model

import ppow_jax

NOTEBOOKS = sorted((Path(__file__).parent.parent / "experiments" / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_one_after_the_other(path, monkeypatch, capsys):
    monkeypatch.setattr(ppow_jax, "load", lambda name: small_model.model(), raising=False)
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict = {}
    for n, cell in enumerate(code_cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {n}", "exec"), names)
    assert names["stream"].result.text in capsys.readouterr().out
    assert "<iframe" in names["trace"]._repr_html_() and len(names["trace"].steps) > 0
    assert len(names["figure"].axes) == 2
    plt.close(names["figure"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_what_is_public_is_used(path):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_cells(path)))
    used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used += [
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
    ]
    assert used and not [name for name in used if name.startswith("_")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom_and_its_outputs_are_small(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"stream", "execute_result", "display_data"} and kinds >= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = path.read_text()
    assert len(text) < 300_000 and not re.search(r"/home/|/root/|/tmp/|/Users/", text)


def test_there_is_one():
    assert [path.stem for path in NOTEBOOKS] == ["quickstart"]
