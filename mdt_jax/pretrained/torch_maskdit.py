"""Names, shapes and sizes of the released tensors of MaskDiT (Anima-Lab/MaskDiT).

Most are those of DiT. The label table is a linear layer without bias: (D, classes),
without a row for the null label. The number of heads is not in the shapes.

In this module, `path` is the path of a parameter of this package, such as
"decode_blocks/attention/qkv/kernel".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.maskdit import MaskDiT
from mdt_jax.models.registry import SIZES
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained.torch_mdt_sizes import (
  LABEL_TABLE,
  count_blocks,
  mlp_ratio,
  shape_of,
)

MARK = "decoder_layer.linear.weight"  # a tensor that no other network has
_STACKS = {"blocks": "blocks", "decode_blocks": "decoder_blocks"}
_OTHER_NAMES = layout.OTHER_NAMES | {
  "decoder_layer/linear": "decoder_layer.linear",
  "decoder_layer/modulation/linear": "decoder_layer.adaLN_modulation.1",
}
# Width of the released decoder -> its number of heads.
_DECODER_HEADS = {MaskDiT.decoder_hidden_size: MaskDiT.decoder_num_heads}


def infer_attributes(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  known: Mapping[str, Any] | None = None,
  num_classes: int | None = None,
) -> dict[str, Any]:
  """Infers the attributes of a MaskDiT from the names and shapes of its tensors.

  Args:
    tensors: released name -> array.
    source: name of the tensors in errors.
    known: attributes that the file states, see `torch_mdt_sizes.stated_sizes`.
    num_classes: number of classes; None if not known.

  Returns:
    Attributes for `create_model`. `num_heads` and `decoder_num_heads` are None if they
    are not known and the width is not a published one. `label_dropout` is absent unless
    the file notes that it is 0.

  Raises:
    SettingError: a tensor that determines an attribute is missing or has the wrong
      shape; or `num_classes` differs from that of the label table.
  """
  known = known or {}

  def shape(name: str, axes: int) -> tuple[int, ...]:
    return shape_of(tensors, name, axes, source, "a MaskDiT")

  hidden_size, in_channels, _, patch_size = shape("x_embedder.proj.weight", 4)
  length = shape("pos_embed", 3)[1]
  width = shape(MARK, 2)[0]
  no_labels = "no_label_table" in known  # see `torch_mdt_sizes.label_rows`
  classes = known["num_classes"] if no_labels else shape(LABEL_TABLE, 2)[1]
  out_rows = shape("final_layer.linear.weight", 2)[0]
  mlp_size = shape("blocks.0.mlp.fc1.weight", 2)[0]
  # Shapes that contradict each other must not ask for arrays larger than the file.
  if length * max(hidden_size, width) > sum(tensor.size for tensor in tensors.values()):
    accepted = f"must hold a MaskDiT: pos_embed of {length} tokens does not fit the "
    raise SettingError("tensors", source, f"{accepted}other tensors")
  if num_classes not in (None, classes):
    accepted = f"must be {classes}: the label table of {source} has so many columns"
    raise SettingError("num_classes", num_classes, accepted)
  published = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
  attributes: dict[str, Any] = dict(
    variant="MaskDiT",
    input_size=round(length**0.5) * patch_size,
    patch_size=patch_size,
    in_channels=in_channels,
    num_classes=classes,
    hidden_size=hidden_size,
    depth=count_blocks(tensors, "blocks"),
    num_heads=known.get("num_heads", published.get(hidden_size)),
    decode_depth=count_blocks(tensors, "decoder_blocks"),
    decoder_hidden_size=width,
    decoder_num_heads=known.get("decoder_num_heads", _DECODER_HEADS.get(width)),
    mlp_ratio=mlp_ratio(hidden_size, mlp_size),
    learn_sigma=out_rows == 2 * in_channels * patch_size**2,
  )
  if known.get("label_dropout") == 0:
    attributes["label_dropout"] = 0.0
  return attributes


def released_names(path: str, model: MaskDiT) -> Iterator[str]:
  """Yields the names of the released tensors of a parameter, one per layer."""
  if not layout.is_stacked(path):
    yield layout.leaf_name(path, _OTHER_NAMES)
    return
  stack, inside = path.split("/", 1)
  name = layout.leaf_name(inside, layout.BLOCK_NAMES)
  count = model.depth if stack == "blocks" else model.decode_depth
  for layer in range(count):
    yield f"{_STACKS[stack]}.{layer}.{name}"


def to_released(array: Any, path: str, model: MaskDiT) -> Any:
  """Converts one layer of a parameter; see `torch_mdt_layout.to_released`."""
  if path == "label_embed/table":  # (classes, D)
    return array.T
  return layout.to_released(array, path, model)


def from_released(
  tensor: np.ndarray, path: str, shape: tuple[int, ...], model: MaskDiT
) -> np.ndarray:
  """Inverts `to_released`, in float32; see `torch_mdt_layout.from_released`."""
  if path == "label_embed/table":
    tensor = tensor.T
  return layout.from_released(tensor, path, shape, model)
