"""A GPU computes what the released code and the CPU compute; skipped without a GPU.

JAX_PLATFORMS=cuda,cpu XLA_FLAGS= python -m pytest tests/test_gpu.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import sharding
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.experiment import build
from mdt_jax.models import attention
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.training.program import make_program
from tests import reference
from tests.training.tiny import tiny_config

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="there is no GPU"
)

# Relative to the largest magnitude. "default" multiplies in TensorFloat-32, which has
# 10 bits of mantissa.
TOLERANCES = {"highest": reference.FORWARD_TOLERANCE, "default": 1e-2}
STEP_TOLERANCE = 1e-4  # loss and parameters after three steps, against the CPU


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_forward_matches_reference(name, masked, precision):
  if masked and name not in reference.MDT_FIXTURES:
    pytest.skip("DiT has no masked pass")
  recorded = reference.load(name)
  model, params = reference.make_model(name), reference.load_model(name)[1]
  mask = None
  if masked:
    kept = recorded["ids_keep"].shape[1]
    mask = token_mask_from_noise(recorded["mask_noise"], kept)
  x = reference.to_nhwc(recorded["x"])
  with jax.default_matmul_precision(precision):
    out = jax.jit(model.apply)(
      {"params": params}, x, recorded["t"], recorded["y"], mask
    )
  expected = recorded["out_masked" if masked else "out"]
  error = reference.relative_error(reference.to_nchw(out), expected)
  print(f"{name}, {'masked' if masked else 'unmasked'}, {precision}: {error:.1e}")
  assert error <= TOLERANCES[precision]


@functools.cache
def train(platform, name, steps=3):
  """Returns the experiment, its state after `steps` steps and the losses."""
  config = tiny_config(**{"model.name": name})
  experiment = build(config, jax.devices(platform)[:1])
  rng = np.random.default_rng(0)
  shape = (config.batch_size, *experiment.model.input_shape)
  batch = {
    "image": rng.uniform(-1, 1, shape).astype(np.float32),
    "label": rng.integers(0, 10, config.batch_size).astype(np.int32),
  }
  static = experiment.objective.static_choices[0]
  losses = []
  with (
    jax.default_matmul_precision("highest"),
    sharding.use_mesh(experiment.mesh),
  ):
    program = make_program(experiment)
    state = program.init(jax.random.key(0))
    for _ in range(steps):
      placed = sharding.put_batch(batch, experiment.mesh, config.batch_size)
      state, metrics = program.step(state, placed, static)
      total, count = metrics["loss"]
      losses.append(float(total / count))
  return experiment, state, losses


@pytest.mark.parametrize("name", ["MDTv2-S/2", "DiT-S/2"])
def test_training_step_equals_that_of_the_cpu(name):
  _, on_gpu, losses = train("gpu", name)
  _, on_cpu, expected = train("cpu", name)
  np.testing.assert_allclose(losses, expected, rtol=STEP_TOLERANCE)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=STEP_TOLERANCE),
    jax.device_get(on_gpu.params),
    jax.device_get(on_cpu.params),
  )


KERNEL_TOLERANCE = 2e-2  # bfloat16 has 8 bits of mantissa


@pytest.mark.parametrize("biases", [None, 1, 4])
def test_fused_attention_equals_plain_attention(biases):
  """Outputs and gradients; the plain ones are computed in float32."""
  images, tokens, heads, width = 4, 160, 6, 64
  keys = jax.random.split(jax.random.key(0), 5)
  shape = (images, tokens, heads, width)
  query, key, value, weight = (
    jax.random.normal(k, shape).astype(jnp.bfloat16) for k in keys[:4]
  )
  bias = biases and jax.random.normal(keys[4], (biases, heads, tokens, tokens))

  def run(attend, *arrays):
    def loss(*arrays):
      return (attend(*arrays).astype(jnp.float32) * weight).sum()

    arguments = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return jax.jit(attend)(*arrays), *jax.jit(jax.grad(loss, arguments))(*arrays)

  exact = [x.astype(jnp.float32) for x in (query, key, value)]
  with jax.default_matmul_precision("highest"):
    expected = run(attention.attention, *exact, bias)
  found = run(attention.cudnn_attention, query, key, value, bias)
  names = ("output", "query", "key", "value", "bias")
  for name, a, b in zip(names, found, expected, strict=False):
    error = reference.relative_error(np.asarray(a, np.float32), np.asarray(b))
    print(f"cudnn, {biases} biases, {name}: {error:.1e}")
    assert error <= KERNEL_TOLERANCE, name


def test_checkpoint_restores_the_same_bits(tmp_path):
  experiment, state, _ = train("gpu", "MDTv2-S/2")
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(3, state, experiment.settings.to_dict())
  checkpoints.close()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  checkpoints = Checkpoints(tmp_path, 2)
  restored = checkpoints.restore(like, experiment)
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
