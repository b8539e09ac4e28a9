"""The programs of `experiments`, with the settings that each command line becomes, found by importing them."""

import ast
import inspect
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ppow_jax import cli

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class EntryPoint:
    """A program, or one command of it: its name, such as `convert inspect`, its help, settings and defaults."""

    name: str
    help: str
    settings: type
    defaults: Mapping[str, Any]


class _Reached(Exception):
    """Raised in place of running a program."""


def entry_points() -> dict[str, EntryPoint]:
    """Every program below `experiments` that can be run with `python -m`, by name."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            for entry in _of(path):
                found[entry.name] = entry
    return found


def _of(path: Path) -> list[EntryPoint]:
    program, about = path.stem, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    caught: list[EntryPoint] = []

    def run(main, settings, defaults=None, argv=None, command=None):
        caught.append(EntryPoint(program, about, settings, defaults or {}))
        raise _Reached

    def run_command(commands, argv=None):
        for word, (main, settings) in commands.items():
            caught.append(EntryPoint(f"{program} {word}", inspect.cleandoc(main.__doc__ or ""), settings, {}))
        raise _Reached

    with mock.patch.object(cli, "run", run), mock.patch.object(cli, "run_command", run_command):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Reached:
            return caught
    raise RuntimeError(f"{path}: calls neither cli.run nor cli.run_command")
