"""Arrays to pictures: uint8, labelled grids, .npz files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 64  # pixels; smaller images are enlarged by a whole factor
CAPTION_HEIGHT = 14
MARGIN = 2


def to_uint8(images: np.ndarray) -> np.ndarray:
  """[-1, 1] to 0 … 255, clipped and truncated as the released code does."""
  return np.clip((images + 1) * 127.5, 0, 255).astype(np.uint8)


def latent_preview(latents: np.ndarray) -> np.ndarray:
  """Latents (N, H, W, C) as uint8 RGB: three channels at +-3 deviations.

  Only to look at: colours mean nothing before a VAE has decoded them.
  """
  channels = latents[..., :3] if latents.shape[-1] >= 3 else latents[..., :1]
  deviation = channels.std(axis=(0, 1, 2), keepdims=True) + 1e-6
  return to_uint8((channels - channels.mean(axis=(0, 1, 2))) / (3 * deviation))


def make_grid(images: np.ndarray, captions: list[str], columns: int = 0) -> Image.Image:
  """A picture of images (N, H, W, 1 or 3) uint8, each under its caption.

  Args:
    images: uint8 tiles.
    captions: N texts.
    columns: tiles in a row; 0 for as many as make the picture square.
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
    drawer.text((x, y), caption, fill="black", font=font)
    tile = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    size = (width * factor, height * factor)
    grid.paste(tile.resize(size, Image.Resampling.NEAREST), (x, y + CAPTION_HEIGHT))
  return grid


def save_npz(path: str | Path, images: np.ndarray, labels: np.ndarray) -> None:
  """Writes arr_0 (images) and arr_1 (labels), the names that ADM's evaluator reads."""
  np.savez(path, images, labels)
