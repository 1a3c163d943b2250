"""The state of a latent set while it is written: plan, finished and missing shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from mdt_jax import buckets
from mdt_jax.atomic import read_json, write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.data import latent_card, latents
from mdt_jax.data.latent_records import Layout
from mdt_jax.errors import SettingError
from mdt_jax.paths import file_size

BEGUN = "begun.json"  # holds the card of an unfinished set
_OPTIONAL = ("arrays", "captions")  # entries of a card
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _with_one_line_errors(
  method: Callable[Concatenate[LatentSet, _P], _R],
) -> Callable[Concatenate[LatentSet, _P], _R]:
  """Turns exceptions of the set's bucket into errors of one line."""

  @functools.wraps(method)
  def wrapped(self: LatentSet, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    if isinstance(self.folder, Path):
      return method(self, *args, **kwargs)
    with buckets.one_line_errors("--output", self.folder):
      return method(self, *args, **kwargs)

  return wrapped


@dataclasses.dataclass(frozen=True)
class LatentSet:
  """A latent set to write or to resume; see `latents` for the format.

  While a set is unfinished, each finished shard has a .json file beside it with its
  entry of the card. `finish` merges these entries into card.json. In a bucket, the
  entry is written after the shard; on a disk, before the shard gets its name.

  Attributes:
    folder: folder of the set, of `paths.output_folder`.
    card: contents of card.json without "images" and "shards". Must be equal in every
      process and when a stopped run resumes.
    num_images: number of images of the source, including unreadable ones.
    num_shards: number of shards. Consecutive images are divided evenly among them.
  """

  folder: AnyPath
  card: dict[str, Any]
  num_images: int
  num_shards: int

  @property
  def layout(self) -> Layout:
    """The layout of the records."""
    return Layout.of_card(self.card)

  @property
  def num_bytes(self) -> int:
    """Size on disk in bytes, without texts and ArrayRecord's overhead (both small)."""
    return self.num_images * self.layout.fixed_bytes

  def shard_images(self, shard: int) -> range:
    """Returns the indices of the images of a shard."""
    edges = np.linspace(0, self.num_images, self.num_shards + 1).round().astype(int)
    return range(edges[shard], edges[shard + 1])

  def shard_path(self, shard: int) -> AnyPath:
    """Returns the path of a shard."""
    return self.folder / latents.shard_name(shard, self.num_shards)

  @_with_one_line_errors
  def has_shard(self, shard: int) -> bool:
    """Returns whether a shard of an unfinished set is finished."""
    path = self.shard_path(shard)
    if not (entry_path(path).exists() and path.exists()):
      return False
    # In a bucket, two processes may have written the shard at the same time.
    return isinstance(path, Path) or file_size(path) == self._entry(path)["bytes"]

  @_with_one_line_errors
  def is_finished(self) -> bool:
    """Returns whether the folder holds the finished set with all its shards.

    Raises:
      SettingError: the folder holds a finished set with another card.
    """
    if not (self.folder / latents.CARD).exists():
      return False
    card, sizes = self._finished_card(), self._sizes()
    return all(sizes.get(entry["file"]) == entry["bytes"] for entry in card["shards"])

  @_with_one_line_errors
  def stored_card(self) -> dict[str, Any] | None:
    """Reads the card of the finished or begun set; None if the folder holds neither.

    Raises:
      SettingError: the card is damaged.
    """
    for name in (latents.CARD, BEGUN):
      with contextlib.suppress(FileNotFoundError):
        return read_json(self.folder / name, self.error)
    return None

  def bytes_missing(self) -> int:
    """Returns the approximate size in bytes of the shards that are not written yet."""
    paths, sizes = map(self.shard_path, range(self.num_shards)), self._sizes()
    return self.num_bytes - sum(sizes.get(path.name, 0) for path in paths)

  @_with_one_line_errors
  def check_disk(self) -> tuple[int, int]:
    """Checks that the missing shards fit on the disk.

    A set in a bucket needs room for one shard, in the folder for temporary files.

    Returns:
      (bytes of the missing shards, free bytes on the disk).

    Raises:
      SettingError: the missing shards do not fit.
    """
    missing = self.bytes_missing()
    if isinstance(self.folder, Path):
      needed, folder, what = missing, self.folder.absolute(), "more"
    else:
      folder = Path(tempfile.gettempdir())
      images = max(len(self.shard_images(shard)) for shard in range(self.num_shards))
      needed = min(missing, images * self.num_bytes // self.num_images)
      what = f"in the temporary folder {folder} (TMPDIR), for one shard"
    while not folder.exists():
      folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
      raise self.error(
        f"needs {needed / 1e9:.1f} GB {what}; {free / 1e9:.1f} GB are free on this disk"
      )
    return missing, free

  @_with_one_line_errors
  def begin(self) -> None:
    """Prepares the folder for writing shards.

    Raises:
      SettingError: the folder cannot be created, or holds anything but a set with this
        card.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise self.error(f"cannot be created: {error}") from None
    names = {name for name in self._names() if not name.startswith(".")}
    if latents.CARD in names:
      self._reopen()
    elif not names:
      write_json(self.folder / BEGUN, self.card)
    elif BEGUN not in names:
      raise self.error("must be empty or hold a latent set with the same settings")
    self._check_card(read_json(self.folder / BEGUN, self.error))

  @_with_one_line_errors
  def abandon(self) -> None:
    """Removes the plan of a set if no shard is finished or being written.

    The next command can then use other settings.
    """
    if self._names() == [BEGUN]:
      (self.folder / BEGUN).unlink(missing_ok=True)

  @_with_one_line_errors
  def finish(self) -> bool:
    """Writes card.json if all shards are finished.

    Each process calls this method after its last shard, so the last process writes the
    card.

    Returns:
      Whether the set is finished.

    Raises:
      SettingError: the set is empty, because no image could be read; or, in a bucket,
        two processes have written a shard at the same time.
    """
    paths = [self.shard_path(shard) for shard in range(self.num_shards)]
    card_path = self.folder / latents.CARD
    try:
      entries = [self._entry(path) for path in paths]
    except FileNotFoundError:  # a shard is missing, or another process wrote the card
      return card_path.exists()
    if not isinstance(self.folder, Path):
      sizes = self._sizes()
      for entry in entries:
        if sizes.get(entry["file"]) != entry["bytes"]:
          raise self.error(
            f"two processes have written {entry['file']} at the same time: repeat the "
            "command, and give each process its own --process_index"
          )
    images = sum(entry["images"] for entry in entries)
    if images == 0:
      raise self.error("gets no latents: none of the images can be read")
    write_json(card_path, {**self.card, "images": images, "shards": entries})
    self.remove_plan()
    return True

  @_with_one_line_errors
  def remove_plan(self) -> None:
    """Removes the files that only an unfinished set needs."""
    entries = [entry_path(self.shard_path(shard)) for shard in range(self.num_shards)]
    for path in [self.folder / BEGUN, *entries]:
      path.unlink(missing_ok=True)

  def error(self, text: str) -> SettingError:
    """Returns a SettingError of the setting --output."""
    return SettingError("--output", str(self.folder), text)

  def _reopen(self) -> None:
    """Turns a finished set with missing shards into an unfinished set."""
    entries = self._finished_card()["shards"]
    write_json(self.folder / BEGUN, self.card)
    sizes = self._sizes()
    for entry in entries:
      if sizes.get(entry["file"]) == entry["bytes"]:
        write_json(entry_path(self.folder / entry["file"]), entry)
    (self.folder / latents.CARD).unlink(missing_ok=True)

  def _entry(self, path: AnyPath) -> dict[str, Any]:
    """Reads the entry of a finished shard of an unfinished set, and checks it.

    Raises:
      FileNotFoundError: the shard has no entry.
      SettingError: the entry is damaged.
    """
    entry = read_json(entry_path(path), self.error)
    name = entry_path(path).name
    latent_card.check_shard(entry, name, len(self.card["classes"]), self.error)
    return entry

  def _sizes(self) -> dict[str, int]:
    """Returns the size in bytes of each file in the folder, which may be missing."""
    if not isinstance(self.folder, Path):
      return buckets.list_objects(self.folder)
    sizes = {}
    for path in self.folder.iterdir() if self.folder.exists() else ():
      with contextlib.suppress(FileNotFoundError):  # another process renamed the file
        if path.is_file():
          sizes[path.name] = file_size(path)
    return sizes

  def _names(self) -> list[str]:
    """Returns the names in the folder; in a bucket, an empty folder does not exist."""
    if not isinstance(self.folder, Path):
      return sorted({name.partition("/")[0] for name in self._sizes()})
    return [path.name for path in self.folder.iterdir()]

  def _finished_card(self) -> dict[str, Any]:
    """Reads card.json; raises SettingError if it is damaged or of another set."""
    card = read_json(self.folder / latents.CARD, self.error)
    self._check_card(card)
    latent_card.check_card(card, self.error)
    return card

  def _check_card(self, found: dict[str, Any]) -> None:
    """Raises SettingError if `found` differs from the card of this set."""
    # A card without arrays has no such entry, so that both cards are compared.
    own_card = {**{name: self.card.get(name) for name in _OPTIONAL}, **self.card}
    for name, value in own_card.items():
      if found.get(name) != json.loads(json.dumps(value)):
        held, own = map(latent_card.shorten, (found.get(name), value))
        raise self.error(
          f"holds a latent set with {name} = {held}, not {own}; use another folder or "
          "the settings of that set"
        )


def entry_path(path: AnyPath) -> AnyPath:
  """Returns the path of a shard's entry while the set is unfinished."""
  return path.with_suffix(".json")
