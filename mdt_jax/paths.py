"""Paths that users give, and proof that a command can write its results.

A local path is a `pathlib.Path`. The path of a bucket (gs://…) is an
`etils.epath.Path`, which has the same methods, except for those of links and modes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from mdt_jax import buckets
from mdt_jax.buckets import AnyPath
from mdt_jax.errors import SettingError
from mdt_jax.logs import printable

# What is put around a name while its file is written, as by `atomic.write_json`.
_ADDED = len(".") + len(".12ab34cd.partial")
_NAME_MAX, _PATH_MAX = 255, 4096  # of Linux; macOS allows shorter paths
# One slash is enough: pathlib.Path("gs://bucket") is written "gs:/bucket".
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def expand_home(path: str | os.PathLike[str]) -> Path:
  """Replaces ~ or ~USER by the home folder; keeps ~USER if there is no such user.

  `Path.expanduser` raises an error in this case.
  """
  return Path(os.path.expanduser(path))


def absolute(path: str | os.PathLike[str]) -> AnyPath:
  """Returns an absolute path, with ~ replaced by the home folder."""
  if buckets.is_bucket(path):
    return buckets.bucket_path("path", path)
  return expand_home(path).absolute()


def any_path(setting: str, path: str | os.PathLike[str]) -> AnyPath:
  """Returns a local path, with ~ replaced by the home folder, or that of a bucket.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: the path; nothing needs to be there.

  Raises:
    SettingError: see `local_path`; or the bucket cannot be read.
    DataUnavailable: the bucket does not answer.
  """
  if not buckets.is_bucket(path):
    if is_url(text := os.fspath(path)):
      raise SettingError(
        setting, text, "must be a local path, or one of a bucket: gs://BUCKET/NAME"
      )
    return local_path(setting, path)
  found = buckets.bucket_path(setting, path)
  buckets.check_readable(setting, found)
  return found


def local_path(setting: str, path: str | os.PathLike[str]) -> Path:
  """Returns a local path, with ~ replaced by the home folder.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: the path; nothing needs to be there.

  Raises:
    SettingError: the path is empty, too long or a URL, holds a null character, or
      cannot be looked up.
  """
  text = os.fspath(path)
  if not text:
    raise SettingError(setting, text, "must not be empty")
  if is_url(text):
    raise SettingError(setting, text, "must be a local path")
  shown = text if len(text) <= _NAME_MAX else f"{text[:60]}…"
  found = expand_home(text)
  try:
    os.stat(found)
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (OSError, ValueError) as error:  # ValueError: a null character
    reason = getattr(error, "strerror", None) or str(error)
    raise SettingError(setting, shown, f"cannot be used: {reason}") from None
  return found


def input_file(setting: str, path: str | os.PathLike[str]) -> AnyPath:
  """Returns the path of a regular file that exists.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: the path of the file.

  Raises:
    SettingError: see `any_path`; or there is no such file, or the path is a folder, a
      FIFO or a device.
  """
  file = any_path(setting, path)
  if not file.is_file():
    accepted = "must be a regular file" if file.exists() else "must be a file"
    raise SettingError(setting, str(path), accepted)
  return file


def is_url(text: str) -> bool:
  """Whether a text starts with a scheme, such as gs:// or file:/."""
  return _SCHEME.match(text) is not None


def output_folder(setting: str, path: str | os.PathLike[str]) -> AnyPath:
  """Returns the path of a folder to write to, which need not exist; creates nothing.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: the path of the folder.

  Raises:
    SettingError: see `local_path`; or the path is not in UTF-8, is a file or lies below
      one; or its folder cannot be created or written; or the bucket cannot be written.
  """
  if buckets.is_bucket(path):
    folder = buckets.bucket_path(setting, path)
    buckets.check_writable(setting, str(path), folder)
    return folder
  folder = local_path(setting, path)
  if printable(str(folder)) != str(folder):  # Orbax and XLA pass paths to C++
    raise SettingError(
      setting,
      str(folder),
      "must be in UTF-8, and the locale of the process too (LC_ALL=C.UTF-8)",
    )
  if os.path.lexists(folder) and not folder.is_dir():
    kind = "a link to nothing" if folder.is_symlink() else "a file"
    raise SettingError(setting, str(path), f"must be a folder, not {kind}")
  _check_writable(setting, folder)
  return folder


def output_file(setting: str, path: str | os.PathLike[str]) -> AnyPath:
  """Returns the path of a file to write, which need not exist; creates nothing.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: the path of the file. A file that is there will be replaced.

  Raises:
    SettingError: see `local_path`; or the path is a folder or a special file, or lies
      below a file; or its folder cannot be created or written; or the bucket cannot be
      written.
  """
  if buckets.is_bucket(path):
    file = buckets.bucket_path(setting, path)
    buckets.check_writable(setting, str(path), file.parent)
    if os.fspath(path).endswith("/") or file.is_dir():
      raise SettingError(setting, str(path), "must be a file, not a folder")
    return file
  file = local_path(setting, path)
  if file.is_dir() or str(path).endswith(os.sep):
    raise SettingError(setting, str(path), "must be a file, not a folder")
  if file.exists() and not file.is_file():
    raise SettingError(setting, str(path), "must be a regular file")
  if len(os.fsencode(file.name)) + _ADDED > _NAME_MAX:
    limit = _NAME_MAX - _ADDED
    raise SettingError(
      setting, f"{file.name[:60]}…", f"has too long a name: at most {limit} bytes"
    )
  _check_writable(setting, file.parent)
  return file


def open_regular(path: Path, flags: int) -> int:
  """Opens a regular file and returns its descriptor; does not follow a link.

  Raises:
    OSError: the file cannot be opened, or is a link, a folder, a FIFO or a device.
  """
  # Without O_NONBLOCK, opening a FIFO waits for its other end.
  descriptor = os.open(
    path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
  )
  if stat.S_ISREG(os.fstat(descriptor).st_mode):
    return descriptor
  os.close(descriptor)
  raise OSError(errno.EEXIST, "it is not a regular file", str(path))


def _check_writable(setting: str, folder: Path) -> None:
  """Raises SettingError unless files can be written in a folder that may not exist."""
  missing: list[str] = []
  above = folder.absolute()
  while not os.path.lexists(above):
    missing.append(above.name)
    above = above.parent
  too_long = [name for name in missing if len(os.fsencode(name)) > _NAME_MAX]
  if too_long or len(os.fsencode(folder.absolute())) + _NAME_MAX > _PATH_MAX:
    raise SettingError(setting, f"{str(folder)[:60]}…", "is too long a path")
  if not above.is_dir():
    raise SettingError(setting, str(folder), f"lies below {above}, which is no folder")
  try:
    # The file has no name, so nothing is left even if the process is killed here.
    with tempfile.TemporaryFile(dir=above):
      pass
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      reason = "its disk is full"
    else:
      reason = f"cannot be created or written: {error.strerror}"
    raise SettingError(setting, str(folder), reason) from None


def remove_folder(folder: AnyPath) -> None:
  """Removes a folder as far as possible; ignores errors."""
  if isinstance(folder, Path):
    shutil.rmtree(folder, ignore_errors=True)
  else:
    with contextlib.suppress(Exception):  # gcsfs raises those of several libraries
      folder.rmtree(missing_ok=True)


def file_size(path: AnyPath) -> int:
  """Returns the size of a file in bytes."""
  return path.stat().st_size if isinstance(path, Path) else path.stat().length
