"""Token masks of static length, and KeptLengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.masking import (
  KeptLengths,
  keep_tokens,
  random_token_mask,
  restore_tokens,
  token_mask_from_noise,
)
from tests import reference


@pytest.mark.parametrize("name", reference.MDT_FIXTURES)
def test_mask_of_recorded_noise_matches_reference(name):
  recorded = reference.load(name)
  ids_keep = recorded["ids_keep"]
  mask = token_mask_from_noise(recorded["mask_noise"], ids_keep.shape[1])
  np.testing.assert_array_equal(mask.ids_keep, ids_keep)
  np.testing.assert_array_equal(mask.ids_restore, recorded["ids_restore"])
  np.testing.assert_array_equal(mask.removed, recorded["mask"] == 1)


def test_restore_tokens_fills_removed_places_with_the_mask_token():
  mask = random_token_mask(jax.random.key(0), 3, 10, 4)
  tokens = jax.random.normal(jax.random.key(1), (3, 10, 5))
  fill = jnp.arange(5.0)
  restored = restore_tokens(keep_tokens(tokens, mask), fill, mask)
  expected = jnp.where(mask.removed[..., None], fill, tokens)
  np.testing.assert_array_equal(restored, expected)


def test_every_token_is_kept_equally_often():
  mask = random_token_mask(jax.random.key(0), 4000, 8, 2)
  np.testing.assert_allclose((~mask.removed).mean(axis=0), 0.25, atol=0.03)


def test_permuted_noise_permutes_the_mask():
  noise = jax.random.uniform(jax.random.key(0), (2, 12))
  order = jax.random.permutation(jax.random.key(1), 12)
  mask = token_mask_from_noise(noise, 5)
  permuted = token_mask_from_noise(noise[:, order], 5)
  np.testing.assert_array_equal(permuted.removed, mask.removed[:, order])


def mean_of_the_released_code(length, ratio, width):
  ratios = ratio + width * (np.arange(200_000) + 0.5) / 200_000
  return np.floor(length * (1 - ratios)).mean()


CASES = [
  (length, ratio, width, count, multiple)
  for length in (1, 4, 16, 36, 64, 256, 1024)
  for ratio, width in ((0.3, 0.2), (0.0, 0.2), (0.5, 0.3), (0.75, 0.05), (0.1, 0.02))
  for count, multiple in ((4, 8), (2, 8), (8, 16), (3, 1))
] + [
  # The mean lies at the edge of the range, up to rounding.
  (length, ratio, width, 4, 8)
  for length, ratio, width in (
    (9, 1 / 9, 1 / 9),
    (36, 1 / 9, 1 / 36),
    (144, 7 / 9, 1 / 144),
    (400, 0.7075, 0.0025),
  )
]


@pytest.mark.parametrize(("length", "ratio", "width", "count", "multiple"), CASES)
def test_kept_lengths_have_the_mean_and_range_of_the_released_ratio(
  length, ratio, width, count, multiple
):
  kept = KeptLengths.create(length, ratio, width, count, multiple)
  p = np.array(kept.probabilities)
  assert 1 <= len(kept.lengths) <= count
  assert p.min() >= 0
  np.testing.assert_allclose(p.sum(), 1)
  low, high = int(length * (1 - ratio - width)), int(length * (1 - ratio))
  assert low <= kept.lengths[0] <= kept.lengths[-1] <= high
  if len(kept.lengths) > 1:
    mean = mean_of_the_released_code(length, ratio, width)
    np.testing.assert_allclose(p @ kept.lengths, mean, atol=2e-3)


def test_kept_lengths_of_256_tokens_match_the_paper():
  kept = KeptLengths.create(256, 0.3, 0.2)
  assert kept.lengths == (128, 144, 160, 176)


@pytest.mark.parametrize("length", [16, 36, 64, 256, 1024])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.4, 0.45, 0.7])
def test_v1_keeps_as_many_tokens_as_the_released_code(length, ratio):
  assert KeptLengths.create(length, ratio).lengths == (int(length * (1 - ratio)),)


def test_length_depends_only_on_seed_and_step():
  kept = KeptLengths.create(256, 0.3, 0.2)
  forwards = [kept.draw(3, step) for step in range(50)]
  backwards = [kept.draw(3, step) for step in reversed(range(50))]
  assert forwards == backwards[::-1]


def test_seeds_draw_different_lengths():
  kept = KeptLengths.create(256, 0.3, 0.2)
  assert [kept.draw(0, s) for s in range(50)] != [kept.draw(1, s) for s in range(50)]


def test_lengths_are_drawn_with_their_probabilities():
  kept = KeptLengths.create(256, 0.3, 0.2)
  draws = np.array([kept.draw(0, step) for step in range(4000)])
  shares = [(draws == length).mean() for length in kept.lengths]
  np.testing.assert_allclose(shares, kept.probabilities, atol=0.03)


@pytest.mark.parametrize(("platform", "fixed"), [("cpu", False), ("cuda", True)])
def test_order_of_axes_is_fixed_on_gpus_alone(platform, fixed):
  def both(tokens, noise):
    mask = token_mask_from_noise(noise, 10)
    return (restore_tokens(keep_tokens(tokens, mask), jnp.zeros(8), mask) ** 2).sum()

  shapes = jnp.zeros((4, 16, 8)), jnp.zeros((4, 16))
  traced = jax.jit(jax.grad(both)).trace(*shapes)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # Of the tokens to keep and to restore, and of the gradients by them.
  assert text.count("LayoutConstraint") == (4 if fixed else 0)
