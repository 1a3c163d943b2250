"""How good are sampled digits? python -m benchmarks.digits_quality --samples=FILE.npz

The scores of mdt_jax.evaluate that need no network, against all real digits: Frechet
distance of the pixels, accuracy by a classifier, diversity.
"""

from __future__ import annotations

import json

from absl import app, flags

from mdt_jax.data.sources import DigitsSource
from mdt_jax.evaluation import scores
from mdt_jax.evaluation.images import NpzImages, SourceImages
from mdt_jax.evaluation.metrics import PIXEL_METRICS

SAMPLES = flags.DEFINE_string("samples", None, "File of mdt_jax.sample.", required=True)


def main(argv: list[str]) -> None:
  del argv
  extract = scores.make_extractor(PIXEL_METRICS)
  digits = DigitsSource()
  real, generated = (
    scores.summarize(images, extract, PIXEL_METRICS)
    for images in (SourceImages(digits, len(digits)), NpzImages(SAMPLES.value))
  )
  found = scores.score(PIXEL_METRICS, real, generated)
  print(json.dumps({"images": len(generated.labels), **found}))


if __name__ == "__main__":
  app.run(main)
