"""Conversion of arrays to uint8 pixels, PIL images, labelled grids and .npz files."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from mdt_jax.buckets import AnyPath

MIN_TILE = 64  # least height of an image in a grid, in pixels
CAPTION_HEIGHT = 14  # pixels
MARGIN = 2  # pixels


def rounds_to_nearest(network: Any) -> bool:
  """Whether the released code of a network rounds pixels to the nearest level."""
  return getattr(network, "variant", None) in ("DiT", "SiT")


def to_uint8(images: Any, network: Any = None) -> Any:
  """Maps [-1, 1] to 0 … 255, with the rounding of the released scripts; clips.

  MDT truncates 127.5 (x + 1) (scripts/image_sample.py); DiT and SiT truncate 127.5 x +
  128 (sample_ddp.py), which rounds to nearest. Half of the pixels differ by one.

  Args:
    images: float array of NumPy or JAX, of any shape.
    network: the network that drew the images; None rounds as MDT.

  Returns:
    uint8 array of the same shape and library.
  """
  if rounds_to_nearest(network):
    # Clipped before the sum, so that XLA cannot fuse product and sum into one rounding.
    pixels = (127.5 * images).clip(-128, 127) + 128
  else:
    pixels = ((images + 1) * 127.5).clip(0, 255)
  return pixels.astype("uint8")


def to_pil(pixels: UInt8[np.ndarray, "H W C"]) -> Image.Image:
  """Converts pixels (H, W, 1 or 3) to a PIL image."""
  return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def latent_preview(
  latents: Float[np.ndarray, "N H W C"],
) -> UInt8[np.ndarray, "N H W rgb"]:
  """A preview of latents as pixels; the colours have no meaning.

  The first three channels (or the first one, if there are fewer) become RGB (or grey).
  In each channel, mean - 3 std maps to 0 and mean + 3 std maps to 255.
  """
  channels = latents[..., :3] if latents.shape[-1] >= 3 else latents[..., :1]
  std = channels.std(axis=(0, 1, 2), keepdims=True) + 1e-6
  return to_uint8((channels - channels.mean(axis=(0, 1, 2))) / (3 * std))


def make_grid(
  images: UInt8[np.ndarray, "N H W C"], captions: list[str], columns: int = 0
) -> Image.Image:
  """Draws a grid of images with a caption above each image.

  Images of less than `MIN_TILE` pixels in height are enlarged by an integer factor.

  Args:
    images: (N, H, W, 1 or 3) uint8.
    captions: N texts.
    columns: number of images in a row; 0 for a square grid.
  """
  count, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  factor = max(1, math.ceil(MIN_TILE / height))
  tile_h, tile_w = height * factor + CAPTION_HEIGHT, width * factor + MARGIN
  grid = Image.new("RGB", (columns * tile_w + MARGIN, rows * tile_h + MARGIN), "white")
  drawer, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    x, y = MARGIN + i % columns * tile_w, i // columns * tile_h
    drawer.text((x, y), _shortened(caption, tile_w, font), fill="black", font=font)
    size = (width * factor, height * factor)
    grid.paste(
      to_pil(image).resize(size, Image.Resampling.NEAREST), (x, y + CAPTION_HEIGHT)
    )
  return grid


def _shortened(caption: str, width: int, font: Any) -> str:
  """Cuts a caption that is wider than `width` pixels."""
  while caption and font.getlength(caption) > width:
    caption = caption[:-2] + "…" if len(caption) > 2 else ""
  return caption


def write_npz(
  file: BinaryIO | Path,
  images: Iterable[Shaped[np.ndarray, "n H W C"]],
  labels: Int[np.ndarray, "N"] | None,
  count: int | None = None,
) -> None:
  """Writes images (arr_0) and labels (arr_1) in the format of ADM's evaluator.

  Only one part of the images is in memory at a time. Equal arrays give equal bytes.

  Args:
    file: path or open file.
    images: parts (n, H, W, C) of the images, all of one dtype.
    labels: (N,) labels; None for a file without arr_1.
    count: N, number of images in all parts; None for the number of labels.

  Raises:
    ValueError: the parts have different shapes or dtypes, or there are more or fewer
      images than N.
  """
  images = iter(images)
  first = next(images)
  if count is None:
    count = 0 if labels is None else len(labels)
  left = count
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    with _member(archive, "arr_0.npy") as member:
      header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (count, *first.shape[1:]),
      }
      np.lib.format.write_array_header_1_0(member, header)
      part: np.ndarray | None = first
      while part is not None:
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
          raise ValueError(f"{part.dtype} {part.shape} after {first.dtype} images")
        left -= len(part)
        member.write(np.ascontiguousarray(part).data)
        part = next(images, None)
    if left:
      raise ValueError(f"{count - left} images, expected {count}")
    if labels is None:
      return
    with _member(archive, "arr_1.npy") as member:
      np.lib.format.write_array(member, np.asarray(labels), allow_pickle=False)


def save_png(image: Image.Image, path: AnyPath) -> None:
  """Writes an image to a .png file."""
  if isinstance(path, Path):
    image.save(path)
    return
  content = io.BytesIO()
  image.save(content, "PNG")
  path.write_bytes(content.getvalue())


def read_npz(
  file: IO[bytes] | Path, count: int
) -> Iterator[Shaped[np.ndarray, "n H W C"]]:
  """Yields the images of a file of `write_npz`, in parts of at most `count` images."""
  with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as member:
    np.lib.format.read_magic(member)
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    image_bytes = dtype.itemsize * math.prod(shape[1:])
    while part := member.read(count * image_bytes):
      yield np.frombuffer(part, dtype).reshape(-1, *shape[1:])


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
  """Opens a file in an archive for writing."""
  # A fixed date, so that equal arrays give equal bytes.
  info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
  return archive.open(info, "w", force_zip64=True)
