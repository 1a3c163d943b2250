"""Generated images whose parts obey exact relations.

An image is a grid of cells, and each cell shows one of K orthogonal glyphs. All cells
are uniform, but for given relations: equal pairs, mirrored rows, sums modulo K, and
rows that show one glyph a given number of times. So the parts of an image, and each
kind of relation between them, can be checked exactly and separately;
`evaluation.relation_scores` does so. docs/evidence.md uses this data.

Letters in shapes: N images; G cells along a side of the grid; K glyphs.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Num, UInt8

from mdt_jax.data.examples import Example, SourceArguments
from mdt_jax.errors import SettingError, named_in_errors

# Kinds of relations; each is a setting of `Relations`, the number of such relations.
KINDS = ("near_pairs", "far_pairs", "mirrored_rows", "sums", "counts")
ENDLESS = 10**9  # length of a source without a number of images
GRIDS = (4, 16)  # smallest and largest G
GLYPH_SIZES = (2, 4, 8, 16)
COUNTED = 0  # the glyph whose number is fixed in a counted row
CHANNELS = 1
OF_SOURCE = ("num_images", "labels", "seed")  # settings of `RelationsSource`


@dataclasses.dataclass(frozen=True)
class Relations:
  """The relations of a data set: which cells they tie together, and how.

  The relations tie disjoint cells, which are the same in every image:

    mirrored_rows  the uppermost rows: cell (r, c) equals cell (r, G - 1 - c).
    counts         the lowest rows: `counted` cells of the row, at random places, show
                   glyph 0, and the others do not.
    near_pairs     cells side by side in the rows between: equal.
    far_pairs      pairs of the cells that remain, at least floor(G / 2) rows or columns
                   apart: equal.
    sums           triples (A, B, C) of the cells that remain: C = (A + B) mod K.

  The cells that no relation ties are free.

  Attributes:
    grid: G, in [4, 16].
    glyph_size: height and width of a glyph in pixels: 2, 4, 8 or 16.
    glyphs: K, in [2, glyph_size^2].
    near_pairs, far_pairs, mirrored_rows, sums, counts: number of relations of each
      kind, at least 0.
    counted: number of cells of a counted row that show glyph 0, in [1, G - 1]. None:
      floor(G / 2).
    shift: pixels by which cells are moved to the right and down, around the edges, in
      [0, glyph_size). With patches of glyph_size, shift = 0 makes each token one cell.

  Raises:
    SettingError: a value is out of range, the relations do not fit the grid, or leave
      no free cell.
  """

  grid: int = 4
  glyph_size: int = 4
  glyphs: int = 8
  near_pairs: int = 1
  far_pairs: int = 2
  mirrored_rows: int = 0
  sums: int = 1
  counts: int = 1
  counted: int | None = None
  shift: int = 0

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is None and field.name == "counted":
        continue
      _whole(field.name, value)
    if self.glyph_size not in GLYPH_SIZES:
      accepted = "must be 2, 4, 8 or 16: glyphs are rows of a Hadamard matrix"
      raise SettingError("glyph_size", self.glyph_size, accepted)
    counted = (1, self.grid - 1)
    limits = {
      "grid": GRIDS,
      "glyphs": (2, self.glyph_size**2),
      **dict.fromkeys(KINDS, (0, self.grid**2)),
      **dict.fromkeys(("mirrored_rows", "counts"), (0, self.grid)),
      "counted": counted,
      "shift": (0, self.glyph_size - 1),
    }
    for name, (least, most) in limits.items():
      value = getattr(self, name)
      if value is not None and not least <= value <= most:
        raise SettingError(name, value, f"must lie in [{least}, {most}]")
    _ = self.cells  # raises SettingError if the relations do not fit

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kinds of which there is at least one relation."""
    return tuple(kind for kind in KINDS if getattr(self, kind))

  @property
  def num_counted(self) -> int:
    """Number of cells of a counted row that show glyph 0."""
    return self.grid // 2 if self.counted is None else self.counted

  @property
  def side(self) -> int:
    """Height and width of an image in pixels."""
    return self.grid * self.glyph_size

  @functools.cached_property
  def cells(self) -> dict[str, Int[np.ndarray, "n members"]]:
    """The tied cells of each kind, one relation a row; and "free", (n, 1).

    A cell is a number in [0, G^2), row by row. Mirrored rows are lists of pairs.
    """
    size = self.grid
    rows = np.arange(size**2).reshape(size, size)
    if self.mirrored_rows + self.counts > size:
      accepted = f"must be at most {size - self.mirrored_rows}, the rows not mirrored"
      raise SettingError("counts", self.counts, accepted)
    half = size // 2
    mirrored = rows[: self.mirrored_rows]
    pairs = np.stack([mirrored[:, :half], mirrored[:, : -half - 1 : -1]], -1)
    between = rows[self.mirrored_rows : size - self.counts]
    found = {
      "mirrored_rows": pairs.reshape(-1, 2),
      "counts": rows[size - self.counts :],
      "near_pairs": _take(
        "near_pairs", self.near_pairs, between[:, : 2 * half].reshape(-1, 2)
      ),
    }
    used = {int(cell) for tied in found.values() for cell in tied.flat}
    middle = [] if size % 2 == 0 else mirrored[:, half].tolist()
    left = [cell for cell in [*middle, *between.flat] if cell not in used]
    far = [self._far_pair(left) for _ in range(self.far_pairs)]
    sums = [self._triple(left) for _ in range(self.sums)]
    if not left:
      kind = self.kinds[-1]
      accepted = "leaves no free cell; remove a relation or enlarge grid"
      raise SettingError(kind, getattr(self, kind), accepted)
    return {
      **found,
      "far_pairs": np.asarray(far, int).reshape(-1, 2),
      "sums": np.asarray(sums, int).reshape(-1, 3),
      "free": np.asarray(left).reshape(-1, 1),
    }

  def _far_pair(self, left: list[int]) -> tuple[int, int]:
    """Takes the first cell of `left`, and the nearest one that is far from it."""
    if left:
      first = left.pop(0)
      # The nearest one, so that many pairs fit.
      far = [c for c in left if self._distance(first, c) >= self.grid // 2]
      if far:
        second = min(far, key=lambda cell: self._distance(first, cell))
        left.remove(second)
        return first, second
    accepted = f"does not fit: no two cells remain that are {self.grid // 2} apart"
    raise SettingError("far_pairs", self.far_pairs, accepted)

  def _distance(self, first: int, second: int) -> int:
    """Distance of two cells: the larger one of rows and columns between them."""
    (row, column), (other_row, other_column) = (
      divmod(cell, self.grid) for cell in (first, second)
    )
    return max(abs(row - other_row), abs(column - other_column))

  def _triple(self, left: list[int]) -> tuple[int, int, int]:
    """Takes the first, the middle and the last cell of `left`."""
    if len(left) < 3:
      accepted = f"does not fit: {len(left)} cells remain for a sum, which needs 3"
      raise SettingError("sums", self.sums, accepted)
    last, middle, first = left.pop(), left.pop(len(left) // 2), left.pop(0)
    return first, middle, last

  @functools.cached_property
  def patterns(self) -> Int[np.ndarray, "K s s"]:
    """The glyphs, -1 and 1: the first rows of a Hadamard matrix."""
    size = self.glyph_size
    factors = [np.array([[1, 1], [1, -1]])] * round(np.log2(size**2))
    return functools.reduce(np.kron, factors)[: self.glyphs].reshape(-1, size, size)

  def draw(
    self,
    rng: np.random.Generator,
    count: int,
    kinds: tuple[str, ...] | None = None,
  ) -> Int[np.ndarray, "N G G"]:
    """Draws the glyphs of images.

    Args:
      rng: source of random numbers.
      count: N, number of images.
      kinds: kinds of which all relations hold; None: all. The cells of others are
        uniform.

    Returns:
      (N, G, G) numbers of glyphs in [0, K).
    """
    drawn = rng.integers(self.glyphs, size=(count, self.grid**2))
    for kind in self.kinds if kinds is None else kinds:
      tied = self.cells[kind]
      if kind == "sums":
        drawn[:, tied[:, 2]] = drawn[:, tied[:, :2]].sum(axis=2) % self.glyphs
      elif kind == "counts":
        shape = (count, *tied.shape)
        others = rng.integers(1, self.glyphs, size=shape)
        places = rng.permuted(np.broadcast_to(np.arange(self.grid), shape), axis=2)
        drawn[:, tied] = np.where(places < self.num_counted, COUNTED, others)
      else:
        drawn[:, tied[:, 1]] = drawn[:, tied[:, 0]]
    return drawn.reshape(count, self.grid, self.grid)

  def render(self, cells: Int[np.ndarray, "*N G G"]) -> UInt8[np.ndarray, "*N H W 1"]:
    """Returns the images of glyphs: -1 is black (0), 1 is white (255)."""
    pixels = (self.patterns > 0)[cells]  # (..., G, G, s, s)
    pixels = np.moveaxis(pixels, -2, -3)  # (..., G, s, G, s)
    images = pixels.reshape(*cells.shape[:-2], self.side, self.side)
    images = np.roll(images, (self.shift, self.shift), (-2, -1))
    return np.where(images, 255, 0).astype(np.uint8)[..., None]

  def read(
    self, images: Num[np.ndarray, "N H W 1"]
  ) -> tuple[Int[np.ndarray, "N G*G"], Num[np.ndarray, "N G*G"]]:
    """Returns the nearest glyph of each cell, and its root mean squared distance.

    Args:
      images: uint8 or floats in [0, 255].

    Returns:
      (glyphs, distances), each (N, G^2). The glyph is -1 if no single glyph is nearest,
      as in a grey cell or with NaN. Distances are in units in which pixels lie in
      [-1, 1]: 0 for a perfect glyph, about 1.4 between two glyphs.
    """
    size, count = self.glyph_size, len(images)
    pixels = np.asarray(images, np.float32)[..., 0] / 127.5 - 1
    pixels = np.roll(pixels, (-self.shift, -self.shift), (1, 2))
    cells = pixels.reshape(count, self.grid, size, self.grid, size)
    cells = np.swapaxes(cells, 2, 3).reshape(count, self.grid**2, size**2)
    products = cells @ self.patterns.reshape(self.glyphs, -1).T.astype(np.float32)
    best = products.max(-1)
    is_unique = (products == best[..., None]).sum(-1) == 1
    glyphs = np.where(is_unique, products.argmax(axis=-1), -1)
    # |x - g|^2 = |x|^2 - 2 x g + |g|^2, and |g|^2 is the number of pixels.
    squares = (cells**2).mean(-1) - 2 * best / size**2 + 1
    return glyphs, np.sqrt(np.maximum(squares, 0))

  def holds(
    self, kind: str, glyphs: Int[np.ndarray, "N G*G"]
  ) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Whether each relation of a kind holds: (N, n); n pairs for mirrored rows.

    A relation of a cell without a glyph (-1) does not hold.
    """
    tied = glyphs[:, self.cells[kind]]  # (N, n, members)
    if kind == "sums":
      holds = (tied[..., 0] + tied[..., 1]) % self.glyphs == tied[..., 2]
    elif kind == "counts":
      holds = (tied == COUNTED).sum(axis=-1) == self.num_counted
    else:
      holds = tied[..., 0] == tied[..., 1]
    return holds & (tied >= 0).all(axis=-1)


def _whole(name: str, value: object) -> int:
  """Returns a whole number; raises SettingError for anything else."""
  if not isinstance(value, numbers.Integral) or isinstance(value, bool):
    raise SettingError(name, value, "must be a whole number")
  return int(value)


def _take(
  kind: str, count: int, candidates: Int[np.ndarray, "n members"]
) -> Int[np.ndarray, "count members"]:
  """Returns the first candidates; raises SettingError if there are too few."""
  if count > len(candidates):
    raise SettingError(
      kind, count, f"does not fit: there is room for {len(candidates)}"
    )
  return candidates[:count]


class RelationsSource:
  """Generated images of `Relations`, and their labels.

  The entry "image" of an example is uint8 (H, W, 1). Example i depends only on the
  settings, the seed and i, so no file is needed.

  Args:
    relations: the relations.
    num_images: number of images. None: 10^9, so that no run sees an image twice.
    labels: whether an example has a label that says which kinds of relations hold in
      it: the sum of 2^i over the kinds in use, in the order of KINDS. Without labels,
      all relations hold in each image, and the only label is 0.
    seed: seed of the images, at least 0.

  Raises:
    SettingError: a value is out of range.
  """

  channels: ClassVar[int] = CHANNELS

  def __init__(
    self,
    relations: Relations,
    num_images: int | None = None,
    labels: bool = False,
    seed: int = 0,
  ):
    for name, value, least, most in (
      ("num_images", num_images, 1, ENDLESS - 1),
      ("seed", seed, 0, 2**32 - 1),
    ):
      if value is None and name == "num_images":
        continue
      if not least <= _whole(name, value) <= most:
        raise SettingError(name, value, f"must lie in [{least:,}, {most:,}]")
    if not isinstance(labels, bool):
      raise SettingError("labels", labels, "must be true or false")
    self.relations, self._labels, self._seed = relations, labels, seed
    self._length = num_images or ENDLESS
    side = relations.side
    self.image_shape: tuple[int, int, int] = (side, side, CHANNELS)
    self.class_names = ["all"]
    if labels:
      self.class_names = [
        "+".join(self.kinds_of(label)) or "none"
        for label in range(2 ** len(relations.kinds))
      ]
    self.num_classes = len(self.class_names)

  @property
  def is_endless(self) -> bool:
    """Whether no number of images is set."""
    return self._length == ENDLESS

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    cells, label = self._draw(index)
    return {"image": self.relations.render(cells), "label": np.int32(label)}

  def kinds_of(self, label: int) -> tuple[str, ...]:
    """Returns the kinds of relations that hold in images of a label."""
    kinds = self.relations.kinds
    if not self._labels:
      return kinds
    return tuple(kind for bit, kind in enumerate(kinds) if label >> bit & 1)

  @functools.cached_property
  def all_cells(self) -> Int[np.ndarray, "N G*G"]:
    """The glyphs of all images; only for a source of a number of images."""
    assert not self.is_endless
    drawn = [self._draw(index)[0].reshape(-1) for index in range(len(self))]
    return np.stack(drawn).astype(np.int16)

  def _draw(self, index: int) -> tuple[Int[np.ndarray, "G G"], int]:
    """Returns glyphs and label of an example."""
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} must lie in [0, {len(self)})")
    key = np.array([self._seed, index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    label = int(rng.integers(self.num_classes))
    return self.relations.draw(rng, 1, self.kinds_of(label))[0], label


def open_relations(arguments: SourceArguments) -> RelationsSource:
  """Opens the images of `config.data.arguments`.

  Raises:
    SettingError: an argument is unknown or out of range, or the network has another
      input than the images.
  """
  given = dict(arguments.arguments)
  own = {name: given.pop(name) for name in OF_SOURCE if name in given}
  with named_in_errors("config.data.arguments"):
    for name in given:
      if name not in Relations.__dataclass_fields__:
        known = ", ".join([*Relations.__dataclass_fields__, *OF_SOURCE])
        accepted = f"is no setting of the source relations; accepted are {known}"
        raise SettingError(name, given[name], accepted)
    source = RelationsSource(Relations(**given), **own)
  side = source.relations.side
  if arguments.image_size != side:
    raise SettingError(
      "config.model.input_size",
      arguments.image_size,
      f"must be {side} = grid * glyph_size for the source relations",
    )
  if arguments.channels != CHANNELS:
    raise SettingError(
      "config.model.in_channels",
      arguments.channels,
      f"must be {CHANNELS} for the source relations",
    )
  return source
