"""Converts PyTorch checkpoints of MDT, MDTv2 and DiT to and from flax parameters.

`torch_mdt_layout` defines the names and layouts of the released tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError, check_choice, renamed_in_errors
from mdt_jax.models.registry import (
  NETWORKS,
  SIZES,
  Model,
  abstract_params,
  create_model,
)
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained.tensors import (
  Tensors,
  flatten,
  misfits,
  read_tensors,
  refuse,
  unflatten,
)
from mdt_jax.types import Array, Params

# decode_depth of the released MDT v1, which cannot be inferred from the tensors.
MDT_DECODE_DEPTH = 2


def from_torch(
  path: str | Path,
  network: str | None = None,
  *,
  decode_depth: int | None = None,
  num_heads: int | None = None,
) -> tuple[dict[str, Any], Params]:
  """Reads a PyTorch checkpoint of MDT, MDTv2 or DiT.

  Args:
    path: a .pt or .pth file (opened with weights_only=True; needs torch) or a
      .safetensors file. If the file holds a dict with the entry "ema", as DiT's
      training code saves it, that entry (averaged parameters) is read.
    network: expected network, "DiT", "MDT" or "MDTv2"; None to infer the network from
      the tensors.
    decode_depth: decode_depth of an MDT v1, which the tensors do not determine; None
      for 2, as released. Must be None for other networks.
    num_heads: number of heads of a DiT, which the tensors do not determine; None for
      that of the published size of the same width.

  Returns:
    (attributes, params): attributes for `create_model(**attributes)`, and the
    parameters of that network, float32 NumPy arrays.

  Raises:
    SettingError: the file is not such a checkpoint; tensors are missing, unexpected or
      of the wrong shape; `network` is unknown or differs from the network of the
      tensors; `num_heads` is None for a DiT of unpublished width.
  """
  if network is not None:
    check_choice("network", network, NETWORKS)
  with renamed_in_errors({"tensors": "path"}):
    return from_tensors(
      read_tensors(path),
      str(path),
      network,
      decode_depth=decode_depth,
      num_heads=num_heads,
    )


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  network: str | None = None,
  *,
  decode_depth: int | None = None,
  num_heads: int | None = None,
) -> tuple[dict[str, Any], Params]:
  """Same as `from_torch`, for tensors in memory.

  Args:
    tensors: released name -> array.
    source: name of the tensors in errors.
    network, decode_depth, num_heads: see `from_torch`.
  """
  attributes = infer_attributes(tensors, source)
  variant = attributes["variant"]
  if network is not None:
    check_choice("network", network, NETWORKS)
    if network != variant:
      raise SettingError("network", network, f"must be {variant}, as in {source}")
  if decode_depth is not None:
    if variant != "MDT":
      raise SettingError(
        "decode_depth", decode_depth, f"must be None: {source} holds {variant}, not MDT"
      )
    attributes["decode_depth"] = decode_depth
  if num_heads is not None:
    attributes["num_heads"] = num_heads
  if attributes["num_heads"] is None:
    raise SettingError(
      "num_heads", None, "must be given for a DiT of unpublished width"
    )
  taken_for = _describe(attributes)
  try:
    model = create_model(**attributes)
  except SettingError as error:
    raise SettingError("tensors", source, f"{taken_for}, but {error}") from None
  params = flatten(abstract_params(model))
  refuse("tensors", source, taken_for, _misfits(tensors, model, params))
  arrays = {
    path: _read_param(tensors, path, leaf.shape, model) for path, leaf in params.items()
  }
  return attributes, unflatten(arrays)


def to_torch(attributes: Mapping[str, Any], params: Params) -> Tensors:
  """Converts parameters to tensors with the released names and shapes.

  Args:
    attributes: attributes of the network, as `from_torch` returns them.
    params: parameters of `create_model(**attributes)`.

  Returns:
    name -> array, including buffers. `relative_position_index` is int64; all other
    arrays keep their dtype of `params`.

  Raises:
    SettingError: an attribute is invalid, or the network has a condition other than
      labels.
  """
  model = create_model(**attributes)
  if model.condition is not None:
    raise SettingError(
      "condition", model.condition, "must be None: released networks use labels"
    )
  tensors = {}
  for path, param in flatten(params).items():
    value = np.asarray(param)
    layers = value if layout.is_stacked(path) else value[None]
    names = layout.released_names(path, model)
    for name, layer in zip(names, layers, strict=True):
      tensors[name] = np.array(layout.to_released(layer, path, model), order="C")
      if index := layout.index_name(name):
        tensors[index] = layout.position_index(model)
  return tensors


def infer_attributes(
  tensors: Mapping[str, np.ndarray], source: str = "tensors"
) -> dict[str, Any]:
  """Infers the attributes of a network from the names and shapes of its tensors.

  Args:
    tensors: released name -> array.
    source: name of the tensors in errors.

  Returns:
    Attributes for `create_model`. `num_heads` is None for a DiT of unpublished width;
    `decode_depth` of an MDT v1 is MDT_DECODE_DEPTH.

  Raises:
    SettingError: a tensor that determines an attribute is missing or has the wrong
      number of axes.
  """
  try:
    if any(name.startswith("en_inblocks.") for name in tensors):
      variant, first = "MDTv2", "en_inblocks.0"
    elif "de_blocks.0.attn.qkv.weight" in tensors:
      variant, first = "MDTv2", "de_blocks.0"
    else:
      variant = "MDT" if "decoder_pos_embed" in tensors else "DiT"
      first = "blocks.0"
    hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    length = tensors["pos_embed"].shape[1]
    out_rows = tensors["final_layer.linear.weight"].shape[0]
    attributes: dict[str, Any] = dict(
      variant=variant,
      input_size=round(length**0.5) * patch_size,
      patch_size=patch_size,
      in_channels=in_channels,
      num_classes=tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
      hidden_size=hidden_size,
      mlp_ratio=_mlp_ratio(hidden_size, tensors[f"{first}.mlp.fc1.weight"].shape[0]),
      learn_sigma=out_rows == 2 * in_channels * patch_size**2,
    )
    if variant == "DiT":
      attributes["num_heads"] = {
        size["hidden_size"]: size["num_heads"] for size in SIZES.values()
      }.get(hidden_size)
    else:
      attributes["num_heads"] = tensors[f"{first}.{layout.BIAS_TABLE}"].shape[1]
  except (KeyError, ValueError, IndexError, TypeError) as error:
    raise SettingError(
      "tensors",
      source,
      f"must hold an MDT, MDTv2 or DiT; its sizes cannot be read: {error!r}",
    ) from None
  if variant == "MDTv2":
    attributes["decode_depth"] = _count(tensors, "de_blocks")
    pairs = _count(tensors, "en_inblocks")
    attributes["depth"] = 2 * pairs + attributes["decode_depth"]
  else:
    attributes["depth"] = _count(tensors, "blocks")
    if variant == "MDT":
      attributes["decode_depth"] = MDT_DECODE_DEPTH
  return attributes


def _mlp_ratio(hidden_size: int, mlp_size: int) -> float:
  """Returns a ratio with int(hidden_size * ratio) == mlp_size despite rounding."""
  ratio = mlp_size / hidden_size
  return (
    ratio if int(hidden_size * ratio) == mlp_size else math.nextafter(ratio, 2 * ratio)
  )


def _count(tensors: Mapping[str, np.ndarray], stack: str) -> int:
  """Returns the number of blocks in a stack, such as "de_blocks"."""
  return len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})


def _describe(attributes: Mapping[str, Any]) -> str:
  """Describes, for errors, which network the tensors were read as."""
  sizes = (attributes[key] for key in ("depth", "hidden_size", "patch_size"))
  size = "x".join(map(str, sizes))
  return f"read as {attributes['variant']} (depth x width x patch = {size})"


def _misfits(
  tensors: Mapping[str, np.ndarray], model: Model, params: Mapping[str, Array]
) -> list[str]:
  """Describes the tensors that do not fit the model; empty if all tensors fit."""
  if problems := misfits(tensors, layout.released_shapes(model, params)):
    return problems
  index = layout.position_index(model)
  return [
    f"{name} must be the position index of the released code"
    for name, tensor in tensors.items()
    if name.endswith(layout.BIAS_INDEX) and not np.array_equal(tensor, index)
  ]


def _read_param(
  tensors: Mapping[str, np.ndarray], path: str, shape: tuple[int, ...], model: Model
) -> np.ndarray:
  """Builds the parameter at `path`, of `shape`, from its released tensors."""
  stacked = layout.is_stacked(path)
  layers = [
    layout.from_released(tensors[name], path, shape[1:] if stacked else shape)
    for name in layout.released_names(path, model)
  ]
  return np.stack(layers) if stacked else layers[0]
