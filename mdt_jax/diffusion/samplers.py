"""Sampling: from noise to latents, the whole loop one `lax.scan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import Guidance, ModelFn
from mdt_jax.diffusion.process import Levels, Process
from mdt_jax.diffusion.solvers import SOLVERS, SPACING_OF, Rows, solver_rows
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

METHODS = ("ddpm", "ddim", *SOLVERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """How latents are drawn: a respaced process, a method and guidance.

  Attributes:
    process: respaced; its steps are those of the sampler.
    method: one of METHODS.
    eta: noise of "ddim", from 0 (none) to 1 (as much as "ddpm").
    clip_denoised: clip each x0 predicted to [-1, 1]; for pixels.
    guidance: classifier-free guidance.
  """

  process: Process
  method: str
  eta: float
  clip_denoised: bool
  guidance: Guidance

  @classmethod
  def create(
    cls,
    process: Process,
    guidance: Guidance,
    *,
    method: str = "ddpm",
    num_steps: int = 250,
    spacing: str | None = None,
    eta: float = 0.0,
    clip_denoised: bool = False,
  ) -> Sampler:
    """Respaces a process for a method.

    Args:
      process: as it is trained.
      guidance, method, eta, clip_denoised: see the attributes.
      num_steps: steps of the sampler.
      spacing: what the steps are even in, see `Process.respaced`; None for what suits
        the method best.

    Raises:
      SettingError: the process has no such steps, or the method is unknown.
    """
    check_choice("method", method, METHODS)
    if method not in SOLVERS:
      _as_gaussian(process, method)
    spacing = spacing or SPACING_OF.get(method, "uniform")
    if spacing == "uniform" and method not in SOLVERS:
      spacing = ""  # as released
    respaced = process.respaced(spacing, num_steps)
    return cls(respaced, method, eta, clip_denoised, guidance)

  @property
  def is_random(self) -> bool:
    """Whether the steps add noise."""
    return is_random(self.method, self.eta)

  @property
  def num_calls(self) -> int:
    """Passes of the network for one image, of both halves of guidance."""
    steps = self.process.levels().alpha.size
    calls = 2 * steps - 1 if self.method == "heun" else steps
    return calls * (1 if self.guidance.scale == 1 else 2)


def sample(
  model_fn: ModelFn,
  diffusion: Process,
  x_T: Array,
  key: Array,
  *,
  method: str = "ddpm",
  eta: float = 0.0,
  clip_denoised: bool = False,
  noise: Array | None = None,
  num_steps: int | None = None,
  hold: Callable[[Array, Array], Array] | None = None,
  repeats: int = 1,
) -> Array:
  """Samples x_0 from x_T. To be jitted by the caller, with the network inside.

  Args:
    model_fn: (x_t (B, H, W, C), original timesteps (B,)) -> output (B, H, W, C or
      2C); see `guidance.guided`.
    diffusion: the process, respaced to the steps wanted.
    x_T: (B, H, W, C) standard normal noise to start from.
    key: random key of the noise of the steps, or (B,) keys, one a sample: then the
      noise of a sample does not depend on the rest of the batch.
    method: "ddpm", ancestral sampling; "ddim" (arXiv 2010.02502); or one of
      `solvers.solver_rows`, which take fewer steps.
    eta: noise of DDIM: 0 is deterministic, 1 as much as DDPM.
    clip_denoised: clip each x0 predicted to [-1, 1]; for pixels.
    noise: (calls, B, H, W, C) noise of each call of the network, in order, instead of
      draws from `key`.
    num_steps: take the last so many steps only; x_T is then the latent that they
      start from.
    hold: (x (B, H, W, C), step ()) -> x; changes the latent before each call of the
      network, to hold what is known of it.
    repeats: take each step so often, with its noise added again in between, so that
      the rest fits what is held (RePaint, arXiv 2201.09865, with jumps of one step);
      "ddpm" and "ddim" alone.

  Returns:
    (B, H, W, C) float32.
  """
  check_choice("method", method, METHODS)
  if not 0 <= eta <= 1:
    raise SettingError("eta", eta, "must lie in [0, 1]")
  if repeats < 1 or (repeats > 1 and method in SOLVERS):
    raise SettingError("repeats", repeats, "must be 1, or more with ddpm or ddim")
  x_T = jnp.asarray(x_T, jnp.float32)
  levels = diffusion.levels()
  total = levels.alpha.size
  num_steps = total if num_steps is None else num_steps

  def draw(step: Array, given: Array | None) -> Array:
    return step_noise(key, step, x_T.shape) if given is None else given

  def predict(x: Array, step: Array) -> tuple[Array, Array]:
    t = jnp.full((x.shape[0],), step)
    return model_fn(x, diffusion.network_time(t)).astype(jnp.float32), t

  def ancestral(
    x: Array, inputs: tuple[Array, Array, Array | None]
  ) -> tuple[Array, None]:
    gaussian = _as_gaussian(diffusion, method)
    step, repeat, given = inputs
    if repeats > 1:
      beta = jnp.asarray(gaussian.betas, jnp.float32)[step]
      again = draw(step + (repeats + repeat) * total, None)
      noisier = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * again
      x = jnp.where(repeat > 0, noisier, x)
    x = x if hold is None else hold(x, step)
    output, t = predict(x, step)
    # No noise is added by the last step.
    number = step + repeat * total
    drawn = jnp.where(step > 0, draw(number, given), 0)
    step_fn = _ddpm_step if method == "ddpm" else _ddim_step
    return step_fn(gaussian, output, x, t, drawn, eta, clip_denoised), None

  def solve(
    state: tuple[Array, Array, Array], inputs: tuple[Rows, Array | None]
  ) -> tuple[tuple[Array, Array, Array], None]:
    x, start, x0_before = state
    row, given = inputs
    x = x if hold is None else hold(x, row.step)
    output, t = predict(x, row.step)
    x0 = diffusion.to_x0(output, x, t)
    x0 = jnp.clip(x0, -1, 1) if clip_denoised else x0
    start = jnp.where(row.corrects, start, x)
    x = row.keep * start + row.now * x0 + row.before * x0_before
    if is_random(method):
      x += row.noise * draw(row.step, given)
    return (x, start, x0), None

  if method in SOLVERS:
    rows = solver_rows(Levels(*(level[:num_steps] for level in levels)), method)
    state = (x_T, x_T, jnp.zeros_like(x_T))
    (x_0, _, _), _ = jax.lax.scan(solve, state, (rows, noise))
    return x_0
  steps = jnp.arange(num_steps, dtype=jnp.int32)[::-1].repeat(repeats)
  repeat = jnp.tile(jnp.arange(repeats, dtype=jnp.int32), num_steps)
  x_0, _ = jax.lax.scan(ancestral, x_T, (steps, repeat, noise))
  return x_0


def is_random(method: str, eta: float = 0.0) -> bool:
  """Whether the steps of a method add noise."""
  return method in ("ddpm", "dpm++sde") or (method == "ddim" and eta > 0)


def step_noise(key: Array, step: Array, shape: tuple[int, ...]) -> Array:
  """Standard normal noise of a step from one key, or from a key for each sample."""
  if key.ndim == 0:
    return jax.random.normal(jax.random.fold_in(key, step), shape)
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, step)
  return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)


def _as_gaussian(process: Process, method: str) -> GaussianDiffusion:
  """The process, which the ancestral methods take the posterior of."""
  if not isinstance(process, GaussianDiffusion):
    raise SettingError(
      "method", method, f"takes a gaussian process; accepted are {', '.join(SOLVERS)}"
    )
  return process


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
  epsilon = diffusion.noise_from_x0(x0, x, t)
  alpha, alpha_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
  sigmas = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  step = t[0]
  sigma = jnp.asarray(sigmas, jnp.float32)[step]
  direction = jnp.asarray(np.sqrt(1 - alpha_prev - sigmas**2), jnp.float32)[step]
  signal = jnp.asarray(np.sqrt(alpha_prev), jnp.float32)[step]
  return signal * x0 + direction * epsilon + sigma * noise
