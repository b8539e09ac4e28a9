"""The flags of a training run: names, defaults, limits and help texts. `training.settings` checks them."""

import dataclasses

from ppow_jax import defaults, mesh_shape
from ppow_jax.flags import field
from ppow_jax.models import precision
from ppow_jax.objectives.expected import HORIZONS
from ppow_jax.objectives.supervised import KINDS, STEP_WEIGHTS
from ppow_jax.speculation.settings import LOOKUP_MODES, MODES

STAGES = ("data", "supervised", "ppow", "evaluate", "export")


@dataclasses.dataclass(frozen=True)
class TrainFields:
    """The fields of `settings.TrainSettings`, in the order of `experiments.train --help`; not checked."""

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
    supervised_loss: str = field(
        "cross_entropy",
        "Loss of stage 1, of cst and of --supervised_weight. acceptance: -log of the acceptance rate of sampled drafts;"
        " hybrid: from the cross-entropy to 1 - acceptance rate, as that rate rises.",
        choices=KINDS,
        group="Stage 1, supervised",
    )
    step_weights: str = field(
        "decay",
        "Loss weight of a draft step. decay: by --ttt_decay. acceptance: the tokens that are expected to be accepted"
        " from this step on (D-PACE).",
        choices=STEP_WEIGHTS,
        group="Stage 1, supervised",
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
