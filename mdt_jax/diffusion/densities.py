"""KL divergence and likelihood of Gaussians, for the variational bound."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mdt_jax.types import Array


def normal_kl(
  mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array
) -> Array:
  """Computes KL(N(mean1, variance1) || N(mean2, variance2)) elementwise, in nats."""
  ratio = jnp.exp(log_variance1 - log_variance2)
  distance = (mean1 - mean2) ** 2 * jnp.exp(-log_variance2)
  return 0.5 * (-1 + log_variance2 - log_variance1 + ratio + distance)


def discretized_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
  """Computes the log likelihood of 8-bit pixels under a Gaussian, in nats.

  A pixel's likelihood is the Gaussian's mass in the pixel's bin of width 2 / 255. The
  cumulative distribution function is the tanh approximation of the released code.

  Args:
    x: uint8 levels scaled to [-1, 1], of any shape.
    mean: mean of the Gaussian.
    log_scale: log of its standard deviation.

  Returns:
    Log likelihoods, of the shape of x.
  """
  inverse = jnp.exp(-log_scale)
  upper = _approximate_normal_cdf(inverse * (x - mean + 1 / 255))
  lower = _approximate_normal_cdf(inverse * (x - mean - 1 / 255))

  def log(probability: Array) -> Array:
    return jnp.log(jnp.maximum(probability, 1e-12))

  inside = jnp.where(x > 0.999, log(1 - lower), log(upper - lower))
  return jnp.where(x < -0.999, log(upper), inside)


def _approximate_normal_cdf(x: Array) -> Array:
  """Computes the tanh approximation of the standard normal CDF."""
  return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
