"""Properties of the network at random sizes, for which no outputs are recorded."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.mdt import MDT
from tests import reference

CASES = range(2, 6)  # both variants, both sizes of patches, squares and rectangles
BATCH = 2
TOLERANCE = reference.FORWARD_TOLERANCE


@functools.cache
def draw(case):
  """(model, params, inputs, noise) of random size: patch 4 or 8, an odd grid."""
  rng = np.random.default_rng(case)
  variant = ("MDT", "MDTv2")[case % 2]
  depth = int(rng.integers(3, 8))
  decode_depth = int(rng.integers(1, depth - 1))
  if variant == "MDTv2" and (depth - decode_depth) % 2:
    depth += 1
  num_heads, patch_size = int(rng.integers(1, 5)), int(rng.choice([4, 8]))
  grid = int(rng.choice([3, 5]))
  # Half of the cases are no squares.
  size = grid * patch_size
  size = size if case < 4 else (size, size + patch_size * int(rng.integers(1, 3)))
  model = MDT(
    variant=variant,
    input_size=size,
    patch_size=patch_size,
    in_channels=int(rng.integers(1, 5)),
    num_classes=int(rng.integers(1, 6)),
    hidden_size=num_heads * int(rng.choice([4, 8])),
    depth=depth,
    num_heads=num_heads,
    decode_depth=decode_depth,
    mlp_ratio=float(rng.choice([1.5, 4.0])),
  )
  model.check()
  inputs = (
    rng.standard_normal((BATCH, *model.input_shape)).astype(np.float32),
    rng.uniform(0, 999, BATCH).astype(np.float32),
    rng.integers(0, model.num_classes + 1, BATCH),
  )
  noise = rng.random((BATCH, model.num_tokens)).astype(np.float32)
  return model, reference.random_params(model, seed=case), inputs, noise


@functools.cache
def forward(case, num_keep=None, unroll=1):
  """Returns the compiled forward pass as a function of the mask's noise."""
  model, params, inputs, _ = draw(case)
  model = model.clone(unroll=unroll)

  @jax.jit
  def run(noise):
    mask = None if num_keep is None else token_mask_from_noise(noise, num_keep)
    return model.apply({"params": params}, *inputs, mask)

  return run


def half(case):
  return draw(case)[0].num_tokens // 2


@pytest.mark.parametrize("case", CASES)
def test_mask_of_ratio_zero_matches_the_unmasked_pass(case):
  """The order of the kept tokens has no effect. The side block replaces no token."""
  model, _, _, noise = draw(case)
  full = np.asarray(forward(case)(noise))
  masked = forward(case, model.num_tokens)(noise)
  assert reference.relative_error(masked, full) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_rolled_and_unrolled_blocks_agree(case):
  noise = draw(case)[3]
  rolled = np.asarray(forward(case, half(case))(noise))
  unrolled = forward(case, half(case), unroll=-1)(noise)
  assert reference.relative_error(unrolled, rolled) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_permuted_noise_permutes_the_mask(case):
  model, _, _, noise = draw(case)
  order = np.random.default_rng(case).permutation(model.num_tokens)
  mask, permuted = (
    token_mask_from_noise(n, half(case)) for n in (noise, noise[:, order])
  )
  np.testing.assert_array_equal(permuted.removed, mask.removed[:, order])
  np.testing.assert_array_equal(permuted.ids_restore, mask.ids_restore[:, order])
  np.testing.assert_array_equal(order[permuted.ids_keep], mask.ids_keep)


@pytest.mark.parametrize("case", CASES)
def test_order_of_the_kept_tokens_does_not_matter(case):
  """The output depends only on the set of hidden tokens."""
  noise = draw(case)[3]
  ranks = noise.argsort(axis=1).argsort(axis=1)
  # The same tokens are kept, in the opposite order.
  reversed_noise = np.where(ranks < half(case), half(case) - 1 - ranks, ranks)
  run = forward(case, half(case))
  expected = np.asarray(run(noise))
  actual = run(reversed_noise.astype(np.float32))
  assert reference.relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_hiding_tokens_changes_the_output(case):
  """Otherwise, a network that ignores the mask would pass the tests above."""
  noise = draw(case)[3]
  full = np.asarray(forward(case)(noise))
  assert (
    reference.relative_error(forward(case, half(case))(noise), full) > 20 * TOLERANCE
  )
