"""Paths of buckets: access, errors, atomic files, and objects that grow."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import gcsfs
import pytest
from etils import epath

from mdt_jax import buckets
from mdt_jax.atomic import atomic_write, read_json, write_json
from mdt_jax.errors import SettingError
from mdt_jax.paths import (
  any_path,
  file_size,
  input_file,
  output_file,
  output_folder,
  remove_folder,
)
from tests.fake_bucket import forget_connections, wait_for


def test_files_are_written_and_read(bucket):
  folder = output_folder("--workdir", f"{bucket}/run")
  assert not folder.exists()  # the check leaves nothing
  write_json(folder / "a.json", {"x": 1})
  assert read_json(folder / "a.json", ValueError) == {"x": 1}
  assert input_file("path", f"{bucket}/run/a.json") == folder / "a.json"
  assert file_size(folder / "a.json") == len((folder / "a.json").read_bytes())
  assert [path.name for path in folder.iterdir()] == ["a.json"]
  with buckets.local_copy(folder / "a.json") as local:
    assert isinstance(local, Path)
    assert json.loads(local.read_text()) == {"x": 1}
  assert not local.exists()
  remove_folder(folder)
  assert not folder.exists()


def test_failed_write_leaves_the_object(bucket):
  path = output_file("output", f"{bucket}/file.txt")
  path.write_text("old")
  with pytest.raises(ZeroDivisionError), atomic_write(path) as partial:
    partial.write_text("new")
    raise ZeroDivisionError
  assert path.read_text() == "old"
  with atomic_write(path) as partial:
    partial.write_text("new")
  assert path.read_text() == "new"


def test_failed_upload_leaves_the_object(bucket, tmp_path, monkeypatch):
  path = output_file("output", f"{bucket}/file")
  path.write_bytes(b"old")
  (tmp_path / "new").write_bytes(bytes(6 * 2**20))

  async def upload_chunk(*arguments):
    raise ConnectionResetError

  monkeypatch.setattr(gcsfs.core, "upload_chunk", upload_chunk)
  with pytest.raises(Exception):  # noqa: B017
    buckets.upload_file(tmp_path / "new", path)
  assert path.read_bytes() == b"old"


def test_parts_are_the_content_in_order(bucket, monkeypatch):
  monkeypatch.setattr(buckets, "PART_BYTES", 3)
  monkeypatch.setattr(buckets, "PARTS", 2)
  path = epath.Path(f"{bucket}/file")
  content = bytes(range(17))
  path.write_bytes(content)
  parts = list(buckets.read_parts(path, len(content)))
  assert b"".join(parts) == content
  assert max(map(len, parts)) == 3


def test_object_grows(bucket, monkeypatch):
  path = epath.Path(f"{bucket}/metrics.jsonl")
  path.write_bytes(b"1\n")
  monkeypatch.setattr(buckets, "SECONDS_BETWEEN_UPLOADS", 0.05)
  with buckets.AppendedObject(path) as file:
    assert file.write(b"2\n") == 2
    wait_for(lambda: path.read_bytes() == b"1\n2\n")
    file.write(b"3\n")
  assert path.read_bytes() == b"1\n2\n3\n"


def test_folder_is_uploaded(bucket, tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "x").write_text("1")
  (tmp_path / "a" / "b" / "y").write_text("2")
  target = epath.Path(f"{bucket}/tree")
  buckets.upload_folder(tmp_path, target)
  assert (target / "x").read_text() == "1"
  assert (target / "a" / "b" / "y").read_text() == "2"


@pytest.mark.parametrize("check", [any_path, input_file, output_folder, output_file])
@pytest.mark.parametrize("path", ["gs://no-such-bucket/x", "gs://", "gs:///x"])
def test_bucket_that_is_not_there_is_refused(bucket, check, path):
  with pytest.raises(SettingError) as error:
    check("--workdir", path)
  assert (error.value.setting, error.value.value) == ("--workdir", path)
  assert "bucket" in error.value.accepted


def test_object_that_is_not_there_is_refused(bucket):
  with pytest.raises(SettingError, match="must be a file"):
    input_file("path", f"{bucket}/missing.npz")


@pytest.mark.parametrize(
  ("status", "message", "expected"),
  [
    (401, "Anonymous caller does not have access", "no credentials"),
    (403, "sa@x does not have storage.objects.create access", "no permission"),
    (404, "The specified bucket does not exist.", "there is no bucket 'b'"),
  ],
)
@pytest.mark.parametrize("check", [any_path, output_folder])
def test_refusal_of_the_server_is_one_line(
  bucket, monkeypatch, status, message, expected, check
):
  class Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.rfile.read(int(self.headers.get("Content-Length", 0)))
      body = json.dumps({"error": {"code": status, "message": message}}).encode()
      self.send_response(status)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address
    with monkeypatch.context() as patched:
      patched.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
      forget_connections()
      with pytest.raises(SettingError) as error:
        check("--workdir", "gs://b/run")
    server.shutdown()
  forget_connections()
  assert expected in error.value.accepted
  assert "\n" not in str(error.value)


def test_failed_requests_are_told_from_other_errors(bucket):
  from aiohttp import ClientConnectionError
  from gcsfs.retry import HttpError

  down = buckets.reason_of_bucket(ClientConnectionError("no route"))
  assert down == "the bucket does not answer: no route"
  too_many = HttpError({"code": 429, "message": "slow down"})
  assert "slow down" in (buckets.reason_of_bucket(too_many) or "")
  refused = OSError("Forbidden: https://x\nno access")
  assert "no permission" in (buckets.reason_of_bucket(refused) or "")
  for other in (OSError(28, "no space"), ValueError("x"), FileNotFoundError("x")):
    assert buckets.reason_of_bucket(other) is None


def test_request_that_times_out_is_told_from_other_timeouts(bucket, monkeypatch):
  async def hang(self, *arguments, **options):
    raise TimeoutError  # of aiohttp, after five minutes

  monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", hang)
  with pytest.raises(TimeoutError) as error:
    epath.Path(f"{bucket}/x").read_bytes()
  assert "does not answer" in (buckets.reason_of_bucket(error.value) or "")
  assert buckets.may_pass(error.value)
  assert buckets.reason_of_bucket(TimeoutError("of something else")) is None


def test_missing_package_is_named(monkeypatch):
  def missing(name):
    raise ImportError(f"No module named {name!r}")

  buckets._prepare.cache_clear()
  monkeypatch.setattr(buckets.importlib, "import_module", missing)
  with pytest.raises(SettingError, match="gcs"):
    output_folder("--workdir", "gs://bucket/run")
  buckets._prepare.cache_clear()
