"""The registry of networks: presets by name, and the FLOPs of each network.

To add a network, write a file with its module and add an entry to NETWORKS. If its
parameters have new names, add their axes to `partitioning.PARAMETER_AXES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models import (
  maskdit,
  mdt_flops,
  microdit,
  microdit_text,
  microdit_text_flops,
  sprint,
  tread,
)
from mdt_jax.models.condition_registry import create_condition
from mdt_jax.models.conditions import Condition
from mdt_jax.models.mdt import MDT
from mdt_jax.models.network import Network
from mdt_jax.sizes import to_size
from mdt_jax.types import Array, Params

Model: TypeAlias = Network  # any network

SIZES = {
  "S": dict(hidden_size=384, depth=12, num_heads=6),
  "B": dict(hidden_size=768, depth=12, num_heads=12),
  "L": dict(hidden_size=1024, depth=24, num_heads=16),
  "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}
PATCH_SIZES = (2, 4, 8, 16)
# Mixers of MicroDiT. The release has other sizes than DiT: Tiny, 16 blocks of width 512
# with a mixer of 4 blocks of 512; XL, 28 blocks of 1024 with 6 blocks of 768. The sizes
# for DiT are our choice in these proportions: as in Tiny, S and B have a mixer of a
# quarter of the depth and of the same width; as in XL, L and XL have 6 blocks of three
# quarters of the width. Heads have the size of the backbone's heads.
MIXERS = {
  "S": dict(mixer_depth=3),
  "B": dict(mixer_depth=3),
  "L": dict(mixer_depth=6, mixer_hidden_size=768),
  "XL": dict(mixer_depth=6, mixer_hidden_size=864),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


# The released MicroDiT.
TEXT_PRESETS: dict[str, dict[str, Any]] = {
  "MicroDiTText-Tiny/2": dict(
    variant="MicroDiTText",
    hidden_size=512,
    num_heads=16,
    mixer_hidden_size=512,
    mixer_mlp_widths=(1536, 2048) * 2,
    caption_mlp_width=1536,
    **microdit_text.rising_widths(512, 16, head_size=32),
  ),
  "MicroDiTText-XL/2": dict(
    variant="MicroDiTText",
    hidden_size=1024,
    num_heads=16,
    mixer_hidden_size=768,
    mixer_mlp_widths=(2048, 3072) * 3,
    caption_mlp_width=2816,
    **microdit_text.rising_widths(1024, 28),
  ),
}


@dataclasses.dataclass(frozen=True)
class NetworkEntry:
  """A family of networks: one architecture in several sizes.

  Attributes:
    module: the linen module class. Its attribute `variant` is the key in NETWORKS.
    presets: name, such as "MDTv2-S/2" -> attributes of the module.
    forward_flops: function (model, num_keep or None) -> operations of a forward pass
      over one image; see `models.flops`.
    defaults: attributes whose default is not that of the module.
  """

  module: type[Model]
  presets: Mapping[str, dict[str, Any]]
  forward_flops: Callable[[Any, int | None], int]
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _presets(
  variant: str,
  decode_depths: Mapping[str, int] | None = None,
  more: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
  """Returns name -> attributes for every size and patch size of a variant.

  Args:
    variant: a key of NETWORKS.
    decode_depths: size -> decode_depth; None for networks without a decoder.
    more: size -> further attributes.
  """
  presets = {}
  for size, settings in SIZES.items():
    for patch_size in PATCH_SIZES:
      preset = dict(variant=variant, patch_size=patch_size, **settings)
      if decode_depths is not None:
        preset["decode_depth"] = decode_depths[size]
      if more is not None:
        preset |= more[size]
      presets[f"{variant}-{size}/{patch_size}"] = preset
  return presets


NETWORKS: dict[str, NetworkEntry] = {
  "DiT": NetworkEntry(MDT, _presets("DiT"), mdt_flops.forward_flops),
  "SiT": NetworkEntry(
    MDT, _presets("SiT"), mdt_flops.forward_flops, dict(learn_sigma=False)
  ),
  "MDT": NetworkEntry(
    MDT, _presets("MDT", dict(S=2, B=2, L=2, XL=2)), mdt_flops.forward_flops
  ),
  # decode_depth: 6 for S and 4 for XL, as released. No values are published for B and
  # L: B uses that of S, which has the same depth; L uses that of XL, the next size.
  "MDTv2": NetworkEntry(
    MDT, _presets("MDTv2", dict(S=6, B=6, L=4, XL=4)), mdt_flops.forward_flops
  ),
  "TREAD": NetworkEntry(tread.TREAD, _presets("TREAD"), tread.forward_flops),
  # The decoder of all sizes is the released one: the defaults of MaskDiT.
  "MaskDiT": NetworkEntry(maskdit.MaskDiT, _presets("MaskDiT"), maskdit.forward_flops),
  "MicroDiT": NetworkEntry(
    microdit.MicroDiT, _presets("MicroDiT", more=MIXERS), microdit.forward_flops
  ),
  "MicroDiTText": NetworkEntry(
    microdit_text.MicroDiTText, TEXT_PRESETS, microdit_text_flops.forward_flops
  ),
  # 2 blocks before and after the middle blocks in all sizes: those of XL and B are
  # published.
  "SPRINT": NetworkEntry(
    sprint.SPRINT, _presets("SPRINT", dict(S=2, B=2, L=2, XL=2)), sprint.forward_flops
  ),
}

# Name -> attributes, for all presets of all networks.
MODELS: dict[str, dict[str, Any]] = {
  name: preset
  for network in NETWORKS.values()
  for name, preset in network.presets.items()
}


def create_model(
  name: str | None = None,
  *,
  condition: str | Condition | None = None,
  **attributes: Any,
) -> Model:
  """Builds a network from a preset or from attributes.

  Args:
    name: a key of MODELS, such as "MDTv2-S/2". None: no preset; `attributes` must then
      include `variant`. `pretrained.torch_mdt.from_torch` returns such attributes.
    condition: a `Condition`, or a name for `condition_registry.create_condition`; None
      for labels.
    **attributes: attributes of the network's module, such as `MDT`; they override the
      preset. An attribute of None is ignored. `dtype` may be "float32" or "bfloat16".

  Raises:
    SettingError: a name or an attribute is unknown, or an attribute is invalid.
  """
  given = {key: value for key, value in attributes.items() if value is not None}
  if name is not None or "variant" not in given:
    if name not in MODELS:
      networks, patches = ", ".join(NETWORKS), ", ".join(map(str, PATCH_SIZES))
      accepted = (
        f"must be NETWORK-SIZE/PATCH, such as MDTv2-S/2; networks are {networks}, "
        f"sizes {', '.join(SIZES)}, patches {patches}"
      )
      raise SettingError("name", name, accepted)
    given = {**MODELS[name], **given}
  check_choice("variant", given["variant"], NETWORKS)
  network = NETWORKS[given["variant"]]
  module, given = network.module, {**network.defaults, **given}
  known = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
  for attribute, value in given.items():
    if attribute not in known:
      raise SettingError(
        attribute,
        value,
        f"not an attribute of {module.__name__}; accepted are {sorted(known)}",
      )
  if isinstance(dtype := given.get("dtype"), str):
    check_choice("dtype", dtype, DTYPES)
    given["dtype"] = DTYPES[dtype]
  if "input_size" in given:
    given["input_size"] = to_size(given["input_size"], "input_size")
  model = module(**given)
  # For labels, `condition` stays None, so that the attributes match old checkpoints.
  if condition is not None and condition != "label":
    if not isinstance(condition, Condition):
      condition = create_condition(
        condition,
        num_classes=model.num_classes,
        dropout=model.label_dropout,
        null=model.null_label,
      )
    model = model.clone(condition=condition)
  model.check()
  return model


def network_of(model: Model) -> NetworkEntry:
  """Returns the entry of a network in NETWORKS.

  Raises:
    SettingError: the network has no entry.
  """
  variant = getattr(model, "variant", None)
  if variant not in NETWORKS:
    name = type(model).__name__
    raise SettingError("model", name, "has no entry in models.registry.NETWORKS")
  return NETWORKS[variant]


def init_params(model: Model, key: Array) -> Params:
  """Initialises the parameters of a network, in float32."""
  images = jnp.zeros((1, *model.input_shape), jnp.float32)
  timesteps = jnp.zeros((1,), jnp.int32)
  return model.init(key, images, timesteps, model.conditioning.dummy(1))["params"]


def abstract_params(model: Model) -> Params:
  """Returns shapes and dtypes of a network's parameters, without computing values."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
