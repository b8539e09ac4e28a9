"""The real programs of training and decoding, with abstract arguments, for `plan` to compile.

Nothing here holds a weight. Every argument is a shape, a dtype and a sharding on the mesh, as in training and decoding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import sharding
from ppow_jax.data.batches import PackedBatch
from ppow_jax.models import drafter as drafting
from ppow_jax.models import stack, transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, DrafterSpec
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.models.experts import block_rows
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.planning.hlo import Instruction, Rounds
from ppow_jax.speculation import generate
from ppow_jax.speculation.prefill import PIECE
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.training import initialise, stages
from ppow_jax.training.optimizers import optimizer
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.steps import ppow_sampled, supervised
from ppow_jax.training.steps.state import TrainState
from ppow_jax.weights.targets import DTYPES

KINDS = ("target", "drafter", "optimizer", "caches", "batch")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    kinds: the arguments that belong to each of KINDS. tokens: tokens that a step reads (training) or may write at most
    (decoding). step: description of a step. rounds: trip counts of loops whose length the program does not determine.
    """

    function: Any
    arguments: tuple
    options: dict[str, Any]
    kinds: dict[str, Any]
    tokens: int
    step: str
    rounds: Rounds

    def lower(self, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
        """Lowers the program for the devices of the mesh."""
        with sharding.use(mesh):
            return self.function.lower(*self.arguments, **self.options)


@dataclasses.dataclass(frozen=True)
class Models:
    """target, drafter: configs. params, drafter_params: abstract, with shardings; layers are stacked if `scan`."""

    target: ModelConfig
    drafter: DrafterConfig
    params: dict
    drafter_params: dict
    target_ids_W: Any

    def decoding_drafter(self, dtype: Any) -> Drafter:
        """The drafter as used for decoding."""
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype, sharding=x.sharding),
            self.drafter_params,
        )
        return Drafter(self.drafter, params, self.target_ids_W)


def models(settings: TrainSettings, target: ModelConfig, mesh: jax.sharding.Mesh, scan: bool) -> Models:
    """Target and new drafter of a run, as shapes."""
    config = initialise.drafter_config(
        target, min(settings.draft_vocab_size, target.vocab_size), settings.feature_layers, settings.fc_norm
    )
    key = jax.random.key(0)

    def make() -> dict:
        params = transformer.init(key, target, DTYPES[settings.dtype])
        return stack.stack(params, target) if scan else params

    params = sharding.abstract(jax.eval_shape(make), mesh, target)
    drafter = sharding.abstract(jax.eval_shape(lambda: drafting.init(key, config)), mesh, config)
    ids_W = _whole(jax.ShapeDtypeStruct((config.draft_vocab_size,), jnp.int32), mesh)
    return Models(target, config, params, drafter, ids_W)


def training(stage: str, settings: TrainSettings, found: Models, mesh: jax.sharding.Mesh) -> Program:
    """One step of stage `supervised` or `ppow`."""
    compute_dtype = "bfloat16" if settings.dtype == "bfloat16" else None
    spec = DrafterSpec(found.drafter, found.target_ids_W, compute_dtype, remat=settings.remat)
    scale_F = None if settings.fc_norm else np.ones(3 * found.target.hidden_size)
    update = optimizer(
        settings, list(found.drafter_params), settings.learning_rate, settings.supervised_steps, 0, scale_F
    )
    create = functools.partial(TrainState.create, optimizer=update)
    state = sharding.abstract(jax.eval_shape(create, found.drafter_params), mesh, found.drafter)
    batch = _batch(settings, mesh)
    answers_are_greedy = settings.answer_temperature == 0
    arguments: tuple = (state, spec, found.params, batch)
    options: dict[str, Any] = {"config": found.target, "optimizer": update, "answers_are_greedy": answers_are_greedy}
    options["accumulate"] = settings.accumulate
    function: Callable = supervised.train_step
    if stage == "supervised":
        options |= {"steps": settings.ttt_steps, "loss": stages.supervised_loss(settings)}
    else:
        function = ppow_sampled.train_step
        arguments += (_whole(jax.eval_shape(lambda: jax.random.key(0)), mesh),)
        costs = CostModel(0.0)  # costs do not affect shapes
        options |= {
            "rollouts": stages.rollout_settings(settings, costs, answers_are_greedy),
            "policy": ppow_sampled.PolicySettings(settings.clip, settings.kl_weight, settings.passes),
        }
    kinds = {"target": found.params, "drafter": state.params, "optimizer": state.opt_state, "batch": batch}
    tokens, step = settings.batch_size * settings.row_length, "optimizer step"
    return Program(function, arguments, options, kinds, tokens, step, expert_rounds(found.target))


def decoding(
    settings: TrainSettings,
    found: Models,
    mesh: jax.sharding.Mesh,
    speculation: Speculation,
    prompt_tokens: int,
    new_tokens: int,
    cache_dtype: str,
    *,
    prefill: bool = False,
) -> Program:
    """One round of greedy decoding of a batch, or with `prefill` the reading of its prompts."""
    B, K = settings.batch_size, speculation.window
    drafter = found.decoding_drafter(DTYPES[settings.dtype])
    L = generate.cache_length(prompt_tokens, new_tokens, K)
    rows = _rows(
        {
            "prompt_BxP": jax.ShapeDtypeStruct((B, prompt_tokens), jnp.int32),
            "prompt_B": jax.ShapeDtypeStruct((B,), jnp.int32),
            "limit_B": jax.ShapeDtypeStruct((B,), jnp.int32),
            "key_B": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B)),
        },
        mesh,
    )
    inputs = tuple(rows[name] for name in ("prompt_BxP", "prompt_B", "limit_B", "key_B"))
    read_arguments = (found.params, found.target, drafter, *inputs)
    read_options = {"K": K, "sampling": Sampling(), "L": L, "cache_dtype": DTYPES[cache_dtype]}
    kinds = {"target": found.params, "drafter": drafter.params, "batch": rows}
    if prefill:
        tokens, step = B * prompt_tokens, "reading the prompts"
        pieces, experts = -(-prompt_tokens // PIECE), expert_rounds(found.target)

        def rounds(loop: Instruction) -> float | None:
            return experts(loop) if "experts" in loop.scopes else pieces

        return Program(generate.prefill, read_arguments, read_options, kinds, tokens, step, rounds)

    def read(params, drafter, *rows):
        return generate.prefill(params, found.target, drafter, *rows, **read_options)

    state = jax.eval_shape(read, found.params, drafter, *inputs)
    state = sharding.abstract(state, mesh, found.target)
    caches = {"target": state.target_kv, "drafter": state.drafter_kv}
    kinds |= {"caches": caches, "batch": state.replace(target_kv=(), drafter_kv=None)}
    limit = _whole(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    arguments = (found.params, found.target, drafter, state, limit)
    options = {"speculation": speculation, "sampling": Sampling()}
    tokens, step = B * (K + 1), "round of drafting and verification"
    return Program(generate.decode, arguments, options, kinds, tokens, step, expert_rounds(found.target))


def expert_rounds(config: ModelConfig) -> Rounds:
    """Blocks of tokens in a mixture's loop if all its experts get equal shares (see `models.experts.mixture`).

    The loop carries its accumulator, [M, D], from which the number of tokens is read.
    """

    def rounds(loop: Instruction) -> float | None:
        if config.experts is None or "experts" not in loop.scopes:
            return None
        D = config.hidden_size
        sums = [shape for shape in loop.shapes if len(shape.dims) == 2 and D in shape.dims and shape.kind == "f32"]
        stacks = [shape for shape in loop.shapes if len(shape.dims) > 2 and D in shape.dims[-2:]]
        if not sums or not stacks:
            return None
        pairs, E = sums[0].size // D * config.experts.per_token, max(shape.dims[-3] for shape in stacks)
        touched = E * (1 - (1 - 1 / config.experts.number) ** pairs)
        return touched * math.ceil(pairs / config.experts.number / block_rows(pairs, E))

    return rounds


def _batch(settings: TrainSettings, mesh: jax.sharding.Mesh) -> PackedBatch:
    B, T, M = settings.batch_size, settings.row_length, settings.max_anchors
    shapes = PackedBatch(
        tokens_BxT=jax.ShapeDtypeStruct((B, T), jnp.int32),
        segment_BxT=jax.ShapeDtypeStruct((B, T), jnp.int32),
        position_BxT=jax.ShapeDtypeStruct((B, T), jnp.int32),
        anchor_BxM=jax.ShapeDtypeStruct((B, M), jnp.int32),
        anchor_mask_BxM=jax.ShapeDtypeStruct((B, M), jnp.bool_),
    )
    return _rows(shapes, mesh)


def _rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    return sharding.abstract(tree, mesh)


def _whole(x: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """Replicated on every device."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
