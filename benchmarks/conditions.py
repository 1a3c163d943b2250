"""Networks conditioned on arrays: python -m benchmarks.conditions

Two experiments; docs/conditions.md states their protocol, which was committed before
the first full run, and holds the results.

  digits     The class of a digit as a label, as a one-hot vector, and as three tokens:
             accuracy of a classifier on guided samples, with three seeds.
  captions   Images of two coloured shapes, drawn by text: the share of attributes that
             are drawn as asked, which is read back exactly.

Finished runs are kept as lines of docs/conditions.jsonl; the same command continues.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from benchmarks.tables import DOCS, machine, write_table
from mdt_jax import Pipeline
from mdt_jax.config import default_config
from mdt_jax.data.digits import DigitsSource
from mdt_jax.data.memory import MemorySource
from mdt_jax.evaluation.classifier import conditional_accuracy
from mdt_jax.sampling.pictures import to_pil
from mdt_jax.training.loop import train

EXPERIMENTS = flags.DEFINE_list("experiments", ["digits", "captions"], "What to run.")
RESULTS = flags.DEFINE_string("results", str(DOCS / "conditions.jsonl"), "Results.")
QUICK = flags.DEFINE_bool("quick", False, "A few steps, to try the script.")

SEEDS = (1, 2, 3)
SCALES = (1.0, 2.0)  # of guidance

# Digits.

TOKENS, TOKEN_SIZE = 3, 8  # tokens of a class, and numbers in a token
NUM_SAMPLES = 500


def base_config(steps: int) -> ConfigDict:
  """A DiT for images of 8x8 pixels, which trains in about a minute."""
  config = default_config()
  config.update_from_flattened_dict(
    {
      "num_steps": 60 if QUICK.value else steps,
      "batch_size": 64,
      "model.name": "DiT-S/2",
      "model.input_size": 8,
      "model.hidden_size": 96,
      "model.depth": 4,
      "model.num_heads": 4,
      "diffusion.schedule": "cosine",
      "diffusion.prediction": "v",
      "diffusion.loss_weight": "none",
      "diffusion.variance": "fixed_small",
      "optimizer.name": "adamw",
      "optimizer.learning_rate": 2e-3,
      "optimizer.schedule": "cosine",
      "optimizer.warmup_steps": 50,
      "ema_decays": (0.995,),
      "data.flip": False,
      "data.num_threads": 0,
      "sampling.num_steps": 50,
      "log_every": 200,
      "checkpoint_every": 100_000,
      "sample_every": 0,
    }
  )
  return config


def digits_source() -> MemorySource:
  """The digits, with their class as a one-hot vector and as tokens."""
  digits = DigitsSource()
  examples = [digits[i] for i in range(len(digits))]
  labels = np.array([example["label"] for example in examples])
  codes = np.random.default_rng(0).standard_normal((10, TOKENS, TOKEN_SIZE))
  arrays = {"vector": np.eye(10)[labels], "tokens": codes[labels]}
  images = np.stack([example["image"] for example in examples])
  return MemorySource(images, labels, 10, arrays=arrays)


DIGIT_ARMS: dict[str, dict[str, Any]] = {
  "label": {},
  "vector": {"model.condition": "vector", "condition.vector_size": 10},
  "tokens": {
    "model.condition": "tokens",
    "condition.tokens_length": TOKENS,
    "condition.tokens_size": TOKEN_SIZE,
  },
}


def run_digits(arm: str, seed: int) -> dict[str, Any]:
  """Trains an arm and scores guided samples."""
  source = digits_source()
  config = base_config(1000)
  settings = {"model.in_channels": 1, "model.num_classes": 10, "seed": seed}
  config.update_from_flattened_dict({**settings, **DIGIT_ARMS[arm]})
  pipeline = trained(config, source)
  examples = [source[i] for i in range(len(source))]
  real = np.stack([e["image"] for e in examples]).reshape(len(examples), -1) / 255.0
  labels = np.array([e["label"] for e in examples])
  first = [int(np.flatnonzero(labels == label)[0]) for label in range(10)]
  asked = np.arange(NUM_SAMPLES) % 10
  found = {}
  for scale in SCALES:
    options: dict[str, Any] = dict(cfg_scale=scale, seed=seed, batch_size=NUM_SAMPLES)
    if arm == "label":
      drawn = pipeline.draw(asked, **options)
    else:
      values = np.stack([examples[first[label]][arm] for label in asked])
      drawn = pipeline.draw(condition=values, **options)
    pixels = drawn.reshape(NUM_SAMPLES, -1) / 255.0
    found[f"accuracy_{scale:g}"] = conditional_accuracy(real, labels, pixels, asked)
  return found


def trained(config: ConfigDict, source: MemorySource) -> Pipeline:
  """Trains a network in a temporary folder, and returns its pipeline."""
  with tempfile.TemporaryDirectory() as folder:
    train(config, folder, source=source)
    return Pipeline.from_checkpoint(folder)


# Captions.

SHAPES = {
  "ring": ["####", "#..#", "#..#", "####"],
  "cross": ["#..#", ".##.", ".##.", "#..#"],
  "bar": ["....", "####", "####", "...."],
  "pillar": [".##.", ".##.", ".##.", ".##."],
}
COLOURS = {
  "red": (255, 64, 64),
  "green": (64, 255, 64),
  "blue": (64, 64, 255),
  "white": (255, 255, 255),
}
PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
WORDS = 8  # of a caption, without "a" and "and": tokens of the condition
FEATURES = 64  # numbers in a token
LONGEST = 4  # words in an n-gram
HELD_OUT = 10  # one of so many images is never trained, in either order of its things

# (shape, colour, place)
Thing = tuple[str, str, str]
Scene = tuple[Thing, Thing]


def scenes() -> list[Scene]:
  """All scenes: two things at different places."""
  things = list(itertools.product(SHAPES, COLOURS, PLACES))
  return [(a, b) for a in things for b in things if a[2] != b[2]]


def caption(scene: Scene) -> str:
  """Such as "a red ring top left and a blue bar bottom right"."""
  return " and ".join(f"a {colour} {shape} {place}" for shape, colour, place in scene)


def cell(shape: str, colour: str) -> np.ndarray:
  """The pixels (4, 4, 3) of a shape."""
  is_on = np.array([[c == "#" for c in row] for row in SHAPES[shape]])
  return np.where(is_on[..., None], COLOURS[colour], 0).astype(np.uint8)


def render(scene: Scene) -> np.ndarray:
  """The image (8, 8, 3) of a scene."""
  image = np.zeros((2, 2, 4, 4, 3), np.uint8)
  for shape, colour, place in scene:
    image[divmod(PLACES[place], 2)] = cell(shape, colour)
  return image.transpose(0, 2, 1, 3, 4).reshape(8, 8, 3)


def encode(text: str) -> np.ndarray:
  """Encodes a caption: a hashed bag of the n-grams that end at each word.

  Each n-gram has a code of +-1, seeded by its CRC-32, so that any text has an encoding.

  Args:
    text: caption of up to WORDS words, without "a" and "and".

  Returns:
    (WORDS, FEATURES) float32; zeros after the last word.
  """
  words = [word for word in text.split() if word not in ("a", "and")]
  tokens = np.zeros((WORDS, FEATURES), np.float32)
  for end in range(1, len(words[:WORDS]) + 1):
    grams = [" ".join(words[max(0, end - n) : end]) for n in range(1, LONGEST + 1)]
    codes = [code(gram) for gram in dict.fromkeys(grams)]
    tokens[end - 1] = np.sum(codes, axis=0) / len(codes) ** 0.5
  return tokens


def code(gram: str) -> np.ndarray:
  """The code (FEATURES,) of an n-gram."""
  rng = np.random.default_rng(zlib.crc32(gram.encode()))
  return rng.choice(np.array([-1.0, 1.0]), FEATURES)


def read(images: np.ndarray) -> list[list[tuple[str, str] | None]]:
  """Returns the nearest (shape, colour), or None, at each place of images."""
  names: list[tuple[str, str] | None] = [None, *itertools.product(SHAPES, COLOURS)]
  patterns = np.stack(
    [np.zeros((4, 4, 3)) if name is None else cell(*name) for name in names]
  )
  cells = images.reshape(-1, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 4, 1, 4, 4, 3)
  distances = np.square(cells.astype(float) - patterns).sum(axis=(3, 4, 5))
  return [[names[k] for k in row] for row in distances.argmin(axis=2)]


def attributes(scene: Scene, found: list[tuple[str, str] | None]) -> dict[str, float]:
  """Shares of the attributes of a scene that an image shows as asked."""
  held = [found[PLACES[place]] for _, _, place in scene]
  shapes = [
    cell is not None and cell[0] == s
    for cell, (s, _, _) in zip(held, scene, strict=True)
  ]
  colours = [
    cell is not None and cell[1] == c
    for cell, (_, c, _) in zip(held, scene, strict=True)
  ]
  count = sum(cell is not None for cell in found)
  return {
    "places": sum(cell is not None for cell in held) / 2,
    "shapes": sum(shapes) / 2,
    "colours": sum(colours) / 2,
    "images": float(all(shapes) and all(colours) and count == 2),
  }


def run_captions(arm: str, seed: int) -> dict[str, Any]:
  """Trains on captions, and scores images of trained and of new captions."""
  del arm
  # Two things in the other order are the same image.
  pairs = sorted({tuple(sorted(scene)) for scene in scenes()})
  order = np.random.default_rng(0).permutation(len(pairs))
  held_out = {pairs[i] for i in order[::HELD_OUT]}
  new = [scene for scene in scenes() if tuple(sorted(scene)) in held_out]
  old = [scene for scene in scenes() if tuple(sorted(scene)) not in held_out]
  texts = [caption(scene) for scene in old]
  source = MemorySource(
    np.stack([render(scene) for scene in old]),
    arrays={"text": np.stack([encode(text) for text in texts])},
  )
  config = base_config(3000)
  config.update_from_flattened_dict(
    {
      "seed": seed,
      "model.in_channels": 3,
      "model.num_classes": 1,
      "model.condition": "tokens",
      "condition.tokens": "text",
      "condition.tokens_length": WORDS,
      "condition.tokens_size": FEATURES,
    }
  )
  pipeline = trained(config, source)
  rng = np.random.default_rng(seed)
  found: dict[str, Any] = {}
  for kind, held in (("trained", old), ("new", new)):
    asked = [held[i] for i in rng.permutation(len(held))[:NUM_SAMPLES]]
    values = np.stack([encode(caption(scene)) for scene in asked])
    for scale in SCALES:
      options: dict[str, Any] = dict(cfg_scale=scale, cfg_channels=0, seed=seed)
      drawn = pipeline.draw(condition=values, batch_size=len(asked), **options)
      scored = [attributes(s, f) for s, f in zip(asked, read(drawn), strict=True)]
      for name in scored[0]:
        share = float(np.mean([row[name] for row in scored]))
        found[f"{kind}_{scale:g}_{name}"] = round(share, 4)
    if kind == "new" and seed == SEEDS[0] and not QUICK.value:
      write_picture(drawn[:12], [caption(scene) for scene in asked[:12]])
  return found


def write_picture(images: np.ndarray, texts: list[str]) -> None:
  """Writes images with their captions to docs/conditions/captions.png."""
  side, width, columns = 64, 320, 2
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * width, rows * (side + 8) + 8), "white")
  drawer, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
  for i, (image, text) in enumerate(zip(images, texts, strict=True)):
    x, y = i % columns * width + 8, i // columns * (side + 8) + 8
    picture = to_pil(image).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(picture, (x, y))
    lines = text.replace(" and ", "\nand ")
    drawer.text((x + side + 8, y + 16), lines, fill="black", font=font)
  folder = DOCS / "conditions"
  folder.mkdir(exist_ok=True)
  sheet.save(folder / "captions.png")


# Both.

RUNS: dict[str, tuple[tuple[str, ...], Callable[[str, int], dict[str, Any]]]] = {
  "digits": (tuple(DIGIT_ARMS), run_digits),
  "captions": (("tokens",), run_captions),
}


def report(rows: list[dict[str, Any]]) -> None:
  """Writes the tables of docs/conditions.md."""
  for experiment in RUNS:
    of_it = [row for row in rows if row["experiment"] == experiment]
    if not of_it:
      continue
    names = [key for key in of_it[0] if key not in ("experiment", "arm", "seed")]
    lines = [f"`python -m benchmarks.conditions`, {machine()}:", ""]
    if experiment == "digits":
      heads = [f"guidance {name.split('_')[1]}" for name in names]
      lines += [
        f"| condition | {' | '.join(heads)} |",
        "| --- " * (len(names) + 1) + "|",
      ]
      for arm in DIGIT_ARMS:
        values = [[r[name] for r in of_it if r["arm"] == arm] for name in names]
        shown = [", ".join(f"{v:.3f}" for v in cells) for cells in values]
        means = [
          f"**{np.mean(cells):.3f}** ({s})"
          for cells, s in zip(values, shown, strict=True)
        ]
        lines.append(f"| {arm} | {' | '.join(means)} |")
    else:
      scores = ("places", "shapes", "colours", "images")
      lines += [f"| captions | guidance | {' | '.join(scores)} |", "| --- " * 6 + "|"]
      for kind, scale in itertools.product(("trained", "new"), SCALES):
        cells = [
          ", ".join(f"{r[f'{kind}_{scale:g}_{score}']:.3f}" for r in of_it)
          for score in scores
        ]
        lines.append(f"| {kind} | {scale:g} | {' | '.join(cells)} |")
    write_table("conditions.md", f"{experiment} table", ["", *lines, ""])


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity("warning")
  file = Path(RESULTS.value)
  rows = []
  if file.exists():
    rows = [json.loads(line) for line in file.read_text().splitlines()]
  for name in EXPERIMENTS.value:
    arms, function = RUNS[name]
    for seed, arm in itertools.product(SEEDS[: 1 if QUICK.value else None], arms):
      key = {"experiment": name, "arm": arm, "seed": seed}
      if any(key.items() <= row.items() for row in rows):
        continue
      row = {**key, **function(arm, seed)}
      print(row, flush=True)
      rows.append(row)
      with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")
  if not QUICK.value:
    report(rows)


if __name__ == "__main__":
  app.run(main)
