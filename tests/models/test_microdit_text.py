"""The released MicroDiT, which reads captions (SonyResearch/micro_diffusion)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model, create_objective, create_process
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.samplers import Sampler, sample
from mdt_jax.models import flops
from mdt_jax.models.conditions import CaptionCondition
from mdt_jax.models.experts import Experts
from mdt_jax.models.masking import random_token_mask, token_mask_from_noise
from mdt_jax.models.registry import abstract_params
from mdt_jax.objectives.objective import Draws
from mdt_jax.pretrained.torch_mdt import attributes_of, from_torch, to_torch
from tests import reference
from tests.models import test_flops

RECORDED = reference.load("microdit")
CAPTIONS = jnp.asarray(RECORDED["captions"][:, 0])  # (B, S, V)
MASK = token_mask_from_noise(jnp.asarray(RECORDED["mask_noise"]), 9)
PROCESS = create_process("edm", sigma_data=0.9, p_mean=-0.6, p_std=1.2)
TINY = dict(
  variant="MicroDiTText",
  input_size=8,
  caption_length=3,
  caption_channels=5,
  hidden_size=16,
  num_heads=2,
  attention_widths=(8, 16, 16),
  mlp_widths=(8, 12, 16),
  mixer_hidden_size=8,
  mixer_mlp_widths=(8, 12),
  caption_mlp_width=24,
  num_experts=2,
)


@functools.cache
def load_model(**overrides):
  attributes, params = from_torch(reference.FIXTURES / "microdit.pt", num_heads=4)
  return create_model(**{**attributes, **overrides}), params


def images(name):
  return jnp.asarray(reference.to_nhwc(RECORDED[name]))


@functools.cache
def outputs(masked=True, **overrides):
  """Output and intermediate values of the recorded pass."""
  model, params = load_model(**overrides)
  run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  mask = MASK if masked else None
  inputs = images("x"), RECORDED["t"], CAPTIONS
  output, state = run({"params": params}, *inputs, mask)
  return output, state["intermediates"]


@pytest.mark.parametrize(
  ("masked", "options"),
  [(False, {}), (True, {}), (True, {"remat": "full"}), (True, {"forward_mode": True})],
)
def test_forward_matches_reference(masked, options):
  """Removed tokens are filled by the recorded mask token, which is not zero."""
  found, _ = outputs(masked, **options)
  reference.assert_matches(
    f"MicroDiT with captions, forward pass {'with' if masked else 'without'} a mask",
    reference.to_nchw(found),
    RECORDED["out_masked" if masked else "out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("name", ["tokens_mixed", "tokens_into_backbone"])
def test_tokens_after_the_mixer_match_reference(name):
  reference.assert_matches(
    "MicroDiT with captions, tokens after the mixer",
    outputs()[1][name][0],
    RECORDED[name],
    reference.FORWARD_TOLERANCE,
  )


@functools.cache
def recorded_loss(ratio):
  """(loss, denoised images, gradients with the names of the release)."""
  model, params = load_model()
  objective = create_objective("microdit", model=model, process=PROCESS, ratio=ratio)
  kept_captions = CAPTIONS * RECORDED["drop_caption_mask"][:, None, None]
  t = jnp.asarray(PROCESS.p_mean + PROCESS.p_std * RECORDED["sigma_normal"].ravel())
  draws = Draws(
    x0=images("images"),
    t=t,
    weights=jnp.ones(len(t)),
    noise=images("noise")[:, None],
    y=kept_captions[:, None],
    mask_noise=jnp.asarray(RECORDED["loss_mask_noise"]),
  )
  outputs = []

  def apply(*args):
    outputs.append(model.apply(*args))
    return outputs[-1]

  def run(params):
    loss, _ = objective.loss(apply, params, draws, objective.largest_static)
    return loss, outputs.pop()

  if ratio:
    run = jax.value_and_grad(run, has_aux=True)
    (loss, output), gradients = jax.jit(run)(params)
  else:
    (loss, output), gradients = jax.jit(run)(params), params
  x_t = PROCESS.q_sample(draws.x0, t, draws.noise[:, 0])
  return loss, PROCESS.to_x0(output, x_t, t), to_torch(attributes_of(model), gradients)


@pytest.mark.parametrize(("ratio", "end"), [(0.75, ""), (0.0, "_all_tokens")])
def test_loss_and_denoised_match_reference(ratio, end):
  loss, denoised, _ = recorded_loss(ratio)
  what = "MicroDiT with captions, loss"
  reference.assert_matches(what, loss, RECORDED[f"loss{end}"], 2e-5)
  what = "MicroDiT with captions, denoised images"
  expected = RECORDED[f"denoised{end}"]
  reference.assert_matches(what, reference.to_nchw(denoised), expected, 2e-5)


@pytest.mark.parametrize("key", [key for key in RECORDED if key.startswith("grad/")])
def test_gradient_matches_reference(key):
  reference.assert_matches(
    "MicroDiT with captions, gradient of every parameter",
    recorded_loss(0.75)[2][key.removeprefix("grad/")],
    RECORDED[key],
    reference.GRADIENT_TOLERANCE,
  )


def test_every_trained_parameter_has_a_recorded_gradient():
  recorded = {key.removeprefix("grad/") for key in RECORDED if key.startswith("grad/")}
  gradients = recorded_loss(0.75)[2]
  assert recorded | {"pos_embed", "mask_token"} == set(gradients)
  assert load_model()[0].frozen == ("pos_embed", "mask_token")
  assert not gradients["mask_token"].any()


def guided(scale):
  """The guided network; the null caption is zeros."""
  model, params = load_model()
  guidance = Guidance(scale=scale, power=0.0, channels=None)

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  null = model.conditioning.null_like(CAPTIONS)
  return guidance, guidance.apply(network, CAPTIONS, null)


def test_guided_output_matches_reference():
  _, model_fn = guided(float(RECORDED["cfg/scale"]))
  reference.assert_matches(
    "MicroDiT with captions, guided output",
    reference.to_nchw(jax.jit(model_fn)(images("x"), jnp.asarray(RECORDED["t"]))),
    RECORDED["cfg/out"],
    reference.LOOP_TOLERANCE,
  )


def test_samples_match_reference():
  guidance, model_fn = guided(float(RECORDED["heun/cfg"]))
  steps = int(RECORDED["heun/steps"])
  sampler = Sampler.create(PROCESS, guidance, method="edm", num_steps=steps)
  x = images("heun/latents") * PROCESS.noise_scale
  arguments = dict(method="edm", arguments=sampler.arguments)
  loop = jax.jit(
    lambda x: sample(model_fn, sampler.process, x, jax.random.key(0), **arguments)
  )
  reference.assert_matches(
    "MicroDiT with captions, samples by edm",
    reference.to_nchw(loop(x)),
    RECORDED["heun/out"],
    reference.LOOP_TOLERANCE,
  )


# Properties.


def test_experts_choose_among_the_tokens_that_are_present():
  """With all weight on one expert, its 2 best of 4 tokens have an output."""
  experts = Experts(num_experts=2, capacity=1.0, width=3)
  x = jnp.eye(4)[None]
  router = np.array([[9, 1, 7, 3], [0, 0, 0, 0]], np.float32).T
  params = {
    "router": {"kernel": router},
    "expert_in": np.stack([np.ones((4, 3)), np.zeros((4, 3))]).astype(np.float32),
    "expert_out": np.ones((2, 3, 4), np.float32),
  }
  found = np.asarray(experts.apply({"params": params}, x))
  assert (found[0, [0, 2]] != 0).all() and (found[0, [1, 3]] == 0).all()
  alone = np.asarray(experts.apply({"params": params}, x[:, [1, 3]]))
  assert (alone[0, 1] != 0).all() and (alone[0, 0] == 0).all()


def test_bfloat16_is_close_to_float32():
  """Rounding changes which tokens an expert chooses, so single numbers may differ."""
  model, params = load_model(dtype="bfloat16")
  inputs = images("x"), RECORDED["t"], CAPTIONS, MASK
  output = jax.jit(model.apply)({"params": params}, *inputs)
  expected = np.asarray(outputs()[0])
  error = np.abs(np.asarray(output) - expected).mean() / np.abs(expected).mean()
  assert output.dtype == jnp.float32 and 0 < error < 0.1


def test_rectangle_is_masked_by_rows():
  model = create_model(**{**TINY, "input_size": (8, 12)})
  params = reference.random_params(model)
  mask = random_token_mask(jax.random.key(0), 1, 24, 6)
  x, y = jnp.ones((1, 8, 12, 4)), jnp.ones((1, 3, 5))
  params["mask_token"] = np.full(16, 7, np.float32)
  output = np.asarray(jax.jit(model.apply)({"params": params}, x, jnp.ones(1), y, mask))
  removed = np.asarray(mask.removed).reshape(4, 6).repeat(2, 0).repeat(2, 1)
  np.testing.assert_array_equal((output[0] == 7).all(-1), removed)


def test_training_drops_captions():
  model = create_model(**{**TINY, "label_dropout": 0.9})
  params = reference.random_params(model)
  x, t = jnp.ones((8, 8, 8, 4)), jnp.ones(8)
  y = jax.random.normal(jax.random.key(0), (8, 3, 5))

  @functools.partial(jax.jit, static_argnames="train")
  def run(y, train):
    rngs = {"label_dropout": jax.random.key(1)}
    return model.apply({"params": params}, x, t, y, train=train, rngs=rngs)

  null, kept = run(jnp.zeros_like(y), False), run(y, False)
  output = run(y, True)
  is_null, is_kept = (
    np.isclose(output, other, atol=1e-6).all((1, 2, 3)) for other in (null, kept)
  )
  assert is_null.any() and (is_null != is_kept).all()


def test_objective_trains_on_captions_of_a_batch():
  model = create_model(**TINY)
  objective = create_objective("microdit", model=model, process=create_process("flow"))
  batch = {"image": jnp.ones((4, 8, 8, 4)), "caption": jnp.ones((4, 3, 5))}
  params = reference.random_params(model)
  draws = objective.draw(jax.random.key(0), batch)
  loss = functools.partial(objective.loss, model.apply)
  gradients = jax.jit(jax.grad(lambda p: loss(p, draws, 4)[0]))(params)
  for name in ("caption_embed", "mixer_block_1", "block_1", "block_2", "final_layer"):
    leaves = jax.tree.leaves(gradients[name])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves), name


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0}, {"mixer_hidden_size": 16}])
@pytest.mark.parametrize("num_keep", [None, 6])
def test_forward_flops_match_the_traced_program(changes, num_keep):
  model = create_model(**{**TINY, **changes})
  x, t, y = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), model.conditioning.dummy(1)
  mask = random_token_mask(jax.random.key(0), 1, 16, num_keep) if num_keep else None
  params = {"params": abstract_params(model)}
  traced = test_flops.product_flops(
    jax.make_jaxpr(model.apply)(params, x, t, y, mask).jaxpr
  )
  assert flops.forward_flops(model, num_keep) == traced


@pytest.mark.parametrize(("size", "millions"), [("XL", 1165), ("Tiny", 201)])
def test_presets_have_the_released_number_of_parameters(size, millions):
  """1,165 M and 201 M, of which 604 M of XL are experts."""
  model = create_model(f"MicroDiTText-{size}/2")
  params = abstract_params(model)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == pytest.approx(millions * 1e6, rel=1e-3)
  if size == "XL":
    experts = [
      leaf.size
      for name in params
      if "block_" in name and "experts" in params[name]
      for leaf in jax.tree.leaves(params[name]["experts"])
    ]
    assert sum(experts) == pytest.approx(604e6, rel=1e-3)
  heads = {"XL": 64, "Tiny": 32}
  assert model.head_size == heads[size]


@pytest.mark.parametrize(
  ("attributes", "setting"),
  [
    ({"hidden_size": 18}, "hidden_size"),
    ({"attention_widths": (8, 16)}, "attention_widths"),
    ({"attention_widths": (8, 16, 12)}, "attention_widths"),
    ({"mlp_widths": ()}, "mlp_widths"),
    ({"mixer_mlp_widths": (8, 0)}, "mixer_mlp_widths"),
    ({"mixer_hidden_size": 12}, "mixer_hidden_size"),
    ({"num_experts": -1}, "num_experts"),
    ({"expert_capacity": 3.0}, "expert_capacity"),
    ({"caption_channels": 0}, "caption_channels"),
    ({"condition": CaptionCondition(3, 5, 0.1)}, "condition"),
  ],
)
def test_invalid_attribute_is_refused(attributes, setting):
  with pytest.raises(SettingError) as error:
    create_model(**{**TINY, **attributes})
  assert error.value.setting == setting
