"""Noise schedules and the choice of timesteps, in float64 on the host."""

from __future__ import annotations

import math

import numpy as np

from mdt_jax.errors import SettingError, check_choice

SCHEDULES = ("linear", "cosine")
SPACINGS = ("uniform", "log_snr", "karras")
MAX_BETA = 0.999  # prevents a singularity at the end of the cosine schedule
# Smallest log(alpha / sigma) for solvers: the end of the linear schedule. The cosine
# schedule falls to -10 in its last four timesteps. Solvers would waste steps there, or
# take a step too large for their order.
MIN_LOG_SNR = -5.1
KARRAS_RHO = 7


def make_betas(schedule: str, num_timesteps: int) -> np.ndarray:
  """Computes the noise variances beta_t of a schedule.

  Args:
    schedule: "linear" (Ho et al., arXiv 2006.11239), rescaled to any number of steps;
      or "cosine" (Nichol and Dhariwal, arXiv 2102.09672, equation 17).
    num_timesteps: T, number of steps.

  Returns:
    (T,) float64 in (0, 1).

  Raises:
    SettingError: the schedule is unknown, or T is too small: below 1, or below 21 for
      "linear".
  """
  check_choice("schedule", schedule, SCHEDULES)
  if num_timesteps < 1:
    raise SettingError("num_timesteps", num_timesteps, "must be at least 1")
  if schedule == "linear":
    scale = 1000 / num_timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    if betas[-1] >= 1:
      raise SettingError(
        "num_timesteps", num_timesteps, "must be at least 21 for the linear schedule"
      )
    return betas
  edges = np.arange(num_timesteps + 1) / num_timesteps
  alpha_bar = np.array(
    [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in edges]
  )
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def spaced_timesteps(num_timesteps: int, spacing: str) -> np.ndarray:
  """Chooses the original timesteps that a shorter process keeps, as released.

  Args:
    num_timesteps: T, number of steps of the original process.
    spacing: one of
      "": all T timesteps;
      "250": 250 timesteps, evenly spaced from 0 to T - 1;
      "100,50,25": three equal sections with 100, 50 and 25 even timesteps;
      "ddim50": 50 timesteps 0, k, 2k, … of an integer stride k (DDIM, arXiv
        2010.02502).

  Returns:
    Increasing timesteps, int64.

  Raises:
    SettingError: the spacing has another form, or needs more timesteps than exist.
  """
  if not spacing:
    return np.arange(num_timesteps)
  accepted = (
    f'accepted are "" (all {num_timesteps} steps), or a number of steps such as "250", '
    '"100,50,25" or "ddim50", each at least 1 and at most the steps available'
  )
  ddim = spacing.startswith("ddim")
  counts = (spacing[len("ddim") :] if ddim else spacing).split(",")
  if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
    raise SettingError("spacing", spacing, accepted)
  if ddim:
    return _ddim_timesteps(num_timesteps, spacing, counts)
  sizes = [len(part) for part in np.array_split(np.arange(num_timesteps), len(counts))]
  timesteps, start = [], 0
  for size, count in zip(sizes, map(int, counts), strict=True):
    if count > size:
      raise SettingError("spacing", spacing, accepted)
    stride = (size - 1) / (count - 1) if count > 1 else 1
    # As in the released code: add strides and round half to even. Multiplying would
    # give other timesteps for 250 of 1,000.
    position = 0.0
    for _ in range(count):
      timesteps.append(start + round(position))
      position += stride
    start += size
  return np.asarray(timesteps, np.int64)


def _ddim_timesteps(num_timesteps: int, spacing: str, counts: list[str]) -> np.ndarray:
  """Chooses the timesteps of a spacing "ddimN"; see `spaced_timesteps`."""
  if len(counts) == 1:
    for stride in range(1, num_timesteps + 1):
      timesteps = np.arange(0, num_timesteps, stride)
      if len(timesteps) == int(counts[0]):
        return timesteps
  raise SettingError(
    "spacing", spacing, f"no integer stride keeps this number of {num_timesteps} steps"
  )


def log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Computes lambda = log(alpha / sigma), half of the log signal-to-noise ratio."""
  return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))


def solver_timesteps(
  alphas_cumprod: np.ndarray, spacing: str, count: int
) -> np.ndarray:
  """Chooses timesteps for solvers, which need few steps.

  Args:
    alphas_cumprod: (T,) cumulative products of 1 - beta of the original process.
    spacing: the quantity in which the timesteps are evenly spaced. "uniform": the
      timestep; "log_snr": log(alpha / sigma); "karras": (sigma / alpha)^(1/7) (EDM,
      arXiv 2206.00364, equation 5).
    count: number of timesteps.

  Returns:
    `count` distinct increasing timesteps, rounded to integers. They span 0 to the last
    timestep with a log-SNR of at least MIN_LOG_SNR. If `count` is 1, only the latter.

  Raises:
    SettingError: the spacing is unknown, or `count` is below 1 or above T.
  """
  check_choice("spacing", spacing, SPACINGS)
  num_timesteps = len(alphas_cumprod)
  if not 1 <= count <= num_timesteps:
    raise SettingError(
      "spacing", f"{spacing}{count}", f"must have 1 to {num_timesteps} steps"
    )
  levels = log_snr(alphas_cumprod)
  noisiest = max(np.flatnonzero(levels >= MIN_LOG_SNR), default=num_timesteps - 1)
  share = np.linspace(0, 1, count) if count > 1 else np.ones(1)
  if spacing == "uniform":
    nearest = share * noisiest
  else:
    if spacing == "log_snr":
      wanted = levels[0] + share * (levels[noisiest] - levels[0])
    else:
      low, high = np.exp(-levels[[0, noisiest]]) ** (1 / KARRAS_RHO)
      wanted = -KARRAS_RHO * np.log(low + share * (high - low))
    # np.interp needs increasing values; levels decrease with the timestep.
    nearest = np.interp(-wanted, -levels, np.arange(num_timesteps))
  order = np.arange(count)
  # Make equal timesteps distinct: move them up, then back below num_timesteps.
  timesteps = np.maximum.accumulate(np.rint(nearest).astype(np.int64) - order) + order
  return np.minimum(timesteps, num_timesteps - count + order)
