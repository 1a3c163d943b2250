"""METRICS: the table of scores. A new score is one entry."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.evaluation import registry, scores
from mdt_jax.evaluation.features import pixel_features
from mdt_jax.evaluation.references import read_reference, save_statistics
from mdt_jax.evaluation.registry import METRICS, Metric, check_metrics
from tests.evaluation.cheap import extractor, features, summary


def test_inception_score_without_weights_is_refused():
  with pytest.raises(SettingError, match="--metrics = 'sfid': needs the weights"):
    check_metrics("--metrics", ["frechet", "sfid"], has_inception=False)


@pytest.mark.parametrize("names", [[], ["kid"]])
def test_error_for_an_unknown_score_lists_all_scores(names):
  with pytest.raises(SettingError) as error:
    check_metrics("--metrics", names, has_inception=True)
  assert set(METRICS) <= set(re.findall(r"\w+", str(error.value)))


def test_scores_of_adm_need_inception():
  adm = {"fid", "sfid", "is", "precision", "recall"}
  assert adm <= set(registry.inception_metrics())


def test_other_metrics_need_no_inception():
  other = set(registry.other_metrics())
  assert {"frechet", "accuracy", "diversity"} <= other
  assert not other & set(registry.inception_metrics())


@pytest.mark.parametrize("name", METRICS)
def test_score_names_either_gaussian_or_kept_features(name):
  metric = METRICS[name]
  assert (metric.gaussian is None) != (metric.kept is None)


def test_new_score_needs_one_entry(files, tmp_path, monkeypatch):
  def compute(real, generated):
    means = [s.features["brightness"].mean() for s in (generated, real)]
    return float(means[0] - means[1])

  def brightness(params, images):
    return {"brightness": images.mean(axis=(1, 2, 3))[:, None]}

  metric = Metric(compute, brightness, kept="brightness", fewest=3)
  monkeypatch.setitem(METRICS, "brightness", metric)
  extract = scores.make_extractor(["brightness", "frechet"])
  names = ["brightness"]
  real = read_reference(files / "real.npz", names, extract)
  save_statistics(tmp_path / "real.npz", real)
  saved = read_reference(tmp_path / "real.npz", names, extract)
  found = scores.score(names, saved, read_reference(files / "fake.npz", names, extract))
  means = [np.load(files / f)["arr_0"].mean() for f in ("fake.npz", "real.npz")]
  assert found["brightness"] == pytest.approx(means[0] - means[1], rel=1e-4)


def test_statistics_of_a_new_frechet_distance_are_saved(files, tmp_path, monkeypatch):
  monkeypatch.setitem(METRICS, "fld", registry.frechet_metric("logits", features))
  save_statistics(tmp_path / "real.npz", summary(files / "real.npz", ["fld"]))
  found = read_reference(tmp_path / "real.npz", ["fld"], extractor())
  assert set(found.statistics) == {"logits"}


def test_scores_share_the_extractor_of_common_features(files):
  names = ["frechet", "accuracy", "diversity"]
  extract = scores.make_extractor(names)
  assert set(extract(np.load(files / "real.npz")["arr_0"][:3])) == {"pixels"}
  assert {METRICS[name].extract for name in names} == {pixel_features}


def test_precision_and_recall_share_one_computation(monkeypatch, files):
  calls = []
  compute = registry.metrics.precision_recall

  def count(*args):
    calls.append(args)
    return compute(*args)

  monkeypatch.setattr(registry.metrics, "precision_recall", count)
  names = ["precision", "recall"]
  real, fake = (summary(files / f, names) for f in ("real.npz", "fake.npz"))
  assert list(scores.score(names, real, fake)) == names
  assert len(calls) == 1
