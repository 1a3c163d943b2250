"""Kinds of kernels, and the bytes that they move."""

import jax
import jax.numpy as jnp

from mdt_jax.planning.kernels import kernels

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
  found = {kind: (moved.calls, moved.bytes) for kind, moved in kernels(KERNELS).items()}
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
  moved = sum(kind.bytes for kind in kernels(text).values())
  assert 2 * 4 * 64**2 <= moved <= 8 * 4 * 64**2
