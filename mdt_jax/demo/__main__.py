"""Opens a page in the browser: python -m mdt_jax.demo --checkpoint=runs/digits

The page draws, inpaints and edits pictures with the averaged parameters of a run, and
shows the masked pass and the attention of the network. It uses one device. Only this
machine reaches the page, unless --host says otherwise. Ctrl-C ends it. The page needs
gradio: pip install -e '.[demo]', in a clone.
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

import os
import signal
import sys

from absl import flags

from mdt_jax import cli
from mdt_jax.cli.arguments import UsageError
from mdt_jax.demo.commands import Source
from mdt_jax.demo.engine import Engine
from mdt_jax.demo.server import has_gradio, open_socket, serve
from mdt_jax.errors import check_range, renamed_in_errors
from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from mdt_jax.pretrained.hub import is_hub_url
from mdt_jax.sampling.pipeline import Pipeline

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Folder of a run of mdt_jax.main or of mdt_jax.convert, local or in a bucket "
  "(gs://...); or hf://ORG/NAME, a repository of mdt_jax.convert --push.",
  required=True,
)
STEP = flags.DEFINE_integer(
  "step", None, "Training step of the checkpoint. Default: the latest checkpoint."
)
EMA_DECAY = flags.DEFINE_float(
  "ema_decay",
  None,
  "Decay of the averaged parameters to use, one of config.ema_decays. Default: "
  "config.sampling.ema_decay of the run, else the first.",
)
VAE = flags.DEFINE_string(
  "vae",
  None,
  "Autoencoder that decodes latents to images: a folder or a Hugging Face id; none: "
  "do not decode. Default: the run's.",
)
HOST = flags.DEFINE_string(
  "host",
  "127.0.0.1",
  "Address to serve. 0.0.0.0: everyone who reaches this machine can use the page.",
)
PORT = flags.DEFINE_integer("port", 7860, "Port to serve; 0: any free port.")
MAX_QUEUE = flags.DEFINE_integer(
  "max_queue", 64, "Requests that wait for the device, at most; more are refused."
)
cli.require(checkpoint="runs/digits")


def main(argv: list[str]) -> None:
  del argv
  if not has_gradio():
    raise UsageError("the demo needs gradio: pip install -e '.[demo]'")
  check_range("max_queue", MAX_QUEUE.value, 1, 10_000)
  if not is_hub_url(CHECKPOINT.value):
    cli.check_run_folder("checkpoint", CHECKPOINT.value, "step", accepts_parent=True)
  bound = open_socket(HOST.value, PORT.value)
  with bound, renamed_in_errors({"path": "checkpoint", "name": "checkpoint"}):
    source = Source(CHECKPOINT.value, STEP.value, EMA_DECAY.value, VAE.value)
    pipeline = Pipeline.load(source.checkpoint, **source.options)
    number = serve(Engine(pipeline, source), bound, HOST.value, MAX_QUEUE.value)
  is_interrupt = number == signal.SIGINT
  name = signal.Signals(number).name
  print("interrupted" if is_interrupt else f"stopped by {name}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  # A thread that draws or compiles neither delays the end nor aborts it.
  os._exit(EXIT_INTERRUPTED if is_interrupt else EXIT_TRY_AGAIN)


if __name__ == "__main__":
  cli.run(main)
