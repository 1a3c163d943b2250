"""Shared layers: linear, LayerNorm, adaLN, GELU, and stacks of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from mdt_jax.models.partitioning import gather_kernel, parameter_axes
from mdt_jax.types import Array, Dtype

# The initializers of the released code; biases start at zero.
linear_init = nn.initializers.xavier_uniform()
normal_init = nn.initializers.normal(0.02)

# Names of outputs for REMAT_POLICIES.
ATTENTION, LINEAR = "attention", "linear"
_POLICIES = jax.checkpoint_policies
# Value of `remat` -> what the forward pass saves, beside the input of each block. The
# backward pass recomputes the rest.
REMAT_POLICIES = {
  "none": None,  # every activation
  "full": _POLICIES.nothing_saveable,
  "attention": _POLICIES.save_only_these_names(ATTENTION),
  "linear": _POLICIES.save_only_these_names(ATTENTION, LINEAR),
  "offload": _POLICIES.save_and_offload_only_these_names(  # to the host's memory
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[ATTENTION, LINEAR],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  # The products inside of attention too: logits are (B, heads, K, K).
  "dots": _POLICIES.save_from_both_policies(
    _POLICIES.checkpoint_dots, _POLICIES.save_only_these_names(ATTENTION, LINEAR)
  ),
}


def linear(
  features: int | Sequence[int],
  name: str,
  *,
  dtype: Dtype,
  kernel_init: nn.initializers.Initializer = linear_init,
  axis: int | Sequence[int] = -1,
  path: str = "",
  use_bias: bool = True,
  forward_mode: bool = False,
) -> nn.DenseGeneral:
  """Builds a linear layer that gathers its sharded kernel before the product.

  Without the gather, XLA may move activations between devices if the batch is small.

  Args:
    features: shape of the output's last axes.
    name: name of the module.
    dtype: dtype of the product. Kernel and bias are float32.
    kernel_init: initializer of the kernel, called with the shape (inputs, outputs).
    axis: input axes to sum over; they must be the last ones.
    path: prefix of `name` in the parameter's path, such as "final_layer/". Needed if
      `partitioning.PARAMETER_AXES` distinguishes layers of the same name by the prefix.
    use_bias: whether the layer adds a bias.
    forward_mode: whether jax.jvp can differentiate the layer; makes gradients slower.

  Returns:
    The flax module.
  """
  multiply = jnp.tensordot if forward_mode else product
  axes = parameter_axes(f"{path}{name}/kernel")

  def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    (contracted, _), _ = dimensions  # the last axes of x
    out = multiply(x, gather_kernel(kernel, axes), len(contracted))
    return checkpoint_name(out, LINEAR)

  return nn.DenseGeneral(
    features,
    axis=axis,
    dtype=dtype,
    kernel_init=kernel_init,
    use_bias=use_bias,
    dot_general=dot_general,
    name=name,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, count: int) -> Array:
  """Equals jnp.tensordot(x, kernel, count), with a gradient that is faster on CPUs.

  XLA for CPUs computes the kernel's gradient of tensordot at a third of the speed,
  because it multiplies the factors in the slower order. jax.jvp is not supported.

  Args:
    x: (…, I…).
    kernel: (I…, O…).
    count: number of axes I to sum over.

  Returns:
    (…, O…).
  """
  return jnp.tensordot(x, kernel, count)


def _product_forward(
  x: Array, kernel: Array, count: int
) -> tuple[Array, tuple[Array, Array]]:
  """Returns the product and the values that `_product_backward` needs."""
  return product(x, kernel, count), (x, kernel)


def _product_backward(
  count: int, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  """Computes the gradients of `product` by x and kernel."""
  x, kernel = kept
  outputs = tuple(range(count - kernel.ndim, 0))
  d_x = jnp.tensordot(gradient, kernel, (outputs, outputs))
  rows = x.reshape(-1, *kernel.shape[:count])  # (N, I…)
  d_rows = gradient.reshape(-1, *kernel.shape[count:])  # (N, O…)
  # Kernels with more than 2 axes (attention) never have more inputs than outputs.
  if kernel.ndim > 2 or len(kernel) <= kernel.shape[1]:
    return d_x, _sum_over_rows(rows, d_rows)
  return d_x, jax.lax.platform_dependent(
    rows, d_rows, cpu=_sum_over_rows_transposed, default=_sum_over_rows
  )


def _sum_over_rows(x: Array, y: Array) -> Array:
  """Computes x^T y: (N, I…) and (N, O…) -> (I…, O…)."""
  return jnp.tensordot(x, y, (0, 0))


def _sum_over_rows_transposed(x: Array, y: Array) -> Array:
  """Computes x^T y as (y^T x)^T, which is faster on CPUs if x is wider than y.

  The barrier prevents XLA from simplifying the expression to x^T y.
  """
  return jax.lax.optimization_barrier(_sum_over_rows(y, x)).T


product.defvjp(_product_forward, _product_backward)


def layer_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
  """Applies LayerNorm over D in float32, with eps 1e-6 and no affine parameters."""
  norm = nn.LayerNorm(
    epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False
  )
  normed = norm.apply({}, x.astype(jnp.float32))
  assert isinstance(normed, jax.Array)  # for the type checker
  return normed.astype(x.dtype)


def scaled_norm(name: str, dtype: Dtype) -> nn.LayerNorm:
  """Builds a LayerNorm with weights and without bias, computed in float32."""
  return nn.LayerNorm(
    epsilon=1e-6, use_bias=False, use_fast_variance=False, dtype=dtype, name=name
  )


# The backward pass recomputes `modulated_norm` and `gelu`. Saving their intermediate
# values would take as much memory as all other activations together, and more time.


@jax.checkpoint
def modulated_norm(
  x: Float[Array, "B L D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B L D"]:
  """Computes LayerNorm(x) (1 + scale) + shift: adaLN (DiT, arXiv 2212.09748, 3.2)."""
  return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@jax.checkpoint
def gelu(x: Array) -> Array:
  """Applies GELU in the tanh approximation."""
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
  """Builds a sequence of `length` blocks with nn.scan.

  Parameters, and values sown into the collection "intermediates", are stacked along
  axis 0.

  Args:
    block: module class. A call (x, c, index, skip) returns (x, output of the block).
    length: number of blocks.
    name: name of the module.
    remat: a key of REMAT_POLICIES.
    unroll: number of blocks per iteration of the compiled loop; -1 for all blocks.
    one_skip_a_block: if True, block i receives `skip[i]`; if False, all blocks receive
      the same `skip`.
    **attributes: attributes of the block class.

  Returns:
    A function (x, c, index, skip) -> (x after the last block, outputs of all blocks
    stacked along axis 0).
  """
  policy = REMAT_POLICIES[remat]
  if policy is not None:
    # XLA's common-subexpression elimination can undo remat only in unrolled code.
    block = nn.remat(block, policy=policy, prevent_cse=unroll != 1)
  scanned = nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    # The type checker infers `int` from flax's default value.
    in_axes=(  # pyright: ignore[reportArgumentType]
      nn.broadcast,
      nn.broadcast,
      0 if one_skip_a_block else nn.broadcast,
    ),
    length=length,
    unroll=length if unroll == -1 else min(unroll, length),
  )
  return scanned(**attributes, name=name)
