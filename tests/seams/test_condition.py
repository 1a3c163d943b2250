"""A custom condition, a vector, needs one file and one registration."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.models.conditions import CONDITIONS, Condition
from mdt_jax.models.registry import init_params
from tests.seams.digits import assert_learns, train_losses

SIZE = 4  # Numbers in a vector.


class VectorEmbed(nn.Module):
  """Embeds vectors (B, SIZE) as (B, D)."""

  hidden_size: int
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, y, train=False):
    return nn.Dense(self.hidden_size, dtype=self.dtype, name="dense")(y)


@dataclasses.dataclass(frozen=True)
class AngleCondition(Condition):
  """The class of a digit as a point on two circles. Dropped conditions are zero."""

  num_classes: int
  dropout: float

  def of_batch(self, batch):
    angle = 2 * jnp.pi * batch["label"] / self.num_classes
    waves = (jnp.sin(angle), jnp.cos(angle), jnp.sin(2 * angle), jnp.cos(2 * angle))
    return jnp.stack(waves, axis=-1).astype(jnp.float32)

  def embedder(self, hidden_size, dtype):
    return VectorEmbed(hidden_size, dtype, name="vector_embed")

  def drop(self, key, y, count):
    dropped = jax.random.bernoulli(key, self.dropout, (len(y), count))
    return jnp.where(dropped[..., None], 0.0, y[:, None])

  def null_like(self, y):
    return jnp.zeros_like(y)

  def dummy(self, batch):
    return jnp.zeros((batch, SIZE), jnp.float32)

  def choose(self, count):
    labels = np.arange(count) % self.num_classes
    return np.asarray(self.of_batch({"label": labels}))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(CONDITIONS, "angle", AngleCondition)


def test_custom_condition_trains_on_digits(tmp_path):
  assert_learns(train_losses(tmp_path, **{"model.condition": "angle"}))


def test_custom_embedder_replaces_the_label_table():
  model = create_model(
    "DiT-S/2", condition="angle", input_size=8, in_channels=1, num_classes=10, depth=1
  )
  params = init_params(model, jax.random.key(0))
  assert params["vector_embed"]["dense"]["kernel"].shape == (SIZE, 384)
  assert "label_embed" not in params
