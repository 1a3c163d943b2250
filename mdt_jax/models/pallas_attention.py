"""Attention in one Pallas kernel for TPUs, which writes no weights (K, K) to memory.

A program of the kernel holds all keys of a few heads in the memory of the core, so that
the softmax of a row needs one pass, and the backward pass computes the weights again
from query, key and bias alone: nothing but the arguments is kept between the passes.

Letters in shapes: B images; H heads; K tokens; d width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from mdt_jax.errors import SettingError
from mdt_jax.models.partitioning import on_each_device
from mdt_jax.types import Array

# Aim for the bytes of one program's blocks in the forward pass; see `_heads_of`.
_BLOCK_BYTES = 4 * 2**20
# Memory of a core that the compiler may give to a kernel; it takes what the chip has if
# that is less. Its default of 16 MiB is too little for the backward pass.
_MEMORY_BYTES = 64 * 2**20
MAX_WEIGHTS = 2**18  # weights (queries x keys) of a head in one program
MAX_ROWS = 256  # queries of one program
MAX_TOKENS = 4096  # the keys and values of a head must fit
MAX_TOKENS_ON = {"TPU v4": 2304}  # chips with less memory in a core
# What `rows_of` takes, for errors.
TOKENS = f"at most {MAX_ROWS} tokens, or a multiple of 8 up to {MAX_TOKENS}"
_LANES = 128  # the last axis of a block is padded to this


def rows_of(tokens: int) -> int | None:
  """Returns how many queries a program takes; None if it cannot divide them.

  Args:
    tokens: K.
  """
  if tokens > MAX_TOKENS:
    return None
  most = min(MAX_ROWS, MAX_WEIGHTS // tokens)
  if tokens <= most:
    return tokens
  return next((n for n in range(most // 8 * 8, 7, -8) if tokens % n == 0), None)


def most_tokens(device_kind: str) -> int:
  """Returns the largest number of tokens on a chip, such as "TPU v4"."""
  return MAX_TOKENS_ON.get(device_kind, MAX_TOKENS)


def pallas_attention(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  value: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
  interpret: bool = False,
) -> Float[Array, "B K H d"]:
  """Same as `attention`, by a Pallas kernel, on TPUs.

  The kernel reads the bias in the dtype of `query`. It writes the gradient of a bias
  that images share once, as a float32 sum over them, and that of other biases in the
  dtype of `query`.

  Args:
    query, key, value, bias: see `attention.attention`.
    interpret: whether to run the kernel as JAX operations, for tests on a CPU.

  Raises:
    SettingError: setting "attention_kernel": the kernel does not run K tokens; see
      `rows_of`.
  """
  if rows_of(query.shape[1]) is None:
    accepted = f"needs {TOKENS}, has {query.shape[1]}"
    raise SettingError("attention_kernel", "pallas", accepted)
  q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))  # (B, H, K, d)
  axes = ("batch", "heads", None, None)
  out = on_each_device(
    functools.partial(_attention, interpret=interpret), (q, k, v, bias), (axes,) * 4
  )
  return out.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, bias: Any, interpret: bool) -> Array:
  """Attention of (B, H, K, d), with a bias in float32 or None."""
  return _forward(q, k, v, bias, interpret)[0]


def _forward(
  q: Array, k: Array, v: Array, bias: Any, interpret: bool
) -> tuple[Array, tuple[Any, ...]]:
  """Returns the output and what the gradient needs."""
  rounded = None if bias is None else bias.astype(q.dtype)
  (out,) = _call(("out",), q, k, v, rounded, None, interpret)
  return out, (q, k, v, rounded)


def _backward(interpret: bool, kept: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
  """Returns the gradients by q, k, v and bias."""
  q, k, v, bias = kept
  call = functools.partial(_call, interpret=interpret)
  if bias is None:
    return (*call(("dq", "dk", "dv"), q, k, v, None, d_out), None)
  if len(bias) == len(q) or rows_of(q.shape[2]) == q.shape[2]:
    dq, dk, dv, d_bias = call(("dq", "dk", "dv", "dbias"), q, k, v, bias, d_out)
  else:
    # Sums over images and sums over queries need different orders of programs.
    dq, d_bias = call(("dq", "dbias"), q, k, v, bias, d_out)
    dk, dv = call(("dk", "dv"), q, k, v, bias, d_out)
  return dq, dk, dv, d_bias.astype(jnp.float32)


_attention.defvjp(_forward, _backward)


def _call(
  results: tuple[str, ...],
  q: Array,
  k: Array,
  v: Array,
  bias: Any,
  d_out: Array | None,
  interpret: bool,
) -> list[Array]:
  """Runs the kernel, and returns `results`.

  Args:
    results: "out"; or some of "dq", "dk", "dv", "dbias".
    q, k, v, d_out: (B, H, K, d).
    bias: (1 or B, H, K, K) of the dtype of q, or None.
    interpret: see `pallas_attention`.
  """
  batch, heads, tokens, width = q.shape
  rows = rows_of(tokens)
  assert rows is not None
  per_image = bias is not None and len(bias) == batch
  is_shared = bias is not None and len(bias) == 1  # also of one image on a device
  # Programs that add to one block of results follow each other: those of all images
  # for a shared bias, those of all queries for keys and values.
  over_images = "dbias" in results and not per_image
  over_rows = "dk" in results and rows < tokens
  assert not (over_images and over_rows)
  count = _heads_of(heads, tokens, rows, width, q.dtype.itemsize)
  images, groups, parts = batch, heads // count, tokens // rows

  if over_images:
    grid, order = (groups, parts, images), (2, 0, 1)
  else:
    grid, order = (images, groups, parts), (0, 1, 2)

  def place(kind: str) -> Any:
    def index(*ids: Any) -> tuple[Any, ...]:
      image, group, part = (ids[axis] for axis in order)
      return {
        "rows": (image, group, part, 0),
        "keys": (image, group, 0, 0),
        "bias": (image if per_image else 0, group, part, 0),
      }[kind]

    return index

  shapes = {
    "rows": (1, count, rows, width),
    "keys": (1, count, tokens, width),
    "bias": (1, count, rows, tokens),
  }
  specs = {kind: pl.BlockSpec(shape, place(kind)) for kind, shape in shapes.items()}
  given = [("rows", q), ("keys", k), ("keys", v)]
  given += [("bias", bias)] if bias is not None else []
  given += [("rows", d_out)] if d_out is not None else []
  kinds = {"out": "rows", "dq": "rows", "dk": "keys", "dv": "keys", "dbias": "bias"}
  # Sums over programs are float32 until the last of them.
  full = {"rows": q, "keys": q, "bias": bias}
  scratch = {
    name: pltpu.VMEM(shapes[kinds[name]], jnp.float32)
    for name in results
    if (over_images and name == "dbias") or (over_rows and name in ("dk", "dv"))
  }
  out_shape = [
    jax.ShapeDtypeStruct(
      full[kinds[name]].shape,
      jnp.float32 if name == "dbias" and is_shared else q.dtype,
    )
    for name in results
  ]
  kernel = functools.partial(
    _kernel,
    results=results,
    summed=tuple(scratch),
    has_bias=bias is not None,
    scale=width**-0.5,
    last_axis=(grid[2] if scratch else 1),
  )
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=[specs[kind] for kind, _ in given],
    out_specs=[specs[kinds[name]] for name in results],
    out_shape=out_shape,
    scratch_shapes=list(scratch.values()),
    cost_estimate=pl.CostEstimate(
      # Logits and output; or logits, gradients of weights, and those in `results`.
      flops=(2 if d_out is None else 2 + len({*results} - {"dbias"}))
      * (2 * batch * heads * tokens**2 * width),
      transcendentals=batch * heads * tokens**2,
      bytes_accessed=sum(
        array.size * array.dtype.itemsize
        for array in (*(array for _, array in given), *out_shape)
      ),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_MEMORY_BYTES,
    ),
    interpret=interpret,
    name="attention_" + "_".join(results),
  )(*(array for _, array in given))


def _heads_of(heads: int, tokens: int, rows: int, width: int, size: int) -> int:
  """Returns how many heads a program takes: the most whose blocks fit.

  One head of 256 tokens is less work than the start of a program takes. The blocks are
  those of the forward pass. The backward pass, with its sums, and with the two copies
  that Pallas keeps of each block, takes about six times as many bytes.
  """
  padded = math.ceil(width / _LANES) * _LANES
  block = (2 * rows + 2 * tokens) * padded * size + rows * tokens * (size + 4)
  most = max(1, _BLOCK_BYTES // block)
  return next(n for n in range(min(most, heads), 0, -1) if heads % n == 0)


def _kernel(
  *refs: Any,
  results: tuple[str, ...],
  summed: tuple[str, ...],
  has_bias: bool,
  scale: float,
  last_axis: int,
) -> None:
  """One program: some queries of some heads of an image, and all of their keys."""
  refs_in = list(refs)
  q_ref, k_ref, v_ref = refs_in[:3]
  rest = refs_in[3:]
  bias_ref = rest.pop(0) if has_bias else None
  d_out_ref = None if results == ("out",) else rest.pop(0)
  out_refs = dict(zip(results, rest, strict=False))
  sums = dict(zip(summed, rest[len(results) :], strict=True))
  step = pl.program_id(2)

  def one_head(head: Any, _: None) -> None:
    q, k, v = q_ref[0, head], k_ref[0, head], v_ref[0, head]
    logits = _product(q, k, (1, 1)) * scale  # (rows, K)
    if bias_ref is not None:
      logits += bias_ref[0, head].astype(jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if d_out_ref is None:
      out = _product(weights.astype(v.dtype), v, (1, 0)) / total
      out_refs["out"][0, head] = out.astype(v.dtype)
      return
    d_out = d_out_ref[0, head]
    weights /= total
    d_weights = _product(d_out, v, (1, 1))
    common = (weights * d_weights).sum(axis=-1, keepdims=True)
    d_logits = weights * (d_weights - common)
    rounded = d_logits.astype(q.dtype)
    found = {}
    if "dq" in results:
      found["dq"] = _product(rounded, k, (1, 0)) * scale
    if "dk" in results:
      found["dk"] = _product(rounded, q, (0, 0)) * scale
      found["dv"] = _product(weights.astype(v.dtype), d_out, (0, 0))
    if "dbias" in results:
      found["dbias"] = d_logits
    for name, array in found.items():
      if name in sums:
        _add(sums[name], out_refs[name], head, array, step, last_axis)
      else:
        out_refs[name][0, head] = array.astype(out_refs[name].dtype)

  # A loop, not a copy of the code for each head, which would need more memory.
  jax.lax.fori_loop(0, q_ref.shape[1], one_head, None)


def _add(
  total: Any, out: Any, head: Any, array: Array, step: Any, num_steps: int
) -> None:
  """Adds to a sum over programs, and writes it in the last one."""

  @pl.when(step == 0)
  def _start() -> None:
    total[0, head] = array

  @pl.when(step > 0)
  def _go_on() -> None:
    total[0, head] += array

  @pl.when(step == num_steps - 1)
  def _write() -> None:
    out[0, head] = total[0, head].astype(out.dtype)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """Multiplies matrices over an axis of each, with float32 sums."""
  dims = (((axes[0],), (axes[1],)), ((), ()))
  precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return jax.lax.dot_general(
    a, b, dims, precision=precision, preferred_element_type=jnp.float32
  )
