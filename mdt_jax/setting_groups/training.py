"""Settings of the optimizer, the first weights, the devices and the log."""

from __future__ import annotations

import dataclasses
from typing import Any

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.setting_groups.checks import at_least, split_commas


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The optimizer and its learning rate.

  b1, b2, b3 and eps of None have the optimizer's own values: 0.98, 0.92, 0.99 and 1e-8
  for adan, 0.9, 0.999 and 1e-8 for adamw.
  """

  # adan (MDTv2), adamw (MDT v1 and DiT), or an optimizer of optax, such as lion.
  name: str = "adan"
  # Largest learning rate; above 0.
  learning_rate: float = 3e-4
  # Learning rate after the warmup: constant, or cosine or linear to 0 at num_steps.
  schedule: str = "constant"
  # Steps in which the learning rate rises linearly from 0, in [0, num_steps).
  warmup_steps: int = 0
  # Decay of the average of gradients, in [0, 1).
  b1: float | None = None
  # Decay of the second average, in [0, 1): of squared gradients (adamw), of
  # differences of gradients (adan).
  b2: float | None = None
  # Decay of the average of squared gradients of adan, in [0, 1).
  b3: float | None = None
  # Number that is added to the denominator; above 0.
  eps: float | None = None
  # Strength of the weight decay, at least 0.
  weight_decay: float = 0.0
  # Gradients of a larger global norm are scaled down to this norm; 0: no limit.
  clip_norm: float = 1.0
  # Shards of the parameters, each of which is scaled down to clip_norm by its own norm;
  # 1: by the norm of all parameters. A released run of MDTv2 on N GPUs clips N shards,
  # because it puts Adan into PyTorch's ZeroRedundancyOptimizer (docs/parity.md).
  clip_shards: int = 1
  # Parameters that are not trained: regular expressions with commas between them,
  # searched for in paths such as decode_blocks/attention/qkv/kernel; or few_shot (all
  # but labels and adaLN) or difffit (all but biases and labels). Empty: none.
  frozen: str = ""
  # Learning rates of some parameters, PATTERN:RATE with commas between them; the first
  # pattern that matches a path decides: 'label_embed:1e-3,modulation:5e-4'. The
  # schedule stays.
  learning_rates: str = ""
  # More arguments of an optimizer of optax, such as '{"momentum": 0.9}' for sgd.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

  def check(self) -> None:
    for name in ("learning_rate", "eps"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise SettingError(name, value, "must be above 0")
    for name in ("weight_decay", "clip_norm"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")
    at_least(self, "clip_shards", 1)
    if self.clip_shards > 1 and not self.clip_norm:
      raise SettingError(
        "clip_shards", self.clip_shards, "must be 1: clip_norm = 0 clips nothing"
      )
    if self.clip_shards > 1 and self.frozen:
      raise SettingError(
        "clip_shards", self.clip_shards, "must be 1 if parameters are frozen"
      )


@dataclasses.dataclass(frozen=True)
class InitSettings:
  """Trained weights that a new run starts from; docs/finetune.md.

  A run with checkpoints resumes from these and does not read the weights.
  """

  # Where the weights are: the workdir of a run or of mdt_jax.convert, a released .pt,
  # .pth, .bin or .safetensors file, or a DiT in diffusers' format, local or in a bucket
  # (gs://…); or hf://ORG/NAME or hf://ORG/NAME/FILE on the Hugging Face hub. None:
  # random weights.
  path: str | None = None
  # Step of the checkpoint in a workdir. None: the latest.
  step: int | None = None
  # Decay of the averaged parameters in a workdir. None: the one that is sampled.
  ema_decay: float | None = None
  # What a file holds, such as DiT, SiT, MDTv2 or TREAD. None: what its tensors
  # show.
  network: str | None = None
  # Classes of the network in a file, without the null label. None: what its tensors
  # show; see --num_classes of mdt_jax.convert.
  num_classes: int | None = None
  # Classes whose labels are kept, OLD:NEW with commas between them, each a number or a
  # name: 'golden retriever:0,281:cat'. Empty: all if the numbers of classes are equal,
  # else none but the null label.
  classes: str = ""
  # Patch embedding and last layer of another patch size: resize or fresh.
  patches: str = "resize"
  # Whether to take what fits of a network of another depth or variant.
  partial: bool = False
  # CRC-32 of the weights, 8 hexadecimal digits. None: any; the run sets it.
  checksum: str | None = None

  def check(self) -> None:
    check_choice("patches", self.patches, ("resize", "fresh"))
    if self.step is not None:
      at_least(self, "step", 0)
    if self.num_classes is not None:
      at_least(self, "num_classes", 1)
    for item in split_commas(self.classes):
      if not all(item.rpartition(":")):
        raise SettingError(
          "classes", self.classes, "must be OLD:NEW, with commas between such pairs"
        )
    if self.path is None:
      for field in dataclasses.fields(self):
        if getattr(self, field.name) != field.default:
          raise SettingError(
            field.name, getattr(self, field.name), "needs config.init.path"
          )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Number of devices along each axis of the mesh.

  The product is the number of devices. One axis may be -1: all devices that remain.
  """

  # Devices that divide the batch and hold copies of the state (data parallelism).
  data: int = -1
  # Devices that divide the batch and the state (fully sharded data parallelism).
  fsdp: int = 1
  # Devices that divide attention heads and hidden units of the same images.
  tensor: int = 1
  # Slices of TPUs, or hosts of GPUs, between which the network is slow; they divide the
  # axis data. -1: as many as the devices report. 1: all links are taken as equal.
  slices: int = -1


@dataclasses.dataclass(frozen=True)
class LogSettings:
  """What is measured, and where the metrics go besides the log and the workdir."""

  # Project of Weights & Biases that receives metrics and pictures; needs the extra
  # wandb. None: no project.
  wandb_project: str | None = None
  # Steps between bar charts of the loss by diffusion time, at least 0; 0: none. A chart
  # covers the steps since the one before, and is written with the next log line.
  loss_by_time_every: int = 1_000

  def check(self) -> None:
    at_least(self, "loss_by_time_every", 0)
    name = self.wandb_project
    if name is not None and not (
      0 < len(name) <= 128 and not set(name) & set("/\\#?%:")
    ):
      raise SettingError(
        "wandb_project",
        name,
        "must be a name of 1 to 128 characters, without any of / \\ # ? % :",
      )
