"""Released PyTorch checkpoints of MDT, MDTv2 and DiT, to our parameters and back.

The released names and shapes are those of sail-sg/MDT (branches mdtv1 and main) and
facebookresearch/DiT. Stacked blocks here are numbered modules there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.embeddings import relative_position_index
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import SIZES, abstract_params
from mdt_jax.pretrained.tensors import Tensors, misfits, read_tensors, refuse

Params = dict[str, Any]

# Blocks after the side-interpolater of MDT v1: not to be seen in its tensors.
MDT_DECODE_DEPTH = 2

# Our names inside a block -> the released ones.
_BLOCK_NAMES = {
  "attention/qkv": "attn.qkv",
  "attention/proj": "attn.proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
  "modulation/linear": "adaLN_modulation.1",
  "skip": "skip_linear",
}
_BIAS_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
_BIAS_INDEX = "attn.rel_pos_bias.relative_position_index"

_OTHER_NAMES = {
  "patch_embed/linear": "x_embedder.proj",
  "timestep_embed/fc1": "t_embedder.mlp.0",
  "timestep_embed/fc2": "t_embedder.mlp.2",
  "final_layer/linear": "final_layer.linear",
  "final_layer/modulation/linear": "final_layer.adaLN_modulation.1",
  "label_embed/table": "y_embedder.embedding_table.weight",
  "pos_embed": "pos_embed",
  "decode_pos_embed": "decoder_pos_embed",
  "mask_token": "mask_token",
}


def from_torch(
  path: str | Path, *, decode_depth: int | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], Params]:
  """Reads a released checkpoint.

  Args:
    path: a .pt or .pth file (opened with weights_only=True, needs torch) or a
      .safetensors file. Of a dict with the entry "ema", as DiT's training saves it,
      the averages are read.
    decode_depth: of MDT v1, whose tensors do not show it; None for 2, as released.
    num_heads: of a DiT, whose tensors do not show it; None for the published sizes.

  Returns:
    (config, params): attributes for `MDT(**config)`, and its parameters, float32
    NumPy arrays.

  Raises:
    SettingError: the file is no such checkpoint, or tensors are missing, left over
      or of another shape.
  """
  return from_tensors(
    read_tensors(path),
    source=str(path),
    decode_depth=decode_depth,
    num_heads=num_heads,
  )


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  *,
  decode_depth: int | None = None,
  num_heads: int | None = None,
) -> tuple[dict[str, Any], Params]:
  """As `from_torch`, from named arrays."""
  config = infer_config(tensors, source)
  if decode_depth is not None:
    if config["variant"] != "MDT":
      raise SettingError(
        "--decode_depth",
        decode_depth,
        f"is of MDT v1 alone; {source} holds {config['variant']}",
      )
    config["decode_depth"] = decode_depth
  if num_heads is not None:
    config["num_heads"] = num_heads
  if config["num_heads"] is None:
    raise SettingError(
      "--num_heads", None, "must be given: the tensors of a DiT do not show it"
    )
  model = MDT(**config)
  try:
    model.check()
  except SettingError as error:
    raise SettingError("--input", source, f"{_describe(config)}, but {error}") from None
  _check_tensors(tensors, model, source)
  shapes = abstract_params(model)
  flat = {}
  for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items():
    arrays = [
      _to_ours(tensors[name], path, leaf.shape[stacked:])
      for name, stacked in _released_names(path, model)
    ]
    flat[path] = np.stack(arrays) if _is_stacked(path) else arrays[0]
  return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(config: Mapping[str, Any], params: Params) -> Tensors:
  """Our parameters under the released names and shapes, buffers included.

  Args:
    config: attributes of MDT, as `from_torch` returns them.
    params: parameters of `MDT(**config)`.

  Returns:
    name -> array; int64 for `relative_position_index`, else as in `params`.
  """
  model = MDT(**config)
  tensors = {}
  for path, value in flax.traverse_util.flatten_dict(params, sep="/").items():
    value = np.asarray(value)
    for layer, (name, stacked) in enumerate(_released_names(path, model)):
      array = value[layer] if stacked else value
      tensors[name] = np.array(_to_released(array, path, model), order="C")
      if name.endswith(_BIAS_TABLE):
        index = relative_position_index(model.input_size // model.patch_size)
        tensors[name.replace(_BIAS_TABLE, _BIAS_INDEX)] = index.astype(np.int64)
  return tensors


def infer_config(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
  """Attributes of MDT, read off the shapes of a released checkpoint.

  `num_heads` is None for a DiT whose width is none of the published ones.
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
    config = dict(
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
      config["num_heads"] = {
        size["hidden_size"]: size["num_heads"] for size in SIZES.values()
      }.get(hidden_size)
    else:
      config["num_heads"] = tensors[f"{first}.{_BIAS_TABLE}"].shape[1]
  except (KeyError, ValueError, IndexError, TypeError) as error:
    raise SettingError(
      "--input",
      source,
      f"holds no MDT, MDTv2 or DiT: {error!r} while reading its sizes",
    ) from None
  if variant == "MDTv2":
    config["decode_depth"] = _count(tensors, "de_blocks")
    config["depth"] = 2 * _count(tensors, "en_inblocks") + config["decode_depth"]
  else:
    config["depth"] = _count(tensors, "blocks")
    if variant == "MDT":
      config["decode_depth"] = MDT_DECODE_DEPTH
  return config


def _mlp_ratio(hidden_size: int, mlp_size: int) -> float:
  """The ratio of which int(hidden_size * ratio) is mlp_size, whatever the rounding."""
  ratio = mlp_size / hidden_size
  return (
    ratio if int(hidden_size * ratio) == mlp_size else math.nextafter(ratio, 2 * ratio)
  )


def _count(tensors: Mapping[str, np.ndarray], stack: str) -> int:
  numbers = {n.split(".")[1] for n in tensors if n.startswith(f"{stack}.")}
  return len(numbers)


def _describe(config: Mapping[str, Any]) -> str:
  size = "x".join(str(config[key]) for key in ("depth", "hidden_size", "patch_size"))
  return f"taken for {config['variant']} (depth x width x patch = {size})"


def _check_tensors(tensors: Mapping[str, np.ndarray], model: MDT, source: str) -> None:
  """Raises SettingError that names the tensors which do not fit the model."""
  expected = {}
  for path, leaf in flax.traverse_util.flatten_dict(
    abstract_params(model), sep="/"
  ).items():
    for name, stacked in _released_names(path, model):
      layer = jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype)
      released = functools.partial(_to_released, path=path, model=model)
      expected[name] = jax.eval_shape(released, layer).shape
      if name.endswith(_BIAS_TABLE):
        expected[name.replace(_BIAS_TABLE, _BIAS_INDEX)] = (model.num_tokens,) * 2
  problems = misfits(tensors, expected)
  index = relative_position_index(model.input_size // model.patch_size)
  problems = problems or [
    f"{name} orders the pairs of tokens in another way"
    for name, tensor in tensors.items()
    if name.endswith(_BIAS_INDEX) and not np.array_equal(tensor, index)
  ]
  refuse("--input", source, _describe(dataclasses.asdict(model)), problems)


def _is_stacked(path: str) -> bool:
  return "blocks/" in path


def _released_names(path: str, model: MDT) -> Iterator[tuple[str, bool]]:
  """The released tensors that make up one of our parameters, layer by layer.

  Yields:
    (name, whether our parameter has a leading axis of layers).
  """
  if not _is_stacked(path) and not path.startswith("side_block/"):
    yield _leaf_name(path, _OTHER_NAMES), False
    return
  stack, inside = path.split("/", 1)
  name = _leaf_name(inside, _BLOCK_NAMES)
  encoder_depth = model.depth - model.decode_depth if model.takes_mask else model.depth
  released, offset, count = {
    "side_block": ("sideblocks", 0, 1),
    "in_blocks": ("en_inblocks", 0, encoder_depth // 2),
    "out_blocks": ("en_outblocks", 0, encoder_depth // 2),
    "blocks": ("blocks", 0, encoder_depth),
    "decode_blocks": ("de_blocks", 0, model.decode_depth)
    if model.variant == "MDTv2"
    else ("blocks", encoder_depth, model.decode_depth),
  }[stack]
  for layer in range(count):
    yield f"{released}.{offset + layer}.{name}", stack != "side_block"


def _leaf_name(path: str, names: Mapping[str, str]) -> str:
  if path in names:
    return names[path]
  if path == "attention/relative_position_bias":
    return _BIAS_TABLE
  module, leaf = path.rsplit("/", 1)
  return f"{names[module]}.{'weight' if leaf == 'kernel' else leaf}"


def _to_released(array: Any, path: str, model: MDT) -> Any:
  """One layer of our parameter, in the released layout; also of traced arrays."""
  if path == "patch_embed/linear/kernel":
    p = model.patch_size
    return array.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
  if path.endswith("attention/qkv/kernel"):  # (D, 3, heads, D / heads)
    return array.reshape(model.hidden_size, -1).T
  if path.endswith("attention/qkv/bias"):
    return array.reshape(-1)
  if path.endswith("attention/proj/kernel"):  # (heads, D / heads, D)
    return array.reshape(-1, model.hidden_size).T
  if path.endswith("kernel"):
    return array.T
  if path in ("pos_embed", "decode_pos_embed"):
    return array[None]
  return array[None, None] if path == "mask_token" else array


def _to_ours(tensor: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `_to_released`; `shape` is that of one layer here."""
  if path == "patch_embed/linear/kernel":
    tensor = tensor.transpose(2, 3, 1, 0)
  elif path.endswith("kernel"):
    tensor = tensor.T
  # A copy: safetensors and torch may give views of memory that is not ours.
  return np.array(tensor, np.float32, order="C").reshape(shape)
