"""Statistics of the experiment on relations."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import relation_report
from benchmarks.relation_arms import CONDITIONS

CONDITION = CONDITIONS["16"]


def row(step, pairs):
  """A point at which the histograms of near and far pairs are `pairs`."""
  return {"step": step, "near_pairs": pairs, "far_pairs": pairs}


def test_share_counts_relations_over_images():
  assert relation_report.share([1, 2, 1]) == 0.5
  assert relation_report.share([0, 0, 7]) == 1


def test_way_is_zero_at_chance_and_one_if_all_hold():
  kinds = ("near_pairs", "far_pairs", "mirrored_rows")
  # 1/4 of the pairs of 4 glyphs are equal by chance: 9/16, 6/16 and 1/16 of the images.
  at_chance = row(1, [9, 6, 1])
  assert relation_report.way(at_chance, CONDITION, kinds) == pytest.approx(0)
  assert relation_report.way(row(1, [0, 0, 4]), CONDITION, kinds) == 1


def test_first_above_is_log_linear_between_points():
  found = relation_report.first_above([100, 400, 800], [0.0, 1.0, 1.0], 0.5)
  assert found == pytest.approx(200)
  assert relation_report.first_above([100, 400], [0.7, 0.9], 0.5) == 100
  assert np.isnan(relation_report.first_above([100, 400], [0.0, 0.4], 0.5))


def test_interval_covers_the_spread_of_seeds():
  runs = [[row(100, [0, 0, 400])], [row(100, [400, 0, 0])]]

  def statistic(points):
    return float(
      np.mean([relation_report.share(run[0]["near_pairs"]) for run in points])
    )

  assert relation_report.interval(runs, statistic) == (0, 1)
  same = [[row(100, [100, 0, 100])]] * 3
  low, high = relation_report.interval(same, statistic)
  error = 0.5 / np.sqrt(600)
  assert 0.5 - 3 * error < low < 0.5 - error < 0.5 + error < high < 0.5 + 3 * error


def test_ratio_to_an_arm_that_never_arrives(monkeypatch):
  holds, fails = [[0, 0, 400], [400, 0, 0]], [[400, 0, 0]] * 2
  curves = {
    "dit": fails,
    "mdtv2_unmasked": holds,
    "tread_end": fails,
    "dit_bias": holds,
  }
  runs = {
    (arm, seed): [row(100, last), row(200, first)]
    for arm, (first, last) in curves.items()
    for seed in (1, 2)
  }
  pairs = (("mdtv2_unmasked", "dit"), ("tread_end", "dit"), ("dit_bias", "dit_bias"))
  monkeypatch.setattr(relation_report, "COMPARED", pairs)
  assert relation_report.ratios(runs, CONDITION)[-3:] == [
    "- `mdtv2_unmasked` / `dit`: only the first [only the first, only the first]",
    "- `tread_end` / `dit`: never [never, never]",
    "- `dit_bias` / `dit_bias`: 1.00 [1.00, 1.00]",
  ]
