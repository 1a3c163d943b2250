"""Compares networks of random sizes with the released code, in float32 and float64.

python -m benchmarks.random_networks --reference=MDT,MDT_V1,DIT --seed=0

For --reference see benchmarks.trajectory. Sizes, parameters and inputs derive from
--seed. The table in docs/parity.md shows the largest difference of float32 results from
those of the released code in float64: of mdt_jax, and of the released code itself.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from benchmarks.released import WIDTH, Released, replaced_draws, to_nchw
from benchmarks.tables import machine, write_table
from mdt_jax import create_model
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import guided
from mdt_jax.diffusion.samplers import sample
from mdt_jax.models.masking import num_kept, token_mask_from_noise
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch

REFERENCE = flags.DEFINE_list(
  "reference", None, "Checkouts of the released code.", required=True
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of sizes, parameters and inputs.")
COUNT = flags.DEFINE_integer("count", 5, "Networks of each checkout.")
BATCH_SIZE = 4
NUM_TIMESTEPS = 1000
STD = 0.2  # of the parameters
OUTPUT_SCALE = 0.1  # of the last layer
STEPS = 10  # of the sampling loops

# Compared quantity -> arrays by name: the gradient of each tensor, or one output.
Results = dict[str, dict[str, np.ndarray]]


def random_model(variant: str, rng: np.random.Generator) -> MDT:
  """A network of random size."""
  patch = int(rng.choice([1, 2, 4]))
  decode_depth = int(rng.integers(1, 4))
  return create_model(
    variant=variant,
    input_size=patch * int(rng.integers(3, 9)),
    patch_size=patch,
    in_channels=4,
    num_classes=int(rng.integers(1, 50)),
    num_heads=(heads := int(rng.integers(1, 5))),
    hidden_size=heads * int(rng.choice([8, 16, 24])),
    decode_depth=decode_depth,
    depth=decode_depth + 2 * int(rng.integers(1, 4)),
    mlp_ratio=float(rng.choice([2.0, 4.0])),
  )


class Inputs:
  """Random parameters and inputs of a network, and the guidance to compare.

  Args:
    model: the network.
    rng: draws them.
  """

  def __init__(self, model: MDT, rng: np.random.Generator):
    self.model = model
    # As large as in the recorded networks of tests/fixtures, where no tensor is zero.
    self.params = jax.tree.map(
      lambda a: rng.normal(0, STD, a.shape).astype("f"), abstract_params(model)
    )
    # Small outputs: with larger ones, the interpolated variances of the sampler leave
    # their range, and samples grow until float32 overflows inside the network.
    last = self.params["final_layer"]["linear"]
    last |= {name: OUTPUT_SCALE * array for name, array in last.items()}
    self.x = rng.standard_normal((BATCH_SIZE, *model.input_shape), np.float32)
    self.t = rng.integers(0, NUM_TIMESTEPS, BATCH_SIZE)
    # Classes, and the null label for the last image.
    self.y = rng.integers(0, model.num_classes, BATCH_SIZE)
    self.y[-1] = model.num_classes
    self.mask_noise = rng.random((BATCH_SIZE, model.num_tokens), np.float32)
    # Of the training loss, and of each step of the sampler.
    self.noise = rng.standard_normal(self.x.shape, np.float32)
    self.step_noise = rng.standard_normal((STEPS, *self.x.shape), np.float32)
    self.ratio = float(rng.uniform(0.1, 0.5))
    share = self.ratio
    if model.variant == "MDTv2":
      share += WIDTH * float(rng.random())
    self.num_keep = num_kept(model.num_tokens, share)
    # (scale, power): those of MDT's command and demo; DiT's scale is constant.
    self.guidance = [(3.8, 4.0), (4.0, 0.01)] if model.takes_mask else [(1.5, 0.0)]


def run_ours(inputs: Inputs) -> Results:
  """Computes all results with mdt_jax."""
  model, params = inputs.model, inputs.params

  def forward(params: Any, mask: Any = None) -> Any:
    return model.apply({"params": params}, inputs.x, inputs.t, inputs.y, mask)

  mask = None
  if model.takes_mask:
    mask = token_mask_from_noise(jnp.asarray(inputs.mask_noise), inputs.num_keep)

  def loss(params: Any) -> Any:
    total = (forward(params) ** 2).mean()
    return total if mask is None else total + (forward(params, mask) ** 2).mean()

  gradients = to_torch(attributes_of(model), jax.jit(jax.grad(loss))(params))
  outputs = {"forward pass": jax.jit(forward)(params)}
  if mask is not None:
    outputs["masked forward pass"] = jax.jit(forward)(params, mask)
  for scale, power in inputs.guidance:
    model_fn = guided(
      lambda x, t, y: model.apply({"params": params}, x, t, y),
      jnp.asarray(inputs.y),
      model.num_classes,
      scale=scale,
      power=power,
    )
    outputs[_guided(scale, power)] = jax.jit(model_fn)(inputs.x, inputs.t)
  outputs |= jax.jit(functools.partial(_losses_and_loops, inputs))(params)
  found: Results = {
    what: {"output": np.moveaxis(np.asarray(output), -1, 1 if output.ndim > 1 else 0)}
    for what, output in outputs.items()
  }
  return found | {"gradient of each tensor": gradients}


def _losses_and_loops(inputs: Inputs, params: Any) -> dict[str, Any]:
  """The training losses of the unmasked pass, and samples of two loops."""
  model = inputs.model

  def network(x: Any, t: Any) -> Any:
    return model.apply({"params": params}, x, t, inputs.y)

  weight = "min_snr" if model.variant == "MDTv2" else "none"
  process = GaussianDiffusion.create(loss_weight=weight)
  x_t = process.q_sample(inputs.x, inputs.t, inputs.noise)
  output = network(x_t, inputs.t)
  losses = process.training_losses(output, inputs.x, x_t, inputs.t, inputs.noise)
  found = {f"training loss {name}": losses[name] for name in ("mse", "vb")}
  respaced = GaussianDiffusion.create(spacing=str(STEPS))
  for method in ("ddpm", "ddim"):
    found[_loop(method)] = sample(
      network,
      respaced,
      jnp.asarray(inputs.x),
      jax.random.key(0),
      method=method,
      noise=jnp.asarray(inputs.step_noise),
    )
  return found


def run_released(released: Released, inputs: Inputs, dtype: torch.dtype) -> Results:
  """Computes all results with the released network."""
  model = inputs.model
  tensors = to_torch(attributes_of(model), inputs.params)
  network = released.make_network(model, tensors, dtype, inputs.ratio)
  x = to_nchw(inputs.x, dtype)
  t, y = torch.tensor(inputs.t), torch.tensor(inputs.y)
  found = {"forward pass": network(x, t, y)}
  if model.takes_mask:
    noise = torch.tensor(inputs.mask_noise)
    with released.masks(noise, inputs.num_keep, inputs.ratio):
      found["masked forward pass"] = network(x, t, y, enable_mask=True)
  sum((output**2).mean() for output in found.values()).backward()
  twice = (torch.cat([x, x]), torch.cat([t, t]), _with_null(y, model.num_classes))
  for scale, power in inputs.guidance:
    more = {"scale_pow": power} if power else {}
    found[_guided(scale, power)] = network.forward_with_cfg(
      *twice, cfg_scale=scale, **more
    )[:BATCH_SIZE]
  kwargs = {"y": y}
  losses = released.create_diffusion(timestep_respacing="").training_losses(
    network, x, t, model_kwargs=kwargs, noise=to_nchw(inputs.noise, dtype)
  )
  found |= {f"training loss {name}": losses[name] for name in ("mse", "vb")}
  respaced = released.create_diffusion(timestep_respacing=str(STEPS))
  for method, loop in (
    ("ddpm", respaced.p_sample_loop),
    ("ddim", respaced.ddim_sample_loop),
  ):
    noise = [to_nchw(step, dtype) for step in inputs.step_noise]
    with replaced_draws("randn_like", noise):
      found[_loop(method)] = loop(
        network, x.shape, x, clip_denoised=False, model_kwargs=kwargs, device="cpu"
      )
  results: Results = {
    what: {"output": output.detach().numpy()} for what, output in found.items()
  }
  trained = {
    n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None
  }
  return results | {"gradient of each tensor": trained}


def _guided(scale: float, power: float) -> str:
  """Name of a guided output."""
  return f"guided output, scale {scale}" + (f", power {power}" if power else "")


def _loop(method: str) -> str:
  """Name of the samples of a loop."""
  return f"{method.upper()}, whole loop of {STEPS} steps"


def _with_null(y: torch.Tensor, null: int) -> torch.Tensor:
  """The labels, followed by as many null labels."""
  return torch.cat([y, torch.full_like(y, null)])


def error(found: np.ndarray, exact: np.ndarray) -> float:
  """Largest difference relative to the largest magnitude."""
  assert found.shape == exact.shape, (found.shape, exact.shape)
  largest = np.abs(exact).max()
  return float(np.abs(np.float64(found) - exact).max() / (largest or 1.0))


def compare(path: str) -> Iterator[str]:
  """Compares networks with the code of a checkout; yields lines of the table."""
  released = Released.load(path)
  rng = np.random.default_rng((SEED.value, len(released.variant)))
  largest: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
  for _ in range(COUNT.value):
    inputs = Inputs(random_model(released.variant, rng), rng)
    ours = run_ours(inputs)
    theirs = run_released(released, inputs, torch.float32)
    exact = run_released(released, inputs, torch.float64)
    for what, truths in exact.items():
      for side, found in enumerate((ours, theirs)):
        errors = [error(found[what][name], truth) for name, truth in truths.items()]
        # Unlike max, this keeps NaN.
        largest[what][side] = float(np.max([largest[what][side], *errors]))
  for what, (ours, theirs) in largest.items():
    yield f"| {released.variant}, {what} | {ours:.1e} | {theirs:.1e} |"


def main(argv: list[str]) -> None:
  del argv
  lines = [
    f"{machine()}, torch {torch.__version__} (`python -m benchmarks.random_networks "
    f"--reference=… --seed={SEED.value} --count={COUNT.value}`).",
    "",
    "| compared with the released code in float64 | mdt_jax | released code, float32 |",
    "| --- | --- | --- |",
  ]
  for path in REFERENCE.value:
    with contextlib.redirect_stdout(None):  # the released code prints sizes
      lines += list(compare(path))
  write_table("parity.md", "random networks", lines)


if __name__ == "__main__":
  app.run(main)
