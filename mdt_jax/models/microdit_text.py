"""The released network of MicroDiT (arXiv 2407.15811), which reads captions.

The source is SonyResearch/micro_diffusion. `models.microdit` is its method on DiT and
class labels. Letters in shapes: B samples; H, W, C height, width and channels of the
latents; L tokens of an image, of which blocks after the mixer see K; S tokens of a
caption; V channels of its embedding; D width of the network; M width of the mixer.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from mdt_jax.errors import check_choice
from mdt_jax.models import layers
from mdt_jax.models.conditions import CaptionCondition
from mdt_jax.models.embeddings import CaptionMlp, PatchEmbed, sincos_positions
from mdt_jax.models.masking import TokenMask, keep_tokens
from mdt_jax.models.microdit import WidthMap
from mdt_jax.models.microdit_text_blocks import (
  CaptionBlock,
  TextBlock,
  TextFinalLayer,
  TimestepEmbed,
)
from mdt_jax.models.network import Network
from mdt_jax.models.partitioning import gather, parameter_axes
from mdt_jax.sizes import Size, to_size
from mdt_jax.types import Array, Dtype

EXPERTS_EVERY = 2  # blocks 1, 3, … have experts


def multiple_above(number: int, multiple: int) -> int:
  """Returns the smallest multiple that is at least `number`."""
  return multiple * math.ceil(number / multiple)


def rising_widths(
  hidden_size: int,
  depth: int,
  *,
  head_size: int = 64,
  multiple: int = 256,
  attention_ratios: tuple[float, float] = (0.5, 1.0),
  mlp_ratios: tuple[float, float] = (0.5, 4.0),
) -> dict[str, tuple[int, ...]]:
  """Computes the widths of the released blocks, whose ratios rise linearly.

  Args:
    hidden_size: D.
    depth: number of blocks.
    head_size: width of a head.
    multiple: widths of feed-forward layers are multiples of this number.
    attention_ratios, mlp_ratios: of the first and of the last block, relative to D.

  Returns:
    `attention_widths` and `mlp_widths` of `MicroDiTText`.
  """
  attention_widths = tuple(
    hidden_size if q == 1 else multiple_above(int(hidden_size * q), 2 * head_size)
    for q in np.linspace(*attention_ratios, depth)
  )
  mlp_widths = tuple(
    mlp_width(hidden_size, r, multiple, has_experts(i, depth))
    for i, r in enumerate(np.linspace(*mlp_ratios, depth))
  )
  return {"attention_widths": attention_widths, "mlp_widths": mlp_widths}


def mlp_width(hidden_size: int, ratio: float, multiple: int, experts: bool) -> int:
  """Returns the hidden width of an expert or of SwiGLU.

  SwiGLU has three matrices and an expert has two, so SwiGLU has 2/3 of the width.
  """
  width = int(hidden_size * ratio)
  return multiple_above(width if experts else int(2 * width / 3), multiple)


def has_experts(index: int, depth: int) -> bool:
  """Whether a block of a released network has experts: 1, 3, …, but not the last."""
  return index % EXPERTS_EVERY == EXPERTS_EVERY - 1 and index < depth - 1


class MicroDiTText(Network, kw_only=True):
  """The released MicroDiT: captions in, a patch mixer, then a mask, then the blocks.

  The mixer sees all tokens. With a token mask, the other blocks and the last layer see
  only the kept tokens, in the order of `ids_keep`. The mixer runs in sampling too. Each
  block attends to the caption, and the mean of the caption's tokens enters by adaLN.
  Blocks differ in width, so they are modules block_0, block_1, … instead of one stack,
  and `unroll` has no effect. Parameters start with the initial values of DiT, which are
  not the released ones.

  The parameter `mask_token` (p p C) fills the output at removed tokens. In the released
  network it is a buffer of zeros: it is not trained, and no loss reads it.

  "tokens_mixed" (B, L, M) and "tokens_into_backbone" (B, K, D) are sown into the
  collection "intermediates".

  Attributes (in addition to those of `Network`):
    caption_length: S, number of tokens of a caption when parameters are initialised and
      FLOPs are counted. The network accepts captions of any length.
    caption_channels: V.
    hidden_size: D, divisible by num_heads and by 4.
    num_heads: number of heads of an attention over the whole width D. Each head of the
      network has the width D / num_heads.
    attention_widths: total width of the heads in the self-attention of each block,
      divisible by the width of a head.
    mlp_widths: hidden width of the feed-forward layers of each block.
    mixer_hidden_size: M, divisible by the width of a head.
    mixer_mlp_widths: hidden width of the feed-forward layers of each block of the
      mixer.
    caption_mlp_width: hidden width of the feed-forward layer of the block on captions.
    num_experts: number of experts in blocks 1, 3, … except the last block, and in
      blocks 1, 3, … of the mixer; 0: no block has experts.
    expert_capacity: see `Experts.capacity`; at most num_experts.
    dtype, remat, forward_mode: see `MDT`.
  """

  variant: str = "MicroDiTText"
  patch_size: int = 2
  learn_sigma: bool = False
  caption_length: int = 77
  caption_channels: int = 1024
  hidden_size: int = 1024
  num_heads: int = 16
  attention_widths: tuple[int, ...] = ()
  mlp_widths: tuple[int, ...] = ()
  mixer_hidden_size: int = 768
  mixer_mlp_widths: tuple[int, ...] = ()
  caption_mlp_width: int = 2816
  num_experts: int = 8
  expert_capacity: float = 2.0
  dtype: Dtype = jnp.float32
  remat: str = "none"
  forward_mode: bool = False

  variants: ClassVar[tuple[str, ...]] = ("MicroDiTText",)

  @property
  def defers_mask(self) -> bool:
    return True

  @property
  def default_objective(self) -> str:
    return "microdit"

  @property
  def frozen(self) -> tuple[str, ...]:
    """The position embedding, and the mask token."""
    return ("pos_embed", "mask_token")

  @property
  def conditioning(self) -> CaptionCondition:
    """Captions; `condition` must be None."""
    return CaptionCondition(
      self.caption_length, self.caption_channels, self.label_dropout
    )

  @property
  def depth(self) -> int:
    """Number of blocks after the mixer."""
    return len(self.mlp_widths)

  @property
  def mixer_depth(self) -> int:
    """Number of blocks of the mixer."""
    return len(self.mixer_mlp_widths)

  @property
  def head_size(self) -> int:
    """Width of a head."""
    return self.hidden_size // self.num_heads

  @property
  def grid_size(self) -> Size:
    """Tokens along each side of an image, or (tokens of a column, tokens of a row)."""
    height, width, _ = self.input_shape
    return to_size((height // self.patch_size, width // self.patch_size))

  def experts_of(self, index: int, mixer: bool = False) -> int:
    """Returns the number of experts of a block, of the mixer or after the mixer."""
    depth = self.mixer_depth + 1 if mixer else self.depth
    return self.num_experts if has_experts(index, depth) else 0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Float[Array, "B S V"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts what the process trains; F of EDM in the released runs.

    Args:
      x: (B, H, W, C) noisy latents of the size `input_size`.
      t: (B,) times; ln(sigma) / 4 of EDM in the released runs.
      y: (B, S, V) embeddings of the tokens of captions; zeros are the null caption.
      token_mask: the tokens that the blocks after the mixer see; None for all.
      train: whether to drop captions, with the random stream "label_dropout".

    Returns:
      (B, H, W, out_channels) float32; `mask_token` at the removed tokens.

    Raises:
      SettingError: an attribute is invalid.
      ValueError: `x` has another shape.
    """
    self.check()
    self.check_input(x)
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    dim, mixer_dim = self.hidden_size, self.mixer_hidden_size
    needs_maps = mixer_dim != dim
    width_map = dict(**options, use_bias=False)

    patch_embed = PatchEmbed(self.patch_size, dim, **options, name="patch_embed")
    start = jnp.asarray(sincos_positions(dim, self.grid_size))
    positions = jnp.asarray(self.param("pos_embed", lambda key: start), self.dtype)
    positions = gather(positions, parameter_axes("pos_embed"))
    tokens = patch_embed(x.astype(self.dtype)) + positions  # (B, L, D)
    size = self.patch_size**2 * self.out_channels
    mask_token = self.param("mask_token", nn.initializers.zeros, (size,), jnp.float32)

    if train and self.label_dropout > 0:
      y = self.conditioning.drop(self.make_rng("label_dropout"), y, 1)[:, 0]
    y = CaptionMlp(dim, **options, name="caption_embed")(y.astype(self.dtype))
    sizes = self.caption_mlp_width, self.head_size
    y = CaptionBlock(*sizes, **options, name="caption_block")(y)  # (B, S, D)
    c = TimestepEmbed(dim, **options, name="timestep_embed")(t)
    c = c + CaptionMlp(dim, **options, name="caption_pool")(y.mean(axis=1))  # (B, D)

    y_mixer = y
    if needs_maps:
      tokens = WidthMap(mixer_dim, **width_map, name="mixer_in")(tokens)
      y_mixer = WidthMap(mixer_dim, **width_map, name="mixer_captions")(y)
    for i, width in enumerate(self.mixer_mlp_widths):
      experts = self.experts_of(i, mixer=True)
      block = self._block(f"mixer_block_{i}", mixer_dim, width, experts)
      tokens = block(tokens, c, y_mixer)  # (B, L, M)
    self.sow("intermediates", "tokens_mixed", tokens)
    if token_mask is not None:
      tokens = keep_tokens(tokens, token_mask)  # (B, K, M)
    if needs_maps:
      tokens = WidthMap(dim, **width_map, name="mixer_out")(tokens)  # (B, K, D)
    self.sow("intermediates", "tokens_into_backbone", tokens)
    for i, (attention_width, width) in enumerate(
      zip(self.attention_widths, self.mlp_widths, strict=True)
    ):
      block = self._block(f"block_{i}", attention_width, width, self.experts_of(i))
      tokens = block(tokens, c, y)  # (B, K, D)
    shape = self.patch_size, self.out_channels, self.grid_size
    final_layer = TextFinalLayer(*shape, **options, name="final_layer")
    output = final_layer(tokens, c, jnp.asarray(mask_token), token_mask)
    return output.astype(jnp.float32)

  def _block(self, name: str, attention_width: int, width: int, experts: int) -> Any:
    """Builds a block of the mixer, or a block after the mixer."""
    policy = layers.REMAT_POLICIES[self.remat]
    block: Any = TextBlock if policy is None else nn.remat(TextBlock, policy=policy)
    return block(
      attention_width=attention_width,
      mlp_width=width,
      head_size=self.head_size,
      num_experts=experts,
      capacity=self.expert_capacity,
      dtype=self.dtype,
      forward_mode=self.forward_mode,
      name=name,
    )

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    check_choice("variant", self.variant, self.variants)
    check_choice("remat", self.remat, layers.REMAT_POLICIES)
    super().check()
    self._require(
      "condition", self.condition is None, "must be None: the network reads captions"
    )
    for name in (
      *("caption_length", "caption_channels", "hidden_size", "num_heads"),
      *("mixer_hidden_size", "caption_mlp_width"),
    ):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    heads = self.num_heads
    holds = self.hidden_size % heads == 0 and self.hidden_size % 4 == 0
    accepted = f"must be divisible by num_heads = {heads} and by 4"
    self._require("hidden_size", holds, accepted)
    for name in ("mlp_widths", "mixer_mlp_widths"):
      holds = len(getattr(self, name)) > 0 and min(getattr(self, name)) >= 1
      self._require(name, holds, "must be one number of at least 1 for each block")
    size = f"hidden_size / num_heads = {self.head_size}"
    holds = len(self.attention_widths) == self.depth
    holds &= all(w > 0 and w % self.head_size == 0 for w in self.attention_widths)
    accepted = f"must be {self.depth} numbers, as mlp_widths, divisible by {size}"
    self._require("attention_widths", holds, accepted)
    holds = self.mixer_hidden_size % self.head_size == 0
    self._require("mixer_hidden_size", holds, f"must be divisible by {size}")
    self._require("num_experts", self.num_experts >= 0, "must be at least 0")
    largest = self.num_experts or math.inf
    holds = 0 < self.expert_capacity <= largest
    self._require("expert_capacity", holds, "must lie in (0, num_experts]")
