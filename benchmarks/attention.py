"""Times implementations of attention: python -m benchmarks.attention --grid=16

Each timing is the forward and backward pass of softmax(q k^T / sqrt(d) + bias) v. In
the unmasked pass, all images share one bias. In the masked pass, the bias of the kept
tokens is gathered for each image.

Attention:
- ours: mdt_jax.models.attention, (B, L, H, d), as in the blocks of the network;
- products: jax.nn.dot_product_attention;
- merged: einsum products after a transpose to (B, H, L, d);
- cudnn: cuDNN's fused kernel, on GPUs with bfloat16.

Bias of the masked pass:
- by table: gather rows of the table with an index (B, K, K);
- by pairs: gather rows, then columns, from the bias (H, L, L) of all tokens;
- by one hot: multiply the bias of all tokens by one-hot matrices.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import timing
from mdt_jax.models.attention import attention
from mdt_jax.models.embeddings import relative_position_index
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.mdt import UNUSED_BIAS_ROWS

BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Number of images.")
GRID = flags.DEFINE_integer("grid", 16, "Tokens along a side of the image.")
KEPT = flags.DEFINE_integer("kept", 160, "Tokens kept in the masked pass.")
HEADS = flags.DEFINE_integer("heads", 6, "Number of heads.")
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of a head.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Number of timed turns.")
JSON = flags.DEFINE_string("json", None, "File for all measurements.")

Array = jax.Array


def products(q: Array, k: Array, v: Array, bias: Array) -> Array:
  """Attention by jax.nn.dot_product_attention."""
  return jax.nn.dot_product_attention(q, k, v, bias=bias)


def cudnn(q: Array, k: Array, v: Array, bias: Array) -> Array:
  """Attention by the fused kernel of cuDNN."""
  return jax.nn.dot_product_attention(
    q, k, v, bias=bias.astype(q.dtype), implementation="cudnn"
  )


def merged(q: Array, k: Array, v: Array, bias: Array) -> Array:
  """Attention by einsum products of (B, H, L, d) arrays."""
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5 + bias).astype(v.dtype)
  return jnp.einsum("bhqk,bhkd->bhqd", weights, v).transpose(0, 2, 1, 3)


def by_table(table: Array, index: Array, ids: Array) -> Array:
  """The bias (B, H, K, K) of kept tokens: gathers rows of the table."""
  pairs = index[ids[:, :, None], ids[:, None, :]]
  return table[pairs].transpose(0, 3, 1, 2)


def by_pairs(table: Array, index: Array, ids: Array) -> Array:
  """The bias (B, H, K, K) of kept tokens: gathers rows and columns of all tokens."""
  bias = table[index].transpose(2, 0, 1)
  take = jax.vmap(lambda rows: bias[:, rows][:, :, rows])
  return take(ids)


def by_one_hot(table: Array, index: Array, ids: Array) -> Array:
  """The bias (B, H, K, K) of kept tokens: products with one-hot matrices."""
  bias = table[index].transpose(2, 0, 1)
  chosen = jax.nn.one_hot(ids, len(index), dtype=bias.dtype)
  rows = jnp.einsum("bkl,hlm->bhkm", chosen, bias)
  return jnp.einsum("bhkm,bjm->bhkj", rows, chosen)


def gradient(
  way: Callable[..., Array], make_bias: Callable[[Array], Array]
) -> Callable[..., tuple[Array, ...]]:
  """The jitted gradient of sum(attention^2) in queries, keys, values and the table."""

  def total(q: Array, k: Array, v: Array, table: Array) -> Array:
    out = way(q, k, v, make_bias(table))
    return (out.astype(jnp.float32) ** 2).sum()

  return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))


def main(argv: list[str]) -> None:
  del argv
  index = jnp.asarray(relative_position_index(GRID.value))
  length = len(index)
  keys = jax.random.split(jax.random.key(0), 5)
  rows = (2 * GRID.value - 1) ** 2 + UNUSED_BIAS_ROWS
  table = jax.random.normal(keys[0], (rows, HEADS.value))
  noise = jax.random.uniform(keys[1], (BATCH_SIZE.value, length))
  ids = token_mask_from_noise(noise, KEPT.value).ids_keep

  def inputs(tokens: int) -> list[Array]:
    shape = (BATCH_SIZE.value, tokens, HEADS.value, HEAD_DIM.value)
    return [jax.random.normal(key, shape, DTYPE.value) for key in keys[2:]]

  ways = {"ours": attention, "products": products, "merged": merged}
  if jax.default_backend() == "gpu" and DTYPE.value == "bfloat16":
    ways["cudnn"] = cudnn
  functions = {}
  for name, way in ways.items():
    whole = gradient(way, lambda t: t[index].transpose(2, 0, 1)[None])
    functions[f"unmasked, {name}"] = functools.partial(whole, *inputs(length), table)
    for bias in (by_table, by_pairs, by_one_hot):
      masked = gradient(way, functools.partial(_masked, bias, index, ids))
      functions[f"masked, {name}, {bias.__name__.replace('_', ' ')}"] = (
        functools.partial(masked, *inputs(KEPT.value), table)
      )
  times = timing.take_turns(
    {name: functools.partial(_wait, f) for name, f in functions.items()}, REPEATS.value
  )
  print(timing.device())
  for name, value in times.items():
    print(f"{name:32} {1e3 * value.median:9.3f} ms ± {value.spread:.1%}")
  if JSON.value:
    found = {name: value.seconds for name, value in times.items()}
    Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")


def _masked(
  bias: Callable[..., Array], index: Array, ids: Array, table: Array
) -> Array:
  """Calls `bias` with the table as last argument, for functools.partial."""
  return bias(table, index, ids)


def _wait(function: Callable[[], tuple[Array, ...]]) -> None:
  """Calls a function and waits for its result."""
  jax.block_until_ready(function())


if __name__ == "__main__":
  app.run(main)
