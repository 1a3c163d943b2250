"""Draws docs/digits.png, the picture of the README: python docs/readme_picture.py RUN

RUN is the folder of a run on the digits, such as runs/digits. A column is a digit, a
row what the network predicts for the digit, from full noise to the last step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mdt_jax import Pipeline
from mdt_jax.sampling.stepwise import Stepper

SCALE = 4  # pixels of the picture for a pixel of a digit
STAGES = (0, 8, 16, 24, 32, 40, 49)  # of 50 steps
LABELS = list(range(10)) * 2


def main() -> None:
  pipeline = Pipeline.from_checkpoint(sys.argv[1])
  job = pipeline.job(LABELS, seed=3, num_steps=50, batch_size=len(LABELS))
  stepper = Stepper()
  steps = list(stepper.run(job))
  rows = []
  for stage in STAGES:
    images = stepper.decode(job, steps[stage].x0)  # (N, 8, 8, 1)
    padded = np.pad(images[..., 0], ((0, 0), (0, 0), (1, 1)))
    rows.append(np.concatenate(list(padded), axis=1))
  picture = np.concatenate([np.pad(row, ((1, 1), (0, 0))) for row in rows])
  picture = picture.repeat(SCALE, 0).repeat(SCALE, 1)
  Image.fromarray(picture).save(Path(__file__).with_name("digits.png"), optimize=True)


if __name__ == "__main__":
  main()
