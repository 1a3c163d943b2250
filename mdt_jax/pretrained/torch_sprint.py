"""Names, shapes and layouts of the released tensors of SPRINT (arXiv 2510.21986).

The source is snap-research/Sprint. Three sizes are not in the shapes: the input size,
since there is no position embedding; the patch size, since a patch is one axis of p p C
numbers; and whether the label table has a row for the null label. In a patch, the
released numbers are ordered (channel, row, column), and ours (row, column, channel).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.sprint import SPRINT
from mdt_jax.pretrained import torch_mdt_layout as dit
from mdt_jax.pretrained import torch_mdt_sizes as sizes

MARK = "renoise_linear.weight"  # a tensor that no other network has
PATCH_SIZE = 2  # of the released networks
# The error for tensors without an input size.
NEEDS_SIZE = (
  "must be given for a SPRINT, whose tensors do not show it: 32 for images of 256x256, "
  "64 for 512x512"
)

# Path outside of blocks -> released name.
_NAMES = {
  "patch_embed/linear": "x_embedder.proj",
  "timestep_embed/fc1": "t_embedder.mlp.0",
  "timestep_embed/fc2": "t_embedder.mlp.2",
  "label_embed/table": "y_embedder.embedding_table.weight",
  "mask_token": "mask_token",
  "fuse": "renoise_linear",
  "final_layer/linear": "final_layer.linear",
  "final_layer/modulation/linear": "final_layer.adaLN_modulation.1",
}
_BLOCK_NAMES = {
  **dit.BLOCK_NAMES,
  "attention/q_norm": "attn.q_norm.weight",
  "attention/k_norm": "attn.k_norm.weight",
}
# Stack of blocks -> released name of the stack.
_STACKS = {
  "encoder_blocks": "encoder_blocks",
  "middle_blocks": "middle_blocks",
  "decode_blocks": "decoder_blocks",
}


def infer_attributes(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  known: Mapping[str, Any] | None = None,
  num_classes: int | None = None,
) -> dict[str, Any]:
  """Infers the attributes of a SPRINT; see `torch_mdt_sizes.infer_attributes`.

  Args:
    tensors, source, num_classes: see there.
    known: attributes that the caller or the file states. "input_size" is needed; the
      patch size is PATCH_SIZE unless "patch_size" is another.

  Raises:
    SettingError: see there. Setting "input_size": it is not known, or too large.
  """
  known = known or {}

  def shape(name: str, axes: int) -> tuple[int, ...]:
    return sizes.shape_of(tensors, name, axes, source, "a SPRINT")

  hidden_size, patch_numbers = shape("x_embedder.proj.weight", 2)
  rows = sizes.label_rows(shape, known)
  (out_numbers,) = shape("final_layer.linear.bias", 1)
  mlp_size = shape("encoder_blocks.0.mlp.fc1.weight", 2)[0]
  (head_width,) = shape("encoder_blocks.0.attn.q_norm.weight", 1)
  patch_size = known.get("patch_size", PATCH_SIZE)
  if patch_numbers % patch_size**2:
    raise SettingError(
      "tensors",
      source,
      f"must hold a SPRINT of patch_size {patch_size}: a patch has {patch_numbers} "
      "numbers",
    )
  if "input_size" not in known:
    raise SettingError("input_size", None, NEEDS_SIZE)
  # The rotations must not ask for arrays larger than the file.
  total = sum(tensor.size for tensor in tensors.values())
  if known["input_size"] * head_width > patch_size * total:
    accepted = f"must be smaller for the {total:,} numbers of {source}"
    raise SettingError("input_size", known["input_size"], accepted)
  count, has_null = sizes.count_classes(rows, num_classes, known, source)
  depths = {
    stack: sizes.count_blocks(tensors, released) for stack, released in _STACKS.items()
  }
  attributes: dict[str, Any] = dict(
    variant="SPRINT",
    input_size=known["input_size"],
    patch_size=patch_size,
    in_channels=patch_numbers // patch_size**2,
    num_classes=count,
    hidden_size=hidden_size,
    num_heads=hidden_size // head_width,
    depth=sum(depths.values()),
    encoder_depth=depths["encoder_blocks"],
    decode_depth=depths["decode_blocks"],
    mlp_ratio=sizes.mlp_ratio(hidden_size, mlp_size),
    learn_sigma=out_numbers == 2 * patch_numbers,
  )
  return attributes if has_null else {**attributes, "label_dropout": 0.0}


def released_names(path: str, model: SPRINT) -> Iterator[str]:
  """Yields the names of the released tensors of a parameter, one per layer."""
  if not dit.is_stacked(path):
    yield dit.leaf_name(path, _NAMES)
    return
  stack, inside = path.split("/", 1)
  name = dit.leaf_name(inside, _BLOCK_NAMES)
  count = {
    "encoder_blocks": model.encoder_depth,
    "middle_blocks": model.middle_depth,
    "decode_blocks": model.decode_depth,
  }[stack]
  for layer in range(count):
    yield f"{_STACKS[stack]}.{layer}.{name}"


def to_released(array: Any, path: str, model: SPRINT) -> Any:
  """Converts one layer of a parameter to the released layout.

  Args:
    array: one layer of the parameter; may be traced.
    path: path of the parameter.
    model: the network.
  """
  p = model.patch_size
  if path == "patch_embed/linear/kernel":  # (p p C, D) -> (D, C p p)
    array = array.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
    return array.reshape(len(array), -1)
  if path.startswith("final_layer/linear/"):  # (D, p p C) -> (C p p, D)
    array = array.reshape(-1, p, p, model.last_channels).transpose(3, 1, 2, 0)
    rows = array.reshape(p * p * model.last_channels, -1)
    return rows if path.endswith("kernel") else rows[:, 0]
  return dit.to_released(array, path, model)


def from_released(
  tensor: np.ndarray, path: str, shape: tuple[int, ...], model: SPRINT
) -> np.ndarray:
  """Inverts `to_released`, in float32; see `torch_mdt_layout.from_released`."""
  p = model.patch_size
  if path == "patch_embed/linear/kernel":
    tensor = tensor.reshape(-1, model.in_channels, p, p).transpose(2, 3, 1, 0)
  elif path.startswith("final_layer/linear/"):
    tensor = tensor.reshape(model.last_channels, p, p, -1).transpose(3, 1, 2, 0)
  else:
    return dit.from_released(tensor, path, shape, model)
  # A copy, because safetensors and torch may return views of shared memory.
  return np.array(tensor, np.float32, order="C").reshape(shape)
