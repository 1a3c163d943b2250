"""Names and sizes of the tensors of the released MicroDiT, which reads captions.

The source is SonyResearch/micro_diffusion. `path` is the path of a parameter of
`models.microdit_text`; see `torch_layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.models.microdit_text import MicroDiTText
from mdt_jax.pretrained import torch_mdt_layout
from mdt_jax.pretrained.torch_mdt_sizes import shape_of

MARK = "y_emb_preprocess.norm1.weight"
# Width of a released network -> its number of heads, which the tensors do not show.
_HEADS = {512: 16, 1024: 16}
_STACKS = {"mixer_block": "patch_mixer", "block": "blocks"}
# Path of a module in this package -> name of the released module. `released_names`
# replaces them in this order, so a longer path precedes its end.
_MODULES = {
  "patch_embed/linear": "x_embedder.proj",
  "timestep_embed/fc1": "t_embedder.mlp.0",
  "timestep_embed/fc2": "t_embedder.mlp.2",
  "caption_embed": "y_embedder.y_proj",
  "caption_block": "y_emb_preprocess",
  "caption_pool": "pooled_y_emb_process",
  "mixer_in/norm": "patch_mixer_map_xin.0",
  "mixer_in/linear": "patch_mixer_map_xin.1",
  "mixer_out/norm": "patch_mixer_map_xout.0",
  "mixer_out/linear": "patch_mixer_map_xout.1",
  "mixer_captions/norm": "patch_mixer_map_y.0",
  "mixer_captions/linear": "patch_mixer_map_y.1",
  "final_layer/norm": "final_layer.norm_final",
  "cross_attention/query": "cross_attn.q_linear",
  "cross_attention/key_value": "cross_attn.kv_linear",
  "cross_attention": "cross_attn",
  "attention": "attn",
  "experts/expert_in": "mlp.w1",
  "experts/expert_out": "mlp.w2",
  "experts/router": "mlp.gate",
  "modulation/linear": "adaLN_modulation.1",
}
_LEAVES = {"kernel": "weight", "scale": "weight"}


def released_names(path: str, model: MicroDiTText) -> Iterator[str]:
  """Yields the name of the released tensor of a parameter."""
  del model
  stack = re.match(r"(mixer_block|block)_(\d+)/", path)
  start, rest = "", path
  if stack:
    start, rest = f"{_STACKS[stack[1]]}.{stack[2]}.", path[stack.end() :]
  name = f"{rest}/"
  for module, released in _MODULES.items():
    name = re.sub(f"(^|(?<=/)){module}/", f"{released}/", name)
  *parts, leaf = name.strip("/").split("/")
  yield start + ".".join([*parts, _LEAVES.get(leaf, leaf)])


def to_released(array: Any, path: str, model: MicroDiTText) -> Any:
  """Converts a parameter to the released layout; see `torch_layouts.Layout`."""
  if path.endswith(("query/kernel", "key_value/kernel")):  # (D, …, heads, D / heads)
    return array.reshape(array.shape[0], -1).T
  return torch_mdt_layout.to_released(array, path, model)


def infer_attributes(
  tensors: Mapping[str, np.ndarray],
  source: str = "tensors",
  known: Mapping[str, Any] | None = None,
  num_classes: int | None = None,
) -> dict[str, Any]:
  """Infers the attributes of a network from the names and shapes of its tensors.

  Args:
    tensors: released name -> array.
    source: name of the tensors in errors.
    known: attributes that the file states.
    num_classes: must be None: the network reads captions.

  Returns:
    Attributes for `create_model`. `num_heads` is None if the file does not state the
    number and no released network has this width. `expert_capacity` is absent: the
    default is that of the released networks.

  Raises:
    SettingError: a tensor that determines an attribute is missing or has the wrong
      shape, or `num_classes` is given.
  """
  if num_classes is not None:
    accepted = f"must be None: {source} holds MicroDiTText, which reads captions"
    raise SettingError("num_classes", num_classes, accepted)

  def shape(name: str, axes: int) -> tuple[int, ...]:
    return shape_of(tensors, name, axes, source, "a MicroDiTText")

  def count(stack: str) -> int:
    """Returns the number of blocks of a stack."""
    matches = (re.match(rf"{stack}\.(\d+)\.", name) for name in tensors)
    return len({match[1] for match in matches if match})

  def mlp_width(block: str) -> int:
    """Returns the hidden width of the feed-forward layer of a block."""
    if f"{block}.mlp.gate.weight" in tensors:
      return shape(f"{block}.mlp.w1", 3)[2]
    return shape(f"{block}.mlp.w1.weight", 2)[0]

  dim, in_channels, _, patch_size = shape("x_embedder.proj.weight", 4)
  length = shape("pos_embed", 3)[1]
  out_rows = shape("final_layer.linear.weight", 2)[0]
  blocks = [f"blocks.{i}" for i in range(count("blocks"))]
  mixer = [f"patch_mixer.{i}" for i in range(count("patch_mixer"))]
  gates = [name for name in tensors if name.endswith(".mlp.gate.weight")]
  return dict(
    variant="MicroDiTText",
    input_size=round(length**0.5) * patch_size,
    patch_size=patch_size,
    in_channels=in_channels,
    learn_sigma=out_rows == 2 * in_channels * patch_size**2,
    caption_channels=shape("y_embedder.y_proj.fc1.weight", 2)[1],
    hidden_size=dim,
    num_heads=(known or {}).get("num_heads", _HEADS.get(dim)),
    attention_widths=tuple(shape(f"{b}.attn.proj.weight", 2)[1] for b in blocks),
    mlp_widths=tuple(map(mlp_width, blocks)),
    mixer_hidden_size=shape("patch_mixer.0.attn.proj.weight", 2)[0],
    mixer_mlp_widths=tuple(map(mlp_width, mixer)),
    caption_mlp_width=mlp_width("y_emb_preprocess"),
    num_experts=shape(gates[0], 2)[0] if gates else 0,
  )
