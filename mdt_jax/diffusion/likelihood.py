"""The bound on the likelihood of images, over all steps of the diffusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.diffusion.process import mean_flat
from mdt_jax.diffusion.samplers import step_noise
from mdt_jax.types import Array


def calc_bpd(
  model_fn: ModelFn,
  diffusion: GaussianDiffusion,
  x0: Array,
  key: Array,
  *,
  clip_denoised: bool = True,
  noise: Array | None = None,
) -> dict[str, Array]:
  """The variational bound of each image (improved DDPM, arXiv 2102.09672, eq. 4-7).

  One `lax.scan` over the steps, S calls of the network. To be jitted by the caller,
  with the network inside. The likelihood is one of pixels: uint8 levels scaled to
  [-1, 1]; of latents only the terms' sizes are worth a look.

  Args:
    model_fn: (x_t (B, H, W, C), original timesteps (B,)) -> output (B, H, W, C or
      2C).
    diffusion: the process; respaced, a coarser bound in fewer calls.
    x0: (B, H, W, C) float32 images.
    key: random key of the noise of the steps, or (B,) keys, one a sample.
    clip_denoised: clip each x0 predicted to [-1, 1], as released.
    noise: (S, B, H, W, C) noise of each step, last step first, instead of draws.

  Returns:
    "total_bpd" (B,) bits a dimension, the sum of "prior_bpd" (B,), which no network
    changes, and of "vb" (B, S), the terms of the steps; "xstart_mse" (B, S) and
    "mse" (B, S), squared errors of the x0 and of the noise predicted. Steps stand in
    the order of the released code: S - 1 first.
  """
  x0 = jnp.asarray(x0, jnp.float32)

  def body(_: None, inputs: tuple[Array, Array | None]) -> tuple[None, dict]:
    step, given = inputs
    drawn = step_noise(key, step, x0.shape) if given is None else given
    t = jnp.full((x0.shape[0],), step)
    x_t = diffusion.q_sample(x0, t, drawn)
    output = model_fn(x_t, diffusion.network_time(t)).astype(jnp.float32)
    vb, p = diffusion.variational_bound(output, x0, x_t, t, clip_denoised)
    epsilon = diffusion.noise_from_x0(p.x0, x_t, t)
    terms = {
      "vb": vb,
      "xstart_mse": mean_flat((p.x0 - x0) ** 2),
      "mse": mean_flat((epsilon - drawn) ** 2),
    }
    return None, terms

  steps = jnp.arange(diffusion.num_timesteps, dtype=jnp.int32)[::-1]
  _, terms = jax.lax.scan(body, None, (steps, noise))
  terms = {name: term.T for name, term in terms.items()}
  prior = prior_bpd(diffusion, x0)
  return {"total_bpd": terms["vb"].sum(axis=1) + prior, "prior_bpd": prior, **terms}


def prior_bpd(diffusion: GaussianDiffusion, x0: Array) -> Array:
  """KL(q(x_T | x_0) || N(0, 1)) of images (B, H, W, C): (B,) bits a dimension."""
  signal = diffusion.alphas_cumprod[-1]
  # KL of N(sqrt(a) x0, 1 - a), with what would cancel in float32 taken together.
  rest = -np.log1p(-signal) - signal
  return mean_flat(signal * x0**2 + rest) / (2 * np.log(2))
