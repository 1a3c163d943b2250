"""Writes the folder of a run for the Hugging Face hub, and uploads it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from mdt_jax.atomic import atomic_write, write_json
from mdt_jax.buckets import SCHEME, AnyPath
from mdt_jax.checkpoints import converted, hub_card, hub_folders, loading
from mdt_jax.checkpoints.lock import LOCK
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.paths import absolute, expand_home, output_folder
from mdt_jax.pretrained import hub
from mdt_jax.pretrained.diffusers_folders import CONFIG_FILE, RELEASED_WEIGHTS
from mdt_jax.pretrained.tensors import write_tensors
from mdt_jax.settings import Settings

FILES = (RELEASED_WEIGHTS, CONFIG_FILE, hub_card.FILE)
# Settings that may hold paths of this machine, apart from config.data.vae.
_PATHS = (
  ("data", "path"),
  ("data", "cache"),
  ("init", "path"),
  ("eval", "reference"),
  ("eval", "inception"),
)
_STARTS_OF_PATHS = ("/", "~", "./", "../", SCHEME)


def to_hub_folder(
  workdir: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  step: int | None = None,
  ema_decay: float | None = None,
  license: str | None = None,
) -> int:
  """Writes the folder that `push_to_hub` uploads: weights, config.json and README.md.

  `Pipeline.from_pretrained` loads the folder.

  Args:
    workdir: folder of a run, or of `converted.from_torch_file`.
    folder: an empty folder, or the path of a new folder; local or in a bucket (gs://…).
    overwrite: whether to replace such files in `folder`. Other files stay.
    step: step of the checkpoint; None for the latest.
    ema_decay: decay of the average; see `loading.load_ema`.
    license: license in the model card, as the hub names it, such as "apache-2.0"; None
      to state none.

  Returns:
    The step of the checkpoint.

  Raises:
    SettingError: see `loading.load_ema` and `torch_mdt.to_torch`; or `folder` cannot be
      written, or is not empty and `overwrite` is False. Nothing is written then.
  """
  target = absolute(output_folder("folder", folder))
  found = {path.name for path in target.iterdir()} if target.is_dir() else set()
  if loading.FOLDER in found or LOCK in found:
    raise SettingError("folder", str(target), "must not be the folder of a run")
  if found and not overwrite:
    raise SettingError(
      "folder", str(target), "must be an empty folder unless overwrite is set"
    )
  _check_license(license)
  return _write(workdir, target, target.name, step, ema_decay, license)


def push_to_hub(
  workdir: str | os.PathLike[str],
  repository: str,
  *,
  private: bool = False,
  step: int | None = None,
  ema_decay: float | None = None,
  license: str | None = None,
) -> int:
  """Uploads averaged parameters of a run to the Hugging Face hub.

  Logs in as huggingface_hub does: by `hf auth login`, or the variable HF_TOKEN.

  Args:
    workdir: folder of a run, or of `converted.from_torch_file`.
    repository: ORG/NAME. It is created if there is none; else the files become its
      next commit.
    private: whether a new repository is private.
    step, ema_decay, license: see `to_hub_folder`.

  Returns:
    The step of the checkpoint.

  Raises:
    SettingError: see `to_hub_folder`. Setting "repository": the hub has no such names,
      cannot be reached or refuses, or huggingface_hub is missing. Nothing is uploaded
      then.
  """
  hub.check_upload("repository", repository)
  _check_license(license)
  with tempfile.TemporaryDirectory(prefix="mdt_jax_hub_") as folder:
    step = _write(workdir, Path(folder), repository, step, ema_decay, license)
    message = f"Averaged parameters of step {step}, by mdt_jax"
    hub.upload("repository", repository, Path(folder), message, private=private)
  return step


def without_local_paths(settings: Settings) -> Settings:
  """Returns settings without paths of this machine, for publication.

  A path in config.data.path and .cache, config.init.path, config.eval.reference and
  .inception, and an absolute path in `arguments` of an objective, a process or an
  optimizer, is reduced to its last name: "/data/me/latents" becomes "latents". Names of
  data sets (tfds:NAME) and addresses of the hub stay. So does config.data.vae if it is
  a name on the hub. Another autoencoder is left out, and a run that encodes images with
  it then counts as one of latents, so that a pipeline does not take latents for pixels.
  """
  data = settings.data
  if data.vae is not None and _is_local_autoencoder(data.vae):
    source = "latents" if data.source in ("images", "npz") else data.source
    settings = settings.with_data(vae=None, source=source)
  found: dict[str, Any] = settings.to_dict()
  for group, name in _PATHS:
    if found[group][name] is not None:
      found[group][name] = _last_name(found[group][name])
  for group in found.values():  # arguments of a user's own code may hold any texts
    if isinstance(group, dict) and "arguments" in group:
      group["arguments"] = _reduced(group["arguments"])
  return Settings.from_dict(found)


def _write(
  workdir: str | os.PathLike[str],
  folder: AnyPath,
  name: str,
  step: int | None,
  ema_decay: float | None,
  license: str | None,
) -> int:
  """Writes the files; `name` is what the model card tells people to load."""
  with renamed_in_errors({"path": "workdir"}):
    checkpoint = loading.load_ema(workdir, step, ema_decay)
  tensors, notes = converted.released_weights(checkpoint)
  settings = without_local_paths(checkpoint.experiment.settings)
  card = hub_card.write_card(
    checkpoint, settings, loading.workdir_of(workdir), name, license
  )
  write_tensors(folder / RELEASED_WEIGHTS, tensors, notes)
  write_json(folder / CONFIG_FILE, hub_folders.config_of(checkpoint, settings))
  with atomic_write(folder / hub_card.FILE) as partial:
    partial.write_text(card, encoding="utf-8")
  return checkpoint.step


def _check_license(license: str | None) -> None:
  """Raises SettingError for a text that is no name of a license."""
  if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
    raise SettingError(
      "license",
      license,
      "must be a name such as apache-2.0, of those in "
      "https://huggingface.co/docs/hub/repositories-licenses",
    )


def _is_local_autoencoder(vae: str) -> bool:
  """Whether an autoencoder is a folder or file, and no name on the hub."""
  return os.path.exists(expand_home(vae)) or not hub.is_repository(vae)


def _last_name(path: str) -> str:
  """The last name of a path. A name that is no path, such as tfds:mnist, stays."""
  if path.startswith(("tfds:", "<")) or hub.is_hub_url(path):
    return path
  return Path(path).name


def _reduced(value: Any) -> Any:
  """Reduces the paths among the texts in nested dicts to their last names.

  Paths are absolute ones and those of buckets.
  """
  if isinstance(value, dict):
    return {name: _reduced(entry) for name, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_reduced(entry) for entry in value)
  if isinstance(value, str) and value.startswith(_STARTS_OF_PATHS):
    return _last_name(value)
  return value
