"""Token masks, and the number of tokens that a mask keeps.

The released code keeps int(L (1 - ratio)) tokens of each sample: those with the
smallest noise (MAE's masking, arXiv 2111.06377). MDTv2 draws the ratio uniformly from
[ratio, ratio + width]. XLA compiles once per number of kept tokens. So this module
draws the number from a few lengths whose mean equals that of the released code.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Bool, Float, Int

from mdt_jax.types import Array


@flax.struct.dataclass
class TokenMask:
  """Which K of L tokens the encoder sees, for each of B samples.

  Attributes:
    ids_keep: (B, K) int32 indices of the kept tokens, in the encoder's order.
    ids_restore: (B, L) int32; entry i is the index of token i in the sequence of kept
      tokens followed by removed tokens.
    removed: (B, L) bool, True for a removed token.
  """

  ids_keep: Int[Array, "B K"]
  ids_restore: Int[Array, "B L"]
  removed: Bool[Array, "B L"]


def token_mask_from_noise(noise: Float[Array, "B L"], num_keep: int) -> TokenMask:
  """Returns the mask that keeps the `num_keep` tokens with the smallest noise."""
  order = jnp.argsort(noise, axis=1)
  ids_restore = jnp.argsort(order, axis=1)
  return TokenMask(
    ids_keep=order[:, :num_keep],
    ids_restore=ids_restore,
    removed=ids_restore >= num_keep,
  )


def random_token_mask(key: Array, batch: int, length: int, num_keep: int) -> TokenMask:
  """Returns a mask that keeps `num_keep` random tokens of `length`, per sample."""
  return token_mask_from_noise(jax.random.uniform(key, (batch, length)), num_keep)


def keep_tokens(
  tokens: Float[Array, "B L D"], mask: TokenMask
) -> Float[Array, "B K D"]:
  """Selects the kept tokens, in the order of `mask.ids_keep`."""
  return _take(tokens, mask.ids_keep)


def restore_tokens(
  kept: Float[Array, "B K D"], mask_token: Float[Array, "D"], mask: TokenMask
) -> Float[Array, "B L D"]:
  """Puts kept tokens back in their positions and `mask_token` in all others."""
  batch, num_keep, dim = kept.shape
  num_removed = mask.ids_restore.shape[1] - num_keep
  fill = jnp.broadcast_to(mask_token.astype(kept.dtype), (batch, num_removed, dim))
  tokens = jnp.concatenate([kept, fill], axis=1)
  return _take(tokens, mask.ids_restore)


def _take(tokens: Array, ids: Array) -> Array:
  """Selects tokens of each sample: (B, L, D) and (B, K) -> (B, K, D).

  XLA for GPUs writes the gradient, a scatter, with the batch as the last axis, and
  would keep that order in the blocks around. So the order of axes is fixed here.
  """
  layout = Layout(major_to_minor=(0, 1, 2))
  tokens = jax.lax.platform_dependent(
    tokens,
    cuda=lambda x: with_layout_constraint(x, layout),
    default=lambda x: x,
  )
  return jnp.take_along_axis(tokens, ids[..., None], axis=1)


def num_kept(length: int, ratio: float) -> int:
  """Returns int(length (1 - ratio)), the number of tokens the released code keeps."""
  return int(length * (1 - ratio))


def spread_lengths(
  length: int, ratio: float, width: float, groups: int
) -> tuple[int, ...]:
  """Returns a number of kept tokens for each part of a batch, decreasing.

  The masked shares are the middles of `groups` equal parts of [ratio, ratio + width],
  so their mean is that of a uniform draw.
  """
  shares = [ratio + width * (group + 0.5) / groups for group in range(groups)]
  return tuple(num_kept(length, share) for share in shares)


@dataclasses.dataclass(frozen=True)
class KeptLengths:
  """The possible numbers of kept tokens in a run, and their probabilities.

  Attributes:
    lengths: numbers of kept tokens, increasing. XLA compiles the step once per length.
    probabilities: one per length. The mean length equals that of the released code,
      which draws the ratio uniformly.
  """

  lengths: tuple[int, ...]
  probabilities: tuple[float, ...]

  @classmethod
  def create(
    cls,
    length: int,
    ratio: float,
    width: float = 0.0,
    num_lengths: int = 4,
    multiple: int = 8,
  ) -> KeptLengths:
    """Chooses up to `num_lengths` lengths in the range of the mask ratio.

    Args:
      length: L, number of tokens of an image.
      ratio: smallest share of masked tokens, in [0, 1].
      width: the released code draws the share uniformly from [ratio, ratio + width].
        A width of 0 (MDT v1) gives one length, int(L (1 - ratio)).
      num_lengths: largest number of lengths, and so of compilations.
      multiple: lengths are multiples of this number. `multiple` is halved until the
        range holds enough multiples with the right mean.
    """
    low, high = num_kept(length, ratio + width), num_kept(length, ratio)
    if low == high or num_lengths == 1:
      middle = num_kept(length, ratio + width / 2)
      return cls((middle,), (1.0,))
    # Clipped, because rounding may move the mean of a narrow range just outside.
    mean = min(max(_mean_kept(length, ratio, width), low), high)
    count = min(num_lengths, high - low + 1)
    while True:
      first, last = -(-low // multiple), high // multiple
      steps = np.linspace(low / multiple, high / multiple, count)
      lengths = np.unique(np.clip(np.round(steps), first, last)) * multiple
      if len(lengths) == count:
        # The distribution closest to uniform with this mean is linear in the lengths.
        offset = lengths - lengths.mean()
        slope = (mean - lengths.mean()) / np.sum(offset**2)
        probabilities = 1 / count + slope * offset
        if probabilities.min() > -1e-9:
          probabilities = np.maximum(probabilities, 0)
          probabilities /= probabilities.sum()
          return cls(
            tuple(int(n) for n in lengths), tuple(float(p) for p in probabilities)
          )
      if multiple == 1:
        count -= 1
      multiple = max(1, multiple // 2)

  def draw(self, seed: int, step: int) -> int:
    """Draws the number of kept tokens of a step; depends only on (seed, step)."""
    rng = np.random.default_rng((seed, step))
    return self.lengths[rng.choice(len(self.lengths), p=self.probabilities)]


def _mean_kept(length: int, ratio: float, width: float) -> float:
  """Returns the mean of int(length (1 - r)) for r uniform in [ratio, ratio + width]."""
  low, high = length * (1 - ratio - width), length * (1 - ratio)
  counts = np.arange(int(low), int(high) + 1)
  share = np.minimum(counts + 1, high) - np.maximum(counts, low)
  return float(np.sum(counts * share) / (high - low))
