"""Sampling from noise to latents; the whole loop is one lax.scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mdt_jax.diffusion.guidance import Guidance, ModelFn
from mdt_jax.diffusion.loops import (
  METHODS,
  Hold,
  as_gaussian,
  check_options,
  is_random,
  make_loop,
  step_noise,
)
from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.solvers import SOLVERS, SPACING_OF
from mdt_jax.diffusion.time_solvers import (
  TIME_SOLVERS,
  as_grid,
  integrate,
  make_arguments,
  make_grid,
  num_calls,
)
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

# Called with (network calls so far, network calls in all).
OnStep: TypeAlias = Callable[[int, int], None]


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
      as_gaussian(process, method)
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
  def calls_a_pass(self) -> int:
    """Number of network passes per image without guidance."""
    steps = self.process.levels().alpha.size
    if self.method in TIME_SOLVERS:
      return num_calls(self.method, steps, self.arguments)
    return 2 * steps - 1 if self.method == "heun" else steps


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
  check_options(method, eta, repeats, hold)

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
