"""Files of weights in a bucket: local copies, and errors that name the objects."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from mdt_jax import buckets
from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.logs import logger
from mdt_jax.paths import any_path, file_size
from mdt_jax.pretrained.diffusers_dit import NO_WEIGHTS, SUBFOLDER
from mdt_jax.pretrained.diffusers_folders import (
  CONFIG_FILE,
  RELEASED_WEIGHTS,
  WEIGHT_FILES,
)
from mdt_jax.pretrained.tensors import READABLE, check_suffix


@contextlib.contextmanager
def local_weights(
  path: str | os.PathLike[str], suffixes: Sequence[str] = READABLE
) -> Iterator[Path]:
  """Yields local weights: a copy of those in a bucket, or a local path itself.

  The copy has no name any more after the block, but the disk keeps it for as long as
  its tensors are mapped into the memory.

  Args:
    path: a local path; or a file of a bucket, which is copied with the config.json
      beside it; or a folder of a bucket, of which the files are copied that
      `diffusers_dit.find_file` looks for.
    suffixes: accepted suffixes of a file of a bucket, checked before the download.

  Raises:
    SettingError: setting "path": there are no such weights, the bucket cannot be read,
      or the local disk is too small. Errors of the block name the path in the bucket
      instead of the copy.
    DataUnavailable: the bucket does not answer.
  """
  if not buckets.is_bucket(path):
    yield Path(path)
    return
  found = any_path("path", path)
  assert not isinstance(found, Path)
  is_folder = found.is_dir()
  weights = _weights_in(found) if is_folder else found
  if not is_folder and not weights.exists():
    raise SettingError("path", str(path), "must be a file")
  check_suffix("path", weights, suffixes)
  folder = found if is_folder else found.parent
  with tempfile.TemporaryDirectory(prefix="mdt_jax_") as copies:
    copy = Path(copies) / weights.relative_to(folder)
    _download(weights, copy)
    config = weights.with_name(CONFIG_FILE)
    if config.exists():
      _download(config, copy.with_name(CONFIG_FILE))
    try:
      yield Path(copies) if is_folder else copy
    except SettingError as error:
      setting, value, accepted = (
        text.replace(copies, str(folder)) if isinstance(text, str) else text
        for text in (error.setting, error.value, error.accepted)
      )
      raise SettingError(setting, value, accepted) from None


def _weights_in(folder: epath.Path) -> epath.Path:
  """Returns the file of weights in a folder, in the order of `find_file`."""
  names = (RELEASED_WEIGHTS, *WEIGHT_FILES)
  names += tuple(f"{SUBFOLDER}/{name}" for name in WEIGHT_FILES)
  for name in names:
    if (folder / name).exists():
      return folder / name
  raise SettingError("path", str(folder), NO_WEIGHTS)


def _download(path: epath.Path, copy: Path) -> None:
  """Copies an object to a local file."""
  copy.parent.mkdir(parents=True, exist_ok=True)
  try:
    size = file_size(path)
    free = shutil.disk_usage(copy.parent).free
    if size > free:
      raise SettingError(
        "path",
        str(path),
        f"has {size / 1e9:.1f} GB, and {tempfile.gettempdir()} has {free / 1e9:.1f} GB "
        "left: set TMPDIR to a folder of a larger disk",
      )
    logger.info("downloading %s: %.2f GB", path, size / 1e9)
    path.copy(copy)
  except SettingError:
    raise
  except Exception as error:  # gcsfs raises those of several libraries
    text = buckets.describe_error(error, path)
    if buckets.may_pass(error):
      raise DataUnavailable(f"{path}: {text}") from error
    raise SettingError("path", str(path), text) from None
