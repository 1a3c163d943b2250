"""Writes many images to a folder, in blocks, so that a stopped job can be resumed.

  OUTPUT/partial/settings.json   description of the unfinished job
  OUTPUT/partial/000000.npy      images of a block; written atomically
  OUTPUT/samples.npz             arr_0 images, arr_1 labels if there are any
  OUTPUT/samples.png             the first images, as a grid
  OUTPUT/samples.json            description of the job
  OUTPUT/png/3_000000.png        optional: an image, as LABEL_NUMBER.png

The files of latents are latents.npz and latents.json. Finished images of other settings
are replaced only if `overwrite` is set, and only after all new images exist. Several
processes can share the folder: each process writes its own blocks, and process 0 merges
the blocks. The folder may lie in a bucket (gs://…).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tqdm
from flax import traverse_util
from jaxtyping import Shaped

from mdt_jax.atomic import atomic_write, read_json, write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.data import npy_format
from mdt_jax.diffusion.samplers import OnStep
from mdt_jax.errors import SettingError, describe_changes
from mdt_jax.logs import logger
from mdt_jax.paths import file_size, output_folder
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import Request

MAX_IN_GRID = 100  # images in samples.png, at most
PNGS_AT_A_TIME = 64  # images in memory while PNGs are written
DELETED_AT_A_TIME = 32  # objects of a bucket
# Settings whose values are hashes of arrays, see `SamplingJob.describe`.
_HASHED = (
  "autoencoder",
  "classes",
  "image",
  "labels",
  "mask",
  "null",
  "parameters",
  "weak_parameters",
)
# Settings that descriptions of earlier versions lack.
_LATER = ("autoencoder", "classes")
POLL_SECONDS = 1.0  # pause between checks for the blocks of other processes
# (numbers of blocks, listener to the steps) -> (number, images of the block), in order
GenerateBlocks: TypeAlias = Callable[
  [list[int], OnStep | None], Iterable[tuple[int, np.ndarray]]
]


class ShardedImages:
  """The folder of a request's images, which one or more processes write in blocks.

  Args:
    folder: output folder; created if absent.
    request: the images to write.
    settings: everything that the images depend on, as JSON values. A job is resumed
      only if the settings are equal.
    name: stem of the files, "samples" or "latents".
    process_index: number of this process, from 0.
    process_count: number of processes that share the folder.
    overwrite: whether to replace finished images of other settings.
    caption: label -> text above its image in the grid.

  Raises:
    SettingError: the folder holds images of other settings: unfinished ones, or
      finished ones without `overwrite`.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    request: Request,
    settings: dict[str, Any],
    *,
    name: str = "samples",
    process_index: int = 0,
    process_count: int = 1,
    overwrite: bool = False,
    caption: Callable[[int], str] = str,
  ):
    self.folder = output_folder("folder", folder)
    self._partial = self.folder / "partial"
    self._pngs = self.folder / "png"
    self._request = request
    self._settings = settings
    self._name = name
    self._process_index = process_index
    self._process_count = process_count
    self._caption = caption
    if self._partial.exists() and not self._partial.is_dir():
      raise SettingError(
        "folder", str(folder), "must not hold a file with the name 'partial'"
      )
    if self._partial.exists():
      self._check_unfinished()
    elif self.npz.exists() and not overwrite:
      self._check_finished()

  @property
  def npz(self) -> AnyPath:
    """The file of all images."""
    return self.folder / f"{self._name}.npz"

  @property
  def is_complete(self) -> bool:
    """Whether the folder holds the finished images of these settings."""
    # A bucket has no atomic rename: blocks of these settings may be left there.
    is_merged = not isinstance(self.folder, Path) or not self._partial.exists()
    return (
      is_merged
      and self.npz.exists()
      and self._is_same(_read_json(self.folder / f"{self._name}.json"))
    )

  def write(self, generate_blocks: GenerateBlocks, *, progress: bool = True) -> None:
    """Writes the missing blocks of this process; process 0 then merges all blocks.

    Args:
      generate_blocks: generates images; see `SamplingJob.generate_blocks`.
      progress: whether to show a progress bar.
    """
    mine = range(self._process_index, self._request.num_blocks, self._process_count)
    held = self._names_of_blocks()
    missing = [block for block in mine if not self._is_written(block, held)]
    if self._process_index > 0 and (not missing or self.is_complete):
      # Process 0 may have merged the blocks, and waits for no blocks of this process.
      # A new folder of blocks would look like an unfinished job.
      return
    self._partial.mkdir(parents=True, exist_ok=True)
    path = self._partial / "settings.json"
    # A bucket refuses to write one object many times within a second.
    if isinstance(path, Path) or not path.exists():
      write_json(path, self._settings)
    total, left = (
      sum(len(self._request.ids(b)) for b in blocks) for blocks in (mine, missing)
    )
    if left < total:
      logger.info(
        "resuming: %s already holds %d of %d images", self.folder, total - left, total
      )
    with tqdm.tqdm(
      total=total, initial=total - left, unit="image", disable=not progress
    ) as bar:
      # JAX's cache on disk does not keep a program that reports its steps.
      reports = progress and sys.stderr.isatty()
      show = functools.partial(_show_step, bar) if reports else None
      for block, pixels in generate_blocks(missing, show):
        with atomic_write(self._path(block)) as partial, partial.open("wb") as file:
          np.save(file, pixels)
        bar.update(len(pixels))
    if self._process_index == 0:
      self._wait_for_others()
      self._merge()

  def write_pngs(self) -> None:
    """Writes each image of the .npz file as png/LABEL_NUMBER.png.

    Without labels, LABEL is 0. `config.data.source = "images"` can read the folder.
    """
    self._pngs.mkdir(exist_ok=True)
    labels = self._request.known_classes

    def save(i: int, pixels: np.ndarray) -> None:
      label = 0 if labels is None else labels[i]
      path = self._pngs / f"{label}_{i:06d}.png"
      pictures.save_png(pictures.to_pil(pixels), path)

    start = 0
    with ThreadPoolExecutor() as threads, self.npz.open("rb") as file:
      for part in pictures.read_npz(file, PNGS_AT_A_TIME):
        list(threads.map(save, range(start, start + len(part)), part))
        start += len(part)

  def _check_unfinished(self) -> None:
    """Raises SettingError if the unfinished images have other settings."""
    saved = _read_json(self._partial / "settings.json")
    # None: the job stopped before its first block.
    if saved is not None and not self._is_same(saved):
      raise SettingError(
        "folder",
        str(self.folder),
        f"holds unfinished images of other settings ({self._differences(saved)}): "
        f"finish these images, delete {self._partial}, or choose another folder",
      )

  def _check_finished(self) -> None:
    """Raises SettingError if the finished images have other settings."""
    saved = _read_json(self.folder / f"{self._name}.json")
    if not self._is_same(saved):
      differences = f" ({self._differences(saved)})" if saved else ""
      raise SettingError(
        "folder",
        str(self.folder),
        f"holds finished images of other settings{differences}: choose another folder "
        "(--output), or replace the images (--overwrite)",
      )

  def _is_same(self, saved: dict[str, Any] | None) -> bool:
    """Whether saved settings are those of this job, as far as their version knew them.

    None stands for settings that were not saved.
    """
    later = {name: self._settings[name] for name in _LATER if name in self._settings}
    return saved is not None and later | saved == self._settings

  def _differences(self, saved: dict[str, Any]) -> str:
    """The settings that differ from saved ones, for errors."""
    # Entries of a dict are named as in "task.strength".
    old, new = (
      traverse_util.flatten_dict(settings, sep=".")
      for settings in (saved, self._settings)
    )
    hashed = [f"other {name}" for name in _HASHED if old.get(name) != new.get(name)]
    plain = (
      {name: value for name, value in settings.items() if name not in _HASHED}
      for settings in (old, new)
    )
    return "; ".join([*describe_changes(*plain), *hashed])

  def _names_of_blocks(self) -> set[str]:
    """Names of the files in the folder of blocks."""
    try:
      return {path.name for path in self._partial.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
      return set()

  def _is_written(self, block: int, held: Container[str]) -> bool:
    """Whether the file of a block holds its images; a damaged file is logged.

    Args:
      block: number of the block.
      held: result of `_names_of_blocks`.
    """
    path = self._path(block)
    if path.name not in held:
      return False
    try:
      shape = _read_shape(path)
      if len(shape) == 4 and shape[0] == len(self._request.ids(block)):
        return True
      reason = f"it holds an array of shape {shape}"
    except (OSError, ValueError, EOFError) as error:
      reason = str(error)
    logger.warning("Draws block %d again: %s is damaged (%s)", block, path, reason)
    return False

  def _path(self, block: int) -> AnyPath:
    """The file of a block."""
    return self._partial / f"{block:06d}.npy"

  def _wait_for_others(self) -> None:
    """Waits until the blocks of all processes exist."""
    has_logged = False
    while True:
      held = self._names_of_blocks()
      blocks = range(self._request.num_blocks)
      missing = sum(self._path(block).name not in held for block in blocks)
      if not missing:
        return
      if not has_logged:
        logger.info(
          "waiting for other processes: %d block%s missing",
          missing,
          "s are" if missing > 1 else " is",
        )
        has_logged = True
      time.sleep(POLL_SECONDS)

  def _blocks(self) -> Iterator[Shaped[np.ndarray, "n H W C"]]:
    """Reads all blocks in order."""
    for block in range(self._request.num_blocks):
      with self._path(block).open("rb") as file:
        yield np.load(file, allow_pickle=False)

  def _merge(self) -> None:
    """Writes the grid and the .npz file from the blocks, then deletes the blocks."""
    # The grid comes first, so that the grid exists whenever the .npz file exists.
    self._write_grid()
    with atomic_write(self.npz) as partial:
      with partial.open("wb") as file:
        labels, count = self._request.known_classes, len(self._request.labels)
        pictures.write_npz(file, self._blocks(), labels, count)
      if self._name == "samples":
        self._remove_pngs()
    write_json(self.folder / f"{self._name}.json", self._settings)
    self.remove_blocks()

  def remove_blocks(self) -> None:
    """Deletes the blocks of a finished job, if there are any."""
    if not isinstance(self._partial, Path):
      # The settings go last: they say which images a remaining block holds.
      settings = self._partial / "settings.json"
      blocks = [self._partial / name for name in self._names_of_blocks()]
      blocks = [path for path in blocks if path != settings]
      with ThreadPoolExecutor(DELETED_AT_A_TIME) as threads:
        list(threads.map(lambda path: path.unlink(missing_ok=True), blocks))
      settings.unlink(missing_ok=True)
    elif self._partial.exists():
      # Rename first: a process may be stopped while it deletes the files.
      done = self.folder / "partial.done"
      shutil.rmtree(done, ignore_errors=True)
      self._partial.rename(done)
      shutil.rmtree(done)

  def _remove_pngs(self) -> None:
    """Removes the PNGs of the replaced images, and no other files."""
    for path in self._pngs.glob("*.png"):
      if re.fullmatch(r"\d+_\d{6,}", path.stem):
        path.unlink()

  def _write_grid(self) -> None:
    """Writes the first images as a grid to samples.png."""
    shown: list[np.ndarray] = []
    for pixels in self._blocks():
      shown.extend(pixels[: MAX_IN_GRID - len(shown)])
      if len(shown) == MAX_IN_GRID:
        break
    pixels = np.stack(shown)
    if pixels.dtype != np.uint8:
      pixels = pictures.latent_preview(pixels)
    captions, labels = self._request.captions, self._request.known_classes
    if captions is None:
      texts = [""] * len(pixels)
      if labels is not None:
        texts = [self._caption(int(label)) for label in labels[: len(pixels)]]
      captions = texts
    grid = pictures.make_grid(pixels, list(captions[: len(pixels)]))
    pictures.save_png(grid, self.folder / "samples.png")


def _show_step(bar: tqdm.tqdm, done: int, total: int) -> None:
  """Shows the steps of the running block behind a progress bar."""
  bar.set_postfix_str(f"step {done}/{total}", refresh=False)
  bar.update(0)  # refreshes the bar, at most ten times a second


def _read_shape(path: AnyPath) -> tuple[int, ...]:
  """Reads the shape of the array in a file of `np.save`.

  Raises:
    OSError, ValueError, EOFError: the file is damaged or cut off.
  """
  if isinstance(path, Path):
    return np.load(path, mmap_mode="r", allow_pickle=False).shape
  with path.open("rb") as file:
    header = npy_format.read_header(file)
    if file_size(path) != file.tell() + header.num_bytes:
      raise ValueError("it is cut off")
  return header.shape


def _read_json(path: AnyPath) -> dict[str, Any] | None:
  """Reads a JSON file; None if the file does not exist.

  Raises:
    SettingError: the file is damaged.
  """

  def refuse(reason: str) -> SettingError:
    return SettingError("folder", str(path.parent), f"is damaged: {reason}; delete it")

  try:
    return read_json(path, refuse)
  except FileNotFoundError:
    return None
