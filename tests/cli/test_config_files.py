"""--config: files on disk come first, then packaged configs from any folder."""

from __future__ import annotations

import pytest

from mdt_jax.cli.config_files import PACKAGED, find_config, packaged_configs
from mdt_jax.errors import SettingError

DIGITS = str(PACKAGED / "digits.py")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  "name",
  [
    *("digits", "digits.py", "configs/digits", "configs/digits.py"),
    *("./configs/digits.py", "mdt_jax/configs/digits.py"),
  ],
)
def test_packaged_configs_are_found_from_any_folder(name):
  assert find_config(name) == DIGITS
  assert find_config(f"{name}:text:more") == f"{DIGITS}:text:more"


def test_packaged_configs_are_listed_by_file_name():
  sizes = ["b2", "l2", "s2", "xl2"]
  variants = ("dit", "sit", "mdt", "mdtv2")
  networks = [f"{name}_{size}" for name in variants for size in sizes]
  flows = [f"mdtv2_{size}_flow" for size in sizes]
  others = ["dit_xl2_512", "mdtv2_xl2_512", "dit_b16_pixels", "tread_b2", "tread_xl2"]
  others += ["microdit_b2", "microdit_xl2"]
  others += ["sprint_b2", "sprint_xl2"]
  others += ["maskdit_b2", "maskdit_xl2"]
  assert packaged_configs() == ["digits", *sorted(networks + flows + others)]


def test_file_on_disk_takes_precedence(elsewhere):
  (elsewhere / "configs").mkdir()
  (elsewhere / "configs" / "digits.py").touch()
  (elsewhere / "digits").touch()
  for name in ("configs/digits.py", "digits", "digits:text"):
    assert find_config(name) == name


def test_symlink_unpacked_as_a_file_does_not_hide_a_config(elsewhere):
  (elsewhere / "configs").write_text("mdt_jax/configs")
  assert find_config("configs/digits.py") == DIGITS


def test_folder_does_not_hide_a_packaged_config(elsewhere):
  (elsewhere / "digits").mkdir()
  assert find_config("digits") == DIGITS


@pytest.mark.parametrize(
  ("name", "texts"),
  [
    ("configs/digitz.py", ["no such file", "mdtv2_b2", "did you mean digits?"]),
    ("/nowhere/digits.py", ["no such file", "did you mean digits?"]),
    ("none.py", ["no such file", "dit_b2, dit_l2"]),
    (".", ["is a folder"]),
    ("", ["no such file"]),
  ],
)
def test_error_for_a_missing_config_lists_existing_ones(name, texts):
  with pytest.raises(SettingError) as error:
    find_config(name)
  assert (error.value.setting, error.value.value) == ("--config", name)
  assert all(text in error.value.accepted for text in texts)
