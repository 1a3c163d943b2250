"""The base class of every network, inside and outside this package."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.errors import SettingError
from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.models.masking import TokenMask, num_kept, token_mask_from_noise
from mdt_jax.sizes import Size, height_width
from mdt_jax.types import Array

SIGNATURE = "(x, t, y, token_mask=None, train=False)"


class Network(nn.Module, kw_only=True):
  """Base class of networks over images or latents; a flax linen module.

  A subclass must define `__call__` with the signature below. It may add fields, and may
  override the properties and methods below, such as `frozen` and `takes_mask`.
  `check_network` checks a subclass.

    class MyNet(mdt_jax.models.Network):
      width: int = 64

      @nn.compact
      def __call__(self, x, t, y, token_mask=None, train=False):
        h = nn.silu(nn.Conv(self.width, (3, 3))(x))
        c = self.conditioning.embedder(self.width, jnp.float32)(y, train)
        return nn.Conv(self.out_channels, (3, 3))(h + c[:, None, None])

  Attributes:
    input_size: height and width of the input, each divisible by patch_size: one number
      for a square, or (height, width).
    patch_size: side of a patch; one patch is one token.
    in_channels: C, channels of the input.
    num_classes: number of classes; the label num_classes is the null label.
    label_dropout: probability, in [0, 1), of dropping a label in training, for
      classifier-free guidance.
    learn_sigma: whether the output has 2C channels; the second half predicts the
      variance.
    condition: what the network is conditioned on. None: class labels, defined by
      num_classes and label_dropout.
    unroll: number of blocks per iteration of the compiled loop over blocks; -1 for all
      (faster on CPUs, slower to compile). Networks without such a loop ignore it.
  """

  input_size: Size = 32
  patch_size: int = 1
  in_channels: int = 4
  num_classes: int = 1000
  label_dropout: float = 0.1
  learn_sigma: bool = True
  condition: Condition | None = None
  unroll: int = 1

  # How the null label is embedded; see `LabelEmbed`.
  null_label: ClassVar[str] = "learned"

  @property
  def out_channels(self) -> int:
    """Channels of the output: C, or 2C if learn_sigma is set."""
    return self.in_channels * (2 if self.learn_sigma else 1)

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of an input of the network."""
    height, width = height_width(self.input_size, "input_size")
    return height, width, self.in_channels

  @property
  def num_tokens(self) -> int:
    """L, number of tokens of an image."""
    height, width, _ = self.input_shape
    return (height // self.patch_size) * (width // self.patch_size)

  @property
  def takes_mask(self) -> bool:
    """Whether the network accepts a `token_mask`, and predicts the removed tokens."""
    return False

  @property
  def has_route(self) -> bool:
    """Whether the network accepts a `token_mask`, whose removed tokens skip blocks."""
    return False

  @property
  def defers_mask(self) -> bool:
    """Whether the network accepts a `token_mask`, and predicts only kept tokens."""
    return False

  @property
  def drops_path(self) -> bool:
    """Whether the network accepts `path_drop`; see `models.sprint`."""
    return False

  @property
  def default_objective(self) -> str:
    """The objective that the network was made for, a key of `objectives.OBJECTIVES`."""
    if self.takes_mask:
      return "mdt"
    return "tread" if self.has_route else "plain"

  def num_kept(self, ratio: float) -> int:
    """Returns how many tokens a mask keeps that removes a share of the tokens."""
    return num_kept(self.num_tokens, ratio)

  def token_mask(self, noise: Float[Array, "B L"], num_keep: int) -> TokenMask:
    """Returns the mask that keeps `num_keep` tokens, chosen by uniform noise."""
    return token_mask_from_noise(noise, num_keep)

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of top-level parameters that are not trained."""
    return ()

  @property
  def conditioning(self) -> Condition:
    """The condition in use: `condition`, or class labels if `condition` is None."""
    if self.condition is not None:
      return self.condition
    return LabelCondition(self.num_classes, self.label_dropout, self.null_label)

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
      x: (B, H, W, C) noisy images or latents of the size `input_size`.
      t: (B,) timesteps, integer or float.
      y: (B, …) condition. By default integer labels (B,) in [0, num_classes);
        num_classes is the null label. Labels out of range do not raise an error; see
        `embeddings.LabelEmbed`.
      token_mask: the tokens that the network, or a part of it, sees; None for all.
        Always None if `takes_mask`, `has_route` and `defers_mask` are False.
      train: whether to drop conditions. Labels then need the random stream
        "label_dropout".

    Returns:
      (B, H, W, out_channels).
    """
    raise TypeError(f"{type(self).__name__} must define __call__")

  def check(self) -> None:
    """Raises SettingError if an attribute is invalid."""
    sides = self.input_shape[:2]
    self._require("input_size", min(sides) >= 1, "must be at least 1")
    for name in ("patch_size", "in_channels", "num_classes"):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    p = self.patch_size
    holds = all(side % p == 0 for side in sides)
    self._require("input_size", holds, f"must be divisible by patch_size = {p}")
    holds = 0 <= self.conditioning.dropout < 1
    self._require("label_dropout", holds, "must lie in [0, 1)")
    holds = self.unroll == -1 or self.unroll > 0
    self._require("unroll", holds, "must be -1 (all) or at least 1")

  def check_input(self, x: Float[Array, "B H W C"]) -> None:
    """Raises ValueError if x has another shape than `input_shape`.

    Otherwise a network of (16, 24) would read images of (24, 16), of as many tokens.
    """
    if x.shape[1:] != self.input_shape:
      raise ValueError(f"x must have shape {('B', *self.input_shape)}, has {x.shape}")

  def _require(self, name: str, holds: bool, accepted: str) -> None:
    """Raises SettingError for the attribute `name` unless `holds`."""
    if not holds:
      raise SettingError(name, getattr(self, name), accepted)


def check_network(model: Network) -> None:
  """Checks a network's attributes, call signature and output shape.

  The network is traced with a batch of 2 and not run.

  Raises:
    SettingError: setting "model": `model` is not a Network, its call fails with a
      TypeError, or its output has the wrong shape. Another setting: the attribute of
      this name is invalid.
  """
  if isinstance(model, type):
    raise SettingError(
      "model", model.__name__, f"must be an instance, such as {model.__name__}(…)"
    )
  name = type(model).__name__
  if not isinstance(model, Network):
    raise SettingError("model", name, "must be a mdt_jax.models.Network")
  model.check()
  expected = (2, *model.input_shape[:2], model.out_channels)
  start = f"must return (B, H, W, C) of shape {expected}"
  end = f"expected signature {SIGNATURE}"

  def call() -> Any:
    x = jnp.zeros((2, *model.input_shape), jnp.float32)
    t = jnp.zeros((2,), jnp.float32)
    y = model.conditioning.dummy(2)
    key = jax.random.key(0)
    return model.init_with_output(key, x, t, y, token_mask=None, train=False)[0]

  try:
    output = jax.eval_shape(call)
  except TypeError as error:
    reason = str(error).strip().split("\n")[0]
    raise SettingError("model", name, f"{start}, fails ({reason}); {end}") from error
  found = getattr(output, "shape", type(output).__name__)
  if found != expected:
    raise SettingError("model", name, f"{start}, returns {found}; {end}")
