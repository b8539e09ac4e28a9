"""Runs notebooks from top to bottom and stores their outputs: `pip install nbclient ipykernel`, then

    python docs/tools/execute_notebooks.py experiments/notebooks/quickstart.ipynb

What the kernel writes to standard error (warnings, slow compilations) is printed here, and not stored.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def execute(path: Path) -> None:
    """Runs one notebook in the repository's root and rewrites its file; raises if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where, record_timing=False).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                print(f"{path}: {output['text']}", file=sys.stderr)
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    nbformat.write(notebook, path)
    print(f"{path}: done")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
