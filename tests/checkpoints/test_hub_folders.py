"""Pipelines from the hub and from folders of its files draw the run's images."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
from etils import epath

from mdt_jax import Pipeline, SettingError
from mdt_jax.checkpoints.hub_uploads import push_to_hub, to_hub_folder
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.checkpoints.weights import open_weights
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.experiment import Experiment
from mdt_jax.pretrained.tensors import flatten, read_tensors, write_tensors
from mdt_jax.setting_groups import InitSettings
from mdt_jax.settings import Settings
from tests import reference
from tests.cli import commands
from tests.pretrained.diffusers_reference import to_diffusers
from tests.pretrained.hub_cache import HubCache
from tests.training.tiny import tiny_config

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub of the test extra")

LABELS = DataLabels(np.arange(10), [f"digit {i}" for i in range(10)])
# Settings that weights under the released names do not show.
SETTINGS = {
  "ema_decays": (0.9, 0.99),
  "sampling.ema_decay": 0.9,
  "sampling.method": "ddim",
  "sampling.cfg_interval": (0.1, 0.9),
  "diffusion.schedule": "cosine",
  "diffusion.prediction": "v",
  "diffusion.num_timesteps": 500,
}


def save_run(workdir, **settings):
  """Saves random parameters as the checkpoint of a run of digits at step 7."""
  settings = Settings.from_config(tiny_config(**settings))
  params = reference.random_params(Experiment(settings).model)
  save_model(workdir, settings, params, step=7)
  LABELS.write(workdir)
  return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp("run"), **SETTINGS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  cache = HubCache(tmp_path / "hub")
  cache.use(monkeypatch)
  return cache


def assert_same(pipeline, expected):
  """Checks settings, labels and step, and that images have the same bits."""
  assert pipeline.experiment.settings == expected.experiment.settings
  assert pipeline.step == expected.step
  assert pipeline.model == expected.model
  assert pipeline.draws_pixels
  labels = [f"digit {i}" for i in (3, 1)]
  images = [p.draw(labels, batch_size=2) for p in (pipeline, expected)]
  assert images[0].dtype == np.uint8
  np.testing.assert_array_equal(*images)


def test_pushed_run_draws_the_images_of_the_run(run, cache):
  assert push_to_hub(run, "org/digits") == 7
  expected = Pipeline.from_checkpoint(run)
  assert_same(Pipeline.from_pretrained("org/digits"), expected)
  assert_same(Pipeline.from_pretrained("hf://org/digits"), expected)


def test_folder_draws_the_images_of_the_run(run, tmp_path, monkeypatch):
  to_hub_folder(run, tmp_path / "org" / "digits")
  monkeypatch.chdir(tmp_path)
  assert_same(Pipeline.from_pretrained("org/digits"), Pipeline.from_checkpoint(run))
  found = {path.name for path in (tmp_path / "org" / "digits").iterdir()}
  assert found == {"model.safetensors", "config.json", "README.md"}


def test_run_of_a_gpu_is_read_on_a_cpu(run, tmp_path, caplog):
  to_hub_folder(run, tmp_path / "folder")
  path = tmp_path / "folder" / "config.json"
  config = json.loads(path.read_text())
  config["settings"]["model"]["attention_kernel"] = "cudnn"
  path.write_text(json.dumps(config))
  with caplog.at_level("INFO", logger="mdt_jax"):
    assert_same(
      Pipeline.from_pretrained(tmp_path / "folder"), Pipeline.from_checkpoint(run)
    )
  assert "attention by plain products: cudnn needs NVIDIA GPUs" in caplog.text


def test_folder_in_a_bucket_draws_the_images_of_the_run(run, bucket):
  assert to_hub_folder(run, f"{bucket}/published") == 7
  names = {path.name for path in epath.Path(f"{bucket}/published").iterdir()}
  assert names == {"model.safetensors", "config.json", "README.md"}
  pipeline = Pipeline.from_pretrained(f"{bucket}/published")
  assert_same(pipeline, Pipeline.from_checkpoint(run))
  with pytest.raises(SettingError, match=r"^folder = .*empty folder"):
    to_hub_folder(run, f"{bucket}/published")


@pytest.mark.parametrize("name", ["missing", "empty", "run"])
def test_folder_in_a_bucket_without_weights_is_refused(bucket, name):
  epath.Path(f"{bucket}/empty/notes.txt").write_bytes(b"")
  epath.Path(f"{bucket}/run/checkpoints/7/x").write_bytes(b"")
  with pytest.raises(SettingError) as caught:
    Pipeline.from_pretrained(f"{bucket}/{name}")
  assert (caught.value.setting, caught.value.value) == ("name", f"{bucket}/{name}")


def test_load_reads_a_workdir_or_a_repository(run, cache):
  push_to_hub(run, "org/name")
  expected = Pipeline.from_checkpoint(run)
  assert_same(Pipeline.load("hf://org/name"), expected)
  assert_same(Pipeline.load(run, step=7), expected)
  with pytest.raises(SettingError, match=r"^step = 7: is for a workdir"):
    Pipeline.load("hf://org/name", step=7)


@pytest.mark.parametrize(
  ("command", "flags", "file"),
  [
    ("sample", ["--labels=3,1", "--num_steps=2"], "samples.npz"),
    ("evaluate", ["--metrics=bpd", "--num_images=2", "--num_steps=1"], "bpd.json"),
  ],
)
def test_commands_read_a_repository(run, cache, tmp_path, command, flags, file):
  push_to_hub(run, "org/name")
  flags = ["--checkpoint=hf://org/name", f"--output={tmp_path / 'out'}", *flags]
  start = functools.partial(
    commands.run, f"mdt_jax.{command}", *flags, environment=cache.environment
  )
  commands.assert_refused(start("--step=7"), "--step = 7", "is for a workdir")
  commands.assert_refused(start("--checkpoint=hf://org/none"), "--checkpoint = 'hf://")
  assert not (tmp_path / "out").exists()
  code, _, err = start()
  assert code == 0, err
  assert (tmp_path / "out" / file).exists()


def test_run_starts_from_a_pushed_run(run, cache):
  push_to_hub(run, "org/digits")
  expected = Pipeline.from_checkpoint(run)
  target = expected.model
  found = open_weights(InitSettings(path="hf://org/digits"), target)
  for path, value in flatten(expected.params).items():
    np.testing.assert_array_equal(found.read(path), value)


@pytest.mark.parametrize(
  "url", ["hf://org/digits", "hf://org/digits/model.safetensors"]
)
def test_start_from_a_pushed_run_knows_the_names_of_its_classes(run, cache, url):
  push_to_hub(run, "org/digits")
  target = Pipeline.from_checkpoint(run).model
  found = open_weights(InitSettings(path=url), target).data_labels
  assert found.to_dict() == LABELS.to_dict()


def test_damaged_labels_of_a_folder_are_refused(run, tmp_path):
  to_hub_folder(run, tmp_path / "folder")
  path = tmp_path / "folder" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "labels": [1]}))
  target = Pipeline.from_checkpoint(run).model
  with pytest.raises(SettingError, match=r"^config.init.path = .*\"labels\""):
    open_weights(InitSettings(path=str(tmp_path / "folder")), target)


def test_errors_name_the_address_and_not_the_cache(cache, tmp_path):
  (tmp_path / "notes.md").touch()
  write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(1, np.float32)})
  cache.add("org/x", {name: tmp_path / name for name in ("notes.md", "a.safetensors")})
  target = Experiment(Settings.from_config(tiny_config())).model
  for file in ("notes.md", "a.safetensors"):
    url = f"hf://org/x/{file}"
    with pytest.raises(SettingError) as caught:
      open_weights(InitSettings(path=url), target)
    assert (caught.value.setting, caught.value.value) == ("config.init.path", url)
    assert str(cache.folder) not in caught.value.accepted


@pytest.mark.parametrize("size", [None, 5])
def test_dit_of_diffusers_needs_its_input_size(size, tmp_path):
  weights = tmp_path / "diffusion_pytorch_model.safetensors"
  write_tensors(weights, to_diffusers(read_tensors(reference.FIXTURES / "dit.pt")))
  if size is not None:
    sizes = {"sample_size": size, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
  target = Experiment(Settings.from_config(tiny_config())).model
  with pytest.raises(SettingError, match=r"^config.init.path = .*sample_size"):
    open_weights(InitSettings(path=str(tmp_path)), target)


def test_dit_of_diffusers_draws_the_images_of_the_released_dit(cache, tmp_path):
  tensors = read_tensors(reference.FIXTURES / "dit.pt")
  weights = tmp_path / "weights.safetensors"
  write_tensors(weights, to_diffusers(tensors))
  config = tmp_path / "config.json"
  sizes = {"sample_size": 12, "num_attention_heads": 2, "num_embeds_ada_norm": 10}
  config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **sizes}))
  name = "transformer/diffusion_pytorch_model.safetensors"
  snapshot = cache.add("org/dit", {name: weights, "transformer/config.json": config})
  pipeline = Pipeline.from_pretrained("org/dit")
  assert (pipeline.step, pipeline.model.num_heads) == (0, 2)
  assert not pipeline.draws_pixels
  again = Pipeline.from_pretrained(snapshot)
  images = [p.draw([1, 2], num_steps=2) for p in (pipeline, again)]
  assert np.isfinite(images[0]).all()
  np.testing.assert_array_equal(*images)


def test_released_file_has_the_settings_of_the_papers(tmp_path):
  shutil.copy(reference.FIXTURES / "dit.pt", tmp_path)
  pipeline = Pipeline.from_pretrained(tmp_path / "dit.pt", num_heads=2)
  assert pipeline.config.sampling.cfg_scale == 1.5
  with pytest.raises(SettingError) as caught:
    Pipeline.from_pretrained(tmp_path / "dit.pt", num_heads=2, network="MDT")
  assert caught.value.setting == "network"


# Errors.


@pytest.mark.parametrize("name", ["name", "a/b/c", "s3://bucket/run", "", "org/name"])
def test_unknown_name_is_refused(name, cache):
  with pytest.raises(SettingError) as caught:
    Pipeline.from_pretrained(name)
  assert (caught.value.setting, caught.value.value) == ("name", name)


def test_folder_of_a_run_is_for_from_checkpoint(run):
  with pytest.raises(SettingError, match=r"^name = .*from_checkpoint"):
    Pipeline.from_pretrained(run)


def test_folder_without_weights_is_refused(tmp_path):
  with pytest.raises(SettingError, match=r"^name = .*model\.safetensors"):
    Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
  "changes",
  [
    {"settings": None},
    {"settings": {"model": 5}},
    {"settings": {"model": {"depth": "4"}}},
    {"settings": {"sampling": {"method": "none"}}},
    {"settings": {}},  # the default network, whose parameters are others
    {"step": "7"},
    {"labels": [1]},
    {"labels": {"labels": [10]}},
  ],
  ids=str,
)
def test_damaged_config_is_refused(run, tmp_path, changes):
  to_hub_folder(run, tmp_path / "folder")
  path = tmp_path / "folder" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
  with pytest.raises(SettingError, match=r"^name = .*config\.json"):
    Pipeline.from_pretrained(tmp_path / "folder")
