"""The command mdt_jax.demo, whether or not gradio is installed: python -m … [--gone]

gradio counts as installed, or as missing with --gone.
"""

from __future__ import annotations

import sys

from mdt_jax import cli
from mdt_jax.demo import __main__ as demo

if __name__ == "__main__":
  is_gone = "--gone" in sys.argv
  sys.argv = [argument for argument in sys.argv if argument != "--gone"]
  demo.has_gradio = lambda: not is_gone
  cli.run(demo.main)
