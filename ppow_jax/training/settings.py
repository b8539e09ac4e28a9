"""Settings of a training run: its fields, checked by themselves and against each other."""

import dataclasses
import datetime
import re

from ppow_jax import files, mesh_shape
from ppow_jax.flags import check_fields, require, specs
from ppow_jax.models import precision
from ppow_jax.training.fields import STAGES, TrainFields

# Settings that an estimator does not support: a value other than the default is refused.
IGNORED = {
    "exact": ("eta", "eps", "group", "windows", "clip", "passes"),
    "sampled": ("horizon", "rivals", "supervised_weight", "lookup_discount"),
}


@dataclasses.dataclass(frozen=True)
class TrainSettings(TrainFields):
    """Settings of a run; see `experiments.train --help`. Raises UserError for impossible values."""

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step of --profile_steps; (0, 0) if none is traced."""
        first, _, last = self.profile_steps.partition(":")
        return (int(first), int(last)) if self.profile_steps else (0, 0)

    def __post_init__(self):
        check_fields(self)
        self._check_run()
        self._check_devices()
        self._check_windows()
        self._check_estimator()
        self._check_answers()
        self._check_costs()

    def _check_run(self) -> None:
        given = f"--profile_steps={self.profile_steps}"
        require(bool(re.fullmatch(r"(\d+:\d+)?", self.profile_steps)), f"{given}: must be FIRST:LAST, such as 10:13")
        first, last = self.profiled
        rule = "must be steps from 1 on, the first not after the last"
        require(not self.profile_steps or 1 <= first <= last, f"{given}: {rule}")
        order = [STAGES.index(stage) for stage in self.stages]
        given = f"--stages={','.join(self.stages)}"
        require(order == sorted(set(order)), f"{given}: must be some of {','.join(STAGES)}, in order")
        uploads = self.push_to_hub is None or "export" in self.stages
        require(uploads, f"--push_to_hub={self.push_to_hub}: needs the stage export, but {given} does not have it")
        rule = "needs --decoded_mode and answers at --answer_temperature=0"
        require(self.select != "tau_decoded" or self.decodes, f"--select={self.select}: {rule}")

    def _check_devices(self) -> None:
        shape = mesh_shape.MeshShape.parse(self.mesh)
        if shape is not None:
            self.check_rows(shape)
        precision.of_flag(self.precision, self.dtype)
        files.check_address("--workdir", self.workdir)
        remote = self.workdir is not None and files.is_remote(self.workdir)
        rule = "is only for a --workdir of gs://; any other keeps these files itself"
        require(remote or self.scratch is None, f"--scratch={self.scratch}: {rule}")
        mesh_shape.check_processes(self.coordinator, self.num_processes, self.process_id)

    def _check_windows(self) -> None:
        """Raises UserError where rows, anchors and windows do not fit into each other."""
        require(self.window >= 1, f"--window={self.window}: must be at least 1")
        rule = "must be at least 2, advantages compare windows of one prefix"
        require(self.group >= 2, f"--group={self.group}: {rule}")
        rule = f"must be at most --row_length={self.row_length}"
        require(self.max_anchors <= self.row_length, f"--max_anchors={self.max_anchors}: {rule}")
        rule = f"must be at most --max_anchors={self.max_anchors}"
        require(self.windows <= self.max_anchors, f"--windows={self.windows}: {rule}")
        for name in ("answer_tokens", "max_anchors"):  # otherwise no answer has room for a window
            limit = getattr(self, name)
            require(self.window < limit, f"--window={self.window}: must be less than --{name}={limit}")
        rule = "three ids, or none for the default"
        layers = ",".join(map(str, self.feature_layers))
        require(len(self.feature_layers) in (0, 3), f"--feature_layers={layers}: {rule}")

    def _check_answers(self) -> None:
        require(self.date is None or _is_date(self.date), f"--date={self.date}: must be a day, such as 2026-01-31")
        packed = self.answer_temperature == 0 or not self.answers_from
        rule = "holds answers at temperature 0; leave it out, or --answer_temperature"
        require(packed, f"--answers_from={','.join(self.answers_from)}: {rule}")
        kept = self.held_out + self.fresh_answers + self.test_answers
        given = f"--held_out={self.held_out}, --fresh_answers={self.fresh_answers}, --test_answers={self.test_answers}"
        only_fresh = "supervised" not in self.stages and self.fresh_answers > 0 and kept == self.num_answers
        rule = f"together must be less than --num_answers={self.num_answers}, or nothing is left to train on"
        require(kept < self.num_answers or only_fresh, f"{given}: {rule}")

    def _check_costs(self) -> None:
        for name in ("gamma", "verify_cost"):
            cost = getattr(self, name)
            require(cost is None or cost >= 0, f"--{name}={cost}: must be at least 0, or none to measure it")
        rule = "must be above 0 where --gamma=0 (else the general cost of a window is 0)"
        free = self.general_cost and self.gamma == 0 and self.verify_cost == 0
        require(not free, f"--verify_cost={self.verify_cost}: {rule}")

    @property
    def decodes(self) -> bool:
        """True if held-out answers are decoded while training: they have to be the target's own greedy text."""
        return self.decoded_mode != "off" and self.answer_temperature == 0

    def _check_estimator(self) -> None:
        """Raises UserError for settings that the chosen estimator does not support, or would ignore."""
        rule = "must be above 0"
        require(self.rollout_temperature > 0, f"--rollout_temperature={self.rollout_temperature}: {rule}")
        rule += " (for greedy acceptance: --acceptance=greedy)"
        require(self.acceptance_temperature > 0, f"--acceptance_temperature={self.acceptance_temperature}: {rule}")
        rule = "--estimator=exact takes the whole batch at once; leave one of the two out"
        require(self.estimator == "sampled" or self.accumulate == 1, f"--accumulate={self.accumulate}: {rule}")
        default = {spec.name: spec.default for spec in specs(type(self))}
        if self.estimator == "exact":
            exact = "--estimator=exact: has a closed form only"
            for name, needed in (("acceptance", "greedy"), ("answer_temperature", 0.0), ("recorded", "")):
                require(getattr(self, name) == needed, f"{exact} with --{name}={needed}, not {getattr(self, name)}")
        rule = f"must be less than --draft_vocab_size={self.draft_vocab_size}"
        require(self.rivals < self.draft_vocab_size, f"--rivals={self.rivals}: {rule}")
        rule = "--horizon=answer has no deviation to divide by; add --nodivide_by_std"
        require(self.horizon == "window" or not self.divide_by_std, f"--divide_by_std: {rule}")
        rule = "has no effect with --step_weights=acceptance; leave it out"
        unused = self.step_weights != "decay" and self.ttt_decay != default["ttt_decay"]
        require(not unused, f"--ttt_decay={self.ttt_decay}: {rule}")
        for name in IGNORED[self.estimator]:
            value = getattr(self, name)
            rule = f"has no effect with --estimator={self.estimator}; leave it out"
            require(value == default[name] or (name, value) == ("eta", 0.0), f"--{name}={value}: {rule}")

    def check_rows(self, mesh: mesh_shape.MeshShape) -> None:
        """Raises UserError unless the rows of a batch can be divided among the devices of a mesh."""
        parts = mesh.rows * self.accumulate
        rule = f"must be a multiple of {parts}: --mesh={mesh} cuts rows into {mesh.rows} (data * fsdp * expert)"
        more = f", --accumulate={self.accumulate} each of these" if self.accumulate > 1 else ""
        require(self.batch_size % parts == 0, f"--batch_size={self.batch_size}: {rule}{more}")


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
