"""Scores of images of the source relations; exact, without a network.

valid_cells      share of cells that show a glyph: their root mean squared distance to
                 the nearest glyph is below 0.5, in units in which pixels lie in
                 [-1, 1].
near_pairs, far_pairs, mirrored_rows, sums, counts
                 share of the relations of a kind that hold, over the images whose
                 label asks for the kind. Each cell counts as its nearest glyph, valid
                 or not, so that a network that has learnt glyphs alone scores at
                 `chance`. Read them beside valid_cells and free_entropy: images of
                 one glyph alone score 1.
free_entropy     entropy of the glyphs of a free cell over the images, divided by
                 log K, on average over the free cells: 1 if uniform, 0 if all images
                 have the same glyph. With N images, the entropy of uniform cells is
                 about (K - 1) / (2 N) below log K.
nearest_cells    share of cells that an image shares with the most similar image of
                 the data (held out or not), on average over the images: 1 if all
                 images are copies. Only for data with a number of images.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int, Num

from mdt_jax.data.relations import KINDS, Relations, RelationsSource
from mdt_jax.errors import SettingError

VALID = 0.5  # largest distance of a valid cell to its glyph
NAMES = ("valid_cells", *KINDS, "free_entropy", "nearest_cells")
MOST_IMAGES = 100_000  # of the data, for nearest_cells
_CELLS_A_BLOCK = 2**24  # comparisons of cells at once: 16 MB


def relation_score(
  name: str,
  source: RelationsSource,
  images: Num[np.ndarray, "N H W 1"],
  labels: Int[np.ndarray, " N"] | None = None,
) -> float:
  """Computes a score of generated images.

  Args:
    name: one of `NAMES`.
    source: data that the images imitate.
    images: in [0, 255], uint8 or floats.
    labels: labels of the images; None only for data without labels.

  Raises:
    SettingError: setting "metrics": the score does not exist for this data, see
      `check_score`, or no label asks for the kind of relation. Setting "images": the
      images have another shape.
  """
  check_score(name, source, labels)
  if not len(images):
    raise SettingError("images", 0, f"{name} needs at least 1 image")
  relations = source.relations
  if images.shape[1:] != source.image_shape:
    accepted = f"must have the shape {source.image_shape}"
    raise SettingError("images", images.shape[1:], accepted)
  glyphs, distances = relations.read(images)
  if name == "valid_cells":
    return float((distances < VALID).mean())
  if name == "free_entropy":
    return _entropy(glyphs[:, relations.cells["free"][:, 0]], relations.glyphs)
  if name == "nearest_cells":
    return _nearest(glyphs, source.all_cells)
  if source.num_classes > 1:
    if labels is None:
      raise SettingError("metrics", name, "needs labels of the images (arr_1)")
    glyphs = glyphs[_asked(name, source, labels)]
  return float(relations.holds(name, glyphs).mean())


def check_score(
  name: str, source: RelationsSource, labels: Int[np.ndarray, " N"] | None = None
) -> None:
  """Raises SettingError if a score does not exist for some data, or for some labels.

  Args:
    name: one of `NAMES`.
    source: the data.
    labels: labels of the images to score, if they are known.
  """
  if name in KINDS and not getattr(source.relations, name):
    accepted = f"needs config.data.arguments.{name} of at least 1"
    raise SettingError("metrics", name, accepted)
  if name == "nearest_cells" and source.is_endless:
    accepted = "needs config.data.arguments.num_images: the data is endless"
    raise SettingError("metrics", name, accepted)
  if name == "nearest_cells" and len(source) > MOST_IMAGES:
    accepted = f"needs data of at most {MOST_IMAGES:,} images"
    raise SettingError("metrics", name, accepted)
  if labels is None or source.num_classes == 1:
    return
  if len(labels) and not 0 <= labels.min() <= labels.max() < source.num_classes:
    accepted = f"must have labels in [0, {source.num_classes})"
    raise SettingError("images", int(labels.max()), accepted)
  if name in KINDS and not _asked(name, source, labels).any():
    accepted = f"{name} needs an image whose label asks for it"
    raise SettingError("num_images", len(labels), accepted)


def _asked(
  name: str, source: RelationsSource, labels: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
  """Whether the label of each image asks for a kind of relations."""
  return np.array([name in source.kinds_of(int(label)) for label in labels], bool)


def chance(name: str, relations: Relations) -> float:
  """Returns the score of a kind of relation in images of uniform glyphs."""
  k, size, count = relations.glyphs, relations.grid, relations.num_counted
  if name == "counts":
    return math.comb(size, count) * (k - 1) ** (size - count) / k**size
  return 1 / k


def _entropy(glyphs: Int[np.ndarray, "N cells"], num_glyphs: int) -> float:
  """Entropy of the glyphs of each cell over the images, over log K; the mean."""
  found = []
  for column in glyphs.T:
    # Entry 0 counts cells without a glyph.
    shares = np.bincount(column + 1, minlength=num_glyphs + 1) / len(column)
    shares = shares[shares > 0]
    found.append(-(shares * np.log(shares)).sum() / math.log(num_glyphs))
  return float(np.mean(found))


def _nearest(
  glyphs: Int[np.ndarray, "N cells"], known: Int[np.ndarray, "M cells"]
) -> float:
  """Largest share of equal cells with one known image, on average over the images."""
  size = max(1, _CELLS_A_BLOCK // known.size)
  blocks = [glyphs[start : start + size] for start in range(0, len(glyphs), size)]
  best = [(block[:, None] == known).mean(-1).max(1) for block in blocks]
  return float(np.concatenate(best).mean())
