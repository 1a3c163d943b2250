"""The network of the recorded diffusion outputs, and the recorded arrays as NHWC."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests import reference

RECORDED = reference.load("diffusion")


def network(x, t):
  """tanh(conv3x3(x) + bias cos(3 t / 1000)): 8 channels of x (B, H, W, 4)."""
  features = jax.lax.conv_general_dilated(
    x,
    RECORDED["toy/conv_oihw"].transpose(2, 3, 1, 0),
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  phase = jnp.cos(3 * t.astype(jnp.float32) / 1000)[:, None, None, None]
  return jnp.tanh(features + RECORDED["toy/tbias"] * phase)


def recorded(name):
  """A recorded array of images, channels last."""
  return reference.to_nhwc(RECORDED[name])
