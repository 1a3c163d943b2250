"""Reads the HLO text of a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # bits of a dtype

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
# In the layout of an array of a TPU's program: in the memory of the core, of the host.
_ELSEWHERE = ("S(1)", "S(5)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.-]+)")
_BRANCH = re.compile(r"\b(?:true|false)_computation=%?([\w.-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass
class Operation:
  """An HLO operation.

  Attributes:
    name: name in its computation.
    opcode: such as "fusion".
    shapes: shapes of the arrays of the result.
    bytes: sizes of the arrays of the result.
    stored: as `bytes`, but 0 for arrays of a TPU in the memory of the core or of the
      host. Texts of GPUs and CPUs do not mark arrays so.
    operands: names of the operands.
    line: the whole line.
  """

  name: str
  opcode: str
  shapes: list[tuple[int, ...]]
  bytes: list[int]
  stored: list[int]
  operands: list[str]
  line: str

  @property
  def is_root(self) -> bool:
    """Whether the result is that of the computation."""
    return self.line.lstrip().startswith("ROOT ")


@dataclasses.dataclass
class Call:
  """A call of another computation.

  Attributes:
    name: name of the computation.
    turns: number of calls; None for a loop without a known trip count.
    condition: name of the loop's condition, or "".
    fused: whether the computation is the inside of one kernel.
  """

  name: str
  turns: int | None
  condition: str
  fused: bool


@dataclasses.dataclass
class Computation:
  """An HLO computation.

  Attributes:
    operations: name -> operation, in the order of the text.
    calls: calls of other computations.
    constant: last integer constant of the computation.
  """

  operations: dict[str, Operation] = dataclasses.field(default_factory=dict)
  calls: list[Call] = dataclasses.field(default_factory=list)
  constant: int = 1


def runs(
  entry: str, computations: dict[str, Computation], *, into_fusions: bool = True
) -> Iterator[tuple[str, int]]:
  """Yields each call of a computation, with the number of times that it happens."""
  waiting = [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    yield name, times
    for call in computations[name].calls:
      if call.fused and not into_fusions:
        continue
      turns = call.turns
      # A loop without a known trip count runs from 0 to the constant of its condition.
      if turns is None:
        turns = computations[call.condition].constant
      waiting.append((call.name, times * turns))


def parse(text: str) -> tuple[str, dict[str, Computation]]:
  """Parses HLO text into (name of the entry computation, computations by name).

  Of the branches of a conditional, the one with most operations counts as called.
  """
  entry, computation = "", Computation()
  computations: dict[str, Computation] = {}
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      entry = start[2] if start[1] else entry
      computation = computations[start[2]] = Computation()
      continue
    operation = _OPERATION.match(line)
    if not operation:
      continue
    name, result, opcode = operation.groups()
    if constant := _CONSTANT.search(line):
      computation.constant = int(constant[1])
    if opcode in ("while", "fusion", "call", "async-start", "conditional"):
      trips, condition = _TRIPS.search(line), _CONDITION.search(line)
      turns = int(trips[1]) if trips else None if opcode == "while" else 1
      called = CALLED.findall(line)
      if opcode == "conditional":
        called.append(_longest(_branches(line), computations))
      computation.calls += [
        Call(callee, turns, condition[1] if condition else "", opcode == "fusion")
        for callee in called
      ]
    arguments = line[operation.end() :].partition(")")[0]
    arrays = _ARRAY.findall(result)
    shapes = [tuple(int(n) for n in shape.split(",") if n) for _, shape, _ in arrays]
    sizes = [
      _bytes(dtype, shape) for (dtype, *_), shape in zip(arrays, shapes, strict=True)
    ]
    computation.operations[name] = Operation(
      name,
      opcode,
      shapes,
      sizes,
      [
        0 if any(place in layout for place in _ELSEWHERE) else size
        for (*_, layout), size in zip(arrays, sizes, strict=True)
      ],
      _NAME.findall(arguments),
      line,
    )
  return entry, computations


def _branches(line: str) -> list[str]:
  """Names of the branches of a conditional."""
  if branches := _BRANCHES.search(line):
    return [name.strip(" %") for name in branches[1].split(",")]
  return _BRANCH.findall(line)


def _longest(names: list[str], computations: dict[str, Computation]) -> str:
  """The computation with most operations, also of those that it calls.

  The text has callees before callers.
  """

  def length(name: str) -> int:
    called = (call.name for call in computations[name].calls)
    return len(computations[name].operations) + sum(map(length, called))

  return max(names, key=length)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
  """Bytes of an array with a dtype of HLO, such as bf16."""
  digits = re.search(r"\d+", dtype)  # f8e4m3fn has 8 bits
  bits = _BITS.get(dtype) or (int(digits[0]) if digits else 8)
  return math.prod(shape) * bits // 8
