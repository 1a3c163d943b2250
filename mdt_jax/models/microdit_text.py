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
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from mdt_jax.errors import check_choice
from mdt_jax.models import layers
from mdt_jax.models.attention import attention, plain_attention
from mdt_jax.models.conditions import CaptionCondition
from mdt_jax.models.embeddings import (
  MAX_PERIOD,
  CaptionMlp,
  PatchEmbed,
  sincos_positions,
  unpatchify,
)
from mdt_jax.models.layers import (
  gelu,
  layer_norm,
  linear,
  normal_init,
  scaled_norm,
)
from mdt_jax.models.masking import TokenMask, keep_tokens, restore_tokens
from mdt_jax.models.mdt import Modulation
from mdt_jax.models.microdit import WidthMap
from mdt_jax.models.network import Network
from mdt_jax.models.partitioning import gather, parameter_axes, shard_batch
from mdt_jax.sizes import Size, to_size
from mdt_jax.types import Array, Dtype

NUM_FREQUENCIES = 512  # of the timestep embedding; DiT has 256
EXPERTS_EVERY = 2  # block 1, 3, … has experts


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
  """Returns the hidden width of an expert, or of SwiGLU, which has a third matrix."""
  width = int(hidden_size * ratio)
  return multiple_above(width if experts else int(2 * width / 3), multiple)


def has_experts(index: int, depth: int) -> bool:
  """Whether a block of a released network has experts: every second, not the last."""
  return index % EXPERTS_EVERY == EXPERTS_EVERY - 1 and index < depth - 1


class Attention(nn.Module):
  """Attention of tokens to themselves or to a caption, without biases.

  Queries and keys are normalised over the whole width, before the split into heads.

  Attributes:
    width: total width of the heads.
    head_size: width of a head.
    dtype, forward_mode: see `MicroDiTText`.
  """

  width: int
  head_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], captions: Float[Array, "B S D"] | None = None
  ) -> Float[Array, "B K D"]:
    options: dict[str, Any] = dict(
      dtype=self.dtype, forward_mode=self.forward_mode, use_bias=False
    )
    heads = (self.width // self.head_size, self.head_size)
    if captions is None:
      qkv = linear((3, *heads), "qkv", **options)(x)  # (B, K, 3, heads, head_size)
      query, key, value = jnp.unstack(qkv, axis=2)
    else:
      query = linear(heads, "query", **options)(x)
      key, value = jnp.unstack(
        linear((2, *heads), "key_value", **options)(captions), axis=2
      )
    query, key = (
      layer_norm(a.reshape(*a.shape[:2], -1)).reshape(a.shape) for a in (query, key)
    )
    attend = plain_attention if self.forward_mode else attention
    out = attend(query, key, value, None)  # (B, K, heads, head_size)
    return linear(x.shape[-1], "proj", axis=(-2, -1), **options)(out)


class SwiGLU(nn.Module):
  """A gated feed-forward layer without biases: w3(silu(w1 x) w2 x)."""

  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K D"]:
    options: dict[str, Any] = dict(
      dtype=self.dtype, forward_mode=self.forward_mode, use_bias=False
    )
    gate, value = (linear(self.width, name, **options)(x) for name in ("w1", "w2"))
    return linear(x.shape[-1], "w3", **options)(nn.silu(gate) * value)


class Experts(nn.Module):
  """Feed-forward layers that choose their tokens (expert choice, arXiv 2202.09368).

  Each expert receives its most probable tokens among those that are present of a
  sample, so removed tokens take no place. The output of a token is the sum over the
  experts that chose it, weighted by the probability; 0 if none did.

  Attributes:
    num_experts: number of experts E.
    capacity: mean number of experts of a token: an expert has int(capacity K / E)
      tokens.
    width: hidden width H of an expert.
    dtype, forward_mode: see `MicroDiTText`.
  """

  num_experts: int
  capacity: float
  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K D"]:
    batch, length, dim = x.shape
    count = int(self.capacity * length / self.num_experts)
    router = linear(
      self.num_experts,
      "router",
      dtype=self.dtype,
      use_bias=False,
      forward_mode=self.forward_mode,
    )
    probabilities = jax.nn.softmax(router(x).astype(jnp.float32))  # (B, K, E)
    weights, ids = jax.lax.top_k(probabilities.swapaxes(1, 2), count)  # (B, E, count)
    rows = jnp.arange(batch)[:, None, None]
    h = x[rows, ids]  # (B, E, count, D)
    w1 = self._matrix("expert_in", (self.num_experts, dim, self.width))
    w2 = self._matrix("expert_out", (self.num_experts, self.width, dim))
    h = nn.gelu(jnp.einsum("becd,edh->bech", h, w1), approximate=False)
    h = jnp.einsum("bech,ehd->becd", h, w2) * weights[..., None].astype(self.dtype)
    return jnp.zeros_like(h, shape=x.shape).at[rows, ids].add(h)

  def _matrix(self, name: str, shape: tuple[int, ...]) -> Array:
    """Creates the parameter `name`, one matrix for each expert."""
    init = nn.initializers.xavier_uniform(batch_axis=0)
    matrix = jnp.asarray(self.param(name, init, shape, jnp.float32), self.dtype)
    return gather(matrix, parameter_axes(name))


class TextBlock(nn.Module):
  """A block: self-attention, cross-attention to a caption, and feed-forward layers.

  The self-attention and the feed-forward layers have adaLN-Zero, whose LayerNorms have
  weights. The cross-attention has no modulation and no gate.

  Attributes:
    attention_width: total width of the heads of the self-attention.
    mlp_width: hidden width of SwiGLU or of an expert.
    head_size: width of a head.
    num_experts: number of experts; 0 for SwiGLU.
    capacity: see `Experts`.
    dtype, forward_mode: see `MicroDiTText`.
  """

  attention_width: int
  mlp_width: int
  head_size: int
  num_experts: int
  capacity: float
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], c: Float[Array, "B E"], y: Float[Array, "B S D"]
  ) -> Float[Array, "B K D"]:
    dim, options = x.shape[-1], dict(dtype=self.dtype, forward_mode=self.forward_mode)
    x = shard_batch(x)
    modulation = Modulation(6, dim, **options, activation=gelu, name="modulation")
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation(c))

    h = scaled_norm("norm1", self.dtype)(x) * (1 + scale1) + shift1
    attend = Attention(
      self.attention_width, self.head_size, **options, name="attention"
    )
    x = x + gate1 * attend(h)

    attend = Attention(dim, self.head_size, **options, name="cross_attention")
    x = x + attend(scaled_norm("norm2", self.dtype)(x), y)

    h = scaled_norm("norm3", self.dtype)(x) * (1 + scale2) + shift2
    if self.num_experts:
      sizes = self.num_experts, self.capacity, self.mlp_width
      h = Experts(*sizes, **options, name="experts")(h)
    else:
      h = SwiGLU(self.mlp_width, **options, name="mlp")(h)
    return x + gate2 * h


class CaptionBlock(nn.Module):
  """A block on the tokens of a caption: self-attention and SwiGLU, no modulation."""

  mlp_width: int
  head_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    attend = Attention(y.shape[-1], self.head_size, **options, name="attention")
    y = y + attend(scaled_norm("norm1", self.dtype)(y))
    feed = SwiGLU(self.mlp_width, **options, name="mlp")
    return y + feed(scaled_norm("norm2", self.dtype)(y))


class TimestepEmbed(nn.Module):
  """Embeds times by 512 sinusoids, then linear, GELU, linear: (B,) -> (B, D)."""

  hidden_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, t: Shaped[Array, "B"]) -> Float[Array, "B D"]:
    half = NUM_FREQUENCIES // 2
    frequencies = (MAX_PERIOD ** -(np.arange(half) / half)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    options: dict[str, Any] = dict(
      path="timestep_embed/",
      kernel_init=normal_init,
      dtype=self.dtype,
      forward_mode=self.forward_mode,
    )
    h = linear(self.hidden_size, "fc1", **options)(waves.astype(self.dtype))
    return linear(self.hidden_size, "fc2", **options)(gelu(h))


class TextFinalLayer(nn.Module):
  """Maps tokens to images, as `mdt.FinalLayer`; its LayerNorm has weights."""

  patch_size: int
  out_channels: int
  grid_size: Size
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B K D"],
    c: Float[Array, "B D"],
    mask_token: Float[Array, "P"],
    token_mask: TokenMask | None,
  ) -> Float[Array, "B H W C"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    modulation = Modulation(
      2, x.shape[-1], **options, activation=gelu, name="modulation"
    )
    shift, scale = (m[:, None] for m in modulation(c))
    x = linear(
      self.patch_size**2 * self.out_channels,
      "linear",
      path="final_layer/",
      kernel_init=nn.initializers.zeros,
      **options,
    )(scaled_norm("norm", self.dtype)(x) * (1 + scale) + shift)  # (B, K, p p C)
    if token_mask is not None:
      x = restore_tokens(x, mask_token, token_mask)  # (B, L, p p C)
    return unpatchify(x, self.grid_size, self.patch_size)


class MicroDiTText(Network, kw_only=True):
  """The released MicroDiT: captions in, a patch mixer, then a mask, then the blocks.

  The mixer sees all tokens; with a token mask, the other blocks and the last layer see
  the kept tokens, in the order of `ids_keep`. The mixer runs in sampling too. Captions
  enter by cross-attention in every block, and their mean by adaLN. Blocks have widths
  of their own, so they are modules block_0, block_1, … and no stack; `unroll` has no
  effect. The initial values of parameters are those of DiT here, not the released ones.

  The parameter `mask_token` (p p C) fills the output at removed tokens. It is a buffer
  of zeros in the released network: it is not trained, and no loss sees it.

  "tokens_mixed" (B, L, M) and "tokens_into_backbone" (B, K, D) are sown into the
  collection "intermediates".

  Attributes (in addition to those of `Network`):
    caption_length: S of the captions that initialise parameters. Captions of any length
      are accepted.
    caption_channels: V.
    hidden_size: D, divisible by num_heads and by 4.
    num_heads: heads of a width of D; all heads of the network have D / num_heads
      numbers.
    attention_widths: total width of the heads of each block, divisible by the width of
      a head.
    mlp_widths: hidden width of the feed-forward layers of each block.
    mixer_hidden_size: M, divisible by the width of a head.
    mixer_mlp_widths: as mlp_widths, for each block of the mixer.
    caption_mlp_width: hidden width of the feed-forward layer of the block on captions.
    num_experts: experts of blocks 1, 3, … but for the last block, and of these blocks
      of the mixer, with its last; 0: none.
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
    """The positions, and what fills the output at removed tokens."""
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
    """Returns the number of experts of a block, of the mixer or after it."""
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
    """Builds a block of the mixer, or after it."""
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
    self._require("condition", self.condition is None, "must be None: it is captions")
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
    holds = holds and all(w > 0 == w % self.head_size for w in self.attention_widths)
    accepted = f"must be {self.depth} numbers, as mlp_widths, divisible by {size}"
    self._require("attention_widths", holds, accepted)
    holds = self.mixer_hidden_size % self.head_size == 0
    self._require("mixer_hidden_size", holds, f"must be divisible by {size}")
    self._require("num_experts", self.num_experts >= 0, "must be at least 0")
    largest = self.num_experts or math.inf
    holds = 0 < self.expert_capacity <= largest
    self._require("expert_capacity", holds, "must lie in (0, num_experts]")
