"""The arms of a study: named ways to continue training one drafter, and the settings that define them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.training.settings import IGNORED, TrainSettings

PUBLISHED: dict[str, Any] = {  # PPOW as published; what the paper leaves open is a flag of the study
    "estimator": "sampled",
    "divide_by_std": True,
    "rollout_temperature": 1.0,
    "adaw": True,
}
EXACT: dict[str, Any] = {"estimator": "exact", "divide_by_std": False, "rollout_temperature": 0.3, "kl_weight": 0.0}
RECIPE: dict[str, Any] = EXACT | {"rollout_temperature": 0.5, "supervised_weight": 1.0}


@dataclasses.dataclass(frozen=True)
class Arm:
    """name: as in results. stage: training stage that produces it, or None for the start itself. family: arms that
    share a learning rate. changes: differences from the study's settings.
    """

    name: str
    stage: str | None
    family: str
    changes: Mapping[str, Any]
    about: str


_ARMS = (
    Arm("eagle3", None, "start", {}, "the start: stage 1 alone"),
    Arm("cst", "cst", "cst", {}, "continued supervised training, as many draft steps as the window"),
    Arm("ppow", "ppow", "ppow", PUBLISHED, "PPOW as published: sampled windows, R_dist, ADAW"),
    Arm("ppow_no_rdist", "ppow", "ppow", PUBLISHED | {"eta": 0.0}, "PPOW without R_dist"),
    Arm("ppow_no_adaw", "ppow", "ppow", PUBLISHED | {"adaw": False}, "PPOW without ADAW"),
    Arm("ppow_neither", "ppow", "ppow", PUBLISHED | {"eta": 0.0, "adaw": False}, "PPOW without both"),
    Arm(
        "exact_t1",
        "ppow",
        "exact",
        EXACT | {"divide_by_std": True, "rollout_temperature": 1.0, "kl_weight": 0.5},
        "the expected reward in closed form, at temperature 1, divided by its standard deviation",
    ),
    Arm("exact", "ppow", "exact", EXACT, "the expected reward in closed form, at temperature 0.3"),
    Arm("recipe", "ppow", "exact", RECIPE, "the expected reward in closed form, at 0.5, plus stage 1's loss"),
    Arm("recipe_no_adaw", "ppow", "exact", RECIPE | {"adaw": False}, "the recipe without ADAW"),
    Arm(
        "recipe_answer",
        "ppow",
        "exact",
        RECIPE | {"horizon": "answer", "adaw": False},
        "the recipe, rewarding the rounds of whole answers",
    ),
    Arm(
        "recipe_mixture",
        "ppow",
        "exact",
        RECIPE | {"lookup_discount": 1.0},
        "the recipe, without reward for tokens that an n-gram lookup gets as well",
    ),
    Arm("recipe_tree", "ppow", "exact", RECIPE | {"rivals": 3, "adaw": False}, "the recipe, rewarding a tree"),
    Arm(
        "recipe_tree_answer",
        "ppow",
        "exact",
        RECIPE | {"rivals": 3, "adaw": False, "horizon": "answer"},
        "the recipe, rewarding a tree and the rounds of whole answers",
    ),
)
ARMS = {arm.name: arm for arm in _ARMS}


def find_arm(text: str) -> Arm:
    """The arm named by NAME or NAME:FIELD=VALUE;FIELD=VALUE; raises UserError if there is none."""
    name, _, rest = text.partition(":")
    if name not in ARMS:
        raise UserError(f"--arms={text}: there is no arm {name!r}; the arms are {', '.join(ARMS)}")
    arm, specs = ARMS[name], {spec.name: spec for spec in flags.specs(TrainSettings)}
    changes = dict(arm.changes)
    for change in filter(None, rest.split(";")):
        field, equals, value = change.partition("=")
        if not equals or field not in specs:
            raise UserError(f"--arms={text}: {change!r} must be FIELD=VALUE with a field of training, such as eta=0.5")
        changes[field] = specs[field].parse(value)
    return dataclasses.replace(arm, name=text, changes=changes) if rest else arm


def settings_of(arm: Arm, base: TrainSettings, seed: int, rate: float | None = None) -> TrainSettings:
    """Training settings of an arm with a seed; rate: its learning rate, which replaces the study's."""
    default = {spec.name: spec.default for spec in flags.specs(TrainSettings)}
    values = {name: getattr(base, name) for name in default} | dict(arm.changes) | {"seed": seed}
    ignored = IGNORED[values["estimator"]]
    values |= {name: default[name] for name in ignored if name not in arm.changes}
    if rate is not None:
        values |= {"ppow_learning_rate": rate, "cst_learning_rate": rate}
    return TrainSettings(**values)
