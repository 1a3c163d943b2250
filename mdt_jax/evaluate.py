"""Scores a checkpoint: python -m mdt_jax.evaluate --checkpoint=WORKDIR --metrics=bpd

bpd: the variational bound on the negative log likelihood, in bits a dimension, of
examples of the run's data, the held-out ones if there are any; its terms by timestep go
to WORKDIR/evaluation/bpd.json.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import tqdm
from absl import flags

from mdt_jax import cli
from mdt_jax import config as settings
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.evaluation import likelihood
from mdt_jax.training.checkpoints import load_ema, workdir_of

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.", required=True)
METRICS = flags.DEFINE_list("metrics", ["bpd"], "Scores: bpd.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the latest.")
EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Which average of the parameters.")
DATA_SOURCE = flags.DEFINE_string("data_source", None, "Instead of the run's.")
DATA_PATH = flags.DEFINE_string("data_path", None, "Instead of the run's.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images, spread over the data.")
STEPS = flags.DEFINE_integer("steps", None, "Respaced steps; all of them by default.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.")
SEED = flags.DEFINE_integer("seed", 0, "Image i derives its noise from (seed, i).")
OUTPUT = flags.DEFINE_string("output", None, "Folder; WORKDIR/evaluation by default.")

logger = logging.getLogger("mdt_jax")


def main(argv: list[str]) -> None:
  del argv
  for metric in METRICS.value:
    check_choice("--metrics", metric, ["bpd"])
  for name, value in (
    ("--num_images", NUM_IMAGES.value),
    ("--batch_size", BATCH_SIZE.value),
  ):
    if value < 1:
      raise SettingError(name, value, "must be at least 1")
  config, params, step = load_ema(CHECKPOINT.value, STEP.value, EMA_DECAY.value)
  config.data.source = DATA_SOURCE.value or config.data.source
  config.data.path = DATA_PATH.value or config.data.path
  autoencoder = settings.make_autoencoder(config)
  held_out = config.data.validation > 0
  source = settings.make_source(config, autoencoder, held_out=held_out)
  count = min(NUM_IMAGES.value, len(source))
  batches = likelihood.bounds(
    likelihood.make_bound(config, STEPS.value, autoencoder),
    params,
    source,
    np.linspace(0, len(source) - 1, count).astype(int),
    seed=SEED.value,
    batch_size=min(BATCH_SIZE.value, count),
  )
  found: list[dict[str, np.ndarray]] = []
  with tqdm.tqdm(total=count, unit="image") as bar:
    for terms in batches:
      found.append(terms)
      bar.update(len(terms["total_bpd"]))
  means = {
    name: np.concatenate([terms[name] for terms in found]).mean(axis=0).tolist()
    for name in found[0]
  }
  output = Path(OUTPUT.value or workdir_of(CHECKPOINT.value) / "evaluation")
  output.mkdir(parents=True, exist_ok=True)
  path = output / "bpd.json"
  path.write_text(json.dumps({"step": step, "images": count, **means}) + "\n")
  logger.info(
    "%.4f bits a dimension (prior %.4f) of %d images at step %d: %s",
    means["total_bpd"],
    means["prior_bpd"],
    count,
    step,
    path,
  )


if __name__ == "__main__":
  cli.run(main)
