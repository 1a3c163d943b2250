"""Names and sizes of the tensors of a MicroDiT made of DiT's modules.

The tensors are those of a DiT (`torch_mdt_layout`) and, named as in
SonyResearch/micro_diffusion, those of the mixer: `patch_mixer.N` for its blocks, and
`patch_mixer_map_xin` and `patch_mixer_map_xout` if its width is another one. No
checkpoints in this form are published: the released networks read captions.

`path` is the path of a parameter of this package; see `torch_layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.microdit import MicroDiT
from mdt_jax.pretrained import torch_mdt_layout, torch_mdt_sizes

MARK = "patch_mixer.0.attn.qkv.weight"
_MAPS = {
  f"mixer_{end}/{module}": f"patch_mixer_map_x{end}.{place}"
  for end in ("in", "out")
  for module, place in (
    ("norm/scale", "0.weight"),
    ("linear/kernel", "1.weight"),
    ("linear/bias", "1.bias"),
  )
}


def infer_attributes(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  known: Mapping[str, Any] | None = None,
  num_classes: int | None = None,
) -> dict[str, Any]:
  """Infers the attributes of a network from the names and shapes of its tensors.

  For arguments, result and errors see `torch_mdt_sizes.infer_attributes`. The tensors
  do not show `mixer_num_heads`: it is None, for heads as large as those of the other
  blocks, unless `known` states it.
  """
  attributes = torch_mdt_sizes.infer_attributes(tensors, source, known, num_classes)
  if attributes["variant"] != "DiT":
    accepted = f"holds {MARK} of a MicroDiT beside the blocks of another network"
    raise SettingError("tensors", source, accepted)
  blocks = {name.split(".")[1] for name in tensors if name.startswith("patch_mixer.")}
  shape = tensors[MARK].shape
  if len(shape) != 2 or 0 in shape:
    accepted = f"must hold a MicroDiT: {MARK} has shape {shape}"
    raise SettingError("tensors", source, accepted)
  return {
    **attributes,
    "variant": "MicroDiT",
    "mixer_depth": len(blocks),
    "mixer_hidden_size": shape[1],
    "mixer_num_heads": (known or {}).get("mixer_num_heads"),
  }


def released_names(path: str, model: MicroDiT) -> Iterator[str]:
  """Yields the names of the tensors of a parameter, one per layer."""
  stack, _, inside = path.partition("/")
  if path in _MAPS:
    yield _MAPS[path]
  elif stack == "mixer_blocks":
    first = next(torch_mdt_layout.released_names(f"blocks/{inside}", model))
    for layer in range(model.mixer_depth):
      yield f"patch_mixer.{layer}.{first.removeprefix('blocks.0.')}"
  else:
    yield from torch_mdt_layout.released_names(path, model)
