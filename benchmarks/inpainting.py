"""Scores inpainted digits: python -m benchmarks.inpainting --checkpoint=runs/digits

Hides the right half of 200 real digits and paints the half, with and without the
side-interpolater in the first steps. "recognised" is the share of painted digits that
the classifier of `benchmarks.samplers` assigns to the class of the real digit. "error"
is the root mean square difference from the hidden half. Writes the table and the
picture of docs/sampling.md.
"""

from __future__ import annotations

import numpy as np
from absl import flags
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.tables import DOCS, machine, write_table
from mdt_jax import Pipeline, cli
from mdt_jax.data.digits import DigitsSource
from mdt_jax.sampling.pictures import make_grid

CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Workdir of a run on digits.", required=True
)

PER_CLASS = 20  # digits of each class
SAMPLERS = (("dpm++", 20, 1), ("ddpm", 50, 1), ("ddpm", 20, 10))  # steps, repeats
INTERPOLATIONS = (0.0, 0.25, 1.0)  # shares of the process
# Without a label, the left half is the only information about the right half.
CONDITIONS = {
  "label, scale 2": dict(cfg_scale=2.0),
  "no label": dict(cfg_scale=0.0, cfg_power=0.0),
}


def main(argv: list[str]) -> None:
  del argv
  pipeline = Pipeline.from_checkpoint(CHECKPOINT.value)
  source = DigitsSource()
  real, labels = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(real, labels)
  rng = np.random.default_rng(0)
  chosen = np.concatenate(
    [rng.choice(np.flatnonzero(labels == k), PER_CLASS, False) for k in range(10)]
  )
  images = np.stack([source[int(i)]["image"] for i in chosen])
  labels = labels[chosen]
  mask = np.zeros((8, 8), bool)
  mask[:, 4:] = True

  lines = [
    f"{machine()} (`python -m benchmarks.inpainting`); {len(images)} digits.",
    "",
    "| sampler | steps | repeats | given | side-interpolater | recognised | error |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  shown = []
  for method, steps, repeats in SAMPLERS:
    for given, settings in CONDITIONS.items():
      for share in INTERPOLATIONS:
        painted = pipeline.draw(
          labels,
          inpaint=images,
          mask=mask,
          interpolation=share,
          repeats=repeats,
          method=method,
          num_steps=steps,
          batch_size=len(labels),
          **settings,
        )
        assert (painted[:, ~mask] == images[:, ~mask]).all(), "visible pixels changed"
        pixels = painted.reshape(len(painted), -1) / 255 * 16
        recognised = np.mean(classifier.predict(pixels) == labels)
        error = painted[:, mask].astype(float) - images[:, mask]
        lines.append(
          f"| {method} | {steps} | {repeats} | {given} | first {share:.0%} | "
          f"{recognised:.1%} | {np.sqrt(np.mean(error**2)):.1f} |"
        )
        print(lines[-1], flush=True)
        if (method, share) == (SAMPLERS[0][0], 0.25):
          shown.append(painted[::PER_CLASS])
  write_table("sampling.md", "inpainting", lines)
  hidden = np.where(mask[..., None], 128, images[::PER_CLASS]).astype(np.uint8)
  rows = [images[::PER_CLASS], hidden, *shown]
  names = ["real", "hidden", "label", "no label"]
  captions = [name if i == 0 else "" for name in names for i in range(10)]
  grid = make_grid(np.concatenate(rows), captions, columns=10)
  grid.save(DOCS / "inpainting.png", optimize=True)


if __name__ == "__main__":
  cli.run(main)
