"""The command mdt_jax.demo where gradio counts as installed: python -m …"""

from __future__ import annotations

from mdt_jax import cli
from mdt_jax.demo import __main__ as demo

if __name__ == "__main__":
  demo.check_gradio = lambda: None
  cli.run(demo.main)
