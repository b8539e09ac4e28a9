"""The description of an EAGLE-3 drafter, and whether it fits a target."""

import dataclasses
import math
from collections.abc import Sequence

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.rope import Scaling


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A one-layer EAGLE-3 drafter and the target it belongs to. Hashable.

    `feature_layers` holds the three target layers whose *inputs* are the features, in ascending order: id i
    means Hugging Face's `hidden_states[i]`, 0 is the embedding. `fc_norm` turns on EAGLE-3.1: a norm on each
    feature, and the post-norm vector fed back.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    target_hidden_size: int
    feature_layers: tuple[int, int, int]
    fc_norm: bool
    norm_before_residual: bool = False
    rope_scaling: Scaling | None = None


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's choice of target layers ("input of layer" ids): low, middle and high.

    Raises:
      UserError: if the target has fewer than 7 layers, where the rule yields no three sensible layers.
    """
    if num_layers < 7:
        raise UserError(
            f"--feature_layers: a target of {num_layers} layers has no default choice (it takes 7 or more);"
            f" name three ascending ids of 0..{num_layers}, where id i is the input of layer i"
        )
    return 2, num_layers // 2, num_layers - 3


def check_feature_layers(layers: Sequence[int], num_layers: int | None, where: str) -> None:
    """Raises UserError unless `layers` are three ascending ids of 0..num_layers (no upper bound if None)."""
    highest = math.inf if num_layers is None else num_layers
    ascending = all(low < high for low, high in zip(layers, layers[1:], strict=False))
    if len(layers) != 3 or not ascending or layers[0] < 0 or layers[-1] > highest:
        limit = "0 or more" if num_layers is None else f"0..{num_layers} (the target has {num_layers} layers)"
        raise UserError(f"{where}: feature layers {list(layers)} must be three ascending ids of {limit}")


def validate_fit(drafter: DrafterConfig, target: ModelConfig, where: str) -> None:
    """Checks that a drafter was made for this target.

    Args:
      where: the place to name in errors: the drafter's directory, or a flag.

    Raises:
      UserError: if vocabulary, width or feature layers do not fit.
    """
    if drafter.vocab_size != target.vocab_size:
        raise UserError(
            f"{where}: the drafter is for a vocabulary of {drafter.vocab_size} tokens, "
            f"the target has {target.vocab_size}"
        )
    if drafter.draft_vocab_size > target.vocab_size:
        raise UserError(
            f"{where}: a draft vocabulary of {drafter.draft_vocab_size} tokens cannot exceed "
            f"the target's {target.vocab_size}"
        )
    if drafter.target_hidden_size != target.hidden_size:
        raise UserError(
            f"{where}: the drafter takes features of width {drafter.target_hidden_size}, "
            f"the target's are {target.hidden_size} wide"
        )
    if drafter.hidden_size != target.hidden_size:
        raise UserError(
            f"{where}: the drafter is {drafter.hidden_size} wide, but uses the target's embedding, "
            f"which is {target.hidden_size} wide"
        )
    check_feature_layers(drafter.feature_layers, target.num_layers, where)
