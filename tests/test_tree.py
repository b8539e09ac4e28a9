"""Draft trees: their shape, what the drafter says of them, and the acceptance by one draw per node."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world as world
from enumerated_trees import ROUND, V, emitted_law, tree_of

from ppow_jax.errors import UserError
from ppow_jax.models import drafter as drafting
from ppow_jax.models.drafter import Prefix
from ppow_jax.objectives import supervised
from ppow_jax.speculation.tree import (
    ABSENT,
    TreeShape,
    ancestors,
    compact,
    draft_candidates,
    follow,
    propose_tree,
)


def walk(tokens, parents, drawn) -> list[int]:
    """The tokens that a round emits, by a plain loop."""
    at, out = 0, []
    while True:
        out.append(int(drawn[at]))
        below = [n + 1 for n, p in enumerate(parents) if p == at and tokens[n] == drawn[at]]
        if not below:
            return out
        at = below[0]


def random_tree(rng, N: int, V: int) -> tuple[list[int], list[int]]:
    """Parents first, siblings distinct."""
    tokens, parents = [], []
    while len(tokens) < N:
        parent, token = int(rng.integers(0, len(tokens) + 1)), int(rng.integers(0, V))
        if all(p != parent or t != token for t, p in zip(tokens, parents, strict=True)):
            tokens.append(token), parents.append(parent)
    return tokens, parents


def test_accepting_follows_the_drawn_tokens():
    rng = np.random.default_rng(0)
    N, V = 7, 3
    lengths = set()
    for _ in range(60):
        tokens, parents = random_tree(rng, N, V)
        wanted = rng.integers(0, V, N + 1)
        drawn = [tokens[n] == wanted[parents[n]] for n in range(N)]
        path = follow(tree_of(tokens, parents), jnp.asarray([drawn]), depth=N)
        emitted = walk(tokens, parents, wanted)
        accepted = int(path.accepted_B[0])
        assert accepted == len(emitted) - 1
        index = np.asarray(path.index_BxD1[0])
        assert index[0] == 0 and (index[accepted:] == index[accepted]).all()
        assert [tokens[i - 1] for i in index[1 : accepted + 1]] == emitted[:-1]
        lengths.add(accepted)
    assert {0, 1, 2} <= lengths


def test_ancestors():
    parents = [0, 0, 1, 3, 2, 4]
    seen = np.asarray(ancestors(jnp.asarray([parents]), 4)[0])
    for i in range(7):
        above, at = {i}, i
        while at:
            at = parents[at - 1]
            above.add(at)
        assert set(np.flatnonzero(seen[i])) == above


BIASED = ["the same number for all depths", "drawn again after a miss"]


@pytest.mark.parametrize("seed", range(4))
def test_the_emitted_law_is_the_targets(seed):
    rng = np.random.default_rng(seed)
    table = {}

    def p_of(prefix):
        return table.setdefault(prefix, rng.dirichlet(np.ones(V) * 0.7))

    tokens, parents = random_tree(rng, 5, V)
    want = np.zeros((V,) * ROUND)
    for text in np.ndindex(*want.shape):
        want[text] = np.prod([p_of(text[:i])[text[i]] for i in range(ROUND)])
    with jax.enable_x64(True):
        assert np.abs(emitted_law(tokens, parents, p_of) - want).max() < 1e-9
        for bias in BIASED:
            assert np.abs(emitted_law(tokens, parents, p_of, bias) - want).max() > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_absent_places_change_nothing(seed):
    rng = np.random.default_rng(seed)
    tokens, parents = random_tree(rng, 4, V)
    table = {}

    def p_of(prefix):
        return table.setdefault(prefix, rng.dirichlet(np.ones(V) * 0.7))

    with jax.enable_x64(True):
        alone = emitted_law(tokens, parents, p_of)
        beside = emitted_law(tokens + [0, 1], parents + [ABSENT, ABSENT], p_of)
    assert np.abs(beside - alone).max() < 1e-9


SHAPE = TreeShape(branch=3, depth=4, nodes=14)


@pytest.fixture(scope="module")
def anchored():
    """Everything that `propose_tree` takes, for one anchor of each row of the small world's batch."""
    drafter = world.drafter()
    windows = world.scored_batch(drafter.target_ids_W, world.batch()).windows
    embed = world.target_params()["embed"]
    g_BxTxE, kv = supervised.prefix(drafter, embed, windows)
    anchor_Bx1 = windows.anchor_BxM[:, 4:5]
    root_Bx1 = jnp.take_along_axis(windows.tokens_BxT, anchor_Bx1 + 1, 1)
    g_Bx1xE = jnp.take_along_axis(g_BxTxE, anchor_Bx1[..., None], 1)
    position_Bx1 = jnp.take_along_axis(windows.position_BxT, anchor_Bx1, 1)
    prefix = [Prefix(kv, supervised.anchor_mask(windows, anchor_Bx1))]
    return drafter, embed, g_Bx1xE, root_Bx1, position_Bx1, prefix


@pytest.fixture(scope="module")
def tree(anchored):
    return jax.jit(lambda g, root: propose_tree(*anchored[:2], g, root, *anchored[4:], SHAPE))(*anchored[2:4])


def test_a_tree_hangs_together(tree):
    parent_BxN, token_BxN = np.asarray(tree.parent_BxN), np.asarray(tree.token_BxN)
    assert parent_BxN.shape == (world.ROWS, SHAPE.nodes)
    assert (parent_BxN <= np.arange(SHAPE.nodes)).all()  # parents first
    depth_BxN1 = np.asarray(tree.depth_BxN1)
    assert (depth_BxN1[:, 0] == 0).all() and depth_BxN1.max() <= SHAPE.depth
    for b in range(world.ROWS):
        assert (depth_BxN1[b, 1:] == depth_BxN1[b, parent_BxN[b]] + 1).all()
        assert len(set(zip(parent_BxN[b], token_BxN[b], strict=True))) == SHAPE.nodes  # siblings differ


def test_each_nodes_probability_is_the_drafters(tree, anchored):
    """Every path, drafted again on its own as a chain of known tokens."""
    drafter, embed, g_Bx1xE, root_Bx1, position_Bx1, prefix = anchored
    id_of = {int(t): i for i, t in enumerate(drafter.target_ids_W)}

    @jax.jit
    def steps(path_BxS):
        chain, g, laws = (), g_Bx1xE, []
        for s in range(path_BxS.shape[1]):
            x = embed[path_BxS[:, s : s + 1]].astype(jnp.float32)
            out, chain = drafting.step(drafter, g, x, position_Bx1 + s, prefix, chain, first=s == 0)
            g = drafting.feed(drafter, out)
            laws.append(jax.nn.log_softmax(drafting.logits(drafter, out))[:, 0])
        return jnp.stack(laws, 1)

    tokens, seen = np.asarray(tree.token_BxN), np.asarray(tree.seen_BxN1xN1)
    depths = set()
    for n in range(SHAPE.nodes):
        for b in range(world.ROWS):
            path = tokens[b][np.flatnonzero(seen[b, n + 1])[1:] - 1]  # root's child first
            padded = np.zeros((world.ROWS, SHAPE.depth), np.int32)
            padded[b] = ([int(root_Bx1[b, 0]), *path] + [0] * SHAPE.depth)[: SHAPE.depth]
            laws = np.asarray(steps(jnp.asarray(padded)))[b]
            want = sum(laws[s, id_of[int(t)]] for s, t in enumerate(path))
            assert abs(want - float(tree.logp_BxN[b, n])) < 1e-4
            depths.add(len(path))
    assert max(depths) >= 3


def test_the_first_level_is_the_drafters_best(tree, anchored):
    """With room for all it drafts, a tree of one level is the top of the first step."""
    drafter, embed, *rest = anchored
    level = propose_tree(drafter, embed, *rest, TreeShape(branch=5, depth=1, nodes=5))
    out, _ = drafting.step(drafter, rest[0], embed[rest[1]].astype(jnp.float32), rest[2], rest[3])
    best = np.argsort(-np.asarray(drafting.logits(drafter, out))[:, 0], axis=1)[:, :5]
    assert (np.asarray(level.token_BxN) == np.asarray(drafter.target_ids_W)[best]).all()


def test_rows_end_their_trees_on_their_own(anchored, tree):
    """Row 0 drafts two levels, row 1 all; row 0 keeps five nodes, row 1 all: each as if it were alone."""
    keep_B = jnp.array([5, SHAPE.nodes])

    def go_on(level, logp_BxX):
        return jnp.array([level < 2, True])

    cut = propose_tree(*anchored, SHAPE, go_on, lambda logp_BxN: keep_B)
    assert cut.count_B.tolist() == [5, SHAPE.nodes] and cut.steps_B.tolist() == [2, SHAPE.depth]
    for found, whole in zip(cut[:-1], tree[:-1], strict=True):
        np.testing.assert_allclose(found[1], whole[1], rtol=1e-5)
    shallow = propose_tree(*anchored, TreeShape(SHAPE.branch, 2, 5))
    for found, whole in zip(cut.cut(5)[:-1], shallow[:-1], strict=True):
        np.testing.assert_allclose(found[0], whole[0], rtol=1e-5)
    assert (cut.parent_BxN[0, 5:] == ABSENT).all()


def test_nothing_is_drafted_where_no_row_goes_on(anchored):
    keep_B, none_B = jnp.array([3, 3]), jnp.zeros(world.ROWS, bool)
    none = propose_tree(*anchored, SHAPE, lambda level, _: none_B, lambda logp_BxN: keep_B)
    assert none.count_B.tolist() == none.steps_B.tolist() == [0, 0]


def test_trees_of_many_roots_are_those_of_each(anchored):
    """Three roots per row, of which `anchored` is the second."""
    drafter, embed, *one = anchored
    windows = world.scored_batch(drafter.target_ids_W, world.batch()).windows
    g_BxTxE, _ = supervised.prefix(drafter, embed, windows)
    anchor_BxR = windows.anchor_BxM[:, 3:6]
    g_BxRxE, root_BxR, position_BxR = (
        jnp.take_along_axis(x, index, 1)
        for x, index in (
            (g_BxTxE, anchor_BxR[..., None]), (windows.tokens_BxT, anchor_BxR + 1), (windows.position_BxT, anchor_BxR)
        )
    )  # fmt: skip
    prefix = [Prefix(one[3][0].kv, supervised.anchor_mask(windows, anchor_BxR))]
    three = jax.jit(lambda *x: draft_candidates(drafter, embed, *x, SHAPE))(g_BxRxE, root_BxR, position_BxR, prefix)
    single = draft_candidates(drafter, embed, *one, SHAPE)
    assert three.logp_BxC.shape == (world.ROWS * 3, SHAPE.candidates)
    for found, wanted in zip(three, single, strict=True):
        np.testing.assert_allclose(found.reshape(world.ROWS, 3, *found.shape[1:])[:, 1], wanted, rtol=1e-4)


def test_compaction_keeps_the_path_in_order():
    rng = np.random.default_rng(0)
    kv = world.scored_batch(world.drafter().target_ids_W, world.batch()).kv[0]
    index = jnp.asarray(rng.integers(0, 20, (world.ROWS, 4)))
    kept = compact(kv, index)
    for b in range(world.ROWS):
        assert (kept.k_BxKvxdxL[b] == kv.k_BxKvxdxL[b][..., index[b]]).all()
        assert (kept.v_BxKvxLxd[b] == kv.v_BxKvxLxd[b][:, index[b]]).all()


@pytest.mark.parametrize(
    ("shape", "named"),
    [((0, 2, 1), "tree_branch=0"), ((2, 0, 1), "tree_depth=0"), ((2, 2, 7), "1 to 6"), ((2, 2, 0), "tree_nodes=0")],
)
def test_impossible_shapes_are_refused(shape, named):
    with pytest.raises(UserError, match=named):
        TreeShape(*shape)
