"""Times the training step: python -m benchmarks.train_step --models=MDTv2-S/2

Measures time, images per second, memory, and the MFU: model FLOPs per second of both
passes, divided by the FLOPs per second that large matrix products reach on the machine.
With --reference=CHECKOUT, the benchmark also times the released PyTorch code in
alternation (see benchmarks/reference.py) and prints the ratio of images per second.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import timing
from mdt_jax import sharding
from mdt_jax.config import default_config
from mdt_jax.experiment import build
from mdt_jax.models.flops import train_flops
from mdt_jax.training.program import make_program

MODELS = flags.DEFINE_list("models", ["MDTv2-S/2"], "Keys of mdt_jax.MODELS.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images per step.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
MASKED_SHARE = flags.DEFINE_float(
  "masked_share", 0.4, "Share of masked tokens in the masked pass; 0: no masked pass."
)
UNROLL = flags.DEFINE_integer(
  "unroll", None, "config.model.unroll; default: -1 on CPUs, 1 otherwise."
)
REMAT = flags.DEFINE_string("remat", "none", "config.model.remat.")
KERNEL = flags.DEFINE_string(
  "attention_kernel", "plain", "config.model.attention_kernel."
)
REPEATS = flags.DEFINE_integer("repeats", 10, "Number of timed turns.")
REFERENCE = flags.DEFINE_string("reference", None, "Checkout of the released code.")
COMPILE = flags.DEFINE_bool(
  "compile_reference", None, "Whether to use torch.compile; default: on GPUs alone."
)
JSON = flags.DEFINE_string("json", None, "File for all measurements.")


def benchmark(name: str) -> dict[str, Any]:
  """Times the training step of one network, prints the results and returns them."""
  config = default_config()
  is_cpu = jax.default_backend() == "cpu"
  is_v2 = name.startswith("MDTv2")
  config.update_from_flattened_dict(
    {
      "batch_size": BATCH_SIZE.value,
      "model.name": name,
      "model.dtype": DTYPE.value,
      "model.remat": REMAT.value,
      "model.attention_kernel": KERNEL.value,
      "model.unroll": UNROLL.value or (-1 if is_cpu else 1),
      "optimizer.name": "adan" if is_v2 else "adamw",
      "diffusion.loss_weight": "min_snr" if is_v2 else "none",
      **({} if MASKED_SHARE.value else {"masking.ratio": 0.0, "masking.width": 0.0}),
    }
  )
  experiment = build(config)
  model, mesh = experiment.model, experiment.mesh
  num_keep = None
  if MASKED_SHARE.value and model.takes_mask:
    multiple = experiment.settings.masking.multiple
    kept = (1 - MASKED_SHARE.value) * model.num_tokens
    # Rounded up, so that mdt_jax never computes fewer tokens than the reference.
    num_keep = multiple * math.ceil(kept / multiple)
  random = np.random.default_rng(0)
  shape = (BATCH_SIZE.value, *model.input_shape)
  with sharding.use_mesh(mesh):
    program = make_program(experiment)
    state = program.init(jax.random.key(0))
    batch = sharding.put_batch(
      {
        "image": random.standard_normal(shape).astype(np.float32),
        "label": random.integers(model.num_classes, size=shape[0]).astype(np.int32),
      },
      mesh,
      config.batch_size,
    )
    start = time.perf_counter()
    compiled = program.step.lower(state, batch, num_keep).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> None:
      nonlocal state
      state, metrics = compiled(state, batch)
      jax.block_until_ready((state, metrics))

    functions = {"mdt_jax": step}
    if REFERENCE.value:
      from benchmarks.reference import Reference  # imports torch

      reference = Reference(
        REFERENCE.value,
        name,
        model,
        masked_share=MASKED_SHARE.value,
        batch_size=BATCH_SIZE.value,
        dtype=DTYPE.value,
        compiled=not is_cpu if COMPILE.value is None else COMPILE.value,
        threads=os.cpu_count() if is_cpu else None,
      )
      functions["reference"] = reference.train_step
    times = timing.take_turns(functions, REPEATS.value)
  flops = BATCH_SIZE.value * train_flops(model, num_keep)
  report = {
    "model": name,
    "batch_size": BATCH_SIZE.value,
    "dtype": DTYPE.value,
    "attention_kernel": model.attention_kernel,
    "unroll": model.unroll,
    "kept_tokens": num_keep,
    "compile_seconds": compile_seconds,
    "flops": flops,
    "peak_bytes": timing.peak_bytes(compiled),
    "seconds": {key: value.seconds for key, value in times.items()},
  }
  for key, value in times.items():
    rate = BATCH_SIZE.value / value.median
    memory = report["peak_bytes"] if key == "mdt_jax" else reference.peak_bytes()
    print(
      f"{name:10} {key:10} {value.median:9.4f} s ± {value.spread:.1%} "
      f"{rate:9.2f} images/s  {flops / value.median / 1e9:9.0f} GFLOP/s  "
      f"MFU {flops / value.median / matmul_rate():6.1%}"
      + (f"  {memory / 2**30:.2f} GiB" if memory else ""),
      flush=True,
    )
  if REFERENCE.value:
    ratio = times["reference"].median / times["mdt_jax"].median
    report["ratio"] = ratio
    print(f"{name:10} {ratio:.2f} times the images/s of the released code", flush=True)
  return report


@functools.cache
def matmul_rate() -> float:
  """FLOPs per second of large matrix products; measured once."""
  return timing.matmul_rate(DTYPE.value)


def main(argv: list[str]) -> None:
  del argv
  print(
    f"{timing.device()}, {os.cpu_count()} cores; matrix products of {DTYPE.value} at "
    f"{matmul_rate() / 1e9:,.0f} GFLOP/s"
  )
  reports = [benchmark(name) for name in MODELS.value]
  if JSON.value:
    found = {"device": timing.device(), "matmul_rate": matmul_rate(), "runs": reports}
    Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
