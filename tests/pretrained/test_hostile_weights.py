"""Hostile files of weights: each is read or refused in one line, within its memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal

import pytest
import torch

from mdt_jax import SettingError
from mdt_jax.pretrained import torch_files, torch_inception
from mdt_jax.pretrained.torch_mdt import from_torch
from mdt_jax.pretrained.torch_vae import load_vae
from tests.cli.commands import assert_refused, run
from tests.pretrained import hostile_weights
from tests.pretrained.hostile_autoencoders import autoencoders

KINDS = list(hostile_weights.KINDS)
VALID = {
  "safetensors_valid",
  "safetensors_notes_not_json",
  "safetensors_notes_wrong",
  "safetensors_notes_huge",
  "torch_valid",
  "torch_valid_parameters",
  "torch_nested",
  "torch_args_of_sit",
  "torch_args_wrong",
  "torch_bin",
  "torch_legacy",
}
SECONDS = 60  # before a hanging reader is stopped
MEMORY = 2**28  # bytes by which the peak may grow


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module", autouse=True)
def warm():
  """Reads once, so that imports do not count as memory of the first file."""
  for suffix in (".pt", ".safetensors"):
    with contextlib.suppress(SettingError):
      from_torch(f"tests/fixtures/dit{suffix}", num_heads=2)


def peak():
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refusal(function, path, **options):
  """Returns the error of a reader, or None if it reads the file."""

  def stop(*_):
    raise TimeoutError(path)

  before = peak()
  earlier = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    function(path, **options)
  except SettingError as error:
    return error
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)
    grown = peak() - before
    assert grown < MEMORY, f"{path}: {grown / 2**20:.0f} MiB"
  return None


def assert_one_line(error, path):
  text = str(error)
  assert len(text.splitlines()) == 1 and len(text) < 2000, text
  assert path.name[:50] in text, text


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_file_is_read_or_refused(name, tmp_path):
  path = hostile_weights.one(tmp_path, name)
  error = refusal(from_torch, path, num_heads=2)
  if name in VALID:
    assert error is None
  else:
    assert error is not None and error.setting in ("path", "num_classes", "input_size")
    assert_one_line(error, path)
  assert not list((tmp_path / "here").iterdir())  # no code in the file ran


@pytest.mark.parametrize("is_zip", [True, False])
def test_large_pickle_is_refused_as_such(is_zip, tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, "_MAX_PICKLE", 1000)
  path = tmp_path / "model.pt"
  held = {f"a.{i}": torch.ones(1) for i in range(100)}
  torch.save(held, path, _use_new_zipfile_serialization=is_zip)
  with pytest.raises(SettingError, match=r"^path = .* more than 1,000 bytes"):
    from_torch(path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused(seed, tmp_path):
  paths = hostile_weights.files(tmp_path / "files", seed, len(KINDS) + 100)
  for path in paths[len(KINDS) :]:
    if error := refusal(from_torch, path, num_heads=2):
      assert_one_line(error, path)
  assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
  "name",
  [
    "safetensors_length_8_exabytes",
    "safetensors_name_control",
    "safetensors_terabyte",
    "torch_bytearray",
    "zip_bomb",
    "path_pipe",
    "path_device",
  ],
)
def test_command_refuses_a_hostile_file(name, tmp_path):
  path = hostile_weights.one(tmp_path, name)
  flags = (f"--input={path}", f"--output={tmp_path / 'run'}")
  assert_refused(run("mdt_jax.convert", *flags), "--input = ", path.name)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_file_is_no_inception(name, tmp_path):
  path = hostile_weights.one(tmp_path, name)
  error = refusal(torch_inception.load_inception, path)
  assert error is not None and error.setting == "path"
  assert_one_line(error, path)


@pytest.mark.parametrize("seed", range(2))
def test_hostile_autoencoders_are_refused(seed, tmp_path):
  for path in autoencoders(tmp_path / "vaes", seed, 100):
    error = refusal(load_vae, path)
    assert error is not None
    assert_one_line(error, path)


def test_files_depend_on_the_seed_alone(tmp_path):
  count = len(KINDS) + 40
  first, second = (
    hostile_weights.files(tmp_path / name, 7, count) for name in ("a", "b")
  )
  for one, other in zip(first[len(KINDS) :], second[len(KINDS) :], strict=True):
    assert one.name == other.name
    if os.path.isfile(one) and one.stat().st_size < 2**24:
      assert one.read_bytes() == other.read_bytes()


def test_there_are_sixty_kinds():
  assert len(KINDS) >= 60
