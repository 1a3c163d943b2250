"""Counts the floating-point operations of MDT, MDTv2, DiT and SiT.

A multiply-add of a matrix product counts as two operations; see `models.flops`.
"""

from __future__ import annotations

from mdt_jax.models.embeddings import NUM_FREQUENCIES
from mdt_jax.models.mdt import MDT


def forward_flops(model: MDT, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image.

  Args:
    model: the network.
    num_keep: number of tokens that the encoder sees; None for an unmasked pass.
  """
  length = model.num_tokens
  flops = embedding_flops(model) + final_layer_flops(model, model.hidden_size)
  if not model.takes_mask:
    return flops + model.depth * block_flops(model, length)
  kept = length if num_keep is None else num_keep
  encoder_depth = model.depth - model.decode_depth
  flops += encoder_depth * block_flops(model, kept)
  flops += model.decode_depth * block_flops(model, length)
  if num_keep is not None:
    flops += block_flops(model, length)  # the side-interpolater
  if model.variant == "MDTv2":
    flops += encoder_depth // 2 * skip_flops(model, kept)
    flops += model.decode_depth * skip_flops(model, length)
  return flops


def embedding_flops(model: MDT) -> int:
  """Counts the operations of the embeddings of patches, timestep and condition."""
  length, width = model.num_tokens, model.hidden_size
  patch, rank = model.patch_size**2 * model.in_channels, model.patch_bottleneck
  patches = 2 * length * (patch * rank + rank * width if rank else patch * width)
  timestep = 2 * (NUM_FREQUENCIES * width + width**2)
  return patches + timestep + model.conditioning.embedding_flops(width)


def final_layer_flops(model: MDT, width: int) -> int:
  """Counts the operations of the final layer on tokens of a width."""
  out = model.patch_size**2 * model.last_channels
  return 2 * model.hidden_size * 2 * width + 2 * model.num_tokens * width * out


def block_flops(model: MDT, length: int, width: int | None = None) -> int:
  """Counts the operations of a block on `length` tokens, without its long skip.

  Args:
    model: the network.
    length: number of tokens.
    width: width of the tokens; None for that of the network.
  """
  width = width or model.hidden_size
  hidden = int(width * model.mlp_ratio)
  linear = 2 * length * width * (3 * width + width + 2 * hidden)
  attention = 2 * 2 * length**2 * width
  modulation = 2 * model.hidden_size * 6 * width
  flops = linear + attention + modulation
  if tokens := model.conditioning.num_tokens:  # cross-attention
    flops += 2 * tokens * model.hidden_size * 2 * width  # keys and values
    flops += 2 * length * width * 2 * width + 2 * 2 * length * tokens * width
  return flops


def skip_flops(model: MDT, length: int) -> int:
  """Counts the operations of a long skip, a 2D -> D layer, on `length` tokens."""
  return 2 * length * 2 * model.hidden_size**2
