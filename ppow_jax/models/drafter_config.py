"""Configuration of an EAGLE-3 drafter, and checks that it fits a target."""

import dataclasses
import math
from collections.abc import Sequence

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.rope import Scaling


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """An EAGLE-3 drafter and the target it belongs to. Hashable.

    hidden_size: E, the drafter's own width; target_hidden_size: D. `feature_layers` holds the three target layers whose
    *inputs* are the features, in ascending order: id i means Hugging Face's `hidden_states[i]`, 0 is the embedding. It
    is empty if a file derives them from the target's depth and the depth is unknown: such a drafter cannot run.

    EAGLE-3.1 is fc_norm (a norm on each feature) with norm_output (the post-norm vector fed back); norm_before_fc is
    one norm over all three features instead. norm_before_residual: the normed feature is the first layer's residual.
    attention_bias: q, k and v have biases; output_bias: o too. qk_norm: queries and keys are normed per head, as in
    Qwen3. num_layers: the first takes feature and embedding, later ones are plain decoder layers. own_embed: the
    embedding is the drafter's, not the target's.
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
    feature_layers: tuple[int, ...]
    fc_norm: bool
    norm_before_residual: bool = False
    rope_scaling: Scaling | None = None
    norm_output: bool = False
    norm_before_fc: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    num_layers: int = 1
    own_embed: bool = False


def layer_name(layer: int, name: str) -> str:
    """Key of one of a layer's parameters; those of the first layer, usually the only one, have no prefix."""
    return name if layer == 0 else f"layers.{layer}.{name}"


def is_vector(name: str) -> bool:
    """True for norm scales and biases, which stay in float32 when matrices are cast."""
    return name.endswith(("norm", "bias"))


def parameter_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each drafter parameter by key; matrices are `[out, in]`. The embedding is not included."""
    E, D, d, wide = config.hidden_size, config.target_hidden_size, config.head_dim, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"fc": (E, 3 * D)}
    if config.fc_norm or config.norm_before_fc:
        shapes["fc_norm"] = (3, D) if config.fc_norm else (3 * D,)
    for n in range(config.num_layers):
        layer = _layer_shapes(config, 2 * E if n == 0 else E, config.num_heads * d, config.num_kv_heads * d, wide)
        if n == 0:
            layer["hidden_norm"] = (E,)
        shapes |= {layer_name(n, name): shape for name, shape in layer.items()}
    return shapes | {"norm": (E,), "lm_head": (config.draft_vocab_size, E)}


def _layer_shapes(config: DrafterConfig, width: int, q: int, kv: int, wide: int) -> dict[str, tuple[int, ...]]:
    E = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (E,),
        "q_proj": (q, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (E, q),
        "post_norm": (E,),
        "gate_proj": (wide, E),
        "up_proj": (wide, E),
        "down_proj": (E, wide),
    }
    if config.attention_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.output_bias:
        shapes["o_bias"] = (E,)
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


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
    if drafter.hidden_size != target.hidden_size and not drafter.own_embed:
        raise UserError(
            f"{where}: the drafter is {drafter.hidden_size} wide, but uses the target's embedding, "
            f"which is {target.hidden_size} wide"
        )
    check_feature_layers(drafter.feature_layers, target.num_layers, where)
