"""Kinds of kernels, the bytes that they move, and their least time."""

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.chips import CHIPS
from mdt_jax.planning.kernels import kernels, total

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


# As a TPU's compiler writes it: the core's memory is S(1).
ON_CHIP = """HloModule jit_f

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)
  %fast = f32[100]{0:S(1)} copy-done(%start)
  %part = ((f32[100]{0}), f32[40]{0:S(1)}, u32[]{:S(2)}) slice-start(%x)
  %cut = f32[40]{0:S(1)} slice-done(%part)
  %square = f32[100]{0:S(1)} multiply(%fast, %fast)
  %row = f32[4]{0} slice(%fast), slice={[0:4]}
  %zero = s32[] constant(0)
  %kept = f32[100]{0} dynamic-update-slice(%x, %row, %zero)
  ROOT %sum = f32[100]{0} add(%square, %kept)
}
"""


def test_arrays_in_the_memory_of_a_core_do_not_count():
  found = {kind: moved.bytes for kind, moved in kernels(ON_CHIP).items()}
  flag = 4
  assert found == {
    "copy-start": 400 + flag,
    "slice-start": 160,
    "multiply": 0,
    "slice": 16,
    "dynamic-update-slice": 2 * 16,
    "add": 2 * 400,
  }


BRANCHES = """HloModule jit_f

%update (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %y = f32[100]{0} multiply(%x, %x)
  ROOT %z = f32[100]{0} add(%y, %x)
}

%keep (w: f32[100]) -> f32[100] {
  %w = f32[100]{0} parameter(0)
  ROOT %v = f32[100]{0} copy(%w)
}

%called (b: f32[100]) -> f32[100] {
  %b = f32[100]{0} parameter(0)
  ROOT %c = f32[100]{0} call(%b), to_apply=%update
}

ENTRY %main (p: pred[], a: f32[100]) -> f32[100] {
  %p = pred[] parameter(0)
  %a = f32[100]{0} parameter(1)
  ROOT %r = f32[100]{0} conditional(%p, %a, %a), NAMES
}
"""


@pytest.mark.parametrize(
  "names",
  [
    "true_computation=%update, false_computation=%keep",
    "true_computation=%keep, false_computation=%update",
    "branch_computations={%keep, %update}",
    "branch_computations={%keep, %called}",
  ],
)
def test_the_longest_branch_counts(names):
  assert set(kernels(BRANCHES.replace("NAMES", names))) == {"multiply", "add"}


# Two kernels of one kind: a product of large matrices, and one of large vectors.
TWO_PRODUCTS = """HloModule jit_f

ENTRY %main (x: f32[8192,8192], v: f32[8192,1]) -> (f32[8192,8192], f32[8192,1]) {
  %x = f32[8192,8192]{1,0} parameter(0)
  %v = f32[8192,1]{1,0} parameter(1)
  %m = f32[8192,8192]{1,0} dot(%x, %x), lhs_contracting_dims={1}
  %w = f32[8192,1]{1,0} dot(%x, %v), lhs_contracting_dims={1}
  ROOT %t = (f32[8192,8192]{1,0}, f32[8192,1]{1,0}) tuple(%m, %w)
}
"""


def test_least_time_adds_the_longer_one_of_bytes_and_products():
  chip, n = CHIPS["h100"], 8192
  (found,) = kernels(TWO_PRODUCTS, chip).values()
  assert found.flops == 2 * n**3 + 2 * n**2
  products, memory = 2 * n**3 / chip.flops, 4 * (n**2 + 2 * n) / chip.bandwidth
  assert found.seconds == pytest.approx(products + memory)


def test_kinds_that_take_longest_come_first():
  x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
  text = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile().as_text()
  found = kernels(text, CHIPS["h100"])
  assert total(found.values()).flops == 2 * 512**3
  times = [kind.seconds for kind in found.values()]
  assert times == sorted(times, reverse=True) and times[0] > 0
