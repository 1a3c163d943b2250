"""Token masks of static length, and the choice of that length.

The released code keeps int(L (1 - ratio)) tokens of each sample: those with the
smallest noise (MAE's masking, arXiv 2111.06377). MDTv2 draws the ratio uniformly from
[ratio, ratio + width]. XLA compiles once for each number of kept tokens, so we draw
that number from a few lengths with the same mean.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mdt_jax.types import Array


@flax.struct.dataclass
class TokenMask:
  """The K of L tokens that the encoder sees, for each of B samples.

  Attributes:
    ids_keep: (B, K) indices of the kept tokens, in the order that the encoder sees.
    ids_restore: (B, L) for each token its index in the sequence "kept tokens, then
      removed tokens".
    removed: (B, L) true where the token is removed.
  """

  ids_keep: Int[Array, "B K"]
  ids_restore: Int[Array, "B L"]
  removed: Bool[Array, "B L"]


def token_mask_from_noise(noise: Float[Array, "B L"], num_keep: int) -> TokenMask:
  """Keeps the `num_keep` tokens of each sample that have the smallest noise."""
  order = jnp.argsort(noise, axis=1)
  ids_restore = jnp.argsort(order, axis=1)
  return TokenMask(
    ids_keep=order[:, :num_keep],
    ids_restore=ids_restore,
    removed=ids_restore >= num_keep,
  )


def random_token_mask(key: Array, batch: int, length: int, num_keep: int) -> TokenMask:
  """Keeps `num_keep` of `length` tokens at random, drawn for each sample."""
  return token_mask_from_noise(jax.random.uniform(key, (batch, length)), num_keep)


def keep_tokens(
  tokens: Float[Array, "B L D"], mask: TokenMask
) -> Float[Array, "B K D"]:
  """The kept tokens, in the order of `mask.ids_keep`."""
  return jnp.take_along_axis(tokens, mask.ids_keep[..., None], axis=1)


def restore_tokens(
  kept: Float[Array, "B K D"], mask_token: Float[Array, "D"], mask: TokenMask
) -> Float[Array, "B L D"]:
  """The kept tokens at their places, and `mask_token` at all others."""
  batch, num_keep, dim = kept.shape
  num_removed = mask.ids_restore.shape[1] - num_keep
  fill = jnp.broadcast_to(mask_token.astype(kept.dtype), (batch, num_removed, dim))
  tokens = jnp.concatenate([kept, fill], axis=1)
  return jnp.take_along_axis(tokens, mask.ids_restore[..., None], axis=1)


def num_kept(length: int, ratio: float) -> int:
  """The number of tokens that the released code keeps: int(length (1 - ratio))."""
  return int(length * (1 - ratio))


@dataclasses.dataclass(frozen=True)
class KeptLengths:
  """The numbers of kept tokens of a run, and the probability of each.

  Attributes:
    lengths: numbers of kept tokens, increasing. The step is compiled once for each.
    probabilities: one for each length. The mean length equals that of the released
      code, whose ratio is uniform.
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
    """Chooses up to `num_lengths` lengths over the range of the ratio.

    Args:
      length: L, tokens of an image.
      ratio: the smallest masked share.
      width: the masked share is uniform in [ratio, ratio + width]. A width of 0 (MDT
        v1) gives one length, exactly int(L (1 - ratio)).
      num_lengths: the number of lengths, and so of compilations.
      multiple: of which all lengths are multiples. Where the range does not hold
        `num_lengths` multiples with the right mean, `multiple` is halved until it does.
    """
    low, high = num_kept(length, ratio + width), num_kept(length, ratio)
    if low == high or num_lengths == 1:
      middle = num_kept(length, ratio + width / 2)
      return cls((middle,), (1.0,))
    # Clipped, because rounding may put the mean of a narrow range just outside it.
    mean = min(max(_mean_kept(length, ratio, width), low), high)
    count = min(num_lengths, high - low + 1)
    while True:
      first, last = -(-low // multiple), high // multiple
      steps = np.linspace(low / multiple, high / multiple, count)
      lengths = np.unique(np.clip(np.round(steps), first, last)) * multiple
      if len(lengths) == count:
        # The flattest distribution with that mean is linear in the lengths.
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
    """The number of kept tokens at a step: a function of (seed, step), on any host."""
    rng = np.random.default_rng((seed, step))
    return self.lengths[rng.choice(len(self.lengths), p=self.probabilities)]


def _mean_kept(length: int, ratio: float, width: float) -> float:
  """Mean of int(length (1 - r)) for r uniform in [ratio, ratio + width]."""
  low, high = length * (1 - ratio - width), length * (1 - ratio)
  counts = np.arange(int(low), int(high) + 1)
  share = np.minimum(counts + 1, high) - np.maximum(counts, low)
  return float(np.sum(counts * share) / (high - low))
