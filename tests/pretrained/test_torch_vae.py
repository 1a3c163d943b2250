"""Autoencoders saved by diffusers: reading, writing, and files that are refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mdt_jax import SettingError
from mdt_jax.models.autoencoder_kl import AutoencoderKL
from mdt_jax.pretrained.torch_vae import (
  WEIGHT_FILES,
  abstract_vae_params,
  load_vae,
  save_vae,
  vae_to_torch,
)
from tests import reference

FIXTURES = ("vae", "vae_no_quant")
SAFETENSORS, BIN = WEIGHT_FILES[:2]
OLD_SPELLING = {
  "to_q": "query",
  "to_k": "key",
  "to_v": "value",
  "to_out.0": "proj_attn",
}
ATTENTION = "encoder.mid_block.attentions.0"


@functools.cache
def saved(name):
  return load_file(reference.FIXTURES / name / SAFETENSORS)


@functools.cache
def saved_config(name):
  return json.loads((reference.FIXTURES / name / "config.json").read_text())


@functools.cache
def loaded(name):
  return load_vae(reference.FIXTURES / name)


def write_folder(folder, tensors=None, config=None):
  """Writes the fixture "vae" to a folder, with the given tensors or config."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(saved("vae") if tensors is None else tensors, folder / SAFETENSORS)
  config = saved_config("vae") if config is None else config
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def write_bin(folder, held, name=BIN):
  write_folder(folder)
  (folder / SAFETENSORS).unlink()
  torch.save(held, folder / name)
  return folder


def write_as(folder, name):
  """Writes the fixture "vae" to a folder, with its weights in the file `name`."""
  if name.endswith(".bin"):
    return write_bin(folder, as_torch(saved("vae")), name)
  (write_folder(folder) / SAFETENSORS).rename(folder / name)
  return folder


def as_torch(tensors):
  return {name: torch.tensor(array) for name, array in tensors.items()}


def assert_same(params, name="vae"):
  jax.tree.map(np.testing.assert_array_equal, params, loaded(name)[1])


def expect_error(*args):
  """Returns the one-line message of the SettingError of `load_vae`."""
  with pytest.raises(SettingError) as error:
    load_vae(*args)
  assert "\n" not in str(error.value)
  return str(error.value)


# Round trips.


@pytest.mark.parametrize("name", FIXTURES)
def test_round_trip_keeps_names_types_shapes_and_bits(name):
  back = vae_to_torch(loaded(name)[1])
  assert back.keys() == saved(name).keys()
  for key, array in saved(name).items():
    assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
    assert back[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", FIXTURES)
def test_saved_autoencoder_is_loaded_unchanged(name, tmp_path):
  save_vae(tmp_path / "new", *loaded(name))
  model, params = load_vae(tmp_path / "new")
  assert model == loaded(name)[0]
  assert_same(params, name)


@pytest.mark.parametrize("name", FIXTURES)
def test_saved_config_matches_the_config_of_diffusers(name, tmp_path):
  save_vae(tmp_path, *loaded(name))
  written = json.loads((tmp_path / "config.json").read_text())
  unused = {"sample_size", "force_upcast", "_diffusers_version"}
  expected = {k: v for k, v in saved_config(name).items() if k not in unused}
  assert {key: written[key] for key in expected} == expected


@pytest.mark.parametrize(
  "changes",
  [
    dict(block_out_channels=(4,), layers_per_block=1),
    dict(block_out_channels=(4, 8, 8), layers_per_block=3, latent_channels=16),
    dict(in_channels=1, out_channels=2, use_quant_conv=False, shift_factor=0.5),
    dict(mid_block_attention=False, use_post_quant_conv=False, scaling_factor=2.0),
    dict(latent_channels=2, latents_mean=(0.5, -1.0), latents_std=(2.0, 0.25)),
  ],
)
def test_other_configs_round_trip(changes, tmp_path):
  settings = dict(block_out_channels=(8, 4), norm_num_groups=2) | changes
  model = AutoencoderKL(**settings)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_vae_params(model)
  )
  save_vae(tmp_path, model, params)
  again, read = load_vae(tmp_path)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, read, params)


def test_config_is_read():
  model, _ = loaded("vae_no_quant")
  assert model == AutoencoderKL(
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    mid_block_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )


def test_dtype_applies_to_the_model_not_its_parameters():
  model, params = load_vae(reference.FIXTURES / "vae", jnp.bfloat16)
  assert model.dtype == jnp.bfloat16
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


# Formats of the weights.


def old_spelling(tensors, as_convolutions):
  old = {}
  for name, array in tensors.items():
    for new, spelling in OLD_SPELLING.items():
      if f".attentions.0.{new}." in name:
        name = name.replace(new, spelling)
        if as_convolutions and array.ndim == 2:
          array = array[:, :, None, None]
    old[name] = array
  return old


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_names_of_attention_tensors_are_read(as_convolutions, tmp_path):
  tensors = old_spelling(saved("vae"), as_convolutions)
  assert sum(".proj_attn." in name for name in tensors) == 4
  assert_same(load_vae(write_folder(tmp_path, tensors))[1])


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_every_name_of_weights_is_read_from_a_folder(name, tmp_path):
  assert_same(load_vae(write_as(tmp_path, name))[1])


@pytest.mark.parametrize("name", [*WEIGHT_FILES, "mine.safetensors", "mine.pt"])
def test_file_of_weights_is_read_with_the_config_beside_it(name, tmp_path):
  if name == "mine.pt":
    write_bin(tmp_path, as_torch(saved("vae")), name)
  else:
    write_as(tmp_path, name)
  (tmp_path / "vae").mkdir()  # a folder of this name must not be preferred
  assert_same(load_vae(tmp_path / name)[1])


def test_file_of_weights_without_config_is_refused(tmp_path):
  (write_folder(tmp_path) / "config.json").unlink()
  assert "holds no config.json" in expect_error(tmp_path / SAFETENSORS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
def test_prefixes_of_wrapped_networks_are_removed(prefix, tmp_path):
  tensors = {prefix + name: array for name, array in saved("vae").items()}
  assert_same(load_vae(write_folder(tmp_path, tensors))[1])


def test_safetensors_are_preferred_to_a_bin(tmp_path):
  write_folder(tmp_path)
  (tmp_path / BIN).write_bytes(b"not read")
  assert_same(load_vae(tmp_path)[1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(dtype, tmp_path):
  halved = {name: array.astype(dtype) for name, array in saved("vae").items()}
  _, params = load_vae(write_folder(tmp_path, halved))
  back = vae_to_torch(params)
  assert {array.dtype.name for array in back.values()} == {"float32"}
  for name, array in halved.items():
    np.testing.assert_array_equal(back[name], array.astype(np.float32))


def test_bfloat16_bin_is_read_as_float32(tmp_path):
  halved = {name: t.bfloat16() for name, t in as_torch(saved("vae")).items()}
  _, params = load_vae(write_bin(tmp_path, halved))
  expected = halved["encoder.conv_in.bias"].float().numpy()
  np.testing.assert_array_equal(params["encoder"]["conv_in"]["bias"], expected)


def test_vae_subfolder_of_a_pipeline_is_read(tmp_path):
  write_folder(tmp_path / "vae")
  (tmp_path / "model_index.json").write_text("{}")
  assert_same(load_vae(str(tmp_path))[1])


def test_reading_safetensors_does_not_import_torch():
  folder = reference.FIXTURES / "vae_no_quant"
  code = (
    "import sys; from mdt_jax.pretrained.torch_vae import load_vae; "
    f"load_vae({str(folder)!r}); sys.exit('torch' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


# Unsupported configs.


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("act_fn", "gelu"),
    ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
    ("up_block_types", ["UpDecoderBlock2D"] * 3),
    ("_class_name", "AutoencoderTiny"),
    ("latents_mean", [0.0] * 4),
    ("latents_std", [1.0] * 4),
    ("block_out_channels", [16, 16, 32, 30]),
    ("latent_channels", "4"),
    ("layers_per_block", 0),
    ("norm_num_groups", 0),
    ("scaling_factor", None),
    ("scaling_factor", 0),
    ("scaling_factor", 1e-60),
    ("scaling_factor", 1e308),
    ("scaling_factor", True),
    ("shift_factor", 10**400),
    ("shift_factor", [0.1]),
    ("latents_mean", [0.0] * 3),
    ("latents_std", "1111"),
    ("latents_std", {"0": 1.0}),
    ("latent_channels", True),
    ("latent_channels", 10**12),
    ("in_channels", -3),
    ("layers_per_block", 10**9),
    ("layers_per_block", 1e308),
    ("block_out_channels", [16] * 1000),
    ("block_out_channels", [[16, 16], [32, 32]]),
    ("use_quant_conv", "no"),
    ("mid_block_add_attention", 1),
  ],
)
def test_error_names_an_unsupported_setting(setting, value, tmp_path):
  write_folder(tmp_path, config={**saved_config("vae"), setting: value})
  path = str(tmp_path / "config.json")
  tuples = ("block_out_channels", "latents_mean", "latents_std")
  shown = tuple(value) if setting in tuples and isinstance(value, list) else value
  shown = repr(shown) if len(repr(shown)) < 200 else f"'{repr(shown)[:200]}…'"
  assert expect_error(tmp_path).startswith(f"{setting} of {path} = {shown}: ")


@pytest.mark.parametrize("value", [[], None, 32, "16"])
def test_block_out_channels_must_be_a_list(value, tmp_path):
  config = {"block_out_channels": value}
  assert "block_out_channels of " in expect_error(write_folder(tmp_path, config=config))


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39, None, "1"])
def test_statistics_of_latents_must_be_finite_numbers(name, bad, tmp_path):
  statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
  statistics[name] = [1.0, bad, 1.0, 1.0]
  write_folder(tmp_path, config={**saved_config("vae"), **statistics})
  assert expect_error(tmp_path).startswith(f"{name} of ")


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    (dict(latents_std=[1.0, 0.0, 1.0, 1.0]), "latents_std"),
    (dict(latents_std=[1.0, -1.0, 1.0, 1.0]), "latents_std"),
    (dict(shift_factor=0.1), "shift_factor"),
  ],
)
def test_statistics_that_cannot_scale_are_refused(changes, named, tmp_path):
  statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
  write_folder(tmp_path, config={**saved_config("vae"), **statistics, **changes})
  assert expect_error(tmp_path).startswith(f"{named} of ")


@pytest.mark.parametrize(
  "text", ["", "{", "[]", "null", "\x80", "[" * 100_000, "1" * 5000, " " * 2**21]
)
def test_invalid_config_file_is_refused(text, tmp_path):
  write_folder(tmp_path)
  (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
  assert f"vae = {str(tmp_path / 'config.json')!r}: " in expect_error(tmp_path)


def test_error_names_the_missing_config(tmp_path):
  write_folder(tmp_path)
  (tmp_path / "config.json").unlink()
  message = expect_error(tmp_path)
  assert "holds no config.json; put config.json and diffusion_pytorch_model" in message


def test_error_names_the_missing_weights(tmp_path):
  write_folder(tmp_path)
  (tmp_path / SAFETENSORS).unlink()
  assert f"holds no {SAFETENSORS} or {BIN}; put config.json" in expect_error(tmp_path)


# Tensors that do not fit.


def test_error_names_a_missing_tensor(tmp_path):
  tensors = dict(saved("vae"))
  del tensors[f"{ATTENTION}.to_q.bias"]
  message = expect_error(write_folder(tmp_path, tensors))
  assert message.endswith(f"config.json: {ATTENTION}.to_q.bias is missing")


def test_error_names_an_unexpected_tensor(tmp_path):
  tensors = {**saved("vae"), "stray": np.zeros(1, np.float32)}
  message = expect_error(write_folder(tmp_path, tensors))
  assert message.endswith("config.json: stray is unexpected")


def test_one_weight_with_old_and_new_name_is_refused(tmp_path):
  extra = {f"{ATTENTION}.query.bias": np.zeros(32, np.float32)}
  for tensors in ({**saved("vae"), **extra}, {**extra, **saved("vae")}):
    message = expect_error(write_folder(tmp_path, tensors))
    assert message.endswith(f"{ATTENTION}.query.bias is unexpected")


@pytest.mark.parametrize(
  ("name", "shape", "expected"),
  [
    ("encoder.conv_in.weight", (3, 3, 3, 16), (16, 3, 3, 3)),
    ("quant_conv.weight", (8, 8), (8, 8, 1, 1)),
    (f"{ATTENTION}.to_q.weight", (32, 32, 3, 3), (32, 32)),
    ("decoder.conv_out.bias", (), (3,)),
  ],
)
def test_error_for_a_wrong_shape_gives_both_shapes(name, shape, expected, tmp_path):
  tensors = {**saved("vae"), name: np.zeros(shape, np.float32)}
  message = expect_error(write_folder(tmp_path, tensors))
  assert message.endswith(f"{name} must have shape {expected}, has {shape}")


def test_error_names_at_most_five_tensors(tmp_path):
  extra = {f"stray.{i}": np.zeros(1, np.float32) for i in range(9)}
  message = expect_error(write_folder(tmp_path, {**saved("vae"), **extra}))
  assert len(re.findall(r"stray\.\d is unexpected", message)) == 5
  assert message.endswith("; and 4 more")


def test_config_that_does_not_match_the_tensors_is_refused(tmp_path):
  config = {**saved_config("vae"), "layers_per_block": 1}
  message = expect_error(write_folder(tmp_path, config=config))
  assert "decoder.up_blocks.0.resnets.2.conv1.bias is unexpected" in message


# Invalid weight files.


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("weights", WEIGHT_FILES)
def test_truncated_weights_are_refused(weights, share, tmp_path):
  write_as(tmp_path, weights)
  whole = (tmp_path / weights).read_bytes()
  (tmp_path / weights).write_bytes(whole[: int(share * len(whole))])
  message = expect_error(tmp_path)
  assert message.startswith(f"vae = {str(tmp_path / weights)!r}: must be ")


@pytest.mark.parametrize("held", [[1.0], {"step": 3}, 5, {"a": {"b": torch.ones(1)}}])
def test_bin_file_without_tensors_is_refused(held, tmp_path):
  assert "must hold a dict of named tensors" in expect_error(write_bin(tmp_path, held))


class Hostile:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return Path.touch, (Path(self.path),)


def test_code_in_a_bin_file_does_not_run(tmp_path):
  mark = tmp_path / "mark"
  write_bin(tmp_path / "vae", {**as_torch(saved("vae")), "stray": Hostile(mark)})
  assert "checkpoint that is safe to load" in expect_error(tmp_path)
  assert not mark.exists()


# The hub. A folder stands for it.


@pytest.fixture
def hub(monkeypatch):
  """Installs a fake huggingface_hub with this function; None removes the package."""

  def install(snapshot_download):
    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(
      sys.modules, "huggingface_hub", module if snapshot_download else None
    )

  return install


def hub_of(repository, cache):
  """A snapshot_download that copies matching files of one repository to `cache`."""

  def snapshot_download(name, allow_patterns):
    assert name == "some/model"
    for file in (path for path in repository.rglob("*") if path.is_file()):
      relative = file.relative_to(repository)
      if str(relative) in allow_patterns:
        (cache / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, cache / relative)
    return str(cache)

  return snapshot_download


@pytest.mark.parametrize("subfolder", ["", "vae"])
@pytest.mark.parametrize("weights", WEIGHT_FILES)
def test_model_on_the_hub_is_read(weights, subfolder, hub, tmp_path):
  repository, cache = tmp_path / "repository", tmp_path / "cache"
  cache.mkdir()
  write_as(repository / subfolder, weights)
  hub(hub_of(repository, cache))
  assert_same(load_vae("some/model")[1])


def test_bin_is_not_downloaded_when_safetensors_exist(hub, tmp_path):
  repository, cache = write_folder(tmp_path / "repository"), tmp_path / "cache"
  (repository / BIN).write_bytes(b"large")
  hub(hub_of(repository, cache))
  load_vae("some/model")
  assert not (cache / BIN).exists()


def assert_says_what_to_download(message):
  for part in ("vae = 'some/model'", "config.json", SAFETENSORS):
    assert part in message
  assert "https://huggingface.co/some/model" in message


def test_error_without_huggingface_hub_lists_files_to_download(hub):
  hub(None)
  message = expect_error("some/model")
  assert_says_what_to_download(message)
  assert "pip install huggingface_hub" in message


def test_error_without_network_lists_files_to_download(hub):
  def unreachable(name, allow_patterns):
    raise OSError("no route to host\nmore")

  hub(unreachable)
  message = expect_error("some/model")
  assert_says_what_to_download(message)
  assert "no route to host" in message


@pytest.mark.parametrize("name", ["absent", "/absent/folder", "a/b/c", "../x"])
def test_name_that_is_neither_folder_nor_hub_id_is_refused(
  name, hub, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  hub(None)
  assert expect_error(name).startswith(f"vae = {name!r}: ")
