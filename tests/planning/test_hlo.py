"""Calls and bytes of collectives and kernels, from the text of an HLO module."""

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.planning import hlo

# A loop with 5 iterations and an all-gather, as XLA prints it for CPUs and GPUs. The
# entry computation has the other collectives, with every form of replica groups.
LOOP = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond (p: (s32[], f32[2,3])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[2,3]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%inside (q: f32[2,3]) -> f32[4,3] {
  %q = f32[2,3]{1,0} parameter(0)
  ROOT %g = bf16[4,3]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1},{2,3}}
}

%body (p.1: (s32[], f32[2,3])) -> (s32[], f32[2,3]) {
  %p.1 = (s32[], f32[2,3]{1,0}) parameter(0)
  %x = f32[2,3]{1,0} get-tuple-element(%p.1), index=1
  %start = bf16[4,3]{1,0} fusion(%x), kind=kCustom, calls=%inside
  ROOT %t = (s32[], f32[2,3]{1,0}) tuple(%x)
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  %r = (f32[8]{0}, f32[2]{0}) all-reduce(%w, %w), channel_id=2, REDUCE, to_apply=%add
  %s = f32[2]{0} reduce-scatter(%w), channel_id=3, replica_groups=[2,4]<=[8]
  %c = f32[8]{0} collective-permute(%w), channel_id=4, source_target_pairs={{0,1}}
  %gs = (f32[4], f32[8]) all-gather-start(%w), channel_id=5, replica_groups={{0,1}}
  %gd = f32[8]{0} all-gather-done(%gs)
  ROOT %loop = (s32[], f32[2,3]{1,0}) while(%c), condition=%cond, body=%bodyTRIPS
}
"""


def module(trips="", reduce="replica_groups=mesh['a'=2,'b'=4] {'b'}"):
  return LOOP.replace("TRIPS", trips).replace("REDUCE", reduce)


def test_collective_in_a_loop_counts_once_per_iteration():
  found = hlo.collectives(module(), 8)["all-gather"]
  # Each iteration sends half of 4 x 3 bfloat16. The first call sends half of 8 float32.
  assert (found.calls, found.sent) == (5 + 1, 5 * 12 + 16)


def test_known_trip_count_of_xla_is_used():
  trips = ', backend_config={"known_trip_count":{"n":"7"}}'
  assert hlo.collectives(module(trips), 8)["all-gather"].calls == 7 + 1


def test_sent_bytes_match_ring_algorithms():
  found = hlo.collectives(module(), 8)
  assert found["all-reduce"].sent == pytest.approx(2 * 3 / 4 * 40)
  assert found["reduce-scatter"].sent == pytest.approx(3 / 4 * 4 * 8)
  assert found["collective-permute"].sent == 32
  assert "all-to-all" not in found


def test_empty_replica_groups_mean_all_devices():
  found = hlo.collectives(module(reduce="replica_groups={}"), 8)
  assert found["all-reduce"].sent == pytest.approx(2 * 7 / 8 * 40)


def test_one_collective_in_several_fusions_counts_once():
  again = module().replace("fusion(%x)", "fusion(%x), calls=%inside", 1)
  assert again != module()
  assert hlo.collectives(again, 8)["all-gather"].calls <= 2 * 5 + 1
  twice = module().replace(
    "ROOT %g =",
    "%g2 = bf16[4,3]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1}}\n"
    "  ROOT %g =",
  )
  assert hlo.collectives(twice, 8)["all-gather"].calls == 5 + 1


# A loop of 5 turns: each reads one row of a stack, and writes one row of another.
KERNELS = """HloModule jit_f

%take (stack: f32[5,64], i: s32[]) -> f32[64] {
  %stack = f32[5,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,64]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %row = f32[64]{0} bitcast(%cut)
}

%put (stack.1: f32[5,64], row.1: f32[64], i.1: s32[]) -> f32[5,64] {
  %stack.1 = f32[5,64]{1,0} parameter(0)
  %row.1 = f32[64]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %as_row = f32[1,64]{1,0} bitcast(%row.1)
  ROOT %new = f32[5,64]{1,0} dynamic-update-slice(%stack.1, %as_row, %i.1, %zero.1)
}

%cond (p: (s32[], f32[5,64], f32[5,64])) -> pred[] {
  %five = s32[] constant(5)
  %p = (s32[], f32[5,64]{1,0}, f32[5,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%j, %five), direction=LT
}

%body (q: (s32[], f32[5,64], f32[5,64])) -> (s32[], f32[5,64], f32[5,64]) {
  %q = (s32[], f32[5,64]{1,0}, f32[5,64]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %in = f32[5,64]{1,0} get-tuple-element(%q), index=1
  %out = f32[5,64]{1,0} get-tuple-element(%q), index=2
  %slice_fusion.3 = f32[64]{0} fusion(%in, %k), kind=kLoop, calls=%take
  %gemm.1 = f32[64]{0} custom-call(%slice_fusion.3), custom_call_target="cublas"
  %put_fusion.7 = f32[5,64]{1,0} fusion(%out, %gemm.1, %k), kind=kLoop, calls=%put
  ROOT %t = (s32[], f32[5,64], f32[5,64]) tuple(%k, %in, %put_fusion.7)
}

ENTRY %main (x: f32[5,64]) -> f32[5,64] {
  %x = f32[5,64]{1,0} parameter(0)
  %z = s32[] constant(0)
  %y = f32[5,64]{1,0} copy(%x)
  %init = (s32[], f32[5,64]{1,0}, f32[5,64]{1,0}) tuple(%z, %x, %y)
  %loop = (s32[], f32[5,64], f32[5,64]) while(%init), condition=%cond, body=%body
  ROOT %result = f32[5,64]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_kernels_count_the_parts_of_stacks_that_they_touch():
  row, index, stack = 4 * 64, 4, 4 * 5 * 64
  found = {
    kind: (moved.calls, moved.bytes) for kind, moved in hlo.kernels(KERNELS).items()
  }
  assert found == {
    "copy": (1, 2 * stack),
    "slice_fusion": (5, 5 * (row + index + row)),
    "cublas": (5, 5 * 2 * row),
    "put_fusion": (5, 5 * (row + index + row)),
  }
  sizes = [size for _, size in found.values()]
  assert sizes == sorted(sizes, reverse=True)


def test_kernels_of_a_compiled_program_move_at_least_its_arrays():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  text = jax.jit(lambda x: jnp.tanh(x @ x) + 1).lower(x).compile().as_text()
  moved = sum(kind.bytes for kind in hlo.kernels(text).values())
  assert 2 * 4 * 64**2 <= moved <= 8 * 4 * 64**2
