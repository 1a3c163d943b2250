"""Fake programs for the tests of the shell scripts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Fakes:
  """Fake programs on the PATH that record their calls."""

  def __init__(self, folder: Path):
    self.folder = folder
    self._bin = folder / "bin"
    self._bin.mkdir()

  def add(self, name: str, body: str = "") -> None:
    program = self._bin / name
    record = f'echo {name} "$@" >>{self.folder}/calls\n'
    program.write_text(f"#!/usr/bin/env bash\ncd {self.folder}\n{record}{body}")
    program.chmod(0o755)

  def start(self, *command, **environment) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(self._bin), os.environ["PATH"]])
    return subprocess.Popen(
      command,
      env={**os.environ, "PATH": path, **environment},
      cwd=self.folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *command, **environment) -> tuple[int, str, str]:
    process = self.start(*command, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def calls(self) -> list[str]:
    record = self.folder / "calls"
    return record.read_text().splitlines() if record.exists() else []
