"""The networks by name, with the sizes and the flops of each.

A new network is a file with its module and one entry in NETWORKS. Where its parameters
have names of their own, `partitioning.PARAMETER_AXES` says how devices share them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models import mdt_flops
from mdt_jax.models.conditions import Condition, create_condition
from mdt_jax.models.mdt import MDT
from mdt_jax.models.network import Network
from mdt_jax.types import Array, Params

Model: TypeAlias = Network  # any network

SIZES = {
  "S": dict(hidden_size=384, depth=12, num_heads=6),
  "B": dict(hidden_size=768, depth=12, num_heads=12),
  "L": dict(hidden_size=1024, depth=24, num_heads=16),
  "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}
PATCH_SIZES = (2, 4, 8)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class NetworkEntry:
  """A family of networks: one architecture in several sizes.

  Attributes:
    module: the linen module. Its attribute `variant` is the family's key in NETWORKS.
    presets: name, such as "MDTv2-S/2" -> attributes of the module.
    forward_flops: (model, num_keep or None) -> operations of a forward pass over one
      image, see `models.flops`.
  """

  module: type[Model]
  presets: Mapping[str, dict[str, Any]]
  forward_flops: Callable[[Any, int | None], int]


def _presets(
  variant: str, decode_depths: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
  """Attributes of every size and patch size, by name."""
  presets = {}
  for size, settings in SIZES.items():
    for patch_size in PATCH_SIZES:
      preset = dict(variant=variant, patch_size=patch_size, **settings)
      if decode_depths is not None:
        preset["decode_depth"] = decode_depths[size]
      presets[f"{variant}-{size}/{patch_size}"] = preset
  return presets


NETWORKS: dict[str, NetworkEntry] = {
  "DiT": NetworkEntry(MDT, _presets("DiT"), mdt_flops.forward_flops),
  "MDT": NetworkEntry(
    MDT, _presets("MDT", dict(S=2, B=2, L=2, XL=2)), mdt_flops.forward_flops
  ),
  # Released: 6 for S, 4 for XL. None is published for B and L: B takes that of S, which
  # has as many blocks, and L that of XL, the next larger size.
  "MDTv2": NetworkEntry(
    MDT, _presets("MDTv2", dict(S=6, B=6, L=4, XL=4)), mdt_flops.forward_flops
  ),
}

# Name -> attributes, of all networks.
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
  """Builds a network, from a preset or from its attributes.

  Args:
    name: a key of MODELS, such as "MDTv2-S/2"; None to give all attributes, with
      `variant`, as `pretrained.torch_mdt.from_torch` returns them.
    condition: what the network is conditioned on: a name, see `models.conditions`, or
      an object; None for labels.
    **attributes: of the module, such as MDT; they override the preset's. None stands
      for the preset's value, or the module's default. `dtype` may be a name: "float32"
      or "bfloat16".

  Raises:
    SettingError: unknown name or attribute, or attributes that do not fit together.
  """
  given = {key: value for key, value in attributes.items() if value is not None}
  if name is not None or "variant" not in given:
    check_choice("name", name, MODELS)
    assert name is not None
    given = {**MODELS[name], **given}
  check_choice("variant", given["variant"], NETWORKS)
  module = NETWORKS[given["variant"]].module
  known = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
  for attribute, value in attributes.items():
    if attribute not in known:
      raise SettingError(
        attribute,
        value,
        f"is no attribute of {module.__name__}, which has {sorted(known)}",
      )
  if isinstance(dtype := given.get("dtype"), str):
    check_choice("dtype", dtype, DTYPES)
    given["dtype"] = DTYPES[dtype]
  model = module(**given)
  # Labels stay None: the attributes of a network are then those of old checkpoints.
  if condition is not None and condition != "label":
    if not isinstance(condition, Condition):
      condition = create_condition(
        condition, num_classes=model.num_classes, dropout=model.label_dropout
      )
    model = model.clone(condition=condition)
  model.check()
  return model


def network_of(model: Model) -> NetworkEntry:
  """The entry of a network.

  Raises:
    SettingError: the network has no entry.
  """
  variant = getattr(model, "variant", None)
  if variant not in NETWORKS:
    name = type(model).__name__
    raise SettingError("model", name, "has no entry in models.registry.NETWORKS")
  return NETWORKS[variant]


def init_params(model: Model, key: Array) -> Params:
  """Fresh parameters of a network, float32."""
  size = model.input_size
  images = jnp.zeros((1, size, size, model.in_channels), jnp.float32)
  timesteps = jnp.zeros((1,), jnp.int32)
  return model.init(key, images, timesteps, model.conditioning.dummy(1))["params"]


def abstract_params(model: Model) -> Params:
  """Shapes and types of a network's parameters, without computing any."""
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
