"""A set of latents while it is written: its plan, what is done, what is left."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.atomic import write_json
from mdt_jax.data import latents
from mdt_jax.errors import SettingError

BEGUN = "begun.json"  # the card of a set that is not finished


@dataclasses.dataclass(frozen=True)
class LatentSet:
  """A set of latents to write, or to go on with.

  Each finished shard has its name, and beside it a .json file with its entry of the
  card, until the set is finished and the card is written.

  Attributes:
    folder: of the set.
    card: of the set, without "images" and "shards". Equal in every process, and when a
      stopped run goes on.
    num_images: images of the source, before any is left out.
    num_shards: the images are divided evenly among the shards, in order.
  """

  folder: Path
  card: dict[str, Any]
  num_images: int
  num_shards: int

  @property
  def layout(self) -> latents.Layout:
    return latents.Layout(tuple(self.card["latent_shape"]), self.card["dtype"])

  @property
  def num_bytes(self) -> int:
    """Size on disk, without names and ArrayRecord's overhead, which are small."""
    return self.num_images * (self.layout.moment_bytes + latents.LABEL_BYTES)

  def shard_images(self, shard: int) -> range:
    """Returns the indices of the images of a shard."""
    edges = np.linspace(0, self.num_images, self.num_shards + 1).round().astype(int)
    return range(edges[shard], edges[shard + 1])

  def shard_path(self, shard: int) -> Path:
    return self.folder / latents.shard_name(shard, self.num_shards)

  def has_shard(self, shard: int) -> bool:
    """Whether a shard of an unfinished set is finished."""
    path = self.shard_path(shard)
    return entry_path(path).exists() and path.exists()

  def is_finished(self) -> bool:
    """Whether the folder holds the whole set.

    Raises:
      SettingError: the folder holds a finished set with another card.
    """
    if not (self.folder / latents.CARD).exists():
      return False
    card = self._read_json(latents.CARD)
    self._check_card(card)
    return all(self._has_size(entry) for entry in card["shards"])

  def bytes_missing(self) -> int:
    """Size of the shards that are not written yet, about."""
    paths = map(self.shard_path, range(self.num_shards))
    return self.num_bytes - sum(p.stat().st_size for p in paths if p.exists())

  def check_disk(self) -> tuple[int, int]:
    """Checks that the missing shards fit on the disk.

    Returns:
      Bytes missing, bytes free.

    Raises:
      SettingError: the missing shards need more than is free.
    """
    folder = self.folder.absolute()
    while not folder.exists():
      folder = folder.parent
    missing, free = self.bytes_missing(), shutil.disk_usage(folder).free
    if missing > free:
      raise self.error(
        f"needs {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
      )
    return missing, free

  def begin(self) -> None:
    """Prepares the folder to write shards.

    Raises:
      SettingError: the folder cannot be created, holds a set with another card, or
        holds something else.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise self.error(f"cannot be created: {error}") from None
    names = {path.name for path in self.folder.iterdir()}
    names = {name for name in names if not name.startswith(".")}
    if latents.CARD in names:
      self._reopen()
    elif not names:
      write_json(self.folder / BEGUN, self.card)
    elif BEGUN not in names:
      raise self.error("must be empty, or hold a set begun with these settings")
    self._check_card(self._read_json(BEGUN))

  def finish(self) -> bool:
    """Writes the card if all shards are finished; the last process to finish does.

    Returns:
      Whether the set is finished.
    """
    paths = [self.shard_path(shard) for shard in range(self.num_shards)]
    card_path = self.folder / latents.CARD
    try:
      entries = [json.loads(entry_path(path).read_text()) for path in paths]
    except FileNotFoundError:  # A shard is missing, or another process has finished.
      return card_path.exists()
    images = sum(entry["images"] for entry in entries)
    write_json(card_path, {**self.card, "images": images, "shards": entries})
    for path in [self.folder / BEGUN, *map(entry_path, paths)]:
      path.unlink(missing_ok=True)
    return True

  def error(self, text: str) -> SettingError:
    """Returns an error about the folder."""
    return SettingError("--output", str(self.folder), text)

  def _reopen(self) -> None:
    """Makes an unfinished set of a finished one that has lost shards."""
    entries = self._read_json(latents.CARD)["shards"]
    write_json(self.folder / BEGUN, self.card)
    for entry in entries:
      if self._has_size(entry):
        write_json(entry_path(self.folder / entry["file"]), entry)
    (self.folder / latents.CARD).unlink(missing_ok=True)

  def _has_size(self, entry: dict[str, Any]) -> bool:
    """Whether the shard of an entry exists and has the size that the entry says."""
    path = self.folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]

  def _read_json(self, name: str) -> dict[str, Any]:
    try:
      found = json.loads((self.folder / name).read_text())
    except (OSError, ValueError) as error:
      raise self.error(f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict):
      raise self.error(f"{name} must hold a dict")
    return found

  def _check_card(self, found: dict[str, Any]) -> None:
    """Raises if `found` differs from the card of this set."""
    for name, value in self.card.items():
      if found.get(name) != json.loads(json.dumps(value)):
        raise self.error(
          f"holds a set with {name} = {_short(found.get(name))}, not {_short(value)}: "
          "use another folder, or those settings"
        )


def entry_path(path: Path) -> Path:
  """Path of the card's entry of a finished shard, until the card is written."""
  return path.with_suffix(".json")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}…"
