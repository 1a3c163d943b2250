"""MicroDiT: agreement with the recorded definition of its method on DiT's modules."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.diffusion.guidance import guided
from mdt_jax.models.masking import random_token_mask, token_mask_from_noise
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.pretrained.torch_mdt import from_torch
from tests import reference

NAMES = ("microdit_dit", "microdit_dit_same")  # mixers of another and of the same width
NUM_CLASSES = 10
TINY = dict(input_size=8, in_channels=4, num_classes=10, hidden_size=16, num_heads=2)
TINY |= dict(depth=2, mixer_depth=1)


@functools.cache
def load_model(name=NAMES[0], **overrides):
  config = json.loads(str(reference.load(name)["config"]))
  attributes, params = from_torch(
    reference.FIXTURES / f"{name}.pt",
    num_heads=config["num_heads"],
    mixer_num_heads=config["mixer_heads"],
  )
  return create_model(**{**attributes, **overrides}), params


def inputs(name=NAMES[0]):
  recorded = reference.load(name)
  return jnp.asarray(reference.to_nhwc(recorded["x"])), recorded["t"], recorded["y"]


def recorded_mask(name=NAMES[0]):
  recorded = reference.load(name)
  kept = recorded["ids_keep"].shape[1]
  return token_mask_from_noise(jnp.asarray(recorded["mask_noise"]), kept)


@functools.cache
def outputs(name=NAMES[0], masked=True, **overrides):
  """Output and intermediate values of the recorded pass."""
  model, params = load_model(name, **overrides)
  run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  mask = recorded_mask(name) if masked else None
  output, state = run({"params": params}, *inputs(name), mask)
  return output, state["intermediates"]


OPTIONS = [{}, {"unroll": -1}, {"remat": "full"}, {"forward_mode": True}]


@pytest.mark.parametrize(
  ("name", "options"), [(NAMES[1], {}), *((NAMES[0], options) for options in OPTIONS)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_matches_reference(name, masked, options):
  found, _ = outputs(name, masked, **options)
  reference.assert_matches(
    f"MicroDiT, forward pass {'with' if masked else 'without'} a mask",
    reference.to_nchw(found),
    reference.load(name)["out_masked" if masked else "out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("name", NAMES)
def test_mask_keeps_the_recorded_tokens_in_their_order(name):
  recorded, mask = reference.load(name), recorded_mask(name)
  np.testing.assert_array_equal(mask.ids_keep, recorded["ids_keep"])
  np.testing.assert_array_equal(mask.removed, recorded["mask"] == 1)
  model, _ = load_model(name)
  assert model.num_kept(float(recorded["mask_ratio"])) == mask.ids_keep.shape[1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_after_the_mixer_match_reference(name, masked):
  _, found = outputs(name, masked)
  suffix = "" if masked else "_all"
  for ours, theirs in (
    ("tokens_mixed", "tokens_mixed"),
    ("tokens_into_backbone", f"tokens_into_backbone{suffix}"),
  ):
    reference.assert_matches(
      "MicroDiT, tokens after the mixer",
      found[ours][0],
      reference.load(name)[theirs],
      reference.FORWARD_TOLERANCE,
    )


@pytest.mark.parametrize("name", NAMES)
def test_guided_output_matches_reference(name):
  """All tokens take part. The recording also guides the channels of the variance."""
  model, params = load_model(name)
  recorded, (x, t, y) = reference.load(name), inputs(name)

  def network(x, t, y):
    output = model.apply({"params": params}, x, t, y)
    return output[..., 4:] if variance else output

  for variance in (False, True):
    scale = float(recorded["cfg/scale"])
    model_fn = guided(
      network, jnp.asarray(y), NUM_CLASSES, scale=scale, power=0.0, channels=None
    )
    reference.assert_matches(
      "MicroDiT, guided output",
      reference.to_nchw(jax.jit(model_fn)(x, t))[:, :4],
      recorded["cfg/out"][:, 4:] if variance else recorded["cfg/out"][:, :4],
      reference.LOOP_TOLERANCE,
    )


# Properties.


def test_output_is_zero_at_the_removed_tokens_alone():
  removed = as_pixels(np.asarray(recorded_mask().removed))
  output = np.asarray(outputs()[0])
  np.testing.assert_array_equal((output == 0).all(-1, keepdims=True), removed)


def gradient_of_kept(through):
  """Gradient, by the input, of the sum of squares over the kept tokens.

  Args:
    through: whether the mixer may carry what removed tokens show.
  """
  model, params = load_model()
  if not through:  # blocks of the mixer change nothing if their gates are zero
    params = {
      **params,
      "mixer_blocks": {
        **params["mixer_blocks"],
        "modulation": jax.tree.map(np.zeros_like, params["mixer_blocks"]["modulation"]),
      },
    }
  x, t, y = inputs()

  def total(x):
    return (model.apply({"params": params}, x, t, y, recorded_mask()) ** 2).sum()

  return np.asarray(jax.jit(jax.grad(total))(x))


def test_removed_tokens_have_an_influence_through_the_mixer_alone():
  removed = as_pixels(np.asarray(recorded_mask().removed))
  gradient = gradient_of_kept(through=False)
  removed = np.broadcast_to(removed, gradient.shape)
  assert (gradient[removed] == 0).all() and (gradient[~removed] != 0).all()
  assert (gradient_of_kept(through=True)[removed] != 0).all()


def as_pixels(tokens):
  """(B, L) of patches of 2x2 pixels -> (B, H, W, 1)."""
  side = round(tokens.shape[1] ** 0.5)
  grid = tokens.reshape(len(tokens), side, side)
  return grid.repeat(2, axis=1).repeat(2, axis=2)[..., None]


def test_mask_of_all_tokens_changes_nothing():
  model, params = load_model()
  mask = random_token_mask(jax.random.key(0), 4, model.num_tokens, model.num_tokens)
  output, expected = (
    model.apply({"params": params}, *inputs(), mask),
    outputs(masked=False)[0],
  )
  error = reference.relative_error(output, np.asarray(expected))
  assert error < reference.FORWARD_TOLERANCE


def test_rectangle_is_masked_by_rows():
  """A token of a grid of 4 x 6 is at the same place in input and output."""
  model = create_model("MicroDiT-S/2", **TINY | {"input_size": (8, 12)})
  params = reference.random_params(model)
  mask = random_token_mask(jax.random.key(0), 1, 24, 6)
  x = jax.random.normal(jax.random.key(1), (1, 8, 12, 4))
  t = y = jnp.array([1])
  output = np.asarray(model.apply({"params": params}, x, t, y, mask))
  removed = np.asarray(mask.removed).reshape(4, 6).repeat(2, 0).repeat(2, 1)
  np.testing.assert_array_equal((output[0] == 0).all(-1), removed)


def test_bfloat16_is_close_to_float32():
  model, params = load_model(dtype="bfloat16")
  output = jax.jit(model.apply)({"params": params}, *inputs(), recorded_mask())
  assert output.dtype == jnp.float32
  error = reference.relative_error(output, np.asarray(outputs()[0]))
  assert 0 < error < 0.05


def test_parameters_do_not_depend_on_the_mask():
  model = create_model("MicroDiT-S/2", **TINY)
  x, y = jnp.zeros((1, 8, 8, 4)), jnp.array([0])
  mask = random_token_mask(jax.random.key(0), 1, 16, 4)
  with_mask = jax.eval_shape(model.init, jax.random.key(0), x, y, y, mask)["params"]
  assert with_mask == abstract_params(model)


@pytest.mark.parametrize(
  ("size", "mixer", "parameters"),
  [
    ("S", (3, 384, 6), 3 / 12),
    ("B", (3, 768, 12), 3 / 12),
    ("L", (6, 768, 12), 0.15),
    ("XL", (6, 864, 12), 0.13),
  ],
)
def test_mixers_of_the_presets(size, mixer, parameters):
  """Depth, width and heads; and the parameters as a share of the backbone's blocks."""
  model = create_model(f"MicroDiT-{size}/2")
  assert (model.mixer_depth, model.mixer_width, model.mixer_heads) == mixer
  counts = dict.fromkeys(("mixer_blocks", "blocks"), 0)
  for path, leaf in flatten(abstract_params(model)).items():
    if (stack := path.partition("/")[0]) in counts:
      counts[stack] += leaf.size
  share = counts["mixer_blocks"] / counts["blocks"]
  assert share == pytest.approx(parameters, abs=0.01)


@pytest.mark.parametrize(
  ("attributes", "setting", "value", "accepted"),
  [
    ({"mixer_depth": 0}, "mixer_depth", 0, "must be at least 1"),
    ({"mixer_hidden_size": -4}, "mixer_hidden_size", -4, "must be at least 1"),
    ({"mixer_num_heads": 0}, "mixer_num_heads", 0, "must be at least 1"),
    (
      {"mixer_hidden_size": 100},
      "mixer_hidden_size",
      100,
      "must be divisible by hidden_size / num_heads = 64, the size of a head, unless "
      "mixer_num_heads is given",
    ),
    (
      {"mixer_hidden_size": 100, "mixer_num_heads": 3},
      "mixer_num_heads",
      3,
      "must divide the width of the mixer, 100",
    ),
    (
      {"mixer_num_heads": 5},
      "mixer_num_heads",
      5,
      "must divide the width of the mixer",
    ),
  ],
)
def test_mixer_that_does_not_fit_is_refused(attributes, setting, value, accepted):
  with pytest.raises(SettingError) as error:
    create_model("MicroDiT-B/2", **attributes)
  assert (error.value.setting, error.value.value) == (setting, value)
  assert error.value.accepted.startswith(accepted)
