"""What settings make, and which cannot make it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mdt_jax import factories
from mdt_jax.errors import SettingError
from tests.training.tiny import tiny_config

FIXTURES = Path(__file__).parent / "fixtures"


def test_a_mask_ratio_of_zero_means_no_masked_pass():
  assert factories.kept_lengths(tiny_config(**{"masking.ratio": 0.0})) is None


@pytest.mark.parametrize(
  ("source", "vae", "pixels", "encodes"),
  [
    ("digits", None, True, False),
    ("images", None, True, False),
    ("images", "folder", False, True),
    ("latents", None, False, False),
    ("latents", "folder", False, False),
    ("arrays", None, False, False),
  ],
)
def test_what_the_network_works_on_follows_from_the_data(source, vae, pixels, encodes):
  config = tiny_config(**{"data.source": source, "data.vae": vae})
  assert factories.holds_pixels(config) == pixels
  assert factories.encodes_images(config) == encodes


def test_examples_held_out_are_not_trained_on():
  config = tiny_config(**{"data.validation": 0.1})
  training = factories.make_source(config)
  validation = factories.make_source(config, held_out=True)
  assert (len(training), len(validation)) == (1617, 180)
  images = {training[i]["image"].tobytes() for i in range(len(training))}
  held_out = [validation[i]["image"].tobytes() for i in range(len(validation))]
  assert sum(image in images for image in held_out) < 5  # but for equal digits


@pytest.mark.parametrize("share", [-0.1, 0.6])
def test_a_share_that_cannot_be_held_out_is_refused(share):
  with pytest.raises(SettingError, match=r"config\.data\.validation"):
    factories.make_source(tiny_config(**{"data.validation": share}))


def test_nothing_held_out_cannot_be_validated_on():
  with pytest.raises(SettingError, match="holds no example out"):
    factories.make_source(tiny_config(), held_out=True)


def test_an_autoencoder_of_other_channels_than_the_network_s_is_refused():
  vae = str(FIXTURES / "vae")
  with pytest.raises(SettingError, match=r"config\.model\.in_channels = 1: must be 4"):
    factories.make_autoencoder(tiny_config(**{"data.vae": vae}))
