"""Converts released PyTorch checkpoints to and from flax parameters.

`torch_mdt_layout` defines the names and layouts of the released tensors,
`torch_mdt_sizes` infers the sizes of a network from them, and `diffusers_dit` converts
tensors in diffusers' format to them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from ml_dtypes import bfloat16

from mdt_jax.errors import SettingError, check_choice, renamed_in_errors
from mdt_jax.models.registry import NETWORKS, Model, abstract_params, create_model
from mdt_jax.pretrained import (
  bucket_weights,
  condition_tensors,
  diffusers_dit,
  torch_layouts,
)
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained import torch_mdt_sizes as sizes
from mdt_jax.pretrained.tensors import (
  Tensors,
  flatten,
  misfits,
  read_weight_file,
  refuse,
  unflatten,
)
from mdt_jax.pretrained.torch_names import without_prefixes
from mdt_jax.types import Array, Params


class Checkpoint(NamedTuple):
  """A network of a PyTorch file.

  Attributes:
    attributes: attributes for `create_model(**attributes)`.
    params: parameters of that network, float32 NumPy arrays.
    metadata: what the file says about itself, see `tensors.WeightFile`.
  """

  attributes: dict[str, Any]
  params: Params
  metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
  """A network of a PyTorch file, whose parameters are read one at a time.

  Attributes:
    attributes, metadata: see `Checkpoint`.
    paths: paths of the parameters, such as "decode_blocks/fc1/kernel".
    read: path -> parameter, a float32 NumPy array. Other parameters take no memory,
      because the file is mapped.
  """

  attributes: dict[str, Any]
  metadata: Mapping[str, Any]
  paths: tuple[str, ...]
  read: Callable[[str], np.ndarray]

  def params(self) -> Params:
    """Reads all parameters."""
    return unflatten({path: self.read(path) for path in self.paths})


class KnownSizes(TypedDict, total=False):
  """What the caller knows of a network beyond its tensors; see `from_torch`.

  process: the process that trained the network, a key of `diffusion.PROCESSES`. With
    "flow", a DiT whose last layer has 2C channels is read as a SiT, unless `network`
    says "DiT". With any process, hints that a DiT may be a SiT are ignored.
  """

  decode_depth: int | None
  num_heads: int | None
  mixer_num_heads: int | None
  decoder_num_heads: int | None
  num_classes: int | None
  input_size: int | None
  process: str | None


def from_torch(
  path: str | os.PathLike[str],
  network: str | None = None,
  *,
  decode_depth: int | None = None,
  num_heads: int | None = None,
  mixer_num_heads: int | None = None,
  decoder_num_heads: int | None = None,
  num_classes: int | None = None,
  input_size: int | None = None,
) -> tuple[dict[str, Any], Params]:
  """Reads a PyTorch checkpoint of a network of this package.

  Args:
    path: a .pt, .pth or .bin file (opened with weights_only=True; needs torch), a
      .safetensors file, or a folder of a DiT in diffusers' format; on a local disk or
      in a bucket (gs://…). Training checkpoints are read as `tensors.read_tensors`
      says: averaged parameters ("ema") first. Prefixes of wrapped networks, such as
      "module.", are removed.
    network: expected network, a key of `registry.NETWORKS` such as "DiT"; None to infer
      the network from the tensors. A SiT or TREAD has tensors of the names and shapes
      of a DiT, and is read as a DiT if neither `network` nor the file says otherwise.
      The route of a TREAD is the default one unless the file states another.
      "MicroDiT" accepts a MicroDiTText too, the released network, which reads captions.
    decode_depth: decode_depth of an MDT v1, which the tensors do not determine; None
      for that which the file states, else 2, as released. Must be None for other
      networks.
    num_heads: number of heads of a DiT, SiT, TREAD, MaskDiT or MicroDiT(Text), which
      the tensors do not determine; None for that which the file states, else that of
      the published size of the same width.
    mixer_num_heads: number of heads of the mixer of a MicroDiT; None for that which the
      file states, else heads as large as those of the other blocks. Must be None for
      other networks.
    decoder_num_heads: number of heads of the decoder of a MaskDiT; None for that which
      the file states, else 16 for the released width of 512. Must be None for other
      networks.
    num_classes: number of classes, without the null label. If the label table has
      num_classes rows, the network has no null label (label_dropout 0). None for that
      which the file states, else the last row is that of the null label.
    input_size: height and width of the input of a DiT in diffusers' format, whose
      tensors do not show the size; None for that of config.json beside the file. Also
      that of a SPRINT; None for that which the file states.

  Returns:
    (attributes, params): attributes for `create_model(**attributes)`, and the
    parameters of that network, float32 NumPy arrays.

  Raises:
    SettingError: the file is not such a checkpoint, or seems to hold a SiT while
      `network` is None; tensors are missing, unexpected or of the wrong shape;
      `network` is unknown or differs from the network of the tensors; an argument is
      needed and None, or does not fit the tensors.
  """
  attributes, params, _ = read_checkpoint(
    path,
    network,
    decode_depth=decode_depth,
    num_heads=num_heads,
    mixer_num_heads=mixer_num_heads,
    decoder_num_heads=decoder_num_heads,
    num_classes=num_classes,
    input_size=input_size,
  )
  return attributes, params


def read_checkpoint(
  path: str | os.PathLike[str], network: str | None = None, **known: Unpack[KnownSizes]
) -> Checkpoint:
  """Same as `from_torch`, with the metadata of the file."""
  opened = open_checkpoint(path, network, **known)
  return Checkpoint(opened.attributes, opened.params(), dict(opened.metadata))


def open_checkpoint(
  path: str | os.PathLike[str], network: str | None = None, **known: Unpack[KnownSizes]
) -> OpenCheckpoint:
  """Same as `from_torch`, but reads parameters when they are asked for."""
  if network is not None:
    check_choice("network", network, NETWORKS)
  with (
    bucket_weights.local_weights(path) as local,
    renamed_in_errors({"tensors": "path"}),
  ):
    file = diffusers_dit.find_file(local)
    tensors, metadata = read_weight_file(file)
    tensors = without_prefixes(tensors, "tensors", str(path))
    if diffusers_dit.is_diffusers(tensors):
      metadata = {**metadata, **diffusers_dit.read_sizes(file)}
    return _open_network(tensors, str(path), network, metadata, **known)


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  network: str | None = None,
  *,
  metadata: Mapping[str, Any] | None = None,
  **known: Unpack[KnownSizes],
) -> tuple[dict[str, Any], Params]:
  """Same as `from_torch`, for tensors in memory.

  Args:
    tensors: released name, or name in diffusers' format -> array.
    source: name of the tensors in errors.
    network: see `from_torch`.
    metadata: what a file says about the tensors, see `tensors.WeightFile`.
    **known: decode_depth, num_heads, num_classes, input_size and the like: see
      `from_torch`.
  """
  if network is not None:
    check_choice("network", network, NETWORKS)
  tensors = without_prefixes(tensors, "tensors", source)
  opened = _open_network(tensors, source, network, metadata or {}, **known)
  return opened.attributes, opened.params()


def _open_network(
  tensors: Tensors,
  source: str,
  network: str | None,
  metadata: Mapping[str, Any],
  *,
  decode_depth: int | None = None,
  num_heads: int | None = None,
  mixer_num_heads: int | None = None,
  decoder_num_heads: int | None = None,
  num_classes: int | None = None,
  input_size: int | None = None,
  process: str | None = None,
) -> OpenCheckpoint:
  """Checks tensors without prefixes, and returns the network that they hold."""
  known = sizes.stated_sizes(metadata)
  if diffusers_dit.is_diffusers(tensors):
    size = known.get("input_size") if input_size is None else input_size
    tensors = diffusers_dit.to_released(tensors, source, size)
  elif input_size is not None:
    known["input_size"] = input_size
  note = sizes.read_notes(metadata).get(condition_tensors.NOTE)
  note = note if isinstance(note, dict) else None
  if not condition_tensors.has_labels(note):
    known["no_label_table"] = 1
    known.setdefault("num_classes", 1)
  found = torch_layouts.find_layout(tensors)
  infer = found.infer_attributes or sizes.infer_attributes
  attributes = infer(tensors, source, known, num_classes)
  if found is torch_layouts.DIT_LAYOUT:
    attributes = sizes.tell_dits_apart(
      tensors, attributes, metadata, source, network, process
    )
  variant = attributes["variant"]
  # "MicroDiT" also means the released network, which reads captions.
  if network not in (None, variant, variant.removesuffix("Text")):
    raise SettingError("network", network, f"must be {variant}, as in {source}")
  if input_size is not None and input_size != attributes["input_size"]:
    raise SettingError(
      "input_size", input_size, f"must be {attributes['input_size']}, as in {source}"
    )
  if decode_depth is not None:
    if variant != "MDT":
      raise SettingError(
        "decode_depth", decode_depth, f"must be None: {source} holds {variant}, not MDT"
      )
    attributes["decode_depth"] = decode_depth
  own = {"MicroDiT": "mixer_num_heads", "MaskDiT": "decoder_num_heads"}
  heads = {"mixer_num_heads": mixer_num_heads, "decoder_num_heads": decoder_num_heads}
  for owner, name in own.items():
    if heads[name] is not None and name not in attributes:
      accepted = f"must be None: {source} holds {variant}, not {owner}"
      raise SettingError(name, heads[name], accepted)
  for name, count in {"num_heads": num_heads, **heads}.items():
    if count is not None:
      attributes[name] = count
  for name in ("num_heads", "decoder_num_heads"):
    if attributes.get(name, 1) is None:
      accepted = f"must be given for a {variant} of unpublished width"
      raise SettingError(name, None, accepted)
  _check_mixer(attributes)
  if note is not None:
    condition = condition_tensors.condition_of(note, attributes, source)
    attributes["condition"] = condition
  read_as = sizes.describe(attributes)
  try:
    model = create_model(**attributes)
  except SettingError as error:
    raise SettingError("tensors", source, f"{read_as}, but {error}") from None
  params = flatten(abstract_params(model))
  refuse("tensors", source, read_as, _misfits(tensors, model, params))

  own = condition_tensors.own_paths(model)

  def read(path: str) -> np.ndarray:
    if path in own:
      return np.array(tensors[condition_tensors.tensor_name(path)], np.float32)
    return _read_param(tensors, path, params[path].shape, model)

  return OpenCheckpoint(attributes, metadata, tuple(params), read)


def _check_mixer(attributes: Mapping[str, Any]) -> None:
  """Raises SettingError if the heads of a mixer are not known, and have no default."""
  if attributes.get("mixer_num_heads", 1) is not None:
    return
  size, rest = divmod(attributes["hidden_size"], attributes["num_heads"])
  if rest == 0 and attributes["mixer_hidden_size"] % size:
    accepted = "must be given: the tensors do not show it, and heads as large as those "
    accepted += f"of the other blocks, {size}, do not divide the width of the mixer"
    raise SettingError("mixer_num_heads", None, accepted)


def attributes_of(model: Model) -> dict[str, Any]:
  """The attributes of a network, for `to_torch` and `create_model`."""
  return {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ("parent", "name")
  }


def to_torch(attributes: Mapping[str, Any], params: Params) -> Tensors:
  """Converts parameters to tensors with the released names and shapes.

  Args:
    attributes: attributes of the network, as `from_torch` returns them.
    params: parameters of `create_model(**attributes)`.

  Returns:
    name -> array, including buffers. `relative_position_index` is int64; all other
    arrays keep their dtype of `params`. The names of the layers of a condition other
    than labels are those of `condition_tensors`.

  Raises:
    SettingError: an attribute is invalid, the input is not a square, or the network has
      a bottleneck before its tokens or a condition of the reader's own.
  """
  model = create_model(**attributes)
  height, width, _ = model.input_shape
  if height != width:
    raise SettingError(
      "input_size",
      (height, width),
      "must be a square: released networks hold no others",
    )
  if bottleneck := getattr(model, "patch_bottleneck", 0):
    raise SettingError(
      "patch_bottleneck", bottleneck, "must be 0: released networks have none"
    )
  if not condition_tensors.is_stored(model.condition):
    name = type(model.condition).__name__
    raise SettingError("condition", name, "must be one of this package")
  tensors, released = {}, torch_layouts.layout_of(model)
  own = condition_tensors.own_paths(model)
  for path, param in flatten(params).items():
    value = np.asarray(param)
    if path in own:
      tensors[condition_tensors.tensor_name(path)] = np.array(value, order="C")
      continue
    layers = value if layout.is_stacked(path) else value[None]
    names = released.released_names(path, model)
    for name, layer in zip(names, layers, strict=True):
      tensors[name] = np.array(released.to_released(layer, path, model), order="C")
      if index := layout.index_name(name):
        tensors[index] = layout.position_index(model)
  return tensors


def _misfits(
  tensors: Mapping[str, np.ndarray], model: Model, params: Mapping[str, Array]
) -> list[str]:
  """Describes the tensors that do not fit the model; empty if all tensors fit."""
  if problems := misfits(tensors, torch_layouts.released_shapes(model, params)):
    return problems
  index: np.ndarray | None = None
  problems = []
  for name, tensor in tensors.items():
    if name.endswith(layout.BIAS_INDEX):
      index = layout.position_index(model) if index is None else index
      if not np.array_equal(tensor, index):
        problems.append(f"{name} must be the position index of the released code")
    elif not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != bfloat16:
      problems.append(f"{name} must hold floats, holds {tensor.dtype}")
  return problems


def _read_param(
  tensors: Mapping[str, np.ndarray], path: str, shape: tuple[int, ...], model: Model
) -> np.ndarray:
  """Builds the parameter at `path`, of `shape`, from its released tensors."""
  stacked, released = layout.is_stacked(path), torch_layouts.layout_of(model)
  shape = shape[1:] if stacked else shape
  layers = [
    released.from_released(tensors[name], path, shape, model)
    for name in released.released_names(path, model)
  ]
  return np.stack(layers) if stacked else layers[0]
