"""Network, the base class, and check_network for custom networks."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.models import MDT, LabelCondition, Network, check_network
from mdt_jax.models.registry import Model, abstract_params, network_of

SMALL = dict(input_size=8, in_channels=3, num_classes=10)


class Conv(Network):
  """A custom network."""

  width: int = 8

  @nn.compact
  def __call__(self, x, t, y, token_mask=None, train=False):
    h = nn.silu(nn.Conv(self.width, (3, 3))(x))
    c = self.conditioning.embedder(self.width, jnp.float32)(y, train)
    c = c + nn.Dense(self.width)(t[:, None])
    return nn.Conv(self.out_channels, (3, 3))(h + c[:, None, None])


class NoField(Network):
  """A custom network with a field without a default."""

  width: int

  def __call__(self, x, t, y, token_mask=None, train=False):
    return jnp.concatenate([x, x], axis=-1)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_custom_network_passes(learn_sigma):
  check_network(Conv(**SMALL, learn_sigma=learn_sigma))


def test_custom_field_needs_no_default():
  check_network(NoField(width=3, **SMALL))


@pytest.mark.parametrize(
  "name",
  [
    *("DiT-S/2", "SiT-S/2", "MDT-B/4", "MDTv2-S/8", "TREAD-S/2"),
    *("MaskDiT-S/4", "MicroDiT-L/2", "SPRINT-S/2"),
  ],
)
def test_networks_of_the_package_pass(name):
  model = create_model(name)
  check_network(model)
  assert isinstance(model, Network) and Model is Network


def test_custom_network_inherits_the_attributes_of_network():
  model = Conv(**SMALL)
  assert (model.out_channels, model.num_tokens, model.unroll) == (6, 64, 1)
  assert (model.frozen, model.takes_mask, model.has_route) == ((), False, False)
  assert model.conditioning == LabelCondition(10, 0.1)
  assert abstract_params(model)["label_embed"]["table"].shape == (11, 8)
  assert hash(model) == hash(model.clone())


def test_mdt_attributes_keep_their_defaults():
  fields = {field.name: field.default for field in dataclasses.fields(MDT)}
  assert {name: fields[name] for name in fields if name not in ("parent", "name")} == (
    dict(
      variant="MDTv2",
      input_size=32,
      patch_size=2,
      in_channels=4,
      num_classes=1000,
      hidden_size=384,
      depth=12,
      num_heads=6,
      decode_depth=6,
      mlp_ratio=4.0,
      patch_bottleneck=0,
      label_dropout=0.1,
      learn_sigma=True,
      dtype=jnp.float32,
      remat="none",
      unroll=1,
      condition=None,
      forward_mode=False,
      sow_attention=False,
      attention_kernel="plain",
    )
  )


@pytest.mark.parametrize(
  ("attribute", "value", "accepted"),
  [
    ("input_size", 0, "must be at least 1"),
    ("patch_size", 0, "must be at least 1"),
    ("in_channels", -1, "must be at least 1"),
    ("num_classes", 0, "must be at least 1"),
    ("patch_size", 3, "must be divisible by patch_size = 3"),
    ("label_dropout", 1.0, "must lie in [0, 1)"),
    ("unroll", 0, "must be -1 (all) or at least 1"),
  ],
)
def test_invalid_attribute_is_refused(attribute, value, accepted):
  model = Conv(**SMALL | {attribute: value})
  with pytest.raises(SettingError) as error:
    check_network(model)
  assert error.value.accepted == accepted


class Narrow(Conv):
  @nn.compact
  def __call__(self, x, t, y, token_mask=None, train=False):
    return nn.Conv(self.in_channels, (3, 3))(x)


class Pair(Conv):
  def __call__(self, x, t, y, token_mask=None, train=False):
    return x, x


class Unmasked(Conv):
  def __call__(self, x, t, y, train=False):
    return jnp.concatenate([x, x], axis=-1)


class Misfit(Conv):
  def __call__(self, x, t, y, token_mask=None, train=False):
    return jax.lax.add(x, jnp.zeros((5, 5, 5, 5)))


class NoCall(Network):
  pass


SIGNATURE = "expected signature (x, t, y, token_mask=None, train=False)"


@pytest.mark.parametrize(
  ("network", "part"),
  [
    (Narrow, "of shape (2, 8, 8, 6), returns (2, 8, 8, 3)"),
    (Pair, "of shape (2, 8, 8, 6), returns tuple"),
    (Unmasked, "token_mask"),
    (Misfit, "incompatible shapes"),
    (NoCall, "__call__"),
  ],
)
def test_error_for_an_invalid_network_is_one_line(network, part):
  with pytest.raises(SettingError) as error:
    check_network(network(**SMALL))
  assert (error.value.setting, error.value.value) == ("model", network.__name__)
  line = str(error.value)
  assert part in line and line.endswith(SIGNATURE) and "\n" not in line


def test_module_that_is_not_a_network_is_refused():
  with pytest.raises(SettingError) as error:
    check_network(nn.Dense(3))
  assert (error.value.setting, error.value.value) == ("model", "Dense")


def test_class_in_place_of_a_network_is_refused():
  with pytest.raises(SettingError) as error:
    check_network(Conv)
  assert (error.value.setting, error.value.value) == ("model", "Conv")
  assert "Conv(…)" in error.value.accepted


def test_error_names_a_network_that_is_not_registered():
  with pytest.raises(SettingError) as error:
    network_of(Conv(**SMALL))
  assert (error.value.setting, error.value.value) == ("model", "Conv")
