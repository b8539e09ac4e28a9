"""Counting what a compiled program does, against numbers worked out by hand."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import suites

from experiments import plan as entry
from ppow_jax import sharding
from ppow_jax.errors import UserError
from ppow_jax.mesh_shape import MeshShape
from ppow_jax.models import transformer
from ppow_jax.models.vocabulary import argmax
from ppow_jax.planning import counting, hlo, programs, published, run, tables, topology
from ppow_jax.planning.chips import CHIPS, GIB
from ppow_jax.planning.counting import Collective, Counts
from ppow_jax.planning.plan import Roofline, largest_batch, out_of_memory
from ppow_jax.planning.settings import PlanSettings

MIB = 1 << 20

# As XLA writes a program for a TPU: three layers in a loop whose length follows from its condition alone, weights that
# a fusion slices out of a stack, activations kept on the chip (S(1)), groups in all three notations.
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%sliced (stack: bf16[3,512,1024], n: s32[]) -> bf16[512,1024] {
  %stack = bf16[3,512,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,512,1024]{2,1,0} dynamic-slice(%stack, %n, %zero, %zero), dynamic_slice_sizes={1,512,1024}
  ROOT %flat = bf16[512,1024]{1,0} bitcast(%slice)
}

%product (x: bf16[256,512], stack.1: bf16[3,512,1024], n.1: s32[]) -> bf16[256,1024] {
  %x = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %stack.1 = bf16[3,512,1024]{2,1,0} parameter(1)
  %n.1 = s32[]{:T(128)S(6)} parameter(2)
  %w = bf16[512,1024]{1,0} fusion(%stack.1, %n.1), kind=kLoop, calls=%sliced
  ROOT %y = bf16[256,1024]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/dot"}
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %b = bf16[] parameter(1)
  %a = bf16[] parameter(0)
  ROOT %sum = bf16[] add(%a, %b)
}

%body (state: (s32[], bf16[256,512], bf16[3,512,1024])) -> (s32[], bf16[256,512], bf16[3,512,1024]) {
  %state = (s32[]{:T(128)}, bf16[256,512]{1,0:S(1)}, bf16[3,512,1024]{2,1,0}) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%state), index=0
  %copied = s32[]{:S(6)} copy(%i)
  %next = s32[] add(%copied, %one)
  %now = bf16[256,512]{1,0:S(1)} get-tuple-element(%state), index=1
  %all = bf16[3,512,1024]{2,1,0} get-tuple-element(%state), index=2
  %part = bf16[256,1024]{1,0} fusion(%now, %all, %copied), kind=kOutput, calls=%product
  %reduced = bf16[256,1024]{1,0} all-reduce(%part), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %half = bf16[256,512]{1,0:S(1)} slice(%reduced), slice={[0:256], [0:512]}
  ROOT %out = (s32[], bf16[256,512]{1,0:S(1)}, bf16[3,512,1024]{2,1,0}) tuple(%next, %half, %all)
}

%condition (state.1: (s32[], bf16[256,512], bf16[3,512,1024])) -> pred[] {
  %three = s32[] constant(3)
  %state.1 = (s32[], bf16[256,512]{1,0:S(1)}, bf16[3,512,1024]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (p0: bf16[256,512], p1: bf16[3,512,1024]) -> bf16[2048,512] {
  %p1 = bf16[3,512,1024]{2,1,0} parameter(1)
  %p0 = bf16[256,512]{1,0} parameter(0)
  %start = s32[] constant(0)
  %first = s32[] copy(%start)
  %inside = bf16[256,512]{1,0:S(1)} copy(%p0)
  %begin = (s32[], bf16[256,512]{1,0:S(1)}, bf16[3,512,1024]{2,1,0}) tuple(%first, %inside, %p1)
  %loop = (s32[], bf16[256,512]{1,0:S(1)}, bf16[3,512,1024]{2,1,0}) while(%begin), condition=%condition, body=%body
  %end = bf16[256,512]{1,0:S(1)} get-tuple-element(%loop), index=1
  %mine = bf16[64,512]{1,0} reduce-scatter(%end), channel_id=2, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}, to_apply=%add
  %gather-start = (bf16[64,512]{1,0}, bf16[512,512]{1,0}) all-gather-start(%mine), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %gathered = bf16[512,512]{1,0} all-gather-done(%gather-start)
}
"""  # noqa: E501


def test_a_scanned_program_is_counted_layer_by_layer():
    counts = counting.count(hlo.parse(LOOP))
    assert counts.flops == 3 * 2 * 256 * 512 * 1024
    assert counts.unknown_loops == 0
    b = 256 * 1024 * 2  # bytes of an activation that is 1024 wide
    assert counts.collectives == (
        Collective("all-gather", 8, 1, 512 * 512 * 2, 512 * 512 * 2 * 7 // 8),
        Collective("all-reduce", 2, 3, 3 * b, 3 * 2 * b // 2),
        Collective("reduce-scatter", 4, 1, 64 * 512 * 2, 64 * 512 * 2 * 3),
    )
    assert counts.sent_bytes == sum(c.sent_bytes for c in counts.collectives)
    layer = MIB + b  # one layer's weights are read, not the stack; the product is written; its input is on the chip
    layer += 2 * b + b // 2  # the message, and the half that the slice takes out of it
    outside = 256 * 512 * 2 + 2 * 64 * 512 * 2 + 2 * 64 * 512 * 2
    assert abs(counts.bytes - 3 * layer - outside) < 200  # and the loop's counter


# A gather spread over several fusions, which hand its buffers on; rows added in place; a slice fetched ahead.
SPREAD = """HloModule m, num_partitions=4

%piece (part: bf16[8,64], whole: bf16[32,64], x: f32[16,64]) -> (f32[16,64], bf16[8,64], bf16[32,64]) {
  %x = f32[16,64]{1,0:S(1)} parameter(2)
  %twice = f32[16,64]{1,0:S(1)} add(%x, %x)
  %part = bf16[8,64]{1,0} parameter(0)
  %whole = bf16[32,64]{1,0} parameter(1)
  %gathered = bf16[32,64]{1,0} all-gather(%part), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %out = (f32[16,64]{1,0:S(1)}, bf16[8,64]{1,0}, bf16[32,64]{1,0}) tuple(%twice, %part, %gathered)
}

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%rows (table: f32[1000,64], index: s32[16,1], update: f32[16,64]) -> f32[1000,64] {
  %table = f32[1000,64]{1,0} parameter(0)
  %index = s32[16,1]{1,0:S(1)} parameter(1)
  %update = f32[16,64]{1,0:S(1)} parameter(2)
  ROOT %added = f32[1000,64]{1,0} scatter(%table, %index, %update), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%region
}

ENTRY %main (p0: bf16[8,64], p1: bf16[32,64], p2: f32[16,64], p3: f32[1000,64], p4: s32[16,1]) -> f32[1000,64] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[32,64]{1,0} parameter(1)
  %p2 = f32[16,64]{1,0:S(1)} parameter(2)
  %p3 = f32[1000,64]{1,0} parameter(3)
  %p4 = s32[16,1]{1,0:S(1)} parameter(4)
  %first = (f32[16,64]{1,0:S(1)}, bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%p0, %p1, %p2), kind=kLoop, calls=%piece
  %second = (f32[16,64]{1,0:S(1)}, bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%p0, %p1, %p2), kind=kLoop, calls=%piece
  %ahead = (f32[1000,64]{1,0}, f32[10,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p3), slice={[0:10], [0:64]}
  ROOT %result = f32[1000,64]{1,0} fusion(%p3, %p4, %p2), kind=kLoop, calls=%rows
}
"""  # noqa: E501


def test_what_is_spread_is_counted_once_and_what_is_in_place_as_it_is_touched():
    counts = counting.count(hlo.parse(SPREAD))
    assert counts.collectives == (Collective("all-gather", 4, 1, 32 * 64 * 2, 24 * 64 * 2),)
    gathered, fetched, added = (8 + 32) * 64 * 2, 10 * 64 * 4, 2 * 16 * 64 * 4
    assert counts.bytes == gathered + fetched + added


def test_a_matrix_that_a_fusion_within_a_fusion_hands_on_is_read():
    """As XLA writes a product with a matrix that only changes its shape."""
    text = """HloModule m

%reshaped (w: bf16[512,256]) -> bf16[512,256,1] {
  %w = bf16[512,256]{1,0} parameter(0)
  ROOT %flat = bf16[512,256,1]{1,0,2} bitcast(%w)
}

%product (w.1: bf16[512,256], x: bf16[8,60,256]) -> f32[8,60,512] {
  %x = bf16[8,60,256]{2,1,0:S(1)} parameter(1)
  %w.1 = bf16[512,256]{1,0} parameter(0)
  %w.2 = bf16[512,256,1]{1,0,2} fusion(%w.1), kind=kLoop, calls=%reshaped
  ROOT %y = f32[8,60,512]{2,1,0} convolution(%x, %w.2), window={size=1}, dim_labels=0bf_oi0->0bf
}

ENTRY %main (p0: bf16[512,256], p1: bf16[8,60,256]) -> f32[8,60,512] {
  %p0 = bf16[512,256]{1,0} parameter(0)
  %p1 = bf16[8,60,256]{2,1,0:S(1)} parameter(1)
  ROOT %result = f32[8,60,512]{2,1,0:S(1)} fusion(%p0, %p1), kind=kOutput, calls=%product
}
"""
    assert counting.count(hlo.parse(text)).bytes == 512 * 256 * 2


def test_a_loop_that_waits_counts_once_or_as_often_as_is_assumed():
    waiting = LOOP.replace("%less = pred[] compare(%i.1, %three), direction=LT", "%less = pred[] is-finite(%i.1)")
    waiting = waiting.replace("body=%body", 'body=%body, metadata={op_name="jit(f)/experts/while"}')
    module = hlo.parse(waiting)
    once, often = counting.count(module), counting.count(module, lambda loop: 2.5 if "experts" in loop.scopes else None)
    assert once.unknown_loops == 1
    assert once.flops == 2 * 256 * 512 * 1024
    assert often.flops == 2.5 * once.flops


def test_a_long_chain_of_fusions_in_a_condition_is_followed_once():
    """Each fusion names the one before twice: asked for anew each time, 80 of them would never end."""
    chain = "\n".join(
        f"  %f.{n} = s32[] fusion(%f.{n - 1}, %f.{n - 1}), kind=kLoop, calls=%larger" for n in range(1, 81)
    )
    larger = """
%larger (a.9: s32[], b.9: s32[]) -> s32[] {
  %a.9 = s32[] parameter(0)
  %b.9 = s32[] parameter(1)
  ROOT %most = s32[] maximum(%a.9, %b.9)
}

%condition"""
    three = "  %three = s32[] constant(3)"
    assert LOOP.count(three) == 1 and "compare(%i.1, %three)" in LOOP  # else nothing is replaced
    text = LOOP.replace("\n%condition", larger).replace(three, three.replace("%three", "%f.0") + "\n" + chain)
    text = text.replace("compare(%i.1, %three)", "compare(%i.1, %f.80)")
    assert counting.count(hlo.parse(text)).flops == counting.count(hlo.parse(LOOP)).flops


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("%y = f32[4,64,32]{2,1,0} dot(%l, %r), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0},"
         " rhs_contracting_dims={1}", 2 * 4 * 64 * 128 * 32),
        # A batch of 4 products as one convolution: the window meets one value per batch entry, padding elsewhere.
        ("%y = f32[4,64,32]{2,1,0} convolution(%l, %r), window={size=4 stride=3 pad=0_0 lhs_dilate=4},"
         " dim_labels=0bf_0io->0bf", 2 * 4 * 64 * 128 * 32),
    ],
    ids=["dot", "convolution"],
)  # fmt: skip
def test_batched_products(line, flops):
    text = f"""HloModule m

ENTRY %main (l: f32[4,64,128], r: f32[4,128,32]) -> f32[4,64,32] {{
  %l = f32[4,64,128]{{2,1,0}} parameter(0)
  %r = f32[4,128,32]{{2,1,0}} parameter(1)
  ROOT {line}
}}
"""
    assert counting.count(hlo.parse(text)).flops == flops


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("{}", 6),
        ("[2,3]<=[3,2]T(1,0)", 3),
        ("mesh['a'=3,'b'=2] {'b'}", 2),
        ("mesh['a'=3,'b'=2], device_ids=([3,2]T(1,0)) {'a','b'}", 6),
        ("mesh['a'=6] {'a':(1)2}", 2),
    ],
)
def test_devices_of_a_group(groups, size):
    text = f"""HloModule m, num_partitions=6

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert counting.count(hlo.parse(text)).collectives[0].group == size


def test_no_hlo_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.parse("nothing")


def test_the_count_agrees_with_xla_where_there_is_no_loop_and_multiplies_where_there_is():
    """Layers written out, XLA's own analysis is right; scanned over, it counts one of them."""
    N, layers = 64, 5
    w, x = jnp.ones((layers, N, N)), jnp.ones((8, N))
    apart = jax.jit(lambda w, x: [x := x @ w[n] for n in range(layers)][-1]).lower(w, x).compile()
    together = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]).lower(w, x).compile()
    expected = layers * 2 * 8 * N * N
    assert abs(apart.cost_analysis()["flops"] / expected - 1) < 0.05
    assert counting.count(hlo.parse(apart.as_text())).flops == expected
    assert counting.count(hlo.parse(together.as_text())).flops == expected


def test_a_mixtures_loop_takes_a_block_per_expert_that_is_touched():
    """64 tokens of 8 experts each are 512 pairs over 128 experts: 125.7 of them are touched, a block of 8 rows each."""
    config = published.read("qwen3-30b-a3b")
    loop = """%loop = (s32[], f32[64,2048]{1,0}, bf16[48,128,768,2048]{3,2,1,0}) while(%begin), condition=%c, body=%b,
 metadata={op_name="jit(f)/while/body/experts/while"}""".replace("\n", "")
    text = f"HloModule m\n\nENTRY %main (begin: (s32[])) -> (s32[]) {{\n  ROOT {loop}\n}}\n"
    instruction = hlo.parse(text).computations["main"].root
    assert instruction.scopes == "jit(f)/while/body/experts/while"
    assert programs.expert_rounds(config)(instruction) == pytest.approx(128 * (1 - (127 / 128) ** 512))
    assert programs.expert_rounds(published.read("qwen3-8b"))(instruction) is None


def test_roofline_by_hand():
    """A v5e: 197 TFLOP/s, 819 GB/s, two links of 50 GB/s along an axis."""
    counts = Counts(197e9, 819e6, (Collective("all-reduce", 4, 1, 0, 300_000_000),), 0)
    roofline = Roofline.of(counts, CHIPS["v5e"])
    assert roofline == Roofline(pytest.approx(1e-3), pytest.approx(1e-3), pytest.approx(3e-3))
    assert roofline.seconds == pytest.approx(3e-3)
    assert roofline.limit == "network"
    assert CHIPS["v5e"].intensity == pytest.approx(240.5, abs=0.1)
    assert CHIPS["v4"].share(2).memory == 16 * GIB


def test_largest_batch_leaves_the_fixed_part_alone():
    chip = CHIPS["v5e"]  # 16 GiB, 98 % of it usable: 15.68
    assert largest_batch(used=8 * GIB, fixed=4 * GIB, batch=8, parts=4, chip=chip) == 20  # 11.68 GiB of 0.5 a row: 23
    assert largest_batch(used=20 * GIB, fixed=18 * GIB, batch=8, parts=4, chip=chip) == 0


def test_out_of_memory_is_read_from_xlas_complaint():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.7G"
    assert out_of_memory(message) == int(20.5 * GIB)
    assert out_of_memory("INTERNAL: something else") is None


def test_published_configs_are_read():
    sizes = {name: published.read(name) for name in published.names()}
    assert {"llama-3.1-8b", "llama-3.3-70b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b"} <= sizes.keys()
    assert sizes["llama-3.3-70b"].num_layers == 80
    with pytest.raises(UserError, match="--target=llama-9: neither"):
        published.read("llama-9")


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:4", "v5e:4x", "cpu"])
def test_a_topology_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=f"--topology={name}: must be"):
        topology.find(name)


def test_measurements_that_differ_are_no_peaks():
    assert topology.uncertainty([1.0, 1.1, 3.0, 9.0]) == 0.0  # the fastest agree; slow ones are disturbances
    assert topology.uncertainty([1.0, 1.5, 1.6, 1.7]) == pytest.approx(0.5)
    assert topology.uncertainty([1.0, *[1.05] * 9, *[4.0] * 30]) == 0.0


def test_runs_are_repeated_for_long_enough():
    found = topology.times(lambda x: x, jnp.ones(1), at_least=5, seconds=0.001)
    assert len(found) >= 5 and sum(found) >= 0.001


def test_a_batch_that_the_mesh_does_not_cut_is_refused():
    with pytest.raises(UserError, match="--mesh=data:2,fsdp:1,tensor:1,expert:1: takes 2 devices"):
        run.plan(settings("supervised", mesh="data:2"))


def settings(program: str, **more):
    small = dict(target="tiny", batch_size=2, row_length=64, max_anchors=32, draft_vocab_size=64, ttt_steps=2)
    small |= dict(window=3, group=2, windows=2, prompt_tokens=16, new_tokens=16, tree_branch=3, tree_depth=2)
    return PlanSettings(program=program, tree_nodes=8, gamma=0.1, **small | more)


@pytest.mark.parametrize("program", suites.keep(["decode"], ["supervised", "ppow", "decode"]))
def test_a_plan_for_this_machine(program, tmp_path, capsys):
    """End to end on the tiny target: the real programs are compiled from shapes and counted."""
    output = tmp_path / "plan.json"
    entry.main(settings(program, output=str(output)))
    result = json.loads(output.read_text())
    assert result["fits"] is True
    kinds = result["hbm_used_bytes_by_kind"]
    assert sum(kinds.values()) == result["hbm_used_bytes"] < result["hbm_per_device_bytes"]
    assert kinds["target"] > 7 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # seven layers in bfloat16
    assert result["step_seconds_roofline"] == max(result[f"{k}_seconds"] for k in ("compute", "memory", "network"))
    assert result["collective_bytes"] == 0
    rows = {"supervised": 2 * 64, "ppow": 2 * 64, "decode": 2 * 9}[program]  # tokens that every layer sees
    assert result["flops"] > 7 * 2 * rows * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    printed = capsys.readouterr().out
    assert "not a measurement" in printed and "peaks measured on this machine" in printed
    assert re.search(r"Peaks of the chip: [\d.e+]+ TFLOP/s, [\d.e+]+ GB/s \(measured on this machine", printed)
    assert f"limited by {result['limited_by']}" in printed


def test_plans_side_by_side(tmp_path, capsys):
    plan = dict(target="t", program="ppow", topology="v5e:2x4", mesh="data:4,fsdp:1,tensor:2,expert:1", batch_size=8)
    plan |= dict(fits=True, hbm_used_bytes=4 * GIB, hbm_per_device_bytes=16 * GIB, step_seconds_roofline=0.25)
    plan |= dict(flops=2.5e12, bytes_accessed=GIB, collective_bytes=GIB // 4, limited_by="compute")
    larger = plan | dict(devices=64, collective_bytes=GIB // 2)
    too_large = plan | dict(devices=4, fits=False, flops=None, step_seconds_roofline=None, collective_bytes=None)
    for n, one in enumerate((plan | dict(devices=8), larger, too_large)):
        (tmp_path / f"{n}.json").write_text(json.dumps(one))
    paths = tuple(str(tmp_path / f"{n}.json") for n in range(3))
    entry.main(PlanSettings(compare=paths, plot=str(tmp_path / "scaling.png")))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[2][3:] == ["data:4,tensor:2", "8", "yes", "4.0 of 16", "2.5", "1", "0.25", "250", "compute"]
    assert cells[4][5:8] == ["no", "4.0 of 16", ""]
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    (tmp_path / "0.json").write_text("[]")
    with pytest.raises(UserError, match="0.json: is not a plan, it lacks target"):
        entry.main(PlanSettings(compare=paths))


def test_the_published_plans_are_those_of_the_committed_file():
    """docs/plans.md, old -> new in every cell of a row that was made again; a plan is published only if it fits."""
    root = Path(__file__).parents[1] / "docs"
    plans = json.loads((root / "runs" / "2026-11-30-plans.json").read_text())["plans"]
    rows = [line.strip("| ").split(" | ") for line in (root / "plans.md").read_text().splitlines() if " → " in line]
    shown = {(r[0].lower(), r[1], r[2]): r for r in rows if len(r) == 11}
    names = {"supervised": "stage 1", "ppow": "PPOW", "decode": "decoding"}
    assert len(shown) == len(plans) >= 1
    for plan in plans:
        assert plan["fits"]
        row = shown[plan["target"], f"{plan['topology']}, {tables.short(plan['mesh'])}", names[plan["program"]]]
        milliseconds = [f"{1e3 * plan[f'{kind}_seconds']:.3g}" for kind in ("compute", "memory", "network")]
        assert [cell.split(" → ")[-1] for cell in row[3:]] == [
            str(plan["batch_size"]),
            f"{plan['hbm_used_bytes'] / GIB:.1f} of {plan['hbm_per_device_bytes'] // GIB}",
            f"{plan['flops'] / 1e12:.3g}",
            f"{plan['bytes_accessed'] / GIB:.3g}",
            f"{plan['collective_bytes'] / GIB:.3g}",
            " / ".join(milliseconds),
            str(plan["largest_batch_estimate"]),
            f"{float(format(plan['tokens_per_second_roofline'], '.3g')):,.0f}",
        ]


@pytest.mark.parametrize(("limit", "expected"), [(11, 8), (100, 24), (20, 20), (4, 4)])
def test_the_search_for_the_largest_batch_only_reports_what_compiled(limit, expected):
    """From 4 rows that fit and an estimate of 16, in parts of 4 rows."""
    result = {"fits": True, "largest_batch_estimate": 16}
    tried = []
    assert run.search(result, 4, 4, lambda n: tried.append(n) or n <= limit) == expected
    assert len(tried) <= 3


@pytest.fixture
def libtpu():
    """Skips where it is missing. What it compiles for chips that are not there cannot be kept in JAX's cache."""
    pytest.importorskip("libtpu")
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.usefixtures("libtpu")
def test_a_tpu_that_is_not_there():
    """One layer's product on a slice of eight: memory, sharding and messages come from the compiler for TPUs."""
    devices, chip = topology.find("v5e:2x4")
    assert len(devices) == 8 and chip is CHIPS["v5e"]
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2, devices=devices)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("y")))
    compiled = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, PartitionSpec("x"))).lower(x, w).compile()
    counts = counting.count(hlo.parse(compiled.as_text()))
    assert counts.flops == 2 * 256 * 256 * 256
    assert sum(c.sent_bytes for c in counts.collectives if c.kind == "all-reduce") in (256 * 256 * 2, 256 * 256 * 4)


@pytest.mark.usefixtures("libtpu")
def test_a_tpu_gathers_logits_and_not_the_head():
    """Asked for whole logits at once, the compiler sends the head, [32000, 512], to every device."""
    devices, _ = topology.find("v5e:2x4")
    mesh = sharding.make_mesh(MeshShape(data=2, tensor=4), devices)
    params = sharding.abstract({"embed": jax.ShapeDtypeStruct((32000, 512), jnp.bfloat16)}, mesh)
    states = sharding.abstract({"hidden_BxSxD": jax.ShapeDtypeStruct((8, 60, 512), jnp.float32)}, mesh)
    with sharding.use(mesh):
        compiled = jax.jit(transformer.logits).lower(params, states["hidden_BxSxD"]).compile()
        greedy = jax.jit(lambda *x: argmax(transformer.logits(*x, whole=False)))
        greedy = greedy.lower(params, states["hidden_BxSxD"]).compile()
    (gathered,) = [i for _, i, _ in hlo.parse(compiled.as_text()).executed() if i.opcode.startswith("all-gather")]
    assert [shape.dims for shape in gathered.shapes][-1] == (4, 60, 32000)
    sent = [shape.size for _, i, _ in hlo.parse(greedy.as_text()).executed() for shape in i.shapes
            if i.opcode.startswith(counting.COLLECTIVES)]  # fmt: skip
    assert sent and max(sent) == 4 * 60  # a maximum and an index for each token
