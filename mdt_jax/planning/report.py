"""A plan in words."""

from __future__ import annotations

from mdt_jax.planning.plan import Plan


def describe(plan: Plan) -> str:
  """The plan in some lines."""
  gib = 2**30
  devices = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"{plan.what} on {plan.topology} ({devices}), {plan.batch_size} images, "
    f"{plan.dtype}",
    f"compiled in {plan.compile_seconds:.0f} s",
    "memory of a device, GiB: "
    + ", ".join(f"{name} {size / gib:.2f}" for name, size in plan.memory.items()),
  ]
  if plan.limit:
    spare = plan.limit - plan.memory["total"]
    lines.append(f"fits: {spare / gib:.2f} of {plan.limit / gib:.2f} GiB to spare")
  lines.append(f"model FLOPs: {plan.flops:.3g}")
  lines += [
    f"{kind}: {traffic.calls} calls, each device sends {traffic.sent / 1e6:.1f} MB"
    for kind, traffic in sorted(plan.collectives.items())
  ] or ["nothing is sent between devices"]
  if plan.seconds:
    least = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.seconds.items())
    bound = max(plan.seconds.values())
    lines.append(
      f"at least, ms: {least}; so at best {plan.batch_size / bound:.0f} images/s, "
      f"{plan.seconds['products'] / bound:.0%} of the chip's products"
    )
  return "\n".join(lines)
