"""The table of scores, `METRICS`.

To add a score, write a function (real summary, generated summary) -> float and add an
entry to `METRICS`. The entry names the features that the function uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from mdt_jax.data.examples import Source
from mdt_jax.data.relations import RelationsSource
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.evaluation import classifier, condition_scores, metrics, relation_scores
from mdt_jax.evaluation.features import (
  FeatureFn,
  inception_features,
  pixel_features,
  whole_images,
)
from mdt_jax.evaluation.summary import Summary
from mdt_jax.sampling.labels import BALANCED, RANDOM

# (real images, generated images) -> the score, or several scores by name.
ScoreFn: TypeAlias = Callable[[Summary, Summary], float | dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Metric:
  """The function of a score, and the data that the function needs.

  Attributes:
    compute: (real, generated) -> the score. Several metrics may share a function that
      returns all their scores by name; the function then runs once.
    extract: function that computes the features.
    gaussian: name of the features whose mean and covariance `compute` uses.
    kept: name of the features that `compute` uses for each image. A metric sets either
      `gaussian` or `kept`.
    needs_real: whether `compute` uses the real images.
    needs_labels: whether `compute` uses the labels of the images.
    needs_conditions: whether `compute` uses conditions of the images that are arrays.
    fewest: smallest number of images.
    check_labels: (labels of real images, labels of images to be drawn) -> None. Raises
      SettingError for "reference" or "num_images" if the score does not exist for these
      labels. Called before the images are drawn.
    check_data: (data of the run, labels of images to be drawn or None) -> None. Raises
      SettingError for "metrics" or "num_images" if the score does not exist for them.
      None: `compute` does not use the data itself, so that the score needs no run.
  """

  compute: ScoreFn
  extract: FeatureFn
  gaussian: str | None = None
  kept: str | None = None
  needs_real: bool = True
  needs_labels: bool = False
  needs_conditions: bool = False
  fewest: int = 2
  check_labels: Callable[[np.ndarray, np.ndarray], None] | None = None
  check_data: Callable[[Source, np.ndarray | None], None] | None = None

  @property
  def needs_inception(self) -> bool:
    """Whether the score needs Inception, whose weights the user provides."""
    return self.extract is inception_features


def frechet_metric(features: str, extract: FeatureFn) -> Metric:
  """Builds the metric of the Frechet distance between features.

  Args:
    features: name of the features.
    extract: function that computes the features.
  """

  def compute(real: Summary, generated: Summary) -> float:
    return metrics.frechet_distance(
      real.statistics[features], generated.statistics[features]
    )

  return Metric(compute, extract, gaussian=features)


def labelled_metric(
  name: str,
  function: Callable[..., float],
  check_labels: Callable[[np.ndarray, np.ndarray], None],
) -> Metric:
  """Builds a metric of labelled pixels.

  Args:
    name: name of the score, for errors.
    function: (real pixels (N, D), real labels (N,), generated pixels (M, D), generated
      labels (M,)) -> score.
    check_labels: see `Metric`.
  """

  def compute(real: Summary, generated: Summary) -> float:
    arguments: list[Any] = []
    for what, summary in (("real", real), ("generated", generated)):
      if summary.labels is None:
        raise SettingError(f"{what} images", None, f"{name} needs labels (arr_1)")
      arguments += [summary.features["pixels"], summary.labels]
    return function(*arguments)

  return Metric(
    compute, pixel_features, kept="pixels", needs_labels=True, check_labels=check_labels
  )


def _retrieval(real: Summary, generated: Summary) -> float:
  """Accuracy of finding the conditions of images; see `condition_scores`."""
  name = "retrieval"
  if real.conditions is None or generated.conditions is None:
    accepted = f"{name} needs a run whose data and network have arrays as conditions"
    raise SettingError("metrics", name, accepted)
  return condition_scores.retrieval_accuracy(
    real.features["pixels"],
    real.conditions,
    generated.features["pixels"],
    generated.conditions,
  )


def relation_metric(name: str) -> Metric:
  """Builds a metric of images of the source relations; see `relation_scores`."""

  def compute(real: Summary, generated: Summary) -> float:
    source = real.source
    assert isinstance(source, RelationsSource)  # `check_data` has seen the data
    pixels = generated.features["image"]
    images = pixels.reshape(-1, *source.image_shape)
    return relation_scores.relation_score(name, source, images, generated.labels)

  def check_data(source: Source, labels: np.ndarray | None) -> None:
    if not isinstance(source, RelationsSource):
      accepted = "needs a run with config.data.source = 'relations'"
      raise SettingError("metrics", name, accepted)
    relation_scores.check_score(name, source, labels)

  return Metric(
    compute,
    whole_images,
    kept="image",
    needs_real=False,
    needs_labels=True,
    fewest=1,
    check_data=check_data,
  )


def _inception_score(real: Summary, generated: Summary) -> float:
  """Inception score of the generated images."""
  del real
  return metrics.inception_score(generated.features["logits"])


def _precision_recall(real: Summary, generated: Summary) -> dict[str, float]:
  """Precision and recall by name."""
  precision, recall = metrics.precision_recall(
    real.features["pool3"], generated.features["pool3"]
  )
  return {"precision": precision, "recall": recall}


def _two_classes(real: Int[np.ndarray, " N"], drawn: Int[np.ndarray, " M"]) -> None:
  """Raises SettingError if all real images have the same class."""
  del drawn
  if len(np.unique(real)) < 2:
    raise SettingError("reference", None, "accuracy needs images of at least 2 classes")


def _repeated_class(real: Int[np.ndarray, " N"], drawn: Int[np.ndarray, " M"]) -> None:
  """Raises SettingError if no class has two real images and two images to be drawn."""
  repeated = []
  for labels in (drawn, real):
    classes, counts = np.unique(labels, return_counts=True)
    repeated.append(classes[counts > 1])
  if not np.intersect1d(*repeated).size:
    raise SettingError(
      "num_images",
      len(drawn),
      "diversity needs a class with at least 2 real images and 2 images to be drawn; "
      "balanced labels are those of all classes in turn",
    )


_MANIFOLD = Metric(
  _precision_recall,
  inception_features,
  kept="pool3",
  fewest=metrics.NUM_NEIGHBOURS + 1,
)

METRICS: dict[str, Metric] = {
  "fid": frechet_metric("pool3", inception_features),
  "sfid": frechet_metric("spatial", inception_features),
  "is": Metric(
    _inception_score, inception_features, kept="logits", needs_real=False, fewest=1
  ),
  "precision": _MANIFOLD,
  "recall": _MANIFOLD,
  "frechet": frechet_metric("pixels", pixel_features),
  "accuracy": labelled_metric(
    "accuracy", classifier.conditional_accuracy, _two_classes
  ),
  "retrieval": Metric(
    _retrieval, pixel_features, kept="pixels", needs_conditions=True, fewest=2
  ),
  "diversity": labelled_metric("diversity", classifier.diversity, _repeated_class),
  **{name: relation_metric(name) for name in relation_scores.NAMES},
}


def inception_metrics() -> list[str]:
  """Names of the scores that need Inception's weights; these are ADM's scores."""
  return [name for name, metric in METRICS.items() if metric.needs_inception]


def other_metrics() -> list[str]:
  """Names of the scores that need neither weights nor a run."""
  return [
    name
    for name, metric in METRICS.items()
    if not (metric.needs_inception or metric.needs_conditions or metric.check_data)
  ]


def default_labels(names: Sequence[str]) -> str:
  """Returns the default labels of drawn images.

  "random", as in the released scripts, if a score needs Inception; else "balanced".
  """
  return RANDOM if any(METRICS[name].needs_inception for name in names) else BALANCED


def check_metrics(setting: str, names: Sequence[str], has_inception: bool) -> None:
  """Raises SettingError for a score that does not exist or lacks Inception's weights.

  Args:
    setting: name of the setting, for the error.
    names: names of the scores.
    has_inception: whether Inception's weights are available.
  """
  if not names:
    raise SettingError(setting, "", f"must be some of {', '.join(METRICS)}")
  for name in names:
    check_choice(setting, name, METRICS)
    if METRICS[name].needs_inception and not has_inception:
      raise SettingError(
        setting, name, "needs the weights of Inception: see docs/evaluation.md"
      )
