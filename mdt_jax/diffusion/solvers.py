"""Solvers of the sampling ODE and SDE, as tables with one row per network call.

Each solver computes the next latent as a linear combination of a noisier latent, the
current prediction of x0 and the previous prediction of x0. A row holds the weights. The
rows are computed in float64 on the host; `samplers.sample` scans over them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mdt_jax.diffusion.process import Levels

SOLVERS = ("euler", "heun", "dpm++", "dpm++sde")
# Solver -> the spacing of timesteps with the best results, see docs/sampling.md.
SPACING_OF = dict.fromkeys(SOLVERS, "log_snr") | {"euler": "uniform"}


class Rows(NamedTuple):
  """Weights of a solver, one row for each of E network calls.

  next = keep * start + now * x0 + before * x0_before + noise * z, where x0 is the
  prediction of this call, x0_before that of the call before, and z standard normal.

  Attributes:
    step: (E,) int32, step of the process at which the network is called.
    corrects: (E,) bool. False: `start` is the latent that the network receives. True:
      `start` is that of the previous row, and this row's result replaces the previous
      one (a corrector).
    keep, now, before, noise: (E,) float32 weights.
  """

  step: Any  # a NumPy array, or a traced array inside lax.scan
  corrects: Any
  keep: Any
  now: Any
  before: Any
  noise: Any


def solver_rows(levels: Levels, method: str) -> Rows:
  """Computes the rows of a solver, from the noisiest step to zero noise.

  Args:
    levels: noise levels of the S steps, in order of increasing noise.
    method: one of SOLVERS.
      "euler": Euler steps of the probability flow ODE in sigma / alpha (EDM, arXiv
        2206.00364); equal to DDIM with eta = 0. S calls.
      "heun": EDM's algorithm 1. Each Euler step but the last is corrected by the slope
        at its end. 2 S - 1 calls.
      "dpm++": DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). S calls.
      "dpm++sde": SDE-DPM-Solver++(2M) (same paper, equation 18). S calls.
  """
  alpha = np.append(levels.alpha[::-1], 1.0)
  sigma = np.append(levels.sigma[::-1], 0.0)
  h = np.diff(levels.log_snr[::-1])
  if method == "heun":
    return _heun(alpha, sigma)
  # Two steps are of first order: the first, which has no previous x0, and the last,
  # which returns the predicted x0.
  eta = 1.0 if method == "dpm++sde" else 0.0
  # The first h is infinite where the noisiest level has no data; then eta h is not 0 h.
  decay = eta * h if eta else np.zeros_like(h)
  keep = np.append(sigma[1:-1] / sigma[:-2] * np.exp(-decay), 0.0)
  gain = np.append(alpha[1:-1] * -np.expm1(-(1 + eta) * h), 1.0)
  extrapolated = np.zeros_like(gain)
  if method != "euler":
    # h[1:] / h[:-1] is 1 / r_i of the paper, which tends to 1 for many steps. A ratio
    # above 1, as uniform timesteps have near the end, would increase the error.
    extrapolated[1:-1] = np.minimum(h[1:] / h[:-1], 1) / 2
  return _rows(
    step=np.arange(len(gain))[::-1],
    corrects=np.zeros(len(gain), bool),
    keep=keep,
    now=gain * (1 + extrapolated),
    before=-gain * extrapolated,
    noise=np.append(sigma[1:-1] * np.sqrt(-np.expm1(-2 * decay)), 0.0),
  )


def _heun(alpha: np.ndarray, sigma: np.ndarray) -> Rows:
  """Rows of "heun": dy/ds = (y - x0) / s with s = sigma / alpha and y = x / alpha."""
  count = len(alpha) - 1
  with np.errstate(divide="ignore"):  # s is infinite where there is no data
    ratio = (sigma[1:] / alpha[1:]) / (sigma[:-1] / alpha[:-1])  # next s / current s
  # The corrector averages both slopes. The last step, to s = 0, has no corrector, and
  # after a first step from infinite s, the corrector changes nothing.
  inverse = np.divide(1, ratio[:-1], out=np.ones(count - 1), where=ratio[:-1] > 0)
  from_first = 0.5 * (3 - 2 * ratio[:-1] - inverse)
  from_second = 0.5 * (inverse - 1)
  first_step = np.arange(count)[::-1]

  def interleave(predictor: np.ndarray, corrector: np.ndarray) -> np.ndarray:
    return np.append(np.column_stack([predictor[:-1], corrector]), predictor[-1])

  keep = sigma[1:] / sigma[:-1]
  zeros = np.zeros(count)
  return _rows(
    step=interleave(first_step, first_step[1:]),
    corrects=interleave(zeros, np.ones(count - 1)).astype(bool),
    keep=interleave(keep, keep[:-1]),
    now=interleave(alpha[1:] * (1 - ratio), alpha[1:-1] * from_second),
    before=interleave(zeros, alpha[1:-1] * from_first),
    noise=np.zeros(2 * count - 1),
  )


def _rows(step: np.ndarray, corrects: np.ndarray, **weights: np.ndarray) -> Rows:
  """Casts the columns of a table to int32 and float32."""
  return Rows(
    step=step.astype(np.int32),
    corrects=corrects,
    **{name: weight.astype(np.float32) for name, weight in weights.items()},
  )
