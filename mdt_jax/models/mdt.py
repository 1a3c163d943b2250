"""The networks MDT, MDTv2 (arXiv 2303.14389), DiT (arXiv 2212.09748) and SiT.

SiT (arXiv 2401.08740) is a DiT whose output is a velocity.

Letters in shapes: B samples; H, W, C height, width and channels of the latents; L
tokens of an image; K tokens that the encoder sees; D width of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.errors import check_choice
from mdt_jax.models import layers
from mdt_jax.models.attention import check_kernel
from mdt_jax.models.blocks import Block, FinalLayer
from mdt_jax.models.condition_layers import add_embedded
from mdt_jax.models.embeddings import (
  PatchEmbed,
  TimestepEmbed,
  num_relative_positions,
  relative_position_index,
  sincos_positions,
)
from mdt_jax.models.layers import normal_init
from mdt_jax.models.masking import TokenMask, keep_tokens, restore_tokens
from mdt_jax.models.network import Network
from mdt_jax.models.partitioning import gather, parameter_axes
from mdt_jax.sizes import Size, to_size
from mdt_jax.types import Array, Dtype

# The released bias tables have 3 extra rows, of BEiT's class token, that none reads.
UNUSED_BIAS_ROWS = 3


class MDT(Network, kw_only=True):
  """A diffusion transformer over latents, with masked latent modelling.

  MDT:   depth - decode_depth blocks process the kept tokens, the side-interpolater
         predicts the removed tokens, and decode_depth blocks process all tokens.
  MDTv2: as MDT, but the blocks on the kept tokens form a U-shape of in-blocks and
         out-blocks with long skips, and each decode block has a long skip from the
         embedded input.
  DiT:   depth plain blocks without position bias. The position embedding is frozen. A
         token mask is not accepted.
  SiT:   as DiT without learned variance. Its last layer has 2C channels, as in the
         released checkpoints; the output is the first C. Times lie in [0, 1].

  jax.jvp works only with forward_mode=True, because the gradients of products and
  attention are written by hand in reverse mode. With forward_mode=False, compute the
  forward derivative of f(x) along v by differentiating the pullback, which is linear:

    out, pull = jax.vjp(f, x)
    tangent = jax.vjp(pull, jnp.zeros_like(out))[1]((v,))[0]

  capture_intermediates=True captures the outputs of all blocks of a stack, stacked
  along axis 0. The output of a block is the first entry of the captured tuple:

    _, state = model.apply(
      {"params": params}, x, t, y, capture_intermediates=True, mutable=["intermediates"]
    )
    state["intermediates"]["decode_blocks"]["__call__"][0][0]  # (decode_depth, B, L, D)

  Attributes (in addition to those of `Network`):
    variant: "DiT", "SiT", "MDT" or "MDTv2".
    hidden_size: width D, divisible by num_heads and by 4.
    depth: number of blocks, without the side-interpolater.
    num_heads: number of attention heads.
    decode_depth: number of blocks after the side-interpolater; DiT and SiT ignore it.
    mlp_ratio: hidden width of the MLP divided by D.
    patch_bottleneck: R, width of a linear layer between a patch and the embedding of
      its token, for large patches of pixels; 0: none. See `PatchEmbed`.
    dtype: compute dtype. Parameters, softmax and LayerNorm are float32.
    remat: which activations the backward pass recomputes, a key of
      `layers.REMAT_POLICIES`. On CPUs, remat saves memory only if unroll is 1.
    forward_mode: whether jax.jvp can differentiate the network. Gradients are then
      slower; the output is the same.
    sow_attention: whether each attention layer sows its softmax weights
      "attention_weights" (B, heads, K, K) float32 into the collection "intermediates",
      if that collection is mutable. A stack adds a leading axis of blocks. The weights
      of all blocks are in memory at once.
    attention_kernel: "plain"; "cudnn" for the fused kernel of cuDNN on NVIDIA GPUs, in
      bfloat16; or "pallas" for a fused kernel on TPUs; see `models.attention`.
  """

  variant: str = "MDTv2"
  patch_size: int = 2
  hidden_size: int = 384
  depth: int = 12
  num_heads: int = 6
  decode_depth: int = 6
  mlp_ratio: float = 4.0
  patch_bottleneck: int = 0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  forward_mode: bool = False
  sow_attention: bool = False
  attention_kernel: str = "plain"

  variants: ClassVar[tuple[str, ...]] = ("DiT", "SiT", "MDT", "MDTv2")
  block_class: ClassVar[type[Block]] = Block
  has_pos_embed: ClassVar[bool] = True

  @property
  def grid_size(self) -> Size:
    """Tokens along each side of an image, or (tokens of a column, tokens of a row)."""
    height, width, _ = self.input_shape
    return to_size((height // self.patch_size, width // self.patch_size))

  @property
  def takes_mask(self) -> bool:
    """Whether the network has a side-interpolater, so that it accepts a token mask."""
    return self.variant in ("MDT", "MDTv2")

  @property
  def last_channels(self) -> int:
    """Channels of the last layer: `out_channels`; 2C for SiT, which ignores half."""
    return self.out_channels * (2 if self.variant == "SiT" else 1)

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of parameters that are not trained: the positions of DiT and SiT."""
    return () if self.takes_mask else ("pos_embed",)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts noise (or x0, or v) and, if learn_sigma is set, the variance.

    Args:
      x: (B, H, W, C) noisy latents of the size `input_size`.
      t: (B,) times, integer or float: in [0, T - 1] for a DDPM of T steps, in [0, 1]
        for a flow.
      y: (B, …) condition. By default integer labels (B,) in [0, num_classes);
        num_classes is the null label. Labels out of range do not raise an error: JAX
        clamps them to the rows of the label table. A label above num_classes acts as
        the null label if label_dropout > 0, else as the last class. -1 reads the last
        row as well. See `LabelEmbed`.
      token_mask: the tokens that the encoder sees; None for all. DiT and SiT accept
        only None.
      train: whether to drop conditions. Labels then need the random stream
        "label_dropout".

    Returns:
      (B, H, W, out_channels) float32.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape, or `token_mask` is given to DiT or SiT.
    """
    self.check()
    self.check_input(x)
    if token_mask is not None and not self.takes_mask:
      raise ValueError(
        f"{self.variant} has no side-interpolater: token_mask must be None"
      )

    embedded, c = self._embed(x, t, y, train)  # (B, L, D), (B, D)
    if not self.takes_mask:
      tokens, _ = self._blocks("blocks", self.depth)(embedded, c, None, None)
    else:
      index = jnp.asarray(relative_position_index(self.grid_size))[None]  # (1, L, L)
      tokens = self._encode(embedded, c, index, token_mask)  # (B, K, D)
      tokens = self._interpolate(tokens, c, index, token_mask)  # (B, L, D)
      tokens = self._decode(tokens, embedded, c, index)
    return self._output(tokens, c)

  def _embed(self, x: Array, t: Array, y: Array, train: bool) -> tuple[Array, Any]:
    """Returns the tokens (B, L, D) of images, and the conditioning c (B, D).

    If the condition has tokens, c is `Embedded`, which also holds these.
    """
    width, dtype = self.hidden_size, self.dtype
    options = dict(dtype=dtype, forward_mode=self.forward_mode)
    sizes = self.patch_size, width, self.patch_bottleneck
    patch_embed = PatchEmbed(*sizes, **options, name="patch_embed")
    embedded = patch_embed(x.astype(dtype))  # (B, L, D)
    if self.has_pos_embed:
      embedded = embedded + self._positions("pos_embed")
    c = TimestepEmbed(width, **options, name="timestep_embed")(t)
    y_embedded = self.conditioning.embedder(width, dtype)(y, train)
    return embedded, add_embedded(c, y_embedded)

  def _output(
    self, tokens: Array, c: Array, token_mask: TokenMask | None = None
  ) -> Array:
    """Maps the last tokens to the output (B, H, W, out_channels).

    Args:
      tokens: (B, L, D); with a token mask, (B, K, D), the kept tokens.
      c: (B, D).
      token_mask: positions of the kept tokens; the output of the removed ones is 0.
    """
    options = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    sizes = self.patch_size, self.last_channels, self.grid_size
    final_layer = FinalLayer(*sizes, **options, name="final_layer")
    output = final_layer(tokens, c, token_mask)  # (B, H, W, last_channels)
    output = output.astype(jnp.float32)
    return output if self.variant != "SiT" else output[..., : self.out_channels]

  def _encode(
    self, tokens: Array, c: Array, index: Array, token_mask: TokenMask | None
  ) -> Array:
    """Runs the blocks that see only the kept tokens: (B, L, D) -> (B, K, D)."""
    if token_mask is not None:
      tokens = keep_tokens(tokens, token_mask)  # (B, K, D)
      ids = token_mask.ids_keep
      index = index[0][ids[:, :, None], ids[:, None, :]]  # (B, K, K)
    length = self.depth - self.decode_depth
    if length == 0:
      return tokens
    if self.variant == "MDT":
      return self._blocks("blocks", length)(tokens, c, index, None)[0]
    in_blocks = self._blocks("in_blocks", length // 2, emit=True)
    tokens, skips = in_blocks(tokens, c, index, None)  # skips: (length / 2, B, K, D)
    assert skips is not None
    # The last skip joins the first out-block.
    out_blocks = self._blocks("out_blocks", length // 2, one_skip_a_block=True)
    return out_blocks(tokens, c, index, skips[::-1])[0]

  def _interpolate(
    self, tokens: Array, c: Array, index: Array, token_mask: TokenMask | None
  ) -> Array:
    """Predicts the removed tokens by the side-interpolater: (B, K, D) -> (B, L, D)."""
    # Keep this order: flax derives the random key of mask_token from the number of
    # parameters created before.
    positions = self._positions("decode_pos_embed")
    mask_token = self.param("mask_token", normal_init, (self.hidden_size,), jnp.float32)
    side_block = Block(**self._block_attributes(), name="side_block")
    if token_mask is None:
      if self.is_initializing():  # creates the parameters of the side block
        side_block(tokens, c, index)
      return tokens + positions
    tokens = restore_tokens(tokens, mask_token, token_mask) + positions
    predicted, _ = side_block(tokens, c, index)
    return jnp.where(token_mask.removed[..., None], predicted, tokens)

  def _decode(self, tokens: Array, embedded: Array, c: Array, index: Array) -> Array:
    """Runs the blocks that see all tokens: (B, L, D) -> (B, L, D)."""
    skip = embedded if self.variant == "MDTv2" else None
    return self._blocks("decode_blocks", self.decode_depth)(tokens, c, index, skip)[0]

  def _positions(self, name: str, width: int | None = None) -> Float[Array, "L width"]:
    """Creates the position parameter `name`, initialised to sin-cos positions."""
    start = sincos_positions(width or self.hidden_size, self.grid_size)
    param = self.param(name, lambda key: jnp.asarray(start))
    return gather(param.astype(self.dtype), parameter_axes(name))

  def _blocks(
    self, name: str, length: int, **options: Any
  ) -> Callable[..., tuple[Array, Array | None]]:
    """Builds a sequence of `length` blocks; see `layers.stack`."""
    return layers.stack(
      self.block_class,
      length,
      name=name,
      remat=self.remat,
      unroll=self.unroll,
      **{**self._block_attributes(), **options},
    )

  def _block_attributes(self) -> dict[str, Any]:
    """Returns the attributes that all blocks share."""
    rows = num_relative_positions(self.grid_size) + UNUSED_BIAS_ROWS
    return dict(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      bias_rows=rows if self.takes_mask else 0,
      dtype=self.dtype,
      forward_mode=self.forward_mode,
      sow_attention=self.sow_attention,
      attention_kernel=self.attention_kernel,
    )

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    check_choice("variant", self.variant, self.variants)
    check_choice("remat", self.remat, layers.REMAT_POLICIES)
    super().check()
    self._require(
      "learn_sigma",
      self.variant != "SiT" or not self.learn_sigma,
      "must be False for SiT, which has no learned variance: use the process flow, or "
      "a variance of fixed_small or fixed_large",
    )
    for name in ("hidden_size", "depth", "num_heads"):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    heads, depth = self.num_heads, self.depth
    self._require(
      "hidden_size",
      self.hidden_size % heads == 0 and self.hidden_size % 4 == 0,
      f"must be divisible by num_heads = {heads} and by 4",
    )
    check_kernel(self.attention_kernel, self.dtype, self.hidden_size // heads)
    if self.attention_kernel != "plain":
      accepted = "has no forward mode: use plain"
      self._require("attention_kernel", not self.forward_mode, accepted)
    holds = self.patch_bottleneck >= 0
    self._require("patch_bottleneck", holds, "must be at least 0")
    holds = self.mlp_ratio * self.hidden_size >= 1
    self._require("mlp_ratio", holds, "must be above 0")
    if self.variant in ("MDT", "MDTv2"):
      holds = 1 <= self.decode_depth <= depth
      self._require("decode_depth", holds, f"must lie in [1, depth = {depth}]")
    if self.variant == "MDTv2":
      self._require(
        "decode_depth",
        (depth - self.decode_depth) % 2 == 0,
        f"depth - decode_depth must be even for MDTv2 (depth = {depth}): "
        "in-blocks and out-blocks come in pairs",
      )
