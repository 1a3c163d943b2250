"""Counts the bytes and floating-point operations of a compiled program's kernels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from mdt_jax.chips import Chip
from mdt_jax.planning import hlo
from mdt_jax.planning.kernel_flops import flops

_NUMBERS = re.compile(r"(\.\d+|\.clone|\.remat)+$")  # at the end of a name
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
# Operations that run no kernel of their own.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "async-start",
  "after-all",
  "partition-id",
  "replica-id",
)
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")  # of TPUs
_SLICES = ("dynamic-slice", "slice", "gather")  # read parts of their first operand


@dataclasses.dataclass
class Kernels:
  """All kernels of one kind in one run of a program.

  Attributes:
    calls: number of calls.
    bytes: bytes that the kernels read and write, if nothing stays in a cache.
    flops: floating-point operations of their matrix products.
    seconds: least time, one kernel after another: for each the longer one of its bytes
      and its operations, at the peaks of a chip. 0 without a chip.
  """

  calls: int = 0
  bytes: float = 0.0
  flops: float = 0.0
  seconds: float = 0.0


def kernels(text: str, chip: Chip | None = None) -> dict[str, Kernels]:
  """Counts the kernels of a compiled program.

  A fused kernel reads its operands and writes its results; what is inside costs no
  traffic. Of an operand that it only slices, or a result that it updates in place, that
  part counts. Arrays of a TPU in the memory of the core or of the host do not count.

  Args:
    text: HLO text, from `jax.stages.Compiled.as_text()`.
    chip: chip for the times; None for no times.

  Returns:
    Kind -> kernels, those that take longest (without a chip: move most bytes) first. A
    kind is XLA's name of a fusion without its number, the target of a custom call, or
    else an operation.
  """
  found: dict[str, Kernels] = {}
  entry, computations = hlo.parse(text)
  for name, times in hlo.runs(entry, computations, into_fusions=False):
    computation = computations[name]
    for operation in computation.operations.values():
      kind = _kind(operation)
      if operation.opcode in _FREE or operation.opcode.endswith("-done"):
        continue
      if kind in _FREE_CALLS:
        continue
      moved = _moved(operation, computation, computations)
      count = flops(operation, computation, computations)
      same = found.setdefault(kind, Kernels())
      same.calls += times
      same.bytes += times * moved
      same.flops += times * count
      if chip:
        same.seconds += times * max(moved / chip.bandwidth, count / chip.flops)
  return dict(
    sorted(found.items(), key=lambda item: (-item[1].seconds, -item[1].bytes))
  )


def total(kinds: Iterable[Kernels]) -> Kernels:
  """Adds several kinds of kernels."""
  fields = [field.name for field in dataclasses.fields(Kernels)]
  kinds = list(kinds)
  return Kernels(*(sum(getattr(kind, name) for kind in kinds) for name in fields))


def _kind(operation: hlo.Operation) -> str:
  """The kind of a kernel, see `kernels`."""
  if operation.opcode == "fusion":
    return _NUMBERS.sub("", operation.name)
  if target := _TARGET.search(operation.line):
    return target[1]
  return operation.opcode


def _moved(
  operation: hlo.Operation,
  computation: hlo.Computation,
  computations: dict[str, hlo.Computation],
) -> int:
  """Bytes that a kernel reads and writes."""
  operations = computation.operations
  sizes = [sum(operations[name].stored) for name in operation.operands]
  written = sum(operation.stored)
  if operation.opcode == "copy-start":
    return written  # the results are both the target and the source
  # Of an array that is not stored, no part is: hence each `min`.
  if operation.opcode in ("slice-start", "dynamic-slice-start"):
    return min(operation.bytes[1], sizes[0]) + operation.stored[1]
  if operation.opcode in _SLICES:
    return min(sum(operation.bytes), sizes[0]) + written
  if operation.opcode.removesuffix("-start") == "dynamic-update-slice":
    update = operations[operation.operands[1]]
    return sum(update.stored) + min(sum(update.bytes), max(operation.stored))
  if operation.opcode != "fusion":
    return sum(sizes) + written
  body = computations[hlo.CALLED.findall(operation.line)[0]]
  parts = _parts_read(body)
  read = sum(min(parts.get(i, size), size) for i, size in enumerate(sizes))
  roots = _roots(body)
  if len(roots) != len(operation.stored):  # one operation with several results
    return read + written
  found = zip(roots, operation.stored, strict=True)
  return read + sum(min(_written(root, body), size) for root, size in found)


def _parts_read(body: hlo.Computation) -> dict[int, int]:
  """Parameter of a fusion that is only sliced or updated in place -> bytes read."""
  found = {}
  for parameter in body.operations.values():
    if parameter.opcode != "parameter":
      continue
    uses = _uses(parameter.name, body)
    parts = [_part_read(use, name) for use, name in uses]
    if uses and None not in parts:
      number = int(parameter.line.partition(" parameter(")[2].partition(")")[0])
      found[number] = sum(part for part in parts if part is not None)
  return found


def _uses(name: str, body: hlo.Computation) -> list[tuple[hlo.Operation, str]]:
  """The operations that use a value, directly or by a bitcast of the second name."""
  found = []
  for operation in body.operations.values():
    if name in operation.operands:
      if operation.opcode == "bitcast":
        found += _uses(operation.name, body)
      else:
        found.append((operation, name))
  return found


def _part_read(use: hlo.Operation, name: str) -> int | None:
  """Bytes that an operation reads of a value; None if it reads all of it."""
  if use.operands[0] != name or name in use.operands[1:]:
    return None
  if use.opcode in _SLICES:
    return sum(use.bytes)
  return 0 if use.opcode == "dynamic-update-slice" else None


def _roots(body: hlo.Computation) -> list[hlo.Operation]:
  """The operations whose results a fusion writes."""
  root = next(o for o in body.operations.values() if o.is_root)
  if root.opcode == "tuple":
    return [body.operations[name] for name in root.operands]
  return [root]


def _written(operation: hlo.Operation, body: hlo.Computation) -> int:
  """Bytes that a fusion writes for one of its results."""
  while operation.opcode == "bitcast":
    operation = body.operations[operation.operands[0]]
  if operation.opcode == "dynamic-update-slice":
    return sum(body.operations[operation.operands[1]].bytes)
  return sum(operation.bytes)
