"""The network of MicroDiT (arXiv 2407.15811): a DiT that masks after a patch mixer.

The released network (SonyResearch/micro_diffusion) reads captions; this one applies its
method, deferred masking, to the blocks of DiT and reads class labels. Letters in
shapes: see `models.mdt`; M is the width of the mixer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.models import mdt_flops
from mdt_jax.models.attention import check_kernel
from mdt_jax.models.layers import linear, scaled_norm
from mdt_jax.models.masking import TokenMask, keep_tokens
from mdt_jax.models.mdt import MDT
from mdt_jax.types import Array, Dtype


class WidthMap(nn.Module):
  """Maps tokens to another width: LayerNorm with weights, then a linear layer.

  Attributes:
    width: width of the output.
    use_bias: whether the linear layer adds a bias.
    dtype, forward_mode: see `MDT`.
  """

  width: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K width"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    options |= dict(path=f"{self.name}/", use_bias=self.use_bias)
    x = scaled_norm("norm", self.dtype)(x)
    return linear(self.width, "linear", **options)(x)


class MicroDiT(MDT, kw_only=True):
  """DiT in which a patch mixer sees all tokens, and the blocks see only kept ones.

  The mixer, a few blocks of its own, writes what the removed tokens show into the kept
  ones. With a token mask, the blocks and the last layer see the kept tokens, in the
  order of `ids_keep`, and the output of the removed tokens is 0: nothing predicts them.
  Without a token mask, as in sampling, the mixer runs too, and all blocks see all
  tokens. The variance is not learned unless learn_sigma is set.

  If the mixer has another width than the blocks, a LayerNorm and a linear layer map all
  tokens to its width, and the kept tokens back. All blocks are modulated by the same c
  (B, D). The release also has cross-attention to captions, SwiGLU, experts and blocks
  of rising width: these are parts of its network and not of the method.

  "tokens_mixed" (B, L, M) and "tokens_into_backbone" (B, K, D) are sown into the
  collection "intermediates".

  Attributes (in addition to those of `MDT`):
    mixer_depth: number of blocks of the mixer.
    mixer_hidden_size: M, divisible by mixer_num_heads; None for hidden_size.
    mixer_num_heads: number of heads of a block of the mixer; None for heads of the size
      that those of the other blocks have.
  """

  variant: str = "MicroDiT"
  learn_sigma: bool = False
  mixer_depth: int = 3
  mixer_hidden_size: int | None = None
  mixer_num_heads: int | None = None

  variants: ClassVar[tuple[str, ...]] = ("MicroDiT",)

  @property
  def defers_mask(self) -> bool:
    return True

  @property
  def default_objective(self) -> str:
    return "microdit"

  @property
  def mixer_width(self) -> int:
    """M, width of the tokens inside the mixer."""
    width = self.mixer_hidden_size
    return self.hidden_size if width is None else width

  @property
  def mixer_heads(self) -> int:
    """Number of heads of a block of the mixer."""
    if self.mixer_num_heads is not None:
      return self.mixer_num_heads
    return self.mixer_width * self.num_heads // self.hidden_size

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts what the process trains: noise, a velocity, or EDM's F.

    Args:
      x, t, y, train: see `MDT`. The released networks receive ln(sigma) / 4 of EDM as
        t.
      token_mask: the tokens that the blocks after the mixer see; None for all.

    Returns:
      (B, H, W, out_channels) float32; 0 at the removed tokens.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape.
    """
    self.check()
    self.check_input(x)
    options = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    needs_maps = self.mixer_width != self.hidden_size
    tokens, c = self._embed(x, t, y, train)  # (B, L, D), (B, D)
    if needs_maps:
      tokens = WidthMap(self.mixer_width, **options, name="mixer_in")(tokens)
    heads = {"num_heads": self.mixer_heads}
    mixer = self._blocks("mixer_blocks", self.mixer_depth, **heads)
    tokens, _ = mixer(tokens, c, None, None)  # (B, L, M)
    self.sow("intermediates", "tokens_mixed", tokens)
    if token_mask is not None:
      tokens = keep_tokens(tokens, token_mask)  # (B, K, M)
    if needs_maps:
      tokens = WidthMap(self.hidden_size, **options, name="mixer_out")(tokens)
    self.sow("intermediates", "tokens_into_backbone", tokens)  # (B, K, D)
    tokens, _ = self._blocks("blocks", self.depth)(tokens, c, None, None)
    return self._output(tokens, c, token_mask)

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    super().check()
    for name in ("mixer_depth", "mixer_hidden_size", "mixer_num_heads"):
      value = getattr(self, name)
      self._require(name, value is None or value >= 1, "must be at least 1")
    width, heads = self.mixer_width, self.mixer_num_heads
    if heads is None:
      size = self.hidden_size // self.num_heads
      accepted = (
        f"must be divisible by hidden_size / num_heads = {size}, the size of a head, "
        "unless mixer_num_heads is given"
      )
      self._require("mixer_hidden_size", width % size == 0, accepted)
    else:
      accepted = f"must divide the width of the mixer, {width}"
      self._require("mixer_num_heads", width % heads == 0, accepted)
      check_kernel(self.attention_kernel, self.dtype, width // heads)


def forward_flops(model: MicroDiT, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image; see `models.flops`.

  Args:
    model: the network.
    num_keep: number of tokens that the blocks after the mixer see; None for all.
  """
  length, width, mixer = model.num_tokens, model.hidden_size, model.mixer_width
  kept = length if num_keep is None else num_keep
  flops = mdt_flops.forward_flops(model)
  of_all, of_kept = (mdt_flops.block_flops(model, count) for count in (length, kept))
  flops -= model.depth * (of_all - of_kept)
  flops -= 2 * (length - kept) * width * model.patch_size**2 * model.last_channels
  flops += model.mixer_depth * mdt_flops.block_flops(model, length, mixer)
  if mixer != width:
    flops += 2 * (length + kept) * width * mixer
  return flops
