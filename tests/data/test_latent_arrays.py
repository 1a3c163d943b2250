"""Latent sets with arrays and captions: round trip, resumption, cards, damage."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle

import numpy as np
import pytest

from mdt_jax.data import latents, loader
from mdt_jax.data.conditions import with_condition
from mdt_jax.data.latent_cache import copy_set
from mdt_jax.data.latent_records import ArrayField, Layout
from mdt_jax.errors import SettingError
from mdt_jax.models import LabelCondition, VectorCondition
from tests.data import array_sets, sets

# Hash of card and records that the version before arrays wrote.
WITHOUT_ARRAYS = "aff21a12ea08f684df85b6971bcf593708734bb94ce4f99270e9baeca6617503"


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  files = array_sets.write_files(folder)
  return array_sets.open_arrays(files, folder / "captions.json")


@pytest.fixture(scope="module")
def whole(arrays, tmp_path_factory):
  return array_sets.write(tmp_path_factory.mktemp("whole"), arrays)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def open_set(folder):
  return latents.LatentSource(folder, 4, 3, 0)


def test_set_without_arrays_equals_that_of_the_version_before(tmp_path):
  source = open_set(sets.write(tmp_path))
  card = json.loads((tmp_path / latents.CARD).read_text())
  for shard in card["shards"]:
    del shard["bytes"]  # depends on the version of ArrayRecord
  digest = hashlib.sha256(json.dumps(card).encode())
  for index in range(len(source)):
    digest.update(source.record(index))
  assert digest.hexdigest() == WITHOUT_ARRAYS


def test_set_without_arrays_has_no_arrays(tmp_path):
  source = open_set(sets.write(tmp_path))
  assert source.array_names == () and not source.has_captions
  assert source[1].keys() == {"views", "label"}
  assert source.caption(1) is None


def test_source_returns_the_written_arrays_and_captions(whole):
  source = open_set(whole)
  assert source.array_names == ("clip", "t5_mask")
  for index in range(sets.NUM_IMAGES):
    example = source[index]
    for name, expected in (
      ("views", sets.views(index)),
      ("clip", array_sets.vector(index)),
      ("t5_mask", array_sets.mask(index)),
    ):
      np.testing.assert_array_equal(example[name], expected)
      assert example[name].dtype == expected.dtype
    assert source.caption(index) == array_sets.caption(index)
    assert example["caption"] == (array_sets.caption(index) or "")
    assert source.read(index)[1:] == (index % 5, array_sets.NAMES[index])


def test_card_describes_the_arrays(whole):
  card = json.loads((whole / latents.CARD).read_text())
  assert card["format"] == "mdt_jax latents 2"
  clip = card["arrays"]["clip"]
  assert (clip["shape"], clip["dtype"]) == ([5], "float16")
  assert card["captions"].endswith("captions.json")


def test_every_record_is_verified(whole):
  assert latents.verify(whole) == sets.NUM_IMAGES


def test_set_of_captions_alone_needs_no_arrays(tmp_path):
  array_sets.write_files(tmp_path)
  arrays = array_sets.open_arrays({}, tmp_path / "captions.json")
  source = open_set(array_sets.write(tmp_path / "set", arrays))
  assert (source.array_names, source.caption(1)) == ((), "image 1: ä")
  # No device holds a text.
  given = with_condition(source, LabelCondition(sets.NUM_CLASSES, 0.1))
  assert given[1].keys() == {"views", "label", "caption"}


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float16", "float32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_record_round_trip_is_exact(dtype, shape):
  layout = Layout((2, 2, 1), "float16", (ArrayField("a", shape, dtype),), True)
  array = (np.random.default_rng(0).standard_normal(shape) * 9).astype(dtype)
  record = layout.pack(np.ones(layout.shape, np.float16), 7, "ä.png", [array], "text")
  found = layout.unpack_arrays(record)["a"]
  np.testing.assert_array_equal(found, array)
  assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
  assert layout.unpack(record)[1:] == (7, "ä.png")
  assert layout.unpack_caption(record) == "text"


@pytest.mark.parametrize("cut", [1, 4, 5, 9])
def test_truncated_caption_raises_value_error(cut):
  layout = Layout((1, 1, 1), "float16", (), True)
  record = layout.pack(np.ones(layout.shape, np.float16), 0, "", (), "text")
  with pytest.raises(ValueError, match="must have at least"):
    layout.unpack(record[:-cut])


# Writing.


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_the_shards(whole, arrays, tmp_path, process_count):
  for index in range(process_count):
    settings = dict(process_index=index, process_count=process_count)
    array_sets.write(tmp_path, arrays, **settings)
  assert contents(tmp_path) == contents(whole)


def test_stopped_run_resumes(whole, arrays, tmp_path):
  calls, is_stopped = [], True

  def encode(images):
    calls.append(1)
    if len(calls) == 5 and is_stopped:  # a shard takes three batches
      raise KeyboardInterrupt
    return sets.encode_fn(images)

  with pytest.raises(KeyboardInterrupt):
    array_sets.write(tmp_path, arrays, encode=encode)
  assert not (tmp_path / latents.CARD).exists()
  calls.clear()
  is_stopped = False
  array_sets.write(
    tmp_path, arrays, encode=lambda x: calls.append(1) or sets.encode_fn(x)
  )
  assert len(calls) == 6
  assert contents(tmp_path) == contents(whole)


def test_bucket_and_its_copy_equal_a_folder(whole, arrays, bucket, tmp_path):
  array_sets.write(bucket, arrays)
  found = latents.open_set(bucket)[3]
  copied = latents.open_set(copy_set(bucket, tmp_path))[3]
  for name, expected in latents.open_set(whole)[3].items():
    np.testing.assert_array_equal(found[name], expected)
    np.testing.assert_array_equal(copied[name], expected)


@pytest.mark.parametrize("is_first", [True, False])
def test_folder_of_a_set_with_other_arrays_is_refused(
  whole, arrays, tmp_path, is_first
):
  if is_first:
    sets.write(tmp_path)
    with pytest.raises(SettingError, match=r"--output = .* with arrays = None, not"):
      array_sets.write(tmp_path, arrays)
  else:
    with pytest.raises(SettingError, match=r"--output = .* with arrays = .*, not None"):
      sets.write(whole)


# Reading.


def test_network_reads_its_arrays_alone(whole):
  given = with_condition(open_set(whole), VectorCondition("clip", 5, 0.1))
  example = given[3]
  assert example.keys() == {"views", "label", "clip", "caption"}
  np.testing.assert_array_equal(example["clip"], array_sets.vector(3))
  assert example["clip"].dtype == np.float32
  assert given.caption(3) == "image 3: ä"


class OwnCondition(LabelCondition):
  """A condition that names no arrays and is no label."""

  label = None


def test_own_condition_that_names_no_arrays_gets_all_of_them(whole):
  given = with_condition(open_set(whole), OwnCondition(sets.NUM_CLASSES, 0.1))
  assert given[3].keys() == {"views", "label", "clip", "t5_mask", "caption"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mirrored_views_keep_the_arrays_of_the_image(whole, num_workers):
  given = with_condition(open_set(whole), VectorCondition("clip", 5, 0.1))
  options = dict(seed=3, batch_size=8, flip=True, num_workers=num_workers)
  index_of = {array_sets.vector(i).tobytes(): i for i in range(sets.NUM_IMAGES)}
  seen = set()
  for batch in itertools.islice(loader.create_loader(given, **options), 6):
    for clip, moments in zip(batch["clip"], batch["moments"], strict=True):
      views = sets.views(index_of[clip.astype(np.float16).tobytes()])
      (view,) = [i for i in range(2) if np.array_equal(views[i], moments)]
      seen.add(view)
  assert seen == {0, 1}


def test_batch_holds_no_texts(whole):
  batch = next(loader.create_loader(open_set(whole), seed=0, batch_size=4, flip=True))
  assert batch.keys() == {"moments", "label", "clip", "t5_mask"}


def test_pickled_source_reads_the_arrays(whole):
  source = pickle.loads(pickle.dumps(open_set(whole)))
  np.testing.assert_array_equal(source[2]["clip"], array_sets.vector(2))


def test_verify_finds_an_array_that_is_not_finite(whole, monkeypatch):
  monkeypatch.setattr(Layout, "unpack_arrays", lambda *_: {"clip": np.array([np.nan])})
  with pytest.raises(
    SettingError, match=r"record 0 of latents-00000.* clip is not fin"
  ):
    latents.verify(whole)


def test_verify_finds_a_caption_that_is_not_utf8(whole, monkeypatch):
  record = latents.open_set(whole).record(1)
  harmed = record.replace("ä".encode(), b"\xff\xff")
  assert harmed != record
  monkeypatch.setattr(latents.LatentSource, "record", lambda *_: harmed)
  with pytest.raises(SettingError, match=r"record 0 of latents-00000.*\('utf-8' codec"):
    latents.verify(whole)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "mdt_jax latents 1"}, "arrays and captions need the format"),
    ({"format": "mdt_jax latents 3"}, "must have the format"),
    ({"arrays": []}, "must hold arrays, a dict"),
    ({"arrays": {"label": {"shape": [1], "dtype": "bool"}}}, "the name 'label'"),
    ({"arrays": {"clip": None}}, "must hold shape"),
    ({"arrays": {"clip": {"shape": [-5], "dtype": "float16"}}}, r"holds \[-5\]"),
    ({"arrays": {"clip": {"shape": [2**40], "dtype": "float16"}}}, "must hold shape"),
    ({"arrays": {"clip": {"shape": [5], "dtype": "object"}}}, "'object'"),
    ({"arrays": {"clip": {"shape": [5], "dtype": ["bool"]}}}, "must hold shape"),
  ],
)
def test_card_with_wrong_arrays_is_refused(whole, tmp_path, change, message):
  card = json.loads((whole / latents.CARD).read_text())
  (tmp_path / latents.CARD).write_text(json.dumps({**card, **change}))
  with pytest.raises(SettingError, match=rf"^config.data.path = .*{message}"):
    latents.read_card(tmp_path)


def test_card_with_longer_arrays_is_found_in_the_records(whole, tmp_path):
  for name, data in contents(whole).items():
    (tmp_path / name).write_bytes(data)
  card = json.loads((whole / latents.CARD).read_text())
  card["arrays"]["clip"]["shape"] = [500]
  (tmp_path / latents.CARD).write_text(json.dumps(card))
  with pytest.raises(SettingError, match=r"record 0 of latents-0.* bytes, must have"):
    latents.verify(tmp_path)
