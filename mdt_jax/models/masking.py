"""Which tokens the encoder sees: masks of static length, and the lengths drawn.

The released code masks int(L (1 - ratio)) tokens by sorting noise, per sample
(MAE's masking, arXiv 2111.06377). XLA compiles once for each number of kept
tokens, so MDTv2's ratio, uniform in [ratio, ratio + width] there, is drawn here
from a few lengths.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@flax.struct.dataclass
class TokenMask:
  """Which K of L tokens are kept, for each of B samples.

  Attributes:
    ids_keep: (B, K) int, places of the kept tokens, in the order that the encoder
      sees them.
    ids_restore: (B, L) int, for each place the index of its token in the sequence
      "kept tokens, then removed ones".
    removed: (B, L) bool, true where the token is hidden.
  """

  ids_keep: Array
  ids_restore: Array
  removed: Array


def token_mask_from_noise(noise: Array, num_keep: int) -> TokenMask:
  """Keeps the `num_keep` tokens with the smallest noise (B, L), per sample."""
  order = jnp.argsort(noise, axis=1)
  ids_restore = jnp.argsort(order, axis=1)
  return TokenMask(
    ids_keep=order[:, :num_keep],
    ids_restore=ids_restore,
    removed=ids_restore >= num_keep,
  )


def random_token_mask(key: Array, batch: int, length: int, num_keep: int) -> TokenMask:
  """Keeps `num_keep` of `length` tokens at random, another set for each sample."""
  return token_mask_from_noise(jax.random.uniform(key, (batch, length)), num_keep)


def keep_tokens(tokens: Array, mask: TokenMask) -> Array:
  """The kept tokens: (B, L, D) -> (B, K, D)."""
  return jnp.take_along_axis(tokens, mask.ids_keep[..., None], axis=1)


def restore_tokens(kept: Array, mask_token: Array, mask: TokenMask) -> Array:
  """Puts kept tokens (B, K, D) back in place, `mask_token` (D,) elsewhere."""
  batch, num_keep, dim = kept.shape
  num_removed = mask.ids_restore.shape[1] - num_keep
  fill = jnp.broadcast_to(mask_token.astype(kept.dtype), (batch, num_removed, dim))
  tokens = jnp.concatenate([kept, fill], axis=1)
  return jnp.take_along_axis(tokens, mask.ids_restore[..., None], axis=1)


def num_kept(length: int, ratio: float) -> int:
  """Tokens that the released code keeps of `length`: int(length (1 - ratio))."""
  return int(length * (1 - ratio))


@dataclasses.dataclass(frozen=True)
class KeptLengths:
  """The numbers of kept tokens a run uses, and how often each is drawn.

  Attributes:
    lengths: increasing numbers of kept tokens; the step is compiled once for each.
    probabilities: of the same length; their mean length is that of the released
      code's uniform ratio.
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
    """Chooses up to `num_lengths` kept lengths over the range of the ratio.

    Args:
      length: L, tokens of an image.
      ratio: the smallest masked share.
      width: the masked share is uniform in [ratio, ratio + width]. With 0 (MDT v1)
        there is one length, exactly int(L (1 - ratio)).
      num_lengths: how many lengths, so how many compilations.
      multiple: lengths are multiples of this where the range is wide enough to hold
        `num_lengths` of them with the right mean, else of a half, a quarter, ….
    """
    low, high = num_kept(length, ratio + width), num_kept(length, ratio)
    if low == high or num_lengths == 1:
      middle = num_kept(length, ratio + width / 2)
      return cls((middle,), (1.0,))
    # Clipped, as rounding may put the mean of a narrow range just outside it.
    mean = min(max(_mean_kept(length, ratio, width), low), high)
    count = min(num_lengths, high - low + 1)
    while True:
      first, last = -(-low // multiple), high // multiple
      steps = np.linspace(low / multiple, high / multiple, count)
      lengths = np.unique(np.clip(np.round(steps), first, last)) * multiple
      if len(lengths) == count:
        # The flattest distribution on these lengths with that mean is linear in them.
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
    """The number of kept tokens at a step: the same on every host, any time."""
    rng = np.random.default_rng((seed, step))
    return self.lengths[rng.choice(len(self.lengths), p=self.probabilities)]


def _mean_kept(length: int, ratio: float, width: float) -> float:
  """Mean of int(length (1 - r)) for r uniform in [ratio, ratio + width]."""
  low, high = length * (1 - ratio - width), length * (1 - ratio)
  counts = np.arange(int(low), int(high) + 1)
  share = np.minimum(counts + 1, high) - np.maximum(counts, low)
  return float(np.sum(counts * share) / (high - low))
