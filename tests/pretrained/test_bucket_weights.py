"""Files of weights in a bucket: copies, networks, errors that name the objects."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from mdt_jax.errors import SettingError
from mdt_jax.pretrained import bucket_weights, torch_inception
from mdt_jax.pretrained.bucket_weights import local_weights
from mdt_jax.pretrained.tensors import flatten, read_tensors, write_tensors
from mdt_jax.pretrained.torch_inception import convert_inception
from mdt_jax.pretrained.torch_mdt import from_tensors, from_torch
from tests import reference
from tests.pretrained.diffusers_reference import to_diffusers, with_sincos_positions


def put(bucket, name, content=b""):
  epath.Path(f"{bucket}/{name}").write_bytes(content)
  return f"{bucket}/{name}"


def test_local_path_is_not_copied(tmp_path):
  with local_weights(tmp_path / "x.pt") as path:
    assert path == tmp_path / "x.pt"


def test_file_is_copied_with_its_config(bucket):
  path = put(bucket, "x.pt", b"weights")
  put(bucket, "config.json", b"{}")
  put(bucket, "other.pt", b"not copied")
  with local_weights(path) as copy:
    assert copy.read_bytes() == b"weights"
    names = {file.name for file in copy.parent.iterdir()}
  assert names == {"x.pt", "config.json"}
  assert not copy.parent.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_network_of_a_bucket_is_that_of_the_file(bucket, suffix, tmp_path):
  tensors = read_tensors(reference.FIXTURES / "mdt_v2.pt")
  write_tensors(f"{bucket}/model{suffix}", tensors)
  attributes, params = from_torch(f"{bucket}/model{suffix}")
  expected, expected_params = from_torch(reference.FIXTURES / "mdt_v2.pt")
  assert attributes == expected
  found = flatten(params)
  for path, value in flatten(expected_params).items():
    np.testing.assert_array_equal(found[path], value, strict=True)


@pytest.mark.parametrize("folder", ["", "transformer/"])
def test_folder_of_diffusers_is_read(bucket, folder):
  released = with_sincos_positions(read_tensors(reference.FIXTURES / "dit.pt"))
  expected, params = from_tensors(released, num_heads=2)
  name = f"{bucket}/dit/{folder}diffusion_pytorch_model.safetensors"
  write_tensors(name, to_diffusers(released))
  put(bucket, f"dit/{folder}config.json", b'{"sample_size": 12}')
  attributes, found = from_torch(f"{bucket}/dit", num_heads=2)
  assert attributes == expected
  for path, value in flatten(params).items():
    np.testing.assert_allclose(flatten(found)[path], value, atol=1e-6)


def test_errors_name_the_object_and_not_its_copy(bucket):
  broken = put(bucket, "broken.safetensors", b"broken")
  put(bucket, "empty/notes.txt")
  put(bucket, "config/config.json", b"[")
  put(bucket, "config/diffusion_pytorch_model.safetensors", b"")
  for path in (broken, f"{bucket}/missing.pt", f"{bucket}/empty", f"{bucket}/config"):
    with pytest.raises(SettingError) as error:
      from_torch(path)
    assert error.value.setting == "path"
    assert error.value.value.startswith(path)
    assert "/tmp" not in str(error.value)


def test_other_suffix_is_refused_before_the_download(bucket, monkeypatch):
  path = put(bucket, "x.npz", b"many bytes")
  monkeypatch.setattr(bucket_weights, "_download", None)
  with pytest.raises(SettingError, match="must end in"):
    from_torch(path)


def test_full_disk_is_named_before_the_download(bucket, monkeypatch):
  path = put(bucket, "x.pt", b"many bytes")

  class Usage:
    free = 3

  monkeypatch.setattr(bucket_weights.shutil, "disk_usage", lambda _: Usage)
  with pytest.raises(SettingError, match="TMPDIR") as error:
    from_torch(path)
  assert error.value.value == path


def test_inception_is_converted_in_a_bucket(bucket, monkeypatch):
  monkeypatch.setattr(torch_inception, "_check", lambda tensors, path: None)
  write_tensors(f"{bucket}/fid.safetensors", {"fc.bias": np.ones(3, np.float32)})
  convert_inception(f"{bucket}/fid.safetensors", f"{bucket}/inception.safetensors")
  with local_weights(f"{bucket}/inception.safetensors") as copy:
    np.testing.assert_array_equal(read_tensors(copy)["fc.bias"], np.ones(3))
  with pytest.raises(SettingError, match=r"^target = .*exists already"):
    convert_inception(f"{bucket}/fid.safetensors", f"{bucket}/inception.safetensors")
