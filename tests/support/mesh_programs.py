r"""Run by test_meshes.py in a process of its own, with 8 virtual devices: every program on every mesh, as JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/support/mesh_programs.py 'meshes:2,2,2;8,1,1'|rest OUTPUT.json DIRECTORY
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_world

from ppow_jax import sharding
from ppow_jax.data.batches import Batches
from ppow_jax.data.encoding import Example
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.families import Experts
from ppow_jax.objectives.expected import ExactSettings
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.speculation import generate
from ppow_jax.speculation.adaptive import CostTable
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import adaptive_tree, chain, tree
from ppow_jax.training import initialise
from ppow_jax.training.run.checkpoint import Checkpoints
from ppow_jax.training.steps import ppow_exact, ppow_sampled, supervised
from ppow_jax.training.steps.state import TrainState

# 4 key heads and 61 tokens do not divide by 8: they stay whole there, the 8 heads and the MLP are cut.
CONFIG = dataclasses.replace(
    small_world.CONFIG, num_layers=2, num_heads=8, num_kv_heads=4, intermediate_size=64, vocab_size=64
)
ROWS, STEPS, CROSS_ENTROPY = 8, 3, SupervisedLoss()
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-3, eps=1e-5))
ROLLOUTS = dataclasses.replace(
    small_world.ROLLOUTS, window=2, group=3, windows=2, rollout_temperature=1.0, adaw_start=1
)


def batches() -> Batches:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(40):
        tokens = rng.integers(0, 60, rng.integers(14, 30)).astype(np.int32)
        examples.append(Example(tokens, np.arange(len(tokens)) >= 5, f"text {i}"))
    return Batches(examples, seed=0, batch_size=ROWS, row_length=32, max_anchors=24)


BATCHES = batches()


@functools.cache
def weights() -> tuple[dict, Drafter]:
    """Target parameters and a drafter, on the host."""
    config = initialise.drafter_config(CONFIG, 24, (0, 1, 2))
    params = jax.jit(lambda key: transformer.init(key, CONFIG, scale=0.3))(jax.random.key(0))
    start = jax.jit(lambda key: drafting.init(key, config, scale=0.1))(jax.random.key(1))
    return jax.device_get((params, Drafter(config, start, jnp.arange(0, 48, 2))))


def models() -> tuple[dict, Drafter]:
    """The same, lying as the mesh in use says."""
    params, drafter = weights()
    if not sharding.in_use():
        return jax.tree.map(jnp.asarray, (params, drafter))
    return sharding.place(params, CONFIG), sharding.place(drafter, drafter.config)


def step_1(state, params, drafter, index, accumulate=1, loss=CROSS_ENTROPY):
    batch = sharding.place(BATCHES.at(index))
    return supervised.train_step(
        state, drafter.spec, params, batch, config=CONFIG, optimizer=OPTIMIZER, steps=2, loss=loss,
        answers_are_greedy=False, accumulate=accumulate,
    )  # fmt: skip


def step_2(state, params, drafter, index, accumulate=1):
    batch, key = sharding.place(BATCHES.at(index)), jax.random.fold_in(jax.random.key(7), index)
    return ppow_sampled.train_step(
        state, drafter.spec, params, batch, key, config=CONFIG, optimizer=OPTIMIZER, rollouts=ROLLOUTS,
        policy=ppow_sampled.PolicySettings(0.2, 0.5, 1), answers_are_greedy=False, accumulate=accumulate,
    )  # fmt: skip


def exact_step(state, params, drafter, index, _):
    """Also -log of the acceptance rate, its draft steps weighted by acceptance."""
    exact = ExactSettings(kl_weight=0.5, supervised_weight=0.3, supervised=SupervisedLoss("acceptance", "acceptance"))
    return ppow_exact.train_step(
        state, drafter.spec, params, sharding.place(BATCHES.at(index)), config=CONFIG, optimizer=OPTIMIZER,
        rollouts=ROLLOUTS, exact=exact,
    )  # fmt: skip


def train(step, steps=STEPS, accumulate=1, dtype=jnp.float32):
    """(history of metrics, final parameters)."""
    params, drafter = models()
    drafter = drafter.replace(compute_dtype="bfloat16" if dtype == jnp.bfloat16 else None)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    state, history = TrainState.create(drafter.params, OPTIMIZER, drafter.config), []
    for index in range(steps):
        state, metrics = step(state, params, drafter, index, accumulate)
        history.append(plain(metrics))
    return {"history": history, "params": plain(state.params)}


def decode(speculation, temperature_B):
    """The tokens of 8 answers, read after two rounds and at the end."""
    params, drafter = models()
    rng = np.random.default_rng(1)
    sampling = Sampling.of(temperature_B)
    prompt_B = rng.integers(2, 9, ROWS).astype(np.int32)
    prompt_BxP = rng.integers(0, 60, (ROWS, 8)).astype(np.int32) * (np.arange(8) < prompt_B[:, None])
    rows = generate.Prompts(prompt_BxP, prompt_B, prompt_B + 16, jax.random.split(jax.random.key(3), ROWS))
    L = generate.cache_length(8, 16, speculation.window)
    free = CostTable.of(0.0, np.ones(speculation.verified + 1)) if speculation.adaptive else None
    how = {"K": speculation.window, "sampling": sampling, "L": L}
    state = generate.prefill(params, CONFIG, drafter, *sharding.place(rows), **how)
    for rounds in (2, 100):
        state = generate.decode(
            params, CONFIG, drafter, state, rounds, speculation=speculation, sampling=sampling, cost_table=free
        )
    return plain([state.tokens_BxL, state.length_B, state.histogram_BxK1])


def restore(directory, shape, devices):
    """One more step on another mesh, from what was saved on 8 devices -> its metrics."""
    with sharding.use(sharding.make_mesh(shape, jax.devices()[:devices])):
        params, drafter = models()
        blank = TrainState.create(drafter.params, OPTIMIZER, drafter.config)
        with Checkpoints(directory) as checkpoints:
            done, state, _ = checkpoints.restore_latest(sharding.like(blank))
        used = {len(x.sharding.device_set) for x in jax.tree.leaves(state)}
        state, metrics = step_1(state, params, drafter, done)
        return {"metrics": plain(metrics), "params": plain(state.params), "devices": max(used)}


def save(directory):
    """Saved after two steps on 8 devices; the third step's metrics."""
    params, drafter = models()
    state = TrainState.create(drafter.params, OPTIMIZER, drafter.config)
    for index in range(2):
        state, _ = step_1(state, params, drafter, index)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, state)
    state, metrics = step_1(state, params, drafter, 2)
    return {"metrics": plain(metrics), "params": plain(state.params)}


def experts():
    """Hidden states of a mixture of 4 experts, of which 3 do not divide by 2 and are left where they are."""
    values = []
    for number in (4, 3):
        config = dataclasses.replace(CONFIG, num_layers=1, experts=Experts(number, 2, 32, True, (0,)))
        make = functools.partial(transformer.init, config=config, scale=0.3)
        params = sharding.born(make, jax.random.key(5), config=config)
        batch = sharding.place(BATCHES.at(0))
        forward = jax.jit(transformer.forward, static_argnums=1)
        mask = transformer.causal_mask(*batch.tokens_BxT.shape)
        values.append(forward(params, config, batch.tokens_BxT, batch.position_BxT, mask).hidden_BxSxD)
    return plain(values)


def plain(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), sharding.fetch(tree))


def compiled():
    programs = supervised.train_step, ppow_sampled.train_step, generate.prefill, generate.decode
    return [program._cache_size() for program in programs]


def everything():
    return {
        "supervised": train(step_1),
        "ppow": train(step_2),
        "chain": decode(chain(2), [0.0, 1.0] * (ROWS // 2)),
    }


def on_meshes(names):
    """All that is trained and decoded, on one device and on each of these meshes, such as `2,2,2`."""
    found = {"one": everything()}
    for name in names:
        shape = map(int, name.split(","))
        before = compiled()
        with sharding.use(sharding.make_mesh(MeshShape(*shape))):
            found[name] = everything()
            found[name]["compilations"] = [a - b for a, b in zip(compiled(), before, strict=True)]
            params, drafter = models()
            cut = [params["layers"][0]["gate_proj"], drafter.params["up_proj"]]
            found[name]["pieces"] = [list(x.addressable_shards[0].data.shape) for x in cut]
    return found


def further():
    return {
        "tree": decode(tree(2, 2, 4), 0.0),
        "adaptive": decode(adaptive_tree(2, 2, 4), [0.0, 1.0] * (ROWS // 2)),
        "hybrid": train(functools.partial(step_1, loss=SupervisedLoss("hybrid", "acceptance")), 2),
        "exact": train(exact_step, 2),
        "bfloat16": train(step_1, 1, dtype=jnp.bfloat16),
        "experts": experts(),
    }


def the_rest(directory):
    """Trees, further losses, bfloat16, experts, microbatches; checkpoints that are restored on fewer devices."""
    whole = {"supervised": train(step_1, 2), "ppow": train(step_2, 2)}
    found = {"one": further() | whole}
    with sharding.use(sharding.make_mesh(MeshShape(2, 1, 2, 2))):
        found["many"] = further() | {"supervised": train(step_1, 2, 2), "ppow": train(step_2, 2, 2)}
    with sharding.use(sharding.make_mesh(MeshShape(4, 2, 1))):
        found["saved"] = save(directory)
    found["restored on 4"] = restore(directory, MeshShape(2, 1, 2), 4)
    found["restored on 1"] = restore(directory, MeshShape(), 1)
    return found


def main(which: str, output: str, directory: str) -> None:
    kind, _, names = which.partition(":")
    found = on_meshes(names.split(";")) if kind == "meshes" else the_rest(pathlib.Path(directory))
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
