"""The network MaskDiT (arXiv 2306.09305): DiT on the kept tokens, and a light decoder.

The source is Anima-Lab/MaskDiT (models/maskdit.py). Letters in shapes: see
`models.mdt`; E is the width of the decoder.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.models import mdt_flops
from mdt_jax.models.attention import check_kernel
from mdt_jax.models.blocks import Modulation
from mdt_jax.models.layers import linear, modulated_norm, normal_init
from mdt_jax.models.masking import TokenMask, keep_tokens, restore_tokens
from mdt_jax.models.mdt import MDT
from mdt_jax.types import Array, Dtype


class DecoderLayer(nn.Module):
  """Maps tokens of the encoder to the width of the decoder: adaLN, then linear.

  The linear layer starts at zero, as in the released code.

  Attributes:
    width: E.
    dtype, forward_mode: see `MDT`.
  """

  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], c: Float[Array, "B D"]
  ) -> Float[Array, "B K E"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    modulation = Modulation(2, x.shape[-1], **options, name="modulation")
    shift, scale = modulation(c)  # each (B, D)
    return linear(
      self.width,
      "linear",
      path="decoder_layer/",
      kernel_init=nn.initializers.zeros,
      **options,
    )(modulated_norm(x, shift, scale))


class MaskDiT(MDT, kw_only=True):
  """DiT whose blocks see only the kept tokens, and a decoder that sees all tokens.

  The encoder, `depth` blocks of DiT, sees the kept tokens of a token mask. A linear
  layer maps them to the width of the decoder. A learned mask token takes the places of
  the removed tokens, and the decoder, `decode_depth` blocks, predicts all tokens. The
  modulation of the decoder comes from the conditioning of the encoder. Both position
  embeddings are frozen. The null label is the zero vector. The variance is not learned
  unless learn_sigma is set.

  In the released code, a mask has an effect only in training; here it has one wherever
  it is given. Released variants with a class token or features of another network are
  not supported.

  Attributes (in addition to those of `MDT`):
    depth: number of blocks of the encoder.
    decode_depth: number of blocks of the decoder.
    decoder_hidden_size: E, width of the decoder, divisible by decoder_num_heads and by
      4.
    decoder_num_heads: number of attention heads of the decoder.
  """

  variant: str = "MaskDiT"
  learn_sigma: bool = False
  decode_depth: int = 8
  decoder_hidden_size: int = 512
  decoder_num_heads: int = 16

  variants: ClassVar[tuple[str, ...]] = ("MaskDiT",)
  null_label: ClassVar[str] = "zero"

  @property
  def takes_mask(self) -> bool:
    return True

  @property
  def default_objective(self) -> str:
    return "maskdit"

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of parameters that are not trained: the positions."""
    return ("pos_embed", "decode_pos_embed")

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts what the process trains: EDM's F, a velocity, v or x0.

    Args:
      x, t, y, train: see `MDT`. The released networks receive ln(sigma) / 4 of EDM as
        t.
      token_mask: the tokens that the encoder sees; None for all.

    Returns:
      (B, H, W, out_channels) float32. With a mask, the output does not depend on the
      removed tokens of x.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape.
    """
    self.check()
    self.check_input(x)
    width = self.decoder_hidden_size
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    tokens, c = self._embed(x, t, y, train)  # (B, L, D), (B, D)
    if token_mask is not None:
      tokens = keep_tokens(tokens, token_mask)  # (B, K, D)
    tokens, _ = self._blocks("blocks", self.depth)(tokens, c, None, None)
    tokens = DecoderLayer(width, **options, name="decoder_layer")(tokens, c)

    # (B, K, E) -> (B, L, E)
    mask_token = self.param("mask_token", normal_init, (width,), jnp.float32)
    if token_mask is not None:
      tokens = restore_tokens(tokens, mask_token, token_mask)
    tokens = tokens + self._positions("decode_pos_embed", width)
    decode = self._blocks(
      "decode_blocks", self.decode_depth, num_heads=self.decoder_num_heads
    )
    tokens, _ = decode(tokens, c, None, None)
    return self._output(tokens, c)

  def _block_attributes(self) -> dict[str, Any]:
    """Returns the attributes of blocks: those of DiT, without a position bias."""
    return {**super()._block_attributes(), "bias_rows": 0}

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    super().check()
    for name in ("decode_depth", "decoder_hidden_size", "decoder_num_heads"):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    width, heads = self.decoder_hidden_size, self.decoder_num_heads
    self._require(
      "decoder_hidden_size",
      width % heads == 0 and width % 4 == 0,
      f"must be divisible by decoder_num_heads = {heads} and by 4",
    )
    check_kernel(self.attention_kernel, self.dtype, width // heads)
    holds = self.mlp_ratio * width >= 1
    self._require("mlp_ratio", holds, "must be above 0")


def forward_flops(model: MaskDiT, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image; see `models.flops`.

  Args:
    model: the network.
    num_keep: number of tokens that the encoder sees; None for all.
  """
  length, width = model.num_tokens, model.hidden_size
  kept, inner = num_keep or length, model.decoder_hidden_size
  flops = mdt_flops.embedding_flops(model)
  flops += model.depth * mdt_flops.block_flops(model, kept)
  flops += 2 * width * 2 * width + 2 * kept * width * inner  # decoder layer
  flops += model.decode_depth * mdt_flops.block_flops(model, length, inner)
  return flops + mdt_flops.final_layer_flops(model, inner)
