"""DDPM and DDIM sampling, the whole loop one `lax.scan`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.errors import SettingError, check_choice

Array = jax.Array

METHODS = ("ddpm", "ddim")


def sample(
  model_fn: ModelFn,
  diffusion: GaussianDiffusion,
  x_T: Array,
  key: Array,
  *,
  method: str = "ddpm",
  eta: float = 0.0,
  clip_denoised: bool = False,
  noise: Array | None = None,
) -> Array:
  """Samples x_0 from x_T. To be jitted by the caller, with the network inside.

  Args:
    model_fn: (x_t (B, H, W, C), original timesteps (B,)) -> output (B, H, W, C or
      2C); see `guidance.guided`.
    diffusion: the process, respaced to the steps wanted.
    x_T: (B, H, W, C) standard normal noise to start from.
    key: random key of the noise of the steps, or (B,) keys, one a sample: then the
      noise of a sample does not depend on the rest of the batch.
    method: "ddpm", ancestral sampling, or "ddim" (arXiv 2010.02502).
    eta: noise of DDIM: 0 is deterministic, 1 as much as DDPM.
    clip_denoised: clip each x0 predicted to [-1, 1]; for pixels.
    noise: (S, B, H, W, C) noise of each step in the order they are taken, instead
      of draws from `key`.

  Returns:
    (B, H, W, C) float32.
  """
  check_choice("method", method, METHODS)
  if not 0 <= eta <= 1:
    raise SettingError("eta", eta, "must lie in [0, 1]")
  step_fn = _ddpm_step if method == "ddpm" else _ddim_step
  x_T = jnp.asarray(x_T, jnp.float32)
  batch = x_T.shape[0]

  def body(x: Array, inputs: tuple[Array, Array | None]) -> tuple[Array, None]:
    step, given = inputs
    drawn = step_noise(key, step, x.shape) if given is None else given
    t = jnp.full((batch,), step)
    output = model_fn(x, diffusion.model_timesteps(t)).astype(jnp.float32)
    # No noise is added by the last step.
    drawn = jnp.where(step > 0, drawn, 0)
    return step_fn(diffusion, output, x, t, drawn, eta, clip_denoised), None

  steps = jnp.arange(diffusion.num_timesteps, dtype=jnp.int32)[::-1]
  x_0, _ = jax.lax.scan(body, x_T, (steps, noise))
  return x_0


def step_noise(key: Array, step: Array, shape: tuple[int, ...]) -> Array:
  """Standard normal noise of a step from one key, or from a key for each sample."""
  if key.ndim == 0:
    return jax.random.normal(jax.random.fold_in(key, step), shape)
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, step)
  return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)


def _ddpm_step(
  diffusion: GaussianDiffusion,
  output: Array,
  x: Array,
  t: Array,
  noise: Array,
  eta: float,
  clip_denoised: bool,
) -> Array:
  """x_{t-1} of DDPM, algorithm 2."""
  del eta
  p = diffusion.p_mean_variance(output, x, t, clip_denoised)
  return p.mean + jnp.exp(0.5 * p.log_variance) * noise


def _ddim_step(
  diffusion: GaussianDiffusion,
  output: Array,
  x: Array,
  t: Array,
  noise: Array,
  eta: float,
  clip_denoised: bool,
) -> Array:
  """x_{t-1} of DDIM, equations 12 and 16."""
  x0 = diffusion.p_mean_variance(output, x, t, clip_denoised).x0
  epsilon = diffusion.predict_epsilon(x0, x, t)
  alpha, alpha_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
  sigmas = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  step = t[0]
  sigma = jnp.asarray(sigmas, jnp.float32)[step]
  direction = jnp.asarray(np.sqrt(1 - alpha_prev - sigmas**2), jnp.float32)[step]
  signal = jnp.asarray(np.sqrt(alpha_prev), jnp.float32)[step]
  return signal * x0 + direction * epsilon + sigma * noise
