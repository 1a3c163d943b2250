"""Installs mdt_jax and what it needs on a runtime of Colab, and names the device.

The first cell of colab/mdt.ipynb runs this file.
"""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Packages that keep their versions. Another jax would not fit the libtpu or the CUDA
# plugins of the runtime, and the notebook would train on the CPU. The kernel may have
# loaded NumPy already. If mdt_jax needs another version of one of these packages, pip
# fails and changes nothing.
PINNED = re.compile(r"jax|jaxlib|jax[-_]cuda.*|libtpu|numpy")


def versions() -> dict[str, str]:
  """The installed packages and their versions."""
  importlib.invalidate_caches()
  return {found.name: found.version for found in importlib.metadata.distributions()}


def install(before: dict[str, str]) -> None:
  """Installs the clone; `before` holds the installed versions."""
  pins = [f"{name}=={at}" for name, at in before.items() if PINNED.fullmatch(name)]
  with tempfile.TemporaryDirectory() as folder:
    constraints = Path(folder, "constraints.txt")
    constraints.write_text("\n".join(pins))
    pip = [sys.executable, "-m", "pip", "install", "-qq"]  # errors alone
    pip += ["--disable-pip-version-check", "--constraint", str(constraints)]
    command = [*pip, "--editable", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
  print(done.stdout + done.stderr, end="")
  if done.returncode:
    raise RuntimeError("pip could not install mdt_jax, for the reason above")


def device_line() -> str:
  """Names the devices that JAX found; warns if there is only a CPU."""
  import jax

  devices = jax.devices()
  if devices[0].platform == "cpu":
    return (
      "CPU: no TPU or GPU was found. Training takes minutes, and the released network "
      "is left out. For a TPU or GPU: Runtime > Change runtime type."
    )
  return f"{devices[0].platform.upper()}: {len(devices)} x {devices[0].device_kind}"


def main() -> None:
  before = versions()
  install(before)
  after = versions()
  for name in sorted(before.keys() & after.keys()):
    if before[name] != after[name]:
      print(f"{name} {before[name]} was replaced by {after[name]}")
  print(device_line())


if __name__ == "__main__":
  main()
