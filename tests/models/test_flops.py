"""FLOPs by formula, compared with the products in the traced program."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import mdt_jax
from mdt_jax.models import flops
from mdt_jax.models.masking import random_token_mask


def product_flops(jaxpr):
  """Sum over all dot products of 2 x result elements x length of the contraction."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))
    ):
      if isinstance(value, (ClosedJaxpr, Jaxpr)):
        inner = getattr(value, "jaxpr", value)
        total += equation.params.get("length", 1) * product_flops(inner)
  return total


def traced_flops(model, num_keep):
  x = jnp.zeros((1, *model.input_shape))
  t = y = jnp.zeros((1,), jnp.int32)
  mask = None
  if num_keep is not None:
    mask = random_token_mask(jax.random.key(0), 1, model.num_tokens, num_keep)
  params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)
  return product_flops(jax.make_jaxpr(model.apply)(params, x, t, y, mask).jaxpr)


SMALL = dict(input_size=8, hidden_size=32, num_heads=2, num_classes=5, in_channels=3)


@pytest.mark.parametrize(
  ("name", "sizes", "num_keep"),
  [
    ("DiT-S/2", dict(depth=3), None),
    ("SiT-S/2", dict(depth=3), None),
    ("DiT-S/2", dict(depth=3, patch_bottleneck=5), None),
    ("MDT-S/2", dict(depth=5, decode_depth=2), None),
    ("MDT-S/2", dict(depth=5, decode_depth=2, mlp_ratio=3.0), 10),
    ("MDTv2-S/2", dict(depth=6, decode_depth=2), None),
    ("MDTv2-S/4", dict(depth=6, decode_depth=2, learn_sigma=False), 3),
    ("MDTv2-S/2", dict(depth=6, decode_depth=2, input_size=(6, 10)), 8),
    ("DiT-S/2", dict(depth=3, input_size=(10, 4)), None),
    ("TREAD-S/2", dict(depth=7), None),
    ("TREAD-S/2", dict(depth=7), 6),
    ("TREAD-S/2", dict(depth=4, route_start=0, route_end=1, learn_sigma=True), 1),
    ("TREAD-S/2", dict(depth=4, route_start=3, route_end=3), 15),
    ("MicroDiT-S/2", dict(depth=3), None),
    ("MicroDiT-S/2", dict(depth=3), 4),
    ("MicroDiT-S/2", dict(depth=3, mixer_hidden_size=48, mixer_depth=2), None),
    ("MicroDiT-S/2", dict(depth=3, mixer_hidden_size=48, learn_sigma=True), 5),
    ("SPRINT-S/2", dict(depth=7), None),
    ("SPRINT-S/2", dict(depth=7), 4),
    ("SPRINT-S/2", dict(depth=7, encoder_depth=1, learn_sigma=True), 0),
    ("MaskDiT-S/2", dict(depth=3, decode_depth=2), None),
    ("MaskDiT-S/2", dict(depth=3, decoder_hidden_size=64), 5),
    ("MaskDiT-S/2", dict(depth=1, patch_bottleneck=5, learn_sigma=True), 16),
  ],
)
def test_forward_flops_match_the_traced_program(name, sizes, num_keep):
  model = mdt_jax.create_model(name, **{**SMALL, **sizes})
  assert flops.forward_flops(model, num_keep) == traced_flops(model, num_keep)


def test_training_step_costs_three_forwards_of_each_pass():
  model = mdt_jax.create_model("MDTv2-S/2")
  both = flops.forward_flops(model) + flops.forward_flops(model, 160)
  assert flops.train_flops(model, 160) == 3 * both
  assert flops.train_flops(model) == 3 * flops.forward_flops(model)


def test_dit_xl_flops_match_its_paper():
  """The paper gives 118.6 GFLOPs, where a multiply-add counts as one operation."""
  model = mdt_jax.create_model("DiT-XL/2")
  assert flops.forward_flops(model) / 2 == pytest.approx(118.6e9, rel=0.01)
