"""The autoencoder of Stable Diffusion (arXiv 2112.10752).

Architecture, module names and defaults follow diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from mdt_jax.errors import SettingError
from mdt_jax.types import Array, Dtype, Params

LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers clips the log variance
# Limits of sizes. They are far above those of known autoencoders, and keep a mistyped
# size from taking all memory.
MAX_CHANNELS = 2**16
MAX_LAYERS = 32
MAX_LEVELS = 8


class AutoencoderKL(nn.Module):
  """A convolutional autoencoder with a Gaussian posterior for each latent.

  Attributes:
    in_channels: channels of the images that the encoder reads.
    out_channels: channels of the images that the decoder returns.
    block_out_channels: width of each level, finest level first. Each width must be
      divisible by norm_num_groups. Every level but the last halves height and width.
    layers_per_block: residual blocks per encoder level. A decoder level has one more.
    latent_channels: C, channels of the latents.
    norm_num_groups: groups of each GroupNorm.
    scaling_factor: factor that scales latents to about unit variance; see `scale`.
    shift_factor: mean of the latents; `scale` subtracts it.
    latents_mean: mean of each latent channel, in place of shift_factor; None for no
      statistics by channel.
    latents_std: standard deviation of each latent channel, by which `scale` divides;
      None exactly if latents_mean is None.
    mid_block_attention: whether the coarsest level has self-attention.
    use_quant_conv: whether a 1x1 convolution follows the encoder.
    use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
    dtype: compute dtype. Parameters, softmax and GroupNorm's statistics are float32.
  """

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0
  latents_mean: tuple[float, ...] | None = None
  latents_std: tuple[float, ...] | None = None
  mid_block_attention: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  dtype: Dtype = jnp.float32

  @property
  def downsampling(self) -> int:
    """Height of an image divided by the height of its latents."""
    return 2 ** (len(self.block_out_channels) - 1)

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    channels = ("in_channels", "out_channels", "latent_channels", "norm_num_groups")
    for name in (*channels, "layers_per_block"):
      largest = MAX_LAYERS if name == "layers_per_block" else MAX_CHANNELS
      if not _is_size(getattr(self, name), largest):
        raise SettingError(
          name, getattr(self, name), f"must be an integer from 1 to {largest}"
        )
    for name in ("mid_block_attention", "use_quant_conv", "use_post_quant_conv"):
      if not isinstance(getattr(self, name), bool):
        raise SettingError(name, getattr(self, name), "must be True or False")
    widths = self.block_out_channels
    is_list = isinstance(widths, tuple) and 0 < len(widths) <= MAX_LEVELS
    if not is_list or not all(
      _is_size(width, MAX_CHANNELS) and width % self.norm_num_groups == 0
      for width in widths
    ):
      raise SettingError(
        "block_out_channels",
        widths,
        f"must hold 1 to {MAX_LEVELS} integers, each from 1 to {MAX_CHANNELS} and "
        f"divisible by norm_num_groups = {self.norm_num_groups}",
      )
    self._check_scales()

  def _check_scales(self) -> None:
    """Raises SettingError if `scale` and `unscale` cannot be computed in float32."""
    for name in ("scaling_factor", "shift_factor"):
      if not _is_float32(getattr(self, name)):
        raise SettingError(name, getattr(self, name), "must be a finite number")
    if np.float32(self.scaling_factor) == 0:
      raise SettingError("scaling_factor", self.scaling_factor, "must not be 0")
    for name, other in (
      ("latents_mean", "latents_std"),
      ("latents_std", "latents_mean"),
    ):
      values = getattr(self, name)
      if values is None:
        continue
      if getattr(self, other) is None:
        raise SettingError(name, values, f"needs {other} too")
      if (
        not isinstance(values, tuple)
        or len(values) != self.latent_channels
        or not all(_is_float32(value) for value in values)
      ):
        raise SettingError(
          name,
          values,
          f"must hold latent_channels = {self.latent_channels} finite numbers",
        )
    if self.latents_std is None:
      return
    if not all(np.float32(value) > 0 for value in self.latents_std):
      raise SettingError("latents_std", self.latents_std, "must hold numbers above 0")
    if self.shift_factor != 0:
      raise SettingError(
        "shift_factor", self.shift_factor, "must be 0, since latents_mean is given"
      )

  def setup(self) -> None:
    self.check()
    shared: dict[str, Any] = dict(
      block_out_channels=self.block_out_channels,
      groups=self.norm_num_groups,
      attention=self.mid_block_attention,
      dtype=self.dtype,
    )
    moments = 2 * self.latent_channels  # mean and log variance
    self.encoder = Encoder(moments, layers=self.layers_per_block, **shared)
    self.decoder = Decoder(
      self.out_channels, layers=self.layers_per_block + 1, **shared
    )
    if self.use_quant_conv:
      self.quant_conv = nn.Conv(moments, (1, 1), dtype=self.dtype)
    if self.use_post_quant_conv:
      self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

  def __call__(
    self, images: Float[Array, "B H W in_channels"]
  ) -> Float32[Array, "B H W out_channels"]:
    """Encodes images in [-1, 1], then decodes the mean of their latents."""
    return self.decode(self.encode(images)[0])

  def encode(
    self, images: Float[Array, "B H W in_channels"]
  ) -> tuple[Float32[Array, "B h w C"], Float32[Array, "B h w C"]]:
    """Computes mean and log variance of the latents' Gaussian posterior.

    Args:
      images: (B, H, W, in_channels) in [-1, 1].

    Returns:
      (mean, logvar), each (B, h, w, C) float32 with h = H // downsampling. Neither is
      scaled; see `scale`. logvar is clipped to LOGVAR_RANGE.
    """
    moments = self.encoder(images.astype(self.dtype))
    if self.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(
    self, latents: Float[Array, "B h w C"]
  ) -> Float32[Array, "B H W out_channels"]:
    """Decodes latents to images.

    Args:
      latents: (B, h, w, C), not scaled; see `unscale`.

    Returns:
      Images, about in [-1, 1], not clipped. H = h * downsampling.
    """
    latents = latents.astype(self.dtype)
    if self.use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents).astype(jnp.float32)

  def scale(self, latents: Float[Array, "*B h w C"]) -> Float[Array, "*B h w C"]:
    """Scales latents to about unit variance.

    (x - shift_factor) * scaling_factor; with statistics by channel,
    (x - latents_mean) * scaling_factor / latents_std, as in diffusers' pipelines.
    """
    if self.latents_mean is None:
      return (latents - self.shift_factor) * self.scaling_factor
    return self.scale_std(latents - np.asarray(self.latents_mean, np.float32))

  def scale_std(self, std: Float[Array, "*B h w C"]) -> Float[Array, "*B h w C"]:
    """Scales standard deviations as `scale` scales latents: without the shift."""
    if self.latents_std is None:
      return std * self.scaling_factor
    return std * (self.scaling_factor / np.asarray(self.latents_std, np.float32))

  def unscale(self, latents: Float[Array, "*B h w C"]) -> Float[Array, "*B h w C"]:
    """Inverts `scale`; the result is an input of `decode`."""
    if self.latents_std is None:
      return latents / self.scaling_factor + self.shift_factor
    std, mean = (
      np.asarray(values, np.float32) for values in (self.latents_std, self.latents_mean)
    )
    return latents * (std / self.scaling_factor) + mean


@functools.partial(jax.jit, static_argnames="model")
def encode(
  model: AutoencoderKL, params: Params, images: Float[Array, "B H W in_channels"]
) -> tuple[Float32[Array, "B h w C"], Float32[Array, "B h w C"]]:
  """Calls `AutoencoderKL.encode` under jax.jit, with `model` static."""
  output: Any = model.apply({"params": params}, images, method="encode")
  return output


@functools.partial(jax.jit, static_argnames="model")
def decode(
  model: AutoencoderKL, params: Params, latents: Float[Array, "B h w C"]
) -> Float32[Array, "B H W out_channels"]:
  """Calls `AutoencoderKL.decode` under jax.jit, with `model` static."""
  output: Any = model.apply({"params": params}, latents, method="decode")
  return output


class Encoder(nn.Module):
  """Maps images (B, H, W, C) to features (B, h, w, out_features)."""

  out_features: int
  block_out_channels: tuple[int, ...]
  layers: int
  groups: int
  attention: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    widths = self.block_out_channels
    x = _conv(widths[0], self.dtype, "conv_in")(x)
    for i, width in enumerate(widths):
      resample = "down" if i < len(widths) - 1 else "none"
      name = f"down_blocks_{i}"
      x = Level(width, self.layers, self.groups, resample, self.dtype, name=name)(x)
    x = MidBlock(self.groups, self.attention, self.dtype, name="mid_block")(x)
    x = nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x))
    return _conv(self.out_features, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """Maps latents (B, h, w, C) to images (B, H, W, out_features)."""

  out_features: int
  block_out_channels: tuple[int, ...]
  layers: int
  groups: int
  attention: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    widths = self.block_out_channels[::-1]
    x = _conv(widths[0], self.dtype, "conv_in")(x)
    x = MidBlock(self.groups, self.attention, self.dtype, name="mid_block")(x)
    for i, width in enumerate(widths):
      resample = "up" if i < len(widths) - 1 else "none"
      name = f"up_blocks_{i}"
      x = Level(width, self.layers, self.groups, resample, self.dtype, name=name)(x)
    x = nn.silu(_norm(self.groups, self.dtype, "conv_norm_out")(x))
    return _conv(self.out_features, self.dtype, "conv_out")(x)


class Level(nn.Module):
  """Residual blocks of one width, then resampling.

  `resample` is "down" (halves height and width), "up" (doubles them) or "none".
  """

  features: int
  layers: int
  groups: int
  resample: str
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i in range(self.layers):
      x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{i}")(x)
    if self.resample == "down":
      x = Downsample(self.dtype, name="downsamplers_0")(x)
    elif self.resample == "up":
      x = Upsample(self.dtype, name="upsamplers_0")(x)
    return x


class MidBlock(nn.Module):
  """A residual block, optional self-attention, and another residual block."""

  groups: int
  attention: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    x = ResnetBlock(width, self.groups, self.dtype, name="resnets_0")(x)
    if self.attention:
      x = SpatialAttention(self.groups, self.dtype, name="attentions_0")(x)
    return ResnetBlock(width, self.groups, self.dtype, name="resnets_1")(x)


class ResnetBlock(nn.Module):
  """Adds two rounds of GroupNorm, SiLU and convolution to the input."""

  features: int
  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = x
    for i in (1, 2):
      h = nn.silu(_norm(self.groups, self.dtype, f"norm{i}")(h))
      h = _conv(self.features, self.dtype, f"conv{i}")(h)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class SpatialAttention(nn.Module):
  """Adds single-head self-attention over all h w positions to x (B, h, w, D)."""

  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, height, width, dim = x.shape
    h = _norm(self.groups, self.dtype, "group_norm")(x)
    h = h.reshape(batch, height * width, 1, dim)
    query, key, value = (
      nn.Dense(dim, dtype=self.dtype, name=name)(h) for name in ("to_q", "to_k", "to_v")
    )
    h = jax.nn.dot_product_attention(query, key, value)  # computes softmax in float32
    return x + nn.Dense(dim, dtype=self.dtype, name="to_out_0")(h).reshape(x.shape)


class Downsample(nn.Module):
  """A convolution of stride 2 that pads only the bottom and the right (diffusers)."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    padding = ((0, 1), (0, 1))
    conv = _conv(x.shape[-1], self.dtype, "conv", strides=2, padding=padding)
    return conv(x)


class Upsample(nn.Module):
  """Nearest-neighbour upsampling by 2, then a convolution."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return _conv(x.shape[-1], self.dtype, "conv")(x)


def _is_size(value: Any, largest: int) -> bool:
  """Whether a value is an integer from 1 to `largest`."""
  return type(value) is int and 1 <= value <= largest


def _is_float32(value: Any) -> bool:
  """Whether a value is a number that is finite in float32."""
  if type(value) not in (int, float):
    return False
  return abs(value) <= float(np.finfo(np.float32).max)


def _conv(features: int, dtype: Dtype, name: str, **options: Any) -> nn.Conv:
  """Builds a 3x3 convolution with padding 1."""
  options = {"padding": 1, **options}
  return nn.Conv(features, (3, 3), dtype=dtype, name=name, **options)


def _norm(groups: int, dtype: Dtype, name: str) -> nn.GroupNorm:
  """Builds a GroupNorm with eps 1e-6, as in diffusers."""
  return nn.GroupNorm(
    groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name
  )
