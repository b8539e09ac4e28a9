"""Online adaptation of the small model, with a clock that goes by itself."""

import dataclasses

from small_model import NEW, model

from ppow_jax.inference.model import Model
from ppow_jax.online.session import Online
from ppow_jax.online.settings import OnlineSettings

SMALL = OnlineSettings(
    budget=1.0, learning_rate=1e-2, draft_steps=2, row_length=96, max_anchors=64, passes=2, least=4, window=16
)
LOOK = {"max_new_tokens": NEW, "speculation": "off"}  # plainly decoded, for what needs no drafts
PROMPTS = ["a", "Once upon", "b" * 20, "é€ and more", "zz top", "The end?", "x = 3", "d" * 40]


def fresh() -> Model:
    """The small model in an object of its own, so that its drafter may change."""
    return dataclasses.replace(model(), online=None)


class Ticks:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def online(found: Model, **how) -> Online:
    settings = dataclasses.replace(SMALL, **{name: how.pop(name) for name in list(how) if hasattr(SMALL, name)})
    return Online(found, settings, clock=how.pop("clock", Ticks()), **how)
