"""score: scores by name. Cheap features replace the Inception features."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.evaluation import metrics, scores
from mdt_jax.evaluation.scores import score
from mdt_jax.evaluation.summary import Summary
from tests.evaluation.cheap import OF_FILES, features, photos, summary


def by_hand(files, name):
  found = [
    features(None, jnp.asarray(np.load(files / file)["arr_0"]))[name]
    for file in ("real.npz", "fake.npz")
  ]
  return [np.asarray(x) for x in found]


def test_scores_match_metrics_of_the_whole_features(files):
  found = score(OF_FILES, summary(files / "real.npz"), summary(files / "fake.npz"))
  precision, recall = metrics.precision_recall(*by_hand(files, "pool3"))
  expected = {
    "fid": metrics.frechet_distance(*by_hand(files, "pool3")),
    "sfid": metrics.frechet_distance(*by_hand(files, "spatial")),
    "is": metrics.inception_score(by_hand(files, "logits")[1]),
    "precision": precision,
    "recall": recall,
    "frechet": metrics.frechet_distance(*by_hand(files, "pixels")),
  }
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-4), name
  assert list(found) == list(OF_FILES)


def test_summary_keeps_image_features_only_when_needed(files):
  found = summary(files / "real.npz", ["fid", "sfid", "is"])
  assert set(found.statistics) == {"pool3", "spatial"}
  assert set(found.features) == {"logits"}


def test_scores_are_returned_in_the_requested_order(files):
  names = ["recall", "fid"]
  found = score(names, *(summary(files / f, names) for f in ("real.npz", "fake.npz")))
  assert list(found) == names


@pytest.mark.parametrize(
  ("name", "count", "fewest"), [("fid", 1, 2), ("recall", 3, 4), ("frechet", 1, 2)]
)
def test_too_few_images_in_a_file_are_refused(tmp_path, name, count, fewest):
  np.savez(tmp_path / "a.npz", *photos(count, 0))
  message = f"images = {count}: {name} needs at least {fewest}"
  with pytest.raises(SettingError, match=message):
    summary(tmp_path / "a.npz", [name])


def test_too_few_generated_images_are_refused(files):
  real = summary(files / "real.npz", ["recall"])
  with pytest.raises(SettingError, match=r"^num_images = 3: recall needs at least 4"):
    scores.check_comparable(["recall"], real, 3, np.arange(3), {"pool3": 3})


@pytest.mark.parametrize("name", ["accuracy", "diversity"])
def test_accuracy_and_diversity_need_labels(files, name):
  real = summary(files / "real.npz", [name])
  unlabelled = Summary(real.statistics, real.features)
  with pytest.raises(SettingError, match=f"generated images = None: {name} needs"):
    score([name], real, unlabelled)


@pytest.mark.parametrize("name", ["accuracy", "diversity", "precision"])
def test_images_of_other_sizes_are_refused(name):
  rng, labels = np.random.default_rng(0), np.arange(8) % 2

  def of_size(size):
    kept = scores.METRICS[name].kept
    features = {kept: rng.random((8, size), np.float32)}
    return Summary({}, features, labels)

  message = r"needs images of equal size and channels: .* 64 features, .* 192$"
  with pytest.raises(SettingError, match=message) as error:
    score([name], of_size(64), of_size(192))
  assert (error.value.setting, error.value.value) == ("metrics", name)
