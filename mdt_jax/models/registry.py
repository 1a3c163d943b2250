"""The published sizes, and `create_model`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models.mdt import MDT

SIZES = {
  "S": dict(hidden_size=384, depth=12, num_heads=6),
  "B": dict(hidden_size=768, depth=12, num_heads=12),
  "L": dict(hidden_size=1024, depth=24, num_heads=16),
  "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}

# Blocks after the side-interpolater. MDT: 2 for every size. MDTv2: 6 for S and 4 for
# XL are the released ones; none is published for B and L, which take those of the
# size with as many blocks (B) and of the next larger one (L).
DECODE_DEPTHS = {
  "MDT": dict(S=2, B=2, L=2, XL=2),
  "MDTv2": dict(S=6, B=6, L=4, XL=4),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _presets() -> dict[str, dict[str, Any]]:
  presets = {}
  for variant in ("DiT", "MDT", "MDTv2"):
    for size, settings in SIZES.items():
      for patch_size in (2, 4, 8):
        preset = dict(variant=variant, patch_size=patch_size, **settings)
        if variant in DECODE_DEPTHS:
          preset["decode_depth"] = DECODE_DEPTHS[variant][size]
        presets[f"{variant}-{size}/{patch_size}"] = preset
  return presets


MODELS = _presets()


def create_model(name: str, **overrides: Any) -> MDT:
  """Builds a network from a preset, with some attributes replaced.

  Args:
    name: a key of MODELS, such as "MDTv2-S/2".
    **overrides: attributes of MDT; None keeps the preset's value. `dtype` may be a
      name: "float32" or "bfloat16".

  Raises:
    SettingError: unknown name or attribute, or attributes that do not fit together.
  """
  check_choice("name", name, MODELS)
  attributes = {field.name for field in dataclasses.fields(MDT)} - {"parent", "name"}
  for attribute, value in overrides.items():
    if attribute not in attributes:
      raise SettingError(
        attribute, value, f"is no attribute of MDT, which has {sorted(attributes)}"
      )
  overrides = {key: value for key, value in overrides.items() if value is not None}
  if isinstance(dtype := overrides.get("dtype"), str):
    check_choice("dtype", dtype, DTYPES)
    overrides["dtype"] = DTYPES[dtype]
  model = MDT(**{**MODELS[name], **overrides})
  model.check()
  return model
