"""Attention and its custom gradient, compared with jax.nn.dot_product_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdt_jax
from mdt_jax.errors import SettingError
from mdt_jax.models import attention as module
from mdt_jax.models.attention import (
  attention,
  check_kernel,
  cudnn_attention,
  kernel_for,
)
from mdt_jax.models.masking import random_token_mask

SHAPE = (3, 20, 2, 8)  # Images, tokens, heads, width of a head.


def inputs(bias_batch: int, dtype: str = "float32") -> list[jax.Array | None]:
  keys = jax.random.split(jax.random.key(0), 5)
  qkv = [2 * jax.random.normal(key, SHAPE, dtype) for key in keys[:3]]
  _, tokens, heads, _ = SHAPE
  bias = None
  if bias_batch:
    bias = 2 * jax.random.normal(keys[3], (bias_batch, heads, tokens, tokens))
  return [*qkv, bias]


def value_and_gradients(function, arguments):
  weights = jax.random.normal(jax.random.key(1), SHAPE)

  def total(*arguments):
    out = function(*arguments)
    return (out.astype(jnp.float32) * weights).sum(), out

  argnums = tuple(i for i, x in enumerate(arguments) if x is not None)
  gradients, out = jax.jit(jax.grad(total, argnums, has_aux=True))(*arguments)
  return [out, *gradients]


def standard(query, key, value, bias):
  return jax.nn.dot_product_attention(query, key, value, bias=bias)


@pytest.mark.parametrize("bias_batch", [0, 1, SHAPE[0]])
def test_attention_matches_dot_product_attention(bias_batch):
  arguments = inputs(bias_batch)
  found = value_and_gradients(attention, arguments)
  expected = value_and_gradients(standard, arguments)
  assert len(found) == (5 if bias_batch else 4)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()))


def test_bfloat16_attention_is_exact_up_to_rounding():
  arguments = inputs(1, "bfloat16")
  found = value_and_gradients(attention, arguments)
  exact = [None if x is None else x.astype(jnp.float32) for x in arguments]
  for a, b, x in zip(
    found, value_and_gradients(standard, exact), [arguments[0], *arguments], strict=True
  ):
    assert a.dtype == x.dtype
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, atol=2e-2 * float(abs(b).max())
    )


@pytest.mark.parametrize("bias", [300.0, -300.0])
def test_large_logits_give_finite_gradients(bias):
  query, key, value, _ = inputs(0)
  tokens = SHAPE[1]
  bias = jnp.zeros((1, SHAPE[2], tokens, tokens)).at[..., 0].set(bias)
  arguments = [30 * query, 30 * key, value, bias]
  found = value_and_gradients(attention, arguments)
  expected = value_and_gradients(standard, arguments)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * max(1, float(abs(b).max())))


@pytest.fixture
def fake_cudnn(monkeypatch):
  """Replaces cuDNN's kernel by products, without the gradient that cuDNN lacks."""

  def kernel(query, key, value, bias):
    if bias is not None and len(bias) > 1:
      bias = jax.lax.stop_gradient(bias)
    return standard(query, key, value, bias)

  monkeypatch.setattr(module, "_cudnn", kernel)
  monkeypatch.setattr(module, "check_kernel", lambda *arguments: None)


@pytest.mark.parametrize("bias_batch", [0, 1, SHAPE[0]])
def test_cudnn_attention_has_all_gradients(fake_cudnn, bias_batch):
  arguments = inputs(bias_batch)
  found = value_and_gradients(cudnn_attention, arguments)
  expected = value_and_gradients(standard, arguments)
  assert len(found) == (5 if bias_batch else 4)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()))


def test_cudnn_refuses_an_odd_number_of_tokens_with_a_bias(fake_cudnn):
  query = jnp.zeros((1, 5, 2, 8), jnp.bfloat16)
  with pytest.raises(SettingError) as error:
    cudnn_attention(query, query, query, jnp.zeros((1, 2, 5, 5)))
  assert (error.value.setting, error.value.value) == ("attention_kernel", "cudnn")


@pytest.mark.parametrize(
  ("kernel", "dtype", "width"),
  [
    ("flash", jnp.float32, 64),
    ("cudnn", jnp.float32, 64),
    ("cudnn", jnp.bfloat16, 36),
    ("cudnn", jnp.bfloat16, 136),
  ],
)
def test_kernel_names_what_it_cannot_run(kernel, dtype, width):
  with pytest.raises(SettingError) as error:
    check_kernel(kernel, dtype, width)
  assert (error.value.setting, error.value.value) == ("attention_kernel", kernel)


def test_every_released_head_runs_in_cudnn():
  for width in (64, 72):
    check_kernel("cudnn", jnp.bfloat16, width)


def test_numbers_of_tokens_that_a_kernel_does_not_run_are_plain(caplog):
  caplog.set_level("INFO", "mdt_jax")
  kernel_for.cache_clear()
  assert [kernel_for("cudnn", 7, has_bias) for has_bias in (True, False)] == [
    "plain",
    "cudnn",
  ]
  assert kernel_for("cudnn", 8, True) == "cudnn"
  (line,) = caplog.messages
  assert line.startswith("attention of 7 tokens by plain products: cudnn needs even")


def test_masked_pass_of_an_odd_number_of_tokens_is_plain(monkeypatch):
  def of_even_numbers(query, key, value, bias):
    assert query.shape[1] % 2 == 0
    return attention(query, key, value, bias)

  monkeypatch.setitem(module.KERNELS, "cudnn", of_even_numbers)
  sizes = dict(input_size=8, hidden_size=16, num_heads=2, depth=4, decode_depth=2)
  options = dict(num_classes=3, dtype=jnp.bfloat16, attention_kernel="cudnn")
  model = mdt_jax.create_model("MDTv2-S/2", **sizes, **options)
  batch = (jnp.zeros((1, *model.input_shape)), jnp.zeros(1), jnp.zeros(1, int))
  mask = random_token_mask(jax.random.key(0), 1, model.num_tokens, num_keep=7)
  shapes = jax.eval_shape(model.init, jax.random.key(1), *batch, mask)
  out = jax.eval_shape(model.apply, shapes, *batch, mask)
  assert out.shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
  ("name", "heads"),
  [
    ("MaskDiT-S/2", {"decoder_hidden_size": 64, "decoder_num_heads": 16}),
    ("MicroDiT-S/2", {"mixer_hidden_size": 64, "mixer_num_heads": 16}),
  ],
)
def test_heads_of_other_parts_are_checked(name, heads):
  with pytest.raises(SettingError, match=r"needs a width of a head .* has 4$"):
    mdt_jax.create_model(name, dtype=jnp.bfloat16, attention_kernel="cudnn", **heads)
