"""Likelihoods: DDPM's variational bound, and the density of a probability flow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.diffusion.loops import step_noise
from mdt_jax.diffusion.process import mean_flat
from mdt_jax.diffusion.runge_kutta import RUNGE_KUTTA, integrate
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


def calc_flow_bpd(
  model_fn: ModelFn,
  process: ContinuousProcess,
  x0: Array,
  key: Array,
  *,
  num_steps: int = 100,
  method: str = "ode_heun",
  signs: Array | None = None,
) -> dict[str, Array]:
  """Computes the density of each image under the probability flow.

  The change of variables of the flow from x0 to noise gives the density (arXiv
  2011.13456, section 4.3; Hutchinson's estimate of the divergence with random signs).
  Call this function under jax.jit. Data of pixels needs noise that fills the gaps
  between its levels.

  Args:
    model_fn: (x_t (B, H, W, C), network's times (B,)) -> output (B, H, W, C).
    process: a process in continuous time.
    x0: (B, H, W, C) float32 images.
    key: random key of the signs, or (B,) keys, one per sample.
    num_steps: number of steps, evenly spaced in time.
    method: a key of `runge_kutta.RUNGE_KUTTA`, such as "ode_euler".
    signs: (calls, B, H, W, C) of -1 and 1, for each call of the network; None to draw
      them.

  Returns:
    name -> (B,), in bits per dimension of the density: "total_bpd", the sum of
      "prior_bpd", the density of the noise that the flow ends at, and
      "divergence_bpd", the change of the volume. And "noise" (B, H, W, C).
  """
  x0 = jnp.asarray(x0, jnp.float32)
  axes = tuple(range(1, x0.ndim))
  low, high = process.sampling_interval

  def slope(state: tuple[Array, Array], t: Array, call: Array) -> tuple[Array, Array]:
    if signs is None:
      sign = jnp.where(step_noise(key, call, x0.shape) >= 0, 1.0, -1.0)
    else:
      sign = jnp.asarray(signs)[call]

    def velocity(x: Array) -> Array:
      times = jnp.full((x.shape[0],), t)
      output = model_fn(x, process.network_time(times)).astype(jnp.float32)
      return process.to_velocity(output, x, times)

    found, pull = jax.vjp(velocity, state[0])
    (product,) = pull(sign)
    return found, jnp.sum(sign * product, axes)

  scale = process.alpha(np.array(process.start_time))
  times = np.linspace(low, high, num_steps + 1)
  start = (x0 * scale, jnp.zeros(x0.shape[0]))
  noise, change = integrate(slope, times, start, RUNGE_KUTTA[method])
  std = process.noise_scale
  prior = mean_flat((noise / std) ** 2 + np.log(2 * np.pi * std**2)) / (2 * np.log(2))
  volume = change / x0[0].size + np.log(scale)
  divergence = -volume / np.log(2)
  return {
    "total_bpd": prior + divergence,
    "prior_bpd": prior,
    "divergence_bpd": divergence,
    "noise": noise,
  }


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
