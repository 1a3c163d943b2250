"""The variational bound on the likelihood of images, over all diffusion steps."""

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
  """Computes the variational bound of each image (arXiv 2102.09672, equations 4-7).

  The network is called S times in one lax.scan. Call this function under jax.jit. The
  result is a likelihood only for pixels, uint8 levels scaled to [-1, 1]. For latents,
  the terms can only be compared with each other.

  Args:
    model_fn: (x_t (B, H, W, C), original timesteps (B,)) -> output (B, H, W, C or 2C).
    diffusion: the process. A respaced process gives a coarser bound with fewer calls.
    x0: (B, H, W, C) float32 images.
    key: random key of the noise, or (B,) keys, one per sample.
    clip_denoised: whether to clip the predicted x0 to [-1, 1], as released.
    noise: (S, B, H, W, C) noise of each step, step S - 1 first; None to draw noise.

  Returns:
    name -> array, in bits per dimension or as mean squared error. The axis S starts
    with step S - 1, as in the released code.
      "vb" (B, S): the term of each step;
      "prior_bpd" (B,): see `prior_bpd`;
      "total_bpd" (B,): the sum of "vb" over steps plus "prior_bpd";
      "xstart_mse" (B, S): mean squared error of the predicted x0;
      "mse" (B, S): mean squared error of the predicted noise.
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
  """Computes KL(q(x_T | x_0) || N(0, 1)) in bits per dimension.

  The term does not depend on the network.

  Args:
    diffusion: the process.
    x0: (B, H, W, C) images.

  Returns:
    (B,).
  """
  signal = diffusion.alphas_cumprod[-1]
  # KL(N(sqrt(a) x0, 1 - a) || N(0, 1)). `rest` is computed in float64, because its
  # terms would cancel in float32.
  rest = -np.log1p(-signal) - signal
  return mean_flat(signal * x0**2 + rest) / (2 * np.log(2))
