"""Every setting of a study; the flags of `experiments.reproduce` are generated from it."""

import dataclasses

from ppow_jax import files
from ppow_jax.errors import UserError
from ppow_jax.flags import field, require
from ppow_jax.speculation.settings import LOOKUP_MODES, MODES
from ppow_jax.study.arms import ARMS, find_arm, settings_of
from ppow_jax.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class StudySettings(TrainSettings):
    """Training settings plus the arms. See `experiments.reproduce --help`. Raises UserError for impossible values."""

    arms: tuple[str, ...] = field(
        tuple(ARMS),
        "Arms to compare; NAME:FIELD=VALUE;FIELD=VALUE changes settings of an arm, such as ppow:eta=0.5;eps=2.",
        may_change=True,
        group="Study",
    )
    seeds: tuple[int, ...] = field(
        (0, 1, 2, 3, 4),
        "Seeds for data order and rollouts; every arm is trained with each.",
        low=0,
        may_change=True,
        group="Study",
    )
    rates: tuple[float, ...] = field(
        (),
        "Learning rates to select from on the held-out answers, per family of arms; by default no selection.",
        low=0,
        group="Study",
    )
    tuning_seed: int = field(1000, "Seed of the runs that select the learning rates.", low=0, group="Study")
    modes: tuple[str, ...] = field(
        ("adaptive", "chain", "tree"),
        "Speculation modes whose rounds are replayed; arms are compared in the first one.",
        choices=(*MODES, *LOOKUP_MODES),
        may_change=True,
        group="Study",
    )
    test_data: str = field(
        "",
        "Sources of further prompts (docs/data.md); arms are compared on their answers, too, beside --test_answers.",
        group="Study",
    )
    test_data_answers: int = field(
        0, "Number of prompts of --test_data, those of at most --max_prompt_tokens.", low=0, group="Study"
    )
    decode_seeds: int = field(
        0,
        "Number of seeds whose drafters also decode the --benchmarks, at --decode_temperatures.",
        low=0,
        may_change=True,
        group="Study",
    )
    decode_temperatures: tuple[float, ...] = field(
        (0.0, 1.0), "Temperatures for --decode_seeds.", low=0, may_change=True, group="Study"
    )

    select: str = field(
        "last", "Checkpoint of each arm that is compared.", choices=("tau_sim", "tau_decoded", "last"), group="Study"
    )

    decoded_mode: str = field(
        "off",
        "Speculation mode in which held-out answers are decoded while an arm is trained; off: not at all.",
        choices=("off", *MODES, *LOOKUP_MODES),
        group="Study",
    )

    def __post_init__(self):
        super().__post_init__()
        require(not files.is_remote(self.workdir or ""), f"--workdir={self.workdir}: {files.LOCAL}")
        for arm in map(find_arm, self.arms):
            try:
                settings_of(arm, self, seed=0)
            except UserError as error:  # now, not when the arm's turn comes
                raise UserError(f"--arms={arm.name}: {error}") from None
        require(len(set(self.arms)) == len(self.arms), f"--arms={','.join(self.arms)}: names an arm twice")
        require(len(self.modes) > 0, "--modes: must name at least one")
        require("eagle3" in self.arms, "--arms: must include eagle3, the start that the others are compared with")
        require(len(self.seeds) > 0, "--seeds: must name at least one")
        require(
            self.test_answers > 1, f"--test_answers={self.test_answers}: must be at least 2; arms are compared on them"
        )
        rule = "--test_data and --test_data_answers: name both, or none"
        require(bool(self.test_data) == (self.test_data_answers > 0), rule)
        require(self.answer_temperature == 0, "--answer_temperature: must be 0; rounds are replayed on greedy answers")
