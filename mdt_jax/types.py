"""Names of types that many modules share."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
Dtype: TypeAlias = Any  # what jnp.dtype takes
Params: TypeAlias = Any  # a tree of arrays: parameters, or a part of them
Batch: TypeAlias = dict[str, jax.Array]  # examples of a step by name, leading axis B
