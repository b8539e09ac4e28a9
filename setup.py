"""Builds wheels that bring the drafters along; everything else about the package stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithDrafters(build_py):
    """Copies `drafters/` into the built package, where `ppow_jax.weights.shipped` finds it."""

    def run(self) -> None:
        """Builds the package; editable installs use the drafters of the repository."""
        super().run()
        if not self.editable_mode:
            source = Path(__file__).parent / "drafters"
            shutil.copytree(source, Path(self.build_lib) / "ppow_jax" / "drafters", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithDrafters})
