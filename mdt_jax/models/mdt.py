"""The Masked Diffusion Transformer (arXiv 2303.14389), v1 and v2, and DiT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models.blocks import (
  UNUSED_BIAS_ROWS,
  Block,
  FinalLayer,
  relative_position_index,
)
from mdt_jax.models.embeddings import (
  LabelEmbed,
  PatchEmbed,
  TimestepEmbed,
  normal_init,
  sincos_positions,
)
from mdt_jax.models.masking import TokenMask, keep_tokens, restore_tokens
from mdt_jax.models.partitioning import gather, parameter_axes

Array = jax.Array
Dtype = Any

VARIANTS = ("DiT", "MDT", "MDTv2")
REMAT_POLICIES = {
  "none": None,  # keep every activation
  "full": jax.checkpoint_policies.nothing_saveable,  # keep each block's input
  "dots": jax.checkpoint_policies.checkpoint_dots,  # keep matrix products
}


class MDT(nn.Module):
  """A diffusion transformer over latents, with masked latent modelling.

  MDT:   depth - decode_depth blocks on the kept tokens, then the side-interpolater
         predicts the removed ones, then decode_depth blocks on all tokens.
  MDTv2: the first part is a U-shape of in-blocks and out-blocks joined by long
         skips, and each decode block is joined with the embedded input.
  DiT:   depth plain blocks, no position bias, frozen positions; it takes no mask.

  Gradients of products and attention are written out in reverse mode, so jax.jvp has no
  rule for them. As they are linear in what they pull back, their own gradient is the
  derivative forwards, along v, of f(x):

    out, pull = jax.vjp(f, x)
    tangent = jax.vjp(pull, jnp.zeros_like(out))[1]((v,))[0]

  Attributes:
    variant: "DiT", "MDT" or "MDTv2".
    input_size: height and width of the input, divisible by patch_size.
    patch_size: side of a patch.
    in_channels: channels of the input, C.
    num_classes: classes; `num_classes` itself is the null label.
    hidden_size: width D, divisible by num_heads and by 4.
    depth: blocks, without the side block.
    num_heads: attention heads.
    decode_depth: blocks after the side-interpolater; of MDT variants.
    mlp_ratio: hidden width of the MLP over D.
    label_dropout: share of labels dropped in training, for guidance.
    learn_sigma: 2C output channels, the second half for the variance.
    dtype: compute type; parameters, softmax and LayerNorm stay float32.
    remat: "none", "full" or "dots": which activations are computed again. On CPUs
      it saves memory only where unroll is 1.
    unroll: blocks of a stack compiled one after another in each turn of the loop;
      -1 for all (faster on CPUs, longer to compile).
  """

  variant: str = "MDTv2"
  input_size: int = 32
  patch_size: int = 2
  in_channels: int = 4
  num_classes: int = 1000
  hidden_size: int = 384
  depth: int = 12
  num_heads: int = 6
  decode_depth: int = 6
  mlp_ratio: float = 4.0
  label_dropout: float = 0.1
  learn_sigma: bool = True
  dtype: Dtype = jnp.float32
  remat: str = "none"
  unroll: int = 1

  @property
  def num_tokens(self) -> int:
    """L, tokens of one image."""
    return (self.input_size // self.patch_size) ** 2

  @property
  def out_channels(self) -> int:
    return self.in_channels * (2 if self.learn_sigma else 1)

  @property
  def takes_mask(self) -> bool:
    """Whether there is a side-interpolater to predict removed tokens."""
    return self.variant != "DiT"

  @property
  def frozen(self) -> tuple[str, ...]:
    """Parameters that are not trained: the positions of DiT."""
    return () if self.takes_mask else ("pos_embed",)

  def check(self) -> None:
    """Raises SettingError where the attributes cannot make a network."""
    check_choice("variant", self.variant, VARIANTS)
    check_choice("remat", self.remat, REMAT_POLICIES)
    positive = "input_size patch_size in_channels num_classes hidden_size depth"
    for name in (*positive.split(), "num_heads"):
      if getattr(self, name) < 1:
        raise SettingError(name, getattr(self, name), "must be at least 1")
    if self.input_size % self.patch_size:
      raise SettingError(
        "input_size",
        self.input_size,
        f"must be divisible by patch_size = {self.patch_size}",
      )
    if self.hidden_size % self.num_heads or self.hidden_size % 4:
      raise SettingError(
        "hidden_size",
        self.hidden_size,
        f"must be divisible by num_heads = {self.num_heads} and by 4",
      )
    if not self.mlp_ratio * self.hidden_size >= 1:
      raise SettingError("mlp_ratio", self.mlp_ratio, "must be above 0")
    if not 0 <= self.label_dropout < 1:
      raise SettingError("label_dropout", self.label_dropout, "must lie in [0, 1)")
    if self.unroll < -1 or self.unroll == 0:
      raise SettingError("unroll", self.unroll, "must be -1 (all) or at least 1")
    if self.takes_mask and not 1 <= self.decode_depth <= self.depth:
      raise SettingError(
        "decode_depth", self.decode_depth, f"must lie in [1, depth = {self.depth}]"
      )
    if self.variant == "MDTv2" and (self.depth - self.decode_depth) % 2:
      raise SettingError(
        "decode_depth",
        self.decode_depth,
        f"depth - decode_depth must be even for MDTv2 (depth = {self.depth}): "
        "in-blocks and out-blocks come in pairs",
      )

  def stack(
    self, name: str, length: int, *, emit: bool = False, skips: str = "none"
  ) -> Callable[..., tuple[Array, Array | None]]:
    """`length` blocks in a row, their parameters stacked along axis 0.

    Args:
      name: of the parameters.
      length: number of blocks.
      emit: return every block's output, stacked (length, B, K, D).
      skips: "none"; "each": one skip a block, (length, B, K, D); "shared": the same
        (B, K, D) for every block.
    """
    block = Block
    if REMAT_POLICIES[self.remat] is not None:
      # A rolled scan keeps XLA from merging the two computations by itself.
      block = nn.remat(
        Block, policy=REMAT_POLICIES[self.remat], prevent_cse=self.unroll != 1
      )
    scanned = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, 0 if skips == "each" else nn.broadcast),
      length=length,
      unroll=length if self.unroll == -1 else min(self.unroll, length),
    )
    return scanned(
      **self._block_settings(), long_skip=skips != "none", emit=emit, name=name
    )

  def _block_settings(self) -> dict[str, Any]:
    grid = self.input_size // self.patch_size
    bias_rows = (2 * grid - 1) ** 2 + UNUSED_BIAS_ROWS if self.takes_mask else 0
    return dict(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      bias_rows=bias_rows,
      dtype=self.dtype,
    )

  @nn.compact
  def __call__(
    self,
    x: Array,
    t: Array,
    y: Array,
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Array:
    """Predicts the noise (or x0, or v), and the variance where learn_sigma is set.

    Args:
      x: (B, H, W, C) noisy latents.
      t: (B,) timesteps in the original 0 … T-1, integer or not.
      y: (B,) integer labels; num_classes is the null label.
      token_mask: which tokens the encoder sees; None for all. Not for DiT.
      train: drop labels, with the random stream "label_dropout".

    Returns:
      (B, H, W, out_channels) float32.
    """
    self.check()
    if token_mask is not None and not self.takes_mask:
      raise ValueError("DiT has no side-interpolater: token_mask must be None")
    positions = sincos_positions(self.hidden_size, self.input_size // self.patch_size)

    def position_param(name: str) -> Array:
      param = self.param(name, lambda key: jnp.asarray(positions))
      return gather(param.astype(self.dtype), parameter_axes(name))

    tokens = PatchEmbed(
      self.patch_size, self.hidden_size, self.dtype, name="patch_embed"
    )(x.astype(self.dtype))
    tokens = tokens + position_param("pos_embed")
    c = TimestepEmbed(self.hidden_size, self.dtype, name="timestep_embed")(t)
    c = c + LabelEmbed(
      self.num_classes,
      self.hidden_size,
      self.label_dropout,
      self.dtype,
      name="label_embed",
    )(y, train)

    if self.variant == "DiT":
      tokens, _ = self.stack("blocks", self.depth)(tokens, c, None, None)
    else:
      # The index of every pair of tokens, and of the kept ones.
      index = relative_position_index(self.input_size // self.patch_size)
      all_pairs = jnp.asarray(index)[None]
      encoded = self._encode(tokens, c, all_pairs, token_mask)
      full = self._interpolate(
        encoded, c, all_pairs, token_mask, position_param("decode_pos_embed")
      )
      tokens = self._decode(full, tokens, c, all_pairs)
    out = FinalLayer(
      self.patch_size, self.out_channels, self.dtype, name="final_layer"
    )(tokens, c)
    return out.astype(jnp.float32)

  def _encode(
    self, tokens: Array, c: Array, index: Array, token_mask: TokenMask | None
  ) -> Array:
    """The blocks that see the kept tokens only: (B, L, D) -> (B, K, D)."""
    if token_mask is not None:
      tokens = keep_tokens(tokens, token_mask)
      ids = token_mask.ids_keep
      index = index[0][ids[:, :, None], ids[:, None, :]]
    length = self.depth - self.decode_depth
    if length == 0:
      return tokens
    if self.variant == "MDT":
      return self.stack("blocks", length)(tokens, c, index, None)[0]
    in_blocks = self.stack("in_blocks", length // 2, emit=True)
    tokens, skips = in_blocks(tokens, c, index, None)
    # Last in, first out.
    out_blocks = self.stack("out_blocks", length // 2, skips="each")
    return out_blocks(tokens, c, index, skips[::-1])[0]

  def _interpolate(
    self,
    tokens: Array,
    c: Array,
    index: Array,
    token_mask: TokenMask | None,
    positions: Array,
  ) -> Array:
    """The side-interpolater: fills in the removed tokens, (B, K, D) -> (B, L, D)."""
    mask_token = self.param("mask_token", normal_init, (self.hidden_size,), jnp.float32)
    side_block = Block(**self._block_settings(), name="side_block")
    if token_mask is None:
      if self.is_initializing():  # the parameters exist with and without a mask
        side_block(tokens, c, index)
      return tokens + positions
    tokens = restore_tokens(tokens, mask_token, token_mask) + positions
    predicted, _ = side_block(tokens, c, index)
    return jnp.where(token_mask.removed[..., None], predicted, tokens)

  def _decode(self, tokens: Array, embedded: Array, c: Array, index: Array) -> Array:
    """The blocks that see all tokens."""
    if self.variant == "MDT":
      blocks = self.stack("decode_blocks", self.decode_depth)
      return blocks(tokens, c, index, None)[0]
    blocks = self.stack("decode_blocks", self.decode_depth, skips="shared")
    return blocks(tokens, c, index, embedded)[0]
