"""calc_bpd: agreement with the released code, and bounds of known networks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.likelihood import calc_bpd, prior_bpd
from tests import reference
from tests.diffusion import toy

# Output of calc_bpd_loop (sail-sg/MDT) for toy.network with 10 steps and this noise.
RECORDED = reference.load("bpd")
X0, NOISE = reference.to_nhwc(RECORDED["x0"]), reference.to_nhwc(RECORDED["noise"])
TERMS = ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse")


@functools.cache
def bound(clip_denoised):
  diffusion = GaussianDiffusion.create(spacing="10")
  calc = jax.jit(
    lambda x0, noise: calc_bpd(
      toy.network,
      diffusion,
      x0,
      jax.random.key(0),
      clip_denoised=clip_denoised,
      noise=noise,
    )
  )
  return calc(X0, NOISE)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_bound_matches_reference(clip_denoised, term):
  expected = RECORDED[f"{'clip' if clip_denoised else 'free'}/{term}"]
  reference.assert_matches(
    f"calc_bpd, {term}",
    bound(clip_denoised)[term],
    expected,
    reference.LOOP_TOLERANCE,
  )


def test_prior_matches_the_kl_divergence_in_float64():
  diffusion = GaussianDiffusion.create()
  variance = 1 - diffusion.alphas_cumprod[-1]
  x0 = X0.astype(np.float64)
  kl = 0.5 * (-1 - np.log(variance) + variance + (1 - variance) * x0**2)
  expected = kl.mean(axis=(1, 2, 3)) / np.log(2)
  np.testing.assert_allclose(prior_bpd(diffusion, X0), expected, rtol=1e-6)


def test_total_is_the_sum_of_the_terms():
  terms = bound(True)
  total = terms["vb"].sum(axis=1) + terms["prior_bpd"]
  np.testing.assert_allclose(terms["total_bpd"], total, rtol=1e-6)


def test_perfect_network_has_zero_divergence():
  """The last step is excluded, as its term is a likelihood and not a divergence."""
  diffusion = GaussianDiffusion.create(prediction="x0", variance="fixed_small")
  terms = calc_bpd(lambda x, t: jnp.asarray(X0), diffusion, X0, jax.random.key(0))
  np.testing.assert_allclose(terms["vb"][:, :-1], 0, atol=1e-6)
  np.testing.assert_allclose(terms["xstart_mse"], 0, atol=1e-10)


def test_bound_with_its_own_key_does_not_depend_on_the_batch():
  diffusion = GaussianDiffusion.create(spacing="5")
  calc = jax.jit(lambda x0, keys: calc_bpd(toy.network, diffusion, x0, keys)["vb"])
  keys = jax.random.split(jax.random.key(3), 2)
  whole, alone = calc(X0, keys), calc(X0[1:], keys[1:])
  np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5)
