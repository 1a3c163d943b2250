"""Compares samplers on digits: python -m benchmarks.samplers --checkpoint=runs/digits

Writes a table and a picture to docs/sampling.md. The table shows the Frechet distance
between the pixels of drawn and real digits. For comparison, it also shows the distance
between two random halves of the real digits. "recognised" is the share of images that a
support vector classifier, fitted on the real digits, assigns to the intended label. The
classifier differs from `evaluation.classifier`, so the share differs from the score
"accuracy".
"""

from __future__ import annotations

import numpy as np
from absl import flags
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.tables import DOCS, machine, write_table
from mdt_jax import Pipeline, cli
from mdt_jax.evaluation.metrics import frechet_distance
from mdt_jax.sampling.pictures import make_grid

CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Workdir of a run on digits.", required=True
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Images for each sampler.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 500, "Images in a batch.")
SEEDS = flags.DEFINE_integer(
  "seeds",
  None,
  "Instead, compare 250 steps of DDPM with 20 steps of DPM-Solver++ for this number of "
  "seeds.",
)
CFG_SCALES = flags.DEFINE_list("cfg_scales", ["2", "1"], "Guidance scales.")

# (method, steps, spacing) of each row of the table
RUNS = [
  ("ddpm", 250, None),
  ("ddpm", 20, None),
  ("ddim", 20, None),
  *[
    (method, steps, spacing)
    for method, counts in (
      ("dpm++", (10, 20, 30)),
      ("dpm++sde", (10, 20, 30)),
      ("euler", (20,)),
      ("heun", (10,)),
    )
    for steps in counts
    for spacing in ("uniform", "log_snr", "karras")
    if steps == 20 or method == "heun" or spacing == "log_snr"
  ],
]
COMPARED = [("ddpm", 250), ("dpm++", 20)]
SHOWN = [("ddpm", 250), ("ddim", 20), ("dpm++", 10), ("dpm++", 20), ("dpm++sde", 20)]


def main(argv: list[str]) -> None:
  del argv
  pipeline = Pipeline.from_checkpoint(CHECKPOINT.value)
  real, real_labels = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(real, real_labels)
  labels = np.arange(NUM_IMAGES.value) % 10

  def measure(
    method: str, steps: int, spacing: str | None, scale: float, seed: int = 0
  ) -> tuple[np.ndarray, float, float]:
    """Returns (images, Frechet distance to the real digits, share recognised)."""
    images = pipeline.draw(
      labels,
      seed=seed,
      method=method,
      num_steps=steps,
      spacing=spacing,
      cfg_scale=scale,
      batch_size=BATCH_SIZE.value,
    )
    pixels = images.reshape(len(images), -1) / 255 * 16
    recognised = float(np.mean(classifier.predict(pixels) == labels))
    distance = frechet_distance(pixels, real)
    print(method, steps, spacing, scale, seed, f"{distance:.1f}", flush=True)
    return images, distance, recognised

  scales = [float(scale) for scale in CFG_SCALES.value]
  if SEEDS.value:
    lines = [
      f"{machine()} (`python -m benchmarks.samplers --seeds={SEEDS.value}`); "
      f"{len(labels)} images each, scale {scales[0]:g}.",
      "",
      "| sampler | steps | mean | seed by seed |",
      "| --- | --- | --- | --- |",
    ]
    for method, steps in COMPARED:
      distances = [
        measure(method, steps, None, scales[0], seed)[1] for seed in range(SEEDS.value)
      ]
      each = ", ".join(f"{distance:.1f}" for distance in distances)
      lines.append(f"| {method} | {steps} | {np.mean(distances):.1f} | {each} |")
    write_table("sampling.md", "seeds", lines)
    return

  order = np.random.default_rng(0).permutation(len(real))
  halves = [real[half] for half in np.array_split(order, 2)]
  lines = [
    f"{machine()} (`python -m benchmarks.samplers`); {len(labels)} images each. Two "
    f"random halves of the real digits: {frechet_distance(*halves):.1f}.",
    "",
    "| sampler | steps | calls | timesteps even in |"
    + "".join(f" scale {scale:g} | recognised |" for scale in scales),
    "| --- | --- | --- | --- |" + " --- | --- |" * len(scales),
  ]
  shown = {}
  for method, steps, spacing in RUNS:
    cells = [method, steps, 2 * steps - 1 if method == "heun" else steps]
    cells.append(spacing or "t (released)")
    for scale in scales:
      images, distance, recognised = measure(method, steps, spacing, scale)
      cells += [f"{distance:.1f}", f"{recognised:.1%}"]
      if scale == scales[0] and spacing in (None, "log_snr"):
        shown[method, steps] = images[:10]
    lines.append(f"| {' | '.join(map(str, cells))} |")
  write_table("sampling.md", "samplers", lines)
  rows = np.concatenate([shown[run] for run in SHOWN])
  captions = [f"{m} {n}" if i == 0 else "" for m, n in SHOWN for i in range(10)]
  make_grid(rows, captions, columns=10).save(DOCS / "samplers.png", optimize=True)


if __name__ == "__main__":
  cli.run(main)
