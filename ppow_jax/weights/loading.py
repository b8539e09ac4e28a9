"""Finds and loads drafters by the names that entry points take."""

from pathlib import Path

import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import is_vector, validate_fit
from ppow_jax.weights import shipped
from ppow_jax.weights.drafters import import_drafter
from ppow_jax.weights.huggingface import CONFIG
from ppow_jax.weights.padded_vocabulary import fit_vocabulary
from ppow_jax.weights.targets import DTYPES, Target

AUTO = "auto"


def find_drafter(name: str | None, target: str) -> Path | None:
    """The drafter's directory: `name`, or for "auto" the one that comes with the target; None for none.

    Args:
      name: a directory; the name of a target that a drafter comes with; "auto" for the drafter of `target`, if there is
        one; None. See `shipped.roots` for the places that names are looked up in.
      target: as --target names it.

    Raises:
      UserError: `name` holds no drafter, or the drafter that comes with the target is missing.
    """
    if name == AUTO:
        return shipped.find(target)
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.exists() and name in shipped.SHIPPED:
        return shipped.find(name, flag=name)
    if not path.is_dir():
        raise UserError(f"--drafter={name}: there is no such directory, and no included drafter has that name")
    if not (path / CONFIG).is_file():
        raise UserError(f"--drafter={name}: not a drafter, it has no {CONFIG}")
    return path


def load_drafter(
    directory: str | Path, target: Target, dtype: str = "bfloat16", where: str | None = None
) -> Drafter:
    """Reads a drafter for `target`, its matrices in `dtype`, its norms in float32.

    Raises UserError when the files are broken, or made for another target; it names `where`, by default --drafter.
    """
    where = f"--drafter={directory}" if where is None else where
    stored = import_drafter(
        directory,
        num_target_layers=target.config.num_layers,
        target_embed_VxD=sharding.fetch(target.params["embed"]),
        target_head=lambda: sharding.fetch(transformer.head(target.params)),
    )
    stored = fit_vocabulary(stored, target.config.vocab_size, target.tokenizer, where)
    validate_fit(stored.config, target.config, where)
    params = {
        name: jnp.asarray(value, jnp.float32 if is_vector(name) else DTYPES[dtype])
        for name, value in stored.params.items()
    }
    own = None if stored.embed_VxE is None else jnp.asarray(stored.embed_VxE)
    drafter = Drafter(
        config=stored.config, params=params, target_ids_W=jnp.asarray(stored.target_ids_W), embed_VxE=own
    )
    return sharding.place(drafter, stored.config)
