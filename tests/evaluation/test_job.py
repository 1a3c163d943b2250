"""score_images: what it refuses before it reads anything."""

import pytest

from mdt_jax.errors import SettingError
from mdt_jax.evaluation.job import score_images


def test_retrieval_is_refused_before_a_file_is_read():
  with pytest.raises(SettingError, match=r"^metrics = 'retrieval': needs a run of"):
    score_images(["retrieval"], samples="missing.npz", reference="missing.npz")


def test_images_of_nothing_are_refused():
  with pytest.raises(SettingError, match=r"^samples = None: .* must be given"):
    score_images(["frechet"])
