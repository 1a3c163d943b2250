"""FLOPs of the matrix products of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from mdt_jax.planning.kernels import kernels

# B = 2 images, L = 16 tokens, H = 4 heads of 8.
ATTENTION = """HloModule jit_f

ENTRY %main (q: bf16[2,16,4,8]) -> bf16[2,4,16,8] {
  %q = bf16[2,16,4,8]{3,2,1,0} parameter(0)
  ROOT %out = (bf16[2,4,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), TARGET
}
"""
PRODUCT = 2 * 2 * 4 * 16 * 16 * 8  # of one matrix product of ATTENTION

# A product of 3 matrices 5x7 with 3 of 7x2, as XLA for TPUs writes it.
BATCHED = """HloModule jit_f

%inside (a: f32[3,5,7], b: f32[3,7,2]) -> f32[3,5,2] {
  %a = f32[3,5,7]{2,1,0} parameter(0)
  %b = f32[3,7,2]{2,1,0} parameter(1)
  ROOT %c = f32[3,5,2]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}

ENTRY %main (x: f32[3,5,7], y: f32[3,7,2]) -> f32[3,5,2] {
  %x = f32[3,5,7]{2,1,0} parameter(0)
  %y = f32[3,7,2]{2,1,0} parameter(1)
  ROOT %z = f32[3,5,2]{2,1,0} fusion(%x, %y), kind=kOutput, calls=%inside
}
"""
HOLES = "window={size=3 stride=2 lhs_dilate=3}"


def flops_of(text):
  return sum(kind.flops for kind in kernels(text).values())


def compiled(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_product_of_a_compiled_program():
  text = compiled(lambda x, y: jnp.tanh(x @ y), (64, 32), (32, 16))
  assert flops_of(text) == 2 * 64 * 32 * 16


def test_convolution_counts_no_padding():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", (1,), (1,))

  text = compiled(convolve, (2, 3, 9), (4, 3, 5))
  # Outputs at 0, 2, … 8 see 3, 5, 5, 5 and 3 of the 9 inputs.
  assert flops_of(text) == 2 * 2 * 4 * 3 * (3 + 5 + 5 + 5 + 3)


def test_batch_written_as_an_axis_with_holes():
  assert flops_of(BATCHED.replace("WINDOW", HOLES)) == 3 * 2 * 5 * 7 * 2


@pytest.mark.parametrize(
  ("target", "products"),
  [
    ('custom_call_target="__cudnn$fmhaSoftmax"', 2),
    ('custom_call_target="__cudnn$fmhaScaleBiasSoftmax"', 2),
    ('custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"', 5),
    ('custom_call_target="other"', 0),
  ],
)
def test_attention_of_cudnn(target, products):
  assert flops_of(ATTENTION.replace("TARGET", target)) == products * PRODUCT


def test_kernel_with_a_cost_estimate():
  cost = '"cost_estimate":{"flops":"77","transcendentals":"3"}'
  call = f'custom_call_target="tpu_custom_call", backend_config={{{cost}}}'
  assert flops_of(ATTENTION.replace("TARGET", call)) == 77


def test_product_of_cublas():
  call = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["3"],'
    '"rhs_contracting_dimensions":["3"],"lhs_batch_dimensions":[]}}}'
  )
  result = 2 * 4 * 16 * 8
  assert flops_of(ATTENTION.replace("TARGET", call)) == 2 * result * 8
