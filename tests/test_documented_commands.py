"""Every command of the documentation parses; those that need no network, and little time, are run (slow)."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import documented_commands
import pytest
from documented_commands import PAGES, ROOT, Command, commands, python_blocks

from docs.tools.entry_points import entry_points
from ppow_jax import flags

ALL = [command for page in PAGES for command in commands(page)]
OURS = [command for command in ALL if (command.module or "").startswith("experiments.")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_PROGRAMS = {"gcloud", "git", "cd", "export", "vllm", "curl", "mkdocs", "docker"}
OTHER_MODULES = {"sglang.launch_server", "sgl_jax.launch_server", "pytest", "venv", "pip"}
MODEL = "drafters/smollm2-135m"
# Stand-ins for the names that a reader replaces; they are run as they are otherwise.
PLACEHOLDERS = {"DIR": MODEL, "DIRECTORY": MODEL, "DRAFTER": MODEL, "OUT": "out"}
RUN = (  # what is run: on the included model, in minutes at most
    r"experiments\.train --help",
    r"experiments\.convert inspect DIR",
    r"experiments\.convert convert --format=speculators --output=OUT DIR",
    r'experiments\.generate "?--prompt=How do I write [^"]*\?"? --compare',
)


@pytest.fixture(scope="module")
def programs():
    return entry_points()


def place(tmp_path: Path) -> Path:
    """A directory that looks like the repository, in which a command may write."""
    for name in ("experiments", "drafters", "ppow_jax", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_commands_are_found():
    text = " ".join(map(str, ALL))
    for part in (
        "make train",
        "experiments.generate",
        "experiments.evaluate",
        "--multihost",
        "convert verify",
        "pip install",
    ):
        assert part in text
    assert len(OURS) >= 30 and {command.words[0] for command in ALL} >= {"make", "pip", "vllm"}


def test_a_page_is_split_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setattr(documented_commands, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Try `python -m experiments.train\n--help`, or:\n\n```sh\nA=1 make x y  # a; b\n"
        'gcloud ssh --command="cd z && python -m experiments.train \\\n  --a=b ..."\n```\n\n    ppow-train --c="d e"\n'
    )
    found = [(command.place, " ".join(command.words)) for command in commands(page)]
    assert found == [
        ("page.md:5", "make x y"),
        ("page.md:5", "gcloud ssh --command=cd z && python -m experiments.train    --a=b ..."),
        ("page.md:5", "cd z"),
        ("page.md:5", "python -m experiments.train --a=b ..."),
        ("page.md:10", "ppow-train --c=d e"),
        ("page.md:1", "python -m experiments.train --help"),
    ]
    assert [command.arguments for command in commands(page)[3:]] == [["--a=b"], ["--c=d e"], ["--help"]]
    assert {command.module for command in commands(page)} == {None, "experiments.train"}


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.place}-{command.module or command.words[0]}")
def test_the_program_exists(command: Command):
    first, module = command.words[0], command.module
    if module is not None:
        assert module in OTHER_MODULES or importlib.util.find_spec(module), f"{command}: there is no module {module}"
        if first.startswith("ppow-"):
            assert first in PROJECT["scripts"], f"{command}: there is no such script"
    elif first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        names = [word for word in command.words[1:] if "=" not in word]
        assert set(names) <= set(targets), f"{command}: no such target"
    elif first == "pip":
        extras = {name for word in command.words for part in re.findall(r"\[(.*?)\]", word) for name in part.split(",")}
        known = set(PROJECT["optional-dependencies"]) | {"tpu", "cuda12", "cuda13"}
        assert extras <= known, f"{command}: no such extra"
    elif documented_commands.PYTHON.fullmatch(first):
        assert (ROOT / command.words[1]).exists(), f"{command}: no such file"
    else:
        assert first in OTHER_PROGRAMS, f"{command}: an unknown program; is it a command at all?"


@pytest.mark.parametrize("command", OURS, ids=lambda command: f"{command.place}-{command.module or command.words[0]}")
def test_the_flags_become_settings(command: Command, programs, tmp_path, monkeypatch):
    monkeypatch.chdir(place(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())  # torch is not needed for parsing
    name, arguments = (command.module or "").removeprefix("experiments."), command.arguments
    if name not in programs:
        assert arguments and f"{name} {arguments[0]}" in programs or "--help" in arguments, (
            f"{command}: no such command"
        )
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    if "--help" in arguments:
        return
    for argument in arguments:
        if not argument.startswith("-"):
            Path(argument).mkdir(parents=True, exist_ok=True)
        elif re.match("--flagfile=[A-Z]", argument):  # a name that stands for any run's
            flagfile = Path(argument.partition("=")[2])
            flagfile.parent.mkdir()
            flagfile.write_text("")
    settings = flags.parse(programs[name].settings, arguments, programs[name].defaults)
    assert isinstance(settings, programs[name].settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_examples_compile_and_their_imports_exist(page: Path):
    for line, source in python_blocks(page):
        for node in ast.walk(ast.parse(source, f"{page.name}:{line}")):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}:{line}: {node.module} has no {name.name}"


def runnable() -> list[Command]:
    """The first command that matches each pattern of RUN."""
    found = []
    for pattern in RUN:
        matching = [command for command in OURS if re.search(pattern + "$", " ".join(command.words))]
        assert matching, f"no page documents {pattern}; take it out of RUN, or put it back"
        found.append(matching[0])
    return found


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize(
    "command", runnable(), ids=lambda command: f"{command.place}-{command.module or command.words[0]}"
)
def test_it_runs(command: Command, tmp_path):
    arguments = [PLACEHOLDERS.get(word, word).replace("=OUT", "=out") for word in command.words[3:]]
    words = [sys.executable, "-m", str(command.module), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=place(tmp_path), env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "--compare" in command.words:
        assert "the outputs are identical" in done.stdout
