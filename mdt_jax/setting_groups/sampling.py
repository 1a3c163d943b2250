"""Settings of sampling and of scores during training."""

from __future__ import annotations

import dataclasses
from typing import Any

from mdt_jax.diffusion.guidance import RATIO_SCHEDULES, WEAK_CONDITIONS, WHOLE
from mdt_jax.diffusion.loops import METHODS
from mdt_jax.diffusion.schedules import SPACINGS
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.setting_groups.checks import at_least

LABELS_OF_SCORES = ("random", "balanced")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How images are drawn in training; also the defaults of mdt_jax.sample."""

  # Sampler: ddpm or ddim (process gaussian); euler, heun, dpm++ or dpm++sde (every
  # process); ode_euler, ode_midpoint, ode_heun, ode_heun3, ode_rk4, sde, sde_heun or
  # edm (processes in continuous time, such as flow and edm). See docs/sampling.md.
  method: str = "ddpm"
  # More arguments of sde, sde_heun ('{"diffusion": "sbdm", "last_step": "tweedie"}') or
  # edm ('{"churn": 40.0}').
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Sampling steps, at least 1; at most diffusion.num_timesteps for gaussian. euler,
  # heun, dpm++ and dpm++sde need 10 to 30 steps; heun calls the network twice a step.
  num_steps: int = 250
  # How the times of the steps are spaced: uniform, log_snr or karras. None: the
  # sampler's own spacing.
  spacing: str | None = None
  # Noise that ddim adds at each step, in [0, 1]: 0 none, 1 as much as ddpm.
  eta: float = 0.0
  # Scale of classifier-free guidance, at least 0; 1: no guidance.
  cfg_scale: float = 3.8
  # Power of the power-cosine schedule of the scale (MDT, section 4.1), at least 0: the
  # scale grows from 1 at full noise to cfg_scale; 0: a constant scale.
  cfg_power: float = 4.0
  # Number of leading channels to guide, as released; 0: all channels.
  cfg_channels: int = 3
  # (low, high): guide only where t / T lies in it; 0 <= low <= high <= 1.
  cfg_interval: tuple[float, float] = WHOLE
  # Condition of the weak pass, away from which guidance leads: null (classifier-free
  # guidance) or same, as the strong pass (sparse guidance: weak_ratio must be above
  # strong_ratio). See docs/sampling.md.
  weak_condition: str = "null"
  # Shares of the tokens that the strong and the weak pass leave out, strong_ratio in
  # [0, 1) and weak_ratio in [strong_ratio, 1]; 1 drops the path of SPRINT. Networks of
  # MDT, MaskDiT, TREAD and SPRINT. A cfg_scale of 1 has no weak pass.
  strong_ratio: float = 0.0
  weak_ratio: float = 0.0
  # How the shares change over sampling: constant; or cosine: that of the weak pass
  # falls to 0, that of the strong pass rises from 0.
  ratio_schedule: str = "constant"
  # Whether to clip the predicted x0 to [-1, 1] at each step; only for pixels.
  clip_denoised: bool = False
  # Decay of the averaged parameters to sample with, one of ema_decays. None: the first.
  ema_decay: float | None = None

  @property
  def needs_null(self) -> bool:
    """Whether guidance needs a network that is trained without conditions."""
    return self.cfg_scale != 1 and self.weak_condition == "null"

  def check(self) -> None:
    check_choice("method", self.method, METHODS)
    if self.spacing is not None:
      check_choice("spacing", self.spacing, SPACINGS)
    if not 0 <= self.eta <= 1:
      raise SettingError("eta", self.eta, "must lie in [0, 1]")
    for name in ("cfg_scale", "cfg_power", "cfg_channels"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")
    check_choice("weak_condition", self.weak_condition, WEAK_CONDITIONS)
    check_choice("ratio_schedule", self.ratio_schedule, RATIO_SCHEDULES)
    if not 0 <= self.strong_ratio < 1:
      raise SettingError("strong_ratio", self.strong_ratio, "must lie in [0, 1)")
    if self.cfg_scale != 1 and not self.strong_ratio <= self.weak_ratio <= 1:
      accepted = f"must lie in [strong_ratio = {self.strong_ratio:g}, 1]"
      raise SettingError("weak_ratio", self.weak_ratio, accepted)
    pair = self.cfg_interval
    is_pair = len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)
    if not (is_pair and 0 <= pair[0] <= pair[1] <= 1):
      raise SettingError(
        "cfg_interval", tuple(pair), "must be (low, high), 0 <= low <= high <= 1"
      )


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Scores of sampled images during training; docs/evaluation.md explains them."""

  # Steps between evaluations, at least 0; 0: none.
  every: int = 0
  # Scores with commas between them: fid, sfid, is, precision, recall (these five need
  # `inception`), frechet, accuracy, diversity (for small images); for
  # config.model.condition = vector or tokens: retrieval; for config.data.source =
  # relations: valid_cells, near_pairs, far_pairs, mirrored_rows, sums, counts,
  # free_entropy, nearest_cells.
  metrics: str = "fid"
  # Images to sample as config.sampling says, at least 2. Papers sample 50,000.
  num_images: int = 10_000
  # Images at once, over all devices; at least 1.
  batch_size: int = 64
  # Labels of these images: random (as in the released scripts) or balanced (all classes
  # in turn). None: random if a score needs `inception`, else balanced.
  labels: str | None = None
  # .npz of real images or of their statistics, local or in a bucket. None: the training
  # data.
  reference: str | None = None
  # File with the weights of FID's Inception network: .safetensors of mdt_jax.convert,
  # .pth or .pb.
  inception: str | None = None

  @property
  def metric_names(self) -> list[str]:
    return self.metrics.split(",")

  def check(self) -> None:
    for name, least in (("every", 0), ("num_images", 2), ("batch_size", 1)):
      at_least(self, name, least)
    if self.labels is not None:
      check_choice("labels", self.labels, LABELS_OF_SCORES)
