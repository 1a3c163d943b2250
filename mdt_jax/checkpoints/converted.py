"""Converts checkpoints of the released PyTorch code to workdirs and back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax

from mdt_jax import recipes
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints import loading, manager
from mdt_jax.checkpoints.lock import LOCK, locked
from mdt_jax.config import write_config
from mdt_jax.data import class_labels
from mdt_jax.diffusion import PROCESSES, create_process
from mdt_jax.diffusion.gaussian import PREDICTIONS
from mdt_jax.diffusion.schedules import SCHEDULES
from mdt_jax.errors import SettingError, check_choice, one_line, renamed_in_errors
from mdt_jax.logs import logger
from mdt_jax.paths import absolute, output_file, output_folder, remove_folder
from mdt_jax.pretrained import condition_tensors, torch_mdt
from mdt_jax.pretrained import torch_mdt_sizes as sizes
from mdt_jax.pretrained.tensors import Tensors, check_suffix, write_tensors
from mdt_jax.settings import Settings

PARTIAL = ".partial"  # folder inside a workdir, for a conversion that is not complete
# Settings of the process gaussian that exported files note -> accepted values.
_NOTED_DIFFUSION: dict[str, Container[Any]] = {
  "prediction": PREDICTIONS,
  "schedule": SCHEDULES,
  "num_timesteps": range(1, 100_001),
}
# Arguments of SiT's training code that its checkpoints hold -> (argument of the process
# flow, SiT's value -> ours). Other values are the defaults of the process.
_SIT_ARGUMENTS = {
  "path_type": ("path", {"GVP": "gvp", "VP": "vp"}),
  "prediction": ("prediction", {"noise": "epsilon", "score": "score"}),
  "loss_weight": (
    "loss_weight",
    {"velocity": "velocity", "likelihood": "likelihood"},
  ),
}


def from_torch_file(
  path: str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  network: str | None = None,
  *,
  overwrite: bool = False,
  decode_depth: int | None = None,
  num_heads: int | None = None,
  mixer_num_heads: int | None = None,
  decoder_num_heads: int | None = None,
  num_classes: int | None = None,
  input_size: int | None = None,
  process: str | None = None,
) -> Settings:
  """Converts a released PyTorch checkpoint to a workdir for sampling and evaluation.

  Logs which network the file was read as, and what was assumed about it.

  Args:
    path: file of the checkpoint, or folder in diffusers' format; see
      `torch_mdt.from_torch`.
    workdir: an empty folder, or the path of a new folder; local or in a bucket (gs://…).
    network: name of the network; see `torch_mdt.from_torch`.
    overwrite: whether to replace the checkpoints in `workdir`. Other files stay, except
      labels.json, which belongs to the old checkpoints.
    decode_depth, num_heads, mixer_num_heads, decoder_num_heads, num_classes,
      input_size: see `torch_mdt.from_torch`.
    process: process that trained the network, a key of `diffusion.PROCESSES`; None for
      that which the file states, else that of the paper, such as "flow" for a SiT; see
      `recipes.process_of`. With "flow", a DiT whose last layer has 2C channels is read
      as a SiT.

  Returns:
    Settings of a run with this network, as saved in the workdir.

  Raises:
    SettingError: see `torch_mdt.from_torch` and `settings_of`; or `workdir` is a file,
      or in use by a run; or `workdir` is not empty and `overwrite` is False. Nothing is
      written then.
  """
  if process is not None:
    check_choice("process", process, PROCESSES)
  target = absolute(output_folder("workdir", workdir))
  found = {path.name for path in target.iterdir()} if target.is_dir() else set()
  if found - {LOCK, PARTIAL} and not overwrite:  # a stopped conversion leaves these two
    raise SettingError(
      "workdir", str(target), "must be an empty folder unless overwrite is set"
    )
  checkpoint = torch_mdt.read_checkpoint(
    path,
    network,
    decode_depth=decode_depth,
    num_heads=num_heads,
    mixer_num_heads=mixer_num_heads,
    decoder_num_heads=decoder_num_heads,
    num_classes=num_classes,
    input_size=input_size,
    process=process,
  )
  settings = settings_of(checkpoint.attributes, checkpoint.metadata, process)
  _log_network(path, checkpoint, settings)
  with contextlib.ExitStack() as stack:
    with renamed_in_errors({"--workdir": "workdir"}):
      stack.enter_context(locked(target))
    # Inside the workdir, which may be a link to another disk: renames stay on one disk.
    partial = target / PARTIAL
    stack.callback(remove_folder, partial)
    remove_folder(partial)
    loading.save_model(partial, settings, checkpoint.params)
    _replace(target / manager.FOLDER, partial / manager.FOLDER, partial / "old")
    # The labels of the data of the old run do not belong to the new network.
    (target / class_labels.FILE).unlink(missing_ok=True)
    write_config(settings, target)
  return settings


def to_torch_file(
  workdir: str | os.PathLike[str],
  path: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  step: int | None = None,
  ema_decay: float | None = None,
) -> int:
  """Writes averaged parameters to a file that the released PyTorch code loads.

  Args:
    workdir: folder of a run, or of `from_torch_file`.
    path: file to write, with suffix .pt, .pth or .safetensors; local or in a bucket.
    overwrite: whether to replace an existing file.
    step: step of the checkpoint; None for the latest.
    ema_decay: decay of the average; see `loading.load_ema`.

  Returns:
    The step of the checkpoint.

  Raises:
    SettingError: see `loading.load_ema` and `torch_mdt.to_torch`; or `path` has another
      suffix; or `path` exists and `overwrite` is False. Nothing is written then.
  """
  file = output_file("path", path)
  check_suffix("path", file)
  if file.exists() and not overwrite:
    raise SettingError("path", str(file), "exists already, and overwrite is not set")
  with renamed_in_errors({"path": "workdir"}):
    checkpoint = loading.load_ema(workdir, step, ema_decay)
  write_tensors(file, *released_weights(checkpoint))
  return checkpoint.step


def released_weights(checkpoint: loading.Checkpoint) -> tuple[Tensors, dict[str, str]]:
  """Returns averaged parameters under the released names, and notes about them.

  Args:
    checkpoint: parameters of a run.

  Returns:
    (tensors, notes), for `write_tensors`.

  Raises:
    SettingError: released networks are not of this form; see `torch_mdt.to_torch`.
  """
  settings = checkpoint.experiment.settings
  attributes = torch_mdt.attributes_of(checkpoint.experiment.model)
  if not condition_tensors.is_stored(checkpoint.experiment.model.condition):
    accepted = "is a condition of your own, and files hold no code"
    raise SettingError("config.model.condition", settings.model.condition, accepted)
  names = {n: f"config.model.{n}" for n in ("input_size", "patch_bottleneck")}
  with renamed_in_errors(names):
    tensors = torch_mdt.to_torch(attributes, jax.device_get(checkpoint.params))
  diffusion = settings.diffusion
  if diffusion.process == "gaussian":
    noted = {name: getattr(diffusion, name) for name in _NOTED_DIFFUSION}
  else:
    noted = {"process": diffusion.process, "arguments": diffusion.arguments}
  more: dict[str, Any] = {"diffusion": noted}
  if settings.model.condition != "label":
    arguments = dataclasses.asdict(settings.condition)
    more[condition_tensors.NOTE] = {"name": settings.model.condition, **arguments}
  return tensors, sizes.notes(attributes, **more)


def _replace(old: AnyPath, new: AnyPath, aside: AnyPath) -> None:
  """Moves a folder `new` to `old`, and the folder that was there, if any, to `aside`.

  If the folder cannot be moved, the old one returns to its place. A folder of a bucket
  moves object by object; if that stops, its checksums tell that objects are missing.
  """
  is_local = isinstance(old, Path)
  if not (os.path.lexists(old) if is_local else old.exists()):
    new.rename(old)
    return
  old.rename(aside)
  try:
    new.rename(old)
  except BaseException:
    aside.rename(old)
    raise


def settings_of(
  attributes: dict[str, Any],
  metadata: Mapping[str, Any],
  process: str | None = None,
) -> Settings:
  """Returns the settings of the run that a network of a file comes from.

  Args:
    attributes: attributes of the network.
    metadata: what the file says about itself.
    process: see `from_torch_file`.

  Raises:
    SettingError: setting "process": it does not fit the network or the notes of the
      file, or it is None and the file states an unknown one. Setting
      "config.condition": the file notes a value of another type.
  """
  of_labels = {name: v for name, v in attributes.items() if name != "condition"}
  settings = _settings_of_labels(of_labels, metadata, process)
  if "condition" not in attributes:
    return settings
  note = dict(sizes.read_notes(metadata)[condition_tensors.NOTE])
  saved = {"model": {"condition": note.pop("name")}, "condition": note}
  try:
    noted = Settings.from_dict(saved)
  except (TypeError, ValueError, KeyError) as error:
    accepted = f"is what the file notes, and not valid: {one_line(error)}"
    raise SettingError("config.condition", note, accepted) from None
  model = dataclasses.replace(settings.model, condition=noted.model.condition)
  return dataclasses.replace(settings, model=model, condition=noted.condition)


def _settings_of_labels(
  attributes: dict[str, Any], metadata: Mapping[str, Any], process: str | None
) -> Settings:
  """Same as `settings_of`, for a network whose condition is labels."""
  noted = sizes.read_notes(metadata).get("diffusion")
  noted = noted if isinstance(noted, dict) else {}
  stated = noted.get("process", "gaussian" if noted else None)
  if process is None and stated is not None:
    check_choice("process", stated, PROCESSES)
  if process is not None and stated in PROCESSES and process != stated:
    raise SettingError("process", process, f"must be {stated}, as the file notes")
  chosen = process or stated or recipes.process_of(attributes)
  if chosen != "gaussian":
    noted = noted if chosen == stated else {}
    known = _stated_arguments(chosen, noted, metadata)
    if not noted:
      known = recipes.arguments_of(attributes, chosen) | known
    _check_process(chosen, known, attributes)
    return recipes.of_network(attributes, chosen, known)
  if process == "gaussian" and attributes["variant"] == "SiT" and stated is None:
    raise SettingError(
      "process", process, "must be flow for a SiT; network=DiT reads a DiT"
    )
  settings = recipes.of_network(attributes, chosen)
  known = {
    name: noted[name]
    for name, accepted in _NOTED_DIFFUSION.items()
    if type(noted.get(name)) in (str, int) and noted[name] in accepted
  }
  diffusion = dataclasses.replace(settings.diffusion, **known)
  return dataclasses.replace(settings, diffusion=diffusion)


def _stated_arguments(
  process: str, noted: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the arguments of a process that a file states, if they are valid.

  Args:
    process: name of the process.
    noted: notes of this package about the process; empty if there are none.
    metadata: what the file says about itself; training arguments of SiT.
  """
  found = noted.get("arguments", {})
  if not noted and process == "flow":
    found = {
      name: values[metadata[key]]
      for key, (name, values) in _SIT_ARGUMENTS.items()
      if isinstance(metadata.get(key), str) and metadata[key] in values
    }
    if "prediction" not in found:  # SiT ignores the weight for velocities
      found.pop("loss_weight", None)
  try:
    create_process(process, **found)
  except (TypeError, ValueError, OverflowError):  # a SettingError is a ValueError
    return {}
  return dict(found)


def _check_process(
  process: str, arguments: Mapping[str, Any], attributes: Mapping[str, Any]
) -> None:
  """Raises SettingError if a process does not fit the output of a network."""
  learns_variance = create_process(process, **arguments).learns_variance
  if learns_variance == attributes["learn_sigma"]:
    return
  variant = attributes["variant"]
  has = "a" if attributes["learn_sigma"] else "no"
  text = f"does not fit: the network is {variant} with {has} learned variance"
  if variant == "DiT" and process == "flow":
    text += "; network=SiT reads a SiT"
  raise SettingError("process", process, text)


def _log_network(
  path: str | os.PathLike[str], checkpoint: torch_mdt.Checkpoint, settings: Settings
) -> None:
  """Logs what a file was read as, and what the file does not show."""
  attributes, diffusion = checkpoint.attributes, settings.diffusion
  logger.info("%s: %s", path, sizes.describe_fully(attributes))
  meaning = f"config.diffusion.prediction={diffusion.prediction!r}"
  if diffusion.process != "gaussian":
    meaning = f"config.diffusion.process={diffusion.process!r}"
    meaning += f", config.diffusion.arguments={diffusion.arguments}"
  if sizes.read_notes(checkpoint.metadata):
    logger.info("as the file notes: %s", meaning)
  elif diffusion.process != "gaussian":
    logger.info("the process of the network: %s", meaning)
  else:
    also = ""
    if attributes["variant"] == "DiT":
      also = (
        "; SiT and TREAD have tensors of the same names and shapes: --process=flow "
        "reads a SiT, --network=TREAD a TREAD"
      )
    logger.info(
      "the file does not show what the network predicts: assumed is a DDPM network "
      "that predicts noise (%s)%s",
      meaning,
      also,
    )
