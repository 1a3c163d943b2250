"""The papers' runs on ImageNet, which the files in configs/ return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.errors import SettingError
from mdt_jax.models.registry import MODELS, SIZES
from mdt_jax.setting_groups import (
  DataSettings,
  DiffusionSettings,
  MaskingSettings,
  ModelSettings,
  ObjectiveSettings,
  OptimizerSettings,
  SamplingSettings,
)
from mdt_jax.settings import Settings
from mdt_jax.sizes import Size, height_width


def mdtv2(size: str, input_size: int = 32) -> ConfigDict:
  """MDTv2 as released: the defaults with the learning rate of the size.

  Args:
    size: "S", "B", "L" or "XL"; the patch size is 2.
    input_size: height and width of the latents: 32 for images of 256x256, 64 for
      512x512.
  """
  return _mdtv2(size, input_size).to_config()


def mdt(size: str, input_size: int = 32) -> ConfigDict:
  """MDT v1: one mask ratio, plain squared error, AdamW. For arguments see `mdtv2`."""
  return _mdt(size, input_size).to_config()


def dit(size: str, input_size: int = 32) -> ConfigDict:
  """DiT, the unmasked baseline (arXiv 2212.09748). For arguments see `mdtv2`."""
  return _dit(size, input_size).to_config()


def sit(size: str, input_size: int = 32) -> ConfigDict:
  """SiT: DiT trained on velocities (arXiv 2401.08740). For arguments see `mdtv2`."""
  return _sit(size, input_size).to_config()


def tread(size: str, input_size: int = 32) -> ConfigDict:
  """TREAD: DiT in which half of the tokens skip blocks, trained by EDM as released.

  See arXiv 2501.04765. For arguments see `mdtv2`.
  """
  return _tread(size, input_size).to_config()


def maskdit(size: str, input_size: int = 32) -> ConfigDict:
  """MaskDiT: DiT on half of the tokens with a light decoder, by EDM as released.

  See arXiv 2306.09305. For arguments see `mdtv2`.
  """
  return _maskdit(size, input_size).to_config()


def microdit(size: str, input_size: int = 32) -> ConfigDict:
  """MicroDiT: DiT behind a mixer, trained on a quarter of the tokens by EDM.

  See arXiv 2407.15811. The paper's runs train another network on captions: this is its
  method on DiT and class labels. The last 30,000 steps train on all tokens. For
  arguments see `mdtv2`; an input size of 64 has the noise levels of the paper's images
  of 512x512, and the other settings of 256x256.
  """
  return _microdit(size, input_size).to_config()


def sprint(size: str, input_size: int = 32) -> ConfigDict:
  """SPRINT: three quarters of the tokens skip the middle blocks, then none does.

  See arXiv 2510.21986. For arguments see `mdtv2`.
  """
  return _sprint(size, input_size).to_config()


def mdtv2_flow(size: str, input_size: int = 32) -> ConfigDict:
  """MDTv2's network, masking and optimizer, trained on velocities: no paper's run.

  Times are drawn from a logit-normal distribution. For arguments see `mdtv2`.
  """
  return _mdtv2_flow(size, input_size).to_config()


def process_of(attributes: Mapping[str, Any]) -> str:
  """Returns the process that a released network was trained with."""
  variant = attributes["variant"]
  if variant.startswith("MicroDiT"):  # the released networks learn no variance
    return "gaussian" if attributes["learn_sigma"] else "edm"
  known = {"SiT": "flow", "TREAD": "edm", "MaskDiT": "edm", "SPRINT": "flow"}
  return known.get(variant, "gaussian")


def arguments_of(attributes: Mapping[str, Any], process: str) -> dict[str, Any]:
  """Returns the arguments of a process that a released network was trained with."""
  if attributes["variant"] in ("TREAD", "SPRINT") and process == "flow":
    return dict(_RECTIFIED_FLOW)
  if attributes["variant"].startswith("MicroDiT") and process == "edm":
    return _microdit_edm(attributes["input_size"])
  return {}


def of_network(
  attributes: Mapping[str, Any],
  process: str | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> Settings:
  """Returns the settings of the run that a released network comes from.

  Args:
    attributes: attributes of MDT, as `pretrained.torch_mdt.from_torch` returns them.
    process: name of the process; None for that of the paper's run.
    arguments: arguments of a process other than "gaussian"; None for those of the
      released code.

  Raises:
    SettingError: the network reads captions.
  """
  if arguments is None:
    arguments = arguments_of(attributes, process or process_of(attributes))
  attributes = dict(attributes)
  variant, learn_sigma = attributes.pop("variant"), attributes.pop("learn_sigma")
  width = attributes["hidden_size"]
  # A network of an unpublished size gets the recipe and the name of size S.
  size = next((s for s, known in SIZES.items() if known["hidden_size"] == width), "S")
  recipes: dict[str, Callable[[str], Settings]] = {
    "DiT": _dit,
    "SiT": _sit,
    "MDT": _mdt,
    "MDTv2": _mdtv2,
    "TREAD": _tread,
    "MaskDiT": _maskdit,
    "MicroDiT": _microdit,
    "SPRINT": _sprint,
  }
  if variant not in recipes:
    accepted = "reads captions, which no run has; mdt_jax.from_torch reads it in Python"
    raise SettingError("network", variant, accepted)
  settings = recipes[variant](size)
  name = f"{variant}-{size}/{attributes['patch_size']}"
  name = name if name in MODELS else f"{variant}-{size}/2"
  diffusion, sampling = settings.diffusion, settings.sampling
  if process is not None and process != diffusion.process:
    diffusion = DiffusionSettings(process=process)
    sampling = _SAMPLING.get(process, _OTHER_SAMPLING)
    if (variant, process) == ("TREAD", "flow"):
      sampling = dataclasses.replace(settings.sampling, method="ode_euler")
  if diffusion.process != "gaussian":
    diffusion = dataclasses.replace(diffusion, arguments=dict(arguments))
  elif not learn_sigma:
    diffusion = dataclasses.replace(diffusion, variance="fixed_large")
  objective, prediction = settings.objective, arguments.get("prediction")
  if diffusion.process == "gaussian":
    prediction = diffusion.prediction
  if variant == "MaskDiT" and prediction in ("epsilon", "score"):
    without = {**objective.arguments, "mae_weight": 0.0}  # accepted by the objective
    objective = dataclasses.replace(objective, arguments=without)
  model = dataclasses.replace(settings.model, **{**attributes, "name": name})
  if model.label_dropout == 0:  # guidance needs a null label
    sampling = dataclasses.replace(sampling, cfg_scale=1.0)
  return dataclasses.replace(
    settings,
    model=model,
    objective=objective,
    diffusion=diffusion,
    sampling=sampling,
  )


def _mdtv2(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"MDTv2-{size}/2", input_size=input_size),
    optimizer=OptimizerSettings(learning_rate=5e-4 if size == "S" else 3e-4),
  )


def _mdt(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"MDT-{size}/2", input_size=input_size),
    masking=MaskingSettings(width=0.0),
    diffusion=DiffusionSettings(loss_weight="none"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=3e-4, clip_norm=0.0),
  )


def _dit(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"DiT-{size}/2", input_size=input_size),
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(loss_weight="none"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=1e-4, clip_norm=0.0),
    sampling=SamplingSettings(cfg_scale=1.5, cfg_power=0.0),  # a constant scale
  )


# As SiT's released code: 250 steps of Euler-Maruyama, a constant scale on 3 channels.
_FLOW_SAMPLING = SamplingSettings(
  method="sde", num_steps=250, cfg_scale=1.5, cfg_power=0.0, cfg_channels=3
)
# Euler's method samples every process.
_OTHER_SAMPLING = dataclasses.replace(_FLOW_SAMPLING, method="euler")
# Process -> sampling of a network that no paper trained by this process. "edm": 40
# steps of Heun, guidance of all channels (MaskDiT, arXiv 2306.09305).
_SAMPLING = {
  "gaussian": SamplingSettings(),
  "flow": _FLOW_SAMPLING,
  "edm": dataclasses.replace(
    _FLOW_SAMPLING, method="edm", num_steps=40, cfg_channels=0
  ),
}


def _sit(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"SiT-{size}/2", input_size=input_size),
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(process="flow"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=1e-4, clip_norm=0.0),
    sampling=_FLOW_SAMPLING,
  )


def _tread(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"TREAD-{size}/2", input_size=input_size),
    objective=ObjectiveSettings(name="tread", arguments={"ratio": 0.5}),
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(process="edm"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=1e-4, clip_norm=0.0),
    sampling=SamplingSettings(
      method="heun", num_steps=40, cfg_scale=1.5, cfg_power=0.0, cfg_channels=0
    ),
  )


def _maskdit(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"MaskDiT-{size}/2", input_size=input_size),
    objective=ObjectiveSettings(
      name="maskdit", arguments={"ratio": 0.5, "mae_weight": 0.1}
    ),
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(process="edm"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=1e-4, clip_norm=0.0),
    data=DataSettings(flip=False),
    sampling=_SAMPLING["edm"],
    num_steps=2_000_000,
    batch_size=1024,
  )


def _microdit_edm(input_size: Size) -> dict[str, float]:
  """The released arguments of EDM: those of 256x256, or of 512x512 and above."""
  is_large = max(height_width(input_size, "input_size")) >= 64
  p_mean, p_std = (0.0, 0.6) if is_large else (-0.6, 1.2)
  return {"sigma_data": 0.9, "p_mean": p_mean, "p_std": p_std}


def _microdit(size: str, input_size: int = 32) -> Settings:
  return Settings(
    batch_size=2048,
    num_steps=280_000,
    model=ModelSettings(name=f"MicroDiT-{size}/2", input_size=input_size),
    objective=ObjectiveSettings(
      name="microdit", arguments={"ratio": 0.75}, unmasked_from=250_000
    ),
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(process="edm", arguments=_microdit_edm(input_size)),
    optimizer=OptimizerSettings(
      name="adamw",
      learning_rate=2.4e-4,
      warmup_steps=2_500,
      weight_decay=0.1,
      clip_norm=0.25,
    ),
    # The paper's scale of 5 is for captions; 1.5 is that of DiT for labels.
    sampling=SamplingSettings(
      method="edm", num_steps=30, cfg_scale=1.5, cfg_power=0.0, cfg_channels=0
    ),
  )


# The flow of the released TREAD and SPRINT: the network gets time 0 for data.
_RECTIFIED_FLOW = {"data_time": 0, "time_distribution": "logit_normal"}


def _sprint(size: str, input_size: int = 32) -> Settings:
  return Settings(
    model=ModelSettings(name=f"SPRINT-{size}/2", input_size=input_size),
    objective=ObjectiveSettings(
      name="sprint",
      arguments={"ratio": 0.75, "path_drop": 0.1},
      unmasked_from=2_000_000,
    ),
    num_steps=2_200_000,
    masking=MaskingSettings(ratio=0.0, width=0.0),
    diffusion=DiffusionSettings(process="flow", arguments=dict(_RECTIFIED_FLOW)),
    optimizer=OptimizerSettings(name="adamw", learning_rate=1e-4),
    # Path-drop guidance: the weak pass has no label and no deep path.
    sampling=dataclasses.replace(
      _FLOW_SAMPLING, cfg_channels=0, cfg_scale=3.0, weak_ratio=1.0
    ),
  )


def _mdtv2_flow(size: str, input_size: int = 32) -> Settings:
  return dataclasses.replace(
    _mdtv2(size, input_size),
    diffusion=DiffusionSettings(
      process="flow", arguments={"time_distribution": "logit_normal"}
    ),
    sampling=_FLOW_SAMPLING,
  )
