"""The command line and the Python that draw the same pictures as the page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from mdt_jax.pretrained.hub import is_hub_url

Labels: TypeAlias = Sequence[int | None]  # None is no class


@dataclasses.dataclass(frozen=True)
class Source:
  """Where the pipeline of the page comes from, as the user typed it.

  Attributes:
    checkpoint, step, ema_decay, vae: values of the flags of the command.
  """

  checkpoint: str
  step: int | None = None
  ema_decay: float | None = None
  vae: str | None = None

  @property
  def options(self) -> dict[str, Any]:
    """The flags that were given, without the checkpoint."""
    found = dataclasses.asdict(self)
    del found["checkpoint"]
    return {name: value for name, value in found.items() if value is not None}


def command_line(source: Source, labels: Labels, arguments: dict[str, Any]) -> str:
  """Returns the command of `mdt_jax.sample`, over several lines.

  Args:
    source: the checkpoint.
    labels: one label for each picture; None is written as "none".
    arguments: arguments of `Pipeline.job`.
  """
  named = ",".join("none" if label is None else str(label) for label in labels)
  flags = {**source.options, "labels": named, "batch_size": len(labels), **arguments}
  lines = [f"python -m mdt_jax.sample --checkpoint={shlex.quote(source.checkpoint)}"]
  line = ""
  for name, value in {**flags, "output": "pictures"}.items():
    flag = f"--{name}={shlex.quote(_text(value))}"
    if line and len(line) + len(flag) > 70:
      lines.append(line)
      line = flag
    else:
      line = f"{line} {flag}".strip()
  return " \\\n  ".join([*lines, line])


def python_code(source: Source, labels: Labels, arguments: dict[str, Any]) -> str:
  """Returns the Python that draws the pictures; see `command_line`."""
  load = "load" if is_hub_url(source.checkpoint) else "from_checkpoint"
  given = [repr(source.checkpoint)]
  given += [f"{name}={value!r}" for name, value in source.options.items()]
  options = {"batch_size": len(labels), **arguments}
  lines = [f"  {name}={_plain(value)!r}," for name, value in options.items()]
  return "\n".join(
    [
      "import mdt_jax",
      "",
      f"pipeline = mdt_jax.Pipeline.{load}({', '.join(given)})",
      "pictures = pipeline(",
      f"  {list(labels)!r},",
      *lines,
      ")",
      'pictures[0].save("picture.png")',
    ]
  )


def _plain(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic) else value


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
