"""Text of a plan."""

from __future__ import annotations

from mdt_jax.planning.kernels import Kernels, total
from mdt_jax.planning.plan import Plan

NUM_KERNELS = 8  # kinds of kernels in the text


def describe(plan: Plan) -> str:
  """Describes a plan in a few lines of text."""
  gib = 2**30
  devices = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"{plan.what} on {plan.topology}"
    + (f" x {plan.slices} slices" if plan.slices > 1 else "")
    + f" ({devices}), batch size {plan.batch_size}, {plan.dtype}",
    f"compiled in {plan.compile_seconds:.0f} s",
    "memory on each device, GiB: "
    + ", ".join(f"{name} {size / gib:.2f}" for name, size in plan.memory.items()),
  ]
  if plan.limit:
    spare = plan.limit - plan.memory["total"]
    limit = plan.limit / gib
    lines.append(f"fits: {spare / gib:.2f} of {limit:.2f} GiB remain free")
  else:
    lines.append("whether it fits is unknown; --chip=v5e, say, compares with a chip")
  lines.append(f"model FLOPs: {plan.flops:.3g}")
  if plan.collectives is not None:
    lines += [
      f"{kind}: {traffic.calls} calls, each device sends {traffic.sent / 1e6:.1f} MB"
      for kind, traffic in sorted(plan.collectives.items())
    ] or ["devices send nothing to each other"]
  if plan.seconds:
    least = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.seconds.items())
    bound = max(plan.seconds.values())
    lines.append(f"least time, ms: {least}; so at most {_speed(plan, bound)}")
  if plan.kernels is not None:
    lines += _kernel_lines(plan, plan.kernels)
  return "\n".join(lines)


def _speed(plan: Plan, seconds: float) -> str:
  """Images per second, and share of the peak, of a program that takes `seconds`."""
  share = plan.seconds["products"] / seconds
  return f"{plan.batch_size / seconds:.0f} images/s and {share:.0%} of the peak FLOPs"


def _kernel_lines(plan: Plan, kernels: dict[str, Kernels]) -> list[str]:
  """A table of the kernels that take longest, or move most bytes, and their time."""
  kinds = dict(list(kernels.items())[:NUM_KERNELS])
  if left := list(kernels.values())[NUM_KERNELS:]:
    kinds[f"{len(left)} other kinds"] = total(left)
  kinds["all kernels"] = everything = total(kernels.values())
  width = max(map(len, kinds))
  time = "      ms" if plan.seconds else ""
  lines = [f"{'kernels':{width}}   calls       GB     GFLOP{time}"] + [
    f"{name:{width}} {k.calls:7} {k.bytes / 1e9:8.2f} {k.flops / 1e9:9.1f}"
    + (f" {1e3 * k.seconds:7.2f}" if plan.seconds else "")
    for name, k in kinds.items()
  ]
  if plan.seconds:
    lines.insert(
      0,
      "kernels one after another at the chip's peaks: "
      f"{1e3 * everything.seconds:.1f} ms, so {_speed(plan, everything.seconds)}",
    )
  return lines
