"""Drafters and flagfiles that come with the package: where they are looked for, and the error where one is missing."""

from pathlib import Path

import pytest

from ppow_jax import files
from ppow_jax.errors import UserError
from ppow_jax.weights import shipped
from ppow_jax.weights.loading import find_drafter

NAME = shipped.SHIPPED[0]


def put(root: Path) -> Path:
    """A drafter's directory below `root`."""
    directory = root / NAME
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The directory of a package that was installed without the repository; an empty working directory."""
    package = tmp_path / "site-packages" / "ppow_jax"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    return package


def test_every_shipped_drafter_is_in_the_repository():
    assert all((shipped._PACKAGE.parent / "drafters" / name / "config.json").is_file() for name in shipped.SHIPPED)


def test_look_up_goes_from_the_variable_to_the_wheel(installed, tmp_path, monkeypatch):
    places = [put(installed / "drafters")]
    assert find_drafter("auto", NAME) == places[-1]
    places.append(put(installed.parent / "drafters"))
    assert find_drafter("auto", NAME) == places[-1]
    put(Path("drafters"))
    assert find_drafter("auto", NAME) == Path("drafters") / NAME
    chosen = put(tmp_path / "chosen")
    monkeypatch.setenv("PPOW_JAX_DRAFTERS", str(chosen.parent))
    assert find_drafter("auto", NAME) == chosen and find_drafter(NAME, "other") == chosen
    assert find_drafter(str(places[0]), NAME) == places[0]  # a path is that path
    assert find_drafter("auto", "a/path") is None and find_drafter("auto", "another") is None


@pytest.mark.parametrize("name", ["auto", NAME])
def test_a_shipped_drafter_that_is_missing_is_an_error(installed, name):
    with pytest.raises(UserError) as caught:
        find_drafter(name, NAME)
    message = str(caught.value)
    place = f"drafters/{NAME} or {installed.parent / 'drafters' / NAME} or {installed / 'drafters' / NAME}"
    assert message.startswith(f"--drafter={name}: the drafter for {NAME} was not found in {place}; ")
    assert "set PPOW_JAX_DRAFTERS to" in message
    assert message.endswith("--drafter=none") and "\n" not in message
    assert find_drafter(None, NAME) is None


def test_a_wrong_variable_is_named(installed, monkeypatch):
    monkeypatch.setenv("PPOW_JAX_DRAFTERS", "nowhere")
    with pytest.raises(UserError, match="^PPOW_JAX_DRAFTERS=nowhere: must be a directory"):
        find_drafter("auto", NAME)


def test_flagfiles_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    path = Path("experiments", "configs", "tiny.flags")
    monkeypatch.chdir(tmp_path)
    assert files.shipped(path).is_absolute() and "--target=tiny" in files.shipped(path).read_text()
    assert files.shipped("experiments/configs/none.flags") == Path("experiments/configs/none.flags")
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert files.shipped(path) == path
