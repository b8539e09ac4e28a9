"""Configurations of published models, from their public config.json, so that a plan needs no hub."""

from importlib import resources
from pathlib import Path

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.weights import tiny
from ppow_jax.weights.huggingface import find_directory, read_json


def names() -> list[str]:
    """Names of the models whose configurations are included here."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json"))


def read(target: str) -> ModelConfig:
    """The configuration of a target: one of `names()`, `tiny`, a config.json, a directory that holds one, a hub name.

    Raises:
      UserError: it does not exist, or is not supported.
    """
    if target == "tiny":
        return tiny.CONFIG
    if target in names():
        path = Path(str(_folder() / f"{target}.json"))
    elif Path(target).suffix == ".json":
        path = Path(target).expanduser()
    elif Path(target).exists() or target.count("/") == 1:
        path = find_directory(target) / "config.json"
    else:
        raise UserError(
            f"--target={target}: neither a config.json, a directory, a hub name OWNER/MODEL, nor one of tiny, "
            f"{', '.join(names())}"
        )
    return ModelConfig.from_hf(read_json(path), str(path))


def _folder():
    return resources.files(__name__)
