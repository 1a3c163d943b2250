"""FLOPs of a training step, compared with XLA's count for the unrolled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mdt_jax import create_model, create_objective, create_process
from mdt_jax.objectives import UnmaskedPhase

# Width 384, as size S: in narrow networks, sums and activations weigh more.
SIZES = dict(input_size=16, hidden_size=384, num_heads=6, depth=6, unroll=-1)
METHODS = {
  "DiT": ("plain", {}, {}),
  "MDT": ("mdt", {"decode_depth": 2}, {"num_lengths": 1}),
  "MDTv2": ("mdt", {"decode_depth": 2}, {"num_lengths": 1}),
  "MaskDiT": ("maskdit", {"decode_depth": 3}, {}),
  "MicroDiT": ("microdit", {}, {}),
  "TREAD": ("tread", {}, {}),
  "SPRINT": ("sprint", {"encoder_depth": 1, "decode_depth": 1}, {}),
}


@pytest.mark.parametrize("is_unmasked", [False, True])
@pytest.mark.parametrize("network", METHODS)
def test_flops_of_a_step_match_xla(network, is_unmasked):
  """XLA also counts sums, normalisations and activations."""
  name, attributes, arguments = METHODS[network]
  model = create_model(f"{network}-S/2", **SIZES, **attributes, learn_sigma=False)
  process = create_process("flow")
  objective = create_objective(name, model=model, process=process, **arguments)
  if is_unmasked:
    objective = UnmaskedPhase(objective, 0)
  static = objective.choose_static(0, 0)
  image = jnp.zeros((2, *model.input_shape))
  inputs = image[:1], jnp.zeros(1), jnp.zeros(1, int)
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  batch = {"image": image, "label": jnp.zeros(2, int)}
  draws = jax.eval_shape(objective.draw, jax.random.key(0), batch)

  def loss(params, draws):
    return objective.loss(model.apply, params, draws, static)

  step = jax.jit(jax.grad(loss, has_aux=True))
  counted = step.lower(params, draws).cost_analysis()["flops"]
  assert 2 * objective.flops(static) == pytest.approx(counted, rel=0.02)
