"""How a network names the axes of its arrays, so that devices can share them.

Names mean axes of a mesh inside `sharding.use_mesh`, and nothing elsewhere:
"batch"; "width", by which parameters are shared where they rest; "heads" and "hidden",
by which devices share the work on one image.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call

Array = jax.Array

# End of a parameter's path -> its axes, without the leading one of stacked layers.
# What is not here, biases mostly, lies whole on each device: 1 part in 1,000.
PARAMETER_AXES = {
  "patch_embed/linear/kernel": (None, "width"),
  "timestep_embed/fc1/kernel": (None, "width"),
  "timestep_embed/fc2/kernel": (None, "width"),
  "label_embed/table": (None, "width"),
  "pos_embed": (None, "width"),  # and decode_pos_embed
  "qkv/kernel": ("width", None, "heads", None),
  "qkv/bias": (None, "heads", None),
  "proj/kernel": ("heads", None, "width"),
  "relative_position_bias": (None, "heads"),
  "skip/kernel": (None, "width"),
  "modulation/linear/kernel": (None, "width"),
  "fc1/kernel": ("width", "hidden"),
  "fc1/bias": ("hidden",),
  "fc2/kernel": ("hidden", "width"),
  "final_layer/linear/kernel": ("width", None),
}


def parameter_axes(path: str) -> tuple[str | None, ...]:
  """Axes of the parameter at `path`; () where it lies whole on each device."""
  return next((axes for end, axes in PARAMETER_AXES.items() if path.endswith(end)), ())


def spread_batch(x: Array) -> Array:
  """Spreads the first axis over the devices that share a batch."""
  return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))


def gather(parameter: Array, axes: Sequence[str | None]) -> Array:
  """Brings together the parts of a parameter that devices share at rest."""
  return nn.with_logical_constraint(
    parameter, tuple(None if axis == "width" else axis for axis in axes)
  )


def gather_kernel(kernel: Array, axes: Sequence[str | None]) -> Array:
  """As `gather`; each device sums up its own part of the gradient alone.

  Left to itself, XLA sums all of it on each device and cuts the part out, which moves
  twice as much.
  """
  if not nn.get_logical_axis_rules():
    return kernel
  return linear_call(
    lambda _, whole: gather(whole, axes),
    lambda _, gradient: nn.with_logical_constraint(gradient, tuple(axes)),
    (),
    kernel,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, count: int) -> Array:
  """x (…, I…) times kernel (I…, O…), summed over `count` axes I: (…, O…).

  As jnp.tensordot(x, kernel, count), whose gradient with respect to the kernel XLA
  computes at a third of the speed on CPUs, for the order of its factors.
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
  rows = x.reshape(-1, *kernel.shape[:count])
  d_rows = gradient.reshape(-1, *kernel.shape[count:])
  # Kernels with more axes, of attention, have no wider inputs than outputs.
  if kernel.ndim > 2 or len(kernel) <= kernel.shape[1]:
    return d_x, _sum_over_rows(rows, d_rows)
  return d_x, jax.lax.platform_dependent(
    rows, d_rows, cpu=_sum_over_rows_transposed, default=_sum_over_rows
  )


def _sum_over_rows(x: Array, y: Array) -> Array:
  """x^T y: (N, …) and (N, …) -> (…, …)."""
  return jnp.tensordot(x, y, (0, 0))


def _sum_over_rows_transposed(x: Array, y: Array) -> Array:
  """As (y^T x)^T: faster on CPUs where x is the wider.

  The barrier lasts until XLA would have made it x^T y again.
  """
  return jax.lax.optimization_barrier(_sum_over_rows(y, x)).T


product.defvjp(_product_forward, _product_backward)


def linear(
  features: int | Sequence[int], name: str, path: str = "", **settings: Any
) -> nn.DenseGeneral:
  """A linear layer that computes with whole weights, wherever their parts rest.

  Left to itself, XLA may send activations about where the batch is small.

  Args:
    features: of the output.
    name: of the module.
    path: end of the path before it, where `PARAMETER_AXES` has one.
    **settings: of nn.DenseGeneral.
  """
  axes = parameter_axes(f"{path}{name}/kernel")

  def dot_general(x: Array, kernel: Array, dimensions: Any, **_: Any) -> Array:
    (contracted, _), _ = dimensions  # the last axes of x
    return product(x, gather_kernel(kernel, axes), len(contracted))

  return nn.DenseGeneral(features, name=name, dot_general=dot_general, **settings)
