"""Trains digits with each kernel of attention: python -m benchmarks.digits_attention

The first row is float32 with the plain kernel; the others are in bfloat16. On a CPU,
the Pallas kernel runs as operations of JAX, 15 minutes for 300 steps on two cores.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from mdt_jax import attention_choice
from mdt_jax.configs import digits
from mdt_jax.models import attention
from mdt_jax.models.pallas_attention import pallas_attention
from mdt_jax.training.loop import train

KERNELS = flags.DEFINE_list("kernels", ["plain", "pallas"], "Kernels of attention.")
STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=100)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the runs.")


def last_loss(kernel: str, dtype: str) -> float:
  """The mean training loss of the last 50 steps of a run."""
  config = digits.get_config()
  config.model.attention_kernel, config.model.dtype = kernel, dtype
  config.seed, config.num_steps = SEED.value, STEPS.value
  config.log_every = 50
  config.checkpoint_every = STEPS.value
  config.eval.every = 0
  with tempfile.TemporaryDirectory() as folder:
    train(config, folder)
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
  losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
  return losses[-1]


def main(argv: list[str]) -> None:
  del argv
  if jax.default_backend() == "cpu" and "pallas" in KERNELS.value:
    interpreted = functools.partial(pallas_attention, interpret=True)
    attention.KERNELS["pallas"] = interpreted
    attention_choice.device_problem = lambda *_: None
  exact = last_loss("plain", "float32")
  print(f"plain float32: loss {exact:.4f}", flush=True)
  for kernel in KERNELS.value:
    loss = last_loss(kernel, "bfloat16")
    print(f"{kernel} bfloat16: loss {loss:.4f} ({loss / exact - 1:+.1%})", flush=True)


if __name__ == "__main__":
  app.run(main)
