"""Programming tasks from Python's own standard library: every documented function, to be completed.

They need no network and no package, and resemble the tasks of code benchmarks without including any of them.
"""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 60, 1200  # characters of a docstring that is informative, and fits a prompt
TASK = "Complete the following Python function:\n\n```python\n{code}\n```"  # worded as in HumanEval here


def stdlib_tasks() -> Iterator[tuple[str, str]]:
    """(place, prompt) of each documented function or method, in the order of files.

    The selection depends on the version of Python alone.
    """
    seen = set()
    for place, node in stdlib_functions():
        if (code := _stub(node)) and code not in seen:
            seen.add(code)
            yield place, TASK.format(code=code)


def stdlib_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """(place, function) of every function or method of the standard library, in the order of files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"test", "tests", "idlelib", "site-packages", "dist-packages"} & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # samples for other versions, and of errors
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"stdlib/{inside.as_posix()}:{node.lineno}", node


def _stub(node: ast.FunctionDef) -> str | None:
    """Signature and docstring; None without a docstring of a useful length."""
    text = ast.get_docstring(node) or ""
    if not SHORTEST <= len(text) <= LONGEST:
        return None
    bare = ast.FunctionDef(
        name=node.name,
        args=node.args,
        body=[ast.Expr(ast.Constant(textwrap.indent(text, "    ").lstrip() + "\n    "))],
        decorator_list=[],
        returns=node.returns,
        type_params=[],
    )
    return ast.unparse(ast.fix_missing_locations(bare))
