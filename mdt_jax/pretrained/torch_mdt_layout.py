"""Names, shapes and layouts of the released tensors of MDT, MDTv2, DiT, SiT and TREAD.

The sources are sail-sg/MDT (branches mdtv1 and main), facebookresearch/DiT, and
willisma/SiT and CompVis/tread, whose names and shapes are DiT's. In the released code
each block has its own tensors. In this package the parameters of a stack of blocks have
a leading axis of layers.

In this module, `path` is the path of a parameter of this package, such as
"decode_blocks/attention/qkv/kernel".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mdt_jax.models.embeddings import relative_position_index
from mdt_jax.models.registry import Model

BIAS_TABLE = "attn.rel_pos_bias.relative_position_bias_table"
BIAS_INDEX = "attn.rel_pos_bias.relative_position_index"  # a buffer, not a parameter

# Path inside a block -> released name inside a block, in the order of PyTorch.
BLOCK_NAMES = {
  "attention/qkv": "attn.qkv",
  "attention/proj": "attn.proj",
  "attention/relative_position_bias": BIAS_TABLE,
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
  "modulation/linear": "adaLN_modulation.1",
  "skip": "skip_linear",
}
# Path outside of blocks -> released name.
OTHER_NAMES = {
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
# Modules of the released code in the order of `module.parameters()`.
_MODULE_ORDER = (
  "pos_embed",
  "decoder_pos_embed",
  "mask_token",
  "x_embedder.proj",
  "t_embedder.mlp.0",
  "t_embedder.mlp.2",
  "y_embedder.embedding_table",
  "blocks",
  "en_inblocks",
  "en_outblocks",
  "de_blocks",
  "sideblocks",
  "final_layer.linear",
  "final_layer.adaLN_modulation.1",
)
_ORDER_IN_BLOCK = tuple(BLOCK_NAMES.values())
# (stack, layer)?, module, (weight or bias)?
_PARAMETER = re.compile(r"(?:(\w*blocks)\.(\d+)\.)?(.+?)(?:\.(weight|bias))?")


def is_stacked(path: str) -> bool:
  """Returns whether a parameter has a leading axis of layers."""
  return "blocks/" in path


def released_names(path: str, model: Model) -> Iterator[str]:
  """Yields the names of the released tensors of a parameter, one per layer."""
  if not is_stacked(path) and not path.startswith("side_block/"):
    yield leaf_name(path, OTHER_NAMES)
    return
  stack, inside = path.split("/", 1)
  name = leaf_name(inside, BLOCK_NAMES)
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
    yield f"{released}.{offset + layer}.{name}"


def parameter_order(name: str) -> tuple[int, int, int, bool]:
  """Returns the key that sorts parameters as `module.parameters()` in PyTorch does.

  Args:
    name: name of a released tensor that is not a buffer.
  """
  match = _PARAMETER.fullmatch(name)
  assert match is not None
  stack, layer, module, leaf = match.groups()
  place = _ORDER_IN_BLOCK.index(module) if stack else 0
  return _MODULE_ORDER.index(stack or module), int(layer or 0), place, leaf == "bias"


def index_name(name: str) -> str | None:
  """Returns the index buffer that belongs to a bias table; None for other tensors."""
  return name.replace(BIAS_TABLE, BIAS_INDEX) if name.endswith(BIAS_TABLE) else None


def position_index(model: Model) -> Int[np.ndarray, "L L"]:
  """Returns the index buffer of a block: `relative_position_index` in int64."""
  return relative_position_index(model.grid_size).astype(np.int64)


def to_released(array: Any, path: str, model: Model) -> Any:
  """Converts one layer of a parameter to the released layout.

  Args:
    array: one layer of the parameter; may be traced.
    path: path of the parameter.
    model: the network.
  """
  if path == "patch_embed/linear/kernel":  # (p p C, D)
    p = model.patch_size
    return array.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
  if path.endswith("attention/qkv/kernel"):  # (D, 3, heads, D / heads)
    return array.reshape(array.shape[0], -1).T
  if path.endswith("attention/qkv/bias"):  # (3, heads, D / heads)
    return array.reshape(-1)
  if path.endswith("attention/proj/kernel"):  # (heads, D / heads, D)
    return array.reshape(-1, array.shape[-1]).T
  if path.endswith("kernel"):
    return array.T
  if path in ("pos_embed", "decode_pos_embed"):
    return array[None]
  return array[None, None] if path == "mask_token" else array


def from_released(
  tensor: np.ndarray, path: str, shape: tuple[int, ...], model: Model
) -> np.ndarray:
  """Inverts `to_released`, in float32.

  Args:
    tensor: a released tensor.
    path: path of the parameter.
    shape: shape of one layer of the parameter.
    model: the network.
  """
  del model
  if path == "patch_embed/linear/kernel":
    tensor = tensor.transpose(2, 3, 1, 0)
  elif path.endswith("kernel"):
    tensor = tensor.T
  # A copy, because safetensors and torch may return views of shared memory.
  return np.array(tensor, np.float32, order="C").reshape(shape)


def leaf_name(path: str, names: Mapping[str, str]) -> str:
  """Looks up the released name of a path; "kernel" becomes "weight".

  Args:
    path: path of a parameter, inside its block where it has one.
    names: BLOCK_NAMES, OTHER_NAMES, or such names of another network.
  """
  if path in names:
    return names[path]
  module, leaf = path.rsplit("/", 1)
  return f"{names[module]}.{'weight' if leaf == 'kernel' else leaf}"
