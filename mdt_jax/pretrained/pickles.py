"""Finds pickles that ask for unlimited memory or time, without unpickling them.

`torch.load(weights_only=True)` restricts which functions a pickle calls, but not how
often and with what.
"""

from __future__ import annotations

import pickletools
from typing import BinaryIO

MAX_OBJECTS = 10**7  # DiT-XL/2 with its optimizer has about 10**5


def check_pickle(stream: BinaryIO) -> None:
  """Checks a pickle before `torch.load` reads it.

  Two things are refused that no checkpoint needs:
  - bytearray(n), which allocates n bytes and which `weights_only` allows;
  - objects that hold each other again and again, such as x = (x, x) repeated 60 times:
    a kilobyte of pickle, whose hash takes years to compute.

  Raises:
    ValueError: the pickle is one of those, or is broken.
  """
  # The number of objects that each item of the unpickler's stack holds when written
  # out. None is a mark.
  stack: list[int | None] = []
  memo: dict[int, int | None] = {}
  try:
    for opcode, value, _ in pickletools.genops(stream):
      if opcode.name == "GLOBAL" and str(value).endswith(" bytearray"):
        raise ValueError("it calls bytearray")
      if opcode.name == "MARK":
        stack.append(None)
      elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(value or 0)] = stack[-1]
      elif opcode.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
      elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(value or 0)])
      else:
        count = _pop(stack, opcode)
        if count > MAX_OBJECTS:
          raise ValueError(f"it holds more than {MAX_OBJECTS} objects")
        stack += [count] * len(opcode.stack_after)
  except ValueError:
    raise
  except Exception as error:  # pickletools raises many types for broken pickles
    raise ValueError(f"it is no pickle ({type(error).__name__})") from None


def _pop(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> int:
  """Removes what an opcode takes from the stack; returns how many objects result."""
  count = 1
  for item in reversed(opcode.stack_before):
    if item is pickletools.stackslice:  # all items after the last mark
      while (top := stack.pop()) is not None:
        count += top
    elif item is not pickletools.markobject:
      count += stack.pop() or 0
  return count
