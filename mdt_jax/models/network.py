"""The base class of every network, also of one that lies outside the package."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from mdt_jax.errors import SettingError
from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.models.masking import TokenMask
from mdt_jax.types import Array

SIGNATURE = "(x, t, y, token_mask=None, train=False)"


class Network(nn.Module, kw_only=True):
  """A network over images or latents: a linen module with this `__call__`.

  A subclass defines `__call__` and may add fields of its own. It overrides `frozen`,
  `takes_mask` and `num_tokens` as properties where the values here do not hold.
  `check_network` tests a subclass.

    class MyNet(mdt_jax.models.Network):
      width: int = 64

      @nn.compact
      def __call__(self, x, t, y, token_mask=None, train=False):
        h = nn.silu(nn.Conv(self.width, (3, 3))(x))
        c = self.conditioning.embedder(self.width, jnp.float32)(y, train)
        return nn.Conv(self.out_channels, (3, 3))(h + c[:, None, None])

  Attributes:
    input_size: height and width of the input, divisible by patch_size.
    patch_size: side of a patch, which is one token.
    in_channels: channels of the input, C.
    num_classes: classes; `num_classes` itself is the null label.
    label_dropout: share of labels dropped in training, for guidance.
    learn_sigma: whether the output has 2C channels, the second half for the variance.
    condition: what the network is conditioned on; None for labels, of num_classes
      classes and label_dropout.
    unroll: blocks of a stack compiled one after another in each iteration of the loop;
      -1 for all (faster on CPUs, longer to compile). Unused without a stack.
  """

  input_size: int = 32
  patch_size: int = 1
  in_channels: int = 4
  num_classes: int = 1000
  label_dropout: float = 0.1
  learn_sigma: bool = True
  condition: Condition | None = None
  unroll: int = 1

  @property
  def out_channels(self) -> int:
    """Channels of the output."""
    return self.in_channels * (2 if self.learn_sigma else 1)

  @property
  def num_tokens(self) -> int:
    """L, tokens of one image."""
    return (self.input_size // self.patch_size) ** 2

  @property
  def takes_mask(self) -> bool:
    """Whether the network accepts a `token_mask`."""
    return False

  @property
  def frozen(self) -> tuple[str, ...]:
    """Names of the top-level parameters that are not trained."""
    return ()

  @property
  def conditioning(self) -> Condition:
    """The condition in use."""
    if self.condition is not None:
      return self.condition
    return LabelCondition(self.num_classes, self.label_dropout)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    t: Shaped[Array, "B"],
    y: Shaped[Array, "B *_"],
    token_mask: TokenMask | None = None,
    train: bool = False,
  ) -> Float[Array, "B H W out_channels"]:
    """Predicts the noise (or x0, or v), and the variance where learn_sigma is set.

    Args:
      x: noisy images, H = W = input_size.
      t: timesteps, integer or not.
      y: the condition; by default integer labels, where num_classes is the null label.
      token_mask: the tokens that the network sees; None for all, and always None where
        `takes_mask` is False.
      train: whether conditions are dropped. Labels then need the random stream
        "label_dropout".
    """
    raise TypeError(f"{type(self).__name__} has no __call__")

  def check(self) -> None:
    """Raises SettingError where the attributes cannot make a network."""
    for name in ("input_size", "patch_size", "in_channels", "num_classes"):
      self._require(name, getattr(self, name) >= 1, "must be at least 1")
    p = self.patch_size
    self._require(
      "input_size", self.input_size % p == 0, f"must be divisible by patch_size = {p}"
    )
    holds = 0 <= self.conditioning.dropout < 1
    self._require("label_dropout", holds, "must lie in [0, 1)")
    holds = self.unroll == -1 or self.unroll > 0
    self._require("unroll", holds, "must be -1 (all) or at least 1")

  def _require(self, name: str, holds: bool, accepted: str) -> None:
    if not holds:
      raise SettingError(name, getattr(self, name), accepted)


def check_network(model: Network) -> None:
  """Checks the attributes of a network, its signature and the shape of its output.

  The network is traced for a batch of 2; nothing is computed.

  Raises:
    SettingError: of the setting "model" for a class that is no Network, a call that
      fails with a TypeError, or an output of another shape; of an attribute that
      `check` refuses.
  """
  name = type(model).__name__
  if not isinstance(model, Network):
    raise SettingError("model", name, "must be a mdt_jax.models.Network")
  model.check()
  size = model.input_size
  expected = (2, size, size, model.out_channels)
  start = f"must return (B, H, W, C) of shape {expected}"
  end = f"expected signature {SIGNATURE}"

  def call() -> Any:
    x = jnp.zeros((2, size, size, model.in_channels), jnp.float32)
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
