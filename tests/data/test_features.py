"""Importing latents of other encoders, and training on them."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdt_jax.atomic import write_json
from mdt_jax.data import latents
from mdt_jax.data.feature_import import import_features
from mdt_jax.data.features import Convention, FeatureSource
from mdt_jax.errors import SettingError
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.training import loop
from tests.data.folders import write_array
from tests.training.tiny import tiny_dit_config

COUNT, CHANNELS, SIDE = 12, 4, 8
LABELS = np.arange(COUNT) % 3
# Channels first, as PyTorch stores them.
FEATURES = np.random.default_rng(0).normal(size=(COUNT, CHANNELS, SIDE, SIDE))
FEATURES = FEATURES.astype(np.float32)


@pytest.fixture
def fast_dit(tmp_path):
  """The folders of fast-DiT: a file for each image, with a batch axis of 1."""
  for i in range(COUNT):
    write_array(tmp_path / f"imagenet256_features/{i}.npy", FEATURES[i : i + 1])
    write_array(tmp_path / f"imagenet256_labels/{i}.npy", LABELS[i : i + 1])
  return tmp_path / "imagenet256_features"


def read(output):
  """(means, stds of the first view, means of the mirror image, labels) by image."""
  source = latents.open_set(output)
  found = [source.read(i) for i in range(len(source))]
  views = np.stack([views for views, _, _ in found]).astype(np.float32)
  return (
    views[:, 0, 0],
    views[:, 0, 1],
    views[:, 1, 0],
    [label for _, label, _ in found],
  )


def assert_is_stored(output, features=FEATURES, labels=LABELS):
  means, stds, mirrored, held = read(output)
  order = np.argsort([str(i) for i in range(COUNT)]) if labels is None else slice(None)
  expected = np.moveaxis(features, 1, -1)[order]
  np.testing.assert_allclose(means, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(mirrored, means)
  assert (stds == 0).all()
  if labels is not None:
    assert held == labels.tolist()


def test_folders_of_fast_dit_are_imported(fast_dit, tmp_path):
  assert import_features(fast_dit, tmp_path / "set")
  means, stds, mirrored, labels = read(tmp_path / "set")
  order = sorted(range(COUNT), key=str)  # names are sorted as texts: 0, 1, 10, 11, 2
  np.testing.assert_allclose(means, np.moveaxis(FEATURES, 1, -1)[order], atol=2e-3)
  np.testing.assert_array_equal(mirrored, means)
  assert (stds == 0).all()
  assert labels == LABELS[order].tolist()
  assert latents.verify(tmp_path / "set") == COUNT


def test_files_of_batches_are_imported(tmp_path):
  for i in range(3):
    rows = slice(4 * i, 4 * i + 4)
    write_array(tmp_path / f"x/{i}.npy", FEATURES[rows])
    write_array(tmp_path / f"y/{i}.npy", LABELS[rows])
  import_features(tmp_path / "x", tmp_path / "set", labels=tmp_path / "y")
  assert_is_stored(tmp_path / "set")


def test_subfolders_are_classes(tmp_path):
  for i in range(COUNT):
    write_array(tmp_path / f"x/class {LABELS[i]}/{i:02d}.npy", FEATURES[i])
  import_features(tmp_path / "x", tmp_path / "set")
  assert latents.open_set(tmp_path / "set").class_names == [f"class {i}" for i in "012"]
  assert read(tmp_path / "set")[3] == sorted(LABELS.tolist())


def test_npz_is_imported(tmp_path):
  np.savez(tmp_path / "x.npz", arr_0=FEATURES, arr_1=LABELS)
  import_features(tmp_path / "x.npz", tmp_path / "set")
  assert_is_stored(tmp_path / "set")


def test_npy_with_labels_is_imported(tmp_path):
  write_array(tmp_path / "x.npy", FEATURES)
  write_array(tmp_path / "y.npy", LABELS)
  import_features(tmp_path / "x.npy", tmp_path / "set", labels=tmp_path / "y.npy")
  assert_is_stored(tmp_path / "set")


def test_features_without_labels_get_the_label_0(tmp_path, caplog):
  write_array(tmp_path / "x.npy", FEATURES)
  import_features(tmp_path / "x.npy", tmp_path / "set")
  assert read(tmp_path / "set")[3] == [0] * COUNT
  assert any("label 0" in line for line in caplog.messages)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_with_mirror_images_are_imported(tmp_path, dtype):
  """The files of VA-VAE and LightningDiT: several shards in a folder."""
  (tmp_path / "x").mkdir()
  for i in range(2):
    rows = slice(6 * i, 6 * i + 6)
    arrays = {
      "latents": FEATURES[rows].astype(dtype),
      "latents_flip": np.ascontiguousarray(-FEATURES[rows]).astype(dtype),
      "labels": LABELS[rows],
    }
    save_file(arrays, tmp_path / f"x/latents_rank00_shard{i:03d}.safetensors")
  import_features(tmp_path / "x", tmp_path / "set")
  means, _, mirrored, labels = read(tmp_path / "set")
  np.testing.assert_allclose(means, np.moveaxis(FEATURES, 1, -1), rtol=0.01, atol=2e-3)
  np.testing.assert_array_equal(mirrored, -means)
  assert labels == LABELS.tolist()


def test_channels_last_is_recognised_and_may_be_said(tmp_path):
  last = np.moveaxis(FEATURES, 1, -1)
  write_array(tmp_path / "x.npy", last)
  for name, layout in (("a", None), ("b", "channels_last")):
    convention = Convention(layout=layout)
    import_features(tmp_path / "x.npy", tmp_path / name, convention=convention)
    assert_is_stored(tmp_path / name, labels=np.zeros(COUNT, int))


def test_shape_that_fits_both_layouts_needs_the_layout(tmp_path):
  write_array(tmp_path / "x.npy", np.zeros((3, 8, 8, 8), np.float32))
  with pytest.raises(SettingError, match=r"^layout = None: .*channels_first"):
    import_features(tmp_path / "x.npy", tmp_path / "set")
  convention = Convention(layout="channels_first")
  assert import_features(tmp_path / "x.npy", tmp_path / "set", convention=convention)


@pytest.mark.parametrize("kind", ["mean_std", "mean_logvar"])
def test_moments_are_imported(tmp_path, kind):
  std = np.exp(FEATURES / 2)
  second = std if kind == "mean_std" else FEATURES
  write_array(tmp_path / "x.npy", np.concatenate([FEATURES, second], axis=1))
  convention = Convention("channels_first", kind, 0.5, 1.0, scaled=False)
  import_features(tmp_path / "x.npy", tmp_path / "set", convention=convention)
  means, stds, _, _ = read(tmp_path / "set")
  expected = np.moveaxis((FEATURES - 1) * 0.5, 1, -1)
  np.testing.assert_allclose(means, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(stds, np.moveaxis(std * 0.5, 1, -1), rtol=1e-3)


def test_card_holds_the_scale(tmp_path):
  write_array(tmp_path / "x.npy", FEATURES)
  convention = Convention(scaling_factor=0.18215)
  import_features(tmp_path / "x.npy", tmp_path / "set", convention=convention)
  card = latents.read_card(tmp_path / "set")
  assert (card["scaling_factor"], card["shift_factor"]) == (0.18215, 0)
  assert_is_stored(tmp_path / "set", labels=np.zeros(COUNT, int))  # scaled already


def test_standardized_channels_have_mean_0_and_std_1(tmp_path):
  features = FEATURES * np.array([1, 10, 100, 0.1])[:, None, None] + 5
  write_array(tmp_path / "x.npy", features.astype(np.float32))
  import_features(tmp_path / "x.npy", tmp_path / "set", standardize=True)
  means = read(tmp_path / "set")[0]
  np.testing.assert_allclose(means.mean(axis=(0, 1, 2)), 0, atol=1e-3)
  np.testing.assert_allclose(means.std(axis=(0, 1, 2)), 1, atol=1e-3)
  card = latents.read_card(tmp_path / "set")
  expected = features.std(axis=(0, 2, 3))
  np.testing.assert_allclose(card["latents_std"], expected, rtol=1e-4)
  np.testing.assert_allclose(card["latents_mean"], features.mean((0, 2, 3)), rtol=1e-4)


def test_unreadable_features_do_not_count_when_channels_are_standardized(
  fast_dit, tmp_path
):
  (fast_dit / "3.npy").write_bytes(b"")
  import_features(fast_dit, tmp_path / "set", standardize=True)
  card = latents.read_card(tmp_path / "set")
  kept = np.delete(FEATURES, 3, axis=0)
  np.testing.assert_allclose(card["latents_mean"], kept.mean((0, 2, 3)), rtol=1e-5)
  np.testing.assert_allclose(card["latents_std"], kept.std((0, 2, 3)), rtol=1e-5)


def test_statistics_are_computed_once(tmp_path, monkeypatch):
  write_array(tmp_path / "x.npy", FEATURES)
  arguments = dict(standardize=True, num_shards=3)
  stop = dict(process_index=1, process_count=2)
  assert not import_features(tmp_path / "x.npy", tmp_path / "set", **arguments, **stop)
  import_features(tmp_path / "x.npy", tmp_path / "whole", **arguments)

  def fail(*_):
    raise AssertionError("reads all features again")

  monkeypatch.setattr(FeatureSource, "readable", fail)
  for _ in range(2):  # resumes, then finds the set finished
    assert import_features(tmp_path / "x.npy", tmp_path / "set", **arguments)
  for path in (tmp_path / "whole").iterdir():
    assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("first", [True, False])
def test_set_is_standardized_as_a_whole_or_not_at_all(tmp_path, first):
  write_array(tmp_path / "x.npy", FEATURES)
  import_features(tmp_path / "x.npy", tmp_path / "set", standardize=first)
  with pytest.raises(SettingError, match=r"^output = .*latents_mean"):
    import_features(tmp_path / "x.npy", tmp_path / "set", standardize=not first)


@pytest.mark.parametrize("std", [None, [1.0], ["1"] * 4, [0.0] * 4, [1e400] * 4, 10**9])
def test_damaged_statistics_of_a_begun_set_are_refused(tmp_path, std):
  write_array(tmp_path / "x.npy", FEATURES)
  begun = {"latents_mean": [0.0] * 4, "latents_std": std}
  write_json(tmp_path / "set/begun.json", begun)
  with pytest.raises(SettingError, match=r"^output = .*latents_std"):
    import_features(tmp_path / "x.npy", tmp_path / "set", standardize=True)


def test_unusual_scale_is_logged(tmp_path, caplog):
  write_array(tmp_path / "x.npy", 6 * FEATURES)
  import_features(tmp_path / "x.npy", tmp_path / "set")
  assert any("--standardize" in line for line in caplog.messages)


def test_same_call_resumes_and_other_settings_are_refused(tmp_path):
  write_array(tmp_path / "x.npy", FEATURES)
  import_features(tmp_path / "x.npy", tmp_path / "set", num_shards=3)
  shard = tmp_path / "set/latents-00001-of-00003.array_record"
  before = shard.read_bytes()
  shard.unlink()
  assert import_features(tmp_path / "x.npy", tmp_path / "set", num_shards=3)
  assert len(shard.read_bytes()) == len(before)
  with pytest.raises(SettingError, match=r"^output = .*scaled = True, not False"):
    import_features(
      tmp_path / "x.npy",
      tmp_path / "set",
      num_shards=3,
      convention=Convention(scaled=False),
    )


def test_processes_write_one_set_together(tmp_path):
  np.savez(tmp_path / "x.npz", latents=FEATURES, labels=LABELS)

  def run(output, **process):
    return import_features(
      tmp_path / "x.npz", tmp_path / output, num_shards=3, **process
    )

  assert not run("set", process_index=1, process_count=2)
  assert run("set", process_index=0, process_count=2)
  assert run("alone")
  for path in (tmp_path / "alone").iterdir():
    assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()


def test_processes_of_jax_write_one_set_together(tmp_path, monkeypatch):
  write_array(tmp_path / "x.npy", FEATURES)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert not import_features(tmp_path / "x.npy", tmp_path / "set", num_shards=3)
  written = [path.name for path in (tmp_path / "set").glob("*.array_record")]
  assert written == ["latents-00001-of-00003.array_record"]


@pytest.mark.parametrize(
  ("index", "count", "argument"),
  [
    (1, None, "process_count"),
    (None, 2, "process_index"),
    (-1, 2, "process_index"),
    (2, 2, "process_index"),
    (0, 0, "process_count"),
    (0, 10**9, "process_count"),
  ],
)
def test_impossible_process_is_refused(tmp_path, index, count, argument):
  write_array(tmp_path / "x.npy", FEATURES)
  with pytest.raises(SettingError) as caught:
    import_features(
      tmp_path / "x.npy", tmp_path / "set", process_index=index, process_count=count
    )
  assert caught.value.setting == argument
  assert not (tmp_path / "set").exists()


def test_unreadable_feature_is_left_out(fast_dit, tmp_path):
  write_array(fast_dit / "3.npy", np.full((1, CHANNELS, SIDE, SIDE), np.nan))
  (fast_dit / "4.npy").write_bytes(b"")
  import_features(fast_dit, tmp_path / "set", max_unreadable=2)
  card = json.loads((tmp_path / "set/card.json").read_text())
  assert card["shards"][0]["left_out"] == ["3.npy", "4.npy"]
  with pytest.raises(SettingError, match=r"^max_unreadable = 1: "):
    import_features(fast_dit, tmp_path / "other", max_unreadable=1)


def test_feature_of_another_shape_is_left_out(tmp_path, warnings):
  """Its numbers are as many, but in another order."""
  for i in range(4):
    write_array(tmp_path / f"x/{i}.npy", FEATURES[i])
  write_array(tmp_path / "x/4.npy", FEATURES[4:5])  # a batch axis of 1 is accepted
  write_array(tmp_path / "x/2.npy", np.moveaxis(FEATURES[2], 0, -1))
  write_array(tmp_path / "x/3.npy", FEATURES[3].ravel())
  import_features(tmp_path / "x", tmp_path / "set")
  card = json.loads((tmp_path / "set/card.json").read_text())
  assert card["shards"][0]["left_out"] == ["2.npy", "3.npy"]
  (line,) = [text for text in warnings if "2.npy" in text]
  assert str((SIDE, SIDE, CHANNELS)) in line and str((CHANNELS, SIDE, SIDE)) in line


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_features_that_are_not_square_need_only_their_layout(tmp_path, layout):
  wide = FEATURES[:, :, :6]  # 6 x 8
  stored = wide if layout == "channels_first" else np.moveaxis(wide, 1, -1)
  np.save(tmp_path / "x.npy", stored)
  np.save(tmp_path / "y.npy", LABELS)
  import_features(
    tmp_path / "x.npy",
    tmp_path / "set",
    labels=tmp_path / "y.npy",
    convention=Convention(layout=layout),
  )
  card = json.loads((tmp_path / "set/card.json").read_text())
  assert card["latent_shape"] == [6, SIDE, CHANNELS]
  assert_is_stored(tmp_path / "set", wide)


@pytest.mark.parametrize("suffix", ["npy", "npz", "folder"])
def test_bfloat16_is_imported_as_ml_dtypes_saves_it(tmp_path, suffix):
  features = FEATURES.astype(ml_dtypes.bfloat16)
  np.save(tmp_path / "labels.npy", LABELS)
  path, labels = tmp_path / f"x.{suffix}", tmp_path / "labels.npy"
  match suffix:
    case "npy":
      np.save(path, features)
    case "npz":
      np.savez(path, latents=features)
    case "folder":
      write_array(path / "0.npy", features)
      write_array(tmp_path / "y/0.npy", LABELS)
      labels = tmp_path / "y"
  import_features(path, tmp_path / "set", labels=labels)
  assert_is_stored(tmp_path / "set", features.astype(np.float32))


@pytest.mark.parametrize("shape", [(), (0, CHANNELS, SIDE, SIDE)])
@pytest.mark.parametrize("is_folder", [False, True])
def test_array_without_features_is_refused(tmp_path, shape, is_folder):
  path = tmp_path / "x_features" / "0.npy" if is_folder else tmp_path / "x.npy"
  write_array(path, np.zeros(shape, np.float32))
  write_array(tmp_path / "x_labels" / "0.npy", np.zeros(shape[:1], np.int64))
  with pytest.raises(SettingError, match=r"^features = ") as caught:
    import_features(path.parent if is_folder else path, tmp_path / "set")
  assert len(str(caught.value).splitlines()) == 1


def save(array):
  return lambda folder: write_array(folder / "x.npy", array)


BAD = {
  "integers": (save(np.zeros((2, 4, 8, 8), np.int32)), {}, "none of"),
  "not square": (save(np.zeros((2, 4, 8, 6), np.float32)), {}, "layout"),
  "three axes": (save(np.zeros((4, 8, 8), np.float32)), {}, "features = .*shape"),
  "empty": (save(np.zeros((0, 4, 8, 8), np.float32)), {}, "features = .*at least one"),
  "odd moments": (
    save(np.zeros((2, 5, 8, 8), np.float32)),
    {"convention": Convention(kind="mean_std")},
    "features = .*5 channels",
  ),
  "kind": (save(FEATURES), {"convention": Convention(kind="x")}, "kind = 'x'"),
  "scale": (
    save(FEATURES),
    {"convention": Convention(scaling_factor=float("nan"))},
    "scaling_factor = nan",
  ),
  "labels": (save(FEATURES), {"labels": "no.npy"}, "labels = 'no.npy'"),
  "missing": (lambda folder: None, {}, "features = .*does not exist"),
  "standardize": (
    save(FEATURES),
    {"convention": Convention(scaling_factor=2.0), "standardize": True},
    "standardize = True",
  ),
  "constant": (
    save(np.ones((2, 4, 8, 8), np.float32)),
    {"standardize": True},
    "standardize = True: channel 0 is constant",
  ),
  "text": (lambda folder: (folder / "x.npy").write_text("x"), {}, "features = "),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_features_are_refused_in_one_line(tmp_path, case):
  make, arguments, message = BAD[case]
  make(tmp_path)
  with pytest.raises(SettingError, match=message) as caught:
    import_features(tmp_path / "x.npy", tmp_path / "set", **arguments)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
  "labels", [np.arange(COUNT - 1), np.zeros(COUNT), np.full(COUNT, -1), [2**40] * COUNT]
)
def test_unusable_labels_are_refused(tmp_path, labels):
  np.savez(tmp_path / "x.npz", latents=FEATURES, labels=labels)
  with pytest.raises(SettingError, match=r"^labels = "):
    import_features(tmp_path / "x.npz", tmp_path / "set")


def test_run_on_16_channels_trains_and_samples_latents(tmp_path):
  features = np.random.default_rng(1).normal(size=(COUNT, 16, SIDE, SIDE))
  np.savez(tmp_path / "x.npz", latents=features.astype(np.float32), labels=LABELS)
  import_features(tmp_path / "x.npz", tmp_path / "set")
  config = tiny_dit_config(
    num_steps=2,
    sample_every=2,
    **{
      "data.source": "latents",
      "data.path": str(tmp_path / "set"),
      "model.in_channels": 16,
      "model.num_classes": 3,
    },
  )
  loop.train(config, tmp_path / "run")
  assert (tmp_path / "run/samples/step_0000002.png").exists()
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  file = pipeline.write(tmp_path / "out", [0, 1], num_steps=2, progress=False)
  assert file.name == "latents.npz"
  assert np.load(file)["arr_0"].shape == (2, SIDE, SIDE, 16)
