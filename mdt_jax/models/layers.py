"""Layers that networks share: linear, LayerNorm, GELU, and stacks of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.models.partitioning import gather_kernel, parameter_axes
from mdt_jax.types import Array, Dtype

# Linear layers of the released code: Xavier uniform kernels, zero biases.
linear_init = nn.initializers.xavier_uniform()
normal_init = nn.initializers.normal(0.02)

# What the backward pass finds in memory; it recomputes the other activations.
REMAT_POLICIES = {
  "none": None,  # every activation
  "full": jax.checkpoint_policies.nothing_saveable,  # the input of each block
  "dots": jax.checkpoint_policies.checkpoint_dots,  # the matrix products
}


def linear(
  features: int | Sequence[int],
  name: str,
  *,
  dtype: Dtype,
  kernel_init: nn.initializers.Initializer = linear_init,
  axis: int | Sequence[int] = -1,
  path: str = "",
  forward_mode: bool = False,
) -> nn.DenseGeneral:
  """A linear layer that gathers its kernel before the product.

  Left to itself, XLA may move activations between devices where the batch is small.

  Args:
    features: shape of the output's last axes.
    name: of the module.
    dtype: of the product; the parameters are float32.
    kernel_init: initializer of the kernel, called with the shape (inputs, outputs).
    axis: axes of the input to sum over, the last ones.
    path: the part of the parameter's path before `name` that `PARAMETER_AXES` needs to
      tell the layer from others of that name, such as "final_layer/".
    forward_mode: whether jax.jvp can differentiate the layer, with slower gradients.
  """
  multiply = jnp.tensordot if forward_mode else product
  axes = parameter_axes(f"{path}{name}/kernel")

  def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    (contracted, _), _ = dimensions  # the last axes of x
    return multiply(x, gather_kernel(kernel, axes), len(contracted))

  return nn.DenseGeneral(
    features,
    axis=axis,
    dtype=dtype,
    kernel_init=kernel_init,
    dot_general=dot_general,
    name=name,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, count: int) -> Array:
  """x (…, I…) times kernel (I…, O…), summed over the `count` axes I: (…, O…).

  Equals jnp.tensordot(x, kernel, count). The gradient is written out, because XLA for
  CPUs computes the kernel's gradient of tensordot at a third of the speed: it takes the
  factors in the slower order.
  """
  return jnp.tensordot(x, kernel, count)


def _product_forward(
  x: Array, kernel: Array, count: int
) -> tuple[Array, tuple[Array, Array]]:
  return product(x, kernel, count), (x, kernel)


def _product_backward(
  count: int, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, kernel = kept
  outputs = tuple(range(count - kernel.ndim, 0))
  d_x = jnp.tensordot(gradient, kernel, (outputs, outputs))
  rows = x.reshape(-1, *kernel.shape[:count])  # (N, I…)
  d_rows = gradient.reshape(-1, *kernel.shape[count:])  # (N, O…)
  # Kernels with more axes, those of attention, never have more inputs than outputs.
  if kernel.ndim > 2 or len(kernel) <= kernel.shape[1]:
    return d_x, _sum_over_rows(rows, d_rows)
  return d_x, jax.lax.platform_dependent(
    rows, d_rows, cpu=_sum_over_rows_transposed, default=_sum_over_rows
  )


def _sum_over_rows(x: Array, y: Array) -> Array:
  """x^T y: (N, I…) and (N, O…) -> (I…, O…)."""
  return jnp.tensordot(x, y, (0, 0))


def _sum_over_rows_transposed(x: Array, y: Array) -> Array:
  """x^T y as (y^T x)^T, which is faster on CPUs where x is wider than y.

  The barrier keeps XLA from simplifying the expression back to x^T y.
  """
  return jax.lax.optimization_barrier(_sum_over_rows(y, x)).T


product.defvjp(_product_forward, _product_backward)


def layer_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
  """LayerNorm over D without affine parameters, eps 1e-6, computed in float32."""
  norm = nn.LayerNorm(
    epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False
  )
  normed = norm.apply({}, x.astype(jnp.float32))
  assert isinstance(normed, jax.Array)  # and no tuple: no collection is mutable
  return normed.astype(x.dtype)


# The backward pass recomputes the next two functions. Keeping their intermediate values
# takes as much memory as all other activations together, and more time.


@jax.checkpoint
def modulated_norm(
  x: Float[Array, "B L D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B L D"]:
  """LayerNorm(x) (1 + scale) + shift: adaLN, section 3.2 of DiT (arXiv 2212.09748)."""
  return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@jax.checkpoint
def gelu(x: Array) -> Array:
  """GELU, approximated by tanh."""
  return nn.gelu(x, approximate=True)


def stack(
  block: type[nn.Module],
  length: int,
  *,
  name: str,
  remat: str = "none",
  unroll: int = 1,
  one_skip_a_block: bool = False,
  **attributes: Any,
) -> Callable[..., tuple[Array, Array | None]]:
  """`length` blocks in a row, whose parameters are stacked along axis 0.

  Values that the blocks sow into the collection "intermediates" are stacked too.

  Args:
    block: module class, called as (x, c, index, skip) -> (x, output of the block).
    length: number of blocks.
    name: of the module.
    remat: key of `REMAT_POLICIES`.
    unroll: blocks compiled one after another in each iteration of the loop; -1: all.
    one_skip_a_block: whether `skip` is stacked along axis 0, one entry for each block;
      else all blocks receive the same `skip`.
    **attributes: of the blocks.

  Returns:
    (x, c, index, skip) -> (x after the last block, outputs of all blocks stacked along
    axis 0).
  """
  policy = REMAT_POLICIES[remat]
  if policy is not None:
    # XLA may undo the recomputation only where the blocks are unrolled.
    block = nn.remat(block, policy=policy, prevent_cse=unroll != 1)
  scanned = nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    # flax infers the type int of the default.
    in_axes=(  # pyright: ignore[reportArgumentType]
      nn.broadcast,
      nn.broadcast,
      0 if one_skip_a_block else nn.broadcast,
    ),
    length=length,
    unroll=length if unroll == -1 else min(unroll, length),
  )
  return scanned(**attributes, name=name)
