"""MDT: agreement with the released code, sizes, dtypes, invalid attributes."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.diffusion.guidance import guided
from mdt_jax.models.layers import REMAT_POLICIES
from mdt_jax.models.masking import random_token_mask, token_mask_from_noise
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import init_params
from mdt_jax.pretrained.torch_mdt import to_torch
from tests import reference

# Parameters of the released networks for 256x256 images and 1,000 classes.
PARAMETER_COUNTS = {
  "MDT-S/2": 35_797_208,
  "MDT-B/2": 141_488_528,
  "MDT-L/2": 477_641_312,
  "MDT-XL/2": 699_778_144,
  "MDTv2-S/2": 38_454_872,
  "MDTv2-B/2": 152_112_272,
  "MDTv2-XL/2": 742_263_904,
  "SiT-XL/2": 675_129_632,
}
TINY = dict(input_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=10)


@functools.cache
def forward(name, masked=False, **overrides):
  recorded = reference.load(name)
  model = reference.make_model(name, **overrides)
  _, params = reference.load_model(name)
  mask = recorded_mask(name) if masked else None
  x = reference.to_nhwc(recorded["x"])
  return reference.to_nchw(apply(model, params, x, recorded["t"], recorded["y"], mask))


def recorded_mask(name):
  recorded = reference.load(name)
  return token_mask_from_noise(recorded["mask_noise"], recorded["ids_keep"].shape[1])


def apply(model, params, *args, **kwargs):
  @jax.jit
  def run(params, args):
    return model.apply({"params": params}, *args, **kwargs)

  return run(params, args)


@pytest.mark.parametrize("unroll", [1, -1])
@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_forward_matches_reference(name, unroll):
  reference.assert_matches(
    f"{reference.NAMES[name]}, forward pass",
    forward(name, unroll=unroll),
    reference.load(name)["out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("unroll", [1, -1])
@pytest.mark.parametrize("name", reference.MDT_FIXTURES)
def test_masked_forward_matches_reference(name, unroll):
  reference.assert_matches(
    f"{reference.NAMES[name]}, masked forward pass from the recorded noise",
    forward(name, masked=True, unroll=unroll),
    reference.load(name)["out_masked"],
    reference.FORWARD_TOLERANCE,
  )


@functools.cache
def gradients(name):
  """Gradients of mean(out^2) + mean(out_masked^2), with the names of the release."""
  recorded = reference.load(name)
  config, params = reference.load_model(name)
  model, mask = MDT(**config), recorded_mask(name)
  inputs = (reference.to_nhwc(recorded["x"]), recorded["t"], recorded["y"])

  def loss(params):
    full = model.apply({"params": params}, *inputs)
    masked = model.apply({"params": params}, *inputs, mask)
    return (full**2).mean() + (masked**2).mean()

  return to_torch(config, jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize(
  ("name", "tensor"),
  [
    (name, key.removeprefix("grad/"))
    for name in reference.MDT_FIXTURES
    for key in reference.load(name)
    if key.startswith("grad/")
  ],
)
def test_gradient_matches_reference(name, tensor):
  reference.assert_matches(
    f"{reference.NAMES[name]}, gradient of every parameter, both passes",
    gradients(name)[tensor],
    reference.load(name)[f"grad/{tensor}"],
    reference.GRADIENT_TOLERANCE,
  )


@pytest.mark.parametrize("name", reference.MDT_FIXTURES)
def test_every_parameter_has_a_recorded_gradient(name):
  recorded = {key for key in reference.load(name) if key.startswith("grad/")}
  buffers = "relative_position_index"
  assert recorded == {f"grad/{key}" for key in gradients(name) if buffers not in key}


@pytest.mark.parametrize(
  ("scale", "power", "key"),
  [(3.8, 4.0, "cfg_out_scale3p8_pow4"), (4.0, 0.01, "cfg_out_scale4_pow0p01")],
)
@pytest.mark.parametrize("name", reference.MDT_FIXTURES)
def test_guided_output_matches_reference(name, scale, power, key):
  recorded = reference.load(name)
  config, params = reference.load_model(name)
  model = MDT(**config)
  half = len(recorded["x"])
  labels, nulls = np.split(recorded["cfg_y"], 2)
  assert (nulls == model.num_classes).all()

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  model_fn = guided(
    network, jnp.asarray(labels), model.num_classes, scale=scale, power=power
  )
  output = jax.jit(model_fn)(reference.to_nhwc(recorded["x"]), recorded["t"])
  reference.assert_matches(
    f"{reference.NAMES[name]}, guided output, scale {scale}, power {power:g}",
    reference.to_nchw(output),
    recorded[key][:half],
    reference.FORWARD_TOLERANCE,
  )


@functools.cache
def masked_gradient(remat):
  model = create_model("MDTv2-S/2", **TINY, decode_depth=2, remat=remat)
  x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([1, 2])
  mask = random_token_mask(jax.random.key(1), 2, 16, 8)

  def loss(params):
    return (model.apply({"params": params}, x, y, y, mask) ** 2).mean()

  params = reference.random_params(model)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
  return compiled(params), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_neither_loss_nor_gradient(remat):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    masked_gradient(remat)[0],
    masked_gradient("none")[0],
  )


def test_memory_of_remat_grows_with_what_is_saved():
  """A CPU has no other memory to offload to: "offload" takes what "linear" takes."""
  memory = {name: masked_gradient(name)[1] for name in REMAT_POLICIES}
  order = ["full", "attention", "linear", "dots", "none"]
  assert sorted(order, key=memory.get) == order
  assert len({memory[name] for name in order}) == len(order)
  assert memory["offload"] == memory["linear"]


@pytest.mark.parametrize(("name", "expected"), PARAMETER_COUNTS.items())
def test_parameter_counts_match_the_released_code(name, expected):
  model = create_model(name)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize("name", ["DiT-S/2", "MDT-S/2", "MDTv2-S/2"])
@pytest.mark.parametrize(
  "overrides",
  [
    dict(in_channels=1, num_classes=1, learn_sigma=False),
    dict(in_channels=3, patch_size=4),
    dict(in_channels=3, patch_size=4, patch_bottleneck=5),
    dict(input_size=6, hidden_size=24),
    dict(input_size=8, patch_size=8),
    dict(input_size=(4, 10)),
    dict(input_size=(9, 15), patch_size=3),
    dict(input_size=(3, 5), patch_size=1),
    dict(depth=6, decode_depth=4),
  ],
)
def test_forward_runs_for_any_channels_size_patch_and_classes(name, overrides):
  model = create_model(name, **({**TINY, "decode_depth": 2} | overrides))
  x = jax.random.normal(jax.random.key(0), (2, *model.input_shape))
  y = jnp.array([0, model.num_classes])
  mask = random_token_mask(jax.random.key(1), 2, model.num_tokens, 1)
  params = reference.random_params(model)
  output = apply(model, params, x, y * 0.5, y, mask if model.takes_mask else None)
  channels = model.in_channels * (2 if model.learn_sigma else 1)
  assert output.shape == (*x.shape[:3], channels)
  assert output.dtype == jnp.float32
  assert jnp.isfinite(output).all()


@pytest.mark.parametrize("name", ["MDT-S/2", "MDTv2-S/2"])
def test_hidden_tokens_do_not_reach_the_encoder(name):
  """A change of a removed patch does not change the output of v1.

  It does change the output of v2, whose decode blocks receive the input again.
  """
  model = create_model(name, **TINY, decode_depth=4 if name == "MDTv2-S/2" else 2)
  params = reference.random_params(model)
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
  noise = jnp.arange(16.0)[None]  # Removes the last tokens.
  mask = token_mask_from_noise(noise, 8)
  y = jnp.array([1])
  changed = x.at[0, 7, 7].add(5.0)
  before, after = (apply(model, params, image, y, y, mask) for image in (x, changed))
  difference = float(jnp.abs(before - after).max())
  assert difference == 0 if name == "MDT-S/2" else difference > 0


def test_bfloat16_output_is_close_to_float32():
  outputs = []
  for dtype in ("float32", "bfloat16"):
    model = create_model("MDTv2-S/2", **TINY, decode_depth=2, dtype=dtype)
    params = reference.random_params(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([1, 2])
    outputs.append(apply(model, params, x, y, y))
  error = reference.relative_error(outputs[1], np.asarray(outputs[0]))
  assert 0 < error < 0.05


def test_double_vjp_matches_finite_differences():
  model = MDT(variant="MDT", **TINY | dict(depth=1), decode_depth=1)
  keys = jax.random.split(jax.random.key(0), 3)
  x, v = (jax.random.normal(key, (2, 8, 8, 4)) for key in keys[:2])
  # Initial parameters need noise, as the output of adaLN-Zero is zero.
  params = jax.tree.map(
    lambda p: p + 0.1 * jax.random.normal(keys[2], p.shape), init_params(model, keys[2])
  )
  t, y = jnp.array([300.0, 700.0]), jnp.array([1, 2])

  def f(x):
    return model.apply({"params": params}, x, t, y)

  @jax.jit
  def forwards(x, v):
    out, pull = jax.vjp(f, x)
    return jax.vjp(pull, jnp.zeros_like(out))[1]((v,))[0]

  difference = jax.jit(lambda x, v: (f(x + 1e-2 * v) - f(x - 1e-2 * v)) / 2e-2)(x, v)
  assert float(abs(difference).max()) > 0.1
  np.testing.assert_allclose(forwards(x, v), difference, atol=1e-2)


def test_dropped_labels_equal_the_null_label():
  model = create_model("MDTv2-S/2", **TINY, decode_depth=2, label_dropout=0.999)
  params = reference.random_params(model)
  x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([1, 2])
  rngs = {"label_dropout": jax.random.key(0)}
  dropped = apply(model, params, x, y, y, train=True, rngs=rngs)
  null = apply(model, params, x, y, jnp.full_like(y, 10))
  np.testing.assert_array_equal(dropped, null)


def test_label_dropout_needs_its_rng_stream():
  model = create_model("MDTv2-S/2", **TINY, decode_depth=2)
  x, y = np.zeros((1, 8, 8, 4), np.float32), np.array([0])
  with pytest.raises(flax.errors.InvalidRngError, match="label_dropout"):
    apply(model, reference.random_params(model), x, y, y, train=True)


@pytest.mark.parametrize("name", ["DiT-S/2", "SiT-S/2"])
def test_network_without_side_interpolater_refuses_a_mask(name):
  model = create_model(name, **TINY)
  x, y = jnp.zeros((1, 8, 8, 4)), jnp.array([0])
  mask = random_token_mask(jax.random.key(0), 1, 16, 8)
  with pytest.raises(ValueError, match="token_mask must be None"):
    model.init(jax.random.key(0), x, y, y, mask)


BAD = [
  ("MDT-S/2", "variant", "MDTv3", "accepted are DiT, SiT, MDT, MDTv2"),
  ("SiT-S/2", "learn_sigma", True, "must be False for SiT"),
  ("MDT-S/2", "remat", "some", "accepted are none, full, attention, linear"),
  ("MDT-S/2", "dtype", "float64", "accepted are float32, bfloat16"),
  *(
    ("MDT-S/2", attribute, 0, "must be at least 1")
    for attribute in (
      "input_size",
      "patch_size",
      "in_channels",
      "num_classes",
      "hidden_size",
      "depth",
      "num_heads",
    )
  ),
  ("MDT-S/4", "input_size", 30, "must be divisible by patch_size = 4"),
  ("MDT-S/4", "input_size", (32, 30), "must be divisible by patch_size = 4"),
  ("MDT-S/4", "input_size", (30, 32), "must be divisible by patch_size = 4"),
  ("MDT-S/4", "input_size", (0, 32), "must be at least 1"),
  ("MDT-S/4", "input_size", (8, 8, 8), "must be a whole number, or (height, width)"),
  ("MDT-S/4", "input_size", (8.0, 4), "must be a whole number, or (height, width)"),
  ("MDT-S/4", "input_size", True, "must be a whole number, or (height, width)"),
  ("MDT-S/2", "hidden_size", 388, "must be divisible by num_heads = 6 and by 4"),
  ("MDT-S/2", "hidden_size", 390, "must be divisible by num_heads = 6 and by 4"),
  ("MDT-S/2", "label_dropout", -0.1, "must lie in [0, 1)"),
  ("MDT-S/2", "label_dropout", 1.0, "must lie in [0, 1)"),
  ("MDT-S/2", "mlp_ratio", 0.0, "must be above 0"),
  ("MDT-S/2", "patch_bottleneck", -1, "must be at least 0"),
  ("MDT-S/2", "unroll", 0, "must be -1 (all) or at least 1"),
  ("MDT-S/2", "unroll", -2, "must be -1 (all) or at least 1"),
  ("MDT-S/2", "decode_depth", 0, "must lie in [1, depth = 12]"),
  ("MDTv2-S/2", "decode_depth", 13, "must lie in [1, depth = 12]"),
  ("MDTv2-S/2", "decode_depth", 5, "depth - decode_depth must be even"),
]


@pytest.mark.parametrize(("name", "attribute", "value", "accepted"), BAD)
def test_error_names_the_attribute_its_value_and_accepted_values(
  name, attribute, value, accepted
):
  with pytest.raises(SettingError) as error:
    create_model(name, **{attribute: value})
  assert str(error.value).startswith(f"{attribute} = {value!r}: {accepted}")


@pytest.mark.parametrize(
  ("name", "decode_depth"), [("MDT-S/2", 12), ("MDTv2-S/2", 12), ("DiT-S/2", 99)]
)
def test_largest_decode_depth_is_accepted(name, decode_depth):
  assert create_model(name, decode_depth=decode_depth).decode_depth == decode_depth
