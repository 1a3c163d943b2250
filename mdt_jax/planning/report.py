"""Text of a plan."""

from __future__ import annotations

from mdt_jax.planning.plan import Plan

NUM_KERNELS = 6  # kinds of kernels in the text


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
  lines.append(f"model FLOPs: {plan.flops:.3g}")
  lines += [
    f"{kind}: {traffic.calls} calls, each device sends {traffic.sent / 1e6:.1f} MB"
    for kind, traffic in sorted(plan.collectives.items())
  ] or ["devices send nothing to each other"]
  moved = sum(kind.bytes for kind in plan.kernels.values())
  most = list(plan.kernels.items())[:NUM_KERNELS]
  lines.append(
    f"kernels read and write {moved / 1e9:.1f} GB, most of it: "
    + ", ".join(f"{name} {k.bytes / 1e9:.2f} ({k.calls} calls)" for name, k in most)
  )
  if plan.seconds:
    least = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.seconds.items())
    bound = max(plan.seconds.values())
    lines.append(
      f"least time, ms: {least}; so at most {plan.batch_size / bound:.0f} images/s and "
      f"{plan.seconds['products'] / bound:.0%} of the chip's peak FLOPs"
    )
  return "\n".join(lines)
