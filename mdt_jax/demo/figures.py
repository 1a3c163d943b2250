"""The pictures of the page: grids, strips, heat maps and the curve of guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from mdt_jax.sampling.pictures import make_grid, to_pil

GAP = 4  # pixels between pictures
HEAT = np.array(  # colours of weights from 0 to the largest one
  [[13, 8, 35], [86, 20, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]], float
)
UNSEEN = (203, 213, 225)  # colour of a token that a block does not see
ACCENT = (37, 99, 235)  # colour of the chosen token
REMOVED = (226, 232, 240)  # colour of a token that the mask removes

Pixels = UInt8[np.ndarray, "H W C"]


def as_rgb(pixels: Pixels) -> UInt8[np.ndarray, "H W 3"]:
  """Repeats the grey channel of a grey picture."""
  return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def enlarge(pixels: Pixels, side: int) -> UInt8[np.ndarray, "h w C"]:
  """Enlarges a picture by the smallest whole factor that gives `side` pixels."""
  factor = max(1, math.ceil(side / max(pixels.shape[:2])))
  return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def columns_of(count: int) -> int:
  """Number of pictures in a row of a grid of `count` pictures."""
  return math.ceil(math.sqrt(count))


def tile(rows: Sequence[Sequence[Pixels]], side: int) -> Image.Image:
  """Draws rows of pictures of one size, each enlarged to about `side` pixels."""
  tiles = [[enlarge(as_rgb(pixels), side) for pixels in row] for row in rows]
  height, width = tiles[0][0].shape[:2]
  columns = max(map(len, tiles))
  size = (columns * (width + GAP) - GAP, len(tiles) * (height + GAP) - GAP)
  canvas = Image.new("RGB", size, "white")
  for i, row in enumerate(tiles):
    for j, pixels in enumerate(row):
      canvas.paste(to_pil(pixels), (j * (width + GAP), i * (height + GAP)))
  return canvas


def grid(images: UInt8[np.ndarray, "N H W C"], side: int = 512) -> Image.Image:
  """Draws a square grid of pictures, about `side` pixels wide."""
  columns = columns_of(len(images))
  rows = [images[i : i + columns] for i in range(0, len(images), columns)]
  return tile([list(row) for row in rows], side // columns)


def picture_at(place: Sequence[float], size: tuple[int, int], count: int) -> int:
  """Returns the number of the picture of a grid at a place.

  Args:
    place: (x, y) in pixels of the grid.
    size: (width, height) of the grid.
    count: number of pictures.
  """
  columns = columns_of(count)
  rows = math.ceil(count / columns)
  column = min(int(place[0] * columns / size[0]), columns - 1)
  row = min(int(place[1] * rows / size[1]), rows - 1)
  return min(max(row, 0) * columns + max(column, 0), count - 1)


def strip(stages: Sequence[UInt8[np.ndarray, "N H W C"]], rows: int = 4) -> Image.Image:
  """Draws the stages of denoising from left to right, one row for each picture."""
  count = min(rows, len(stages[0]))
  return tile([[stage[i] for stage in stages] for i in range(count)], 96)


def show_kept(
  pixels: Pixels, removed: UInt8[np.ndarray, "h w"] | np.ndarray, side: int = 320
) -> Image.Image:
  """Draws a picture with its grid of tokens; removed tokens are blank.

  Args:
    pixels: the picture.
    removed: (h, w) bool, True for a removed token.
    side: least height of the result.
  """
  shown = enlarge(as_rgb(pixels), side).copy()
  height, width = (shown.shape[i] // removed.shape[i] for i in (0, 1))
  blank = removed.repeat(height, axis=0).repeat(width, axis=1)
  shown[blank] = REMOVED
  image = to_pil(shown)
  draw = ImageDraw.Draw(image)
  for i in range(1, removed.shape[0]):
    draw.line([(0, i * height), (shown.shape[1], i * height)], fill=(148, 163, 184))
  for j in range(1, removed.shape[1]):
    draw.line([(j * width, 0), (j * width, shown.shape[0])], fill=(148, 163, 184))
  return image


def outline(image: Image.Image, token: int, shape: tuple[int, int]) -> Image.Image:
  """Outlines a token in a picture; `shape` is (rows, columns) of the tokens."""
  image = image.convert("RGB")
  height, width = image.height / shape[0], image.width / shape[1]
  top, left = token // shape[1] * height, token % shape[1] * width
  box = [left, top, left + width - 1, top + height - 1]
  ImageDraw.Draw(image).rectangle(box, outline=ACCENT, width=4)
  return image


def heat(
  weights: Float[np.ndarray, "K"],
  ids: Int[np.ndarray, "K"],
  shape: tuple[int, int],
) -> UInt8[np.ndarray, "h w 3"]:
  """Colours tokens by their weights; tokens without a weight are grey.

  Args:
    weights: (K,) weights of the tokens `ids`.
    ids: (K,) numbers of the tokens.
    shape: (rows, columns) of the tokens.
  """
  level = weights / max(float(weights.max()), 1e-12) * (len(HEAT) - 1)
  places = np.arange(len(HEAT))
  colours = [np.interp(level, places, HEAT[:, channel]) for channel in range(3)]
  out = np.empty((shape[0] * shape[1], 3), np.uint8)
  out[:] = UNSEEN
  out[ids] = np.stack(colours, axis=-1).round().astype(np.uint8)
  return out.reshape(*shape, 3)


def heat_maps(
  maps: Sequence[UInt8[np.ndarray, "h w 3"]],
  captions: Sequence[str],
  token: int,
  columns: int = 7,
) -> Image.Image:
  """Draws a heat map for each block, with the chosen token outlined."""
  shape = (maps[0].shape[0], maps[0].shape[1])
  large = [outline(to_pil(enlarge(m, 96)), token, shape) for m in maps]
  images = np.stack([np.asarray(image) for image in large])
  return make_grid(images, list(captions), columns=min(columns, len(maps)))


def curve(scales: Float[np.ndarray, "S"]) -> str:
  """Draws the guidance scale over sampling as SVG, from noise (left) to picture."""
  width, height, left, bottom = 320, 90, 30, 18
  high = max(float(scales.max()), 1.0) * 1.05
  low = min(float(scales.min()), 1.0, high - 0.05)

  def place(i: int, scale: float) -> str:
    x = left + i / max(len(scales) - 1, 1) * (width - left - 6)
    y = 6 + (high - scale) / (high - low) * (height - bottom - 6)
    return f"{x:.1f},{y:.1f}"

  points = " ".join(place(i, float(s)) for i, s in enumerate(scales))
  y_one = place(0, 1.0).partition(",")[2]
  y_end = place(0, float(scales[-1])).partition(",")[2]
  return (
    f'<svg viewBox="0 0 {width} {height}" role="img" class="curve" '
    f'aria-label="guidance scale from noise to picture">'
    f'<line x1="{left}" x2="{width - 6}" y1="{y_one}" y2="{y_one}" class="axis"/>'
    f'<polyline points="{points}" fill="none" class="line"/>'
    f'<text x="{left - 4}" y="{y_one}" class="tick" text-anchor="end">1</text>'
    + (
      f'<text x="{left - 4}" y="{y_end}" class="tick" text-anchor="end" '
      f'dy="4">{scales[-1]:.3g}</text>'
      if abs(float(y_end) - float(y_one)) > 10
      else ""
    )
    + f'<text x="{left}" y="{height - 3}" class="tick">noise</text>'
    f'<text x="{width - 6}" y="{height - 3}" class="tick" text-anchor="end">'
    "picture</text></svg>"
  )
