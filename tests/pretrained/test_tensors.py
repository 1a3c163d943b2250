"""Files of named tensors: damage, kinds of tensors and numbers that are refused."""

from __future__ import annotations

import os
import stat
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mdt_jax.errors import SettingError
from mdt_jax.pretrained.tensors import read_tensors, write_tensors


def one_value(value, shape=(2, 3)):
  tensor = torch.zeros(shape)
  tensor.view(-1)[1] = value
  return tensor


def assert_refused(path, *texts):
  with pytest.raises(SettingError) as error:
    read_tensors(path)
  assert error.value.setting == "path" and error.value.value == str(path)
  for text in texts:
    assert text in error.value.accepted


def test_flipped_byte_of_a_torch_file_is_refused(tmp_path):
  path = tmp_path / "model.pt"
  torch.save({"weight": torch.ones(64, 64)}, path)
  with zipfile.ZipFile(path) as file:
    (entry,) = (i for i in file.infolist() if i.file_size >= 64 * 64 * 4)
  content = bytearray(path.read_bytes())
  content[entry.header_offset + 4096] ^= 255
  path.write_bytes(content)
  assert_refused(path, "is damaged", "data/0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, suffix):
  path = tmp_path / f"model{suffix}"
  tensors = {"good": torch.ones(2), "bad.weight": one_value(value)}
  if suffix == ".pt":
    torch.save(tensors, path)
  else:
    save_file({name: tensor.numpy() for name, tensor in tensors.items()}, path)
  assert_refused(path, "bad.weight", "finite")


@pytest.mark.parametrize(
  "tensor",
  [
    torch.ones(3, dtype=torch.complex64),
    torch.ones(3, 3).to_sparse(),
    torch.ones(3, device="meta"),
    torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
  ],
  ids=["complex", "sparse", "meta", "quantised"],
)
def test_tensors_of_other_kinds_are_refused(tmp_path, tensor):
  path = tmp_path / "model.pt"
  torch.save({"bad.weight": tensor}, path)
  assert_refused(path)


def test_float8_of_safetensors_is_refused(tmp_path):
  from safetensors.torch import save_file as save_torch_file

  path = tmp_path / "model.safetensors"
  save_torch_file({"bad.weight": torch.ones(3).to(torch.float8_e4m3fn)}, str(path))
  assert_refused(path, "float8_e4m3fn")


def test_bfloat16_and_integers_are_read(tmp_path):
  path = tmp_path / "model.pt"
  tensors = {"a": torch.full((2,), 1.5, dtype=torch.bfloat16), "b": torch.tensor([3])}
  torch.save({"ema": tensors, "epoch": 3}, path)
  found = read_tensors(path)
  assert found["a"].dtype == np.float32 and found["a"].tolist() == [1.5, 1.5]
  assert found["b"].tolist() == [3]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_written_file_can_be_read_by_other_users(tmp_path, suffix):
  path = tmp_path / f"model{suffix}"
  before = os.umask(0o022)
  try:
    write_tensors(path, {"a": np.ones(3, np.float32)})
  finally:
    os.umask(before)
  assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_failed_write_of_torch_is_one_line(tmp_path, monkeypatch):
  def fail(*_):
    raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos\n0 vs 1")

  monkeypatch.setattr(torch, "save", fail)
  with pytest.raises(SettingError, match=r"^path = .*cannot be written: .*pos 0 vs 1$"):
    write_tensors(tmp_path / "model.pt", {"a": np.ones(3, np.float32)})
  assert list(tmp_path.iterdir()) == []
