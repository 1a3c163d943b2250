"""Compares whole training runs with the released code: python -m benchmarks.trajectory

python -m benchmarks.trajectory --reference=MDT,MDT_V1,DIT

Each part of --reference is a checkout of github.com/sail-sg/MDT (branch main: MDTv2;
branch mdtv1: MDT) or of github.com/facebookresearch/DiT; see benchmarks/released.py.

The benchmark trains a small network of each checkout three times: with mdt_jax in
float32, and with the released networks, losses and optimizers in float32 and float64.
All runs start from the same parameters, and use the same latents and the random draws
of `Objective.draw`. The table in docs/parity.md shows how far the float32 runs are from
the float64 run, relative to the way that the float64 parameters have moved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import jax
import numpy as np
import torch
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks.released import Released, parameters_of, to_nchw
from benchmarks.tables import machine, write_table
from mdt_jax import recipes
from mdt_jax.experiment import Experiment, build
from mdt_jax.objectives import Draws
from mdt_jax.pretrained.tensors import Tensors
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch
from mdt_jax.train_state import init_state
from mdt_jax.training.step import make_train_step, step_key

REFERENCE = flags.DEFINE_list(
  "reference", None, "Checkouts of the released code.", required=True
)
NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Training steps.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images in a step.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters, latents and draws.")
SHOWN = (1, 5, 10, 20)  # steps in the table

DECAY = 0.9999
SIZE = dict(input_size=16, num_classes=10, hidden_size=64, depth=6, num_heads=4)


def make_config(variant: str) -> ConfigDict:
  """The released run of a variant, with a small network."""
  recipe = {"DiT": recipes.dit, "MDT": recipes.mdt, "MDTv2": recipes.mdtv2}[variant]
  config = recipe("S")
  config.update_from_flattened_dict({f"model.{k}": v for k, v in SIZE.items()})
  config.model.decode_depth = 2
  config.batch_size = BATCH_SIZE.value
  config.seed = SEED.value
  config.ema_decays = (DECAY,)
  return config


@dataclasses.dataclass(frozen=True)
class Step:
  """What a step of every run uses: the draws, and the kept tokens of a masked pass."""

  draws: Draws
  num_keep: Any


@dataclasses.dataclass(frozen=True)
class Point:
  """Parameters and their average after a step: released name -> tensor."""

  params: Tensors
  average: Tensors


def run_ours(experiment: Experiment) -> tuple[Tensors, list[Step], list[Point]]:
  """Trains with mdt_jax.

  Returns:
    (parameters at the start, what each step uses, parameters after each step).
  """
  model, objective = experiment.model, experiment.objective
  state = init_state(
    jax.random.key(SEED.value),
    model,
    experiment.optimizer,
    [DECAY],
    objective.timestep_sampler,
  )
  step = jax.jit(
    make_train_step(
      model, objective, experiment.optimizer, seed=SEED.value, ema_decays=[DECAY]
    ),
    static_argnums=2,
  )
  draw = jax.jit(objective.draw)
  attributes = attributes_of(model)
  rng = np.random.default_rng(SEED.value)
  start, steps, points = to_torch(attributes, state.params), [], []
  for number in range(NUM_STEPS.value):
    batch = {
      "image": rng.standard_normal((BATCH_SIZE.value, *model.input_shape), np.float32),
      "label": rng.integers(0, model.num_classes, BATCH_SIZE.value, np.int32),
    }
    static = objective.choose_static(SEED.value, number)
    steps.append(Step(draw(step_key(SEED.value, state.step), batch), static))
    state, _ = step(state, batch, static)
    points.append(
      Point(*(to_torch(attributes, p) for p in (state.params, state.ema[str(DECAY)])))
    )
  return start, steps, points


def run_released(
  released: Released,
  experiment: Experiment,
  start: Tensors,
  steps: list[Step],
  dtype: torch.dtype,
) -> list[Point]:
  """Trains with the released network, losses and optimizer, as their loops do.

  The loops are `TrainLoop` of masked_diffusion/train_util.py and train.py of DiT, on
  one process.
  """
  chosen = experiment.settings.optimizer
  network = released.make_network(experiment.model, start, dtype)
  parameters = list(network.parameters())
  rate = chosen.learning_rate
  if released.adan is not None:
    optimizer = released.adan(parameters, lr=rate, max_grad_norm=1)
  else:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
  average = copy.deepcopy(network)
  diffusion = released.create_diffusion(timestep_respacing="")
  points = []
  for step in steps:
    optimizer.zero_grad()
    loss = _loss(released, network, diffusion, step, dtype)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      for old, new in zip(average.parameters(), parameters, strict=True):
        old.mul_(DECAY).add_(new, alpha=1 - DECAY)
    points.append(Point(parameters_of(network), parameters_of(average)))
  return points


def _loss(
  released: Released, network: Any, diffusion: Any, step: Step, dtype: torch.dtype
) -> torch.Tensor:
  """The loss of a step: one pass of DiT, or an unmasked and a masked pass of MDT."""
  draws = step.draws
  t, x0 = torch.tensor(np.asarray(draws.t)).long(), to_nchw(draws.x0, dtype)
  noise = to_nchw(draws.mask_noise, torch.float32)
  masked_pass = released.masks(noise, step.num_keep) if step.num_keep else None
  total = torch.zeros((), dtype=dtype)
  for index, context in enumerate((contextlib.nullcontext(), masked_pass)):
    if context is None:
      break
    kwargs = {"y": torch.tensor(np.asarray(draws.y[:, index]))}
    kwargs |= {"enable_mask": True} if index else {}
    with context:
      losses = diffusion.training_losses(
        network,
        x0,
        t,
        model_kwargs=kwargs,
        noise=to_nchw(draws.noise[:, index], dtype),
      )
    total = total + losses["loss"].mean()
  return total


def distance(first: Tensors, second: Tensors) -> float:
  """The Euclidean distance of two sets of tensors, over the names of the second."""
  squares = [
    np.sum((np.float64(first[name]) - np.float64(second[name])) ** 2) for name in second
  ]
  return float(np.sqrt(np.sum(squares)))


def compare(path: str) -> list[str]:
  """Runs the code of a checkout; returns lines of the table."""
  released = Released.load(path)
  experiment = build(make_config(released.variant))
  start, steps, ours = run_ours(experiment)
  float32, exact = (
    run_released(released, experiment, start, steps, dtype)
    for dtype in (torch.float32, torch.float64)
  )
  lines = []
  for number in SHOWN:
    if number > len(steps):
      break
    for what, shown in (("params", "parameters"), ("average", "average")):
      mine, theirs, truth = (
        getattr(points[number - 1], what) for points in (ours, float32, exact)
      )
      moved = distance(start, truth)
      errors = [distance(found, truth) / moved for found in (mine, theirs)]
      lines.append(
        f"| {released.variant} | {number} | {shown} | {errors[0]:.1e} | "
        f"{errors[1]:.1e} | {errors[0] / errors[1]:.2f} |"
      )
  return lines


def main(argv: list[str]) -> None:
  del argv
  lines = [
    f"{machine()}, torch {torch.__version__} (`python -m benchmarks.trajectory "
    "--reference=…`).",
    "",
    "| network | step | compared | mdt_jax | released code, float32 | ratio |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for path in REFERENCE.value:
    lines += compare(path)
  write_table("parity.md", "trajectories", lines)


if __name__ == "__main__":
  app.run(main)
