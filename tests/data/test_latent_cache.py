"""copy_set: the copy of a latent set that lies in a bucket."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
import types

import numpy as np
import pytest
from etils import epath

from mdt_jax import buckets
from mdt_jax.data import latent_cache, latents, loader
from mdt_jax.data.latent_cache import COPIED, LOCK, copy_set
from mdt_jax.data.sources import SOURCES, create_source
from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.logs import print_log_lines
from tests import forked
from tests.data import sets
from tests.fake_bucket import FakeBucket, forget_connections

SHARDS = [latents.shard_name(i, sets.NUM_SHARDS) for i in range(sets.NUM_SHARDS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return sets.write(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def stored(whole, bucket):
  """The path of a set in a bucket."""
  upload(whole, f"{bucket}/set")
  return f"{bucket}/set"


def upload(folder, path):
  buckets.bucket_path("path", path)
  buckets.upload_folder(folder, epath.Path(path))


@pytest.fixture
def copies(monkeypatch):
  """Names of the shards whose copying begins."""
  names = []
  read = buckets.read_parts

  def read_parts(path, size):
    names.append(path.name)
    return read(path, size)

  monkeypatch.setattr(buckets, "read_parts", read_parts)
  return names


def contents(folder):
  found = {path.name: path.read_bytes() for path in folder.iterdir()}
  return {name: v for name, v in found.items() if name not in (COPIED, LOCK)}


def open_source(path, cache):
  return create_source(
    "latents", path=path, image_size=4, channels=3, max_unreadable=0, cache=cache
  )


def test_batches_equal_those_of_a_folder(whole, stored, tmp_path):
  def batches(path, cache):
    options = {"seed": 3, "batch_size": 7, "flip": True}
    found = loader.create_loader(open_source(path, cache), **options)
    return [next(found) for _ in range(5)]

  cache = str(tmp_path / "cache")
  expected = batches(whole, None)
  for batch, other in zip(expected, batches(stored, cache), strict=True):
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def test_copy_is_complete_and_made_once(whole, stored, tmp_path, copies):
  folder = copy_set(stored, tmp_path)
  assert folder.parent == tmp_path
  assert folder.name.startswith("set-")
  assert contents(folder) == contents(whole)
  assert copies == SHARDS
  assert copy_set(f"{stored}/", tmp_path) == folder
  assert copies == SHARDS
  assert latents.verify(folder) == sets.NUM_IMAGES


def test_interrupted_copy_resumes(whole, stored, tmp_path, copies, monkeypatch):
  with monkeypatch.context() as patched:
    read = buckets.read_parts

    def read_parts(path, size):
      if path.name == SHARDS[1]:
        raise KeyboardInterrupt
      return read(path, size)

    patched.setattr(buckets, "read_parts", read_parts)
    with pytest.raises(KeyboardInterrupt):
      copy_set(stored, tmp_path)
  assert copies == SHARDS[:1]
  folder = copy_set(stored, tmp_path)
  assert copies == SHARDS
  assert contents(folder) == contents(whole)


def copy_slowly(path, cache):
  """Copies a set slowly, so that a test can kill the process."""
  buckets.PART_BYTES, buckets.PARTS = 4096, 1
  read = buckets.read_parts

  def read_parts(path, size):
    for part in read(path, size):
      time.sleep(0.01)
      yield part

  buckets.read_parts = read_parts
  print_log_lines()
  print("begun", flush=True)
  print("copied to", copy_set(path, cache), flush=True)


def environment():
  names = ("STORAGE_", "GCSFS_", "NO_GCE")
  return {k: v for k, v in os.environ.items() if k.startswith(names)}


def test_sigkill_leaves_a_copy_that_resumes(whole, stored, tmp_path, copies):
  process = forked.Forked(copy_slowly, stored, str(tmp_path), environment=environment())
  while not list(tmp_path.glob(f"*/.{SHARDS[1]}.*")):
    assert process.is_alive()
    time.sleep(0.005)
  process.kill()
  assert process.end() == -signal.SIGKILL
  folder = copy_set(stored, tmp_path)
  assert copies == SHARDS[1:]
  assert contents(folder) == contents(whole)


def test_two_processes_copy_each_shard_once(whole, stored, tmp_path):
  processes = [
    forked.Forked(copy_slowly, stored, str(tmp_path), environment=environment())
    for _ in range(2)
  ]
  for process in processes:
    assert process.end() == 0, process.err
    assert "copied to" in process.out
  (folder,) = tmp_path.iterdir()
  assert contents(folder) == contents(whole)
  lines = [line for p in processes for line in p.out.splitlines()]
  assert sum("copying 3 shards" in line for line in lines) == 1
  assert sum("waiting for it" in line for line in lines) == 1


@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_only_a_lost_shard_is_copied_again(whole, stored, tmp_path, copies, harm):
  folder = copy_set(stored, tmp_path)
  shard = folder / SHARDS[1]
  if harm == "remove":
    shard.unlink()
  else:
    shard.write_bytes(shard.read_bytes()[:-1])
  copies.clear()
  assert copy_set(stored, tmp_path) == folder
  assert copies == [SHARDS[1]]
  assert contents(folder) == contents(whole)


def test_shard_that_changed_in_the_bucket_is_copied_again(stored, tmp_path, copies):
  folder = copy_set(stored, tmp_path)
  shard = epath.Path(stored) / SHARDS[2]
  data = bytearray(shard.read_bytes())
  data[-1] ^= 1
  shard.write_bytes(bytes(data))
  copies.clear()
  assert copy_set(stored, tmp_path) == folder
  assert copies == [SHARDS[2]]
  assert (folder / SHARDS[2]).read_bytes() == bytes(data)


def test_sets_with_different_cards_never_mix(whole, stored, tmp_path):
  first = copy_set(stored, tmp_path)
  card = json.loads((epath.Path(stored) / latents.CARD).read_text())
  card["classes"][0] = "another name"
  (epath.Path(stored) / latents.CARD).write_text(json.dumps(card))
  second = copy_set(stored, tmp_path)
  assert first != second
  assert contents(first) == contents(whole)
  assert latents.read_card(second)["classes"][0] == "another name"


@pytest.mark.parametrize("times", [1, latent_cache.TRIES])
def test_damage_on_the_way_is_noticed(whole, stored, tmp_path, monkeypatch, times):
  read = buckets.read_parts
  left = [times]

  def read_parts(path, size):
    is_damaged = path.name == SHARDS[1] and left[0] > 0
    left[0] -= is_damaged
    for part in read(path, size):
      yield bytes(len(part)) if is_damaged else part

  monkeypatch.setattr(buckets, "read_parts", read_parts)
  if times == latent_cache.TRIES:
    with pytest.raises(DataUnavailable, match=r"latents-00001.*CRC-32C"):
      copy_set(stored, tmp_path)
  assert contents(copy_set(stored, tmp_path)) == contents(whole)


# Errors.


def test_disk_that_is_too_small_is_refused(stored, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  cache = tmp_path / "not" / "yet"
  with pytest.raises(SettingError, match="are free on this disk") as error:
    copy_set(stored, str(cache))
  assert (error.value.setting, error.value.value) == ("config.data.cache", str(cache))
  assert not cache.parent.exists()


def test_complete_copy_needs_no_room(stored, tmp_path, monkeypatch):
  folder = copy_set(stored, tmp_path)
  usage = shutil.disk_usage(tmp_path)._replace(free=0)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  assert copy_set(stored, tmp_path) == folder


@pytest.mark.parametrize("cache", [None, "", "gs://bucket/cache"])
def test_cache_must_be_a_local_folder(stored, cache):
  with pytest.raises(SettingError) as error:
    open_source(stored, cache)
  assert (error.value.setting, error.value.value) == ("config.data.cache", cache)


def test_cache_has_no_effect_on_a_local_path(whole, tmp_path):
  assert len(open_source(whole, str(tmp_path / "cache"))) == sets.NUM_IMAGES
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", sorted({*SOURCES} - {"latents", "digits"}))
def test_other_sources_read_no_bucket(name):
  with pytest.raises(SettingError, match="latents") as error:
    create_source(
      name, path="gs://bucket/data", image_size=4, channels=3, max_unreadable=0
    )
  assert error.value.setting == "config.data.path"


def test_latents_of_another_shape_are_refused_before_the_copy(stored, tmp_path):
  with pytest.raises(SettingError, match=r"\(4, 4, 3\)") as error:
    create_source(
      "latents",
      path=stored,
      image_size=8,
      channels=3,
      max_unreadable=0,
      cache=str(tmp_path / "cache"),
    )
  assert (error.value.setting, error.value.value) == ("config.data.path", stored)
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_set_that_lacks_a_shard_is_refused(stored, tmp_path, harm):
  shard = epath.Path(stored) / SHARDS[1]
  data = shard.read_bytes()
  shard.unlink()
  if harm == "cut":
    shard.write_bytes(data[:-1])
  with pytest.raises(SettingError, match=r"^config.data.path = 'gs://.*latents-00001"):
    copy_set(stored, tmp_path / "cache")
  assert not (tmp_path / "cache").exists()


def test_server_that_goes_away_is_tried_again(whole, tmp_path, monkeypatch):
  server = FakeBucket(tmp_path / "server")
  for name, value in server.environment.items():
    monkeypatch.setenv(name, value)
  forget_connections()
  retry = importlib.import_module("gcsfs.retry")
  tries = []

  async def sleep(seconds):
    tries.append(seconds)

  monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=sleep))
  monkeypatch.setattr(buckets, "PART_BYTES", 1000)
  monkeypatch.setattr(buckets, "PARTS", 2)
  path = f"{server.root}/set"
  upload(whole, path)
  read = buckets.read_parts

  def read_parts(path, size):
    for number, part in enumerate(read(path, size)):
      if path.name == SHARDS[1] and number == 4:
        server.kill()
      yield part

  with monkeypatch.context() as patched:
    patched.setattr(buckets, "read_parts", read_parts)
    with pytest.raises(DataUnavailable, match="does not answer"):
      copy_set(path, tmp_path / "cache")
  assert len(tries) >= 5
  (folder,) = (tmp_path / "cache").iterdir()
  assert contents(folder).keys() == {SHARDS[0]}
  with pytest.raises(DataUnavailable):
    copy_set(path, tmp_path / "cache")
  server.start()
  assert contents(copy_set(path, tmp_path / "cache")) == contents(whole)
  server.kill()
  monkeypatch.undo()
  forget_connections()
