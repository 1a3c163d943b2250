"""create_source and the registry of sources."""

from __future__ import annotations

import pytest

from mdt_jax.data import sources
from mdt_jax.errors import SettingError
from tests.data.folders import SIZE


def create(name, path=None, image_size=SIZE, channels=1):
  return sources.create_source(
    name, path=path, image_size=image_size, channels=channels, max_unreadable=0
  )


def test_digits_source_is_created_by_name():
  assert isinstance(create("digits"), sources.DigitsSource)


def test_images_source_is_created_by_name(three):
  assert len(create("images", three)) == 3


def test_error_for_an_unknown_source_lists_all_sources():
  with pytest.raises(SettingError) as error:
    create("imagenet")
  start, _, listed = str(error.value).partition(": accepted are ")
  assert start == "config.data.source = 'imagenet'"
  known = {"digits", "images", "latents", "npz", "arrays"}
  assert known | set(sources.SOURCES) <= set(listed.split(", "))


@pytest.mark.parametrize("name", ["images", "npz", "latents", "arrays"])
@pytest.mark.parametrize("path", [None, ""])
def test_file_source_without_a_path_is_refused(name, path):
  message = rf"^config.data.path = {path!r}: must be given"
  with pytest.raises(SettingError, match=message):
    create(name, path)


def test_digits_refuse_another_image_size():
  with pytest.raises(
    SettingError, match=r"^config.model.input_size = 32: accepted is 8 for digits"
  ):
    create("digits", image_size=32)


def test_digits_refuse_another_number_of_channels():
  with pytest.raises(
    SettingError, match=r"^config.model.in_channels = 3: accepted is 1 for digits"
  ):
    create("digits", channels=3)


def test_digits_refuse_a_path(tmp_path):
  message = rf"^config.data.path = '{tmp_path}': must be left out: .*digits.* images,"
  with pytest.raises(SettingError, match=message):
    create("digits", tmp_path)


@pytest.mark.parametrize(
  ("name", "pixels"),
  [
    ("digits", True),
    ("images", True),
    ("npz", True),
    ("latents", False),
    ("arrays", False),
  ],
)
def test_registry_marks_pixel_sources(name, pixels):
  assert sources.SOURCES[name].pixels == pixels
