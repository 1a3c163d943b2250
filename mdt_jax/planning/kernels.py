"""Counts the bytes that the kernels of a compiled program read and write."""

from __future__ import annotations

import dataclasses
import re

from mdt_jax.planning import hlo

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
  "after-all",
  "partition-id",
  "replica-id",
)
_SLICES = ("dynamic-slice", "slice", "gather")  # read parts of their first operand


@dataclasses.dataclass
class Moved:
  """All kernels of one kind in one run of a program.

  Attributes:
    calls: number of calls.
    bytes: bytes that the kernels read and write, if nothing stays in a cache.
  """

  calls: int = 0
  bytes: float = 0.0


def kernels(text: str) -> dict[str, Moved]:
  """Counts the bytes that the kernels of a compiled program read and write.

  A fused kernel counts its operands and results, not what is inside; of an operand that
  it only slices, or a result that it updates in place, it counts that part.

  Args:
    text: HLO text, from `jax.stages.Compiled.as_text()`.

  Returns:
    Kind -> calls and bytes, those that move most first. A kind is XLA's name of a
    fusion without its number, the target of a custom call, or else an operation.
  """
  found: dict[str, Moved] = {}
  entry, computations = hlo.parse(text)
  for name, times in hlo.runs(entry, computations, into_fusions=False):
    computation = computations[name]
    for operation in computation.operations.values():
      if operation.opcode in _FREE:
        continue
      moved = found.setdefault(_kind(operation), Moved())
      moved.calls += times
      moved.bytes += times * _moved(operation, computation, computations)
  return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


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
  sizes = [sum(operations[name].bytes) for name in operation.operands]
  written = sum(operation.bytes)
  body = None
  if operation.opcode == "fusion":
    body = computations[hlo.CALLED.findall(operation.line)[0]]
  elif operation.opcode in (*_SLICES, "dynamic-update-slice"):
    if operation.opcode == "dynamic-update-slice":
      return 2 * sizes[1]
    return 2 * written
  if body is None:
    return sum(sizes) + written
  parts = _parts_read(body)
  read = sum(parts.get(i, size) for i, size in enumerate(sizes))
  return read + sum(_written(root, body) for root in _roots(body))


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
