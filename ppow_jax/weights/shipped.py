"""Drafters that come with ppow_jax: where they are looked for, and what is said when one is missing."""

import os
from pathlib import Path

from ppow_jax.errors import UserError
from ppow_jax.weights.huggingface import CONFIG

VARIABLE = "PPOW_JAX_DRAFTERS"
SHIPPED = ("smollm2-135m",)  # targets that a drafter comes with
_PACKAGE = Path(__file__).parents[1]
_HINT = f"set {VARIABLE} to the drafters directory of the repository, or decode without one: --drafter=none"


def roots() -> list[Path]:
    """Directories of drafters, one subdirectory per target, in the order of look-up.

    The directory that $PPOW_JAX_DRAFTERS names; `drafters` below the working directory; `drafters` of the repository
    that the package lies in; the copies that a wheel brings along.

    Raises:
      UserError: $PPOW_JAX_DRAFTERS does not name a directory.
    """
    named = os.environ.get(VARIABLE)
    if named and not Path(named).expanduser().is_dir():
        raise UserError(f"{VARIABLE}={named}: must be a directory that has a subdirectory per target")
    places = [Path("drafters"), _PACKAGE.parent / "drafters", _PACKAGE / "drafters"]
    return [Path(named).expanduser(), *places] if named else places


def find(target: str, flag: str = "auto") -> Path | None:
    """The directory of the drafter for a target by name (not by path), the first of `roots` that has it.

    None where no drafter comes with this target and nobody put one there. flag: value of --drafter, for the message.

    Raises:
      UserError: the drafter that comes with this target is missing.
    """
    if Path(target).name != target:
        return None
    places = roots()
    found = next((root / target for root in places if (root / target / CONFIG).is_file()), None)
    if found is None and target in SHIPPED:
        looked = " or ".join(str(root / target) for root in places)
        raise UserError(f"--drafter={flag}: the drafter for {target} was not found in {looked}; {_HINT}")
    return found
