"""Buckets of Google Cloud Storage: paths such as gs://bucket/run.

`etils.epath.Path` reads and writes the objects of a bucket, through gcsfs. An object is
written at once or not at all, and cannot grow. This module checks that a bucket can be
used, and has what `epath.Path` lacks: objects that grow, and copies of whole folders.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import secrets
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from mdt_jax.errors import DataUnavailable, SettingError, one_line
from mdt_jax.logs import logger

AnyPath: TypeAlias = Path | epath.Path  # local, or of a bucket

SCHEME = "gs://"
SECONDS_BETWEEN_UPLOADS = 10.0  # of an object that grows
SHARE_OF_UPLOADS = 0.05  # of the time, at most, for an object that grows
# An object is downloaded in parts, of which so many are read at the same time.
PART_BYTES, PARTS = 8 * 2**20, 8
PART_SECONDS = 300.0  # after which a download counts as failed
_LIBRARIES = ("aiohttp", "gcsfs", "google", "requests", "urllib3")  # raise errors
# Exceptions without a code that may be over at the next start.
_PASSING = ("ChecksumError", "RefreshError", "RetryError", "TransportError")


def is_bucket(path: str | os.PathLike[str]) -> bool:
  """Whether a path is one of a bucket: gs://…"""
  return os.fspath(path).startswith(SCHEME)


def bucket_path(setting: str, path: str | os.PathLike[str]) -> epath.Path:
  """Returns the path of an object or a folder in a bucket; asks no server.

  Args:
    setting: name of the setting that holds the path, for errors.
    path: gs://BUCKET/NAME; nothing needs to be there.

  Raises:
    SettingError: the path names no bucket, or gcsfs is not installed.
  """
  text = os.fspath(path)
  if not _bucket(text):
    raise SettingError(setting, text, "must name a bucket: gs://BUCKET/NAME")
  try:
    _prepare()
  except ImportError as error:
    raise SettingError(
      setting, text, f"needs gcsfs ({one_line(error)}): pip install -e '.[gcs]'"
    ) from None
  return epath.Path(text.rstrip("/"))


def check_readable(setting: str, path: epath.Path) -> None:
  """Checks that the objects of the bucket of `path` can be listed.

  Raises:
    SettingError: they cannot be listed.
    DataUnavailable: the bucket does not answer.
  """
  with _refused(setting, str(path), path):
    options = {"maxResults": 1, "json_out": True}
    _filesystem().call("GET", "b/{}/o", _bucket(path), **options)


def check_writable(setting: str, value: str, folder: epath.Path) -> None:
  """Writes an empty object to a folder of a bucket, and deletes it.

  Args:
    setting, value: the setting that needs the folder, for the error.
    folder: the folder.

  Raises:
    SettingError: the object cannot be written or deleted.
    DataUnavailable: the bucket does not answer.
  """
  probe = folder / f".probe.{secrets.token_hex(4)}"
  with _refused(setting, value, folder):
    probe.write_bytes(b"")
    probe.unlink()


def describe_error(error: Exception, path: str | os.PathLike[str]) -> str:
  """Describes, in one line, why a bucket cannot be used.

  Args:
    error: an exception of gcsfs or of google-cloud-storage.
    path: path in the bucket.
  """
  code = getattr(error, "code", None)
  text = one_line(error)
  library = type(error).__module__.split(".")[0]
  if isinstance(error, FileNotFoundError) or code == 404:
    return f"there is no bucket {_bucket(path)!r}"
  if type(error).__name__ == "DefaultCredentialsError" or code == 401:
    return (
      "no credentials for Google Cloud: run 'gcloud auth application-default login', "
      f"or set GOOGLE_APPLICATION_CREDENTIALS ({text})"
    )
  if text.startswith("Forbidden") or code == 403:
    return f"no permission: {text}"
  is_of_network = library in ("aiohttp", "requests", "urllib3")
  if is_of_network or isinstance(error, ConnectionError | TimeoutError):
    return f"the bucket does not answer: {text}"
  return f"the bucket cannot be used: {text}"


def reason_of_bucket(error: Exception) -> str | None:
  """Describes, in one line, a failed request to a bucket that caused an exception.

  Returns:
    The reason; None for any other cause.
  """
  is_refusal = isinstance(error, OSError) and str(error).startswith("Forbidden: ")
  is_late = isinstance(error, TimeoutError) and _is_of_request(error)
  library = type(error).__module__.split(".")[0]
  if not (is_refusal or is_late or library in _LIBRARIES):
    return None
  return describe_error(error, "")


def list_objects(folder: epath.Path) -> dict[str, int]:
  """Lists the objects in a folder and in its folders: path in `folder` -> bytes."""
  prefix = f"{str(folder).removeprefix(SCHEME)}/"
  found = _filesystem().find(str(folder), detail=True)
  return {name.removeprefix(prefix): info["size"] for name, info in found.items()}


def list_checksums(folder: epath.Path) -> dict[str, str | None]:
  """Lists the objects of a folder as `list_objects` does: path -> CRC-32C, base64.

  The checksum is None if the server gives none.
  """
  prefix = f"{str(folder).removeprefix(SCHEME)}/"
  found = _filesystem().find(str(folder), detail=True)
  return {name.removeprefix(prefix): o.get("crc32c") for name, o in found.items()}


def may_pass(error: Exception) -> bool:
  """Whether an exception of gcsfs may be over at the next start."""
  code = getattr(error, "code", None) or getattr(error, "status", None)
  if code is not None and str(code).isdigit():
    return int(code) in (408, 429) or int(code) >= 500
  if isinstance(error, ConnectionError | TimeoutError):
    return True
  name, library = type(error).__name__, type(error).__module__.split(".")[0]
  is_of_network = library in ("aiohttp", "requests", "urllib3")
  return is_of_network or name in _PASSING


@contextlib.contextmanager
def one_line_errors(setting: str, path: epath.Path) -> Iterator[None]:
  """Turns exceptions of gcsfs in the block into errors of one line.

  Args:
    setting: name of the setting that holds the path.
    path: path in the bucket.

  Raises:
    DataUnavailable: the cause may pass, such as a network that is away.
    SettingError: any other cause, such as a missing permission.
    FileNotFoundError: there is no such object.
  """
  try:
    yield
  except (FileNotFoundError, SettingError, DataUnavailable):
    raise
  except Exception as error:  # gcsfs raises those of several libraries
    text = describe_error(error, path)
    if may_pass(error):
      raise DataUnavailable(f"{path}: {text}") from error
    raise SettingError(setting, str(path), text) from None


def read_object(path: epath.Path) -> bytes:
  """Reads an object.

  Raises:
    FileNotFoundError: there is no such object.
    DataUnavailable: the bucket does not answer.
    OSError: any other cause; its text is one line.
  """
  try:
    return path.read_bytes()
  except FileNotFoundError:
    raise
  except Exception as error:  # gcsfs raises those of several libraries
    text = describe_error(error, path)
    if may_pass(error):
      raise DataUnavailable(f"{path}: {text}") from error
    raise OSError(text) from error


def read_parts(path: epath.Path, size: int) -> Iterator[bytes]:
  """Yields the content of an object of `size` bytes, in order.

  Raises the exceptions of gcsfs, which tries again for about 30 s before.
  """
  step = PART_BYTES * PARTS
  for start in range(0, size, step):
    starts = [*range(start, min(start + step, size), PART_BYTES)]
    ends = [min(first + PART_BYTES, size) for first in starts]
    names = [str(path)] * len(starts)
    options = {"on_error": "raise", "timeout": PART_SECONDS}
    yield from _filesystem().cat_ranges(names, starts, ends, **options)


def upload_file(local: str | os.PathLike[str], path: epath.Path) -> None:
  """Copies a local file to an object.

  If an exception ends the copy, such as KeyboardInterrupt, the object stays as it was.
  `epath.Path.copy` would leave a truncated object.
  """
  _filesystem().put_file(os.fspath(local), str(path))


def upload_folder(local: str | os.PathLike[str], folder: epath.Path) -> None:
  """Copies the files of a local folder, and of the folders in it, to `folder`."""
  for above, _, names in os.walk(local):
    for name in names:
      file = os.path.join(above, name)
      target = folder / os.path.relpath(file, local)
      upload_file(file, target)


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Moves the objects of a folder to a new folder.

  `epath.Path.rename` fails if nothing lies in the folder above `target`.
  """
  names = list_objects(source)
  old, new = ([f"{folder}/{name}" for name in names] for folder in (source, target))
  _filesystem().copy(old, new)
  _filesystem().rm(old)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
  """Yields a local file: a copy of an object, for the block, or a local path itself."""
  if isinstance(path, Path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix="mdt_jax_") as folder:
    copy = Path(folder) / path.name
    path.copy(copy)
    yield copy


class AppendedObject(io.RawIOBase):
  """An object that grows, as a file in mode "ab".

  A local file holds the content. A thread uploads the content at most every
  `SECONDS_BETWEEN_UPLOADS` seconds, and less often if an upload takes long. A failed
  upload is logged and tried again.

  Args:
    path: path of the object, whose present content is kept.
  """

  def __init__(self, path: epath.Path):
    self._path = path
    self._local: Any = tempfile.TemporaryFile()  # noqa: SIM115
    with contextlib.suppress(FileNotFoundError):
      self._local.write(path.read_bytes())
    self._lock = threading.Lock()  # of the local file
    self._is_uploaded = True
    self._pause = SECONDS_BETWEEN_UPLOADS
    self._ends = threading.Event()
    self._thread = threading.Thread(target=self._run, name=f"{path}", daemon=True)
    self._thread.start()

  def writable(self) -> bool:
    """Returns True."""
    return True

  def write(self, data: Any, /) -> int:
    """Appends bytes and returns their number; the upload follows."""
    with self._lock:
      self._is_uploaded = False
      return self._local.write(data)

  def close(self) -> None:
    """Uploads what is not uploaded yet; raises the exception of a failed upload."""
    if self.closed:
      return
    self._ends.set()
    self._thread.join()
    try:
      self._upload()
    finally:
      self._local.close()
      super().close()

  def _run(self) -> None:
    """Uploads the content again and again until `close`."""
    while not self._ends.wait(self._pause):
      start = time.monotonic()
      try:
        self._upload()
      except Exception as error:  # the next try follows
        logger.error("NOT WRITTEN: %s: %s", self._path, one_line(error))
      taken = time.monotonic() - start
      self._pause = max(SECONDS_BETWEEN_UPLOADS, taken / SHARE_OF_UPLOADS)

  def _upload(self) -> None:
    """Writes the object if it lacks a part of the content."""
    with self._lock:
      if self._is_uploaded:
        return
      self._local.seek(0)
      content = self._local.read()
      self._is_uploaded = True
    try:
      _filesystem().pipe_file(str(self._path), content)
    except BaseException:
      self._is_uploaded = False
      raise


@functools.cache
def _prepare() -> None:
  """Makes epath use gcsfs, and gcsfs see at once what other processes write.

  Raises:
    ImportError: gcsfs is not installed.
  """
  # TensorFlow, where it is installed, would take seconds and other credentials.
  os.environ.setdefault("EPATH_USE_TF", "0")
  # epath asks for this variable once, at its first path, which may be a local one.
  importlib.import_module("etils.epath.gpath")._is_tf_installed.cache_clear()
  importlib.import_module("gcsfs")
  fsspec: Any = importlib.import_module("fsspec")
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  # The exceptions of failed requests and of missing credentials are enough.
  for library in ("gcsfs", "google.auth"):
    logging.getLogger(library).setLevel(logging.CRITICAL)


def _filesystem() -> Any:
  """The file system of gcsfs, the one that `epath.Path` uses."""
  fsspec: Any = importlib.import_module("fsspec")
  return fsspec.filesystem("gcs", finalize_on_close=True)


def _is_of_request(error: Exception) -> bool:
  """Whether an exception came from a request to a bucket."""
  frames = traceback.walk_tb(error.__traceback__)
  names = (str(frame.f_globals.get("__name__")) for frame, _ in frames)
  return any(name.split(".")[0] in ("fsspec", *_LIBRARIES) for name in names)


def _bucket(path: str | os.PathLike[str]) -> str:
  """The name of the bucket of a path."""
  return os.fspath(path).removeprefix(SCHEME).partition("/")[0]


@contextlib.contextmanager
def _refused(setting: str, value: str, path: epath.Path) -> Iterator[None]:
  """Raises SettingError or DataUnavailable for an exception of the block."""
  try:
    yield
  except Exception as error:  # gcsfs raises those of several libraries
    if may_pass(error):
      raise DataUnavailable(f"{value}: {describe_error(error, path)}") from error
    raise SettingError(setting, value, describe_error(error, path)) from None
