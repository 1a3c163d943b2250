"""Samplers as network calls, one after the other: DDPM, DDIM and solvers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.process import Levels, Process
from mdt_jax.diffusion.solvers import SOLVERS, Rows, solver_rows
from mdt_jax.diffusion.time_solvers import RANDOM, TIME_SOLVERS
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

METHODS = ("ddpm", "ddim", *SOLVERS, *TIME_SOLVERS)

Hold: TypeAlias = Callable[[Array, Array], Array]
Draw: TypeAlias = Callable[[Array, Array | None], Array]
SolverState: TypeAlias = tuple[Array, Array, Array]  # latent, start, previous x0


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """The network calls of a sampler, one after the other.

  A call is `x, t = prepare(state, row)`, then the network's output at (x, t), then
  `state, x0 = update(state, row, x, t, output)`. `samplers.sample` runs all calls in
  one scan; `sampling.stepwise` runs them one at a time.

  Attributes:
    state: tree of arrays before the first call.
    rows: tuple of trees of arrays whose first axis numbers the E calls. The last tree
      is the noise of each call (E, B, H, W, C); None to draw the noise from the key.
    steps: (E,) int32, step of the process at which each call is made.
    prepare: (state, row) -> (latent (B, H, W, C), steps of the process (B,)).
    update: (state, row, latent, steps, output (B, H, W, C or 2C) float32) -> (next
      state, predicted x0 (B, H, W, C)).
    latent: state -> latent (B, H, W, C). After the last call it is x_0.
  """

  state: Any
  rows: tuple[Any, ...]
  steps: np.ndarray
  prepare: Callable[[Any, Any], tuple[Array, Array]]
  update: Callable[[Any, Any, Array, Array, Array], tuple[Any, Array]]
  latent: Callable[[Any], Array]


def make_loop(
  diffusion: Process,
  x_T: Array,
  key: Array,
  *,
  method: str = "ddpm",
  eta: float = 0.0,
  clip_denoised: bool = False,
  noise: Array | None = None,
  num_steps: int | None = None,
  hold: Hold | None = None,
  repeats: int = 1,
) -> Loop:
  """Splits sampling into network calls.

  Args:
    diffusion, x_T, key, eta, clip_denoised, noise, num_steps, hold, repeats: see
      `samplers.sample`.
    method: "ddpm", "ddim" or one of SOLVERS.

  Raises:
    SettingError: see `samplers.sample`; or the method is one of TIME_SOLVERS.
  """
  check_options(method, eta, repeats, hold)
  if method in TIME_SOLVERS:
    raise SettingError("method", method, "has no separate steps")
  x_T = jnp.asarray(x_T, jnp.float32)
  levels = diffusion.levels()
  num_steps = levels.alpha.size if num_steps is None else num_steps

  def draw(step: Array, given: Array | None) -> Array:
    return step_noise(key, step, x_T.shape) if given is None else given

  if method in SOLVERS:
    rows = solver_rows(Levels(*(level[:num_steps] for level in levels)), method)
    return _solver_loop(diffusion, x_T, draw, method, clip_denoised, noise, hold, rows)
  options = eta, clip_denoised, noise, num_steps, hold, repeats
  return _ancestral_loop(as_gaussian(diffusion, method), x_T, draw, method, *options)


def _ancestral_loop(
  diffusion: GaussianDiffusion,
  x_T: Array,
  draw: Draw,
  method: str,
  eta: float,
  clip_denoised: bool,
  noise: Array | None,
  num_steps: int,
  hold: Hold | None,
  repeats: int,
) -> Loop:
  """The loop of "ddpm" and "ddim". A row is (step, repeat, given noise)."""
  total = diffusion.betas.size

  def prepare(x: Array, row: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
    step, repeat, _ = row
    if repeats > 1:
      beta = jnp.asarray(diffusion.betas, jnp.float32)[step]
      again = draw(step + (repeats + repeat) * total, None)
      noisier = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * again
      x = jnp.where(repeat > 0, noisier, x)
    x = x if hold is None else hold(x, step)
    return x, jnp.full((x.shape[0],), step)

  def update(
    state: Array,
    row: tuple[Array, Array, Array | None],
    x: Array,
    t: Array,
    output: Array,
  ) -> tuple[Array, Array]:
    del state
    step, repeat, given = row
    # The last step, step 0, adds no noise.
    number = step + repeat * total
    drawn = jnp.where(step > 0, draw(number, given), 0)
    step_fn = _ddpm_step if method == "ddpm" else _ddim_step
    return step_fn(diffusion, output, x, t, drawn, eta, clip_denoised)

  steps = np.arange(num_steps, dtype=np.int32)[::-1].repeat(repeats)
  repeat = np.tile(np.arange(repeats, dtype=np.int32), num_steps)
  return Loop(x_T, (steps, repeat, noise), steps, prepare, update, lambda x: x)


def _solver_loop(
  diffusion: Process,
  x_T: Array,
  draw: Draw,
  method: str,
  clip_denoised: bool,
  noise: Array | None,
  hold: Hold | None,
  rows: Rows,
) -> Loop:
  """The loop of SOLVERS. A row is (row of the solver, given noise)."""

  def prepare(
    state: SolverState, inputs: tuple[Rows, Array | None]
  ) -> tuple[Array, Array]:
    x, (row, _) = state[0], inputs
    x = x if hold is None else hold(x, row.step)
    return x, jnp.full((x.shape[0],), row.step)

  def update(
    state: SolverState,
    inputs: tuple[Rows, Array | None],
    x: Array,
    t: Array,
    output: Array,
  ) -> tuple[SolverState, Array]:
    _, start, x0_before = state
    row, given = inputs
    x0 = diffusion.to_x0(output, x, t)
    x0 = jnp.clip(x0, -1, 1) if clip_denoised else x0
    start = jnp.where(row.corrects, start, x)
    x = row.keep * start + row.now * x0 + row.before * x0_before
    if is_random(method):
      x += row.noise * draw(row.step, given)
    return (x, start, x0), x0

  state = (x_T, x_T, jnp.zeros_like(x_T))
  return Loop(state, (rows, noise), rows.step, prepare, update, lambda state: state[0])


def check_options(method: str, eta: float, repeats: int, hold: Hold | None) -> None:
  """Raises SettingError for options that a method does not support."""
  check_choice("method", method, METHODS)
  if not 0 <= eta <= 1:
    raise SettingError("eta", eta, "must lie in [0, 1]")
  if repeats < 1 or (repeats > 1 and method not in ("ddpm", "ddim")):
    raise SettingError(
      "repeats", repeats, "must be at least 1; above 1 only for ddpm and ddim"
    )
  if hold is not None:
    check_holds(method)


def check_holds(method: str) -> None:
  """Raises SettingError if a method cannot keep a part of an image, for inpainting."""
  if method in TIME_SOLVERS:
    # ddpm and ddim do not work with processes in continuous time, as these are.
    accepted = ", ".join(SOLVERS)
    raise SettingError("method", method, f"cannot inpaint; accepted are {accepted}")


def is_random(method: str, eta: float = 0.0) -> bool:
  """Whether a method adds noise at its steps; `eta` matters only for "ddim"."""
  if method == "ddim":
    return eta > 0
  return method in ("ddpm", "dpm++sde", *RANDOM)


def step_noise(key: Array, step: Array, shape: tuple[int, ...]) -> Array:
  """Draws the standard normal noise of a step.

  Args:
    key: one key, or (B,) keys, one per sample.
    step: () number of the step, folded into the key.
    shape: (B, …) shape of the noise.
  """
  if key.ndim == 0:
    return jax.random.normal(jax.random.fold_in(key, step), shape)
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, step)
  return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys)


def as_gaussian(process: Process, method: str) -> GaussianDiffusion:
  """Returns the process; raises SettingError if it is not a GaussianDiffusion."""
  if not isinstance(process, GaussianDiffusion):
    is_continuous = isinstance(process, ContinuousProcess)
    accepted = ", ".join((*SOLVERS, *(TIME_SOLVERS if is_continuous else ())))
    raise SettingError(
      "method", method, f"needs the process gaussian; accepted are {accepted}"
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
) -> tuple[Array, Array]:
  """Computes x_{t-1} of DDPM (arXiv 2006.11239, algorithm 2), and the predicted x0."""
  del eta
  p = diffusion.p_mean_variance(output, x, t, clip_denoised)
  return p.mean + jnp.exp(0.5 * p.log_variance) * noise, p.x0


def _ddim_step(
  diffusion: GaussianDiffusion,
  output: Array,
  x: Array,
  t: Array,
  noise: Array,
  eta: float,
  clip_denoised: bool,
) -> tuple[Array, Array]:
  """Computes x_{t-1} of DDIM (2010.02502, equations 12, 16), and the predicted x0."""
  x0 = diffusion.p_mean_variance(output, x, t, clip_denoised).x0
  epsilon = diffusion.noise_from_x0(x0, x, t)
  alpha, alpha_prev = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
  sigmas = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  step = t[0]
  sigma = jnp.asarray(sigmas, jnp.float32)[step]
  direction = jnp.asarray(np.sqrt(1 - alpha_prev - sigmas**2), jnp.float32)[step]
  signal = jnp.asarray(np.sqrt(alpha_prev), jnp.float32)[step]
  return signal * x0 + direction * epsilon + sigma * noise, x0
