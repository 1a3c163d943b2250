"""LatentSet: whether the set is finished, and whether it fits on the disk."""

from __future__ import annotations

import json
import shutil

import pytest

from mdt_jax.data import latents
from mdt_jax.errors import SettingError
from tests.data import sets


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return sets.write(tmp_path_factory.mktemp("whole"))


def test_set_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(SettingError, match=r"--output = .*needs 0.0 GB"):
    sets.latent_set(tmp_path / "not" / "yet").check_disk()


def test_finished_set_with_other_settings_is_refused(whole):
  assert sets.latent_set(whole).is_finished()
  with pytest.raises(SettingError, match="dtype = 'float16', not 'bf"):
    sets.latent_set(whole, dtype="bfloat16").is_finished()


def test_num_bytes_counts_moments_and_labels(whole):
  """It does not count names and ArrayRecord's overhead."""
  latent_set = sets.latent_set(whole)
  layout = latent_set.layout
  assert latent_set.num_bytes == 24 * (layout.moment_bytes + 4) == 24 * 388


def with_sha256(folder):
  """Adds SHA-256 fields to the card, as earlier versions wrote them."""
  card = latents.read_card(folder)
  for shard in card["shards"]:
    shard["sha256"] = "0" * 64
  (folder / latents.CARD).write_text(json.dumps(card))


def test_card_with_sha256_fields_is_accepted(tmp_path):
  with_sha256(sets.write(tmp_path))
  assert sets.latent_set(tmp_path).is_finished()
  assert latents.verify(tmp_path) == sets.NUM_IMAGES


def test_lost_shard_of_a_set_with_sha256_fields_is_restored(whole, tmp_path):
  with_sha256(sets.write(tmp_path))
  path = tmp_path / latents.shard_name(1, sets.NUM_SHARDS)
  path.unlink()
  sets.write(tmp_path)
  assert path.read_bytes() == (whole / path.name).read_bytes()
  assert latents.verify(tmp_path) == sets.NUM_IMAGES
