"""Target layers whose features a drafter uses, read from its files.

Two conventions are in use for the same tensors: ids of *outputs* of layers (in `eagle_config`: SpecForge, SGLang,
Model-Optimizer) and of *inputs*, one more (at the top level: vLLM, speculators). They are often confused, so ids that
are impossible under a place's own convention are read by the other, and the log reports the reading that was used.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import check_feature_layers, default_feature_layers

log = logging.getLogger(__name__)

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
VERIFY = "`python -m experiments.convert verify` compares the readings"
NUMBERS = {1: "one", 2: "two", 4: "four", 5: "five", 6: "six"}


def read_layers(
    config: Mapping[str, Any], eagle: Mapping[str, Any], num_layers: int | None, where: str
) -> tuple[int, ...]:
    """The target layers that feed the drafter, as ids of inputs, ascending.

    config: the top level of config.json, whose ids are inputs. eagle: its `eagle_config`, whose ids are outputs; if
    both have no ids, or an empty list, EAGLE-3's default for num_layers, the target's depth, is used.
    With num_layers None (unknown target) the default is (), and ids have no upper bound.

    Raises:
      UserError: for ids that are no list of numbers, that fit neither as inputs nor as outputs, that contradict each
        other, for a number of layers other than three, and where there is no default.
    """
    by_output, by_input = _ids(eagle, f"eagle_config.{LAYER_IDS}", where), _ids(config, LAYER_IDS, where)
    if by_output and by_input:
        inputs = tuple(i + 1 for i in by_output)
        if by_output == by_input and not _fit(inputs, num_layers):  # the same ids twice can only be inputs
            return _either(by_output, 1, f"{where}: eagle_config.{LAYER_IDS} = {by_output}", num_layers)
        check_feature_layers(inputs, num_layers, f"{where}: eagle_config.{LAYER_IDS} = {by_output}")
        if inputs != tuple(by_input):
            raise UserError(
                f"{where}: {LAYER_IDS} = {by_input} (inputs of layers) contradicts eagle_config.{LAYER_IDS}"
                f" = {by_output} (outputs of layers, one less); delete the wrong one"
            )
        return inputs
    if by_output:
        return _either(by_output, 1, f"{where}: eagle_config.{LAYER_IDS} = {by_output}", num_layers)
    if by_input:
        return _either(by_input, 0, f"{where}: {LAYER_IDS} = {by_input}", num_layers)
    return _guess(num_layers, where)


def _ids(config: Mapping[str, Any], key: str, where: str) -> list[int]:
    """The ids under a key of `config`, [] if there are none."""
    ids = config.get(LAYER_IDS)
    if ids is None:
        return []
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{where}: {key} = {ids!r} must be a list of layer ids")
    if len(ids) in NUMBERS:
        count = NUMBERS[len(ids)] + (" feature is" if len(ids) == 1 else " features are")
        raise UserError(f"{where}: {key} = {ids!r}: {count} not supported, only three ascending ids")
    return ids


def _either(ids: list[int], shift: int, place: str, num_layers: int | None) -> tuple[int, ...]:
    """Ids by their place's convention (inputs are ids + shift) or, if that is impossible, by the other one."""
    usual, other = (tuple(i + by for i in ids) for by in (shift, 1 - shift))
    names = ("inputs", "outputs")
    if _fit(usual, num_layers) or not _fit(other, num_layers):
        check_feature_layers(usual, num_layers, place)
        log.info("%s are read as %s of the target's layers (inputs of %s)", place, names[shift], _join(usual))
        if shift and num_layers is not None and num_layers >= 7 and tuple(ids) == default_feature_layers(num_layers):
            log.warning("%s: these are the default layers if they are meant as inputs; %s", place, VERIFY)
        return usual
    log.warning(
        "%s cannot be %s of layers of a target with %s layers: read as %s (inputs of %s)",
        place, names[shift], "any number of" if num_layers is None else num_layers, names[1 - shift], _join(other),
    )  # fmt: skip
    return other


def _guess(num_layers: int | None, where: str) -> tuple[int, ...]:
    if num_layers is None:
        return ()
    if num_layers < 7:
        raise UserError(
            f"{where}: does not name the target layers ({LAYER_IDS}), and a target of {num_layers} layers has no"
            f" default (at least 7 are needed); add the three ids of layer inputs, from 0..{num_layers}"
        )
    layers = default_feature_layers(num_layers)
    log.warning(
        "%s does not name the target layers: assumed to be the inputs of %s, the default for %d layers; %s",
        where, _join(layers), num_layers, VERIFY,
    )  # fmt: skip
    return layers


def _fit(layers: tuple[int, ...], num_layers: int | None) -> bool:
    try:
        check_feature_layers(layers, num_layers, "")
    except UserError:
        return False
    return True


def _join(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
