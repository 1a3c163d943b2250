"""write_latents: contents of the set, resumption after a stop, errors."""

from __future__ import annotations

import errno
import resource
import signal
import time

import jax
import numpy as np
import pytest

from mdt_jax.data import examples, latents
from mdt_jax.data.latent_set import BEGUN
from mdt_jax.data.latent_writer import write_latents
from mdt_jax.errors import DataUnavailable, SettingError
from tests import forked
from tests.data import sets


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return sets.write(tmp_path_factory.mktemp("whole"))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def counting(calls):
  def encode(images):
    calls.append(len(images))
    return sets.encode_fn(images)

  return encode


def test_finished_set_holds_only_shards_and_the_card(whole):
  names = {latents.shard_name(i, sets.NUM_SHARDS) for i in range(sets.NUM_SHARDS)}
  assert contents(whole).keys() == names | {latents.CARD}


def test_card_counts_match_the_shards(whole):
  card = latents.read_card(whole)
  assert card["images"] == sum(shard["images"] for shard in card["shards"]) == 24
  for shard in card["shards"]:
    assert (whole / shard["file"]).stat().st_size == shard["bytes"]
    assert shard["left_out"] == []


def test_encoding_is_deterministic(whole, tmp_path):
  assert contents(sets.write(tmp_path)) == contents(whole)


def test_all_encoded_batches_have_the_same_size(tmp_path):
  calls = []
  sets.write(tmp_path, encode=counting(calls))
  assert set(calls) == {sets.BATCH_SIZE}
  assert len(calls) == 9  # 3 shards of 8 images, in batches of 3.


@pytest.mark.parametrize("process_count", [2, 3, 5])
def test_processes_share_the_shards(whole, tmp_path, process_count):
  finished = [
    write_latents(
      sets.latent_set(tmp_path),
      sets.Images(),
      sets.encode_fn,
      batch_size=sets.BATCH_SIZE,
      process_index=index,
      process_count=process_count,
    )
    for index in range(process_count)
  ]
  last = min(process_count, sets.NUM_SHARDS) - 1
  assert finished == [index >= last for index in range(process_count)]
  assert contents(tmp_path) == contents(whole)


def test_progress_counts_every_image_once(tmp_path):
  counts = []
  sets.write(tmp_path, progress=counts.append)
  assert sum(counts) == sets.NUM_IMAGES


# Interrupted runs.


def stop_after(batches):
  """An encode_fn that raises KeyboardInterrupt after `batches` batches."""
  calls = []

  def encode(images):
    calls.append(1)
    if len(calls) > batches:
      raise KeyboardInterrupt
    return sets.encode_fn(images)

  return encode


@pytest.mark.parametrize("batches", [0, 1, 4, 8])
def test_resumed_run_encodes_only_the_unfinished_shards(whole, tmp_path, batches):
  with pytest.raises(KeyboardInterrupt):
    sets.write(tmp_path, encode=stop_after(batches))
  assert not (tmp_path / latents.CARD).exists()
  calls = []
  sets.write(tmp_path, encode=counting(calls))
  done = batches // 3  # A shard takes three batches.
  assert len(calls) == 3 * (sets.NUM_SHARDS - done)
  assert contents(tmp_path) == contents(whole)


def test_sigkill_at_ten_random_times_loses_no_data(whole, tmp_path):
  rng = np.random.default_rng(0)
  kills = 0
  for delay in rng.uniform(0, 0.15, 40):
    process = forked.command("tests.data.sets", tmp_path)
    process.wait_for("begun")
    time.sleep(delay)
    process.kill()
    if process.end() == -signal.SIGKILL:
      kills += 1
    else:
      break
    if kills == 10:
      break
  assert kills >= 5  # The set may be finished before the tenth kill.
  sets.write(tmp_path)
  found = contents(tmp_path)
  leftovers = {name for name in found if name.startswith(".")}
  assert {k: v for k, v in found.items() if k not in leftovers} == contents(whole)


def test_processes_started_together_write_one_set(whole, tmp_path):
  """One process may find files of the other in a folder that was just empty."""
  processes = [
    forked.command("tests.data.sets", tmp_path, index, 2) for index in range(2)
  ]
  for process in processes:
    assert process.end() == 0, process.err
  assert contents(tmp_path) == contents(whole)


def test_shard_locked_by_another_process_is_refused(tmp_path):
  def encode(images):
    with pytest.raises(SettingError, match="another process writes latents-0"):
      sets.write(tmp_path)
    return sets.encode_fn(images)

  sets.write(tmp_path, encode=encode)
  assert latents.verify(tmp_path) == sets.NUM_IMAGES


@pytest.mark.parametrize("harm", ["remove", "cut"])
def test_only_the_lost_shard_of_a_finished_set_is_encoded_again(whole, tmp_path, harm):
  sets.write(tmp_path)
  path = tmp_path / latents.shard_name(1, sets.NUM_SHARDS)
  if harm == "remove":
    path.unlink()
  else:
    path.write_bytes(path.read_bytes()[:-100])
  calls = []
  sets.write(tmp_path, encode=counting(calls))
  assert len(calls) == 3
  assert contents(tmp_path) == contents(whole)


def test_set_without_a_readable_image_is_refused(tmp_path):
  source = sets.Images(range(sets.NUM_IMAGES), max_unreadable=sets.NUM_IMAGES)
  with pytest.raises(SettingError, match=r"^--output = .*none of the images"):
    sets.write(tmp_path, source=source)
  assert not (tmp_path / latents.CARD).exists()


@pytest.mark.parametrize("name", [latents.CARD, BEGUN])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_card_is_refused(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(SettingError, match=rf"^--output = .*: {name} "):
    sets.write(tmp_path)


def test_nonfinite_latents_are_refused(tmp_path):
  def encode(images):
    return np.full((len(images), 2, 2, *sets.LATENT_SHAPE), np.inf, np.float16)

  with pytest.raises(SettingError, match=r"^--dtype = 'float16': the latents of class"):
    sets.write(tmp_path / "set", encode=encode)
  assert not (tmp_path / "set").exists()  # another dtype can be tried


def test_device_error_is_not_reported_as_a_disk_error(tmp_path):
  def encode(images):
    raise jax.errors.JaxRuntimeError("INTERNAL: no")

  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    sets.write(tmp_path, encode=encode)


def write_to_a_full_disk(folder):
  """Prints the error. A file size limit, set after one shard, simulates a full disk."""
  calls = []

  def encode(images):
    calls.append(1)
    if len(calls) > 3:
      resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return sets.encode_fn(images)

  try:
    sets.write(folder, encode=encode)
  except SettingError as error:
    print(error)


def test_full_disk_is_reported_and_finished_shards_are_kept(whole, tmp_path):
  process = forked.Forked(write_to_a_full_disk, tmp_path)
  process.end()
  assert "latents-00001-of-00003.array_record cannot be written" in process.out
  first = latents.shard_name(0, sets.NUM_SHARDS)
  assert (tmp_path / first).read_bytes() == (whole / first).read_bytes()
  sets.write(tmp_path)
  assert contents(tmp_path) == contents(whole)


# Unreadable images and errors.


def test_unreadable_images_are_skipped_and_listed_on_the_card(tmp_path):
  sets.write(tmp_path, sets.Images(unreadable=(0, 9, 10, 11)))
  card = latents.read_card(tmp_path)
  left_out = [name for shard in card["shards"] for name in shard["left_out"]]
  assert left_out == [f"class/{i}.png" for i in (0, 9, 10, 11)]
  source = latents.LatentSource(tmp_path, 4, 3, 0)
  assert len(source) == card["images"] == 20
  labels = [int(source[i]["label"]) for i in range(20)]
  kept = [i for i in range(24) if i not in (0, 9, 10, 11)]
  assert labels == [i % sets.NUM_CLASSES for i in kept]
  np.testing.assert_array_equal(source[0]["views"], sets.views(1))


def test_shard_of_only_unreadable_images_is_empty(tmp_path):
  sets.write(tmp_path, sets.Images(unreadable=range(8)))
  assert latents.read_card(tmp_path)["shards"][0]["images"] == 0
  assert len(latents.LatentSource(tmp_path, 4, 3, 0)) == 16


def test_too_many_unreadable_images_stop_the_run(tmp_path):
  source = sets.Images(unreadable=(9, 12), max_unreadable=1)
  with pytest.raises(SettingError, match="max_unreadable = 1"):
    sets.write(tmp_path, source)
  assert (tmp_path / latents.shard_name(0, sets.NUM_SHARDS)).exists()
  assert not list(tmp_path.glob(".*"))


class OnBadDisk(sets.Images):
  """Images of which one cannot be read `failures` times, because of its disk."""

  def __init__(self, failures):
    super().__init__()
    self._failures = failures

  def load(self, index):
    if index == 12 and self._failures:
      self._failures -= 1
      raise OSError(errno.EIO, "Input/output error")
    return super().load(index)


def test_fault_of_the_disk_leaves_no_image_out(whole, tmp_path, monkeypatch):
  monkeypatch.setattr(examples, "PAUSES", (0.0, 0.0))
  with pytest.raises(DataUnavailable, match=r"class/12\.png"):
    sets.write(tmp_path, OnBadDisk(3))
  sets.write(tmp_path, OnBadDisk(2))  # resumes, and waits for the disk
  assert contents(tmp_path) == contents(whole)


def test_folder_with_other_files_is_refused(tmp_path):
  (tmp_path / "mine.txt").write_text("kept")
  with pytest.raises(SettingError, match=r"--output = .*: must be empty"):
    sets.write(tmp_path)
  assert contents(tmp_path) == {"mine.txt": b"kept"}


def test_unfinished_set_with_other_settings_is_refused(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    sets.write(tmp_path, encode=stop_after(1))
  with pytest.raises(SettingError, match="dtype = 'float16', not 'bf"):
    write_latents(
      sets.latent_set(tmp_path, dtype="bfloat16"),
      sets.Images(),
      sets.encode_fn,
      batch_size=3,
    )
