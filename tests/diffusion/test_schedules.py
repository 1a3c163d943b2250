"""Noise schedules, respacing and solver timesteps."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.diffusion.schedules import (
  MAX_BETA,
  SPACINGS,
  log_snr,
  make_betas,
  solver_timesteps,
  spaced_timesteps,
)
from mdt_jax.errors import SettingError
from tests import reference

RECORDED = reference.load("diffusion")
RECORDED_TEXTS = [key.removeprefix("spacing/") for key in RECORDED if "spacing/" in key]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_betas_match_reference(schedule):
  betas = make_betas(schedule, 1000)
  assert betas.dtype == np.float64
  reference.assert_matches(
    f"{schedule} schedule, each beta",
    betas,
    RECORDED[f"{schedule}/betas"],
    1e-12,
    each=True,
  )


@pytest.mark.parametrize("num_timesteps", [21, 50, 400, 4000])
def test_linear_schedule_is_rescaled_to_its_number_of_steps(num_timesteps):
  betas = make_betas("linear", num_timesteps)
  np.testing.assert_allclose(betas.sum(), 1000 * (1e-4 + 0.02) / 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [21, 77, 1000])
def test_betas_rise_within_the_unit_interval(schedule, num_timesteps):
  betas = make_betas(schedule, num_timesteps)
  assert betas.shape == (num_timesteps,)
  assert betas[0] > 0
  assert betas[-1] < 1
  assert (np.diff(betas) >= 0).all()


def test_last_beta_of_the_cosine_schedule_is_max_beta():
  assert make_betas("cosine", 1000)[-1] == MAX_BETA


@pytest.mark.parametrize("spacing", RECORDED_TEXTS)
def test_spaced_timesteps_match_reference(spacing):
  timesteps = spaced_timesteps(1000, spacing)
  reference.assert_matches(
    "respaced timesteps", timesteps, RECORDED[f"spacing/{spacing}"], 0
  )


def test_no_spacing_keeps_every_timestep():
  np.testing.assert_array_equal(spaced_timesteps(7, ""), np.arange(7))


@pytest.mark.parametrize("num_timesteps", [1, 2, 17, 100, 1000])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_even_spacing_has_the_given_count_and_both_end_steps(num_timesteps, share):
  count = max(1, round(share * num_timesteps))
  timesteps = spaced_timesteps(num_timesteps, str(count))
  assert len(timesteps) == count
  assert (np.diff(timesteps) > 0).all()
  assert timesteps[0] == 0
  assert timesteps[-1] == (num_timesteps - 1 if count > 1 else 0)


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 4, 3), (334, 333, 333)])
def test_each_section_has_the_given_number_of_steps(counts):
  timesteps = spaced_timesteps(1000, ",".join(map(str, counts)))
  edges = [0, 334, 667, 1000]  # The first section gets the remainder.
  assert tuple(np.histogram(timesteps, edges)[0]) == counts


@pytest.mark.parametrize("count", [1, 2, 4, 8, 20, 25, 50, 100, 250, 500, 1000])
def test_ddim_spacing_has_a_constant_stride(count):
  timesteps = spaced_timesteps(1000, f"ddim{count}")
  np.testing.assert_array_equal(timesteps, np.arange(0, 1000, 1000 // count))


@pytest.mark.parametrize(
  ("call", "setting", "value", "part"),
  [
    (lambda: make_betas("sqrt", 1000), "schedule", "sqrt", "linear, cosine"),
    (lambda: make_betas("linear", 0), "num_timesteps", 0, "at least 1"),
    (lambda: make_betas("cosine", -1), "num_timesteps", -1, "at least 1"),
    (lambda: make_betas("linear", 20), "num_timesteps", 20, "at least 21"),
    (lambda: spaced_timesteps(1000, "ddim999"), "spacing", "ddim999", "1000"),
    (lambda: spaced_timesteps(1000, "ddim10,10"), "spacing", "ddim10,10", "1000"),
  ],
)
def test_error_names_an_invalid_schedule_or_spacing(call, setting, value, part):
  with pytest.raises(SettingError) as error:
    call()
  assert (error.value.setting, error.value.value) == (setting, value)
  assert part in error.value.accepted


@pytest.mark.parametrize(
  "spacing",
  ["0", "1001", "-5", "2.5", "ten", "10,,10", ",", "ddim", "ddim0", "600,400"],
)
def test_error_for_an_invalid_spacing_lists_accepted_forms(spacing):
  with pytest.raises(SettingError) as error:
    spaced_timesteps(1000, spacing)
  assert (error.value.setting, error.value.value) == ("spacing", spacing)
  for form in ('""', "1000", '"250"', '"100,50,25"', '"ddim50"'):
    assert form in error.value.accepted


# Solver timesteps.


def alphas_cumprod(schedule, num_timesteps=1000):
  return np.cumprod(1 - make_betas(schedule, num_timesteps))


@pytest.mark.parametrize("count", [1, 2, 10, 250, 996])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_solver_timesteps_have_the_given_count(schedule, spacing, count):
  timesteps = solver_timesteps(alphas_cumprod(schedule), spacing, count)
  assert len(timesteps) == count
  assert (np.diff(timesteps) > 0).all()
  assert timesteps[0] >= 0 and timesteps[-1] <= 999
  if count < 250:
    assert timesteps[-1] == {"linear": 999, "cosine": 995}[schedule]
    assert count == 1 or timesteps[0] == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_solver_timesteps_are_even_in_the_named_quantity(schedule, spacing):
  levels = log_snr(alphas_cumprod(schedule, 100_000))
  timesteps = solver_timesteps(alphas_cumprod(schedule, 100_000), spacing, 20)
  even_in = {
    "uniform": timesteps,
    "log_snr": levels[timesteps],
    "karras": np.exp(-levels[timesteps] / 7),
  }[spacing]
  steps = np.diff(even_in)
  np.testing.assert_allclose(steps, steps.mean(), rtol=0.15)


@pytest.mark.parametrize("count", [0, 1001])
def test_solver_refuses_zero_or_too_many_steps(count):
  with pytest.raises(SettingError, match=f"log_snr{count}"):
    solver_timesteps(alphas_cumprod("linear"), "log_snr", count)


def test_log_snr_is_the_log_ratio_of_signal_to_noise():
  a = np.array([0.9, 0.5, 0.1])
  np.testing.assert_allclose(log_snr(a), np.log(np.sqrt(a) / np.sqrt(1 - a)))
