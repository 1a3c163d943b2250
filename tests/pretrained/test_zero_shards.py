"""Shards of parameters and their clipping, compared with the released optimizer.

tests/fixtures/zero.npz was recorded from the Adan of sail-sg/Adan (max_grad_norm 1) in
the ZeroRedundancyOptimizer of PyTorch 2.13, one instance per shard. The gradients are
0.1 times the tensors of mdt_v2.pt.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torch

from mdt_jax import SettingError, create_model
from mdt_jax.clipping import clip_by_norms_of_shards
from mdt_jax.experiment import build
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained import torch_mdt_layout as layout
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.pretrained.zero_shards import zero_shards
from tests import reference
from tests.models.test_network import Conv
from tests.training.tiny import tiny_config, tiny_dit_config

ZERO = reference.load("zero")
SHARDS = (8, 32)


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_parameters_are_ordered_as_in_pytorch(name):
  tensors = torch.load(reference.FIXTURES / f"{name}.pt", weights_only=True)
  names = [n for n in tensors if not n.endswith(layout.BIAS_INDEX)]
  assert sorted(reversed(names), key=layout.parameter_order) == names


@pytest.mark.parametrize("num_shards", SHARDS)
def test_shards_match_reference(num_shards):
  model = reference.make_model("mdt_v2")
  found = {}
  for path, shards in zero_shards(model, num_shards).items():
    names = layout.released_names(path, model)
    found.update(zip(names, np.atleast_1d(shards).tolist(), strict=True))
  recorded = ZERO[f"{num_shards}/shards"].tolist()
  assert found == dict(zip(ZERO["names"].tolist(), recorded, strict=True))


@pytest.mark.parametrize("num_shards", [1, *SHARDS])
def test_clip_factors_match_reference(num_shards):
  model, (_, params) = reference.make_model("mdt_v2"), reference.load_model("mdt_v2")
  gradients = jax.tree.map(lambda p: float(ZERO["scale"]) * p, params)
  shards = zero_shards(model, num_shards)
  clip = clip_by_norms_of_shards(1.0, 1e-8, shards)
  clipped, _ = clip.update(gradients, clip.init(gradients))
  for path, shard in shards.items():
    before, after = (np.float64(flatten(tree)[path]) for tree in (gradients, clipped))
    axes = tuple(range(shard.ndim, before.ndim))
    factors = np.sum(after * before, axes) / np.sum(before**2, axes)
    np.testing.assert_allclose(
      factors, ZERO[f"{num_shards}/factors"][shard], rtol=1e-6, err_msg=path
    )


def test_a_run_clips_its_shards():
  config = tiny_config(**{"optimizer.clip_shards": 8, "optimizer.name": "sgd"})
  experiment = build(config)
  gradients = reference.random_params(experiment.model)
  optimizer = experiment.optimizer
  updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
  shards = zero_shards(experiment.model, 8)
  squares = np.zeros(8)
  for path, update in flatten(updates).items():
    layers = np.asarray(update).reshape(shards[path].size, -1)
    np.add.at(squares, np.atleast_1d(shards[path]), np.square(layers).sum(1))
  # Each shard of these gradients has a norm above the limit of 1.
  rate = config.optimizer.learning_rate
  np.testing.assert_allclose(np.sqrt(squares), rate, rtol=1e-5)


def test_frozen_parameters_are_left_out():
  config = tiny_dit_config(**{"optimizer.clip_shards": 2, "optimizer.clip_norm": 1.0})
  experiment = build(config)
  gradients = reference.random_params(experiment.model)
  optimizer = experiment.optimizer
  updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
  assert not np.any(updates["pos_embed"])
  assert np.any(updates["final_layer"]["linear"]["kernel"])


def test_more_shards_than_tensors_are_refused():
  model = create_model("DiT-S/2", input_size=4, depth=1)
  count = len(flatten(abstract_params(model)))
  with pytest.raises(
    SettingError, match=f"^clip_shards = 99: must be at most {count}, the number of"
  ):
    zero_shards(model, 99)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"clip_shards": 0}, "config.optimizer.clip_shards = 0: must be at least 1"),
    (
      {"clip_shards": 2, "clip_norm": 0.0},
      "config.optimizer.clip_shards = 2: must be 1: clip_norm = 0 clips nothing",
    ),
    (
      {"clip_shards": 500},
      "config.optimizer.clip_shards = 500: must be at most ",
    ),
  ],
)
def test_errors_name_the_setting(changes, message):
  config = tiny_config(**{f"optimizer.{name}": v for name, v in changes.items()})
  with pytest.raises(SettingError, match=f"^{re.escape(message)}"):
    build(config)


def test_networks_of_users_have_no_shards():
  config = tiny_config(**{"optimizer.clip_shards": 2})
  with pytest.raises(
    SettingError, match=r"^config.optimizer.clip_shards = 2: needs DiT, SiT, MDT, MDTv2"
  ):
    build(
      config, model=Conv(input_size=8, in_channels=1, num_classes=10, learn_sigma=True)
    )
