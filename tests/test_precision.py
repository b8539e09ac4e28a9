"""The precision policy: docs/precision.md holds for the traced programs, and speculation keeps its output."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from experiments import evaluate
from ppow_jax.bench import subjects, training_parts
from ppow_jax.errors import UserError
from ppow_jax.inference import decoding
from ppow_jax.inference.model import Model
from ppow_jax.models import drafter as drafting
from ppow_jax.models import platforms, precision, transformer
from ppow_jax.objectives.rewards import CostModel
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import chain
from ppow_jax.training import stages
from ppow_jax.training.settings import TrainSettings
from ppow_jax.training.steps import ppow_sampled, supervised
from ppow_jax.weights.targets import Target

PAGE = Path(__file__).parents[1] / "docs" / "precision.md"
POLICIES = tuple(precision.POLICIES)
CONFIG = small_model.CONFIG


@functools.cache
def model(dtype: str) -> Model:
    """The small model with matrices of this dtype."""
    small = small_model.model()
    params = jax.tree.map(lambda x: x.astype(dtype), small.target.params)
    drafter = drafting.cast(small.drafter, dtype)
    return Model(Target("small", CONFIG, params, small.target.tokenizer), drafter)


def traced(jaxpr, found=None) -> list:
    """Every equation of a jaxpr, and of the jaxprs inside it."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in _inner(equation.params):
            traced(inner, found)
    return found


def _inner(params):
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def dtypes(values) -> str:
    """The one dtype of some arrays."""
    (found,) = {str(x.dtype) for x in values}
    return found


def prompts(B=2, P=8):
    ids = np.arange(B * P, dtype=np.int32).reshape(B, P) + 97
    return jnp.array(ids), jnp.full(B, P), jnp.full(B, P + 6), jax.random.split(jax.random.key(0), B)


def read_off(dtype: str) -> dict[str, str]:
    """The table's column: dtypes of the programs' arrays, from their traces."""
    m = model(dtype)
    params, drafter = m.target.params, m.drafter
    how = {"K": 2, "sampling": Sampling(), "L": 20}
    state = jax.eval_shape(functools.partial(generate.prefill, config=CONFIG, **how), params, drafter=drafter, **dict(
        zip(("prompt_BxP", "prompt_B", "limit_B", "key_B"), prompts(), strict=True)
    ))  # fmt: skip
    run = functools.partial(generate.decode, config=CONFIG, speculation=chain(2), sampling=Sampling())
    after = jax.eval_shape(run, params, drafter=drafter, state=state, rounds=9)
    tokens, mask = jnp.zeros((2, 4), jnp.int32), transformer.causal_mask(2, 4)
    position = jnp.arange(4)[None] + tokens

    def forward(params):
        out = transformer.forward(params, CONFIG, tokens, position, mask, feature_layers=(0, 1, 2))
        return out, transformer.logits(params, out.hidden_BxSxD)

    out, logits = jax.eval_shape(forward, params)
    equations = traced(jax.make_jaxpr(forward)(params).jaxpr)
    by_name = {name: [e for e in equations if e.primitive.name == name] for name in ("dot_general", "exp", "rsqrt")}
    on_weights = [e for e in by_name["dot_general"] if len(e.invars[1].aval.shape) == 2]
    projections = [e for e in on_weights if e.invars[1].aval.shape[0] != CONFIG.vocab_size]
    assert by_name["exp"] and by_name["rsqrt"] and projections

    s = training_parts.settings(
        dtype, batch_size=2, row_length=32, max_anchors=16, ttt_steps=2, window=2, windows=2, group=2
    )
    spec, training, update, batch = training_parts._inputs(subjects.Subject(m.target, drafter, True), s)
    static = {"config": CONFIG, "optimizer": update, "answers_are_greedy": True}
    step = functools.partial(supervised.train_step, steps=2, loss=SupervisedLoss(), **static)
    trained, metrics = jax.eval_shape(step, training, spec, params, batch)
    rollouts = stages.rollout_settings(s, CostModel(0.1), True)
    policy = ppow_sampled.PolicySettings(s.clip, s.kl_weight, s.passes)
    step = functools.partial(ppow_sampled.train_step, rollouts=rollouts, policy=policy, **static)
    sharpened, more = jax.eval_shape(step, training, spec, params, batch, jax.random.key(0))
    learnt = jax.tree.leaves((trained.params, trained.opt_state, sharpened.params, sharpened.opt_state))
    floats = [x for x in (*learnt, *jax.tree.leaves((metrics, more))) if jnp.issubdtype(x.dtype, jnp.floating)]

    def draft(features):
        full = spec.with_params(training.params)
        g = drafting.fuse(full, features)
        embed = full.embed(params["embed"], tokens)
        keys = [drafting.Prefix(drafting.prefix_keys(full, g, embed, position), mask)]
        return drafting.step(full, g, embed, position, keys)[0]

    drafted = jax.eval_shape(draft, out.features_BxSxF)
    matrices = [x for x in jax.tree.leaves((params, drafter.params)) if x.ndim > 1 and x.shape[0] != 3]
    # On an accelerator a product's dtype is the one that is sent; a CPU computes in float32 and rounds then.
    here = precision.current().activation(matrices[0].dtype)
    narrow = [e for e in projections if e.outvars[0].aval.dtype == here]
    return {
        "matrices of the target, and of the drafter while decoding": dtypes(matrices),
        "inputs of matrix products": dtypes(v.aval for e in on_weights for v in e.invars),
        "residual stream and hidden states": dtypes([out.hidden_BxSxD]),
        "features": dtypes([out.features_BxSxF, state.features_BxK1xF, after.features_BxK1xF]),
        "output of a draft step": dtypes([drafted]),
        "caches of target and drafter": dtypes(jax.tree.leaves((after.target_kv, after.drafter_kv))),
        "results of projections (and their sums over devices)": dtypes(e.outvars[0].aval for e in narrow),
        "statistics of norms": dtypes(e.invars[0].aval for e in by_name["rsqrt"]),
        "exponentials of softmax": dtypes(e.invars[0].aval for e in by_name["exp"]),
        "logits": dtypes([logits]),
        "losses and metrics": dtypes(x for x in floats if x.ndim == 0),
        "gradients, master weights, optimizer moments": dtypes(floats),
    }


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """Traces as on every platform: the CPU's own kernels are opaque."""
    from ppow_jax.models import layers

    monkeypatch.setattr(layers, "_ours", lambda: False)


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_is_that_of_the_programs(name):
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in PAGE.read_text().splitlines() if line.startswith("|")]
    head, _, *body = rows
    documented = {row[0]: row[head.index(name)] for row in body}
    accelerated = "tpu" if name == "accelerator" else None
    with precision.use(precision.POLICIES[name]), platforms.use(accelerated):
        assert read_off(precision.POLICIES[name].parameter) == documented


def test_every_policy_leaves_float32_alone():
    """The programs of a float32 model are equal, operation by operation."""
    m = model("float32")

    def jaxpr():
        how = {"K": 2, "sampling": Sampling(), "L": 20}
        run = functools.partial(generate.prefill.__wrapped__, config=CONFIG, **how)
        rows = dict(zip(("prompt_BxP", "prompt_B", "limit_B", "key_B"), prompts(), strict=True))
        once = jax.make_jaxpr(lambda params, drafter: run(params, drafter=drafter, **rows))
        text = str(once(m.target.params, m.drafter))
        return re.sub(r"0x[0-9a-f]+", "", text)

    found = []
    for policy in (None, *precision.POLICIES.values()):
        with precision.use(policy):
            found.append(jaxpr())
    assert len(set(found)) == 1


def test_flags():
    assert precision.of_flag("auto", "bfloat16") is None
    assert precision.of_flag("accelerator", "bfloat16") is precision.ACCELERATOR
    rule = "--precision=float32: takes matrices in float32, but --dtype=bfloat16"
    with pytest.raises(UserError, match=rule):
        evaluate.Settings(precision="float32")
    with pytest.raises(UserError, match="--precision=accelerator: takes matrices in bfloat16, but --dtype=float32"):
        TrainSettings(precision="accelerator", dtype="float32")
    assert precision.current() is precision.CPU_BFLOAT16
    with evaluate.Settings(precision="accelerator").in_use():
        assert precision.current() is precision.ACCELERATOR
    assert precision.current() is precision.CPU_BFLOAT16


CLOSE = 0.15  # of logits around 10 in size, whose bfloat16 steps are 0.06


def test_speculation_keeps_the_tokens_up_to_close_logits(record_property):
    """The accelerator's policy on a CPU: answers part from plain decoding's only where two logits are close."""
    m = model("bfloat16")
    texts = ["ab cd", "dcba abcd", "a b c d a b", "cab"]
    same = total = 0
    with precision.use(precision.ACCELERATOR):
        how = {"max_new_tokens": small_model.NEW, "batch_size": 4}
        plain = m.generate(texts, speculation="off", **how)
        for mode in ("chain", "tree"):
            found = m.generate(texts, speculation=small_model.MODES[mode], **how)
            for text, a, b in zip(texts, plain, found, strict=True):
                ours, theirs = np.asarray(a.token_ids), np.asarray(b.token_ids)
                n = min(len(ours), len(theirs))
                apart = np.flatnonzero(ours[:n] != theirs[:n])
                total, same = total + 1, same + (not len(apart))
                if len(apart):
                    prompt = m.target.tokenizer(text)["input_ids"]
                    margin = decoding.top2_margin(m.target, np.array([*prompt, *ours[: apart[0]]], np.int32))
                    assert margin < CLOSE, f"{mode}, {text!r}: token {apart[0]} differs, with a margin of {margin}"
    record_property("identical_answers", f"{same} of {total}")
    print(f"identical to plain decoding: {same} of {total} answers")
    assert same >= total / 2


def test_a_step_of_training_is_that_of_float32_activations():
    """One step of stage 1 on the same batch: losses agree within bfloat16's rounding, and parameters move alike."""
    m = model("bfloat16")
    s = training_parts.settings("bfloat16", batch_size=2, row_length=32, max_anchors=16, ttt_steps=2, window=2)
    results = {}
    for policy in (precision.CPU_BFLOAT16, precision.ACCELERATOR):
        with precision.use(policy):
            spec, state, update, batch = training_parts._inputs(subjects.Subject(m.target, m.drafter, True), s)
            results[policy.name] = supervised.train_step(
                state, spec, m.target.params, batch,
                steps=2, loss=SupervisedLoss(), config=CONFIG, optimizer=update, answers_are_greedy=True,
            )[1]  # fmt: skip
    wide, narrow = results["cpu-bfloat16"], results["accelerator"]
    assert float(narrow["loss"]) == pytest.approx(float(wide["loss"]), rel=0.02)
    assert float(narrow["gradient_norm"]) == pytest.approx(float(wide["gradient_norm"]), rel=0.1)
