"""Many images to disk: one file a block, so that a stopped run goes on, then one .npz.

  OUTPUT/partial/settings.json   what the blocks are of
  OUTPUT/partial/000000.npy      images of a block; there as a whole or not at all
  OUTPUT/samples.npz             all of them: arr_0 images, arr_1 labels
  OUTPUT/samples.json            what they are of
  OUTPUT/png/3_000000.png        each of them, where asked for

Images of other settings that are there are replaced once all are made. Several
processes share the folder: each makes blocks of its own, the first one merges.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from mdt_jax.atomic import atomic_write, write_json
from mdt_jax.errors import SettingError
from mdt_jax.sampling import pictures
from mdt_jax.sampling.batches import Request

logger = logging.getLogger("mdt_jax")
MAX_IN_GRID = 100
PNGS_AT_A_TIME = 64
SECONDS_BETWEEN_LOOKS = 1.0  # for the blocks of other processes
# blocks -> (block, its images), in order
MakeBlocks = Callable[[list[int]], Iterable[tuple[int, np.ndarray]]]


class ShardedImages:
  """The images of a request, in a folder.

  Args:
    folder: where to; it is made.
    request: what is made.
    settings: all that the images depend on, to be compared when a run goes on; JSON.
    name: of the files, "samples" or "latents".
    process_index, process_count: of this process among those that share the folder.

  Raises:
    SettingError: the folder holds unfinished images of other settings.
  """

  def __init__(
    self,
    folder: str | Path,
    request: Request,
    settings: dict[str, Any],
    *,
    name: str = "samples",
    process_index: int = 0,
    process_count: int = 1,
  ):
    self.folder = Path(folder)
    self._partial = self.folder / "partial"
    self._pngs = self.folder / "png"
    self._request = request
    self._settings = settings
    self._name = name
    self._process_index = process_index
    self._process_count = process_count
    if self._partial.exists() and not self._partial.is_dir():
      raise SettingError("--output", str(folder), "holds a file named partial")
    self._check_same_settings()

  @property
  def npz(self) -> Path:
    return self.folder / f"{self._name}.npz"

  @property
  def is_complete(self) -> bool:
    """Whether the images of these settings are there already, merged."""
    return (
      not self._partial.exists()
      and self.npz.exists()
      and _read_json(self.folder / f"{self._name}.json") == self._settings
    )

  def write(self, make_blocks: MakeBlocks, *, progress: bool = True) -> None:
    """Makes the blocks of this process that are missing; the first process merges.

    Args:
      make_blocks: gives the images of the blocks asked for.
      progress: show a bar with the time left.
    """
    self._partial.mkdir(parents=True, exist_ok=True)
    path = self._partial / "settings.json"
    write_json(path, self._settings)
    mine = range(self._process_index, self._request.num_blocks, self._process_count)
    missing = [block for block in mine if not self._path(block).exists()]
    total, left = (
      sum(len(self._request.ids(b)) for b in blocks) for blocks in (mine, missing)
    )
    if left < total:
      logger.info("going on: %d of %d images are there", total - left, total)
    with tqdm.tqdm(
      total=total, initial=total - left, unit="image", disable=not progress
    ) as bar:
      for block, pixels in make_blocks(missing):
        with atomic_write(self._path(block)) as partial, partial.open("wb") as file:
          np.save(file, pixels)
        bar.update(len(pixels))
    if self._process_index == 0:
      self._wait_for_others()
      self._merge()

  def write_pngs(self) -> None:
    """Writes each image of the .npz as png/LABEL_NUMBER.png.

    It is a layout that config.data.source = "images" reads.
    """
    self._pngs.mkdir(exist_ok=True)

    def save(i: int, pixels: np.ndarray) -> None:
      label = self._request.labels[i]
      pictures.to_pil(pixels).save(self._pngs / f"{label}_{i:06d}.png")

    start = 0
    with ThreadPoolExecutor() as threads:
      for part in pictures.read_npz(self.npz, PNGS_AT_A_TIME):
        list(threads.map(save, range(start, start + len(part)), part))
        start += len(part)

  def _check_same_settings(self) -> None:
    if not self._partial.exists():
      return
    saved = _read_json(self._partial / "settings.json")
    if saved is None or saved == self._settings:  # None: stopped before it was written
      return
    differences = [
      f"{name} was {saved.get(name)!r}, now {self._settings.get(name)!r}"
      for name in sorted(saved.keys() | self._settings.keys())
      if saved.get(name) != self._settings.get(name)
    ]
    raise SettingError(
      "--output",
      str(self.folder),
      f"holds unfinished images of other settings ({'; '.join(differences)}): finish "
      f"those, delete {self._partial}, or take another folder",
    )

  def _path(self, block: int) -> Path:
    return self._partial / f"{block:06d}.npy"

  def _wait_for_others(self) -> None:
    said = False
    while True:
      blocks = range(self._request.num_blocks)
      missing = sum(not self._path(block).exists() for block in blocks)
      if not missing:
        return
      if not said:
        logger.info("waiting for %d blocks of other processes", missing)
        said = True
      time.sleep(SECONDS_BETWEEN_LOOKS)

  def _blocks(self) -> Iterator[np.ndarray]:
    for block in range(self._request.num_blocks):
      yield np.load(self._path(block), allow_pickle=False)

  def _merge(self) -> None:
    labels = np.asarray(self._request.labels, np.int64)
    # The .npz comes last: it says that all is done.
    self._write_grid(labels)
    with atomic_write(self.npz) as partial:
      with partial.open("wb") as file:
        pictures.write_npz(file, self._blocks(), labels)
      if self._name == "samples":
        self._remove_pngs()
    write_json(self.folder / f"{self._name}.json", self._settings)
    # Renamed first, as deleting takes a while and may be stopped.
    done = self.folder / "partial.done"
    shutil.rmtree(done, ignore_errors=True)
    self._partial.rename(done)
    shutil.rmtree(done)

  def _remove_pngs(self) -> None:
    """Removes those of the images that are replaced; there may be more of them."""
    for path in self._pngs.glob("*.png"):
      if re.fullmatch(r"\d+_\d{6,}", path.stem):
        path.unlink()

  def _write_grid(self, labels: np.ndarray) -> None:
    shown: list[np.ndarray] = []
    for pixels in self._blocks():
      shown.extend(pixels[: MAX_IN_GRID - len(shown)])
      if len(shown) == MAX_IN_GRID:
        break
    pixels = np.stack(shown)
    if pixels.dtype != np.uint8:
      pixels = pictures.latent_preview(pixels)
    grid = pictures.make_grid(pixels, [str(label) for label in labels[: len(pixels)]])
    grid.save(self.folder / "samples.png")


def _read_json(path: Path) -> dict[str, Any] | None:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
