"""Counts the files of a data set that are left out, by kind, for a log line."""

from __future__ import annotations

import collections
from pathlib import PurePosixPath

from mdt_jax.logs import logger, printable

MAX_KINDS = 8  # kinds in the log line, at most
ARCHIVE_FOLDER = "__MACOSX"  # macOS's zip writes a second copy of each name there
HIDDEN = "hidden files or folders"


class LeftOut:
  """The files that a reader of files leaves out."""

  def __init__(self):
    self._counts: collections.Counter[str] = collections.Counter()
    self._examples: dict[str, str] = {}

  def add(self, kind: str, name: str) -> None:
    """Counts a file.

    Args:
      kind: what the file is, in the plural.
      name: path of the file, for the log.
    """
    self._counts[kind] += 1
    self._examples[kind] = min(self._examples.get(kind, name), name)

  def add_file(self, name: str) -> None:
    """Counts a file by its ending."""
    suffix = PurePosixPath(name).suffix.lower()
    self.add(f"{suffix} files" if suffix else "files without an ending", name)

  def log(self, path: str) -> None:
    """Writes the log line, if there are such files.

    Args:
      path: path of the data set.
    """
    common = self._counts.most_common()
    texts = [
      f"{kind} ({count:,}, such as {printable(self._examples[kind])})"
      for kind, count in common[:MAX_KINDS]
    ]
    if rest := sum(count for _, count in common[MAX_KINDS:]):
      texts.append(f"other kinds ({rest:,})")
    if texts:
      logger.warning("Left out of %s: %s", printable(path), "; ".join(texts))


def is_hidden(name: str) -> bool:
  """Whether a name of a file or folder is hidden, or of macOS's second copies."""
  return name.startswith(".") or name == ARCHIVE_FOLDER
