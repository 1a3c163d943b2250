"""The layouts of released tensors: names, shapes and sizes of each network.

`torch_mdt_layout` is the layout of MDT, MDTv2, DiT, SiT and TREAD. To add the released
tensors of another network, write a module with the functions of `Layout` and add it to
LAYOUTS.

In this module, `path` is the path of a parameter of this package, such as
"blocks/attention/qkv/kernel". The parameters of a stack of blocks have a leading axis
of layers; in the released code each block has its own tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mdt_jax.models.registry import Model
from mdt_jax.pretrained import (
  condition_tensors,
  torch_maskdit,
  torch_mdt_layout,
  torch_microdit,
  torch_microdit_text,
  torch_sprint,
)
from mdt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the released code stores the parameters of some networks.

  Attributes:
    variants: the networks, keys of `models.registry.NETWORKS`.
    mark: name of a tensor that only these networks have; None for the layout of DiT,
      which is the last choice.
    infer_attributes: (tensors, source, known, num_classes) -> attributes of the
      network, see `torch_mdt_sizes.infer_attributes`; None for the layout of DiT.
    released_names: (path, model) -> names of the released tensors of a parameter, one
      per layer.
    to_released: (array, path, model) -> one layer of a parameter in the released shape;
      the array may be traced.
    from_released: (tensor, path, shape, model) -> one layer of a parameter, of `shape`,
      a float32 copy.
  """

  variants: tuple[str, ...]
  mark: str | None
  infer_attributes: Callable[..., dict[str, Any]] | None
  released_names: Callable[[str, Any], Iterable[str]]
  to_released: Callable[[Any, str, Any], Any]
  from_released: Callable[[np.ndarray, str, tuple[int, ...], Any], np.ndarray]


DIT_LAYOUT = Layout(
  variants=("DiT", "SiT", "MDT", "MDTv2", "TREAD"),
  mark=None,
  infer_attributes=None,
  released_names=torch_mdt_layout.released_names,
  to_released=torch_mdt_layout.to_released,
  from_released=torch_mdt_layout.from_released,
)
MASKDIT_LAYOUT = Layout(
  variants=("MaskDiT",),
  mark=torch_maskdit.MARK,
  infer_attributes=torch_maskdit.infer_attributes,
  released_names=torch_maskdit.released_names,
  to_released=torch_maskdit.to_released,
  from_released=torch_maskdit.from_released,
)
MICRODIT_LAYOUT = Layout(
  variants=("MicroDiT",),
  mark=torch_microdit.MARK,
  infer_attributes=torch_microdit.infer_attributes,
  released_names=torch_microdit.released_names,
  to_released=torch_mdt_layout.to_released,
  from_released=torch_mdt_layout.from_released,
)
MICRODIT_TEXT_LAYOUT = Layout(
  variants=("MicroDiTText",),
  mark=torch_microdit_text.MARK,
  infer_attributes=torch_microdit_text.infer_attributes,
  released_names=torch_microdit_text.released_names,
  to_released=torch_microdit_text.to_released,
  from_released=torch_mdt_layout.from_released,
)
SPRINT_LAYOUT = Layout(
  variants=("SPRINT",),
  mark=torch_sprint.MARK,
  infer_attributes=torch_sprint.infer_attributes,
  released_names=torch_sprint.released_names,
  to_released=torch_sprint.to_released,
  from_released=torch_sprint.from_released,
)
# A MicroDiTText has the mark of a MicroDiT too.
LAYOUTS = (
  *(MASKDIT_LAYOUT, MICRODIT_TEXT_LAYOUT, MICRODIT_LAYOUT, SPRINT_LAYOUT),
  DIT_LAYOUT,
)


def layout_of(model: Model) -> Layout:
  """Returns the layout of a network."""
  variant = getattr(model, "variant", None)
  return next(layout for layout in LAYOUTS if variant in layout.variants)


def find_layout(tensors: Mapping[str, np.ndarray]) -> Layout:
  """Returns the layout of tensors, which their names show."""
  return next((layout for layout in LAYOUTS if layout.mark in tensors), DIT_LAYOUT)


def released_shapes(
  model: Model, params: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape for all released tensors of a network, including buffers.

  Args:
    model: the network.
    params: path -> parameter, or its shape and dtype.
  """
  shapes = {}
  layout, own = layout_of(model), condition_tensors.own_paths(model)
  for path, param in params.items():
    if path in own:
      shapes[condition_tensors.tensor_name(path)] = param.shape
      continue
    shape = param.shape[1:] if torch_mdt_layout.is_stacked(path) else param.shape
    released = jax.eval_shape(
      lambda array, path=path: layout.to_released(array, path, model),
      jax.ShapeDtypeStruct(shape, param.dtype),
    )
    for name in layout.released_names(path, model):
      shapes[name] = released.shape
      if index := torch_mdt_layout.index_name(name):
        shapes[index] = (model.num_tokens, model.num_tokens)
  return shapes
