"""A stand-in for the Hugging Face hub: huggingface_hub's own cache, read offline."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
  """The cache of huggingface_hub, filled by hand.

  Attributes:
    environment: variables of a process that reads this cache alone.
    uploads: (repository, private, message) of each upload.
  """

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    self.uploads: list[tuple[str, bool | None, str]] = []

  def use(self, monkeypatch) -> None:
    """Lets huggingface_hub of this process read this cache alone, and upload to it."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _Api(self))

  def add(self, repository: str, files: dict[str, Path]) -> Path:
    """Adds a repository as a download would; returns the folder of its snapshot."""
    folder = self.folder / f"models--{repository.replace('/', '--')}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    for number, (name, source) in enumerate(files.items()):
      blob = folder / "blobs" / str(number)
      blob.parent.mkdir(exist_ok=True)
      shutil.copyfile(source, blob)
      (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
      (snapshot / name).symlink_to(blob)
    return snapshot


class _Api:
  """`huggingface_hub.HfApi`, which uploads to a `HubCache`."""

  def __init__(self, cache: HubCache):
    self._cache, self._private = cache, None

  def create_repo(self, repo_id, *, private=None, exist_ok=False):
    assert exist_ok
    self._private = private

  def upload_folder(self, *, repo_id, folder_path, commit_message):
    files = {path.name: path for path in Path(folder_path).iterdir()}
    self._cache.add(repo_id, files)
    self._cache.uploads.append((repo_id, self._private, commit_message))
