"""Type aliases that many modules share."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
Dtype: TypeAlias = Any  # anything that jnp.dtype accepts
Params: TypeAlias = Any  # a tree of arrays: parameters, or a part of them
Batch: TypeAlias = dict[str, jax.Array]  # name -> array with leading axis B
# Entries of examples that are no arrays of a condition.
RESERVED_NAMES = ("caption", "image", "label", "moments", "views")
