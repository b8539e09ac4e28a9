"""Every setting of a training run; the flags of `experiments.train` are generated from it."""

import dataclasses
import datetime
import re

from ppow_jax import defaults, files, mesh_shape
from ppow_jax.flags import check_fields, field, require, specs
from ppow_jax.models import precision
from ppow_jax.objectives.expected import HORIZONS
from ppow_jax.speculation.settings import LOOKUP_MODES, MODES

# Settings that an estimator does not support: a value other than the default is refused.
IGNORED = {
    "exact": ("eta", "eps", "group", "windows", "clip", "passes"),
    "sampled": ("horizon", "rivals", "supervised_weight", "lookup_discount"),
}
STAGES = ("data", "supervised", "ppow", "evaluate", "export")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a run; see `experiments.train --help`. Raises UserError for impossible values."""

    workdir: str | None = field(
        None,
        "Directory for all files of the run, or gs://BUCKET/NAME; the same command resumes it.",
        may_change=True,
        group="Run",
    )
    scratch: str | None = field(
        None,
        "With a --workdir of gs://: directory of this machine for what can be computed again (features, traces); none:"
        " below the system's directory for temporary files.",
        may_change=True,
        group="Run",
    )
    stages: tuple[str, ...] = field(
        STAGES, "Stages to run, in this order.", choices=STAGES, may_change=True, group="Run"
    )
    target: str = field(
        "smollm2-135m", "Target: smollm2-135m, tiny, a .gguf file, a directory or a hub name.", group="Run"
    )
    base_model: str | None = field(
        None,
        "The target's OWNER/MODEL on the hub, for the exported config and card; by default that of --target, if known.",
        may_change=True,
        group="Run",
    )
    push_to_hub: str | None = field(
        None, "Also upload the exported drafter, as this OWNER/NAME on the hub.", may_change=True, group="Run"
    )
    dtype: str = field("bfloat16", "Dtype of the target's matrices.", choices=("float32", "bfloat16"), group="Run")
    precision: str = field("auto", precision.HELP, choices=precision.CHOICES, group="Run")
    scan_layers: bool | None = field(
        None,
        "Stack the target's layers and scan over them: compiles faster, runs slower on CPUs; by default not on CPUs.",
        may_change=True,
        group="Run",
    )
    seed: int = field(0, "Seed for data order, initialisation and rollouts.", low=0, group="Run")
    checkpoint_every: int = field(100, "Steps between two checkpoints.", low=1, may_change=True, group="Run")
    evaluate_every: int = field(
        50, "Steps between two measurements of the acceptance length on held-out answers.", low=1, group="Run"
    )
    select: str = field(
        "tau_sim",
        "Checkpoint that a stage returns: the best by simulated or by decoded acceptance length, or the last.",
        choices=("tau_sim", "tau_decoded", "last"),
        group="Run",
    )
    decoded_mode: str = field(
        "chain",
        "Speculation mode in which held-out answers are decoded at every measurement; off: not at all.",
        choices=("off", *MODES, *LOOKUP_MODES),
        group="Run",
    )
    decoded_answers: int = field(16, "Held-out answers decoded at every measurement.", low=1, group="Run")
    skip_nonfinite: int = field(
        0,
        "Maximum number of skipped non-finite updates per stage; after that the run stops.",
        low=0,
        may_change=True,
        group="Run",
    )
    compilation_cache: str | None = field(
        None, "Directory for compiled programs, so that later runs start faster.", may_change=True, group="Run"
    )
    tensorboard: bool = field(
        False, "Also write TensorBoard events, to WORKDIR/tensorboard.", may_change=True, group="Run"
    )
    wandb: bool = field(
        False,
        "Also send the metrics to Weights & Biases; WANDB_PROJECT names another project.",
        may_change=True,
        group="Run",
    )
    profile_steps: str = field(
        "",
        "Steps of each stage to profile, as FIRST:LAST; traces are written to WORKDIR/profile.",
        may_change=True,
        group="Run",
    )

    mesh: str | None = field(None, mesh_shape.HELP, may_change=True, group="Devices")
    accumulate: int = field(
        1, "Number of microbatches per batch; the results are the same.", low=1, may_change=True, group="Devices"
    )
    remat: str = field(
        "none",
        "What a draft step recomputes in the backward pass: none: nothing; dots: attention; full: everything.",
        choices=("none", "dots", "full"),
        may_change=True,
        group="Devices",
    )
    multihost: bool = field(
        False,
        "Run as one of several processes, found in the environment: TPU pods, Slurm, MPI.",
        may_change=True,
        group="Devices",
    )
    coordinator: str | None = field(
        None, "HOST:PORT of process 0, if it is not in the environment.", may_change=True, group="Devices"
    )
    num_processes: int | None = field(None, "Number of processes.", low=1, may_change=True, group="Devices")
    process_id: int | None = field(None, "Index of this process, from 0.", low=0, may_change=True, group="Devices")

    data: str = field(
        "sharegpt",
        "Conversations: files, data sets or `sharegpt`, separated by commas, with [a:b] slices.",
        group="Data",
    )
    num_answers: int = field(2000, "Number of user turns that the target answers.", low=8, group="Data")
    turns: int = field(1, "User turns per conversation that get an answer.", low=1, group="Data")
    max_prompt_tokens: int = field(256, "Longer prompts are skipped.", low=1, group="Data")
    answer_tokens: int = field(256, "Maximum number of tokens of an answer.", low=4, group="Data")
    answer_temperature: float = field(0.0, "Temperature of the answers.", low=0, group="Data")
    answer_slots: int = field(64, "Answers decoded in parallel.", low=1, group="Data")
    answer_chunk: int = field(256, "Answers per file; a killed run loses at most one file.", low=1, group="Data")
    answers_from: tuple[str, ...] = field(
        (),
        "Answers of other runs (answers.npz of their workdirs); prompts in these files are not answered again.",
        may_change=True,
        group="Data",
    )
    recorded: str = field("", "Recorded conversations to add to the training data unchanged.", group="Data")
    num_recorded: int = field(0, "Maximum number of recorded conversations.", low=0, group="Data")
    cache_features: bool = field(
        False, "Store the target's features for stage 1 on disk: 4 hidden sizes per token.", group="Data"
    )
    date: str | None = field(
        None,
        "Current date for chat templates that use it, as 2026-01-31; none: the day on which the run begins.",
        group="Data",
    )
    held_out: int = field(
        32, "Held-out answers for the simulated acceptance length, which selects checkpoints.", low=1, group="Data"
    )
    fresh_answers: int = field(
        0,
        "Answers reserved for stage 2 and its baselines; 0: the same answers as stage 1.",
        low=0,
        group="Data",
    )
    test_answers: int = field(
        0,
        "Answers reserved for the report: the rounds of every arm are replayed on them; they select nothing.",
        low=0,
        group="Data",
    )

    drafter: str | None = field(
        None, "Drafter to start from (EAGLE-3 directory) instead of a new one.", group="Drafter"
    )
    draft_vocab_size: int = field(
        8192, "Size of the draft vocabulary: the most frequent answer tokens.", low=1, group="Drafter"
    )
    feature_layers: tuple[int, ...] = field(
        (), "Target layers whose inputs the drafter sees; by default 2, N//2, N-3.", group="Drafter"
    )
    fc_norm: bool = field(
        False, "EAGLE-3.1: normalise each feature, and feed back the normalised output.", group="Drafter"
    )

    batch_size: int = field(4, "Packed rows per step.", low=1, group="Batches")
    row_length: int = field(512, "Tokens per row.", low=8, group="Batches")
    max_anchors: int = field(352, "Maximum number of trained answer positions per row.", low=1, group="Batches")

    supervised_steps: int = field(1000, "Optimizer steps of stage 1.", low=1, group="Stage 1, supervised")
    ttt_steps: int = field(5, "Draft steps of the training-time test.", low=1, group="Stage 1, supervised")
    ttt_decay: float = field(
        0.8, "Loss weight of a draft step relative to the step before.", low=0, group="Stage 1, supervised"
    )
    optimizer: str = field(
        "adamw",
        "Optimizer of both stages; muon: Muon for the matrices of the layer, Adam for all other parameters.",
        choices=("adamw", "muon"),
        group="Stage 1, supervised",
    )
    learning_rate: float = field(1.5e-3, "Peak learning rate.", low=0, group="Stage 1, supervised")
    warmup_steps: int = field(
        50, "Steps of linear warm-up; a cosine decay to a tenth follows.", low=0, group="Stage 1, supervised"
    )
    clip_norm: float = field(0.5, "Maximum gradient norm in both stages.", low=0, group="Stage 1, supervised")

    ppow_steps: int = field(100, "Optimizer steps of stage 2 (rollout batches).", low=1, group="Stage 2, PPOW")
    ppow_learning_rate: float = field(1e-4, "Peak learning rate.", low=0, group="Stage 2, PPOW")
    ppow_warmup_steps: int = field(
        5, "Steps of linear warm-up; a cosine decay to a tenth follows.", low=0, group="Stage 2, PPOW"
    )
    average_decay: float = field(
        0.0,
        "Decay of an exponential moving average of the parameters, which is measured and exported; 0: none.",
        low=0,
        high=0.9999,
        group="Stage 2, PPOW",
    )
    window: int = field(
        7,
        "Drafted tokens per window, K; also for measuring: length of a chain, levels of a tree.",
        group="Stage 2, PPOW",
    )
    group: int = field(8, "Windows sampled per prefix, G.", group="Stage 2, PPOW")
    windows: int = field(6, "Prefixes per row and step.", low=1, group="Stage 2, PPOW")
    rollout_temperature: float = field(
        1.0,
        "Temperature of the rewarded drafts; lower values are closer to greedy drafting.",
        group="Stage 2, PPOW",
    )
    estimator: str = field(
        "sampled",
        "Estimator of the reward's gradient. sampled: from sampled windows, as in the paper. exact: in closed form over"
        " all windows of the text (answers at temperature 0, greedy acceptance; without R_dist, groups and clipping).",
        choices=("sampled", "exact"),
        group="Stage 2, PPOW",
    )
    divide_by_std: bool = field(
        True, "Divide advantages by the standard deviation of their group, as in the paper.", group="Stage 2, PPOW"
    )
    horizon: str = field(
        "window",
        "What the exact estimator rewards: each window separately, or few rounds for the whole answer.",
        choices=HORIZONS,
        group="Stage 2, PPOW",
    )
    rivals: int = field(
        0,
        "0: the exact estimator rewards a chain of drafted tokens. N: it rewards a tree, which contains the label if"
        " fewer than N tokens are more probable.",
        low=0,
        group="Stage 2, PPOW",
    )
    supervised_weight: float = field(
        0.0, "Weight of stage 1's loss, added to the exact estimator's objective.", low=0, group="Stage 2, PPOW"
    )
    lookup_discount: float = field(
        0.0,
        "Share of the exact estimator's reward for an accepted token that is lost where an n-gram lookup gets it as"
        " well; 1: the drafter is trained for what the lookup misses, as in mode mixture.",
        low=0,
        high=1,
        group="Stage 2, PPOW",
    )
    acceptance: str = field(
        "greedy",
        "Acceptance rule of the reward: greedy, or sampled (p/q rejection sampling).",
        choices=("greedy", "sampled"),
        group="Stage 2, PPOW",
    )
    acceptance_temperature: float = field(
        1.0, "Temperature of the target with --acceptance=sampled.", group="Stage 2, PPOW"
    )
    eta: float = field(
        0.2,
        "Size of the proximity reward R_dist; 0: off. (Our value; the paper does not give one.)",
        low=0,
        group="Stage 2, PPOW",
    )
    eps: float = field(5.0, "Threshold of R_dist in nats. (Our value.)", low=0, group="Stage 2, PPOW")
    adaw: bool = field(True, "Adaptive divergence-aware windowing.", group="Stage 2, PPOW")
    adaw_start: int = field(
        25, "Step at which ADAW replaces uniform sampling. (Our value.)", low=0, group="Stage 2, PPOW"
    )
    clip: float = field(
        0.2, "Clip range of the probability ratio of a window. (Our value.)", low=0, group="Stage 2, PPOW"
    )
    kl_weight: float = field(0.5, "Weight of KL(target || drafter). (Our value.)", low=0, group="Stage 2, PPOW")
    passes: int = field(1, "Optimizer passes over the rollouts of a step.", low=1, group="Stage 2, PPOW")
    gamma: float | None = field(
        None, "Cost of a draft step, in steps of plain decoding; none: measured.", group="Stage 2, PPOW"
    )
    general_cost: bool = field(
        False, "Use the general cost model for the reward, with verification and rollback costs.", group="Stage 2, PPOW"
    )
    verify_cost: float | None = field(
        None,
        "General cost model: cost of a verification, in steps of plain decoding; none: measured.",
        group="Stage 2, PPOW",
    )
    rollback_cost: float = field(0.0, "General cost model: cost of each rejected token.", low=0, group="Stage 2, PPOW")
    bonus: float = field(0.0, "General cost model: tokens that a verification adds.", low=0, group="Stage 2, PPOW")
    baselines: tuple[str, ...] = field(
        (),
        "Additional arms from stage 1's drafter: cst (continued supervised training on the same batches).",
        choices=("cst",),
        may_change=True,
        group="Stage 2, PPOW",
    )
    cst_learning_rate: float | None = field(
        None, "Peak learning rate of cst; none: the one of stage 2.", low=0, group="Stage 2, PPOW"
    )

    benchmarks: tuple[str, ...] = field(
        ("human_eval", "sharegpt"), "Benchmarks, by name or JSONL file.", may_change=True, group="Measuring"
    )
    benchmark_dir: str | None = field(
        None, "Directory with files NAME.jsonl of benchmarks.", may_change=True, group="Measuring"
    )
    num_prompts: int = field(
        10,
        "Prompts per benchmark; prompts longer than --max_prompt_tokens are skipped.",
        low=1,
        may_change=True,
        group="Measuring",
    )
    modes: tuple[str, ...] = field(
        ("adaptive",),
        f"Speculation modes to measure, with windows of --window tokens and trees of up to {defaults.NODES} nodes.",
        choices=(*MODES, *LOOKUP_MODES),
        may_change=True,
        group="Measuring",
    )
    max_new_tokens: int = field(
        128, "Maximum number of tokens of an answer when measuring.", low=2, may_change=True, group="Measuring"
    )

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
