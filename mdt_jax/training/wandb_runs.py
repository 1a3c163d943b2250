"""Metrics and pictures for Weights & Biases.

`config.log.wandb_project` chooses the project; the environment variables of wandb, such
as WANDB_API_KEY, WANDB_ENTITY, WANDB_BASE_URL and WANDB_MODE, hold as for any run.
"""

from __future__ import annotations

import importlib
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger
from mdt_jax.training.events import Bars

ID_FILE = "wandb_id.txt"  # in the workdir
SETTING = "config.log.wandb_project"


def check_wandb(project: str) -> None:
  """Checks that runs can be logged, without starting one.

  Raises:
    SettingError: wandb is not installed or cannot start, or has no API key although it
      is online.
  """
  try:
    wandb: Any = importlib.import_module("wandb")
    mode = wandb.setup().settings.mode
    # wandb.init would ask for the key at the terminal.
    has_key = mode in ("offline", "dryrun", "disabled") or wandb.login(
      prompt=False, verify=False
    )
  except ImportError as error:
    raise SettingError(
      SETTING,
      project,
      f"needs Weights & Biases ({one_line(error)}): pip install -e '.[wandb]'",
    ) from None
  except Exception as error:  # such as a WANDB_MODE that wandb does not know
    raise SettingError(SETTING, project, f"wandb fails: {one_line(error)}") from None
  if not has_key:
    raise SettingError(
      SETTING,
      project,
      "needs an API key: run wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline",
    )


class WandbRun:
  """A run of Weights & Biases; the run of a workdir keeps its id.

  Weights & Biases keeps the first value of a step. A resumed run therefore logs nothing
  until it has passed the last step of the run that it resumes.

  Args:
    workdir: folder of the run; receives the folder wandb and the id. If the workdir is
      in a bucket, a new temporary folder receives the folder wandb.
    project: project of the run.
    config: settings of the run, as nested dicts.
  """

  def __init__(self, workdir: AnyPath, project: str, config: Mapping[str, Any]):
    self._wandb: Any = importlib.import_module("wandb")
    is_local = isinstance(workdir, Path)
    folder = workdir if is_local else tempfile.mkdtemp(prefix="mdt_jax_wandb_")
    self._run = self._wandb.init(
      project=project,
      id=_read_id(workdir / ID_FILE),
      name=workdir.name,
      dir=str(folder),
      config=dict(config),
      resume="allow",
      allow_val_change=True,  # of settings that change when a run is resumed
      reinit="create_new",  # a run of the caller goes on
      settings=self._wandb.Settings(quiet=True),
    )
    self._first_step = self._run.step
    is_offline = self._run.offline
    logger.info("Weights & Biases: %s", self._run.dir if is_offline else self._run.url)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics by name, after `step` steps."""
    self._log(step, dict(scalars))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images (N, H, W, C) by name, after `step` steps."""
    shown = {
      name: [self._wandb.Image(image) for image in array]
      for name, array in images.items()
    }
    self._log(step, shown)

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """Writes bar charts by name, after `step` steps, as histograms."""
    histograms = {
      name: self._wandb.Histogram(np_histogram=(np.nan_to_num(bar.heights), bar.edges))
      for name, bar in bars.items()
    }
    self._log(step, histograms)

  def close(self) -> None:
    """Sends what is not sent yet, and ends the run."""
    self._run.finish()

  def _log(self, step: int, values: dict[str, Any]) -> None:
    if step >= self._first_step:
      self._run.log(values, step=step)


def _read_id(path: AnyPath) -> str:
  """The id of the run in the workdir, which is created for the first run."""
  if path.exists() and (found := path.read_text(encoding="utf-8").strip()):
    return found
  created = uuid.uuid4().hex[:12]
  with atomic_write(path) as partial:
    partial.write_text(created + "\n", encoding="utf-8")
  return created
