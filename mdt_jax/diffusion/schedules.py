"""Noise schedules, and which of their timesteps are sampled; float64 on the host."""

from __future__ import annotations

import math

import numpy as np

from mdt_jax.errors import SettingError, check_choice

SCHEDULES = ("linear", "cosine")
SPACINGS = ("uniform", "log_snr", "karras")
MAX_BETA = 0.999  # keeps the last step of the cosine schedule from being singular
# log(alpha / sigma) where the linear schedule ends. The cosine one goes on to -10 in
# its last four timesteps, where solvers would waste steps or leap beyond their order.
MIN_LOG_SNR = -5.1
KARRAS_RHO = 7


def make_betas(schedule: str, num_timesteps: int) -> np.ndarray:
  """Noise variances beta_t, (num_timesteps,) float64 in (0, 1).

  "linear": Ho et al. (arXiv 2006.11239), rescaled to any number of steps.
  "cosine": Nichol and Dhariwal (arXiv 2102.09672), equation 17.
  """
  check_choice("schedule", schedule, SCHEDULES)
  if num_timesteps < 1:
    raise SettingError("num_timesteps", num_timesteps, "must be at least 1")
  if schedule == "linear":
    scale = 1000 / num_timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    if betas[-1] >= 1:  # nothing of the image would be left
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
  """Which of the original timesteps a shorter process keeps.

  Args:
    num_timesteps: T, steps of the original process.
    spacing: "" for all of them; "250" for so many, evenly spaced from 0 to T - 1;
      "100,50,25" for so many in each of as many equal sections; "ddim50" for the
      integer stride of DDIM (arXiv 2010.02502) that gives so many.

  Returns:
    Increasing int64 timesteps.

  Raises:
    SettingError: the spacing is no such text, or asks for more steps than there are.
  """
  if not spacing:
    return np.arange(num_timesteps)
  accepted = (
    f'accepted are "" (all {num_timesteps}), "250", "100,50,25" or "ddim50", '
    "with at least one step and no more than there are"
  )
  ddim = spacing.startswith("ddim")
  counts = (spacing[len("ddim") :] if ddim else spacing).split(",")
  if not all(count.strip().isdigit() and int(count) > 0 for count in counts):
    raise SettingError("spacing", spacing, accepted)
  if ddim:
    return _ddim_timesteps(num_timesteps, spacing, counts)
  sizes = [len(part) for part in np.array_split(np.arange(num_timesteps), len(counts))]
  timesteps, start = [], 0
  for size, count in zip(sizes, map(int, counts), strict=True):
    if count > size:
      raise SettingError("spacing", spacing, accepted)
    stride = (size - 1) / (count - 1) if count > 1 else 1
    # Positions are added up, not multiplied, and rounded half to even, as in the
    # released code: 250 of 1,000 would differ otherwise.
    position = 0.0
    for _ in range(count):
      timesteps.append(start + round(position))
      position += stride
    start += size
  return np.asarray(timesteps, np.int64)


def _ddim_timesteps(num_timesteps: int, spacing: str, counts: list[str]) -> np.ndarray:
  if len(counts) == 1:
    for stride in range(1, num_timesteps + 1):
      timesteps = np.arange(0, num_timesteps, stride)
      if len(timesteps) == int(counts[0]):
        return timesteps
  raise SettingError(
    "spacing", spacing, f"no integer stride gives so many of {num_timesteps} steps"
  )


def log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """lambda = log(alpha / sigma), half of the log signal-to-noise ratio."""
  return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))


def solver_timesteps(
  alphas_cumprod: np.ndarray, spacing: str, count: int
) -> np.ndarray:
  """Timesteps for few steps of a high order.

  Args:
    alphas_cumprod: (T,) of the original process.
    spacing: what the steps are even in: "uniform", the timestep; "log_snr",
      log(alpha / sigma); "karras", (sigma / alpha)^(1/7) as EDM's are (arXiv
      2206.00364, equation 5).
    count: how many.

  Returns:
    `count` different increasing timesteps: 0, the last one above MIN_LOG_SNR, and
    between them those that are nearest.

  Raises:
    SettingError: `count` is below 1 or above T.
  """
  check_choice("spacing", spacing, SPACINGS)
  num_timesteps = len(alphas_cumprod)
  if not 1 <= count <= num_timesteps:
    raise SettingError(
      "spacing", f"{spacing}{count}", f"must have 1 to {num_timesteps}"
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
    # Levels fall with the timestep; np.interp wants them rising.
    nearest = np.interp(-wanted, -levels, np.arange(num_timesteps))
  order = np.arange(count)
  # Neighbours that round to one timestep move apart, upwards and then back in range.
  timesteps = np.maximum.accumulate(np.rint(nearest).astype(np.int64) - order) + order
  return np.minimum(timesteps, num_timesteps - count + order)
