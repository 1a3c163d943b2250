"""Latent sets that are written to a bucket, and read from it in order."""

from __future__ import annotations

import os
import shutil
import signal
import time

import numpy as np
import pytest
from etils import epath

from mdt_jax import buckets
from mdt_jax.data import latents
from mdt_jax.data.feature_import import import_features
from mdt_jax.data.latent_set import BEGUN
from mdt_jax.errors import DataUnavailable, SettingError
from tests import forked
from tests.data import sets

SHARDS = [latents.shard_name(i, sets.NUM_SHARDS) for i in range(sets.NUM_SHARDS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return sets.write(tmp_path_factory.mktemp("whole"))


def contents(folder):
  paths = list(folder.iterdir()) if folder.exists() else []
  return {path.name: path.read_bytes() for path in paths}


def of_bucket(bucket):
  return contents(epath.Path(bucket))


def test_set_in_a_bucket_equals_that_in_a_folder(whole, bucket):
  sets.write(bucket)
  assert of_bucket(bucket) == contents(whole)
  assert sets.latent_set(bucket).is_finished()


def test_stopped_run_resumes_at_the_first_unfinished_shard(whole, bucket):
  calls = []

  def encode(images):
    calls.append(1)
    if len(calls) > 4:  # a shard takes three batches
      raise KeyboardInterrupt
    return sets.encode_fn(images)

  with pytest.raises(KeyboardInterrupt):
    sets.write(bucket, encode=encode)
  entry = SHARDS[0].replace(".array_record", ".json")
  assert of_bucket(bucket).keys() == {BEGUN, SHARDS[0], entry}
  calls.clear()
  sets.write(bucket, encode=lambda images: calls.append(1) or sets.encode_fn(images))
  assert len(calls) == 6
  assert of_bucket(bucket) == contents(whole)


def environment():
  names = ("STORAGE_", "GCSFS_", "NO_GCE", "TENSORSTORE_")
  return {k: v for k, v in os.environ.items() if k.startswith(names)}


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
def test_sigkill_loses_no_data(whole, bucket, delay):
  process = forked.command("tests.data.sets", bucket, environment=environment())
  process.wait_for("begun")
  time.sleep(delay)
  process.kill()
  assert process.end() == -signal.SIGKILL
  sets.write(bucket)
  assert of_bucket(bucket) == contents(whole)


@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_only_the_lost_shard_is_encoded_again(whole, bucket, harm):
  sets.write(bucket)
  shard = epath.Path(bucket) / SHARDS[1]
  if harm == "remove":
    shard.unlink()
  else:
    shard.write_bytes(shard.read_bytes()[:-100])
  calls = []
  sets.write(bucket, encode=lambda images: calls.append(1) or sets.encode_fn(images))
  assert len(calls) == 3
  assert of_bucket(bucket) == contents(whole)


# Several processes.


def test_processes_share_the_shards(whole, bucket):
  processes = [
    forked.command("tests.data.sets", bucket, index, 2, environment=environment())
    for index in range(2)
  ]
  for process in processes:
    assert process.end() == 0, process.err
  assert of_bucket(bucket) == contents(whole)


def test_second_process_on_a_shard_ends_with_an_error(whole, bucket):
  def encode(images):
    if not of_bucket(bucket).keys() & {*SHARDS}:
      sets.write(bucket)  # another process, which is faster
    return sets.encode_fn(images)

  with pytest.raises(SettingError, match=r"another process has written latents-00000"):
    sets.write(bucket, encode=encode)
  assert of_bucket(bucket) == contents(whole)


def test_processes_on_the_same_shards_damage_nothing(whole, bucket):
  """They are as fast as each other, so that both may upload a shard."""
  processes = [
    forked.command("tests.data.sets", bucket, environment=environment())
    for _ in range(2)
  ]
  for process in processes:
    process.end()
  sets.write(bucket)
  assert of_bucket(bucket) == contents(whole)


def test_shard_that_differs_from_its_entry_is_encoded_again(whole, bucket):
  """Two processes left out different images, and uploaded at the same time."""
  sets.write(bucket, process_index=0, process_count=2)
  shard = epath.Path(bucket) / SHARDS[0]
  shard.write_bytes(shard.read_bytes() + bytes(100))
  with pytest.raises(SettingError, match=r"two processes have written latents-00000"):
    sets.write(bucket, process_index=1, process_count=2)
  sets.write(bucket)
  assert of_bucket(bucket) == contents(whole)


# Errors.


def test_settings_error_leaves_nothing(bucket):
  def encode(images):
    return np.full((len(images), 2, 2, *sets.LATENT_SHAPE), np.inf, np.float16)

  with pytest.raises(SettingError, match=r"^--dtype = 'float16'"):
    sets.write(bucket, encode=encode)
  assert of_bucket(bucket) == {}


def test_folder_with_other_files_is_refused(bucket):
  (epath.Path(bucket) / "mine.txt").write_text("kept")
  with pytest.raises(SettingError, match=r"--output = 'gs://.*: must be empty"):
    sets.write(bucket)
  assert of_bucket(bucket) == {"mine.txt": b"kept"}


def test_temporary_disk_must_hold_one_shard(bucket, monkeypatch):
  latent_set = sets.latent_set(bucket)
  usage = shutil.disk_usage("/")._replace(free=8 * 388)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  assert latent_set.check_disk() == (24 * 388, 8 * 388)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000))
  with pytest.raises(SettingError, match=r"--output = 'gs://.*TMPDIR"):
    latent_set.check_disk()


def test_bucket_that_is_away_can_be_tried_again(bucket, monkeypatch):
  def upload(local, path):
    raise ConnectionResetError("gone")

  with monkeypatch.context() as patched:
    patched.setattr(buckets, "upload_file", upload)
    with pytest.raises(DataUnavailable, match="does not answer"):
      sets.write(bucket)
  sets.write(bucket)


# Reading in order.


def test_every_record_is_verified(bucket):
  sets.write(bucket)
  assert latents.verify(bucket) == sets.NUM_IMAGES
  shard = epath.Path(bucket) / SHARDS[1]
  data = bytearray(shard.read_bytes())
  data[data.find(sets.views(10).tobytes()) + 5] ^= 255
  shard.write_bytes(bytes(data))
  with pytest.raises(SettingError, match=r"'gs://.*record 2 of latents-00001"):
    latents.verify(bucket)


def test_records_are_those_of_a_folder(whole, bucket):
  sets.write(bucket)
  source, expected = latents.open_set(bucket), latents.open_set(whole)
  for index in (0, 1, 9, 23, 2):
    np.testing.assert_array_equal(source[index]["views"], expected[index]["views"])
    assert source[index]["label"] == expected[index]["label"]


@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_error_names_a_lost_shard(bucket, harm):
  sets.write(bucket)
  shard = epath.Path(bucket) / SHARDS[1]
  data = shard.read_bytes()
  shard.unlink()
  if harm == "cut":
    shard.write_bytes(data[:-1])
  with pytest.raises(SettingError, match=r"^config.data.path = 'gs://.*latents-00001"):
    latents.open_set(bucket)


@pytest.mark.parametrize("path", ["gs://no-such-bucket/set", "gs://bucket/no-such-set"])
def test_path_without_a_set_is_refused(bucket, path):
  with pytest.raises(SettingError) as error:
    latents.read_card(path)
  assert error.value.value == path
  expected = (
    "holds no card.json" if "such-set" in path else "no bucket 'no-such-bucket'"
  )
  assert expected in error.value.accepted


def test_statistics_of_imported_features_read_few_shards(bucket, tmp_path, monkeypatch):
  features = np.random.default_rng(0).standard_normal((10, 4, 2, 2)).astype(np.float32)
  np.save(tmp_path / "latents.npy", features)
  read = []
  parts = buckets.read_parts
  monkeypatch.setattr(
    buckets,
    "read_parts",
    lambda path, size: read.append(path.name) or parts(path, size),
  )
  import_features(tmp_path / "latents.npy", bucket, num_shards=5)
  assert read == [latents.shard_name(index, 5) for index in (0, 2, 4)]
