"""Counts the floating-point operations of the matrix products in a compiled program."""

from __future__ import annotations

import functools
import math
import re

from mdt_jax.planning import hlo

Shape = tuple[int, ...]

_CONTRACTED = re.compile(
  r'\blhs_contracting_dim(?:ension)?s"?[=:]\s*[{[]([^}\]]*)[}\]]'
)
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_COST = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
# Attention of cuDNN -> matrix products of a pass: q k^T and p v; and, backward, the
# weights once more, and the gradients by them, q, k and v.
_CUDNN_PRODUCTS = {"Softmax": 2, "SoftmaxBackward": 5}
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Softmax(?:Backward)?)"')


def flops(
  operation: hlo.Operation,
  computation: hlo.Computation,
  computations: dict[str, hlo.Computation],
) -> int:
  """Counts the FLOPs of the products of an operation, and of those inside of a fusion.

  Known are products, convolutions (also those that XLA for TPUs makes of products),
  calls of cuBLAS and of cuDNN's attention, and kernels with a cost estimate. Other
  operations count 0.
  """
  if operation.opcode == "fusion":
    body = computations[hlo.CALLED.findall(operation.line)[0]]
    return sum(flops(inner, body, computations) for inner in body.operations.values())
  if not operation.shapes:
    return 0
  result = operation.shapes[0]
  operands = [computation.operations[name].shapes for name in operation.operands]
  shapes: list[Shape] = [found[0] if found else () for found in operands]
  if operation.opcode == "convolution":
    return _convolution(operation.line, result, *shapes[:2])
  if operation.opcode == "dot" or "__cublas$" in operation.line:
    contracted = _CONTRACTED.search(operation.line)
    axes = re.findall(r"\d+", contracted[1]) if contracted else []
    return 2 * math.prod(result) * math.prod(shapes[0][int(axis)] for axis in axes)
  if attention := _CUDNN.search(operation.line):
    # The shapes of query and key lack one axis of the weights each: the other's tokens.
    batch, tokens, heads, width = shapes[0]
    products = _CUDNN_PRODUCTS[attention[1]]
    return products * 2 * batch * heads * tokens * shapes[1][1] * width
  if operation.opcode == "custom-call" and (cost := _COST.search(operation.line)):
    return int(cost[1])
  return 0


def _convolution(line: str, result: Shape, image: Shape, kernel: Shape) -> int:
  """FLOPs of a convolution, without the products with padding and with holes.

  XLA for TPUs writes the batch of a product as a spatial axis with holes, so that of
  each window only one entry counts.
  """
  labels = _LABELS.search(line)
  assert labels, line
  in_axes, kernel_axes, out_axes = labels.groups()
  window = _WINDOW.search(line)
  fields = dict(field.split("=") for field in window[1].split()) if window else {}
  count = 2 * math.prod(result[out_axes.index(axis)] for axis in "bf")
  count *= kernel[kernel_axes.index("i")]
  for axis in filter(str.isdigit, out_axes):
    number = int(axis)

    def field(name: str, default: str, number: int = number) -> str:
      return fields[name].split("x")[number] if name in fields else default

    count *= _pairs(
      size_in=image[in_axes.index(axis)],
      size_out=result[out_axes.index(axis)],
      window=kernel[kernel_axes.index(axis)],
      stride=int(field("stride", "1")),
      before=int(field("pad", "0_0").split("_")[0]),
      holes_in=int(field("lhs_dilate", "1")),
      holes_window=int(field("rhs_dilate", "1")),
    )
  return count


@functools.cache
def _pairs(
  size_in: int,
  size_out: int,
  window: int,
  stride: int,
  before: int,
  holes_in: int,
  holes_window: int,
) -> int:
  """Number of (output, window entry) along an axis that meet an entry of the input."""
  places = (
    out * stride + entry * holes_window - before
    for out in range(size_out)
    for entry in range(window)
  )
  return sum(
    place % holes_in == 0 and 0 <= place // holes_in < size_in for place in places
  )
