"""The Pallas kernel for TPUs, as JAX operations on the CPU: its twin is `attention`.

Its compilation for TPUs needs libtpu: docs/performance.md has the command.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mdt_jax import create_model, sharding
from mdt_jax.errors import SettingError
from mdt_jax.models import pallas_attention as module
from mdt_jax.models.attention import KERNELS, attention
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.pallas_attention import pallas_attention, rows_of
from tests import forked, reference
from tests.models.test_attention import inputs, value_and_gradients

interpreted = functools.partial(pallas_attention, interpret=True)


def random(shape, seed, dtype="float32"):
  return 2 * jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def gradients(function, arguments, weights):
  """The output, and the gradients by all arguments that are arrays."""
  places = tuple(i for i, x in enumerate(arguments) if x is not None)

  def total(*arguments):
    out = function(*arguments)
    return (out.astype(jnp.float32) * weights).sum(), out

  found, out = jax.jit(jax.grad(total, places, has_aux=True))(*arguments)
  return [out, *found]


def assert_close(found, expected, tolerance):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, atol=tolerance * float(abs(b).max()), rtol=0)


@pytest.mark.parametrize("bias_batch", [0, 1, 3])
def test_kernel_equals_its_twin(bias_batch):
  arguments = inputs(bias_batch)
  expected = value_and_gradients(attention, arguments)
  assert_close(value_and_gradients(interpreted, arguments), expected, 3e-6)


@pytest.mark.parametrize("bias_batch", [0, 1, 2])
def test_queries_of_several_programs(bias_batch, monkeypatch):
  """Sums over queries and over images are those of one program."""
  monkeypatch.setattr(module, "MAX_ROWS", 8)
  arguments = [random((2, 24, 4, 8), i) for i in range(3)]
  bias = random((bias_batch, 4, 24, 24), 3) if bias_batch else None
  weights = random((2, 24, 4, 8), 4)
  assert rows_of(24) == 8
  expected = gradients(attention, [*arguments, bias], weights)
  found = gradients(interpreted, [*arguments, bias], weights)
  assert_close(found, expected, 3e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_heads_of_one_program_do_not_mix(count, monkeypatch):
  monkeypatch.setattr(module, "_heads_of", lambda *_: count)
  arguments = [random((2, 16, 4, 8), i) for i in range(3)] + [random((1, 4, 16, 16), 3)]
  weights = random((2, 16, 4, 8), 4)
  expected = gradients(attention, arguments, weights)
  assert_close(gradients(interpreted, arguments, weights), expected, 3e-6)


def test_bfloat16_is_as_exact_as_the_twin():
  """Errors against float32 are at most twice those of plain products."""
  arguments = inputs(1, "bfloat16")
  exact = [x.astype(jnp.float32) for x in arguments]
  # The kernel reads a rounded bias.
  exact[3] = exact[3].astype(jnp.bfloat16).astype(jnp.float32)
  expected = value_and_gradients(attention, exact)
  errors = []
  for function in (interpreted, attention):
    found = value_and_gradients(function, [*arguments[:3], exact[3]])
    assert [x.dtype for x in found[:4]] == [jnp.bfloat16] * 4
    pairs = zip(found, expected, strict=True)
    errors.append([float(abs(a.astype(jnp.float32) - b).max()) for a, b in pairs])
  kernel, twin = np.array(errors)
  assert (kernel <= 2 * twin + 1e-3).all(), errors


@pytest.mark.parametrize("bias_batch", [0, 1, 2])
def test_bfloat16_in_several_programs(bias_batch, monkeypatch):
  """Sums over programs are float32, so that their number does not matter."""
  arguments = [random((2, 24, 4, 8), i, "bfloat16") for i in range(3)]
  bias = random((bias_batch, 4, 24, 24), 3) if bias_batch else None
  weights = random((2, 24, 4, 8), 4)
  one = gradients(interpreted, [*arguments, bias], weights)
  monkeypatch.setattr(module, "MAX_ROWS", 8)
  several = gradients(interpreted, [*arguments, bias], weights)
  assert_close(several, one, 2**-8)  # a last digit of bfloat16


def test_gradient_of_the_bias_of_one_image_is_not_rounded():
  """With one image on a device, a bias still counts as one that images share."""
  arguments = [x[:1] for x in inputs(1, "bfloat16")]
  weights = jnp.ones((1, *arguments[0].shape[1:]))
  found = gradients(interpreted, arguments, weights)[4]
  assert found.dtype == jnp.float32
  assert (found != found.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("bias", [300.0, -300.0])
def test_large_logits_give_finite_gradients(bias):
  query, key, value, _ = inputs(0)
  biases = jnp.zeros((1, 2, 20, 20)).at[..., 0].set(bias)
  arguments = [30 * query, 30 * key, value, biases]
  expected = value_and_gradients(attention, arguments)
  for a, b in zip(value_and_gradients(interpreted, arguments), expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * max(1, float(abs(b).max())))


@pytest.mark.parametrize("variant", ["DiT", "MDTv2"])
def test_network_computes_the_same(variant, monkeypatch):
  """Both passes of MDTv2, of which the masked one has a bias for each image."""
  monkeypatch.setitem(KERNELS, "pallas", interpreted)
  sizes = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=4)
  own = {"decode_depth": 2} if variant == "MDTv2" else {}
  attributes = dict(variant=variant, num_heads=2, **sizes, **own)
  params = reference.random_params(create_model(**attributes))
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 8, 8, 1)).astype(np.float32)
  times, labels = np.array([1, 500, 900]), np.array([1, 2, 3])
  mask = None
  if variant == "MDTv2":
    mask = token_mask_from_noise(rng.random((3, 16)), 10)

  def loss(params, kernel):
    model = create_model(**attributes, attention_kernel=kernel)
    apply = functools.partial(model.apply, {"params": params}, images, times, labels)
    total = (apply() ** 2).mean()
    if mask is not None:
      total += (apply(token_mask=mask) ** 2).mean()
    return total

  plain, pallas = (
    jax.jit(jax.value_and_grad(functools.partial(loss, kernel=kernel)))(params)
    for kernel in ("plain", "pallas")
  )
  np.testing.assert_allclose(plain[0], pallas[0], rtol=1e-5)
  leaves = zip(jax.tree.leaves(plain[1]), jax.tree.leaves(pallas[1]), strict=True)
  for a, b in leaves:
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(abs(a).max() + 1e-6))


def compare_on_a_mesh():
  """Asserts that eight devices compute what one does, also in `mean_over_data`."""
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), sharding.AXES)
  arguments = [random((8, 16, 4, 8), i) for i in range(3)]
  weights = random((8, 16, 4, 8), 3)
  for bias_batch in (0, 1, 8):
    bias = random((bias_batch, 4, 16, 16), 4) if bias_batch else None
    _, *expected = gradients(attention, [*arguments, bias], weights)
    with sharding.use_mesh(mesh):
      out, *found = gradients(interpreted, [*arguments, bias], weights)
    assert_close(found, expected, 3e-6)
    assert len(out.sharding.device_set) == 8

  # Devices that divide neither images nor heads compute all of them.
  whole = [random((6, 16, 3, 8), i) for i in range(3)] + [random((1, 3, 16, 16), 3)]
  expected = gradients(attention, whole, random((6, 16, 3, 8), 4))
  with sharding.use_mesh(mesh):
    found = gradients(interpreted, whole, random((6, 16, 3, 8), 4))
  assert_close(found, expected, 3e-6)

  def loss_of_bias(bias, batch):
    *arguments, weights = batch
    losses = (interpreted(*arguments, bias) * weights).sum((1, 2, 3))
    return losses.mean(), losses

  bias = random((1, 4, 16, 16), 4)
  compute = jax.grad(loss_of_bias, has_aux=True)
  expected = jax.jit(compute)(bias, [*arguments, weights])
  with sharding.use_mesh(mesh):
    by_parts = jax.jit(sharding.mean_over_data(compute, mesh))
    found = by_parts(bias, [*arguments, weights])
  assert_close(found, expected, 3e-6)


def test_mesh_of_eight_devices():
  process = forked.Forked(compare_on_a_mesh, num_devices=8)
  assert process.end() == 0, process.err


@pytest.mark.parametrize(
  ("tokens", "rows"),
  [(1, 1), (163, 163), (256, 256), (257, None), (640, 160), (1024, 256), (4096, 64),
   (2304, 96), (4104, None)],
)  # fmt: skip
def test_queries_of_a_program(tokens, rows):
  assert rows_of(tokens) == rows


def test_other_numbers_of_tokens_are_refused():
  query = jnp.zeros((1, 260, 2, 8))
  with pytest.raises(SettingError) as error:
    pallas_attention(query, query, query, None)
  assert (error.value.setting, error.value.value) == ("attention_kernel", "pallas")
  assert error.value.accepted.endswith("a multiple of 8 up to 4096, has 260")
