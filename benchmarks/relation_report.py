"""Tables and figures of the experiment on relations; see benchmarks/relations.py."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.relation_arms import CONDITIONS, Condition
from benchmarks.tables import DOCS, machine, write_table
from mdt_jax.evaluation.relation_scores import chance

PAIRS = ("near_pairs", "far_pairs", "mirrored_rows")  # kinds that the summary counts
GOALS = (0.5, 0.9)  # shares of the way from chance to 1
NUM_RESAMPLES = 400
PIECES = ("bias", "positions", "skips", "shortcuts")
# Pairs of arms of the hypotheses, and each piece of MDTv2's network.
COMPARED = (
  ("mdtv2_masked_30_50", "mdtv2_two_unmasked"),
  ("mdtv2_masked_30_50", "mdtv2_unmasked"),
  ("mdtv2_two_unmasked", "mdtv2_unmasked"),
  ("mdtv2_unmasked", "dit"),
  ("dit_depth_x2", "dit"),
  ("dit_batch_x2", "dit"),
  ("dit_bias", "mdtv2_unmasked"),
  ("mdtv2_masked_10_30", "mdtv2_two_unmasked"),
  ("mdtv2_masked_50_70", "mdtv2_two_unmasked"),
  ("mdtv2_masked_alone", "mdtv2_two_unmasked"),
  ("mdtv2_masked_half", "mdtv2_two_unmasked"),
  ("mdt_masked", "mdt_two_unmasked"),
  ("mdt_masked", "mdt_unmasked"),
  ("mdt_unmasked", "dit"),
  *((f"dit_{piece}", "dit") for piece in PIECES),
  *((f"mdtv2_no_{piece}", "mdtv2_unmasked") for piece in PIECES),
  ("tread_end", "dit"),
)
FIGURES = {
  "main": (
    "dit",
    "dit_depth_x2",
    "mdtv2_unmasked",
    "mdtv2_two_unmasked",
    "mdtv2_masked_30_50",
  ),
  "methods": ("dit", "maskdit_end", "microdit_end", "tread_end", "sprint_end"),
}

Row = dict[str, Any]
# (arm, seed) -> rows of its points, by step
Runs = dict[tuple[str, int], list[Row]]


def share(histogram: Sequence[int]) -> float:
  """The share of relations that hold; entry j counts images in which j hold."""
  most, images = len(histogram) - 1, sum(histogram)
  return float(np.dot(np.arange(most + 1), histogram)) / (most * images)


def way(row: Row, condition: Condition, kinds: Sequence[str]) -> float:
  """How far some kinds of relations are from chance (0) to always (1), on average."""
  relations, parts = condition.relations, []
  for kind in kinds:
    if kind in relations.kinds:
      base = chance(kind, relations)
      parts.append((share(row[kind]) - base) / (1 - base))
  return float(np.mean(parts))


def runs_of(rows: Sequence[Row], name: str, rates: dict[str, float | None]) -> Runs:
  """The runs of a condition with the learning rate of their arm, by arm and seed."""
  runs_in = CONDITIONS[name].part_of or name
  found: dict[tuple[str, int], dict[int, Row]] = collections.defaultdict(dict)
  for row in rows:
    arm, seed = row["arm"], row["seed"]
    if row["condition"] == runs_in and row["learning_rate"] == rates.get(arm):
      found[arm, seed].setdefault(row["step"], dict(row))
  runs: Runs = {}
  for key, by_step in found.items():
    points = [by_step[step] for step in sorted(by_step)]
    if points[-1]["step"] == CONDITIONS[name].num_steps:
      runs[key] = points
      _add_costs(points)
  return runs


def _add_costs(points: list[Row]) -> None:
  """Adds "flops" (10^9) and "seconds" from the start of the run to its points."""
  before, seconds = 0, 0.0
  for row in points:
    seconds += (row["step"] - before) * row["cpu_seconds"]
    before = row["step"]
    row["flops"] = row["step"] * row["gflops_a_step"]
    row["seconds"] = seconds


def cost_at(runs: Sequence[list[Row]], step: float, key: str) -> float:
  """Mean cost of some runs up to a step, linear between their points."""
  costs = []
  for points in runs:
    steps = [0.0, *(row["step"] for row in points)]
    costs.append(np.interp(step, steps, [0.0, *(row[key] for row in points)]))
  return float(np.mean(costs))


def first_above(steps: Sequence[float], values: Sequence[float], goal: float) -> float:
  """The step at which a curve first reaches a goal, log-linear between its points.

  Returns:
    The step; NaN if the curve stays below the goal.
  """
  previous = None
  for step, value in zip(steps, values, strict=True):
    if value >= goal:
      if previous is None:
        return float(step)
      low, below = previous
      part = (goal - below) / (value - below)
      return float(np.exp(np.log(low) + part * (np.log(step) - np.log(low))))
    previous = step, value
  return float("nan")


def resampled(rows: Sequence[Row], rng: np.random.Generator) -> list[Row]:
  """The points of a run with images drawn again from its own images."""
  again = []
  for row in rows:
    copy = dict(row)
    for kind, value in row.items():
      if isinstance(value, list):
        total = sum(value)
        copy[kind] = rng.multinomial(total, np.asarray(value) / total).tolist()
    again.append(copy)
  return again


def interval(
  runs: Sequence[list[Row]], statistic: Callable[[Sequence[list[Row]]], float]
) -> tuple[float, float]:
  """Range of a statistic by bootstrap over seeds and images: 2.5% to 97.5%.

  Three seeds are few, so that the range is near that of the seeds and covers the truth
  in fewer than 95% of cases.
  """
  rng = np.random.default_rng(0)
  found = []
  for _ in range(NUM_RESAMPLES):
    chosen = rng.integers(len(runs), size=len(runs))
    found.append(statistic([resampled(runs[i], rng) for i in chosen]))
  # Of two infinite values, numpy would interpolate to NaN.
  found = np.where(np.isnan(found), np.inf, found)
  low, high = np.quantile(found, (0.025, 0.975), method="nearest")
  return float(low), float(high)


def table(rows: Sequence[Row], name: str, rates: dict[str, float | None]) -> list[str]:
  """Lines of the table of a condition."""
  condition, runs = CONDITIONS[name], runs_of(rows, name, rates)
  kinds = condition.relations.kinds
  base = [points for (arm, _), points in runs.items() if arm == "dit"]
  if not base:
    return ["no finished run of dit"]

  last = condition.num_steps
  measured = ("valid_cells", "free_entropy")
  columns = [*kinds, *measured, "steps to 50%", "steps to 90%"]
  columns += ["FLOPs to 50%", "seconds to 50%"]
  lines = [
    "FLOPs and seconds are those of `dit` times the figure. A score is the mean of the "
    "seeds, and each of them.",
    "",
    f"| arm | learning rate | FLOPs a step | seconds a step | {' | '.join(columns)} |",
    f"| {' | '.join(['---'] * (4 + len(columns)))} |",
  ]
  start = reached(base, condition, GOALS[0])
  for arm in condition.arms:
    mine = [points for (other, _), points in sorted(runs.items()) if other == arm]
    if not mine:
      continue
    cells = [f"`{arm}`", f"{rates[arm]:g}"]
    for key in ("flops", "seconds"):
      cells.append(f"{cost_at(mine, last, key) / cost_at(base, last, key):.2f}")
    for kind in kinds:
      scores = [share(run[-1][kind]) for run in mine]
      cells.append(f"{np.mean(scores):.2f} ({', '.join(f'{x:.2f}' for x in scores)})")
    cells += [f"{np.mean([run[-1][name] for run in mine]):.2f}" for name in measured]
    for goal in GOALS:
      found = reached(mine, condition, goal)
      low, high = interval(
        mine, lambda points, goal=goal: reached(points, condition, goal)
      )
      cells.append(f"{_steps(found)} [{_steps(low)}, {_steps(high)}]")
    found = reached(mine, condition, GOALS[0])
    for key in ("flops", "seconds"):
      ratio = cost_at(mine, found, key) / cost_at(base, start, key)
      is_known = np.isfinite(ratio)  # `dit` may never reach the goal
      cells.append("never" if np.isnan(found) else f"{ratio:.2f}" if is_known else "-")
    lines.append(f"| {' | '.join(cells)} |")
  return lines + ratios(runs, condition)


def reached(runs: Sequence[list[Row]], condition: Condition, goal: float) -> float:
  """The step at which the mean P of some runs reaches a goal; NaN if never."""
  steps = [row["step"] for row in runs[0]]
  curves = [[way(row, condition, PAIRS) for row in run] for run in runs]
  return first_above(steps, np.mean(curves, axis=0).tolist(), goal)


def ratios(runs: Runs, condition: Condition) -> list[str]:
  """Lines of the ratios of steps to 50% between pairs of arms of the hypotheses."""
  lines = ["", "Steps to 50%, and their ratio with both arms resampled by seed:", ""]
  for first, second in COMPARED:
    seeds = {seed for arm, seed in runs if arm == first}
    seeds &= {seed for arm, seed in runs if arm == second}
    if not seeds:
      continue
    pairs = [[*runs[first, seed], *runs[second, seed]] for seed in sorted(seeds)]

    def ratio(points: Sequence[list[Row]]) -> float:
      half = len(points[0]) // 2
      steps = [
        reached([run[part] for run in points], condition, GOALS[0])
        for part in (slice(half), slice(half, None))
      ]
      first, second = np.where(np.isnan(steps), np.inf, steps)
      return first / second if np.isfinite(first) else np.inf

    low, high = interval(pairs, ratio)
    found, low, high = (_ratio(value) for value in (ratio(pairs), low, high))
    lines.append(f"- `{first}` / `{second}`: {found} [{low}, {high}]")
  return lines


def _steps(value: float) -> str:
  return f"{value:,.0f}" if np.isfinite(value) else "never"


def _ratio(value: float) -> str:
  """A ratio of steps: infinite if the first arm never arrives, 0 if only it does."""
  if value == 0:
    return "only the first"
  return f"{value:.2f}" if np.isfinite(value) else "never"


PLACES: dict[str, Callable[[Row], float]] = {
  "steps": lambda row: row["step"],
  "TFLOPs": lambda row: row["flops"] / 1e3,
  "seconds on one core": lambda row: row["seconds"],
}


def figure(
  rows: Sequence[Row],
  name: str,
  rates: dict[str, float | None],
  group: str,
) -> None:
  """Draws docs/evidence/CONDITION_GROUP.svg: scores by steps, FLOPs and seconds."""
  condition, runs = CONDITIONS[name], runs_of(rows, name, rates)
  curves: dict[str, Callable[[Row], float]] = {
    kind: lambda row, kind=kind: share(row[kind]) for kind in condition.relations.kinds
  }
  bases = {kind: chance(kind, condition.relations) for kind in curves}
  _draw(f"{name}_{group}", FIGURES[group], runs, PLACES, curves, bases)


def summary(rows: Sequence[Row], name: str, rates: dict[str, float | None]) -> None:
  """Draws docs/evidence/CONDITION.svg: P of the main arms, by steps and FLOPs."""
  condition, runs = CONDITIONS[name], runs_of(rows, name, rates)
  places = {label: PLACES[label] for label in ("steps", "TFLOPs")}
  curves = {"relations learnt": lambda row: way(row, condition, PAIRS)}
  _draw(name, FIGURES["main"], runs, places, curves, {"relations learnt": 0.0})


def _draw(
  file: str,
  arms: Sequence[str],
  runs: Runs,
  places: dict[str, Callable[[Row], float]],
  curves: dict[str, Callable[[Row], float]],
  bases: dict[str, float],
) -> None:
  """Draws the mean of the seeds, and the band between their extremes.

  Args:
    file: name of the picture in docs/evidence/, without .svg.
    arms: arms to draw, as far as they have runs.
    runs: see `runs_of`.
    places: label of a column of panels -> place of a point along the axis.
    curves: label of a row of panels -> height of a point.
    bases: label of a row -> height of the dotted line.
  """
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = "relations"  # the same bytes at each run
  from matplotlib import pyplot

  panels, axes = pyplot.subplots(
    len(curves),
    len(places),
    figsize=(3.7 * len(places), 0.6 + 2.2 * len(curves)),
    sharey=True,
    sharex="col",
    squeeze=False,
  )
  for row_of_axes, (kind, height) in zip(axes, curves.items(), strict=True):
    for axis, (label, place) in zip(row_of_axes, places.items(), strict=True):
      axis.axhline(bases[kind], color="0.6", linestyle=":")
      for number, arm in enumerate(arms):
        mine = [points for (other, _), points in runs.items() if other == arm]
        if not mine:
          continue
        heights = np.array([[height(row) for row in run] for run in mine])
        along = np.mean([[place(row) for row in run] for run in mine], axis=0)
        color = f"C{number}"
        axis.plot(along, heights.mean(0), color=color, label=arm)
        low, high = heights.min(0), heights.max(0)
        axis.fill_between(along, low, high, color=color, alpha=0.2, linewidth=0)
      axis.set_xscale("log")
      axis.set_ylim(-0.05, 1.02)
      if row_of_axes is axes[-1]:
        axis.set_xlabel(label)
    row_of_axes[0].set_ylabel(kind)
  axes[0, 0].legend(fontsize=7)
  panels.tight_layout()
  folder = DOCS / "evidence"
  folder.mkdir(exist_ok=True)
  panels.savefig(folder / f"{file}.svg", metadata={"Date": None})
  pyplot.close(panels)


def report(rows: Sequence[Row], rates: dict[str, dict[str, float | None]]) -> None:
  """Writes the tables and figures of all conditions with finished runs.

  Args:
    rows: all points of docs/evidence.jsonl.
    rates: condition -> arm -> learning rate of its runs; None for an arm without.
  """
  for name, chosen in rates.items():
    if not runs_of(rows, name, chosen):
      continue
    lines = [f"{machine()} (`python -m benchmarks.relations --report`).", ""]
    write_table("evidence.md", f"table {name}", lines + table(rows, name, chosen))
    summary(rows, name, chosen)
    if CONDITIONS[name].part_of is not None:
      continue
    for group in FIGURES:
      figure(rows, name, chosen, group)
