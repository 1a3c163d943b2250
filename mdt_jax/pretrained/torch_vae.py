"""Reads and writes autoencoders in diffusers' format: config.json and weights.

The format is that of diffusers' `AutoencoderKL`. Module names of this package equal
those of diffusers, with `_0` in place of `.0`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.atomic import write_json
from mdt_jax.errors import SettingError, one_line
from mdt_jax.models.autoencoder_kl import AutoencoderKL
from mdt_jax.paths import expand_home, is_url
from mdt_jax.pretrained import hub
from mdt_jax.pretrained.diffusers_folders import (
  CONFIG_FILE,
  WEIGHT_FILES,
  read_config,
  weights_in,
)
from mdt_jax.pretrained.tensors import (
  Tensors,
  flatten,
  misfits,
  read_tensors,
  refuse,
  unflatten,
  write_tensors,
)
from mdt_jax.pretrained.torch_names import without_prefixes
from mdt_jax.types import Dtype, Params

SETTING = "vae"  # the setting that errors name
DEFAULT_ID = "stabilityai/sd-vae-ft-ema"  # the autoencoder that errors suggest
SUBFOLDER = "vae"  # folder of the autoencoder in a diffusers pipeline
_MAX_SHOWN = 200  # characters of a value in an error

# diffusers' setting -> attribute of `AutoencoderKL`; other settings have no effect.
_ATTRIBUTES = {
  name: name
  for name in (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "use_quant_conv",
    "use_post_quant_conv",
  )
} | {"mid_block_add_attention": "mid_block_attention"}
# Defaults of diffusers that differ from those of `AutoencoderKL` in this package.
_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1}
# Lists in config.json that are tuples in this package.
_TUPLES = ("block_out_channels", "latents_mean", "latents_std")
# Settings of diffusers for which only one value is supported.
_FIXED = {"_class_name": "AutoencoderKL", "act_fn": "silu"}
_BLOCK_TYPES = {
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}
# Linear layers of attention: name in older files -> name in newer files.
_OLD_ATTENTION = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}


def load_vae(
  name_or_folder: str | Path, dtype: Dtype = jnp.float32
) -> tuple[AutoencoderKL, Params]:
  """Reads an autoencoder in diffusers' format.

  Args:
    name_or_folder: a folder, a file of weights, or a Hugging Face hub id. The folder
      must hold config.json and a file of WEIGHT_FILES (.bin is opened with
      weights_only=True and needs torch), or a subfolder `vae` with these files. A file
      of weights must have config.json beside it. A hub id, such as
      "stabilityai/sd-vae-ft-ema", needs huggingface_hub.
    dtype: compute dtype, float32 or bfloat16.

  Returns:
    (model, params): the module and its parameters, float32 NumPy arrays. Copy the
    parameters to the devices with jax.device_put before repeated calls.

  Raises:
    SettingError: setting "vae", or a setting of config.json: the model does not exist,
      a file is broken, a setting is not supported, or tensors are missing, unexpected
      or of the wrong shape.
  """
  if is_url(os.fspath(name_or_folder)):
    raise SettingError(
      SETTING,
      str(name_or_folder),
      "must be a local folder or a Hugging Face id: copy it to a local disk first",
    )
  path = expand_home(name_or_folder)
  weights = path if os.path.isfile(path) else None
  folder = path.parent if weights else path
  if not os.path.isdir(folder):
    folder = _download(str(name_or_folder))
  has_config = os.path.isfile(folder / CONFIG_FILE)
  if not weights and not has_config and os.path.isdir(folder / SUBFOLDER):
    folder = folder / SUBFOLDER
  model = AutoencoderKL(**_read_config(folder / CONFIG_FILE), dtype=dtype)
  weights = weights or weights_in(folder)
  if weights is None:
    raise SettingError(
      SETTING,
      str(folder),
      f"holds no {' or '.join(WEIGHT_FILES[:2])}; {_by_hand(DEFAULT_ID, 'it')}",
    )
  return model, _from_tensors(_read_weights(weights), model, weights)


def save_vae(folder: str | Path, model: AutoencoderKL, params: Params) -> None:
  """Writes an autoencoder in diffusers' format: config.json and weights.

  Args:
    folder: output folder; created if needed.
    model: the autoencoder.
    params: its parameters.
  """
  folder = Path(folder)
  levels = len(model.block_out_channels)
  config = {name: getattr(model, ours) for name, ours in _ATTRIBUTES.items()}
  config |= {name: [block] * levels for name, block in _BLOCK_TYPES.items()}
  config |= _FIXED
  write_tensors(folder / WEIGHT_FILES[0], vae_to_torch(params))
  write_json(folder / CONFIG_FILE, config)


def vae_to_torch(params: Params) -> Tensors:
  """Converts parameters to tensors with diffusers' names and shapes; keeps dtypes."""
  return {
    _torch_name(path): np.array(_to_torch(np.asarray(value)), order="C")
    for path, value in flatten(params).items()
  }


def abstract_vae_params(model: AutoencoderKL) -> Params:
  """Returns shapes and dtypes of the parameters, without computing values."""

  def init(images: jax.Array) -> Params:
    return model.init(jax.random.key(0), images)["params"]

  side = model.downsampling
  shape = (1, side, side, model.in_channels)
  return jax.eval_shape(init, jax.ShapeDtypeStruct(shape, jnp.float32))


def _from_tensors(tensors: Tensors, model: AutoencoderKL, path: Path) -> Params:
  """Converts diffusers' tensors to parameters; `path` is their file, for errors."""
  tensors = _modern(without_prefixes(tensors, SETTING, str(path)))
  params = flatten(abstract_vae_params(model))
  shapes = {
    _torch_name(ours): jax.eval_shape(_to_torch, leaf).shape
    for ours, leaf in params.items()
  }
  read_as = f"read as the network of its {CONFIG_FILE}"
  refuse(SETTING, path, read_as, misfits(tensors, shapes))
  return unflatten(
    {
      # A copy, because safetensors and torch may return views of shared memory.
      ours: np.array(_to_ours(tensors[_torch_name(ours)]), np.float32, order="C")
      for ours in params
    }
  )


def _read_config(path: Path) -> dict[str, Any]:
  """Reads the attributes of `AutoencoderKL` from diffusers' config.json."""
  if not os.path.lexists(path):
    raise SettingError(
      SETTING,
      str(path.parent),
      f"holds no {CONFIG_FILE}; {_by_hand(DEFAULT_ID, 'it')}",
    )
  config = _DEFAULTS | read_config(path, SETTING)
  _check_values(path, config, _FIXED)
  attributes = {
    ours: config[name] for name, ours in _ATTRIBUTES.items() if name in config
  }
  for name in _TUPLES:
    if isinstance(value := attributes.get(name), list):
      attributes[name] = tuple(value)
  attributes["shift_factor"] = config.get("shift_factor") or 0.0
  try:
    AutoencoderKL(**attributes).check()
  except SettingError as error:
    names = {ours: theirs for theirs, ours in _ATTRIBUTES.items()}
    name = names[error.setting]
    raise _unsupported(name, path, error.value, error.accepted) from None
  levels = len(attributes["block_out_channels"])
  blocks = {name: [block] * levels for name, block in _BLOCK_TYPES.items()}
  _check_values(path, config, blocks)
  return attributes


def _check_values(
  path: Path, config: Mapping[str, Any], accepted: Mapping[str, Any]
) -> None:
  """Raises SettingError if a setting of config.json has another value."""
  for name, value in accepted.items():
    if config.get(name, value) != value:
      raise _unsupported(
        name, path, config[name], f"not supported; accepted is {value!r}"
      )


def _unsupported(name: str, path: Path, value: Any, accepted: str) -> SettingError:
  """Builds the error for a setting of config.json; shortens long values."""
  if len(repr(value)) > _MAX_SHOWN:
    value = f"{repr(value)[:_MAX_SHOWN]}…"
  return SettingError(f"{name} of {path}", value, accepted)


def _read_weights(path: Path) -> Tensors:
  """Reads tensors by `read_tensors`; errors name the setting "vae"."""
  try:
    return read_tensors(path)
  except SettingError as error:
    raise SettingError(SETTING, str(path), error.accepted) from None


def _modern(tensors: Tensors) -> Tensors:
  """Converts the attention tensors of older files to the names of newer files."""
  modern = {}
  for name, tensor in tensors.items():
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if parent.endswith("mid_block.attentions.0") and last in _OLD_ATTENTION:
      new = f"{parent}.{_OLD_ATTENTION[last]}.{leaf}"
      name = name if new in tensors else new  # `refuse` rejects a file with both
    if ".attentions.0." in name and tensor.shape[2:] == (1, 1):
      tensor = tensor[:, :, 0, 0]  # a 1x1 convolution
    modern[name] = tensor
  return modern


def _torch_name(path: str) -> str:
  """encoder/down_blocks_0/resnets_1/conv1/kernel -> encoder.down_blocks.0.….weight"""
  module, leaf = path.rsplit("/", 1)
  module = re.sub(r"_(\d+)", r".\1", module).replace("/", ".")
  return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


def _to_torch(array: np.ndarray) -> np.ndarray:
  """HWIO -> OIHW for convolutions, (I, O) -> (O, I) for matrices."""
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_ours(tensor: np.ndarray) -> np.ndarray:
  """Inverts `_to_torch`."""
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _by_hand(name: str, where: str) -> str:
  """Returns a hint, for errors, how to download a model by hand."""
  return (
    f"put {CONFIG_FILE} and {WEIGHT_FILES[0]} of https://huggingface.co/{name} "
    f"into {where}"
  )


def _download(name: str) -> Path:
  """Downloads a model from the Hugging Face hub and returns its folder."""
  if not hub.is_repository(name):
    raise SettingError(
      SETTING, name, f"must be an existing folder; {_by_hand(DEFAULT_ID, 'it')}"
    )
  by_hand = (
    f"must be an existing folder; {_by_hand(name, 'a folder and pass its path')}"
  )
  try:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise SettingError(
      SETTING, name, f"{by_hand} (or: pip install huggingface_hub)"
    ) from None

  def download(weights: str) -> Path:
    patterns = [
      f"{at}{f}" for at in ("", f"{SUBFOLDER}/") for f in (CONFIG_FILE, weights)
    ]
    return Path(snapshot_download(name, allow_patterns=patterns))

  folder = Path()
  try:
    for weights in WEIGHT_FILES:
      folder = download(weights)
      if any(folder.rglob(weights)):
        break
    return folder
  except Exception as error:  # network, access rights, or unknown name
    reason = one_line(error)
    raise SettingError(SETTING, name, f"{by_hand} (hub error: {reason})") from None
