"""Reads a DiT in diffusers' format (`DiTTransformer2DModel`) under the released names.

Three things differ from the released file:
- Queries, keys and values have a matrix each.
- Each block has a copy of the embeddings of timestep and class; all copies are equal.
- The position embedding is not in the file. It is computed from the input size, which
  config.json beside the file gives.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.paths import expand_home
from mdt_jax.pretrained.diffusers_folders import (
  CONFIG_FILE,
  RELEASED_WEIGHTS,
  WEIGHT_FILES,
  read_config,
  weights_in,
)
from mdt_jax.pretrained.tensors import Tensors

SUBFOLDER = "transformer"  # folder of the network in a diffusers pipeline
NO_WEIGHTS = (  # end of the error for a folder without weights
  f"must be a file, or a folder with {RELEASED_WEIGHTS}, or with {CONFIG_FILE} and "
  f"{WEIGHT_FILES[0]}"
)
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
_MAX_POSITIONS = 2**25  # largest number of values of a position embedding
_FIRST_BLOCK = "transformer_blocks.0."
_EMBEDDINGS = ".norm1.emb."
# diffusers' name -> released name, for modules outside of blocks.
_MODULES = {
  "pos_embed.proj": "x_embedder.proj",
  "proj_out_1": "final_layer.adaLN_modulation.1",
  "proj_out_2": "final_layer.linear",
}
# The same inside a block.
_BLOCK_MODULES = {
  "norm1.linear": "adaLN_modulation.1",
  "attn1.to_out.0": "attn.proj",
  "ff.net.0.proj": "mlp.fc1",
  "ff.net.2": "mlp.fc2",
}
# The same inside the embeddings of a block.
_EMBEDDING_MODULES = {
  "timestep_embedder.linear_1": "t_embedder.mlp.0",
  "timestep_embedder.linear_2": "t_embedder.mlp.2",
  "class_embedder.embedding_table": "y_embedder.embedding_table",
}
# Settings of diffusers for which only one value is supported.
_FIXED = {
  "activation_fn": "gelu-approximate",
  "norm_type": "ada_norm_zero",
  "attention_bias": True,
  "norm_elementwise_affine": False,
}


def find_file(path: Path) -> Path:
  """Returns the file of weights that a path means.

  Args:
    path: a file; or a folder with `RELEASED_WEIGHTS`; or a folder with config.json and
      weights of diffusers, or with a subfolder `transformer` that holds them.

  Raises:
    SettingError: setting "path": a folder holds no weights.
  """
  path = expand_home(path)
  if not os.path.isdir(path):
    return path
  if os.path.isfile(path / RELEASED_WEIGHTS):
    return path / RELEASED_WEIGHTS
  for folder in (path, path / SUBFOLDER):
    if found := weights_in(folder):
      return found
  raise SettingError("path", str(path), NO_WEIGHTS)


def is_diffusers(tensors: Mapping[str, np.ndarray]) -> bool:
  """Returns whether tensors have the names of diffusers."""
  return any(name.startswith(_FIRST_BLOCK) for name in tensors)


def read_sizes(weights: Path) -> dict[str, Any]:
  """Reads the sizes that the tensors do not show from config.json beside a file.

  Args:
    weights: path of the file of weights.

  Returns:
    Values of "input_size", "num_heads" and "num_classes"; empty without a config.json.

  Raises:
    SettingError: setting "path", or a setting of config.json: the file is broken, or
      describes another network.
  """
  path = weights.parent / CONFIG_FILE
  if not os.path.lexists(path):
    return {}
  config = read_config(path, "path")
  name = config.get("_class_name", _CLASSES[0])
  if name not in _CLASSES:
    raise SettingError(
      f"_class_name of {path}", name, f"not supported; accepted is {_CLASSES[0]}"
    )
  for setting, value in _FIXED.items():
    if config.get(setting, value) != value:
      raise SettingError(
        f"{setting} of {path}", config[setting], f"not supported; accepted is {value!r}"
      )
  names = {
    "input_size": "sample_size",
    "num_heads": "num_attention_heads",
    "num_classes": "num_embeds_ada_norm",
  }
  sizes = {ours: config[name] for ours, name in names.items() if name in config}
  for ours, value in sizes.items():
    if type(value) is not int or value < 1:
      raise SettingError(
        f"{names[ours]} of {path}", value, "must be an integer of at least 1"
      )
  return sizes


def to_released(
  tensors: Mapping[str, np.ndarray], source: str, input_size: int | None
) -> Tensors:
  """Converts the tensors of a DiT in diffusers' format to the released format.

  Tensors of unknown names keep their names.

  Args:
    tensors: name -> array.
    source: name of the tensors in errors.
    input_size: height and width of the network's input; None if not known.

  Raises:
    SettingError: setting "tensors": blocks have different embeddings, or tensors do not
      fit together. Setting "input_size": it is needed and None, or does not fit.
  """
  embeddings: dict[str, str] = {}
  released: Tensors = {}
  for name, tensor in tensors.items():
    if _EMBEDDINGS in name:
      key = name.partition(_EMBEDDINGS)[2]
      first = tensors[embeddings.setdefault(key, name)]
      if not np.array_equal(first, tensor):
        raise SettingError(
          "tensors",
          source,
          f"{name} differs from {embeddings[key]}: a DiT has one embedding of timestep "
          "and class for all blocks",
        )
    new = _released_name(name)
    released[new] = tensor
  _fuse_attention(released, source)
  if "pos_embed.pos_embed" in released:
    released["pos_embed"] = released.pop("pos_embed.pos_embed")
  elif (kernel := released.get("x_embedder.proj.weight")) is not None:
    released["pos_embed"] = _positions(kernel, source, input_size)
  return released


def _released_name(name: str) -> str:
  """Returns the released name of a tensor; an unknown name stays as it is."""
  module, _, leaf = name.rpartition(".")
  if found := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
    number, inside = found[1], found[2]
    prefix = _EMBEDDINGS.strip(".") + "."
    if inside.startswith(prefix):
      known = _EMBEDDING_MODULES.get(inside.removeprefix(prefix))
      return f"{known}.{leaf}" if known else name
    known = _BLOCK_MODULES.get(inside, inside)
    return f"blocks.{number}.{known}.{leaf}"
  return f"{_MODULES.get(module, module)}.{leaf}" if module else name


def _fuse_attention(tensors: Tensors, source: str) -> None:
  """Joins queries, keys and values of each block to `attn.qkv`, in place."""
  for name in [name for name in tensors if ".attn1.to_q." in name]:
    parts = [name.replace(".to_q.", f".{part}.") for part in ("to_q", "to_k", "to_v")]
    if not all(part in tensors for part in parts):
      continue  # the missing tensor is named later
    arrays = [tensors.pop(part) for part in parts]
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim == 0:
      raise SettingError(
        "tensors", source, f"transformer_{name} and to_k, to_v must have equal shapes"
      )
    tensors[name.replace("attn1.to_q", "attn.qkv")] = np.concatenate(arrays)


def _positions(kernel: np.ndarray, source: str, input_size: int | None) -> np.ndarray:
  """Computes the position embedding (1, L, D) of a DiT from its patch embedding."""
  if input_size is None:
    raise SettingError(
      "input_size",
      None,
      f"must be given for {source}, which holds no position embedding; it is "
      f"sample_size of {CONFIG_FILE}, such as 32 for images of 256 pixels",
    )
  width, patch = (kernel.shape[0], kernel.shape[3]) if kernel.ndim == 4 else (0, 0)
  if (
    not kernel.size
    or width % 4
    or input_size < 1
    or input_size % patch
    or width * (input_size // patch) ** 2 > _MAX_POSITIONS
  ):
    raise SettingError(
      "input_size",
      input_size,
      f"does not fit the patches of {source}: pos_embed.proj.weight has shape "
      f"{kernel.shape}; accepted are sizes that the patch size divides",
    )
  return sincos_positions(width, input_size // patch)[None]
