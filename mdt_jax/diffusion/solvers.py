"""Solvers of the sampling ODE and SDE as tables: one row a call of the network.

With x0 predicted, each of them is linear in what it has seen: a row says how a
(noisier) latent, the x0 predicted from it and the one predicted before it make the
next latent. Rows are computed once, in float64 on the host; `samplers` scans them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mdt_jax.diffusion.process import Levels

SOLVERS = ("euler", "heun", "dpm++", "dpm++sde")
# Which timesteps suit each best; measured in docs/sampling.md.
SPACING_OF = dict.fromkeys(SOLVERS, "log_snr") | {"euler": "uniform"}


class Rows(NamedTuple):
  """next = keep * start + now * x0 + before * x0_before + noise * z, a row a call.

  Attributes:
    step: (E,) int32, step of the process at which the network is called.
    corrects: (E,) bool. True: `start` is the one of the row before, whose result this
      row replaces. False: `start` is the latent that the network sees.
    keep, now, before, noise: (E,) float32.
  """

  step: Any  # NumPy arrays here, traced ones in a scan
  corrects: Any
  keep: Any
  now: Any
  before: Any
  noise: Any


def solver_rows(levels: Levels, method: str) -> Rows:
  """The rows of a solver, from the noisiest step to no noise.

  Args:
    levels: noise levels of the S steps, cleanest first.
    method: of SOLVERS.
      "euler": of the probability flow ODE in sigma / alpha (EDM, arXiv 2206.00364);
        equal to DDIM without noise.
      "heun": EDM's algorithm 1: each Euler step but the last is corrected by the
        slope at its end; 2 S - 1 calls.
      "dpm++": DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.
      "dpm++sde": SDE-DPM-Solver++(2M), equation 18 there.
  """
  alpha = np.append(levels.alpha[::-1], 1.0)
  sigma = np.append(levels.sigma[::-1], 0.0)
  h = np.diff(levels.log_snr[::-1])
  if method == "heun":
    return _heun(alpha, sigma)
  # The first step has no x0 before it, and the last one, to no noise, goes to the x0
  # predicted: both are of first order.
  eta = 1.0 if method == "dpm++sde" else 0.0
  keep = np.append(sigma[1:-1] / sigma[:-2] * np.exp(-eta * h), 0.0)
  gain = np.append(alpha[1:-1] * -np.expm1(-(1 + eta) * h), 1.0)
  extrapolated = np.zeros_like(gain)
  if method != "euler":
    # The ratio is 1 / r_i of the paper. Beyond 1, as where even timesteps end in a leap
    # of log-SNR, extrapolating errs more than it mends; in the limit it goes to 1.
    extrapolated[1:-1] = np.minimum(h[1:] / h[:-1], 1) / 2
  return _rows(
    step=np.arange(len(gain))[::-1],
    corrects=np.zeros(len(gain), bool),
    keep=keep,
    now=gain * (1 + extrapolated),
    before=-gain * extrapolated,
    noise=np.append(sigma[1:-1] * np.sqrt(-np.expm1(-2 * eta * h)), 0.0),
  )


def _heun(alpha: np.ndarray, sigma: np.ndarray) -> Rows:
  """With s = sigma / alpha and y = x / alpha, dy/ds = (y - x0) / s."""
  count = len(alpha) - 1
  ratio = (sigma[1:] / alpha[1:]) / (sigma[:-1] / alpha[:-1])  # of s, next to this
  # A corrector averages the slopes; the last step, to s = 0, has none.
  from_first = 0.5 * (3 - 2 * ratio[:-1] - 1 / ratio[:-1])
  from_second = 0.5 * (1 / ratio[:-1] - 1)
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
  return Rows(
    step=step.astype(np.int32),
    corrects=corrects,
    **{name: weight.astype(np.float32) for name, weight in weights.items()},
  )
