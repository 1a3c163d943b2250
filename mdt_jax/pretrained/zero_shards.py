"""How PyTorch's ZeroRedundancyOptimizer divides the parameters of a released network.

The released MDTv2 trains with Adan inside of ZeroRedundancyOptimizer
(masked_diffusion/train_util.py of sail-sg/MDT). Each process updates its shard of the
parameters, and clips the gradient norm of this shard alone.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

from mdt_jax.errors import SettingError
from mdt_jax.models.registry import Model, abstract_params
from mdt_jax.pretrained import torch_layouts
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained.tensors import flatten


def zero_shards(model: Model, num_shards: int) -> dict[str, Int[np.ndarray, "..."]]:
  """Returns the shard of each parameter, as ZeroRedundancyOptimizer divides them.

  It takes the tensors by decreasing size, and adds each one to the smallest shard. A
  tensor is in one shard.

  Args:
    model: a network of the released code.
    num_shards: number of shards: the processes of a released run.

  Returns:
    Path of a parameter -> shard of each layer (layers,), or of the parameter () where
    it has no axis of layers; int32 in [0, num_shards).

  Raises:
    SettingError: the network is not one of the released code, or has fewer tensors than
      there are shards.
  """
  networks = torch_layouts.DIT_LAYOUT.variants
  if (
    getattr(model, "variant", None) not in networks
    or model.condition is not None
    or getattr(model, "patch_bottleneck", 0)
  ):
    raise SettingError(
      "clip_shards",
      num_shards,
      f"needs {', '.join(networks)} with class labels and without patch_bottleneck",
    )
  params = flatten(abstract_params(model))
  sizes = {
    name: math.prod(shape)
    for name, shape in torch_layouts.released_shapes(model, params).items()
    if not name.endswith(layout.BIAS_INDEX)
  }
  if num_shards > len(sizes):
    raise SettingError(
      "clip_shards", num_shards, f"must be at most {len(sizes)}, the number of tensors"
    )
  shards: dict[str, int] = {}
  filled = [0] * num_shards
  for name in sorted(sizes, key=lambda n: (-sizes[n], layout.parameter_order(n))):
    shards[name] = int(np.argmin(filled))  # the first of equally small shards
    filled[shards[name]] += sizes[name]
  found = {}
  for path in params:
    layers = [shards[name] for name in layout.released_names(path, model)]
    found[path] = np.array(layers if layout.is_stacked(path) else layers[0], np.int32)
  return found
