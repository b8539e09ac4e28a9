"""The wheel: built without network, it holds all modules, what they read, the shipped drafters and the commands."""

import configparser
import email
import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ppow_jax
from ppow_jax.weights import shipped

ROOT = Path(__file__).parent.parent
DATA = {".flags", ".json", ".npz", ".cc", ".h", ".typed"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_commands_are_the_programs(name, monkeypatch, capsys):
    """`ppow-train --help` is `python -m experiments.train --help`."""
    module, _, function = PROJECT["scripts"][name].partition(":")
    assert module == f"experiments.{name.removeprefix('ppow-')}"
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    shown = capsys.readouterr().out
    assert not ended.value.code and f"usage: {name} " in shown and "usage: python" not in shown


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(directory), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = directory.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.mark.slow
def test_everything_that_is_used_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("ppow_jax", "experiments")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", *DATA}
    }
    assert wanted <= names and "ppow_jax/py.typed" in names
    for target in shipped.SHIPPED:
        for path in (ROOT / "drafters" / target).iterdir():
            assert wheel.read(f"ppow_jax/drafters/{target}/{path.name}") == path.read_bytes()
    assert {name.split("/")[0] for name in names} == {"ppow_jax", "experiments", f"{stem()}.dist-info"}


@pytest.mark.slow
def test_the_wheel_says_what_pyproject_says(wheel):
    about = email.message_from_bytes(wheel.read(f"{stem()}.dist-info/METADATA"))
    assert about["Version"] == ppow_jax.__version__ and about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    commands = configparser.ConfigParser()
    commands.read_string(wheel.read(f"{stem()}.dist-info/entry_points.txt").decode())
    assert dict(commands["console_scripts"]) == PROJECT["scripts"]


def stem() -> str:
    return f"ppow_jax-{ppow_jax.__version__}"
