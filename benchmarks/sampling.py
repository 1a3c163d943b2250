"""Times guided sampling: python -m benchmarks.sampling --models=MDTv2-S/2

Measures the time of one step of 250-step DDPM with guidance, images per second at 250
steps, and the MFU: model FLOPs per second, divided by the FLOPs per second that large
matrix products reach on the machine. With --reference=CHECKOUT, the benchmark also
times the released PyTorch code in alternation (see benchmarks/reference.py).
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks import timing
from mdt_jax.config import default_config
from mdt_jax.diffusion.samplers import sample
from mdt_jax.experiment import build
from mdt_jax.models.flops import forward_flops
from mdt_jax.models.registry import init_params

MODELS = flags.DEFINE_list("models", ["MDTv2-S/2"], "Keys of mdt_jax.MODELS.")
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 8, "Images; guidance doubles the batch."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
STEPS = flags.DEFINE_integer("steps", 4, "Steps in a timed turn, the last of the 250.")
UNROLL = flags.DEFINE_integer(
  "unroll", None, "config.model.unroll; default: -1 on CPUs, 1 otherwise."
)
KERNEL = flags.DEFINE_string(
  "attention_kernel", "plain", "config.model.attention_kernel."
)
REPEATS = flags.DEFINE_integer("repeats", 10, "Number of timed turns.")
REFERENCE = flags.DEFINE_string("reference", None, "Checkout of the released code.")
COMPILE = flags.DEFINE_bool(
  "compile_reference", None, "Whether to use torch.compile; default: on GPUs alone."
)
JSON = flags.DEFINE_string("json", None, "File for all measurements.")

NUM_STEPS, CFG_SCALE = 250, 3.8


def benchmark(name: str) -> dict[str, Any]:
  """Times sampling steps of one network, prints the results and returns them."""
  config = default_config()
  is_cpu = jax.default_backend() == "cpu"
  config.update_from_flattened_dict(
    {
      "model.name": name,
      "model.dtype": DTYPE.value,
      "model.unroll": UNROLL.value or (-1 if is_cpu else 1),
      "model.attention_kernel": KERNEL.value,
      "sampling.num_steps": NUM_STEPS,
      "sampling.cfg_scale": CFG_SCALE,
    }
  )
  experiment = build(config, jax.devices()[:1])
  model, sampler = experiment.model, experiment.sampler

  @jax.jit
  def steps(params: Any, x: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    model_fn = sampler.guidance.apply(
      lambda x, t, y: model.apply({"params": params}, x, t, y),
      labels,
      model.conditioning.null_like(labels),
      one_batch=not is_cpu or model.unroll == 1,
    )
    return sample(model_fn, sampler.process, x, key, num_steps=STEPS.value)

  key = jax.random.key(0)
  params = jax.jit(functools.partial(init_params, model))(key)
  shape = (BATCH_SIZE.value, *model.input_shape)
  x = jax.random.normal(key, shape)
  labels = jax.random.randint(key, shape[:1], 0, model.num_classes)
  compiled = steps.lower(params, x, labels, key).compile()
  functions = {
    "mdt_jax": lambda: jax.block_until_ready(compiled(params, x, labels, key))
  }
  if REFERENCE.value:
    from benchmarks.reference import Reference  # imports torch

    reference = Reference(
      REFERENCE.value,
      name,
      model,
      masked_share=0.4,
      batch_size=BATCH_SIZE.value,
      dtype=DTYPE.value,
      compiled=not is_cpu if COMPILE.value is None else COMPILE.value,
      threads=os.cpu_count() if is_cpu else None,
    )
    step = reference.guided_step(CFG_SCALE)

    def reference_steps() -> None:
      for _ in range(STEPS.value):
        step()

    functions["reference"] = reference_steps
  times = timing.take_turns(functions, REPEATS.value)
  flops = 2 * BATCH_SIZE.value * forward_flops(model)
  for who, value in times.items():
    seconds = value.median / STEPS.value
    print(
      f"{name:10} {who:10} {seconds:9.4f} s a step ± {value.spread:.1%} "
      f"{BATCH_SIZE.value / seconds / NUM_STEPS:9.3f} images/s  "
      f"MFU {flops / seconds / matmul_rate():6.1%}",
      flush=True,
    )
  report = {
    "model": name,
    "batch_size": BATCH_SIZE.value,
    "dtype": DTYPE.value,
    "attention_kernel": model.attention_kernel,
    "unroll": model.unroll,
    "steps": STEPS.value,
    "flops_a_step": flops,
    "peak_bytes": timing.peak_bytes(compiled),
    "seconds": {who: value.seconds for who, value in times.items()},
  }
  if REFERENCE.value:
    report["ratio"] = times["reference"].median / times["mdt_jax"].median
    print(f"{name:10} {report['ratio']:.2f} times the images/s of the released code")
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
