"""Seconds of a training step by method: python -m benchmarks.method_speed

Networks of size S/2 in float32 with AdamW, batch 8, at 256 and 1,024 tokens (latents of
32x32 and 64x64), with rolled loops over blocks. Each method has its released share of
removed tokens; MDTv2, which draws a share for each step, keeps its mean. The rounds go
through all methods in turn, and the figure of a method is its median ratio to DiT in
the same round.

--count writes the counted FLOPs of sizes B and XL instead, without running a step.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.tables import machine, write_table
from mdt_jax import build, create_model, create_objective, create_process, sharding
from mdt_jax.config import default_config
from mdt_jax.models.flops import forward_flops
from mdt_jax.training.program import make_program

ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed rounds.")
SIDES = flags.DEFINE_list("sides", [32, 64], "Heights of the latents.")
COUNT = flags.DEFINE_bool("count", False, "Count FLOPs only.")
WRITE = flags.DEFINE_bool("write", True, "Whether to write the table to docs/.")
BATCH = 8
NETWORKS = ("DiT", "MDTv2", "MaskDiT", "MicroDiT", "TREAD", "SPRINT")


class Method:
  """A compiled training step of a network on random latents."""

  def __init__(self, network: str, side: int):
    config = default_config()
    config.model.name = f"{network}-S/2"
    config.model.input_size = side
    config.batch_size = BATCH
    config.diffusion.process = "flow"
    config.optimizer.name = "adamw"
    config.masking.num_lengths = 1
    config.sampling.method = "heun"
    config.data.source = "arrays"
    experiment = build(config, source=Latents(side))
    self.name, objective = network, experiment.objective
    self._static = objective.choose_static(0, 0)
    self.flops = BATCH * objective.flops(self._static)
    self._mesh = experiment.mesh
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, side, side, 4)).astype(np.float32)
    batch = {"image": images, "label": np.arange(BATCH, dtype=np.int32)}
    with sharding.use_mesh(self._mesh):
      program = make_program(experiment)
      self._step = program.step
      self._batch = sharding.put_batch(batch, self._mesh, BATCH)
      self._state = program.init(jax.random.key(0))
    self.seconds()  # compiles

  def seconds(self) -> float:
    """Runs a step, and returns its time."""
    start = time.perf_counter()
    with sharding.use_mesh(self._mesh):
      self._state, metrics = self._step(self._state, self._batch, self._static)
      jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start


class Latents:
  """A source of latents that are never read; `build` wants one."""

  num_classes = 1000

  def __init__(self, side: int):
    self._shape = (side, side, 4)

  def __len__(self) -> int:
    return BATCH

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": np.zeros(self._shape, np.float32), "label": index}


def measure(side: int) -> list[str]:
  """Rows of the table for latents of side x side."""
  methods = [Method(network, side) for network in NETWORKS]
  times = np.array(
    [[method.seconds() for method in methods] for _ in range(ROUNDS.value)]
  )
  ratios = np.median(times / times[:, :1], axis=0)
  rows = []
  for method, seconds, ratio in zip(
    methods, np.median(times, axis=0), ratios, strict=True
  ):
    tokens = f"{(side // 2) ** 2:,}"
    share = method.flops / methods[0].flops
    cells = [method.name, tokens, f"{method.flops / 1e9:.0f}", f"{share:.2f}"]
    rows.append(f"| {' | '.join([*cells, f'{seconds:.2f}', f'{ratio:.2f}'])} |")
    print(rows[-1], flush=True)
  jax.clear_caches()
  return rows


def count() -> list[str]:
  """Rows of counted FLOPs at 256 tokens, each as a share of DiT's too."""
  rows = []
  for size in ("B", "XL"):
    plain: dict[str, float] = {}
    for network in NETWORKS:
      model = create_model(f"{network}-{size}/2", learn_sigma=False)
      objective = create_objective(
        model.default_objective, model=model, process=create_process("flow")
      )
      drawn = [objective.choose_static(0, step) for step in range(200)]
      found = {
        "step": float(np.mean([objective.flops(static) for static in drawn])),
        "image": float(forward_flops(model)),
      }
      plain = plain or found
      cells = [f"{network}-{size}/2"]
      for name, flops in found.items():
        cells += [f"{flops / 1e9:.0f}", f"{flops / plain[name]:.2f}"]
      rows.append(f"| {' | '.join(cells)} |")
  return rows


def main(argv: list[str]) -> None:
  del argv
  if COUNT.value:
    lines = [
      "256 tokens, one image, without guidance (`python -m benchmarks.method_speed "
      "--count`). The share of removed tokens is the released one.",
      "",
      "| network | GFLOPs of a training step | of DiT's | GFLOPs of a pass in sampling "
      "| of DiT's |",
      "| --- | --- | --- | --- | --- |",
      *count(),
    ]
    write_table("methods.md", "flops", lines)
    return
  lines = [
    f"{machine()} (`python -m benchmarks.method_speed`). S/2, batch {BATCH}, float32, "
    f"flow, AdamW; median of {ROUNDS.value} rounds.",
    "",
    "| network | tokens | GFLOPs a step | of DiT's | seconds a step | of DiT's |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for side in map(int, SIDES.value):
    lines += measure(side)
  if WRITE.value:
    write_table("methods.md", "speed", lines)


if __name__ == "__main__":
  app.run(main)
