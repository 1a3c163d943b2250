"""PARAMETER_AXES: each row has a parameter, and each matrix has a row."""

from __future__ import annotations

import functools

import flax
import pytest

from mdt_jax.models import (
  JointCondition,
  LabelCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.partitioning import PARAMETER_AXES, parameter_axes
from mdt_jax.models.registry import NETWORKS, abstract_params, create_model

RANK_OF_A_MATRIX = 2


@functools.cache
def ranks(variant):
  """Maps each parameter path of the smallest preset to its rank in one block.

  The preset has a bottleneck before its tokens in addition, and a mixer of another
  width than the blocks. MDT has a label, a vector and tokens as its condition.
  """
  network = NETWORKS[variant]
  name = next(iter(network.presets))
  more: dict = {} if variant == "MicroDiTText" else {"patch_bottleneck": 8}
  if variant.startswith("MicroDiT"):
    more["mixer_hidden_size"] = 192
  if variant == "MDT":
    arrays = VectorCondition("v", 4, 0.1), TokensCondition("t", 2, 4, 0.1)
    more["condition"] = JointCondition((LabelCondition(10, 0.1), *arrays))
  params = abstract_params(create_model(name, **more))
  return {
    path: len(leaf.shape) - ("blocks/" in path)
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
  }


PARAMETERS = [(variant, path) for variant in NETWORKS for path in ranks(variant)]


@pytest.mark.parametrize(("variant", "path"), PARAMETERS)
def test_axes_have_the_rank_of_the_parameter(variant, path):
  axes = parameter_axes(path)
  assert len(axes) in (0, ranks(variant)[path])


@pytest.mark.parametrize(
  ("variant", "path"),
  [(v, path) for v, path in PARAMETERS if ranks(v)[path] >= RANK_OF_A_MATRIX],
)
def test_every_matrix_is_sharded(variant, path):
  axes = parameter_axes(path)
  assert {"width", "heads"} & {*axes}


@pytest.mark.parametrize("end", PARAMETER_AXES)
def test_every_row_of_the_table_is_used(end):
  """A row that an earlier row shadows is unused too."""
  first = {
    next((row for row in PARAMETER_AXES if path.endswith(row)), None)
    for _, path in PARAMETERS
  }
  assert end in first


def test_parameter_without_a_row_is_replicated():
  assert parameter_axes("blocks/attention/proj/bias") == ()
