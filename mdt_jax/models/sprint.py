"""The network SPRINT (arXiv 2510.21986): its middle blocks see a part of the tokens.

The source is snap-research/Sprint. Letters in shapes: see `models.mdt`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models import mdt_flops
from mdt_jax.models.blocks import Attention, Block
from mdt_jax.models.embeddings import MAX_PERIOD
from mdt_jax.models.layers import linear, normal_init
from mdt_jax.models.masking import (
  TokenMask,
  keep_tokens,
  restore_tokens,
  token_mask_from_noise,
)
from mdt_jax.models.mdt import MDT
from mdt_jax.models.partitioning import look_up
from mdt_jax.sizes import Size, height_width
from mdt_jax.types import Array

MASK_TYPES = ("structured", "random")
# (side of a group of tokens, kept tokens of each group): the shares of removed tokens
# 75%, 50%, 62.5% and 87.5%.
GROUPS = ((2, 1), (2, 2), (4, 6), (4, 2))


class RotaryAttention(Attention):
  """Attention with RMSNorm of queries and keys, which are then turned by position.

  The argument `index` of a call holds the rotations of the tokens: (1 or B, K, 2, d /
  2), see `rotations`.
  """

  def _with_positions(
    self, query: Array, key: Array, index: Any
  ) -> tuple[Array, Array]:
    ones, shape = nn.initializers.ones, query.shape[-1:]
    scales = (self.param(name, ones, shape) for name in ("q_norm", "k_norm"))
    query, key = (
      norm_and_turn(x, scale, index)
      for x, scale in zip((query, key), scales, strict=True)
    )
    return query, key


class RotaryBlock(Block):
  """A block of DiT with `RotaryAttention`."""

  attention_class: ClassVar[type[Attention]] = RotaryAttention


class SPRINT(MDT, kw_only=True):
  """DiT with a shallow path for all tokens and a deep path for the kept tokens.

    shallow = encoder blocks(tokens)                      all tokens
    deep    = middle blocks(kept tokens of shallow)       kept tokens
    fused   = linear([deep, shallow])                     all tokens
    output  = final layer(decoder blocks(fused))          all tokens

  Where a token is removed, a mask token stands in for its deep token; the mask token
  is not trained. Without a token mask, the middle blocks see all tokens. A token mask
  that keeps no tokens skips the middle blocks, which costs nothing then: path-drop
  guidance does so for its second pass.

  Positions enter the attention alone, by rotations of queries and keys (RoPE), so the
  parameters do not depend on the input size. Kept tokens keep their positions.

  "shallow", "deep_kept" (B, K, D) and "fused" (B, L, D) are sown into the collection
  "intermediates".

  Attributes (in addition to those of `MDT`):
    depth: number of all blocks. depth - encoder_depth - decode_depth are middle blocks.
    encoder_depth: number of blocks before the middle blocks.
    decode_depth: number of blocks after the middle blocks.
    mask_type: how `token_mask` chooses the kept tokens. "structured": equally many of
      each group of 2 x 2 or 4 x 4 tokens, as released. "random": of the whole image.
  """

  variant: str = "SPRINT"
  learn_sigma: bool = False
  encoder_depth: int = 2
  decode_depth: int = 2
  mask_type: str = "structured"

  variants: ClassVar[tuple[str, ...]] = ("SPRINT",)
  block_class: ClassVar[type[Block]] = RotaryBlock
  has_pos_embed: ClassVar[bool] = False

  @property
  def has_route(self) -> bool:
    return True

  @property
  def drops_path(self) -> bool:
    return True

  @property
  def default_objective(self) -> str:
    return "sprint"

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of parameters that are not trained: the mask token, as released."""
    return ("mask_token",)

  @property
  def middle_depth(self) -> int:
    """Number of blocks that see only the kept tokens."""
    return self.depth - self.encoder_depth - self.decode_depth

  def token_mask(self, noise: Float[Array, "B L"], num_keep: int) -> TokenMask:
    """Returns the mask that keeps `num_keep` tokens, chosen by uniform noise.

    Args:
      noise: (B, L) uniform noise of the tokens.
      num_keep: K. If K is L / 4, L / 2, 3 L / 8 or L / 8, the grid is divisible into
        the groups, and mask_type is "structured", each group keeps its tokens of the
        largest noise. Otherwise, the K tokens with the smallest noise are kept.
    """
    if self.mask_type == "structured":
      sides = height_width(self.grid_size)
      for side, kept in GROUPS:
        divides = not any(length % side for length in sides)
        if divides and num_keep * side**2 == self.num_tokens * kept:
          return structured_mask(noise, self.grid_size, side, kept)
    return token_mask_from_noise(noise, num_keep)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
    path_drop: Bool[Array, "B"] | None = None,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts what the process trains; a velocity in the released networks.

    Args:
      x, t, y, train: see `MDT`. The released networks receive times in [0, 1], 0 for
        data.
      token_mask: the tokens that the middle blocks see; None for all.
      path_drop: samples whose deep tokens are all replaced by the mask token; None for
        no sample.

    Returns:
      (B, H, W, out_channels) float32.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape.
    """
    self.check()
    self.check_input(x)
    tokens, c = self._embed(x, t, y, train)  # (B, L, D), (B, D)
    head_width = self.hidden_size // self.num_heads
    places = rotations(self.grid_size, head_width)[None]  # (1, L, 2, d / 2)
    encoder_blocks = self._blocks("encoder_blocks", self.encoder_depth)
    shallow, _ = encoder_blocks(tokens, c, places, None)  # (B, L, D)
    self.sow("intermediates", "shallow", shallow)
    deep = self._deep(shallow, c, places, token_mask, path_drop)  # (B, L, D)
    joined = jnp.concatenate([deep, shallow], axis=-1)  # (B, L, 2D)
    options = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    fused = linear(self.hidden_size, "fuse", **options)(joined)  # (B, L, D)
    self.sow("intermediates", "fused", fused)
    decode_blocks = self._blocks("decode_blocks", self.decode_depth)
    return self._output(decode_blocks(fused, c, places, None)[0], c)

  def _deep(
    self,
    shallow: Float[Array, "B L D"],
    c: Float[Array, "B D"],
    places: Float[Array, "1 L 2 _"],
    token_mask: TokenMask | None,
    path_drop: Bool[Array, "B"] | None,
  ) -> Float[Array, "B L D"]:
    """Runs the middle blocks on the kept tokens; elsewhere stands the mask token."""
    shape = (self.hidden_size,)
    param = self.param("mask_token", normal_init, shape, jnp.float32)
    mask_token = param.astype(self.dtype)
    blocks = self._blocks("middle_blocks", self.middle_depth)
    if token_mask is None or self.is_initializing():  # creates all parameters
      deep, _ = blocks(shallow, c, places, None)
    else:
      kept = keep_tokens(shallow, token_mask)  # (B, K, D)
      if kept.shape[1] > 0:
        kept, _ = blocks(kept, c, look_up(places[0], token_mask.ids_keep), None)
      self.sow("intermediates", "deep_kept", kept)
      deep = restore_tokens(kept, mask_token, token_mask)
    if path_drop is not None:
      deep = jnp.where(path_drop[:, None, None], mask_token, deep)
    return deep

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    super().check()
    check_choice("mask_type", self.mask_type, MASK_TYPES)
    heads = self.num_heads
    self._require(
      "hidden_size",
      self.hidden_size % (4 * heads) == 0,
      f"must be divisible by 4 num_heads = {4 * heads}: rows and columns turn pairs of "
      "numbers of a head",
    )
    for name in ("encoder_depth", "decode_depth"):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    self._check_middle()

  def _check_middle(self) -> None:
    """Raises SettingError if there is no middle block.

    The error names a depth that is not the default, because the user chose that depth.
    """
    if self.middle_depth >= 1:
      return
    pair = ("encoder_depth", "decode_depth")
    for name, other in (pair, pair[::-1]):
      value, most = getattr(self, name), self.depth - getattr(self, other) - 1
      if value != getattr(SPRINT, name) and most >= 1:
        accepted = f"must lie in [1, depth - {other} - 1 = {most}]"
        raise SettingError(name, value, f"{accepted}, which leaves a middle block")
    outer = self.encoder_depth + self.decode_depth
    accepted = f"must be above encoder_depth + decode_depth = {outer}"
    raise SettingError(
      "depth", self.depth, f"{accepted}: the other blocks are the middle blocks"
    )


def rotations(grid_size: Size, head_width: int) -> Float[Array, "L 2 pairs"]:
  """Computes the rotation of each pair of numbers of a head, for each token (RoPE).

  The pair i < d / 4 turns by row theta_i, the pair d / 4 + i by column theta_i, with
  theta_i = 10000^(-2 i / (d / 2)) (arXiv 2104.09864, for two axes).

  Args:
    grid_size: tokens along each side, or (tokens of a column, tokens of a row).
    head_width: d, divisible by 4.

  Returns:
    (L, 2, d / 2) float32, cos and sin of the angles, of the tokens in row-major order.
  """
  height, width = height_width(grid_size)
  quarter = head_width // 4
  thetas = float(MAX_PERIOD) ** (-np.arange(quarter) / quarter)

  def waves(length: int) -> Float[np.ndarray, "length 2 quarter"]:
    angles = np.outer(np.arange(length), thetas)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

  shape = (height, width, 2, quarter)
  by_row = jnp.broadcast_to(waves(height)[:, None], shape)
  by_column = jnp.broadcast_to(waves(width), shape)
  both = jnp.concatenate([by_row, by_column], axis=-1)
  return both.reshape(height * width, 2, 2 * quarter)


# The backward pass recomputes the function, as it does `layers.modulated_norm`.
@jax.checkpoint
def norm_and_turn(
  x: Float[Array, "B K heads d"],
  scale: Float[Array, "d"],
  rotations: Float[Array, "#B K 2 _"],
) -> Float[Array, "B K heads d"]:
  """Applies RMSNorm to each head, then turns the pairs (2i, 2i + 1), in float32."""
  values = x.astype(jnp.float32)
  square = jnp.mean(values**2, axis=-1, keepdims=True)
  values = values * jax.lax.rsqrt(square + 1e-6) * scale
  a, b = jnp.unstack(values.reshape(*x.shape[:-1], -1, 2), axis=-1)  # (…, d / 2)
  cos, sin = jnp.unstack(rotations[:, :, None], axis=-2)  # (#B, K, 1, d / 2)
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


def structured_mask(
  noise: Float[Array, "B L"], grid_size: Size, side: int, kept: int
) -> TokenMask:
  """Returns the mask that keeps the tokens with the largest noise of each group.

  Args:
    noise: (B, L) noise of the tokens in row-major order.
    grid_size: tokens along each side, or (tokens of a column, tokens of a row).
    side: a group is a square of side x side tokens; divides the sides of the grid.
    kept: number of tokens that a group keeps.

  Returns:
    The mask. `ids_keep` lists the groups in row-major order; in a group, the token with
    the largest noise is the first. Removed tokens follow in row-major order.
  """
  rows, columns = (length // side for length in height_width(grid_size))

  def grouped(tokens: Array) -> Array:
    """(B, L) -> (B, groups, side side)."""
    tokens = tokens.reshape(-1, rows, side, columns, side)
    return tokens.swapaxes(2, 3).reshape(-1, rows * columns, side**2)

  def ungrouped(tokens: Array) -> Array:
    """(B, groups, side side) -> (B, L)."""
    tokens = tokens.reshape(-1, rows, columns, side, side)
    return tokens.swapaxes(2, 3).reshape(-1, noise.shape[1])

  order = jnp.argsort(-grouped(noise), axis=-1)  # places in a group
  rank = jnp.argsort(order, axis=-1)
  ids = grouped(jnp.arange(noise.shape[1])[None])  # (1, groups, side side)
  ids_keep = jnp.take_along_axis(ids, order[..., :kept], axis=-1)
  removed = ungrouped(rank >= kept)
  num_keep = rows * columns * kept
  first = kept * jnp.arange(rows * columns)[:, None]  # place of a group in `ids_keep`
  place = jnp.cumsum(removed, axis=1) - 1  # of a removed token
  return TokenMask(
    ids_keep=ids_keep.reshape(-1, num_keep),
    ids_restore=jnp.where(removed, num_keep + place, ungrouped(first + rank)),
    removed=removed,
  )


def forward_flops(model: SPRINT, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image; see `models.flops`.

  Args:
    model: the network.
    num_keep: number of tokens that the middle blocks see; 0 skips these blocks; None
      for all tokens.
  """
  length, width = model.num_tokens, model.hidden_size
  flops = mdt_flops.forward_flops(model) + 2 * length * 2 * width * width
  if num_keep is None:
    return flops
  saved = mdt_flops.block_flops(model, length)
  if num_keep > 0:
    saved -= mdt_flops.block_flops(model, num_keep)
  return flops - model.middle_depth * saved
