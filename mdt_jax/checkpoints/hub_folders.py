"""Folders of the Hugging Face hub: weights under the released names, and config.json.

  model.safetensors    averaged parameters, as `converted.to_torch_file` writes them
  config.json          {"library_name": "mdt_jax", "step": 400000, "settings": {…},
                        "labels": {"labels": [0, 1], "names": ["ant", "bee"]}}
  README.md            the model card of `hub_card`, which is not read

"settings" are those of the run (`Settings.to_dict`), "labels" the contents of
labels.json, or null. `sampling.ema_decay` in "settings" is the decay of the parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import jax

from mdt_jax.attention_choice import with_possible_kernel
from mdt_jax.buckets import is_bucket
from mdt_jax.checkpoints import converted
from mdt_jax.checkpoints.loading import FOLDER, Checkpoint, load_ema, workdir_of
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.errors import SettingError, one_line, renamed_in_errors
from mdt_jax.experiment import Experiment
from mdt_jax.models.registry import Model, abstract_params
from mdt_jax.paths import any_path, expand_home
from mdt_jax.pretrained import bucket_weights, hub, torch_mdt
from mdt_jax.pretrained.diffusers_folders import CONFIG_FILE, read_config
from mdt_jax.pretrained.tensors import flatten, unflatten
from mdt_jax.setting_groups import MeshSettings
from mdt_jax.settings import Settings

LIBRARY = "mdt_jax"  # value of "library_name" in the config.json of this package


def load_pretrained(
  name: str | os.PathLike[str],
  network: str | None = None,
  **known: Unpack[torch_mdt.KnownSizes],
) -> Checkpoint:
  """Loads parameters and settings from the hub, or from a folder of the same files.

  Args:
    name: ORG/NAME of a repository that mdt_jax.convert pushed, or of a DiT in
      diffusers' format; hf://ORG/NAME/FILE; or a folder or file, local or in a bucket
      (gs://…). A local folder counts before a repository of the same name.
    network: expected network; see `torch_mdt.from_torch`.
    **known: num_classes, num_heads, decode_depth, input_size and the like of a
      network whose files do not state them; see `torch_mdt.from_torch`.

  Returns:
    The parameters and the objects of the run. Without a config.json of mdt_jax, the
    settings are those of the papers' run of the network, and the step is 0.

  Raises:
    SettingError: setting "name": there are no such files, huggingface_hub is missing,
      the hub refuses, or the files hold no such network; or an argument does not fit.
  """
  name = os.fspath(name)
  try:
    with renamed_in_errors({"path": "name"}), _local(name) as path:
      opened = torch_mdt.open_checkpoint(path, network, **known)
      config = _read_config(path if path.is_dir() else path.parent)
  except SettingError as error:
    if error.setting != "name":
      raise
    raise SettingError("name", name, error.accepted) from None  # not the cache's path
  if config is None:
    settings, step = converted.settings_of(opened.attributes, opened.metadata), 0
    experiment = Experiment(dataclasses.replace(settings, mesh=MeshSettings()))
  else:
    experiment, step = _experiment_of(config, name)
  device = jax.local_devices()[0]
  params = {path: jax.device_put(opened.read(path), device) for path in opened.paths}
  if config is not None:
    _check_fits(params, experiment, name)
  return Checkpoint(experiment, unflatten(params), step)


def load_run(
  path: str | os.PathLike[str],
  step: int | None = None,
  ema_decay: float | None = None,
  model: Model | None = None,
) -> Checkpoint:
  """Loads a workdir as `load_ema` does, or hf://ORG/NAME as `load_pretrained` does.

  Args:
    path: a workdir; or hf://ORG/NAME, whose repository holds one average of one step.
    step, ema_decay, model: see `load_ema`; must be None for a repository.

  Raises:
    SettingError: see `load_ema` and `load_pretrained`.
  """
  if not hub.is_hub_url(os.fspath(path)):
    return load_ema(path, step, ema_decay, model)
  for name, value in (("step", step), ("ema_decay", ema_decay), ("model", model)):
    if value is not None:
      raise SettingError(name, value, "is for a workdir, not for a repository")
  return load_pretrained(path)


def read_labels(weights: Path, num_classes: int) -> DataLabels | None:
  """Reads the labels of the training data from config.json beside a file of weights.

  Args:
    weights: path of the file.
    num_classes: number of classes of the network.

  Returns:
    The labels; None if there is no config.json of mdt_jax, or it holds no labels.

  Raises:
    SettingError: setting "path": config.json is damaged.
  """
  config = _read_config(weights.parent)
  if config is None:
    return None
  refuse = functools.partial(SettingError, "path", str(weights))
  return _labels_of(config, num_classes, refuse)


def config_of(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
  """Returns the contents of config.json.

  Args:
    checkpoint: parameters of a run.
    settings: the settings to publish; see `hub_uploads.without_local_paths`.
  """
  labels = checkpoint.experiment.data_labels
  return {
    "library_name": LIBRARY,
    "step": checkpoint.step,
    "settings": settings.to_dict(),
    "labels": None if labels is None else labels.to_dict(),
  }


@contextlib.contextmanager
def _local(name: str) -> Iterator[Path]:
  """Yields the local path of weights; downloads those of a repository or a bucket."""
  if hub.is_hub_url(name):
    yield hub.download("name", name)
    return
  path = any_path("name", name) if is_bucket(name) else expand_home(name)
  if (workdir_of(path) / FOLDER).is_dir():
    raise SettingError(
      "name", name, "is the folder of a run: Pipeline.from_checkpoint loads it"
    )
  if is_bucket(name):
    with bucket_weights.local_weights(name) as local:
      yield local
    return
  if os.path.exists(path):
    yield Path(path)
    return
  if not hub.is_repository(name):
    raise SettingError(
      "name", name, "must be ORG/NAME on the Hugging Face hub, or an existing folder"
    )
  yield hub.download("name", hub.SCHEME + name)


def _read_config(folder: Path) -> dict[str, Any] | None:
  """Reads config.json of a folder; None if there is none of this package."""
  if not os.path.lexists(folder / CONFIG_FILE):
    return None
  config = read_config(folder / CONFIG_FILE, "path")
  return config if config.get("library_name") == LIBRARY else None


def _experiment_of(config: Mapping[str, Any], name: str) -> tuple[Experiment, int]:
  """Returns the run that a config.json describes, and the step of its parameters."""

  def refuse(text: str) -> SettingError:
    return SettingError("name", name, text)

  step = config.get("step")
  if type(step) is not int or step < 0:
    raise refuse(f'{CONFIG_FILE} must hold "step", a whole number')
  try:
    settings = Settings.from_dict(config["settings"])
    settings = dataclasses.replace(settings, mesh=MeshSettings())
    experiment = Experiment(with_possible_kernel(settings))
    num_classes = experiment.model.num_classes
    _ = experiment.sampler
  except Exception as error:  # values of other types than those of this version
    raise refuse(
      f"{CONFIG_FILE} does not hold the settings of a run: {one_line(error)}"
    ) from None
  experiment.data_labels = _labels_of(config, num_classes, refuse)
  return experiment, step


def _labels_of(
  config: Mapping[str, Any], num_classes: int, refuse: Callable[[str], Exception]
) -> DataLabels | None:
  """Returns the labels of a config.json; see `DataLabels.from_dict`."""
  labels = config.get("labels")
  if labels is None:
    return None
  if not isinstance(labels, dict):
    raise refuse(f'{CONFIG_FILE} must hold "labels", a dict or null')
  return DataLabels.from_dict(labels, num_classes, CONFIG_FILE, refuse)


def _check_fits(params: Mapping[str, Any], experiment: Experiment, name: str) -> None:
  """Raises SettingError if the weights are not those of the network in config.json.

  Args:
    params: path -> parameter.
    experiment: the run of config.json.
    name: name of the weights in errors.
  """
  needed = flatten(abstract_params(experiment.model))
  there = {path: tuple(value.shape) for path, value in params.items()}
  here = {path: tuple(leaf.shape) for path, leaf in needed.items()}
  differing = sorted(p for p in here | there if here.get(p) != there.get(p))
  if differing:
    first = differing[0]
    raise SettingError(
      "name",
      name,
      f"the weights do not fit the network of {CONFIG_FILE}: {len(differing)} "
      f"parameters differ, such as {first}: {here.get(first, 'absent')} in the "
      f"network, {there.get(first, 'absent')} in the weights",
    )
