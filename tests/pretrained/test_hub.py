"""Addresses of the Hugging Face hub, read from huggingface_hub's cache."""

from __future__ import annotations

import sys

import pytest

from mdt_jax import SettingError
from mdt_jax.pretrained import hub
from tests.pretrained.hub_cache import HubCache

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub of the test extra")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  cache = HubCache(tmp_path / "hub")
  cache.use(monkeypatch)
  return cache


def files(folder, *names):
  """Name -> a file that holds its name."""
  folder.mkdir(exist_ok=True)
  for name in names:
    (folder / name.replace("/", "_")).write_text(name)
  return {name: folder / name.replace("/", "_") for name in names}


@pytest.mark.parametrize(
  ("held", "found"),
  [
    (("config.json", "model.safetensors", "README.md"), "model.safetensors"),
    (
      ("config.json", "diffusion_pytorch_model.safetensors"),
      "diffusion_pytorch_model.safetensors",
    ),
    (
      (
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
      ),
      "transformer/diffusion_pytorch_model.bin",
    ),
  ],
  ids=["mdt_jax", "diffusers", "pipeline of diffusers"],
)
def test_weights_of_a_repository_are_found_beside_their_config(
  cache, tmp_path, held, found
):
  snapshot = cache.add("org/name", files(tmp_path / "files", *held))
  path = hub.download("path", "hf://org/name")
  assert path.relative_to(snapshot).as_posix() == found
  assert path.read_text() == found
  assert (path.parent / "config.json").is_file()


def test_file_of_a_repository_is_found_by_its_name(cache, tmp_path):
  cache.add("org/name", files(tmp_path / "files", "old/ema.pt", "model.safetensors"))
  assert hub.download("path", "hf://org/name/old/ema.pt").read_text() == "old/ema.pt"


@pytest.mark.parametrize("folder", ["", "transformer/"])
def test_config_beside_a_file_is_downloaded_too(cache, tmp_path, folder, monkeypatch):
  import huggingface_hub

  cache.add("org/name", files(tmp_path / "files", f"{folder}a.safetensors"))
  asked = []

  def snapshot_download(repository, *, allow_patterns):
    asked.append((repository, allow_patterns))

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  hub.download("path", f"hf://org/name/{folder}a.safetensors")
  assert asked == [("org/name", [f"{folder}config.json"])]


@pytest.mark.parametrize(
  "url", ["hf://name", "hf://", "hf://org/", "hf://org/name/", "hf:///org/name"]
)
def test_address_without_a_repository_is_refused(cache, url):
  with pytest.raises(SettingError) as caught:
    hub.download("config.init.path", url)
  assert (caught.value.setting, caught.value.value) == ("config.init.path", url)


@pytest.mark.parametrize("url", ["hf://org/name", "hf://org/name/model.safetensors"])
def test_unknown_repository_is_refused_in_one_line(cache, url):
  with pytest.raises(SettingError, match=r"^path = .*cannot be read") as caught:
    hub.download("path", url)
  assert "\n" not in str(caught.value)


def test_repository_without_weights_is_refused(cache, tmp_path):
  cache.add("org/name", files(tmp_path / "files", "config.json", "flax_model.msgpack"))
  with pytest.raises(SettingError, match=r"holds neither model\.safetensors"):
    hub.download("path", "hf://org/name")


def test_missing_huggingface_hub_is_named(cache, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  for function in (
    lambda: hub.download("name", "hf://org/name"),
    lambda: hub.check_upload("name", "org/name"),
  ):
    with pytest.raises(SettingError, match=r"^name = .*pip install"):
      function()


@pytest.mark.parametrize(
  "name", ["", "name", "a/b/c", "/name", "org/", "org/na me", "org/a--b", "org/x.git"]
)
def test_repository_of_a_bad_name_is_refused(cache, name):
  with pytest.raises(SettingError) as caught:
    hub.check_upload("push", name)
  assert (caught.value.setting, caught.value.value) == ("push", name)
