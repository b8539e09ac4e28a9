"""Conversion of a drafter's files from one format to another."""

from pathlib import Path

from ppow_jax.flags import require
from ppow_jax.models import transformer
from ppow_jax.models.drafter_config import validate_fit
from ppow_jax.weights import card, drafters, targets
from ppow_jax.weights.padded_vocabulary import fit_vocabulary


def convert(
    source: Path,
    output: Path,
    format: str,
    dtype: str | None = None,
    target_name: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes a drafter in another format, with its model card.

    Args:
      source: the drafter's directory, which is not changed.
      output: the directory for the new files.
      format: flat or speculators.
      dtype: of the new weights; None leaves them unchanged.
      target_name: the target, as for `targets.load`; needed only to omit a copy of its embedding, for the head of a
        drafter that has none, or for layer ids that the files do not contain.
      base_model: the target's OWNER/MODEL on the hub; by default that of the target, if it is known.

    Raises:
      UserError: for files that are broken or do not fit the target, and for a drafter without a head of its own if no
        target is named.
    """
    target = None if target_name is None else targets.load(target_name)
    stored = drafters.import_drafter(
        source,
        num_target_layers=None if target is None else target.config.num_layers,
        target_embed_VxD=None if target is None else target.params["embed"],
        target_head=None if target is None else lambda: transformer.head(target.params),
        headless=target is None,
    )
    has_head = "lm_head" in stored.params
    require(has_head, f"{source}: has no head of its own: name the target whose head it uses, --target")
    if target is not None:
        stored = fit_vocabulary(stored, target.config.vocab_size, target.tokenizer, str(source))
        validate_fit(stored.config, target.config, str(source))
    named = stored.target_name or target_name
    drafters.export_drafter(
        output,
        stored.config,
        stored.params,
        stored.target_ids_W,
        dtype=dtype,
        target_name=base_model or targets.base_model(named) or named,
        target_architecture=targets.architecture(named) if target is None else target.config.architecture,
        embed_VxE=stored.embed_VxE,
        format=format,
    )
    card.carry_over(source, output, format)
