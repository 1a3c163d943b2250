"""Networks with vectors and tokens in files of weights: there and back, and notes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mdt_jax import Pipeline, SettingError
from mdt_jax.checkpoints import hub_uploads
from mdt_jax.checkpoints.converted import from_torch_file, to_torch_file
from mdt_jax.checkpoints.loading import load_ema, save_model
from mdt_jax.checkpoints.weights import open_weights
from mdt_jax.config import write_config
from mdt_jax.experiment import Experiment
from mdt_jax.models.conditions import CONDITIONS, LabelCondition
from mdt_jax.pretrained.tensors import flatten, read_weight_file, write_tensors
from mdt_jax.pretrained.torch_mdt import from_tensors
from mdt_jax.pretrained.torch_mdt_sizes import read_notes
from mdt_jax.setting_groups import InitSettings
from mdt_jax.settings import Settings
from tests import reference
from tests.pretrained.hub_cache import HubCache
from tests.training.tiny import tiny_dit_config

VECTOR = {
  "model.condition": "vector",
  "condition.vector_size": 5,
  "condition.vector_norm": False,
}
ALL = {
  "model.condition": "label+vector+tokens",
  "condition.vector": "clip",
  "condition.vector_size": 5,
  "condition.vector_norm": False,
  "condition.tokens": "t5",
  "condition.tokens_length": 3,
  "condition.tokens_size": 4,
  "condition.drop": "apart",
  "condition.tokens_dropout": 0.3,
}
HEADS = {"num_heads": 2}
# Attributes of tiny networks, and what is not in their tensors.
VARIANTS = {
  "DiT": {},
  "SiT": {},
  "MDT": {"decode_depth": 1},
  "MDTv2": {"decode_depth": 2},
  "TREAD": {"route_start": 1, "route_end": 2},
  "MaskDiT": {"decode_depth": 1, "decoder_hidden_size": 8, "decoder_num_heads": 1},
  "MicroDiT": {"mixer_depth": 1, "mixer_hidden_size": 16, "mixer_num_heads": 2},
  "SPRINT": {"encoder_depth": 1, "decode_depth": 1},
}


def settings_of(condition, variant="DiT"):
  own = {f"model.{name}": value for name, value in VARIANTS[variant].items()}
  changes = {"model.name": f"{variant}-S/2", "model.num_classes": 7, **own, **condition}
  if variant == "SiT":
    changes["diffusion.process"] = "flow"
  return Settings.from_config(tiny_dit_config(**changes))


def save_run(workdir, settings):
  model = Experiment(settings).model
  save_model(workdir, settings, reference.random_params(model), step=7)
  write_config(settings, workdir)
  return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp("runs") / "vector", settings_of(VECTOR))


@pytest.fixture(scope="module")
def file(run):
  path = run.parent / "vector.safetensors"
  to_torch_file(run, path)
  return path


def same_params(one, other):
  one, other = flatten(one), flatten(other)
  assert one.keys() == other.keys()
  for path, value in one.items():
    assert np.asarray(value).tobytes() == np.asarray(other[path]).tobytes(), path


@pytest.mark.parametrize("condition", [VECTOR, ALL], ids=["vector", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_is_converted_there_and_back(variant, condition, tmp_path):
  settings = settings_of(condition, variant)
  save_run(tmp_path / "run", settings)
  suffix = ".pt" if variant == "MDTv2" else ".safetensors"
  to_torch_file(tmp_path / "run", tmp_path / f"model{suffix}")
  again = from_torch_file(tmp_path / f"model{suffix}", tmp_path / "again")
  assert again.condition == settings.condition
  for name in ("condition", "num_classes"):
    assert getattr(again.model, name) == getattr(settings.model, name)
  before, after = load_ema(tmp_path / "run"), load_ema(tmp_path / "again")
  assert before.experiment.model.variant == after.experiment.model.variant == variant
  same_params(before.params, after.params)


def test_released_tensors_keep_their_names(tmp_path):
  """A file is that of the network without the array, and tensors of the array."""
  tokens = {"model.condition": "label+tokens", "condition.tokens_size": 4}
  settings = settings_of({**tokens, "condition.tokens_length": 3})
  save_run(tmp_path / "run", settings)
  to_torch_file(tmp_path / "run", tmp_path / "model.safetensors")
  names = read_weight_file(tmp_path / "model.safetensors").tensors.keys()
  save_run(tmp_path / "plain", settings_of({}))
  to_torch_file(tmp_path / "plain", tmp_path / "plain.safetensors")
  plain = read_weight_file(tmp_path / "plain.safetensors").tensors.keys()
  assert plain < names
  assert all(name.startswith("condition.") for name in names - plain)
  assert "condition.blocks.cross_attention.query.kernel" in names


def test_images_are_the_same(run, tmp_path, monkeypatch):
  """A run draws the same as its repository on the hub."""
  cache = HubCache(tmp_path / "hub")
  cache.use(monkeypatch)
  hub_uploads.push_to_hub(run, "org/vector")
  vectors = 100 * np.random.default_rng(0).standard_normal((2, 5), np.float32)
  pipelines = [Pipeline.from_checkpoint(run), Pipeline.from_pretrained("org/vector")]
  options = dict(num_steps=2, seed=3, method="ddim", cfg_scale=2.0)
  drawn = [p.draw(condition=vectors, **options) for p in pipelines]
  np.testing.assert_array_equal(*drawn)
  others = pipelines[0].draw(condition=vectors[::-1], **options)
  assert np.abs(others - drawn[0]).max() > 1e-3


def test_card_states_the_arrays(run, tmp_path):
  three = save_run(tmp_path / "run", settings_of(ALL))
  expected = {
    run: (
      'images = pipeline(condition={"vector": …})',
      "| arrays of the condition | `vector` (5) |",
    ),
    three: (
      'images = pipeline([0], condition={"clip": …, "t5": …})',
      "| arrays of the condition | `clip` (5), `t5` (3, 4) |",
      "| classes | 7 |",
    ),
  }
  for workdir, lines in expected.items():
    hub_uploads.to_hub_folder(workdir, tmp_path / "folder", overwrite=True)
    text = (tmp_path / "folder" / "README.md").read_text()
    assert set(lines) <= set(text.splitlines())
    assert ("classes" in text) == (workdir == three)


def test_log_says_which_arrays(file, tmp_path, caplog):
  with caplog.at_level("INFO", logger="mdt_jax"):
    from_torch_file(file, tmp_path / "run")
  assert "input 8 x 8 x 1; vector (5,); learned variance" in caplog.text


def test_network_starts_from_such_a_file(run, file):
  """`config.init.path` takes the file, and keeps the layers of the vector."""
  target = Experiment(settings_of(VECTOR)).model
  weights = open_weights(InitSettings(path=str(file)), target)
  assert weights.settings.condition == settings_of(VECTOR).condition
  source = load_ema(run)
  for path, param in flatten(source.params).items():
    np.testing.assert_array_equal(weights.read(path), np.asarray(param))


# Errors.


def changed(file, tmp_path, **changes):
  """Copies a file, with other notes on its condition."""
  tensors, metadata = read_weight_file(file)
  noted = read_notes(metadata)
  noted["condition"] = {**noted["condition"], **changes}
  path = tmp_path / "changed.safetensors"
  write_tensors(path, dict(tensors), {"mdt_jax": json.dumps(noted)})
  return path


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"name": "sound"}, "notes a condition that cannot be built: condition = 'sound'"),
    ({"name": ["vector"]}, "cannot be built"),
    ({"name": 5}, "cannot be built"),
    ({"vector_size": "5"}, "cannot be built"),
    ({"vector_size": 10**30}, "cannot be built"),
    ({"vector_size": 6}, "condition.vector_embed.fc1.kernel"),
    ({"name": "label+vector"}, "y_embedder.embedding_table.weight"),
    ({"drop": None}, "cannot be built"),
    ({"vector_size": 5.0}, "cannot be built: vector_size = 5.0"),
    ({"vector": 7}, "cannot be built: vector = 7"),
    ({"vector_norm": "x"}, "cannot be built: vector_norm = 'x'"),
  ],
)
def test_notes_that_do_not_fit(file, tmp_path, changes, text):
  path = changed(file, tmp_path, **changes)
  with pytest.raises(SettingError, match=text) as caught:
    from_torch_file(path, tmp_path / "run")
  assert (caught.value.setting, caught.value.value) == ("path", str(path))
  assert not (tmp_path / "run").exists()


def test_setting_of_another_type_in_the_notes(file, tmp_path):
  path = changed(file, tmp_path, tokens_length="none")
  with pytest.raises(SettingError, match=r"config\.condition = .*tokens_length"):
    from_torch_file(path, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_file_without_notes_is_refused(file):
  tensors = dict(read_weight_file(file).tensors)
  with pytest.raises(SettingError, match=r"y_embedder\.embedding_table\.weight"):
    from_tensors(tensors, **HEADS)
  tensors["y_embedder.embedding_table.weight"] = np.zeros((8, 16), np.float32)
  with pytest.raises(SettingError, match=r"condition\.vector_embed"):
    from_tensors(tensors, **HEADS)


def test_condition_of_the_reader_is_not_written(tmp_path, monkeypatch):
  class Own(LabelCondition):
    pass

  monkeypatch.setitem(CONDITIONS, "own_of_file", Own)
  save_run(tmp_path / "run", settings_of({"model.condition": "own_of_file"}))
  with pytest.raises(
    SettingError, match="of your own, and files hold no code"
  ) as caught:
    to_torch_file(tmp_path / "run", tmp_path / "model.pt")
  assert caught.value.setting == "config.model.condition"
  assert caught.value.value == "own_of_file"
  assert not (tmp_path / "model.pt").exists()
