"""Runs that start from trained weights: same loss at step 0, records, errors."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest

from mdt_jax import create_model, create_objective, create_process, sharding
from mdt_jax.checkpoints.loading import save_model
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.models.registry import init_params
from mdt_jax.pretrained.tensors import flatten, write_tensors
from mdt_jax.pretrained.torch_mdt import attributes_of, from_torch, to_torch
from mdt_jax.settings import Settings
from mdt_jax.training import loop
from mdt_jax.training.initialization import Initialization
from mdt_jax.training.program import make_program
from mdt_jax.training.replay import replay
from tests import forked, reference
from tests.training.tiny import tiny_config, tiny_dit_config


def config_of(name, **settings):
  """The config of a run of the network of a fixture."""
  attributes = dict(reference.load_model(name)[0])
  variant = attributes.pop("variant")
  learned = attributes.pop("learn_sigma")
  model = {f"model.{key}": value for key, value in attributes.items()}
  return tiny_config(
    **{
      **model,
      "model.name": f"{variant}-S/2",
      "diffusion.variance": "learned_range" if learned else "fixed_large",
      "init.path": str(reference.FIXTURES / f"{name}.pt"),
      **settings,
    }
  )


def first_state(config, workdir="/nowhere"):
  """The first state of a run, and the run."""
  experiment = build(config)
  start = Initialization(experiment, reference.FIXTURES / "no_workdir")
  with sharding.use_mesh(experiment.mesh):
    return start.first_state(make_program(experiment)), experiment


def loss(model, params, labels):
  """The unmasked loss of a network for fixed draws."""
  objective = create_objective("plain", model=model, process=create_process("gaussian"))
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.standard_normal((len(labels), *model.input_shape)).astype(np.float32),
    "label": np.array(labels, np.int32),
  }
  draws = objective.draw(jax.random.key(1), batch)
  draws = draws.replace(y=np.stack([labels, labels], 1).astype(np.int32))
  return jax.jit(
    lambda p: objective.loss(model.apply, p, draws, None)[0], static_argnums=()
  )(params)


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("dit", {}),
    ("mdt_v1", {}),
    ("mdt_v2", {}),
    ("mdt_v2", {"model.num_classes": 3}),
    ("dit", {"model.name": "MDT-S/2", "model.decode_depth": 2}),
    ("dit", {"model.name": "MDTv2-S/2", "model.decode_depth": 2}),
  ],
)
def test_loss_at_step_0_is_that_of_the_weights(name, settings):
  attributes, params = reference.load_model(name)
  source = create_model(**attributes)
  if "model.decode_depth" in settings and source.depth % 2:
    settings = {**settings, "model.decode_depth": 1}
  state, experiment = first_state(config_of(name, **settings))
  new, old = experiment.model.num_classes, source.num_classes
  count = 8
  labels = [
    np.arange(count) % n if new == old else np.full(count, n) for n in (new, old)
  ]
  np.testing.assert_allclose(
    loss(experiment.model, state.params, labels[0]),
    loss(source, params, labels[1]),
    rtol=2e-6,
  )
  assert int(state.step) == 0
  for average in state.ema.values():
    jax.tree.map(np.testing.assert_array_equal, average, state.params)


def test_new_values_are_those_of_a_run_without_weights():
  config = config_of("mdt_v1", **{"model.num_classes": 3, "seed": 4})
  state, experiment = first_state(config)
  fresh = init_params(experiment.model, jax.random.key(4))
  np.testing.assert_allclose(  # Compiled or not, the last bit differs.
    state.params["label_embed"]["table"][:3],
    fresh["label_embed"]["table"][:3],
    rtol=1e-6,
  )


# A whole run from the workdir of another run.


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
  """A workdir with random averaged parameters of a DiT of ten classes, at step 7."""
  folder = tmp_path_factory.mktemp("old")
  config = tiny_dit_config(ema_decays=(0.5, 0.9))
  params = reference.random_params(build(config).model)
  save_model(folder, Settings.from_config(config), params, step=7)
  return folder, params


def test_run_starts_from_a_workdir_and_records_it(old_run, tmp_path, caplog):
  folder, params = old_run
  settings = {"init.path": str(folder), "num_steps": 1, "optimizer.warmup_steps": 0}
  config = tiny_dit_config(**settings, **{"optimizer.learning_rate": 1e-9})
  with caplog.at_level(logging.INFO):
    state = loop.train(config, tmp_path)
  assert f"starting from {folder}, step 7 (CRC-32 " in caplog.text
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state.params, params
  )
  seal = json.loads((folder / "checkpoints/7/checksums.json").read_text())["seal"]
  expected = {"path": str(folder), "step": 7, "checksum": f"{seal:08x}"}
  found = json.loads((tmp_path / "config.json").read_text())["init"]
  assert expected.items() <= found.items()
  checkpoints = Checkpoints(tmp_path, 2)
  saved = checkpoints.settings(1)
  checkpoints.close()
  assert (saved.init.step, saved.init.checksum) == (7, f"{seal:08x}")

  # A replayed step before the first checkpoint starts from the same weights.
  caplog.clear()
  with caplog.at_level(logging.INFO):
    replay(config, tmp_path, 0)
  assert f"starting from {folder}, step 7 (CRC-32 {seal:08x})" in caplog.text

  # It resumes from its own checkpoint, even if the weights are gone, and keeps the
  # record.
  caplog.clear()
  with caplog.at_level(logging.INFO):
    config.update_from_flattened_dict({"init.path": "/gone.pt", "num_steps": 2})
    loop.train(config, tmp_path)
  assert "config.init.path is not read" in caplog.text
  assert "resuming from the checkpoint at step 1" in caplog.text
  assert json.loads((tmp_path / "config.json").read_text())["init"] == found


def test_average_and_step_are_chosen(old_run):
  config = tiny_dit_config(
    **{"init.path": str(old_run[0]), "init.step": 7, "init.ema_decay": 0.5}
  )
  state, experiment = first_state(config)
  jax.tree.map(np.testing.assert_array_equal, state.params, old_run[1])
  assert experiment.settings.init.ema_decay == 0.5


def test_classes_are_mapped_by_number_and_by_name(old_run):
  held = build(tiny_dit_config()).open()  # the digits, named "0" to "9"
  config = tiny_dit_config(**{"init.path": str(old_run[0]), "init.classes": "3:1, 8:0"})
  state, experiment = first_state(config)
  assert len(held.labels) == experiment.model.num_classes
  table = np.asarray(state.params["label_embed"]["table"])
  old = old_run[1]["label_embed"]["table"]
  np.testing.assert_array_equal(table[[1, 0, 10]], old[[3, 8, 10]])
  assert np.abs(np.asarray(table[2:10]) - old[2:10]).max() > 0.05


def test_other_prediction_is_warned_of(old_run, caplog):
  config = tiny_dit_config(
    **{"init.path": str(old_run[0]), "diffusion.prediction": "v"}
  )
  first_state(config)
  assert "config.diffusion.prediction = 'epsilon', and this run has 'v'" in caplog.text


def save_sharded_state(folder):
  """Saves what a state on eight devices with fsdp holds on each."""
  config = tiny_dit_config(
    **{"init.path": str(folder / "old"), "mesh.fsdp": 8, "mesh.data": 1}
  )
  state, _ = first_state(config)
  kernel = state.params["blocks"]["fc1"]["kernel"]
  assert len(kernel.sharding.device_set) == 8
  part = kernel.addressable_shards[0].data
  assert part.size == kernel.size // 8
  np.savez(folder / "found.npz", **flatten(jax.device_get(state.params)))


def test_each_of_eight_devices_gets_its_part(old_run, tmp_path):
  (tmp_path / "old").symlink_to(old_run[0])
  process = forked.Forked(save_sharded_state, tmp_path, num_devices=8)
  assert process.end() == 0, process.err
  with np.load(tmp_path / "found.npz") as found:
    for path, value in flatten(old_run[1]).items():
      np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"init.path": "/no/such"}, r"init.path = '/no/such': must be a workdir"),
    ({"init.step": 3}, r"init.step = 3: needs config.init.path"),
    ({"init.path": "{old}", "init.step": 3}, r"init.step = 3: accepted are 7"),
    ({"init.path": "{old}", "init.ema_decay": 0.1}, r"init.ema_decay = 0.1: accepted"),
    ({"init.path": "{old}", "init.network": "DiT"}, r"init.network = 'DiT': is for"),
    ({"init.path": "{old}", "init.checksum": "0" * 8}, r"init.checksum = '00000000'"),
    ({"init.path": "{old}", "init.patches": "new"}, r"init.patches = 'new': accepted"),
    (
      {"init.path": "{old}", "init.classes": "3"},
      r"init.classes = .3.: must be OLD",
    ),
    (
      {"init.path": "{old}", "init.classes": "30:1"},
      r"init.classes = '30:1': old class '30': .*0 … 9",
    ),
    (  # The number of the null label.
      {"init.path": "{old}", "init.classes": "3:0, 1:10"},
      r"init.classes = '1:10': new class '10': must be a name, or lie in 0 … 9$",
    ),
    (
      {"init.path": "{old}", "init.classes": "3:1,4:1"},
      r"init.classes = .*the new class 1",
    ),
    ({"init.path": "{old}", "model.num_heads": 4}, r"init.path = .*: num_heads is 2"),
    ({"init.path": "{old}", "model.depth": 6}, r"init.path = .*: depth is 4 there"),
    ({"init.path": "{old}", "init.ema_decay": 0.9}, r"init.ema_decay = '0.9': .* 0.5$"),
    (
      {"init.path": "{checkpoint}"},
      r"init.path = .*init.path=.* and config.init.step=7$",
    ),
    ({"init.path": "s3://a/b"}, r"init.path = 's3://a/b': must be a local path"),
    ({"init.path": "{file}", "init.step": 1}, r"init.step = 1: is for workdirs"),
    ({"init.path": "{file}", "init.network": "MDT"}, r"init.network = 'MDT': must be"),
    ({"init.path": "{cut}"}, r"init.path = .*cut.safetensors': must be a safetensors"),
    ({"init.path": "{vae}"}, r"init.path = .*"),
    ({"init.path": "hf://one"}, r"init.path = 'hf://one': must be hf://ORG/NAME"),
  ],
)
def test_bad_setting_is_refused_before_anything_is_written(
  settings, message, old_run, tmp_path
):
  model = build(tiny_dit_config()).model
  file = tmp_path / "file.safetensors"
  write_tensors(file, to_torch(attributes_of(model), old_run[1]))
  cut = tmp_path / "cut.safetensors"
  cut.write_bytes(file.read_bytes()[:-100])
  vae = reference.FIXTURES / "vae"
  places = {"{old}": old_run[0], "{file}": file, "{cut}": cut, "{vae}": vae}
  places["{checkpoint}"] = old_run[0] / "checkpoints" / "7"
  settings = {
    key: str(places.get(value, value)) if key == "init.path" else value
    for key, value in settings.items()
  }
  with pytest.raises(SettingError, match=f"^config.{message}"):
    loop.train(tiny_dit_config(**settings), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def flow_of_sit(**arguments):
  """The config of a run that starts from the fixture of SiT."""
  return tiny_config(
    **{
      **{"model.name": "SiT-S/2", "model.input_size": 12, "model.in_channels": 4},
      **{"model.hidden_size": 32, "model.depth": 4, "model.num_heads": 2},
      **{"model.num_classes": 10, "masking.ratio": 0.0, "masking.width": 0.0},
      **{"diffusion.process": "flow", "diffusion.arguments": arguments},
      **{"sampling.method": "sde"},
      **{"init.path": str(reference.FIXTURES / "sit.pt"), "init.network": "SiT"},
    },
  )


def test_run_starts_from_a_sit(caplog):
  arguments = {"prediction": "velocity", "time_distribution": "logit_normal"}
  state, _ = first_state(flow_of_sit(**arguments))
  _, params = from_torch(reference.FIXTURES / "sit.pt", "SiT", num_heads=2)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  assert "must learn anew" not in caplog.text


def test_other_path_of_a_flow_is_warned_of(caplog):
  first_state(flow_of_sit(path="gvp"))
  assert "arguments.path = 'linear', and this run has 'gvp'" in caplog.text


def run_of_sprint(**settings):
  """The config of a run that starts from the fixture of SPRINT, at another size."""
  return tiny_config(
    **{
      **{"model.name": "SPRINT-S/2", "model.input_size": (8, 12)},
      **{"model.in_channels": 4, "model.hidden_size": 32, "model.depth": 7},
      **{"model.num_heads": 2, "model.num_classes": 10},
      **{"masking.ratio": 0.0, "masking.width": 0.0, "diffusion.process": "flow"},
      **{"diffusion.arguments": {"data_time": 0}, "sampling.method": "sde"},
      **{"init.path": str(reference.FIXTURES / "sprint.pt"), **settings},
    },
  )


def test_run_starts_from_a_sprint_of_any_input_size():
  state, _ = first_state(run_of_sprint())
  _, params = from_torch(reference.FIXTURES / "sprint.pt", input_size=12)
  jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_dit_does_not_start_from_a_sprint():
  config = run_of_sprint(**{"model.name": "DiT-S/2"})
  with pytest.raises(SettingError, match="SPRINT there and DiT here") as error:
    first_state(config)
  assert error.value.setting == "config.init.path"
