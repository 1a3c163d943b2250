"""Conversion of PyTorch files to workdirs and back. Errors write and delete nothing."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from etils import epath

from mdt_jax import Experiment, SettingError, recipes
from mdt_jax.buckets import list_objects
from mdt_jax.checkpoints import converted as converted_module
from mdt_jax.checkpoints.converted import PARTIAL, from_torch_file, to_torch_file
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.checkpoints.lock import locked
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.models.registry import MODELS, create_model
from mdt_jax.pretrained.bucket_weights import local_weights
from mdt_jax.pretrained.tensors import read_tensors, write_tensors
from mdt_jax.pretrained.torch_mdt import attributes_of, from_torch, to_torch
from mdt_jax.pretrained.torch_mdt_sizes import notes
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.setting_groups import DiffusionSettings
from tests import reference
from tests.cli.commands import assert_refused, run

HEADS = {"mdt_v1": {}, "mdt_v2": {}, "dit": {"num_heads": 2}}


def fixture(name):
  return reference.FIXTURES / f"{name}.pt"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted")
  for name, known in HEADS.items():
    from_torch_file(fixture(name), folder / name, **known)
  return folder


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", HEADS)
def test_round_trip_is_bit_exact(converted, name, suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  assert to_torch_file(converted / name, path) == 0
  before, after = read_tensors(fixture(name)), read_tensors(path)
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert (value.dtype, value.tobytes()) == (after[key].dtype, after[key].tobytes())


@pytest.mark.parametrize("name", HEADS)
def test_converted_network_has_the_attributes_of_the_file(converted, name):
  pipeline = Pipeline.from_checkpoint(converted / name)
  attributes, _ = from_torch(fixture(name), **HEADS[name])
  model = pipeline.experiment.model
  assert {key: getattr(model, key) for key in attributes} == attributes


@pytest.mark.parametrize("name", HEADS)
def test_converted_network_generates_images(converted, name):
  images = Pipeline.from_checkpoint(converted / name).draw([1, 2], num_steps=2)
  assert images.shape == (2, 12, 12, 4)
  assert np.isfinite(images).all()


def test_converted_workdir_holds_only_checkpoints_and_config(converted):
  names = {path.name for path in (converted / "mdt_v1").iterdir()}
  assert names == {"checkpoints", "config.json", ".lock"}
  assert {path.name for path in converted.iterdir()} == set(HEADS)


@pytest.mark.parametrize("name", [name for name in MODELS if "Text" not in name])
def test_published_network_gets_its_name_and_released_settings(name):
  variant = MODELS[name]["variant"]
  processes = {"SiT": "flow", "TREAD": "edm", "MicroDiT": "edm", "SPRINT": "flow"}
  processes["MaskDiT"] = "edm"
  process = processes.get(variant, "gaussian")
  is_gaussian = process == "gaussian"
  attributes = dict(MODELS[name], input_size=32, learn_sigma=is_gaussian)
  settings = recipes.of_network(attributes)
  assert settings.model.name == name
  assert Experiment(settings).model.depth == MODELS[name]["depth"]
  assert settings.diffusion.process == process
  assert settings.optimizer.name == ("adan" if variant == "MDTv2" else "adamw")
  if is_gaussian:
    weight = "min_snr" if variant == "MDTv2" else "none"
    assert settings.diffusion.loss_weight == weight


def test_network_without_learned_variance_uses_a_fixed_variance():
  attributes = dict(MODELS["DiT-S/8"], input_size=32, learn_sigma=False)
  settings = recipes.of_network(attributes)
  assert settings.diffusion.variance == "fixed_large"
  assert not Experiment(settings).model.learn_sigma


# Flow models.


NO_SIGMA = dict(learn_sigma=False)


def write_sit_args(path, **args):
  """A checkpoint of SiT's training code, which saves its arguments."""
  ema = torch.load(fixture("sit"), weights_only=True)
  torch.save({"ema": ema, "args": argparse.Namespace(**args)}, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_sit_is_converted_there_and_back(suffix, tmp_path):
  settings = from_torch_file(
    fixture("sit"), tmp_path / "run", num_heads=2, process="flow"
  )
  assert settings.model.name == "SiT-S/2"
  assert (
    settings.diffusion == recipes.of_network(MODELS["SiT-S/2"] | NO_SIGMA).diffusion
  )
  assert (settings.diffusion.process, settings.diffusion.arguments) == ("flow", {})
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert pipeline.experiment.model.variant == "SiT"
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()
  to_torch_file(tmp_path / "run", tmp_path / f"back{suffix}")
  before = read_tensors(fixture("sit"))
  after = read_tensors(tmp_path / f"back{suffix}")
  assert before.keys() == after.keys()
  assert all(after[name].tobytes() == before[name].tobytes() for name in before)
  # The notes of the file say that it holds a SiT and a flow.
  assert from_torch_file(tmp_path / f"back{suffix}", tmp_path / "again") == settings


def test_network_sit_has_a_flow(tmp_path):
  settings = from_torch_file(fixture("sit"), tmp_path / "run", "SiT", num_heads=2)
  assert settings.diffusion.process == "flow"


def test_arguments_of_the_training_of_sit_become_those_of_the_flow(tmp_path):
  args = dict(path_type="GVP", prediction="score", loss_weight="likelihood")
  write_sit_args(tmp_path / "sit.pt", model="SiT-XL/2", **args)
  settings = from_torch_file(tmp_path / "sit.pt", tmp_path / "run", num_heads=2)
  expected = dict(path="gvp", prediction="score", loss_weight="likelihood")
  assert settings.diffusion.arguments == expected


@pytest.mark.parametrize("weight", [None, "likelihood"])
def test_velocities_of_the_training_of_sit_have_no_weight(weight, tmp_path):
  args = dict(path_type="Linear", prediction="velocity", loss_weight=weight)
  write_sit_args(tmp_path / "sit.pt", model="SiT-XL/2", **args)
  settings = from_torch_file(tmp_path / "sit.pt", tmp_path / "run", num_heads=2)
  assert settings.diffusion.arguments == {}


RECTIFIED = {"data_time": 0, "time_distribution": "logit_normal"}


@pytest.mark.parametrize(
  ("process", "expected", "method"),
  [(None, ("edm", {}), "heun"), ("flow", ("flow", RECTIFIED), "ode_euler")],
)
def test_tread_is_converted_there_and_back(process, expected, method, tmp_path):
  settings = from_torch_file(
    fixture("tread"), tmp_path / "run", "TREAD", num_heads=2, process=process
  )
  assert settings.model.name == "TREAD-S/2"
  assert settings.objective.name == "tread"
  assert (settings.diffusion.process, settings.diffusion.arguments) == expected
  assert settings.sampling.method == method
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert pipeline.experiment.model.variant == "TREAD"
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()
  to_torch_file(tmp_path / "run", tmp_path / "back.pt")
  before, after = read_tensors(fixture("tread")), read_tensors(tmp_path / "back.pt")
  assert before.keys() == after.keys()
  assert all(after[name].tobytes() == before[name].tobytes() for name in before)
  # The notes of the file say that it holds a TREAD, its process and its route.
  again = from_torch_file(tmp_path / "back.pt", tmp_path / "again")
  assert Experiment(again).model == pipeline.experiment.model
  assert dataclasses.replace(again, model=settings.model) == settings


def test_microdit_is_converted_there_and_back(tmp_path):
  """The recorded network has the channels of a variance, so it is one of DDPM."""
  source = fixture("microdit_dit")
  heads = dict(num_heads=2, mixer_num_heads=3)
  settings = from_torch_file(source, tmp_path / "run", **heads)
  assert settings.model.name == "MicroDiT-S/2"
  assert (settings.objective.name, settings.diffusion.process) == (
    "microdit",
    "gaussian",
  )
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()
  to_torch_file(tmp_path / "run", tmp_path / "back.pt")
  before, after = read_tensors(source), read_tensors(tmp_path / "back.pt")
  assert before.keys() == after.keys()
  assert all(after[name].tobytes() == before[name].tobytes() for name in before)
  # The notes of the file hold the heads, of the blocks and of the mixer.
  again = from_torch_file(tmp_path / "back.pt", tmp_path / "again")
  assert Experiment(again).model == pipeline.experiment.model


def test_released_microdit_has_captions_which_the_command_refuses(tmp_path):
  with pytest.raises(SettingError, match="reads captions") as error:
    from_torch_file(fixture("microdit"), tmp_path / "run", num_heads=4)
  assert (error.value.setting, error.value.value) == ("network", "MicroDiTText")
  assert not (tmp_path / "run").exists()


def test_microdit_without_variance_is_one_of_edm(tmp_path):
  name = "MicroDiT-S/8"
  sizes = dict(hidden_size=32, depth=1, num_heads=2, mixer_depth=1, num_classes=3)
  model = create_model(name, **sizes, input_size=8)
  attributes = attributes_of(model)
  tensors = to_torch(attributes, reference.random_params(model))
  write_tensors(tmp_path / "model.safetensors", tensors)
  settings = from_torch_file(
    tmp_path / "model.safetensors", tmp_path / "run", num_heads=2
  )
  expected = {"sigma_data": 0.9, "p_mean": -0.6, "p_std": 1.2}
  assert (settings.diffusion.process, settings.diffusion.arguments) == ("edm", expected)
  assert settings.sampling.method == "edm"
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_sprint_is_converted_there_and_back(suffix, tmp_path):
  """The notes of a file say its input size, so that it is read without arguments."""
  settings = from_torch_file(fixture("sprint"), tmp_path / "run", input_size=12)
  assert settings.model.name == "SPRINT-S/2"
  assert settings.objective.name == "sprint"
  diffusion, sampling = settings.diffusion, settings.sampling
  assert (diffusion.process, diffusion.arguments) == ("flow", RECTIFIED)
  assert (sampling.method, sampling.num_steps, sampling.arguments) == ("sde", 250, {})
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  model = pipeline.experiment.model
  assert (model.variant, model.num_heads, model.middle_depth) == ("SPRINT", 2, 3)
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()
  back = tmp_path / f"back{suffix}"
  to_torch_file(tmp_path / "run", back)
  before, after = read_tensors(fixture("sprint")), read_tensors(back)
  assert before.keys() == after.keys()
  assert all(after[name].tobytes() == before[name].tobytes() for name in before)
  assert from_torch_file(back, tmp_path / "again") == settings


def test_log_says_what_a_sprint_was_read_as(tmp_path, caplog):
  with caplog.at_level("INFO", logger="mdt_jax"):
    from_torch_file(fixture("sprint"), tmp_path / "run", input_size=12)
  for text in ("read as SPRINT (depth x width x patch = 7x32x2)", "2 + 2 blocks"):
    assert text in caplog.text


@pytest.mark.parametrize("process", [None, "flow", "gaussian"])
def test_maskdit_is_converted_there_and_back(process, tmp_path):
  heads = dict(num_heads=2, decoder_num_heads=2)
  settings = from_torch_file(
    fixture("maskdit"), tmp_path / "run", **heads, process=process
  )
  assert settings.model.name == "MaskDiT-S/2"
  assert settings.diffusion.process == (process or "edm")
  weight = 0.0 if process == "gaussian" else 0.1  # the DDPM predicts noise
  assert settings.objective.arguments == {"ratio": 0.5, "mae_weight": weight}
  sampling = settings.sampling
  if process is None:
    assert (sampling.method, sampling.num_steps) == ("edm", 40)
    assert (sampling.cfg_scale, sampling.cfg_power) == (1.5, 0.0)
    assert sampling.cfg_channels == 0
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert np.isfinite(pipeline.draw([1, 2], num_steps=2)).all()
  to_torch_file(tmp_path / "run", tmp_path / "back.pt")
  before, after = read_tensors(fixture("maskdit")), read_tensors(tmp_path / "back.pt")
  prefix = "model."
  assert {name.removeprefix(prefix) for name in before} == after.keys()
  for name, tensor in before.items():
    assert after[name.removeprefix(prefix)].tobytes() == tensor.tobytes()
  # The notes of the file say how many heads there are.
  assert from_torch_file(tmp_path / "back.pt", tmp_path / "again") == settings


FLOW = DiffusionSettings(process="flow", arguments={"time_distribution": "mode"})


@pytest.mark.parametrize("process", [None, "flow"])
@pytest.mark.parametrize("variant", ["DiT", "MDTv2"])
def test_flow_of_a_run_survives_a_round_trip(variant, process, tmp_path):
  sizes = dict(input_size=4, patch_size=2, hidden_size=8, num_heads=2)
  sizes |= dict(depth=2, decode_depth=2)
  attributes = {**sizes, "variant": variant, "num_classes": 3, **NO_SIGMA}
  settings = recipes.of_network(attributes, "flow", FLOW.arguments)
  assert settings.diffusion == FLOW
  params = reference.random_params(create_model(**attributes))
  save_model(tmp_path / "run", settings, params)
  to_torch_file(tmp_path / "run", tmp_path / "model.safetensors")
  again = from_torch_file(
    tmp_path / "model.safetensors", tmp_path / "again", process=process
  )
  assert again.diffusion == FLOW
  assert again.sampling == settings.sampling


@pytest.mark.parametrize("process", ["edm", "flow", "gaussian"])
def test_settings_of_every_process_build(process):
  sizes = dict(input_size=4, patch_size=2, hidden_size=8, num_heads=2, depth=2)
  attributes = {**sizes, "variant": "DiT", "num_classes": 3, **NO_SIGMA}
  Experiment(recipes.of_network(attributes, process)).check()


@pytest.mark.parametrize(
  ("name", "network", "process", "accepted"),
  [
    ("dit", "DiT", "flow", "network=SiT"),
    ("mdt_v2", None, "flow", "MDTv2 with a learned variance"),
    ("sit", "SiT", "gaussian", "must be flow"),
    ("sit", None, "ddpm", "flow, gaussian"),
  ],
)
def test_process_that_does_not_fit_writes_nothing(
  name, network, process, accepted, tmp_path
):
  known = {"num_heads": 2} if name != "mdt_v2" else {}
  with pytest.raises(SettingError) as error:
    from_torch_file(fixture(name), tmp_path / "run", network, process=process, **known)
  assert (error.value.setting, error.value.value) == ("process", process)
  assert accepted in error.value.accepted
  assert not (tmp_path / "run").exists()


def test_command_names_the_flag_of_a_process_that_does_not_fit(tmp_path):
  flags = (f"--input={fixture('mdt_v2')}", f"--output={tmp_path / 'run'}")
  result = run("mdt_jax.convert", *flags, "--process=flow")
  assert_refused(result, "--process = 'flow': does not fit", "learned variance")


@pytest.mark.parametrize("noted", [{"path": "spiral"}, {"path": 3}, [1], {"a": 1}])
def test_unknown_arguments_in_a_file_are_ignored(noted, tmp_path):
  attributes, params = from_torch(fixture("sit"), "SiT", num_heads=2)
  path = tmp_path / "model.safetensors"
  diffusion = {"process": "flow", "arguments": noted}
  tensors = to_torch(attributes, params)
  write_tensors(path, tensors, notes(attributes, diffusion=diffusion))
  settings = from_torch_file(path, tmp_path / "run")
  assert (settings.diffusion.process, settings.diffusion.arguments) == ("flow", {})


@pytest.mark.parametrize("process", ["gaussian", "edm"])
def test_process_other_than_the_noted_one_writes_nothing(process, tmp_path):
  attributes, _ = reference.load_model("dit")
  attributes = {**attributes, "variant": "SiT", "learn_sigma": False}
  settings = recipes.of_network(attributes)
  params = reference.random_params(create_model(**attributes))
  save_model(tmp_path / "old", settings, params)
  to_torch_file(tmp_path / "old", tmp_path / "model.safetensors")
  with pytest.raises(SettingError, match="must be flow, as the file notes"):
    from_torch_file(tmp_path / "model.safetensors", tmp_path / "run", process=process)
  assert not (tmp_path / "run").exists()


def test_unknown_process_in_a_file_is_refused(tmp_path):
  attributes, params = reference.load_model("dit")
  path = tmp_path / "model.safetensors"
  tensors = to_torch(attributes, params)
  write_tensors(path, tensors, notes(attributes, diffusion={"process": "mine"}))
  with pytest.raises(SettingError, match=r"^process = 'mine': accepted are "):
    from_torch_file(path, tmp_path / "run")
  settings = from_torch_file(path, tmp_path / "run", process="gaussian")
  assert settings.diffusion == recipes.of_network(attributes).diffusion


def test_bottleneck_cannot_be_written_to_a_released_file(tmp_path):
  attributes, _ = reference.load_model("dit")
  attributes = {**attributes, "patch_bottleneck": 4}
  settings = recipes.of_network(attributes)
  params = reference.random_params(create_model(**attributes))
  save_model(tmp_path / "run", settings, params)
  with pytest.raises(SettingError) as error:
    to_torch_file(tmp_path / "run", tmp_path / "model.pt")
  assert error.value.setting == "config.model.patch_bottleneck"
  assert not (tmp_path / "model.pt").exists()


# In a bucket.


def objects(folder):
  """Path in the folder -> content of each object."""
  paths = list_objects(epath.Path(folder))
  return {path: (epath.Path(folder) / path).read_bytes() for path in paths}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_through_a_bucket_is_bit_exact(bucket, suffix):
  source = epath.Path(f"{bucket}/source.pt")
  source.write_bytes(fixture("mdt_v2").read_bytes())
  from_torch_file(source, f"{bucket}/run")
  held = {path.name for path in epath.Path(f"{bucket}/run").iterdir()}
  assert held - {".lock"} == {"checkpoints", "config.json"}
  assert to_torch_file(f"{bucket}/run", f"{bucket}/model{suffix}") == 0
  before = read_tensors(fixture("mdt_v2"))
  with local_weights(f"{bucket}/model{suffix}") as local:
    after = read_tensors(local)
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert (value.dtype, value.tobytes()) == (after[key].dtype, after[key].tobytes())


def test_overwrite_replaces_the_checkpoint_in_a_bucket(bucket):
  from_torch_file(fixture("mdt_v1"), f"{bucket}/run")
  DataLabels(np.array([1, 4]), ["ant", "bee"]).write(epath.Path(f"{bucket}/run"))
  (epath.Path(bucket) / "run" / "mine.txt").write_text("kept")
  before = objects(f"{bucket}/run")
  with pytest.raises(SettingError, match=r"^workdir = .*must be an empty folder"):
    from_torch_file(fixture("mdt_v2"), f"{bucket}/run")
  with pytest.raises(SettingError, match=r"^path = .*missing.pt': must be a file"):
    from_torch_file(f"{bucket}/missing.pt", f"{bucket}/run", overwrite=True)
  assert objects(f"{bucket}/run") == before
  from_torch_file(fixture("mdt_v2"), f"{bucket}/run", overwrite=True)
  pipeline = Pipeline.from_checkpoint(f"{bucket}/run")
  assert pipeline.config.model.name == "MDTv2-S/2"
  assert pipeline.experiment.data_labels is None
  assert {path.partition("/")[0] for path in objects(f"{bucket}/run")} - {".lock"} == {
    "checkpoints",
    "config.json",
    "mine.txt",
  }


def test_conversion_after_a_killed_one_in_a_bucket(bucket, monkeypatch):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(converted_module, "_replace", stop)
    patched.setattr(converted_module, "remove_folder", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
      from_torch_file(fixture("mdt_v1"), f"{bucket}/run")
  assert any(path.startswith(PARTIAL) for path in objects(f"{bucket}/run"))
  from_torch_file(fixture("mdt_v1"), f"{bucket}/run")
  assert not any(path.startswith(PARTIAL) for path in objects(f"{bucket}/run"))


def test_existing_object_is_refused_and_kept(converted, bucket):
  path = epath.Path(f"{bucket}/model.pt")
  path.write_text("kept")
  with pytest.raises(SettingError, match=r"^path = .*exists already"):
    to_torch_file(converted / "mdt_v1", path)
  assert path.read_text() == "kept"


# What a file does not show.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_network_without_null_label_round_trips(suffix, tmp_path):
  tensors = read_tensors(fixture("dit"))
  write_tensors(tmp_path / "model.safetensors", tensors)
  from_torch_file(
    tmp_path / "model.safetensors", tmp_path / "run", num_heads=2, num_classes=11
  )
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert pipeline.experiment.model.num_classes == 11
  assert pipeline.experiment.model.label_dropout == 0
  assert pipeline.config.sampling.cfg_scale == 1
  assert np.isfinite(pipeline.draw([1, 10], num_steps=2)).all()
  to_torch_file(tmp_path / "run", tmp_path / f"back{suffix}")
  from_torch_file(tmp_path / f"back{suffix}", tmp_path / "again")
  again = Pipeline.from_checkpoint(tmp_path / "again").experiment.model
  assert again == pipeline.experiment.model
  back = read_tensors(tmp_path / f"back{suffix}")
  assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_prediction_of_a_run_survives_a_round_trip(tmp_path):
  settings = recipes.of_network(reference.load_model("dit")[0])
  diffusion = dataclasses.replace(
    settings.diffusion, prediction="v", schedule="cosine", num_timesteps=500
  )
  settings = dataclasses.replace(settings, diffusion=diffusion)
  save_model(tmp_path / "run", settings, reference.load_model("dit")[1])
  to_torch_file(tmp_path / "run", tmp_path / "model.safetensors")
  again = from_torch_file(tmp_path / "model.safetensors", tmp_path / "again")
  assert again.diffusion == diffusion


@pytest.mark.parametrize(
  "noted",
  [5, {"prediction": "velocity"}, {"num_timesteps": 10**12}, {"schedule": ["linear"]}],
)
def test_unknown_settings_in_a_file_are_ignored(noted, tmp_path):
  attributes, params = reference.load_model("dit")
  path = tmp_path / "model.safetensors"
  write_tensors(path, to_torch(attributes, params), notes(attributes, diffusion=noted))
  settings = from_torch_file(path, tmp_path / "run")
  assert settings.diffusion == recipes.of_network(attributes).diffusion


@pytest.mark.parametrize(
  ("name", "texts"),
  [
    ("mdt_v2", ("read as MDTv2", "7x32x2", "10 classes and a null label")),
    ("dit", ("read as DiT", "predicts noise", "SiT", "--network=TREAD")),
  ],
)
def test_log_says_what_a_file_was_read_as(name, texts, tmp_path, caplog):
  with caplog.at_level("INFO", logger="mdt_jax"):
    from_torch_file(fixture(name), tmp_path / "run", **HEADS[name])
  assert str(fixture(name)) in caplog.text
  assert all(text in caplog.text for text in texts), caplog.text


# Errors.


def listing(folder):
  return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_nonempty_output_folder_is_refused(tmp_path):
  (tmp_path / "mine.txt").write_text("kept")
  before = listing(tmp_path)
  with pytest.raises(SettingError, match=r"^workdir = .*must be an empty folder"):
    from_torch_file(fixture("mdt_v1"), tmp_path)
  assert listing(tmp_path) == before


def test_overwrite_replaces_the_checkpoint_and_keeps_other_files(tmp_path):
  from_torch_file(fixture("mdt_v1"), tmp_path / "run")
  (tmp_path / "run" / "mine.txt").write_text("kept")
  from_torch_file(fixture("mdt_v2"), tmp_path / "run", overwrite=True)
  assert Pipeline.from_checkpoint(tmp_path / "run").config.model.name == "MDTv2-S/2"
  assert (tmp_path / "run" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
def test_workdir_on_another_disk_is_converted_through_a_link(
  tmp_path, monkeypatch, overwrite
):
  (tmp_path / "disk").mkdir()
  (tmp_path / "run").symlink_to("disk")
  if overwrite:
    from_torch_file(fixture("mdt_v1"), tmp_path / "run")
  rename, disk = os.rename, (tmp_path / "disk").resolve()

  def rename_on_one_disk(source, target, **options):
    paths = (Path(path).parent.resolve() for path in (source, target))
    if len({disk in (path, *path.parents) for path in paths}) > 1:
      raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    rename(source, target, **options)

  for name in ("rename", "replace"):
    monkeypatch.setattr(os, name, rename_on_one_disk)
  from_torch_file(fixture("mdt_v2"), tmp_path / "run", overwrite=overwrite)
  assert Pipeline.from_checkpoint(tmp_path / "run").config.model.name == "MDTv2-S/2"
  assert {path.name for path in tmp_path.iterdir()} == {"disk", "run"}
  assert not (disk / PARTIAL).exists()


def test_current_folder_is_converted_to(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  from_torch_file(fixture("mdt_v1"), ".")
  assert (tmp_path / "checkpoints" / "0").is_dir()


def test_failed_overwrite_keeps_the_old_checkpoints(tmp_path, monkeypatch):
  from_torch_file(fixture("mdt_v1"), tmp_path)
  DataLabels(np.array([1, 4]), ["ant", "bee"]).write(tmp_path)
  rename = Path.rename

  def fail_for_the_new(path, target):
    if path == tmp_path / PARTIAL / "checkpoints":
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return rename(path, target)

  monkeypatch.setattr(Path, "rename", fail_for_the_new)
  before = listing(tmp_path / "checkpoints")
  with pytest.raises(OSError, match=os.strerror(errno.EIO)):
    from_torch_file(fixture("mdt_v2"), tmp_path, overwrite=True)
  assert listing(tmp_path / "checkpoints") == before
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"checkpoints", "config.json", "labels.json", ".lock"}


def test_workdir_of_a_running_run_is_refused(tmp_path):
  with locked(tmp_path), pytest.raises(SettingError) as error:
    from_torch_file(fixture("mdt_v1"), tmp_path, overwrite=True)
  assert error.value.setting == "workdir"
  assert "in use by another run" in error.value.accepted
  assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_conversion_after_a_killed_one_needs_no_overwrite(tmp_path):
  (tmp_path / ".lock").touch()
  (tmp_path / PARTIAL / "checkpoints").mkdir(parents=True)
  from_torch_file(fixture("mdt_v1"), tmp_path)
  assert not (tmp_path / PARTIAL).exists()


def test_overwrite_removes_the_labels_of_the_old_run(tmp_path):
  from_torch_file(fixture("mdt_v1"), tmp_path / "run")
  DataLabels(np.array([1, 4]), ["ant", "bee"]).write(tmp_path / "run")
  from_torch_file(fixture("mdt_v2"), tmp_path / "run", overwrite=True)
  pipeline = Pipeline.from_checkpoint(tmp_path / "run")
  assert pipeline.experiment.data_labels is None


def test_invalid_file_overwrites_nothing(tmp_path):
  from_torch_file(fixture("mdt_v1"), tmp_path / "run")
  (tmp_path / "broken.pt").write_bytes(fixture("mdt_v2").read_bytes()[:5000])
  before = listing(tmp_path)
  with pytest.raises(SettingError, match="safe to load"):
    from_torch_file(tmp_path / "broken.pt", tmp_path / "run", overwrite=True)
  assert listing(tmp_path) == before


def test_file_with_a_missing_tensor_writes_nothing(tmp_path):
  tensors = torch.load(fixture("mdt_v1"), weights_only=True)
  del tensors["mask_token"]
  torch.save(tensors, tmp_path / "model.pt")
  with pytest.raises(SettingError, match=r"MDT .*: mask_token is missing"):
    from_torch_file(tmp_path / "model.pt", tmp_path / "run")
  assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_wrong_network_name_writes_nothing(tmp_path):
  with pytest.raises(SettingError) as caught:
    from_torch_file(fixture("mdt_v1"), tmp_path / "run", "MDTv2")
  assert (caught.value.setting, caught.value.value) == ("network", "MDTv2")
  assert not list(tmp_path.iterdir())


def test_output_path_that_is_a_file_is_refused(tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(SettingError, match=r"^workdir = .*must be a folder"):
    from_torch_file(fixture("mdt_v1"), tmp_path / "run", overwrite=True)


def test_existing_torch_file_is_refused_and_kept(converted, tmp_path):
  path = tmp_path / "model.pt"
  path.write_text("kept")
  with pytest.raises(SettingError, match=r"^path = .*exists already"):
    to_torch_file(converted / "mdt_v1", path)
  assert path.read_text() == "kept"


def test_overwrite_replaces_a_torch_file(converted, tmp_path):
  path = tmp_path / "model.pt"
  path.write_text("gone")
  to_torch_file(converted / "mdt_v1", path, overwrite=True)
  assert read_tensors(path).keys() == read_tensors(fixture("mdt_v1")).keys()


@pytest.mark.parametrize(
  ("name", "file", "message"),
  [
    ("mdt_v1", "model.npz", r"^path = .*must end in .pt, .pth or .safetensors"),
    ("absent", "model.pt", r"^workdir = .*absent"),
  ],
)
def test_invalid_suffix_or_missing_workdir_is_refused(
  converted, tmp_path, name, file, message
):
  with pytest.raises(SettingError, match=message):
    to_torch_file(converted / name, tmp_path / "new" / file)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", ["mdt_v1", "dit"])  # the same, and another
def test_training_cannot_resume_from_a_converted_model(converted, network):
  experiment = Pipeline.from_checkpoint(converted / network).experiment
  checkpoints = Checkpoints(converted / "mdt_v1", 2)
  with pytest.raises(SettingError, match="holds a converted model"):
    checkpoints.restore(None, experiment)
  checkpoints.close()
