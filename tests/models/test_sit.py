"""SiT: agreement with the released code (willisma/SiT) on a small random network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.diffusion.guidance import guided
from mdt_jax.pretrained.torch_mdt import from_torch, to_torch
from tests import reference

NUM_CLASSES = 10
DROPPED = 0.1  # the released code drops a label where its uniform draw is below this


def load():
  return reference.load("sit_network")


@functools.cache
def load_model():
  path = reference.FIXTURES / "sit.pt"
  attributes, params = from_torch(path, "SiT", num_heads=2)
  return attributes, params, create_model(**attributes)


def images(name):
  return jnp.asarray(reference.to_nhwc(load()[name]))


def test_forward_matches_reference():
  recorded = load()
  _, params, model = load_model()
  output = jax.jit(model.apply)(
    {"params": params}, images("x"), recorded["t"], recorded["y"]
  )
  reference.assert_matches(
    "SiT, forward pass",
    reference.to_nchw(output),
    recorded["out"],
    reference.FORWARD_TOLERANCE,
  )


def test_output_is_the_first_half_of_the_channels_of_the_last_layer():
  recorded = load()
  _, params, model = load_model()
  both = model.clone(variant="DiT", learn_sigma=True)
  output = jax.jit(both.apply)(
    {"params": params}, images("x"), recorded["t"], recorded["y"]
  )
  reference.assert_matches(
    "SiT, all channels of the last layer",
    reference.to_nchw(output),
    recorded["out_all_channels"],
    reference.FORWARD_TOLERANCE,
  )
  np.testing.assert_array_equal(recorded["out_all_channels"][:, :4], recorded["out"])


@pytest.mark.parametrize(
  ("scale", "key"), [(1.5, "cfg_out_scale1p5"), (4.0, "cfg_out_scale4")]
)
def test_guided_output_matches_reference(scale, key):
  """The first 3 channels are guided, and the fourth is that of the label."""
  recorded = load()
  _, params, model = load_model()
  labels, nulls = np.split(recorded["cfg_y"], 2)
  assert (nulls == NUM_CLASSES).all()

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  model_fn = guided(
    network, jnp.asarray(labels), NUM_CLASSES, scale=scale, power=0.0, channels=3
  )
  reference.assert_matches(
    f"SiT, guided output, scale {scale}",
    reference.to_nchw(jax.jit(model_fn)(images("x"), recorded["t"])),
    recorded[key][: len(labels)],
    reference.LOOP_TOLERANCE,
  )


@functools.cache
def loss_and_gradients():
  """The loss of the linear path and its gradients, with the names of the release.

  x_t = t x1 + (1 - t) x0, and the target is the velocity x1 - x0.
  """
  recorded = load()
  attributes, params, model = load_model()
  x0, x1, t = images("x0"), images("x1"), jnp.asarray(recorded["u"])
  labels = np.where(recorded["drop_u"] < DROPPED, NUM_CLASSES, recorded["y_train"])
  factor = t[:, None, None, None]

  def loss(params):
    x_t = factor * x1 + (1 - factor) * x0
    output = model.apply({"params": params}, x_t, t, labels)
    return ((output - (x1 - x0)) ** 2).mean()

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  return value, to_torch(attributes, gradients)


def test_velocity_loss_matches_reference():
  value, _ = loss_and_gradients()
  np.testing.assert_allclose(value, load()["loss"], rtol=reference.FORWARD_TOLERANCE)


@pytest.mark.parametrize("key", [key for key in load() if key.startswith("grad/")])
def test_gradient_matches_reference(key):
  _, gradients = loss_and_gradients()
  reference.assert_matches(
    "SiT, gradient of every parameter",
    gradients[key.removeprefix("grad/")],
    load()[key],
    reference.GRADIENT_TOLERANCE,
  )


def test_every_parameter_has_a_recorded_gradient():
  _, gradients = loss_and_gradients()
  recorded = {key for key in load() if key.startswith("grad/")}
  assert recorded == {f"grad/{name}" for name in gradients}


def test_ignored_channels_have_no_gradient():
  _, gradients = loss_and_gradients()
  rows = gradients["final_layer.linear.weight"].reshape(4, 8, -1)
  assert rows[:, :4].any() and not rows[:, 4:].any()
