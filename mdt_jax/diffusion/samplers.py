"""Sampling from noise to latents; the whole loop is one lax.scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import Guidance, ModelFn
from mdt_jax.diffusion.process import Levels, Process
from mdt_jax.diffusion.solvers import SOLVERS, SPACING_OF, Rows, solver_rows
from mdt_jax.diffusion.time_solvers import (
  RANDOM,
  TIME_SOLVERS,
  as_grid,
  integrate,
  make_arguments,
  make_grid,
  num_calls,
)
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

METHODS = ("ddpm", "ddim", *SOLVERS, *TIME_SOLVERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """The settings of sampling: a respaced process, a method and guidance.

  Attributes:
    process: a respaced process; its steps are the steps of the sampler.
    method: one of METHODS; see `sample`.
    arguments: further arguments of the method, from `make_arguments`; None for methods
      without any.
    eta: noise of "ddim", in [0, 1]: 0 for none, 1 for as much as "ddpm".
    clip_denoised: whether to clip the predicted x0 to [-1, 1]; for pixels.
    guidance: classifier-free guidance.
  """

  process: Process
  method: str
  eta: float
  clip_denoised: bool
  guidance: Guidance
  arguments: Any = None

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
    arguments: Mapping[str, Any] | None = None,
  ) -> Sampler:
    """Respaces a process and builds the sampler.

    Args:
      process: the process used in training.
      guidance, method, eta, clip_denoised: see the attributes.
      num_steps: number of steps of the sampler.
      spacing: see `Process.respaced`. None for the best spacing for the method, see
        `solvers.SPACING_OF`.
      arguments: name -> value of further arguments of the method, such as "last_step"
        of "sde"; see `time_solvers.ARGUMENTS`.

    Raises:
      SettingError: the method is unknown or does not support this process, or the
        process does not support the spacing or the number of steps.
    """
    check_choice("method", method, METHODS)
    if method in TIME_SOLVERS:
      if clip_denoised:
        raise SettingError(
          "clip_denoised", clip_denoised, f"must be False for {method}"
        )
      checked = make_arguments(method, arguments or {})
      grid = make_grid(process, method, num_steps, spacing, checked)
      return cls(grid, method, eta, clip_denoised, guidance, checked)
    if arguments:
      raise SettingError("arguments", arguments, f"must be empty for {method}")
    if method not in SOLVERS:
      _as_gaussian(process, method)
    spacing = spacing or process.default_spacing or SPACING_OF.get(method, "uniform")
    if spacing == "uniform" and method not in SOLVERS:
      spacing = ""  # the spacing of the released code
    respaced = process.respaced(spacing, num_steps)
    return cls(respaced, method, eta, clip_denoised, guidance)

  @property
  def is_random(self) -> bool:
    """Whether the sampler adds noise at its steps."""
    return is_random(self.method, self.eta)

  @property
  def num_calls(self) -> int:
    """Number of network passes per image; guidance doubles the number."""
    return self.calls_a_pass * (1 if self.guidance.scale == 1 else 2)

  @property
  def calls_a_pass(self) -> int:
    """Number of network passes per image without guidance."""
    steps = self.process.levels().alpha.size
    if self.method in TIME_SOLVERS:
      return num_calls(self.method, steps, self.arguments)
    return 2 * steps - 1 if self.method == "heun" else steps


# Called with (network calls so far, network calls in all).
OnStep: TypeAlias = Callable[[int, int], None]
Hold: TypeAlias = Callable[[Array, Array], Array]
Draw: TypeAlias = Callable[[Array, Array | None], Array]
SolverState: TypeAlias = tuple[Array, Array, Array]  # latent, start, previous x0


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
  """The network calls of a sampler, one after the other.

  A call is `x, t = prepare(state, row)`, then the network's output at (x, t), then
  `state, x0 = update(state, row, x, t, output)`. `sample` runs all calls in one scan;
  `sampling.stepwise` runs them one at a time.

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
  hold: Hold | None = None,
  repeats: int = 1,
  on_step: OnStep | None = None,
  arguments: Any = None,
) -> Array:
  """Samples x_0 from x_T. Call this function under jax.jit.

  Args:
    model_fn: (x_t (B, H, W, C), original timesteps (B,)) -> output (B, H, W, C or 2C);
      see `guidance.guided`.
    diffusion: the process, respaced to the steps of the sampler.
    x_T: (B, H, W, C) standard normal noise to start from.
    key: random key of the noise added at the steps, or (B,) keys, one per sample. With
      one key per sample, a sample does not depend on the rest of the batch.
    method: "ddpm" (ancestral sampling), "ddim" (arXiv 2010.02502), a solver for fewer
      steps, see `solvers.solver_rows`, or a sampler in time, see `time_solvers`.
    eta: noise of "ddim", in [0, 1]: 0 is deterministic, 1 adds as much as "ddpm".
    clip_denoised: whether to clip the predicted x0 to [-1, 1]; for pixels.
    noise: (calls, B, H, W, C) noise of each call of the network, in order; None to draw
      from `key`.
    num_steps: run only the last `num_steps` steps, starting from the noisy latent x_T;
      None for all steps.
    hold: (x (B, H, W, C), step ()) -> x; replaces the latent before each call of the
      network. Inpainting uses `hold` to overwrite the known pixels.
    repeats: number of times to run each step. Noise is added again before each
      repetition, which harmonises the image with the held pixels (RePaint, arXiv
      2201.09865, with jumps of one step). Only for "ddpm" and "ddim".
    on_step: called on the host at each call of the network, with (calls so far, calls
      in all). JAX's cache on disk does not keep programs that call the host.
    arguments: see `Sampler`.

  Returns:
    (B, H, W, C) float32.

  Raises:
    SettingError: the method is unknown or does not support this process, or `eta` or
      `repeats` is out of range.
  """
  _check_options(method, eta, repeats, hold)

  def report(call: Array | None, calls: int) -> None:
    if (listener := on_step) is not None:
      jax.debug.callback(lambda i: listener(int(i) + 1, calls), call)

  if method in TIME_SOLVERS:
    x_T = jnp.asarray(x_T, jnp.float32)
    grid = as_grid(diffusion, method)
    if num_steps is not None and num_steps < len(grid.times):
      grid = dataclasses.replace(grid, times=grid.times[:num_steps])
    arguments = make_arguments(method, {}) if arguments is None else arguments
    calls = num_calls(method, len(grid.times), arguments)
    given = None if noise is None else jnp.asarray(noise)
    return integrate(
      lambda x, t: model_fn(x, t).astype(jnp.float32),
      grid,
      x_T,
      lambda step: step_noise(key, step, x_T.shape) if given is None else given[step],
      lambda call: report(call, calls),
      method=method,
      arguments=arguments,
    )
  loop = make_loop(
    diffusion,
    x_T,
    key,
    method=method,
    eta=eta,
    clip_denoised=clip_denoised,
    noise=noise,
    num_steps=num_steps,
    hold=hold,
    repeats=repeats,
  )

  def call_network(state: Any, inputs: tuple[Any, Array | None]) -> tuple[Any, None]:
    row, call = inputs
    report(call, len(loop.steps))
    x, t = loop.prepare(state, row)
    output = model_fn(x, diffusion.network_time(t)).astype(jnp.float32)
    return loop.update(state, row, x, t, output)[0], None

  numbers = None if on_step is None else jnp.arange(len(loop.steps))
  state, _ = jax.lax.scan(call_network, loop.state, (loop.rows, numbers))
  return loop.latent(state)


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
      `sample`.
    method: "ddpm", "ddim" or one of SOLVERS.

  Raises:
    SettingError: see `sample`; or the method is one of TIME_SOLVERS.
  """
  _check_options(method, eta, repeats, hold)
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
  return _ancestral_loop(_as_gaussian(diffusion, method), x_T, draw, method, *options)


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


def _check_options(method: str, eta: float, repeats: int, hold: Hold | None) -> None:
  """Raises SettingError for options that `sample` does not support."""
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


def _as_gaussian(process: Process, method: str) -> GaussianDiffusion:
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
