"""Stage 1: the training-time test against a dense reference, and its agreement with decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world
import suites

from ppow_jax.data.batches import empty_batch, find_anchors
from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.models import transformer
from ppow_jax.objectives import supervised as objective
from ppow_jax.objectives.supervised import SupervisedLoss
from ppow_jax.speculation import generate
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import chain
from ppow_jax.training.steps import supervised
from ppow_jax.training.steps.state import TrainState

STEPS, DECAY = world.STEPS, 0.7
USUAL = SupervisedLoss(decay=DECAY)

# The training-time test.


@functools.partial(jax.jit, static_argnames=("compute_dtype", "how"))
def judged(params, batch, shell, compute_dtype=None, how=USUAL):
    """(total, scores), gradient of the drafter's parameters."""
    windows = world.score_in(batch, shell.target_ids_W).windows

    def loss(params):
        drafter = shell.replace(compute_dtype=compute_dtype).with_params(params)
        scores = objective.training_time_test(drafter, world.target_params()["embed"], windows, STEPS, how)
        return scores.total.sum(), scores

    return jax.value_and_grad(loss, has_aux=True)(params)


def run(drafter, batch, params=None, compute_dtype=None):
    shell = drafter.spec
    return jax.device_get(judged(drafter.params if params is None else params, batch, shell, compute_dtype))


def rms(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + world.CONFIG.rms_norm_eps) * scale


def rotate(x_TxHxd, position_T):
    """RoPE as complex numbers (x_j, x_{j + d/2})."""
    half = x_TxHxd.shape[-1] // 2
    angle = position_T[:, None] * world.CONFIG.rope_theta ** (-jnp.arange(half) / half)
    z = (x_TxHxd[..., :half] + 1j * x_TxHxd[..., half:]) * jnp.exp(1j * angle)[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def reference(config, params, target_ids_W, tokens_T, answer_T):
    """EAGLE-3's training-time test on one text alone: all its indices at once, step by step, one dense mask.

    The drafter's layer is written out here once more, from the method's description. Returns per step the loss, and
    whether the argmax is the target's, of every index [S, T], with the mask of indices that count [S, T].
    """
    T, d = len(tokens_T), config.head_dim
    target = world.target_params()
    out = transformer.forward(
        target, world.CONFIG, tokens_T[None], jnp.arange(T)[None], transformer.causal_mask(1, T),
        feature_layers=config.feature_layers,
    )  # fmt: skip
    target_logits = out.hidden_BxSxD[0] @ target["lm_head"].T
    p_TxW = jax.nn.softmax(target_logits[:, target_ids_W], -1)
    best_T = target_logits.argmax(-1)
    features_TxF = out.features_BxSxF[0]
    if config.fc_norm:
        three = features_TxF.reshape(T, 3, -1)
        features_TxF = rms(three, params["fc_norm"]).reshape(T, -1)
    g = features_TxF @ params["fc"].T
    index = jnp.arange(T)
    ks, vs, masks, results = [], [], [], []
    for s in range(STEPS):
        ahead = jnp.minimum(index + s + 1, T - 1)
        embed = target["embed"][tokens_T[ahead]]
        a = jnp.concatenate([rms(embed, params["input_norm"]), rms(g, params["hidden_norm"])], -1)
        q = rotate((a @ params["q_proj"].T).reshape(T, -1, d), index + s)
        k = rotate((a @ params["k_proj"].T).reshape(T, -1, d), index + s)
        v = (a @ params["v_proj"].T).reshape(T, -1, d)
        groups = q.shape[1] // k.shape[1]
        ks.append(jnp.repeat(k, groups, 1)), vs.append(jnp.repeat(v, groups, 1))
        masks.append(index[None] <= index[:, None] if s == 0 else index[None] == index[:, None])
        weights = jnp.einsum("qhd,khd->hqk", q, jnp.concatenate(ks)) / jnp.sqrt(d)
        weights = jax.nn.softmax(jnp.where(jnp.concatenate(masks, 1), weights, -jnp.inf), -1)
        y = g + jnp.einsum("hqk,khd->qhd", weights, jnp.concatenate(vs)).reshape(T, -1) @ params["o_proj"].T
        x = rms(y, params["post_norm"])
        y += (jax.nn.silu(x @ params["gate_proj"].T) * (x @ params["up_proj"].T)) @ params["down_proj"].T
        normed = rms(y, params["norm"])
        log_q = jax.nn.log_softmax(normed @ params["lm_head"].T, -1)
        g = normed if config.fc_norm else y
        loss_T = -(p_TxW[ahead] * log_q).sum(-1)
        match_T = target_ids_W[log_q.argmax(-1)] == best_T[ahead]
        # tokens i+1 .. i+s+2 are the answer's, and the draft vocabulary holds the target's choice
        inside_T = jnp.stack([jnp.roll(answer_T, -j) & (index + j < T) for j in range(1, s + 3)]).all(0)
        results.append((loss_T, match_T, inside_T, (target_ids_W == best_T[ahead][:, None]).any(-1)))
    return [jnp.stack(x) for x in zip(*results, strict=True)]


@functools.partial(jax.jit, static_argnames="config")
def reference_total(params, config, target_ids_W, tokens_NxT, answer_NxT):
    """(sum over steps of decay^s times the masked mean loss, the parts [N, S, T])."""
    parts = jax.vmap(lambda t, a: jnp.stack([*map(jnp.float32, reference(config, params, target_ids_W, t, a))]))(
        tokens_NxT, answer_NxT
    )
    loss, match, inside, known = parts.transpose(1, 0, 2, 3)
    counted = inside * known
    mean_S = (loss * counted).sum((0, 2)) / counted.sum((0, 2))
    return (mean_S * DECAY ** jnp.arange(STEPS)).sum(), (loss, match, inside, known)


def texts(members):
    """The examples of a batch, one a row, padded on the right (attention is causal)."""
    chosen = [world.batches().examples[i] for row in members for i in row]
    T = max(len(e.tokens) for e in world.examples())
    tokens, answer = np.zeros((len(chosen), T), np.int32), np.zeros((len(chosen), T), bool)
    for n, e in enumerate(chosen):
        tokens[n, : len(e.tokens)], answer[n, : len(e.tokens)] = e.tokens, e.answer_mask
    return tokens, answer


@functools.cache
def noisy(fc_norm: bool):
    """A drafter none of whose parts is what it starts as."""
    drafter = world.drafter(fc_norm)
    rng = np.random.default_rng(3)
    add = {name: rng.normal(size=x.shape).astype(np.float32) * 0.1 for name, x in drafter.params.items()}
    return drafter.replace(params=jax.tree.map(lambda x, y: x + y, drafter.params, add))


def places(batch, members):
    """(row, anchor number, text number, index in the text) of every anchor in use."""
    starts, n = {}, 0
    for b, row in enumerate(members):
        for segment in range(1, len(row) + 1):
            starts[b, segment] = n, int(np.flatnonzero(batch.segment_BxT[b] == segment)[0])
            n += 1
    for b, m in zip(*np.nonzero(batch.anchor_mask_BxM), strict=True):
        i = int(batch.anchor_BxM[b, m])
        text, start = starts[b, int(batch.segment_BxT[b, i])]
        yield b, m, text, i - start


@pytest.mark.parametrize("fc_norm", suites.keep([True], [False, True]))
def test_the_training_time_test_is_the_dense_reference(fc_norm):
    """Losses, matches, masks of every anchor and step, the total, and the gradient of every parameter.

    The reference reads each example alone, so rows that hold several are as good as that.
    """
    drafter, batch = noisy(fc_norm), world.batch()
    members = world.batches().members(0)
    assert max(map(len, members)) >= 2
    (total, scores), gradient = run(drafter, batch)
    (expected, (loss, match, inside, known)), expected_gradient = jax.device_get(
        jax.value_and_grad(reference_total, has_aux=True)(
            drafter.params, drafter.config, drafter.target_ids_W, *texts(members)
        )
    )
    seen = np.zeros(inside.shape)
    for b, m, n, i in places(batch, members):
        for s in range(STEPS):
            assert scores.valid[s, b, m] == inside[n, s, i]
            if inside[n, s, i]:
                seen[n, s, i] = 1
                assert scores.known[s, b, m] == known[n, s, i]
                np.testing.assert_allclose(scores.loss[s, b, m], loss[n, s, i], rtol=1e-4, atol=1e-5)
                assert scores.match[s, b, m] == (match[n, s, i] and known[n, s, i])
    np.testing.assert_array_equal(seen, inside)  # no index of an answer was forgotten
    assert 0 < scores.valid.sum() - (scores.valid & scores.known).sum()  # some tokens lie outside the vocabulary
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, g in gradient.items():
        largest = np.abs(expected_gradient[name]).max()
        assert largest > 0, name
        np.testing.assert_allclose(g, expected_gradient[name], rtol=1e-3, atol=2e-5 * largest, err_msg=name)


def test_bfloat16_products_stay_near():
    drafter, batch = noisy(False), world.batch()
    (total, _), gradient = run(drafter, batch)
    (mixed_total, _), mixed_gradient = run(drafter, batch, compute_dtype="bfloat16")
    np.testing.assert_allclose(mixed_total, total, rtol=0.02)
    for name, g in gradient.items():
        assert mixed_gradient[name].dtype == np.float32
        distance = np.linalg.norm(mixed_gradient[name] - g) / np.linalg.norm(g)
        assert distance < 0.1, (name, distance)


def test_what_lies_past_the_masks_changes_nothing():
    """Padding tokens and unused anchors: no loss, no gradient, no metric. Other segments: no loss of an anchor."""
    drafter, batch = noisy(False), world.batch()
    (total, scores), gradient = run(drafter, batch)
    rng = np.random.default_rng(0)
    padding, unused = batch.segment_BxT == 0, ~batch.anchor_mask_BxM
    assert padding.any() and unused.any()
    noise = rng.integers(0, world.CONFIG.vocab_size, batch.tokens_BxT.shape)
    changed = batch._replace(
        tokens_BxT=np.where(padding, noise, batch.tokens_BxT).astype(np.int32),
        position_BxT=np.where(padding, noise, batch.position_BxT).astype(np.int32),
        anchor_BxM=np.where(unused, rng.integers(0, world.ROW, unused.shape), batch.anchor_BxM).astype(np.int32),
    )
    (total_2, scores_2), gradient_2 = run(drafter, changed)
    np.testing.assert_allclose(total_2, total, rtol=1e-6)
    np.testing.assert_array_equal(scores_2.valid, scores.valid)
    for name in ("loss", "match", "overlap"):
        ours, theirs = (np.where(scores.valid, getattr(x, name), 0) for x in (scores, scores_2))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, g in gradient.items():
        np.testing.assert_allclose(gradient_2[name], g, rtol=1e-4, atol=1e-6 * np.abs(g).max(), err_msg=name)
    for ours, theirs in zip(objective.chain_counts(scores), objective.chain_counts(scores_2), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    first = batch.segment_BxT == 1
    changed = batch._replace(tokens_BxT=np.where(first, batch.tokens_BxT, noise).astype(np.int32))
    (_, scores_3), _ = run(drafter, changed)
    mine = np.take_along_axis(first, batch.anchor_BxM, 1) & scores.valid
    others = scores.valid & ~mine
    np.testing.assert_allclose(scores_3.loss[mine], scores.loss[mine], rtol=1e-5)
    assert not np.allclose(scores_3.loss[others], scores.loss[others], rtol=0.1)


def test_an_example_alone_scores_as_in_company():
    batch, members = world.batch(), world.batches().members(0)
    drafter = noisy(False)
    (_, together), _ = run(drafter, batch)
    example = world.batches().examples[members[0][-1]]  # the last of its row
    here = np.flatnonzero(batch.segment_BxT[0] == len(members[0]))
    of_it = batch.anchor_mask_BxM[0] & np.isin(batch.anchor_BxM[0], here)
    alone = empty_batch(world.ROWS, world.ROW, world.ANCHORS)
    n, anchors = len(example.tokens), find_anchors(example.answer_mask)
    alone.tokens_BxT[1, :n], alone.segment_BxT[1, :n], alone.position_BxT[1, :n] = example.tokens, 1, np.arange(n)
    alone.anchor_BxM[1, : len(anchors)], alone.anchor_mask_BxM[1, : len(anchors)] = anchors, True
    (_, single), _ = run(drafter, alone)
    valid = single.valid[:, 1, : len(anchors)]
    np.testing.assert_array_equal(valid, together.valid[:, 0, of_it])
    for name in ("loss", "match", "known", "overlap"):
        a, b = getattr(single, name)[:, 1, : len(anchors)][valid], getattr(together, name)[:, 0, of_it][valid]
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    assert here[0] > 0 and not single.valid[:, 0].any()


def test_a_batch_of_padding_is_harmless():
    (total, scores), gradient = run(noisy(False), empty_batch(world.ROWS, world.ROW, world.ANCHORS))
    assert total == 0 and not scores.valid.any()
    assert not any(g.any() for g in gradient.values())
    assert objective.simulated_length(*objective.chain_counts(scores)) == 1.0


# Losses of the acceptance rate, and weights by acceptance.


def plain_total(params, batch, shell, how):
    """The total from logits that are all kept, step by step, differentiated by JAX."""
    drafter, embed = shell.with_params(params), world.target_params()["embed"]
    windows = world.score_in(batch, shell.target_ids_W).windows
    steps = objective.unroll(drafter, embed, windows, STEPS)
    anchors = objective.anchors_at(windows, *objective.prefix(drafter, embed, windows), windows.anchor_BxM)
    outs = drafting.unroll(drafter, embed, anchors, objective.text_tokens(windows, STEPS))
    log_q = [jax.nn.log_softmax(drafting.logits(drafter, out), -1) for out in outs]
    weight = [how.decay**s for s in range(STEPS)]
    if how.step_weights == "acceptance":
        chance, smooth = [], 1.0
        for step, x in zip(steps, log_q, strict=True):
            mine = jnp.take_along_axis(x, jnp.maximum(step.label_BxM, 0)[..., None], -1)[..., 0]
            smooth *= 0.5 + 0.5 * jnp.where(step.label_BxM >= 0, jnp.exp(jax.lax.stop_gradient(mine)), 0.0)
            chance.append(jnp.where(step.valid_BxM, smooth, 0.0))
        weight = [sum(chance[s:]) for s in range(STEPS)]
    total = 0.0
    for w, step, x in zip(weight, steps, log_q, strict=True):
        alpha = jnp.minimum(step.mass_BxM[..., None] * step.probability_BxMxW, jnp.exp(x)).sum(-1)
        counted = step.valid_BxM & (step.label_BxM >= 0)
        loss = -jnp.log(jnp.where(counted, alpha, 1.0))
        if how.kind != "acceptance":
            share = 1.0 if how.kind == "cross_entropy" else jnp.exp(-3 * jax.lax.stop_gradient(alpha))
            loss = -share * (step.probability_BxMxW * x).sum(-1) + (1 - share) * (1 - alpha)
        total += jnp.where(counted, w * loss, 0.0).sum() / counted.sum()
    return total


HOWS = [SupervisedLoss("acceptance"), SupervisedLoss("hybrid", "acceptance"), SupervisedLoss(step_weights="acceptance")]


@pytest.mark.parametrize("how", suites.keep(HOWS[1:2], HOWS), ids=str)
def test_acceptance_in_the_loss_and_in_its_weights(how):
    drafter, batch = world.trained(), world.batch()
    (total, scores), gradient = jax.device_get(judged(drafter.params, batch, drafter.spec, how=how))
    plain = jax.jit(jax.value_and_grad(functools.partial(plain_total, batch=batch, shell=drafter.spec, how=how)))
    expected, expected_gradient = jax.device_get(plain(drafter.params))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, g in gradient.items():
        largest = np.abs(expected_gradient[name]).max()
        np.testing.assert_allclose(g, expected_gradient[name], rtol=1e-3, atol=2e-5 * largest, err_msg=name)
    (_, usual), _ = run(drafter, batch)  # what is reported does not depend on the loss
    for name in ("loss", "match", "valid", "known", "overlap"):
        np.testing.assert_allclose(getattr(scores, name), getattr(usual, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"kind": "acceptence"}, {"step_weights": "hybrid"}])
def test_other_losses_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=f"^{name}={value}: must be one of "):
        SupervisedLoss(**changes)


def test_acceptance_weights_by_hand():
    """Two anchors: three steps, the last of which cannot be accepted; an answer that ends after one step."""
    q = jnp.asarray([[0.8, 0.4], [0.2, 0.5], [0.0, 0.5]])[:, None]
    valid = jnp.asarray([[1, 1], [1, 0], [1, 0]], bool)[:, None]
    weights = objective.acceptance_weights(jnp.log(q), valid)[:, 0]
    a, b, c = 0.9, 0.9 * 0.6, 0.9 * 0.6 * 0.5
    np.testing.assert_allclose(weights, [[a + b + c, 0.7], [b + c, 0], [c, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", suites.keep(["acceptance"], ["acceptance", "hybrid"]))
def test_training_lowers_a_loss_of_the_acceptance_rate(kind):
    start, history = world.drafter(), []
    state = TrainState.create(start.params, world.OPTIMIZER)
    for index in range(30):
        batch = world.batches().at(index)
        state, metrics = world.train_step(state, start.spec, world.target_params(), batch, loss=SupervisedLoss(kind))
        history.append(jax.device_get((metrics["loss"], metrics["tau_sim"])))
    loss, tau = np.array(history).T
    assert loss[-6:].mean() < 0.9 * loss[:2].mean() and tau[-6:].mean() > tau[:2].mean()


# The simulated length.


def test_simulated_length_by_hand():
    """Three anchors: two matches then a miss; a miss at once; a match, then the answer ends."""
    match = np.array([[1, 0, 1], [1, 1, 0], [0, 1, 1]], bool)[:, None]
    valid = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], bool)[:, None]
    scores = objective.StepScores(0, 0, jnp.asarray(match), jnp.asarray(valid), 0, 0)
    accepted, reached = objective.chain_counts(scores)
    np.testing.assert_array_equal(accepted, [2, 1, 0])
    np.testing.assert_array_equal(reached, [3, 1, 1])
    assert objective.simulated_length(accepted, reached) == pytest.approx(1 + 2 / 3 + 2 / 3 * 1)


def test_simulated_length_is_what_greedy_decoding_counts():
    """Training and decoding meet here.

    The answers are the target's own greedy text, so decoding from any prefix of one drafts along that very text, and
    what a window accepts from the prefix that ends at an anchor must be the leading matches of that anchor in the
    training-time test. Windows that reach past the end of the answer (cut at its length, or at EOS) are judged there
    only by the steps that the recorded text still has, so real counts are cut to these; after that the two are equal
    window by window, and so are the acceptances and the simulated length.
    """
    drafter, batch, K = world.trained(), world.batch(), STEPS
    (_, scores), _ = run(drafter, batch)
    prefixes = [
        (b, m, batch.tokens_BxT[b, i - batch.position_BxT[b, i] : i + 1])
        for b, m in zip(*np.nonzero(batch.anchor_mask_BxM), strict=True)
        for i in [batch.anchor_BxM[b, m]]
    ]
    accepted = decoded_acceptance(drafter, [tokens for *_, tokens in prefixes], K)
    steps_left = np.array([scores.valid[:, b, m].sum() for b, m, _ in prefixes])
    leading = np.array([np.cumprod(scores.match[:, b, m] & scores.valid[:, b, m]).sum() for b, m, _ in prefixes])
    np.testing.assert_array_equal(np.minimum(accepted, steps_left), leading)

    reached_S = [((accepted >= s) & (steps_left > s)).sum() for s in range(K)]
    accepted_S = [((accepted > s) & (steps_left > s)).sum() for s in range(K)]
    tau = objective.simulated_length(np.array(accepted_S), np.array(reached_S))
    assert tau == objective.simulated_length(*objective.chain_counts(scores))
    whole = steps_left == K
    assert whole.sum() > 40 and accepted[whole].max() == K and accepted[whole].min() == 0  # a fair sample

    batches = [(batch, None)]
    evaluate = functools.partial(supervised.evaluate, config=world.CONFIG, K=K, answers_are_greedy=True)
    measured = evaluate(drafter, world.target_params(), batches)
    assert measured["held_out_tau_sim"] == pytest.approx(float(tau), rel=1e-6)


def decoded_acceptance(drafter, prefixes, K):
    """Accepted tokens of the first window after each prefix, by the decoder."""
    length = np.array([len(p) for p in prefixes])
    prompt = np.zeros((len(prefixes), 40), np.int32)
    for row, tokens in zip(prompt, prefixes, strict=True):
        row[: len(tokens)] = tokens
    state = generate.prefill(
        world.target_params(), world.CONFIG, drafter, jnp.asarray(prompt), jnp.asarray(length, jnp.int32),
        jnp.asarray(length + 30, jnp.int32), jax.random.split(jax.random.key(0), len(prefixes)),
        K=K, sampling=Sampling(), L=generate.cache_length(40, 30, K),
    )  # fmt: skip
    state = generate.decode(world.target_params(), world.CONFIG, drafter, state, 1, speculation=chain(K),
        sampling=Sampling())  # fmt: skip
    histogram = np.asarray(state.histogram_BxK1)
    assert (histogram.sum(1) == 1).all()
    return histogram.argmax(1)


# The step.


def test_the_loss_falls_and_acceptance_rises_in_one_compilation():
    drafter, history, compilations = world.training()
    assert compilations <= 1  # none where another test came first
    loss = [m["loss"] for m in history]
    tau = [m["tau_sim"] for m in history]
    assert np.mean(loss[-6:]) < 0.75 * np.mean(loss[:2])
    assert np.mean(tau[-6:]) > np.mean(tau[:2]) + 0.2
    for m in history:
        assert all(np.isfinite(x).all() for x in m.values())
        assert m["loss"] == pytest.approx((m["loss_by_step"] * 0.8 ** np.arange(STEPS)).sum(), rel=1e-5)
        assert 0 < m["outside_vocabulary"] < 0.6 and m["answer_tokens"] > 0
        # a token outside the vocabulary can not be accepted
        assert m["accuracy_by_step"][0] <= 1 - m["outside_vocabulary"] + 1e-6
    kept = world.drafter().params
    assert not np.allclose(drafter.params["fc"], kept["fc"])


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    start = world.drafter()
    state, shell = TrainState.create(start.params, world.OPTIMIZER), start.spec
    poisoned = world.target_params() | {"embed": jnp.full_like(world.target_params()["embed"], jnp.nan)}
    state, _ = world.train_step(state, shell, world.target_params(), world.batches().at(0))
    before, compilations = jax.tree.map(np.array, state), supervised.train_step._cache_size()
    state, metrics = world.train_step(state, shell, poisoned, world.batches().at(1))
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == state.skipped == 1 and state.step == 2
    kept = jax.tree.map(np.array, state)
    jax.tree.map(np.testing.assert_array_equal, (kept.params, kept.opt_state), (before.params, before.opt_state))
    state, metrics = world.train_step(state, shell, world.target_params(), world.batches().at(2))
    assert np.isfinite(metrics["loss"]) and state.skipped == 1 and supervised.train_step._cache_size() == compilations
    assert not np.array_equal(state.params["fc"], kept.params["fc"])


def test_evaluation_does_not_depend_on_how_examples_are_batched():
    """Sums and denominators are added up: one batch of everything is the same as several."""
    many = [world.batches().at(i) for i in range(world.batches().steps_of_epochs(1))]
    empty = empty_batch(world.ROWS, world.ROW, world.ANCHORS)
    evaluate = functools.partial(
        supervised.evaluate,
        world.trained(),
        world.target_params(),
        config=world.CONFIG,
        K=STEPS,
        answers_are_greedy=True,
    )
    whole, with_empty = (evaluate([(batch, None) for batch in found]) for found in (many, [empty, *many[::-1]]))
    for name, value in whole.items():
        np.testing.assert_allclose(with_empty[name], value, rtol=1e-6, err_msg=name)
    assert 1 < whole["held_out_tau_sim"] < 1 + STEPS
