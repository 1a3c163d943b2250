"""LatentSource: records, cards, verification, batches, errors."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

from mdt_jax.data import latent_card, latents, loader
from mdt_jax.errors import SettingError
from tests.data import sets

CHANNELS = sets.LATENT_SHAPE[-1]
BLOCK = 2**16  # Bytes in a block of an ArrayRecord file.


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  return sets.write(tmp_path_factory.mktemp("set"))


@pytest.fixture
def folder(original, tmp_path):
  """A copy of the set that a test may damage."""
  return shutil.copytree(original, tmp_path / "set")


def open_set(folder, max_unreadable=10):
  return latents.LatentSource(folder, 4, CHANNELS, max_unreadable)


@pytest.mark.parametrize("dtype", latent_card.DTYPES)
def test_record_round_trip_is_exact(dtype):
  layout = latents.Layout((3, 3, 2), dtype)
  views = np.random.default_rng(0).standard_normal(layout.shape)
  views = views.astype(latent_card.DTYPES[dtype])
  found, label, name = layout.unpack(layout.pack(views, 70_000, "ä/1.png"))
  assert (found.tobytes(), label, name) == (views.tobytes(), 70_000, "ä/1.png")
  assert found.dtype == latent_card.DTYPES[dtype]


def test_truncated_record_raises_value_error():
  layout = latents.Layout((3, 3, 2), "float16")
  record = layout.pack(np.zeros(layout.shape, np.float16), 1, "")
  with pytest.raises(ValueError, match=r"147 bytes.* 148"):
    layout.unpack(record[:-1])


def test_source_returns_the_encoded_examples(original):
  source = open_set(original)
  assert len(source) == sets.NUM_IMAGES
  assert source.num_classes == sets.NUM_CLASSES
  for index in (0, 7, sets.NUM_IMAGES - 1):
    example = source[index]
    np.testing.assert_array_equal(example["views"], sets.views(index))
    assert example["label"] == index % sets.NUM_CLASSES


@pytest.mark.parametrize(
  ("size", "channels"), [(8, CHANNELS), (4, CHANNELS + 1), ((4, 8), CHANNELS)]
)
def test_latents_that_do_not_fit_the_model_are_refused(original, size, channels):
  with pytest.raises(SettingError, match=r"\(4, 4, 3\)"):
    latents.LatentSource(original, size, channels, 0)


def test_error_names_a_missing_shard(folder):
  (folder / latents.shard_name(1, sets.NUM_SHARDS)).unlink()
  with pytest.raises(SettingError, match=r"latents-00001-of-00003.* is missing"):
    open_set(folder)


def test_error_names_a_truncated_shard(folder):
  path = folder / latents.shard_name(2, sets.NUM_SHARDS)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(SettingError, match=r"latents-00002-of-00003\S+ .* bytes"):
    open_set(folder)


def test_card_with_wrong_image_count_is_refused(folder):
  card = latents.read_card(folder)
  card["shards"][0]["images"] += 1
  (folder / latents.CARD).write_text(json.dumps(card))
  with pytest.raises(SettingError, match=r"latents-00000\S+ .* 9 records.* 8$"):
    open_set(folder)


@pytest.mark.parametrize("label", ["x", "-1", "5", "9" * 20, "9" * 5_000])
def test_card_with_a_label_of_no_class_is_refused(folder, label):
  card = latents.read_card(folder)
  card["shards"][1]["labels"] = {label: 8}
  (folder / latents.CARD).write_text(json.dumps(card))
  with pytest.raises(SettingError, match=r"shard 1 of card\.json must have labels"):
    open_set(folder)


@pytest.mark.parametrize(
  ("text", "message"),
  [(None, "holds no card.json"), ("{", "cannot be read"), ("{}", "format 'mdt_jax")],
)
def test_folder_without_a_valid_card_is_refused(folder, text, message):
  (folder / latents.CARD).unlink()
  if text is not None:
    (folder / latents.CARD).write_text(text)
  with pytest.raises(SettingError, match=rf"^config.data.path = .*{message}"):
    open_set(folder)


def damage(folder, shard=1):
  """Inverts one byte of a record in the middle of a shard."""
  path = folder / latents.shard_name(shard, sets.NUM_SHARDS)
  data = bytearray(path.read_bytes())
  start = data.find(sets.views(10).tobytes())
  data[start + 5] ^= 255
  path.write_bytes(data)


def test_damaged_record_is_skipped_and_logged(folder, warnings):
  damage(folder)
  source = open_set(folder)
  np.testing.assert_array_equal(source[10]["views"], sets.views(11))
  (line,) = warnings
  assert "record 2 of" in line and "latents-00001-of-00003" in line


def test_more_than_max_unreadable_damaged_records_are_refused(folder):
  damage(folder)
  with pytest.raises(SettingError, match=r"^config.data.max_unreadable = 0: 1 files"):
    open_set(folder, max_unreadable=0)[10]


def test_error_names_a_shard_with_a_damaged_index(folder):
  path = folder / latents.shard_name(1, sets.NUM_SHARDS)
  data = bytearray(path.read_bytes())
  data[-BLOCK + 70] ^= 1  # The last block starts with the position of the index.
  path.write_bytes(data)
  with pytest.raises(SettingError, match=r"latents-00001-of-00003\S+ is damaged"):
    open_set(folder)


# Verification.


def records_of(folder):
  source = open_set(folder, max_unreadable=0)
  return [source.read(index) for index in range(len(source))]


def assert_same_records(found, expected):
  for (a, *rest), (b, *expected_rest) in zip(found, expected, strict=True):
    assert a.tobytes() == b.tobytes()
    assert rest == expected_rest


def test_verify_finds_a_damaged_record(folder):
  assert latents.verify(folder) == sets.NUM_IMAGES
  damage(folder)
  with pytest.raises(
    SettingError, match=r"^config.data.path = .*record 2 of latents-00001\S+ is damaged"
  ):
    latents.verify(folder)


def test_verify_finds_every_bit_flip_that_changes_a_record(folder):
  """ArrayRecord hashes the whole shard, except for its padding and its signature."""
  path = folder / latents.shard_name(1, sets.NUM_SHARDS)
  data = path.read_bytes()
  expected = records_of(folder)
  used = np.flatnonzero(np.frombuffer(data, np.uint8))
  found = 0
  for place in [*used[::17], *range(BLOCK - 16, BLOCK + 140)]:
    flipped = bytearray(data)
    flipped[place] ^= 1 << (place % 8)
    path.write_bytes(flipped)
    try:
      latents.verify(folder)
    except SettingError:
      found += 1
    else:
      assert_same_records(records_of(folder), expected)
  assert found > 0.9 * len(used[::17])


def test_verify_finds_a_shard_that_copies_another_shard(folder):
  paths = [folder / latents.shard_name(i, sets.NUM_SHARDS) for i in range(2)]
  paths[1].write_bytes(paths[0].read_bytes())
  with pytest.raises(SettingError, match=r"latents-00001.* same image as latents-0"):
    latents.verify(folder)


@pytest.mark.parametrize(
  ("label", "value", "message"),
  [(99, 1, r"label 99 .*5\)"), (0, np.inf, "moments are not finite")],
)
def test_verify_finds_invalid_labels_and_nonfinite_moments(
  folder, monkeypatch, label, value, message
):
  def unpack(layout, record):
    return np.full(layout.shape, value, np.float16), label, "name"

  monkeypatch.setattr(latents.Layout, "unpack", unpack)
  with pytest.raises(SettingError, match=rf"record 0 of latents-00000.*{message}"):
    latents.verify(folder)


def test_channel_statistics_match_those_of_sampled_latents(original):
  found = latents.channel_statistics(
    example["views"] for example in open_set(original).readable()
  )
  rng = np.random.default_rng(0)
  views = np.stack([sets.views(i) for i in range(sets.NUM_IMAGES)]).astype(np.float64)
  mean, std = views[:, :, 0], views[:, :, 1]
  draws = mean + std * rng.standard_normal((200, *mean.shape))
  np.testing.assert_allclose(found.mean, draws.mean((0, 1, 2, 3, 4)), atol=0.01)
  np.testing.assert_allclose(found.std, draws.std((0, 1, 2, 3, 4)), rtol=0.01)


# Batches.


def take(folder, count, **settings):
  settings = {"num_threads": 2, "prefetch": 2, **settings}
  batches = loader.create_loader(
    open_set(folder), seed=3, batch_size=8, flip=True, **settings
  )
  return list(itertools.islice(batches, count))


def assert_same(found, expected):
  for a, b in zip(found, expected, strict=True):
    assert a["label"].tobytes() == b["label"].tobytes()
    assert a["moments"].tobytes() == b["moments"].tobytes()


def test_batch_holds_moments_in_the_stored_dtype(original):
  (batch,) = take(original, 1)
  found = {name: (array.shape, array.dtype) for name, array in batch.items()}
  assert found == {
    "moments": ((8, 2, *sets.LATENT_SHAPE), np.float16),
    "label": ((8,), np.int32),
  }


@pytest.fixture(scope="module")
def batches(original):
  """200 batches, read by one process without workers."""
  return take(original, 200)


def test_200_batches_do_not_depend_on_the_number_of_processes(original, batches):
  parts = [take(original, 200, rows=rows) for rows in np.split(np.arange(8), 4)]
  joined = [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_same(joined, batches)


def test_200_batches_do_not_depend_on_the_number_of_workers(original, batches):
  assert_same(take(original, 200, num_workers=3), batches)


def test_start_step_with_workers_continues_the_same_batches(original):
  whole = take(original, 8)
  assert_same(take(original, 3, start_step=5, num_workers=2), whole[5:])
