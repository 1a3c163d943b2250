"""Arms of the experiment on relations: each changes what its name says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.relation_arms import (
  ARMS,
  CONDITIONS,
  PIECES,
  Arm,
  build_run,
  step_flops,
)
from mdt_jax.models.embeddings import patchify
from mdt_jax.models.registry import init_params
from mdt_jax.pretrained.tensors import flatten, unflatten

CONDITION = dataclasses.replace(CONDITIONS["16"], num_steps=100)


def run_of(arm):
  return build_run(CONDITION, arm, seed=0, learning_rate=1e-3)


def randomised(params):
  """Parameters without zeros, so that every layer has an effect."""
  keys = jax.random.split(jax.random.key(1), 1000)
  flat = flatten(params)
  return {
    name: 0.1 * jax.random.normal(key, value.shape)
    for (name, value), key in zip(sorted(flat.items()), keys, strict=False)
  }


def output_of(model, flat):
  x = jax.random.normal(jax.random.key(2), (2, *model.input_shape))
  t, y = jnp.array([0.2, 0.7]), jnp.zeros(2, jnp.int32)
  return model.apply({"params": unflatten(flat)}, x, t, y)


def test_no_piece_computes_dit():
  dit, partial = run_of(ARMS["dit"]).model, run_of(Arm("MDTv2", pieces=())).model
  flat = randomised(init_params(partial, jax.random.key(0)))
  stacks = ("blocks/", "decode_blocks/")
  joined = {name: value for name, value in flat.items() if not name.startswith(stacks)}
  for name in flat:
    if name.startswith("blocks/"):
      both = flat[name], flat[f"decode_{name}"]
      joined[name] = jnp.concatenate(both)
  found, expected = output_of(partial, flat), output_of(dit, joined)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_all_pieces_compute_mdtv2():
  whole, partial = (
    run_of(ARMS["mdtv2_unmasked"]).model,
    run_of(Arm("MDTv2", PIECES)).model,
  )
  flat = randomised(init_params(whole, jax.random.key(0)))
  unused = ("side_block/", "mask_token")
  kept = {name: value for name, value in flat.items() if not name.startswith(unused)}
  np.testing.assert_allclose(
    output_of(partial, kept), output_of(whole, flat), atol=1e-5
  )


@pytest.mark.parametrize("piece", PIECES)
def test_piece_adds_its_parameters_to_dit(piece):
  plain, more = (
    set(
      flatten(init_params(run_of(Arm("MDTv2", pieces=pieces)).model, jax.random.key(0)))
    )
    for pieces in ((), (piece,))
  )
  words = {
    "bias": "relative_position_bias",
    "positions": "decode_pos_embed",
    "skips": "out_blocks/skip",
    "shortcuts": "decode_blocks/skip",
  }
  added = {name for name in more - plain if words[piece] in name}
  assert added
  # Other names belong to the encoder, whose stack has another name with long skips.
  others = {"in_blocks", "out_blocks"} if piece == "skips" else set()
  assert {name.split("/")[0] for name in more - plain - added} <= others


@pytest.mark.parametrize("name", ARMS)
def test_arm_builds_and_counts_its_flops(name):
  assert step_flops(run_of(ARMS[name]), CONDITION.num_steps) > 0


def test_double_depth_costs_nearly_as_much_as_a_masked_pass():
  deep, masked = (
    step_flops(run_of(ARMS[name]), CONDITION.num_steps)
    for name in ("dit_depth_x2", "mdtv2_masked_30_50")
  )
  assert deep / masked == pytest.approx(1, abs=0.15)


def test_masked_alone_counts_removed_tokens_only():
  experiment = run_of(ARMS["mdtv2_masked_alone"])
  objective, model = experiment.objective, experiment.model
  params = unflatten(randomised(init_params(model, jax.random.key(0))))
  batch = {
    "image": jax.random.normal(jax.random.key(3), (4, *model.input_shape)),
    "label": jnp.zeros(4, jnp.int32),
  }
  draws = objective.draw(jax.random.key(4), batch)
  keep = objective.static_choices[0]
  mask = model.token_mask(draws.mask_noise, keep)

  found = objective._masked_losses(model.apply, params, draws, (keep,))["loss"]
  _, output = objective.run_pass(model.apply, params, draws, 1, mask)
  target = experiment.process.target(draws.x0, draws.noise[:, 1], draws.t)
  error = patchify((output - target) ** 2, model.patch_size).mean(-1)  # (B, L)
  expected = [row[gone].mean() for row, gone in zip(error, mask.removed, strict=True)]
  np.testing.assert_allclose(found, np.array(expected), rtol=1e-5)
